"""The training loop: the same lines on one process and on N workers.

It talks to a small context (rank, world size, sums over workers) and knows nothing of Ray. Three things make a run
independent of the number of workers and of interruptions: a step's slides are a function of (seed, epoch, step) and
are dealt out to the workers in turn; each slide's draws are keyed by (seed, epoch, slide); and the loss of each
slide is divided by the number of slides of the whole step, so the sum of the workers' gradients is the gradient that
one worker would have computed.

Shape letters: B slides of one worker in one step, Q classes.
"""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cluster import Context
from nested_ats import Image, ImpossibleWeightsError, Output, attention_sampling_loss, build_model, save_model
from nested_ats.models.patches import PatchModel, SamplingModel
from nested_ats.networks.trainable import batch_statistics
from pipeline.allocator import keep_freed_memory
from pipeline.config import Config, parse_config
from pipeline.data.augment import AugmentedImage
from pipeline.data.features import DiskFeatures, use_features
from pipeline.data.manifest import Entry
from pipeline.data.slides import SlideCache, draw_key
from pipeline.data.unreadable import SlideError, Unreadable, WatchedImage
from pipeline.errors import DataError, UsageError
from pipeline.files import make_folder, write_atomic
from pipeline.net import Net
from pipeline.results.verdict import Observer, class_shares
from pipeline.runs import METRICS, MODEL, STATE, Position, autocast, load_state, read_metrics, save_state
from pipeline.training.course import Kept, clip, entropy_weight, learning_rate, more_samples
from pipeline.training.epochs import TOTALS, Curves, describe, epoch_verdict, means, stored_share, validation_auc
from pipeline.training.mirror import Mirror

# Parts of a batch that read or compute while another goes backward: as many as keep a slow store busy, and at most
# half of them, since what a part computed for its backward pass is held until then.
_PARTS_AHEAD = 8
_FIRST_SLIDES = 16  # from which the spread of features is taken
_READERS = 16  # threads that read slides: reading waits for the disk or the network, and decoding drops the GIL

T = TypeVar("T")
OnStep = Callable[[int, int, str], None]  # steps done, steps in all, a few words


