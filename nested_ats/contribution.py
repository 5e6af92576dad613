"""What each patch adds to the answer: attention, times what the head makes of the patch's feature.

The head is linear in the feature that it sees, F_hat = sum z a f, so what it computes is a sum over the drawn patches
and a constant. The summand of a patch is its contribution: exactly what the score would lose if the weight z a of the
patch were 0. No gradient and no approximation is involved.

Which score is explained follows the target, since probabilities are not linear in F_hat:

- classes: the logit of one class less the mean logit of the others; of two classes, the log odds of the one
- grades in an order: the score of the proportional odds model, by which the log odds of every "higher than" move
- labels: the logit of one label
- a number: the number, in its own unit
- Cox: the log hazard ratio
- discrete hazards: the mean, over the intervals up to a time, of the log odds of the event in each

Shape letters: P patches, D features, L outputs of the head's linear layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from typing import NamedTuple

import torch
from torch import Tensor

from nested_ats.images import Image
from nested_ats.maps import empty_map, spread_cells
from nested_ats.models.base import ImageModel
from nested_ats.models.patches import PatchModel
from nested_ats.phases import Leaves
from nested_ats.reading import run
from nested_ats.targets import Classes, Cox, DiscreteSurvival, Ordinal, Regression, Target

_AT_ONCE = 256  # patches that are encoded together


class Score(NamedTuple):
    """What contributions add up to: ``offset + weight @ F_hat``.

    Attributes
    ----------
    name
        In words.
    weight
        (D,) float64.
    offset
        The score of no patch at all.
    """

    name: str
    weight: Tensor
    offset: float


class WholeMap(NamedTuple):
    """Attention and contributions of all leaves as maps over the image; see `attention_map`.

    Attributes
    ----------
    attention
        (H, W) float64 that sums to one.
    contribution
        (H, W) float64: with the score's offset it sums to the score of the model that draws nothing.
    pitch_l0
        Side of a pixel of the maps in level-0 pixels.
    """

    attention: Tensor
    contribution: Tensor
    pitch_l0: float


def explained(target: Target, answers: Sequence[float]) -> int:
    """Return the number of the answer to explain: the likeliest class or label, or survival past the last time."""
    if isinstance(target, DiscreteSurvival):
        return len(answers) - 1
    return max(range(len(answers)), key=lambda number: answers[number])


def score(model: ImageModel, answer: int) -> Score:
    """Return the score by which contributions to an answer are told; see above.

    Parameters
    ----------
    model
        A model of any target.
    answer
        The number of the class, the label, or the time (`Target.names`); where there is one answer, or grades in an
        order, all have the same score.
    """
    head, target = model.head, model.target
    name, direction, start = _direction(target, answer)
    # A calibration divides the logarithms of the probabilities of grades, and not their score.
    scale = 1.0 if isinstance(target, Ordinal) else 1 / head.temperature
    weight, bias = head.weight.detach().double(), head.bias.detach().double()
    direction = direction.to(weight.device) * scale
    return Score(name, head.scale * (direction @ weight), start + float(direction @ bias))


def _direction(target: Target, answer: int) -> tuple[str, Tensor, float]:
    """Name, (L,) weights of the outputs of the linear layer, and constant of a target's score."""
    only = torch.ones(1, dtype=torch.float64)
    names = target.names
    match target:
        case Ordinal():
            return "log odds of a higher grade", only, 0.0
        case Classes():
            others = len(names) - 1
            weights = torch.full((len(names),), -1 / max(others, 1), dtype=torch.float64)
            weights[answer] = 1
            against = names[1 - answer] if others == 1 else "the mean of the others"
            return f"logit of {names[answer]}" + (f" against {against}" if others else ""), weights, 0.0
        case Regression():
            return names[0], only * target.std, target.mean
        case Cox():
            return "log hazard ratio", only, 0.0
        case DiscreteSurvival():
            until = (torch.arange(len(names)) <= answer).double()
            return f"mean log odds of the event up to {target.times[answer]:g}", until / until.sum(), 0.0
        case _:
            return f"logit of {names[answer]}", torch.eye(len(names), dtype=torch.float64)[answer], 0.0


@torch.no_grad()
def evidence(
    model: PatchModel,
    image: Image,
    centers_l0: Tensor,
    of: Score,
    *,
    readers: Executor | None = None,
    on_part: Callable[[float], object] = float,
) -> Tensor:
    """Score of each patch alone, but for the offset: with its weight z a in F_hat, it is the contribution.

    Parameters
    ----------
    model
        A model that sees patches. They are encoded a part at a time, or found in its store.
    image
        The image.
    centers_l0
        (P, 2) float64: centres of the patches in level-0 pixels.
    of
        The score.
    readers
        The threads that read; by default this thread does.
    on_part
        Is called with the share that is done.

    Returns
    -------
    (P,) float64
    """
    found = [torch.zeros(0, dtype=torch.float64)]
    parts = torch.split(centers_l0, _AT_ONCE) if len(centers_l0) else ()
    for number, part in enumerate(parts, 1):
        features = run(model.encoding_of_many(image, part), readers)
        found.append((features.double() @ of.weight).cpu())
        on_part(number / len(parts))
    return torch.cat(found)


def whole_map(
    model: PatchModel,
    image: Image,
    leaves: Iterable[Leaves],
    of: Score,
    *,
    pitch_l0: float | None = None,
    readers: Executor | None = None,
    on_progress: Callable[[float], object] = float,
) -> WholeMap:
    """Map attention and contributions of leaves, each of which is encoded: all patches of the image.

    Parameters
    ----------
    model, image, of, readers
        As for `evidence`.
    leaves
        All leaves of the image: `SamplingModel.leaves`, or those of a model that has taken all (`leaves_of`).
    pitch_l0
        Side of a pixel of the maps in level-0 pixels; by default that of the leaves.
    on_progress
        Is called with the share that is done.
    """
    extent = model.config.cell_l0
    pitch = pitch_l0 or extent
    attention, contribution = (empty_map(image.shapes[0], pitch) for _ in range(2))
    begun = 0.0
    for part in leaves:
        weights = part.attention.detach().double().cpu()

        def tell(share: float, begun: float = begun, done: float = part.done) -> None:
            on_progress(begun + share * (done - begun))

        values = weights * evidence(model, image, part.centers_l0, of, readers=readers, on_part=tell)
        spread_cells(attention, weights, part.centers_l0, extent, pitch)
        spread_cells(contribution, values, part.centers_l0, extent, pitch)
        begun = part.done
    return WholeMap(attention / attention.sum(), contribution, pitch)
