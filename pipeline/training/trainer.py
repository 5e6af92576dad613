"""The training loop: the same lines on one process and on N workers.

It uses a small context (rank, world size, sums over workers) and knows nothing of Ray. Neither the number of workers
nor interruptions change a run: a step's slides are a function of (seed, epoch, step) and are dealt out to the workers
in turn, which together take one step (`pipeline.training.step`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cluster import Context
from nested_ats import Image, save_model
from nested_ats.models.patches import PatchModel
from nested_ats.reading import interleave
from nested_ats.targets import Target, read_target
from pipeline.allocator import keep_freed_memory
from pipeline.config import Config, parse_config
from pipeline.data.augment import AugmentedImage
from pipeline.data.features import DiskFeatures, use_features
from pipeline.data.manifest import Entry, read_entry
from pipeline.data.samples import SampleCache
from pipeline.data.slides import draw_key
from pipeline.data.unreadable import SlideError, Unreadable, WatchedImage
from pipeline.errors import DataError, UsageError
from pipeline.files import make_folder, write_atomic
from pipeline.net import Net
from pipeline.results.measures import badness
from pipeline.runs import LAST, METRICS, MODEL, STATE, Position, load_state, read_metrics, save_state
from pipeline.training.course import KeptWeights, class_by_class
from pipeline.training.epochs import (
    TOTALS,
    Curves,
    describe,
    epoch_verdict,
    judged_by_validation,
    means,
    stored_share,
    validation_figures,
)
from pipeline.training.mirror import Mirror
from pipeline.training.step import Learner, Row

_FIRST_SLIDES = 16  # slides that the spread of features is taken from
_RISKS = "risks"  # of a Cox target, in the state of a run
_READERS = 16  # threads that read slides: they wait for disk or network, and decoding frees the GIL

OnStep = Callable[[int, int, str], None]  # takes steps done, steps in all, and a few words


def train_worker(
    context: Context, arguments: Mapping[str, Any], on_step: OnStep | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Train on one worker of a group; the entry point that `cluster.fit` calls.

    Parameters
    ----------
    context
        The worker's place in its group.
    arguments
        ``config`` (plain values), ``entries`` (plain rows of training and validation slides), ``target`` (plain
        values), ``channels``, ``folder`` and ``fingerprint`` of the run; ``mirror``, the URL of its copy if it has
        one; ``init``, the model it begins with, if any (`pipeline.training.init.find_init`); and ``fail_fast``,
        whether a slide that cannot be read ends the training.
    on_step
        Is called after every step.

    Returns
    -------
    metrics, unreadable
        Metrics of the last epoch with its ``verdict`` in words (`verdict`), and the slides that could not be read,
        with the reason.

    Raises
    ------
    DataError
        The loss is no longer finite, or no slide of an epoch could be read; the last state is kept.
    """
    trainer = make_trainer(context, arguments)
    return trainer.run(on_step or (lambda *_: None)), trainer.unreadable.reasons


def make_trainer(context: Context, arguments: Mapping[str, Any]) -> Trainer:
    """Make one worker's part of a training run without writing anything; parameters are those of `train_worker`."""
    keep_freed_memory()
    return Trainer(
        context,
        parse_config(arguments["config"], "configuration"),
        [read_entry(row) for row in arguments["entries"]],
        read_target(arguments["target"]),
        arguments["channels"],
        Path(arguments["folder"]),
        arguments.get("mirror"),
        arguments.get("fingerprint", ""),
        init=arguments.get("init"),
        fail_fast=arguments.get("fail_fast", False),
    )