def train_worker(
    context: Context, arguments: Mapping[str, Any], on_step: OnStep | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Train on one worker of a group; the entry point that `cluster.fit` calls.

    Parameters
    ----------
    context
        The worker's place in its group.
    arguments
        ``config`` (plain values), ``entries`` (plain rows of training and validation slides), ``classes``,
        ``channels``, ``folder`` and ``fingerprint`` of the run; ``mirror`` if it has a copy: its URL; ``fail_fast``
        if a slide that cannot be read ends the training, rather than being left out.
    on_step
        Told of every step.

    Returns
    -------
    metrics, unreadable
        Of the last epoch, with its ``verdict`` in words (`verdict`); and slides that could not be read, with
        the reason.

    Raises
    ------
    DataError
        The loss is no longer finite, or no slide of an epoch could be read; the last state stands.
    """
    trainer = make_trainer(context, arguments)
    return trainer.run(on_step or (lambda *_: None)), trainer.unreadable.reasons


def make_trainer(context: Context, arguments: Mapping[str, Any]) -> Trainer:
    """One worker's part of a training run, which nothing has been written of; parameters as of `train_worker`."""
    keep_freed_memory()
    return Trainer(
        context,
        parse_config(arguments["config"], "configuration"),
        [Entry(**row) for row in arguments["entries"]],
        arguments["classes"],
        arguments["channels"],
        Path(arguments["folder"]),
        arguments.get("mirror"),
        arguments.get("fingerprint", ""),
        fail_fast=arguments.get("fail_fast", False),
    )


class Trainer:
    """One worker's part of a training run; the parameters are those of `train_worker`."""

    def __init__(
        self,
        context: Context,
        config: Config,
        entries: Sequence[Entry],
        classes: Sequence[str],
        channels: int,
        folder: Path,
        mirror: str | None = None,
        fingerprint: str = "",
        *,
        fail_fast: bool = False,
    ) -> None:
        self.context, self.config, self.classes, self.folder = context, config, list(classes), folder
        self.mirror, self.fingerprint = Mirror(mirror, folder) if mirror else None, fingerprint
        self.training = [entry for entry in entries if entry.split == "train"]
        self.validation = [entry for entry in entries if entry.split == "val"]
        self.slides = SlideCache(background=config.data.background, cache=config.data.cache)
        self.unreadable = Unreadable(fail_fast=fail_fast)
        torch.manual_seed(config.seed)
        self.model = build_model(config.model, in_channels=channels, classes=len(classes)).to(context.device)
        _check_statistics(self.model, context)
        self.optimizer = torch.optim.AdamW(
            self._trained(),
            lr=config.train.learning_rate,
            weight_decay=config.train.weight_decay,
            # Gradients that are rounding noise alone (softmax does not see a shift of its logits) must not become
            # steps of the size of lr, or the number of threads and workers would show in the weights.
            eps=1e-6,
        )
        self.features: DiskFeatures | None = None
        self.observer = Observer(self.model)
        self.kept = Kept(self.model, config.train.average)
        self.class_weights = self._class_weights().to(context.device)
        balanced = config.train.class_weights == "balanced"
        self.shares = class_shares([entry.label for entry in self.training], self.classes, balanced=balanced)
        self.totals = torch.zeros(len(TOTALS), dtype=torch.float64)
        self.saved_at = time.monotonic()
        self._turn = Lock()  # held by the part of a batch that computes, given up while it waits for pixels

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return math.ceil(len(self.training) / self.config.train.batch_size)

    def trial(self) -> Iterator[list[Entry]]:
        """Take a first step and then one that costs what most do, writing nothing; gives the slides of each."""
        epochs = (0, self.config.train.epochs - 1)
        batches = (found for epoch in epochs for found in self._batches(epoch, 0))
        self.model.train()
        with ThreadPoolExecutor(_READERS) as readers:
            for epoch, (step, batch, images, views) in zip(epochs, batches, strict=False):
                self._step(epoch, step, batch, images, views, readers)
                yield batch

    def run(self, on_step: OnStep) -> dict[str, Any]:
        """Train from the last state to the last epoch and write the model; that of a shorter run stays until then."""
        position = self._resume()
        self.features = use_features(self.model, self.config.data.features)
        metrics: dict[str, Any] = {}
        with (
            ThreadPoolExecutor(_READERS) as readers,
            Curves(self.folder, position, self.context) as curves,
        ):
            if position == Position():
                self._look_first(readers)
            for epoch in range(position.epoch, self.config.train.epochs):
                if 0 < self.config.train.patience <= self.kept.stale:
                    break
                start = position.step if epoch == position.epoch else 0
                metrics = self._epoch(epoch, start, readers, on_step)
                curves.write(metrics)
                self.context.report(metrics)
        if self.context.rank == 0:
            self.kept.use_best()
            save_model(self.folder / MODEL, self.model, classes=self.classes)
            if self.mirror:
                self.mirror.put()
        return metrics or (read_metrics(self.folder) or [{}])[-1]

    def _resume(self) -> Position:
        if self.mirror:
            make_folder(self.folder)  # of a worker that does not share the driver's disk
            self.mirror.fetch(self.fingerprint)
        state = load_state(self.folder, self.model, self.optimizer, self.fingerprint)
        position, self.totals, kept, metrics = state or (Position(), self.totals, self.kept.state(), "")
        try:
            self.kept.load(kept)
        except (KeyError, RuntimeError) as error:
            raise UsageError(
                f"{self.folder / STATE}: of an earlier version, which kept no averaged weights; start again with "
                "--overwrite (the model it has made can still be used)"
            ) from error
        self._check_agreement(position)
        if self.context.rank == 0:
            # An epoch's line is written before its state: a line that the state does not know of is written again.
            write_atomic(self.folder / METRICS, metrics)
        return position

    def _look_first(self, readers: ThreadPoolExecutor) -> None:
        """Set how features are standardised, by patches of some slides, drawn as the first step would."""
        model = self.model
        if not (isinstance(model, PatchModel) and model.config.standardise):
            return
        with torch.no_grad(), model.gather_moments() as moments:
            for row in self._order(0)[:_FIRST_SLIDES][self.context.rank :: self.context.world_size]:
                entry = self.training[row]
                key = torch.tensor([draw_key(self.config.seed, "first look", entry.slide_id)])
                with suppress(SlideError), self._turn:
                    self._forward([self._open(entry)], key, readers, more=self.config.train.early_samples)
        self.context.all_reduce(moments)
        model.standardise_by(moments)
        self.observer.take()  # its patches are of no epoch
        self.kept = Kept(model, self.config.train.average)  # else its average would begin with other features

    def _check_agreement(self, position: Position) -> None:
        """See that all workers start from one state: they might not share the disk that it lies on."""
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
            done = Position(epoch, step + 1)
            if (
                done.step < self.steps
                and time.monotonic() - self.saved_at > 60 * self.config.train.checkpoint_minutes
            ):
                self._save(done)
            so_far = means(self.totals) | stored_share(self._looked_up() - looked_up)
            words = f"epoch {epoch + 1}/{self.config.train.epochs} {describe(so_far)}"
            on_step(epoch * self.steps + step + 1, self.config.train.epochs * self.steps, words)
        validation = {}
        if self.validation:
            with self.kept.applied():
                validation = self._validate(epoch, readers)
            self.kept.judge(validation.get("val_cross_entropy", math.nan))
        self.unreadable.gather(self.context)
        if not self.totals[-1]:
            slide_id, reason = next(iter(self.unreadable.reasons.items()))
            raise DataError(f"no training slide can be read; slide {slide_id}: {reason}")
        seconds = time.monotonic() - began
        metrics: dict[str, Any] = {"epoch": epoch + 1, **means(self.totals), **validation}
        looked_up = (self._looked_up() - looked_up).to(self.context.device)
        self.context.all_reduce(looked_up)
        metrics |= {**stored_share(looked_up), "seconds": seconds}
        metrics["verdict"] = epoch_verdict(metrics, self.training, self.validation, self.shares)
        self.totals = torch.zeros_like(self.totals)
        if self.context.rank == 0:
            with (self.folder / METRICS).open("a") as file:
                file.write(json.dumps(metrics) + "\n")
        self._save(Position(epoch + 1, 0))
        return metrics

    def _batches(self, epoch: int, start: int) -> Iterator[tuple[int, list[Entry], list[Image], list[Tensor]]]:
        """Give this worker's slides of every step that can be read, with their coarse views read one step ahead."""
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

        # Threads of their own, so that a step's reads do not queue behind the next one's.
        with ThreadPoolExecutor(_READERS) as ahead:
            following = submit(start)
            for step in range(start, self.steps):
                current, following = following, submit(step + 1)
                loaded = [found for future in current if (found := future.result()) is not None]
                yield (
                    step,
                    [entry for entry, _, _ in loaded],
                    [i for _, i, _ in loaded],
                    [view for _, _, view in loaded],
                )

    def _order(self, epoch: int) -> list[int]:
        """Training slides of an epoch in order: each once, or, where balanced, as many of each class.

        Slides of a class with fewer than its share come again, those of one with more take turns over the epochs.
        """
        generator = torch.Generator().manual_seed(draw_key(self.config.seed, epoch) >> 1)
        order = torch.randperm(len(self.training), generator=generator)
        if self.config.train.sampling == "balanced":
            labels = self._labels(self.training).cpu()
            classes = [order[labels[order] == number] for number in sorted(set(labels.tolist()))]
            share = -(-len(order) // len(classes))
            order = torch.stack([rows.repeat(-(-share // len(rows)))[:share] for rows in classes], 1)
            order = order.flatten()[torch.randperm(order.numel(), generator=generator)][: len(self.training)]
        return order.tolist()

    def _augmented(self, epoch: int, entry: Entry) -> Image:
        """Open a training slide, as it is seen in an epoch."""
        key = draw_key(self.config.seed, "augment", epoch, entry.slide_id)
        coarsest = max(self.config.model.downsamples)
        return AugmentedImage(self._open(entry), self.config.train.augment, key, downsample=coarsest)

    def _open(self, entry: Entry) -> Image:
        """Open a slide; it, or reading it later, may raise `SlideError`."""
        with Net() as net:
            return WatchedImage(self.slides.open(entry.path), entry.slide_id, self.unreadable)
        raise self.unreadable.error(entry.slide_id, net)

    def _step(
        self,
        epoch: int,
        step: int,
        batch: list[Entry],
        images: list[Image],
        views: list[Tensor],
        readers: ThreadPoolExecutor,
    ) -> None:
        """One step of the whole group; a worker without slides takes part with a gradient of zero.

        A slide that cannot be read is left out, as if the step had been made of the others.
        """
        self.optimizer.zero_grad()
        sums = torch.zeros(len(TOTALS), device=self.context.device)
        course = self.config.train
        progress = (epoch + (step + 0.5) / self.steps) / course.epochs
        more = more_samples(course, progress)
        size = max(1, math.ceil(len(batch) / self.config.train.parts))

        def forward(start: int) -> tuple[Output, Tensor] | None:
            rows = list(zip(batch, images, views, strict=True))[start : start + size]
            while rows:
                part, seen, coarse = zip(*rows, strict=True)
                keys = torch.tensor([draw_key(self.config.seed, epoch, entry.slide_id) for entry in part])
                try:
                    with self._turn:
                        return self._forward(seen, keys, readers, coarse, more), self._labels(part)
                except SlideError as error:
                    rows = [row for row in rows if row[0].slide_id != error.slide_id]
            return None

        for done in _in_order(forward, range(0, len(batch), size)):
            if done is None:
                continue
            output, labels = done
            with self._turn:
                loss, cross_entropy = attention_sampling_loss(
                    output.logits,
                    labels,
                    output.entropy,
                    entropy_weight=entropy_weight(course, progress),
                    class_weights=self.class_weights,
                )
                torch.autograd.backward(loss.sum())
                sums += self._sums(loss, cross_entropy, output, labels)
        self.totals += self._reduce(sums).cpu()
        clip(self._trained(), course.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(course, progress)
        self.optimizer.step()
        self.kept.update()

    def _forward(
        self,
        images: Sequence[Image],
        keys: Tensor,
        readers: ThreadPoolExecutor,
        views: Sequence[Tensor] | None = None,
        more: int = 1,
    ) -> Output:
        """Run the model, letting another part of the batch compute while this one waits for its reads."""

        def read(function: Callable[..., Any], *columns: Iterable[Any]) -> list[Any]:
            self._turn.release()
            try:
                return list(readers.map(function, *columns))
            finally:
                self._turn.acquire()

        try:
            with autocast(self.context.device, self.config.train.precision):
                options = {"more": more} if isinstance(self.model, SamplingModel) else {}
                return self.model(images, keys, views=views, map_=read, **options)  # type: ignore[no-any-return]
        except ImpossibleWeightsError:
            raise self._diverged() from None

    def _reduce(self, sums: Tensor) -> Tensor:
        """Sum gradients and `sums` over the workers, in one message, and average the gradients over the slides."""
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

    @torch.no_grad()
    def _validate(self, epoch: int, readers: ThreadPoolExecutor) -> dict[str, float]:
        self.model.eval()
        totals = torch.zeros(len(TOTALS), device=self.context.device)
        answers = torch.zeros(len(self.validation), len(self.classes), device=self.context.device)
        mine = self.validation[self.context.rank :: self.context.world_size]
        places = {entry.slide_id: place for place, entry in enumerate(self.validation)}
        size = max(1, self.config.train.batch_size // self.context.world_size)
        for begin in range(0, len(mine), size):
            batch = mine[begin : begin + size]
            while batch:
                keys = [draw_key(self.config.seed, "validation", epoch, entry.slide_id) for entry in batch]
                try:
                    with self._turn:
                        output = self._forward([self._open(entry) for entry in batch], torch.tensor(keys), readers)
                except SlideError as error:
                    batch = [entry for entry in batch if entry.slide_id != error.slide_id]
                    continue
                labels = self._labels(batch)
                loss, cross_entropy = attention_sampling_loss(output.logits, labels, output.entropy, entropy_weight=0)
                totals += self._sums(loss, cross_entropy, output, labels)
                answers[[places[entry.slide_id] for entry in batch]] = output.logits.softmax(-1)
                break
        self.context.all_reduce(totals)
        self.context.all_reduce(answers)
        if not bool(totals.isfinite().all()):
            raise self._diverged()
        if not totals[-1]:
            return {}  # no slide can be read
        found = means(totals)
        validated = {f"val_{name}": found[name] for name in ("cross_entropy", "accuracy")}
        return validated | validation_auc(self.validation, self.classes, answers)

    def _sums(self, loss: Tensor, cross_entropy: Tensor, output: Output, labels: Tensor) -> Tensor:
        """What `TOTALS` names, summed over the slides, and patches, of a batch."""
        correct = output.logits.argmax(-1) == labels
        parts = (loss, cross_entropy, correct, output.entropy, self.observer.uniform_entropy(output))
        of_slides = torch.stack([part.detach().sum() for part in parts])
        return torch.cat([of_slides, self.observer.take().to(of_slides), of_slides.new_tensor([len(labels)])])

    def _looked_up(self) -> Tensor:
        """Patches whose features were in the store and those that were looked for, (2,) float64, of this worker."""
        return self.features.counts if self.features else torch.zeros(2, dtype=torch.float64)

    def _save(self, position: Position) -> None:
        self.saved_at = time.monotonic()
        if self.context.rank == 0:
            save_state(
                self.folder, self.model, self.optimizer, position, self.totals, self.kept.state(), self.fingerprint
            )
            if self.mirror:
                self.mirror.put()

    def _labels(self, batch: Sequence[Entry]) -> Tensor:
        return torch.tensor([self.classes.index(entry.label) for entry in batch], device=self.context.device)

    def _class_weights(self) -> Tensor:
        """Weight of each class, with mean one over the training slides."""
        counts = torch.tensor([sum(e.label == name for e in self.training) for name in self.classes]).float()
        if self.config.train.class_weights == "none":
            return torch.ones_like(counts)
        return len(self.training) / (len(self.classes) * counts.clamp_min(1))


def _check_statistics(model: nn.Module, context: Context) -> None:
    """Raise UsageError where workers would each normalise by the patches that they happen to have."""
    layers = batch_statistics(model) if context.world_size > 1 else []
    if layers:
        raise UsageError(
            f"model.trainable: the encoder has {len(layers)} layers of batch normalisation, such as {layers[0]}; "
            f"trained whole, each of the {context.world_size} workers would normalise by its own patches. Set it to "
            "none or to the number of the last stages to train (the statistics then stay as they are), or train with "
            "one worker"
        )


def _in_order(function: Callable[[int], T], items: Sequence[int]) -> Iterator[T]:
    """Results of a function in the order of its items, those of the next few items being worked at meanwhile."""
    if len(items) == 1:
        yield function(items[0])
        return
    ahead = max(1, min(_PARTS_AHEAD, len(items) // 2))
    with ThreadPoolExecutor(ahead + 1) as pool:
        waiting: deque[Future[T]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def plain_entries(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Entries as plain values, to be sent to workers."""
    return [asdict(entry) for entry in entries]
