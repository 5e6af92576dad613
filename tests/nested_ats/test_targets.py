"""Targets against references: their losses, what they answer, the best guess, and Cox's model against a library's."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss
from sksurv.linear_model import CoxPHSurvivalAnalysis
from torch.nn import functional

from nested_ats import Classes, Cox, DiscreteSurvival, MultiLabel, Ordinal, Regression, attention_sampling_loss
from nested_ats.evaluation import estimate, expected_error
from nested_ats.targets import as_target, cumulative_hazard, read_target

TARGETS = [
    Classes(("a", "b", "c")),
    Ordinal(("low", "middle", "high")),
    MultiLabel(("er", "pr")),
    Regression(3.5, 0.25),
    Cox(),
    DiscreteSurvival((1.5, 3.0, 8.0)),
]
by_kind = pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.kind)


def outcomes(target, size=60, seed=0):
    """Random truths that a target's loss takes."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(target, Classes):
        return torch.randint(0, target.outputs, (size,), generator=generator)
    if isinstance(target, MultiLabel):
        labels = (torch.rand(size, target.outputs, generator=generator) < 0.3).double()
        return labels.masked_fill(torch.rand(size, target.outputs, generator=generator) < 0.2, math.nan)
    times = torch.rand(size, generator=generator, dtype=torch.float64) * 10
    if isinstance(target, Regression):
        return times
    events = (torch.rand(size, generator=generator) < 0.6).double()
    if isinstance(target, DiscreteSurvival):
        return target.intervals(times, events)
    return torch.stack([cumulative_hazard(times, torch.zeros(size), events, times), events], -1)


@by_kind
class TestEvery:
    def test_plain_values_make_it_again(self, target):
        assert read_target(target.plain) == target

    def test_answers_are_those_of_the_linear_scale(self, target):
        logits = target.head(4, 8.0)(torch.randn(7, 4, generator=torch.Generator().manual_seed(0)))
        assert logits.shape == (7, target.outputs)
        answers = target.answers(logits)
        assert answers.shape == (7, len(target.names))
        torch.testing.assert_close(target.from_linear(target.linear(logits)).float(), answers)
        assert not target.probabilities or bool(((answers >= 0) & (answers <= 1)).all())

    def test_no_other_answer_that_is_the_same_for_all_is_better_than_the_guess(self, target):
        truth = outcomes(target)
        guess = target.guess(truth).double().requires_grad_()
        if isinstance(target, MultiLabel):  # a sample weighs by its known labels; here all of them are known
            truth = truth.nan_to_num(0.0)
            guess = target.guess(truth).double().requires_grad_()
        loss = target.loss(guess.expand(len(truth), -1), truth).mean()
        (slope,) = torch.autograd.grad(loss, guess)
        if type(target) is Ordinal:  # its numbers are log-probabilities
            slope = slope - slope.mean()
        assert slope.abs().max() < 1e-5

    def test_an_interval_holds_its_answer_and_shrinks_with_draws(self, target):
        torch.manual_seed(0)
        head = target.head(4, 8.0)
        features = torch.randn(64, 3, 4) * 0.1
        few, many = (estimate(head, features[:draws], target) for draws in (4, 64))
        for found in (few, many):
            assert bool(((found.low <= found.answers) & (found.answers <= found.high)).all())
        assert (many.high - many.low).mean() < 0.5 * (few.high - few.low).mean()
        assert expected_error(head, features, target).mean() < 0.5 * expected_error(head, features[:4], target).mean()

    def test_the_loss_of_training_takes_the_entropy_off_and_weighs_the_first_term(self, target):
        truth, logits = outcomes(target, 5), torch.randn(5, target.outputs, dtype=torch.float64)
        weights = torch.tensor([1.0, 2.0, 0.0, 1.0, 1.0], dtype=torch.float64)
        loss, first = attention_sampling_loss(
            logits, truth, torch.full((5,), 2.0), entropy_weight=0.1, target=target, weights=weights
        )
        torch.testing.assert_close(first, weights * target.loss(logits, truth))
        torch.testing.assert_close(loss, first - 0.2)


def test_a_number_of_classes_is_a_target():
    assert as_target(3) == Classes(("0", "1", "2"))
    assert as_target(Cox()) == Cox()


