"""Contributions are what the score loses without a patch, for every target, and all of them make the whole score."""

from __future__ import annotations

import pytest
import torch

from nested_ats import ArrayImage, Classes, DeepMILConfig, Mask, Ordinal, UniformConfig, build_model
from nested_ats.contribution import evidence, explained, score, whole_map
from nested_ats.estimators import expectation
from nested_ats.phases import leaves_of, take_all

from .test_targets import TARGETS

by_kind = pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.kind)


def of_numbers(target, numbers, answer):
    """The score that is explained, of what the head returns: written apart from the code, from the docstring."""
    if isinstance(target, Ordinal):
        chances = numbers.exp()
        above = chances[..., 1:].sum(-1)
        return (above / (1 - above)).log()  # of any threshold: they differ by a constant
    if isinstance(target, Classes):
        others = [i for i in range(target.outputs) if i != answer]
        return numbers[..., answer] - numbers[..., others].mean(-1)
    if target.kind == "regression":
        return target.answers(numbers)[..., 0]
    if target.kind == "survival":
        return numbers[..., : answer + 1].mean(-1)
    return numbers[..., answer]


def model_of(target, config=None, **options):
    torch.manual_seed(1)
    config = config or UniformConfig(samples=5, patch_size=24, cell=16.0, features=6, **options)
    model = build_model(config, in_channels=1, classes=target).double().eval()
    torch.nn.init.normal_(model.head.weight)
    torch.nn.init.normal_(model.head.bias)
    return model


@pytest.fixture
def image():
    return ArrayImage(torch.rand(1, 60, 90, generator=torch.Generator().manual_seed(0), dtype=torch.float64))


@by_kind
class TestExact:
    def test_it_is_what_the_score_loses_without_the_patch(self, target, image):
        model = model_of(target)
        with torch.no_grad():
            output = model([image], torch.tensor([3]))
            phase = output.phases[0]
            features = model.encode([image], phase.centers_l0)
        for answer in range(len(target.names)):
            of = score(model, answer)
            weights = (phase.z * phase.attention)[0]
            found = weights * evidence(model, image, phase.centers_l0[0], of)
            for number in range(len(weights)):
                without = phase.z.clone()
                without[0, number] = 0
                fewer = model.head(expectation(phase.attention, features, without))
                lost = of_numbers(target, output.logits, answer) - of_numbers(target, fewer, answer)
                torch.testing.assert_close(found[number], lost[0].detach())

    def test_all_of_them_and_the_offset_are_the_score(self, target, image):
        model = model_of(target)
        output = model([image], torch.tensor([3]))
        phase, answer = output.phases[0], len(target.names) - 1
        of = score(model, answer)
        values = (phase.z * phase.attention)[0] * evidence(model, image, phase.centers_l0[0], of)
        expected = of_numbers(target, output.logits, answer)[0]
        if isinstance(target, Ordinal):  # the log odds of the lowest threshold
            expected = expected + model.head.thresholds[0]
        torch.testing.assert_close(values.sum() + of.offset, expected.detach())


def test_a_calibrated_model_has_smaller_contributions(image):
    model = model_of(Classes(("a", "b", "c")))
    before = score(model, 0)
    model.head.temperature = 2.0
    after = score(model, 0)
    torch.testing.assert_close(after.weight, before.weight / 2)
    assert after.offset == pytest.approx(before.offset / 2)


def test_names_say_what_is_explained():
    names = {
        "classes": "logit of b against the mean of the others",
        "ordinal": "log odds of a higher grade",
        "multilabel": "logit of pr",
        "regression": "value",
        "cox": "log hazard ratio",
        "survival": "mean log odds of the event up to 3",
    }
    for target in TARGETS:
        assert score(model_of(target), min(1, len(target.names) - 1)).name == names[target.kind]
    two = Classes(("normal", "tumour"))
    assert score(model_of(two), 1).name == "logit of tumour against normal"
    assert score(model_of(Classes(("only",))), 0).name == "logit of only"
    assert explained(two, [0.2, 0.8]) == 1
    assert explained(TARGETS[-1], [0.9, 0.8, 0.1]) == 2


class TestEverywhere:
    @pytest.mark.parametrize("depth", [1, 2, 3])
    @pytest.mark.parametrize("options", [{}, {"attention": "independent"}, {"group": 2}, {"location": True}])
    def test_it_is_the_model_that_opens_everything(self, tiny_model, tiny_image, depth, options, monkeypatch):
        """Sums of maps against a forward pass that takes every unit of every level."""
        monkeypatch.setattr("nested_ats.models.nested._OPEN_REGIONS", 2)
        model, image = tiny_model(depth, **options), tiny_image(depth)
        full = model([image], torch.tensor([0]), sampler=take_all)
        of, shares = score(model, 1), []
        found = whole_map(model, image, model.leaves(image), of, on_progress=shares.append)
        assert float(found.attention.sum()) == pytest.approx(1)
        expected = of_numbers(model.target, full.logits, 1)[0].detach()
        torch.testing.assert_close(found.contribution.sum() + of.offset, expected)
        assert shares == sorted(shares)
        assert shares[-1] == pytest.approx(1)

    def test_a_draw_of_everything_has_the_same_map(self, tiny_model, tiny_image):
        from nested_ats.maps import attention_map

        model, image = tiny_model(2), tiny_image(2)
        full = model([image], torch.tensor([0]), sampler=take_all)
        expected, pitch = attention_map([full], image.shapes[0])
        found = whole_map(model, image, model.leaves(image), score(model, 0))
        assert found.pitch_l0 == pitch
        torch.testing.assert_close(found.attention, expected)

    def test_what_is_off_the_mask_has_nothing(self):
        pixels = torch.rand(1, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        inside = torch.zeros(4, 4, dtype=torch.bool)
        inside[1:3, 1:3] = True
        image = ArrayImage(pixels, mask=Mask(inside, (16.0, 16.0)))
        model = model_of(Classes(("a", "b")), prior="tissue", min_tissue=0.5)
        found = whole_map(model, image, model.leaves(image), score(model, 1))
        assert torch.equal(found.attention > 0, inside)
        assert torch.equal(found.contribution != 0, inside)

    def test_a_model_that_looks_everywhere_has_all_it_needs(self, image):
        config = DeepMILConfig(patch_size=24, stride=16, features=6)
        model = model_of(Classes(("a", "b", "c")), config)
        output = model([image], torch.tensor([0]))
        of = score(model, 2)
        found = whole_map(model, image, [leaves_of(output.phases[-1])], of)
        torch.testing.assert_close(
            found.contribution.sum() + of.offset, of_numbers(model.target, output.logits, 2)[0].detach()
        )

    def test_a_coarser_map_has_the_same_sum(self, tiny_model, tiny_image):
        model, image = tiny_model(2), tiny_image(2)
        of = score(model, 0)
        fine, coarse = (whole_map(model, image, model.leaves(image), of, pitch_l0=p) for p in (None, 24.0))
        assert coarse.attention.numel() < fine.attention.numel()
        torch.testing.assert_close(coarse.contribution.sum(), fine.contribution.sum())


def test_no_patch_has_no_evidence(image):
    model = model_of(Classes(("a", "b")))
    empty = torch.empty(0, 2, dtype=torch.float64)
    assert evidence(model, image, empty, score(model, 0)).shape == (0,)