class Trainer(Learner):
    """One worker's part of a training run; the parameters are those of `train_worker`."""

    def __init__(
        self,
        context: Context,
        config: Config,
        entries: Sequence[Entry],
        target: Target,
        channels: int,
        folder: Path,
        mirror: str | None = None,
        fingerprint: str = "",
        *,
        init: Mapping[str, Any] | None = None,
        fail_fast: bool = False,
    ) -> None:
        self.mirror, self.fingerprint = Mirror(mirror, folder) if mirror else None, fingerprint
        self.validation = [entry for entry in entries if entry.split == "val"]
        self.slides = SampleCache(config.model, **config.data.opening)
        self.unreadable = Unreadable(fail_fast=fail_fast)
        training = [entry for entry in entries if entry.split == "train"]
        super().__init__(context, config, training, target, channels, folder, init)
        self.features: DiskFeatures | None = None
        self.guess = self._guess()
        self.saved_at = time.monotonic()

    def trial(self) -> Iterator[list[Entry]]:
        """Take a first step and then one of typical cost, writing nothing; return the slides of each."""
        epochs = (0, self.config.train.epochs - 1)
        batches = (found for epoch in epochs for found in self._batches(epoch, 0))
        self.model.train()
        with ThreadPoolExecutor(_READERS) as readers:
            for epoch, (step, batch, images, views) in zip(epochs, batches, strict=False):
                self._step(epoch, step, batch, images, views, readers)
                yield batch

    def run(self, on_step: OnStep) -> dict[str, Any]:
        """Train from the last state to the last epoch and write the model; an earlier model stays until then."""
        position = self._resume()
        self.features = use_features(self.model, self.config.data.features)
        metrics: dict[str, Any] = {}
        curves_of = Curves(self.folder, position, self.context, self.config.train.tracker)
        with ThreadPoolExecutor(_READERS) as readers, curves_of as curves:
            if position == Position() and not self.init:
                self._look_first(readers)
            for epoch in range(position.epoch, self.config.train.epochs):
                if 0 < self.config.train.patience <= self.kept.stale:
                    break
                start = position.step if epoch == position.epoch else 0
                metrics = self._epoch(epoch, start, readers, on_step)
                curves.write(metrics)
                self.context.report(metrics)
        if self.context.rank == 0:
            if self.kept.judged:
                with self.kept.applied():
                    save_model(self.folder / LAST, self.model)
            self.kept.use_best()
            save_model(self.folder / MODEL, self.model)
            if self.mirror:
                self.mirror.put()
        return metrics or (read_metrics(self.folder) or [{}])[-1]

    def _resume(self) -> Position:
        if self.mirror:
            make_folder(self.folder)  # this worker may not share the driver's disk
            self.mirror.fetch(self.fingerprint)
        state = load_state(self.folder, self.model, self.optimizer, self.fingerprint)
        position, self.totals, kept, metrics = state or (Position(), self.totals, self.kept.state(), "")
        try:
            self.kept.load(kept)
            if self.risks and state:
                self.risks.log_risks = kept[_RISKS]
        except (KeyError, RuntimeError) as error:
            raise UsageError(
                f"{self.folder / STATE}: of an earlier version, which kept no averaged weights; start again with "
                "--overwrite (the model it has made can still be used)"
            ) from error
        self._check_agreement(position)
        if self.context.rank == 0:
            # An epoch's line is written before its state; a line that the state does not know is written again.
            write_atomic(self.folder / METRICS, metrics)
        return position

    def _look_first(self, readers: ThreadPoolExecutor) -> None:
        """Set how features are standardised from patches of some slides, drawn as in the first step."""
        model = self.model
        if not (isinstance(model, PatchModel) and model.config.standardise):
            return
        with torch.no_grad(), model.gather_moments() as moments:
            mine = self._order(0)[:_FIRST_SLIDES][self.context.rank :: self.context.world_size]
            slides = (self._opened([self.training[row]]) for row in mine)
            looks = (self._forward(slide, ("first look",), self.config.train.early_samples) for slide in slides)
            for _ in interleave(looks, readers, context=self._autocast):
                pass
        self.context.all_reduce(moments)
        model.standardise_by(moments)
        self.observer.take()  # these patches count for no epoch
        self.kept = KeptWeights(model, self.config.train.average)  # or the average would begin with other features

    def _check_agreement(self, position: Position) -> None:
        """Check that all workers start from one state, since they might not share the disk that holds it."""
        weights = torch.cat([parameter.detach().flatten() for parameter in self.model.parameters()])
        mine = torch.tensor([position.epoch, position.step, weights.double().sum()], device=self.context.device)
        every = mine.clone()
        self.context.all_reduce(every)
        if not torch.allclose(every, mine * self.context.world_size, rtol=1e-5, atol=1e-3):
            raise DataError(
                f"{self.folder}: the workers found different states; put --out on a disk that all of them share, "
                "or give --mirror"
            )

    def _epoch(self, epoch: int, start: int, readers: ThreadPoolExecutor, on_step: OnStep) -> dict[str, Any]:
        began, looked_up = time.monotonic(), self._looked_up()
        self.model.train()
        for step, batch, images, views in self._batches(epoch, start):
            self._step(epoch, step, batch, images, views, readers)
            due = time.monotonic() - self.saved_at > 60 * self.config.train.checkpoint_minutes
            if due and step + 1 < self.steps:
                self._save(Position(epoch, step + 1))
            so_far = means(self.totals, self.target) | stored_share(self._looked_up() - looked_up)
            words = f"epoch {epoch + 1}/{self.config.train.epochs} {describe(so_far)}"
            on_step(epoch * self.steps + step + 1, self.config.train.epochs * self.steps, words)
        validation = {}
        if self.validation:
            with self.kept.applied():
                validation = self._validate(epoch, readers)
            self.kept.judge(badness(validation, self.target, self.config.train.best_by))
        self.unreadable.gather(self.context)
        if not self.totals[-1]:
            slide_id, reason = next(iter(self.unreadable.reasons.items()))
            raise DataError(f"no training slide can be read; slide {slide_id}: {reason}")
        seconds = time.monotonic() - began
        metrics: dict[str, Any] = {"epoch": epoch + 1, **means(self.totals, self.target), **validation}
        looked_up = (self._looked_up() - looked_up).to(self.context.device)
        self.context.all_reduce(looked_up)
        metrics |= {**stored_share(looked_up), "seconds": seconds}
        metrics["verdict"] = epoch_verdict(metrics, self.target, self._guessed(metrics))
        self.totals = torch.zeros_like(self.totals)
        if self.context.rank == 0:
            with (self.folder / METRICS).open("a") as file:
                file.write(json.dumps(metrics) + "\n")
        self._save(Position(epoch + 1, 0))
        return metrics

    def _batches(self, epoch: int, start: int) -> Iterator[tuple[int, list[Entry], list[Image], list[Tensor]]]:
        """Yield this worker's readable slides of every step, with their coarse views read one step ahead."""
        order = self._order(epoch)
        size = self.config.train.batch_size

        def load(entry: Entry) -> tuple[Entry, Image, Tensor] | None:
            try:
                image = self._augmented(epoch, entry)
                return entry, image, self.model.coarse_view(image)
            except SlideError:
                return None

        def submit(step: int) -> list[Future[tuple[Entry, Image, Tensor] | None]]:
            rows = order[step * size : (step + 1) * size][self.context.rank :: self.context.world_size]
            return [ahead.submit(load, self.training[row]) for row in rows]

        # These threads are separate, so that a step's reads do not queue behind the next one's.
        with ThreadPoolExecutor(_READERS) as ahead:
            following = submit(start)
            for step in range(start, self.steps):
                current, following = following, submit(step + 1)
                loaded = [found for future in current if (found := future.result()) is not None]
                yield step, [e for e, _, _ in loaded], [i for _, i, _ in loaded], [v for _, _, v in loaded]

    def _order(self, epoch: int) -> list[int]:
        """Training slides of an epoch in order: each once, or, where balanced, as many of each class."""
        generator = torch.Generator().manual_seed(draw_key(self.config.seed, epoch) >> 1)
        order = torch.randperm(len(self.training), generator=generator)
        if self.config.train.sampling == "balanced":
            order = class_by_class(order, self._truth(self.training).cpu())
        return order.tolist()

    def _augmented(self, epoch: int, entry: Entry) -> Image:
        """Open a training slide as it is augmented in an epoch."""
        key = draw_key(self.config.seed, "augment", epoch, entry.slide_id)
        coarsest = max(self.config.model.downsamples)
        return AugmentedImage(self._open(entry), self.config.train.augment, key, downsample=coarsest)

    def _open(self, entry: Entry) -> Image:
        """Open a slide; opening it, or reading it later, may raise `SlideError`."""
        with Net() as net:
            return WatchedImage(self.slides.open(entry), entry.slide_id, self.unreadable)
        raise self.unreadable.error(entry.slide_id, net)

    def _opened(self, entries: Sequence[Entry]) -> list[Row]:
        """Open slides without augmentation, leaving out those that cannot be opened."""
        rows: list[Row] = []
        for entry in entries:
            with suppress(SlideError):
                rows.append((entry, self._open(entry), None))
        return rows

    @torch.no_grad()
    def _validate(self, epoch: int, readers: ThreadPoolExecutor) -> dict[str, float]:
        self.model.eval()
        totals = torch.zeros(len(TOTALS), device=self.context.device)
        # Of each slide its answers, and a 1 if it could be read.
        answers = torch.zeros(len(self.validation), len(self.target.names) + 1, device=self.context.device)
        mine = self.validation[self.context.rank :: self.context.world_size]
        places = {entry.slide_id: place for place, entry in enumerate(self.validation)}
        size = max(1, self.config.train.batch_size // self.context.world_size)
        batches = (self._opened(mine[begin : begin + size]) for begin in range(0, len(mine), size))
        answered = (self._forward(batch, ("validation", epoch)) for batch in batches)
        for done in interleave(answered, readers, ahead=2, context=self._autocast):
            if done is None:
                continue
            batch, output = done
            truth = self._truth(batch)
            loss = self.target.loss(output.logits, truth)
            totals += self._sums(loss, loss, output, truth)
            answered_now = self.target.answers(output.logits)
            answers[[places[entry.slide_id] for entry in batch]] = functional.pad(answered_now, (0, 1), value=1.0)
        self.context.all_reduce(totals)
        self.context.all_reduce(answers)
        if not bool(totals.isfinite().all()):
            raise self._diverged()
        if not totals[-1]:
            return {}  # no slide can be read
        found = means(totals, self.target)
        validated = {f"val_{name}": found[name] for name in (self.target.loss_name, "accuracy") if name in found}
        figure = self.config.train.best_by
        return validated | validation_figures(self.target, self.config.target, self.validation, answers, figure)

    def _guess(self) -> Tensor:
        """Return the best answer that looks at no slide, as numbers of the head, (Q,)."""
        if self.config.train.class_weights == "balanced":
            return torch.zeros(self.target.outputs)  # weights make classes count alike
        return self.target.guess(self._truth(self.training).cpu())

    def _guessed(self, metrics: Mapping[str, Any]) -> float:
        """Return the loss of that answer, on the slides that an epoch is judged by (`epoch_verdict`)."""
        slides = self.validation if judged_by_validation(metrics, self.target) else self.training
        truth = self._truth(slides).cpu()
        return float(self.target.loss(self.guess.expand(len(truth), -1), truth).mean())

    def _looked_up(self) -> Tensor:
        """Patches whose features this worker found in the store, and those it looked up, (2,) float64."""
        return self.features.counts if self.features else torch.zeros(2, dtype=torch.float64)

    def _save(self, position: Position) -> None:
        self.saved_at = time.monotonic()
        if self.context.rank == 0:
            kept = self.kept.state() | ({_RISKS: self.risks.log_risks} if self.risks else {})
            save_state(self.folder, self.model, self.optimizer, position, self.totals, kept, self.fingerprint)
            if self.mirror:
                self.mirror.put()