def test_the_interval_of_a_number_is_students_t():
    """On a scale that is linear the interval is that of a mean, by hand."""
    target, head = Regression(10.0, 2.0), torch.nn.Linear(1, 1)
    features = torch.tensor([1.0, 2.0, 4.0, 5.0])[:, None, None]
    with torch.no_grad():
        found = estimate(head, features, target)
    values = target.answers(head(features))[:, 0, 0].detach().double()
    error = values.std() / 2
    assert float(found.answers) == pytest.approx(float(values.mean()), rel=1e-6)
    assert float(found.standard_error) == pytest.approx(float(error), rel=1e-5)
    assert float(found.high) == pytest.approx(float(values.mean() + 3.18245 * error), rel=1e-4)


class TestOrdinal:
    def test_probabilities_are_those_of_proportional_odds(self):
        head = Ordinal(tuple("abcde")).head(3, 2.0).double()
        with torch.no_grad():
            head.thresholds.copy_(torch.tensor([-1.0, 0.2, -0.5, 0.9]))
        features = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        score = (features * 2) @ head.weight[0] + head.bias
        thresholds = np.cumsum([-1.0, math.exp(0.2), math.exp(-0.5), math.exp(0.9)])
        above = [torch.ones(20), *((score - threshold).sigmoid() for threshold in thresholds), torch.zeros(20)]
        wanted = torch.stack([low - high for low, high in pairwise(above)], -1)
        torch.testing.assert_close(head(features).exp(), wanted)

    def test_far_scores_have_gradients(self):
        head = Ordinal(("a", "b", "c")).head(1, 1.0)
        with torch.no_grad():
            head.weight.fill_(1.0)
            head.bias.zero_()
        far = torch.tensor([[-200.0], [200.0]], requires_grad=True)
        loss = functional.cross_entropy(head(far), torch.tensor([2, 0]), reduction="sum")
        (slope,) = torch.autograd.grad(loss, far)
        assert loss.item() == pytest.approx(400, rel=0.01)
        assert slope.flatten().tolist() == pytest.approx([-1, 1])

    @pytest.mark.parametrize("classes", [2, 3, 7])
    def test_grades_begin_equally_likely(self, classes):
        head = Ordinal(tuple(map(str, range(classes)))).head(4, 8.0)
        with torch.no_grad():
            head.bias.zero_()
        assert head(torch.zeros(1, 4)).exp().flatten().tolist() == pytest.approx([1 / classes] * classes, abs=1e-6)


class TestMultiLabel:
    def test_the_loss_is_that_of_scikit_learn_over_known_labels(self):
        target = MultiLabel(("a", "b", "c"))
        logits = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        truth = torch.tensor([[0, 1, 1], [1, 0, 0], [1, 1, 0], [0, 0, 1], [1, 0, 1], [0, 1, 0]]).double()
        truth[0, 1] = truth[3, 0] = truth[3, 1] = math.nan
        for row in range(6):
            known = ~truth[row].isnan()
            wanted = log_loss(truth[row][known], logits[row][known].sigmoid(), labels=[0, 1])
            assert float(target.loss(logits, truth)[row]) == pytest.approx(wanted)
        unknown = torch.full((1, 3), math.nan, dtype=torch.float64)
        assert float(target.loss(logits[:1], unknown)) == 0
        assert target.right(logits, truth)[3] == (logits[3, 2] > 0)


