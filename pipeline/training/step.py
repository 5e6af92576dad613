"""The training step, the same on one process and on N workers.

Each slide's draws are keyed by (seed, epoch, slide), and the loss of each slide is divided by the number of slides of
the whole step, so the sum of the workers' gradients is the gradient that one worker would have computed.

Shape letters: B slides of one worker in one step, Q numbers of the head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cluster import Context
from nested_ats import Image, ImpossibleWeightsError, Output, attention_sampling_loss, build_model
from nested_ats.models.patches import SamplingModel
from nested_ats.networks.trainable import batch_statistics
from nested_ats.reading import Reading, interleave
from nested_ats.targets import Target
from pipeline.config import Config
from pipeline.data.augment import of_patches
from pipeline.data.manifest import Entry
from pipeline.data.slides import draw_key
from pipeline.data.targets import row_of, truth
from pipeline.data.unreadable import SlideError
from pipeline.errors import DataError, UsageError
from pipeline.results.verdict import Observer
from pipeline.runs import autocast
from pipeline.sections import CoxTarget
from pipeline.training.course import KeptWeights, clip, entropy_weight, learning_rate, more_samples
from pipeline.training.epochs import TOTALS
from pipeline.training.init import begin_with
from pipeline.training.risks import RiskMemory

# This many parts of a batch read or compute while another goes backward: enough to keep a slow store busy, and at
# most half of them, since each holds what its backward pass needs.
_PARTS_AHEAD = 8

Row = tuple[Entry, Image, Tensor | None]  # a slide, its opened image, and its coarse view if that was read


class Learner:
    """A model that learns from one worker's slides of each step; `training` are the slides of all workers."""

    def __init__(
        self,
        context: Context,
        config: Config,
        training: Sequence[Entry],
        target: Target,
        channels: int,
        folder: Path,
        init: Mapping[str, Any] | None = None,
    ) -> None:
        self.context, self.config, self.training, self.folder = context, config, training, folder
        self.init = init
        self.target = target
        torch.manual_seed(config.seed)
        self.model = build_model(config.model, in_channels=channels, classes=target).to(context.device)
        if init:
            begin_with(self.model, init)
        _check_statistics(self.model, context)
        self.optimizer = torch.optim.AdamW(
            self._trained(),
            lr=config.train.learning_rate,
            weight_decay=config.train.weight_decay,
            # Gradients that are mere rounding noise (softmax ignores a shift of its logits) must not become steps of
            # the size of lr, or the weights would depend on the number of threads and workers.
            eps=1e-6,
        )
        self.observer = Observer(self.model)
        self.kept = KeptWeights(self.model, config.train.average)
        self.risks = RiskMemory(config.target, training) if isinstance(config.target, CoxTarget) else None
        self.class_weights = self._class_weights()
        self.totals = torch.zeros(len(TOTALS), dtype=torch.float64)  # sums of this epoch, named by `TOTALS`

    @property
    def steps(self) -> int:
        """Number of steps in an epoch."""
        return math.ceil(len(self.training) / self.config.train.batch_size)

    def _step(
        self,
        epoch: int,
        step: int,
        batch: list[Entry],
        images: list[Image],
        views: list[Tensor],
        readers: ThreadPoolExecutor,
    ) -> None:
        """Take one step of the whole group; a worker without slides takes part with a gradient of zero.

        A slide that cannot be read is left out, as if the step had only the others.
        """
        rows: list[Row] = list(zip(batch, images, views, strict=True))
        self.optimizer.zero_grad()
        sums = torch.zeros(len(TOTALS), device=self.context.device)
        course = self.config.train
        progress = (epoch + (step + 0.5) / self.steps) / course.epochs
        size = max(1, math.ceil(len(rows) / course.parts))

        parts = (rows[start : start + size] for start in range(0, len(rows), size))
        forward = (self._forward(part, (epoch,), more_samples(course, progress)) for part in parts)
        ahead = max(1, min(_PARTS_AHEAD, len(rows) // size // 2)) + 1
        for done in interleave(forward, readers, ahead=ahead, context=self._autocast):
            if done is None:
                continue
            output, truth = done[1], self._truth(done[0])
            loss, first = attention_sampling_loss(
                output.logits,
                truth,
                output.entropy,
                entropy_weight=entropy_weight(course, progress),
                target=self.target,
                weights=None if self.class_weights is None else self.class_weights[truth],
            )
            torch.autograd.backward(loss.sum())
            sums += self._sums(loss, first, output, truth)
            if self.risks:
                self.risks.keep(done[0], output.logits[:, 0])
        self.totals += self._reduce(sums).cpu()
        if self.risks:
            self.risks.gather(self.context)
        clip(self._trained(), course.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(course, progress)
        self.optimizer.step()
        self.kept.update()

    def _forward(
        self, rows: Sequence[Row], purpose: tuple[str | int, ...], more: int = 1
    ) -> Reading[tuple[Sequence[Entry], Output] | None]:
        """Run the model on the slides of a batch that can be read, if there are any.

        `purpose` and the slide's name key the draws; `more` multiplies the samples.
        """
        options: dict[str, Any] = {}
        if isinstance(self.model, SamplingModel):
            options = {"more": more}
            if self.model.training:
                options["augment"] = of_patches(self.config.train.augment)
        while rows:
            entries, images, views = zip(*rows, strict=True)
            keys = torch.tensor([draw_key(self.config.seed, *purpose, entry.slide_id) for entry in entries])
            known = None if views[0] is None else views
            try:
                return entries, (yield from self.model.classify(images, keys, views=known, **options))
            except ImpossibleWeightsError:
                raise self._diverged() from None
            except SlideError as error:
                rows = [row for row in rows if row[0].slide_id != error.slide_id]
        return None

    def _autocast(self) -> AbstractContextManager[Any]:
        return autocast(self.context.device, self.config.train.precision)

    def _reduce(self, sums: Tensor) -> Tensor:
        """Sum gradients and `sums` over the workers in one message, and average gradients over the slides."""
        parameters = self._trained()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([gradient.flatten() for gradient in gradients] + [sums.to(gradients[0].dtype)])
        self.context.all_reduce(flat)
        if not bool(flat.isfinite().all()):
            raise self._diverged()
        *parts, sums = torch.split(flat, [p.numel() for p in parameters] + [len(sums)])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = (part / sums[-1].clamp_min(1)).view_as(parameter)
        return sums

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def _diverged(self) -> DataError:
        return DataError(
            f"{self.folder}: the loss or its gradient is no longer finite; the last state stands: lower "
            "train.learning_rate, or look for NaN in floating-point slides, and start again with --overwrite"
        )

    def _sums(self, loss: Tensor, first: Tensor, output: Output, truth: Tensor) -> Tensor:
        """Sum what `TOTALS` names over the slides and patches of a batch."""
        right = self.target.right(output.logits, truth)
        right = torch.zeros_like(first) if right is None else right
        parts = (loss, first, right, output.entropy, self.observer.uniform_entropy(output))
        of_slides = torch.stack([part.detach().sum() for part in parts])
        return torch.cat([of_slides, self.observer.take().to(of_slides), of_slides.new_tensor([len(truth)])])

    def _truth(self, batch: Sequence[Entry]) -> Tensor:
        """Return what is true of slides, as the target's loss takes it."""
        found = truth(self.target, self.config.target, [row_of(entry) for entry in batch])
        return (self.risks.truth(found) if self.risks else found).to(self.context.device)

    def _class_weights(self) -> Tensor | None:
        """Weight of each class, (Q,), with mean one over the training slides; None where all weigh alike."""
        if self.config.train.class_weights == "none":
            return None
        counts = torch.bincount(self._truth(self.training), minlength=self.target.outputs).float()
        return len(self.training) / (self.target.outputs * counts.clamp_min(1))


def _check_statistics(model: nn.Module, context: Context) -> None:
    """Raise UsageError where each worker would normalise by the statistics of its own patches."""
    layers = batch_statistics(model) if context.world_size > 1 else []
    if layers:
        raise UsageError(
            f"model.trainable: the encoder has {len(layers)} layers of batch normalisation, such as {layers[0]}; "
            f"trained whole, each of the {context.world_size} workers would normalise by its own patches. Set it to "
            "none or to the number of the last stages to train (the statistics then stay as they are), or train with "
            "one worker"
        )