def cohort(size=300, seed=0):
    """Times with a hazard of exp(x beta), a third of them censored, many of them equal."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(size, 3))
    times = rng.exponential(np.exp(-(x @ [1.0, -0.5, 0.0])))
    censored = rng.exponential(2.0, size)
    events = times <= censored
    return x, np.ceil(np.minimum(times, censored) * 20) / 20, events


class TestCox:
    def test_the_hazard_is_breslows(self):
        x, times, events = cohort()
        outcome = np.array(list(zip(events, times, strict=True)), dtype=[("event", bool), ("time", float)])
        fitted = CoxPHSurvivalAnalysis(ties="breslow").fit(x, outcome)
        baseline = fitted.cum_baseline_hazard_
        risks = torch.tensor(fitted.predict(x))
        found = cumulative_hazard(
            torch.tensor(times), risks, torch.tensor(events).double(), torch.tensor(baseline.x.copy())
        )
        assert found.tolist() == pytest.approx(baseline.y.tolist(), rel=1e-6)

    def test_the_gradient_is_that_of_the_partial_likelihood(self):
        x, times, events = cohort(40)
        risks = torch.tensor(x @ [0.3, 0.2, -0.1], requires_grad=True)
        partial = torch.zeros((), dtype=torch.float64)
        for i in np.flatnonzero(events):
            partial = partial + risks[torch.tensor(times >= times[i])].logsumexp(0) - risks[i]
        (wanted,) = torch.autograd.grad(partial, risks)
        when, happened = torch.tensor(times), torch.tensor(events).double()
        hazard = cumulative_hazard(when, risks.detach(), happened, when)
        loss = Cox().loss(risks[:, None], torch.stack([hazard, happened], -1))
        (found,) = torch.autograd.grad(loss.sum(), risks)
        torch.testing.assert_close(found, wanted)

    def test_steps_of_a_few_samples_find_the_coefficients_of_a_library(self):
        """Each step has 10 of 300 samples and remembers the risks of the others."""
        x, times, events = cohort()
        outcome = np.array(list(zip(events, times, strict=True)), dtype=[("event", bool), ("time", float)])
        wanted = CoxPHSurvivalAnalysis(ties="breslow").fit(x, outcome).coef_
        when, happened, seen = torch.tensor(times), torch.tensor(events).double(), torch.tensor(x)
        beta = torch.zeros(3, 1, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([beta], lr=0.1)
        known, generator = torch.zeros(len(x), dtype=torch.float64), torch.Generator().manual_seed(0)
        for epoch in range(60):
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * (1 - epoch / 60)
            for rows in torch.randperm(len(x), generator=generator).split(10):
                hazard = cumulative_hazard(when, known, happened, when[rows])
                risks = seen[rows] @ beta
                optimizer.zero_grad()
                torch.autograd.backward(Cox().loss(risks, torch.stack([hazard, happened[rows]], -1)).mean())
                optimizer.step()
                known[rows] = risks[:, 0].detach()
        assert beta.flatten().tolist() == pytest.approx(wanted.tolist(), abs=0.03)


class TestDiscreteSurvival:
    target = DiscreteSurvival((1.0, 2.0, 3.0))

    def test_times_become_intervals(self):
        times = torch.tensor([0.5, 1.0, 1.5, 3.0, 4.0, 2.0, 2.5, 5.0, 0.5])
        events = torch.tensor([1, 1, 1, 1, 1, 0, 0, 0, 0])
        wanted = [[0, 1], [0, 1], [1, 1], [2, 1], [3, 0], [2, 0], [2, 0], [3, 0], [0, 0]]
        assert self.target.intervals(times, events).tolist() == wanted

    def test_the_loss_is_the_likelihood_by_hand(self):
        logits = torch.tensor([[0.2, -1.0, 0.7]], dtype=torch.float64)
        hazard = logits.sigmoid()[0].tolist()
        survived = [1.0, *np.cumprod([1 - h for h in hazard])]
        for interval in range(3):
            happened = self.target.loss(logits, torch.tensor([[interval, 1]]))
            assert float(happened) == pytest.approx(-math.log(survived[interval] * hazard[interval]))
        for intervals in range(4):
            lost = self.target.loss(logits, torch.tensor([[intervals, 0]]))
            assert float(lost) == pytest.approx(-math.log(survived[intervals]))
        assert self.target.answers(logits)[0].tolist() == pytest.approx(survived[1:])

    def test_the_guess_is_kaplan_and_meiers(self):
        """With every event at the end of an interval the estimates are equal."""
        from sksurv.nonparametric import kaplan_meier_estimator

        rng = np.random.default_rng(0)
        times, events = rng.integers(1, 4, 80).astype(float), rng.random(80) < 0.7
        guess = self.target.guess(self.target.intervals(torch.tensor(times), torch.tensor(events).double()))
        _, wanted = kaplan_meier_estimator(events, times)
        assert self.target.answers(guess).tolist() == pytest.approx(wanted.tolist())
