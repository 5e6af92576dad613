"""``features``: encode all patches that a model may look at, once, into the store of features or files of others."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import cluster
from nested_ats.models.kinds import build_model
from nested_ats.models.patches import PatchModel
from nested_ats.networks.builtin import GIVEN
from nested_ats.reading import interleave
from pipeline.allocator import keep_freed_memory
from pipeline.config import Config
from pipeline.data.bags import ENCODER, Bag, Layout, holds, read_bag, require_h5py, write_bag
from pipeline.data.cases import group_cases
from pipeline.data.features import DiskFeatures, use_features
from pipeline.data.manifest import Entry
from pipeline.data.samples import Sample, check_sample, open_sample
from pipeline.data.slides import SlideImage
from pipeline.errors import DataError, UsageError
from pipeline.files import alone, make_folder
from pipeline.net import Net
from pipeline.progress import progress
from pipeline.results.predict import pixels
from pipeline.runs import autocast, choose_device

_AT_ONCE = 256  # patches that are encoded together
_READERS = 8  # threads that read
_AHEAD = 2  # such groups of patches that are read or encoded at the same time
_LOCK = "features.lock"
_COMPARED = 8  # patches of a file of others that are encoded here, too
# Half precision is a thousandth off; another encoder, or patch, as much as patches differ.
_TOLERATED, _LEAST_SCATTER = 0.2, 1e-3


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is extracted, how, and where to.

    Attributes
    ----------
    config
        The configuration: model, precision, how slides are opened, and where features are kept.
    out, layout
        The folder and the layout of files to write too; None writes none.
    device
        auto, cpu or cuda.
    overwrite
        Whether files that are there are written anew.
    given
        A folder of files of features that others have extracted: these are put into the store, and nothing else is.
    """

    config: Config
    out: Path | None = None
    layout: Layout = "trident"
    device: str = "auto"
    overwrite: bool = False
    given: Path | None = None


@dataclass(frozen=True)
class Extracted:
    """What was done for one slide."""

    slide_id: str
    patches: int = 0  # as many as the model may look at
    encoded: int = 0  # those of them that were encoded now
    missing: int = 0  # those of them that are not in the file that was given
    error: str = ""


def extract(
    entries: Sequence[Entry], plan: Plan, *, address: str = "none", workers: int = 1, timeout_s: float = 3600.0
) -> list[Extracted]:
    """Encode the patches of slides; what is there already is neither read nor encoded again.

    Parameters
    ----------
    entries
        The slides.
    plan
        What is extracted.
    address, workers
        The address of a Ray cluster and the number of workers there; ``none`` is this process.
    timeout_s
        How many seconds a slide may take before its Ray worker is replaced.

    Returns
    -------
    One for each slide, or case (`DataConfig.unit`), in their order; one that fails is reported, and the others go on.

    Raises
    ------
    UsageError
        The model's encoder is trained, so that its features do not last, or there is nowhere to put them; or another
        process writes to the folder.
    """
    _check(plan)
    if plan.config.data.unit == "case":
        entries = group_cases(entries, ())  # whatever is true of them
    with ExitStack() as stack:
        if plan.out is not None:
            lock = make_folder(plan.out) / _LOCK
            stack.enter_context(alone(lock, "features are being written there by another process"))
        tasks = cluster.run_tasks(
            partial(Extractor, plan),
            entries,
            key=lambda entry: entry.slide_id,
            address=address,
            workers=workers,
            device=plan.device,
            timeout_s=timeout_s,
            cost=pixels,
        )
        stack.enter_context(closing(tasks))
        update = stack.enter_context(progress("features"))
        done: dict[str, Extracted] = {}
        for outcome in tasks:
            name = outcome.item.slide_id
            done[name] = outcome.result or Extracted(name, error=outcome.error or "")
            update(len(done), len(entries), name)
    return [done[entry.slide_id] for entry in entries]


def _check(plan: Plan) -> None:
    model, data = plan.config.model, plan.config.data
    if model.trainable != "none" or model.kind == "cnn":
        raise UsageError(
            "model.trainable: features last where the encoder of patches stays as it is; set it to none, and name "
            "trained weights"
        )
    if model.encoder_name == GIVEN:
        raise UsageError("model.encoder: given takes features that are there already; train with them at once")
    if plan.given is not None:
        require_h5py()
        if plan.out is not None or data.unit == "case":
            raise UsageError(
                "--from: takes files of slides into the store; leave out --out, and set data.unit to slide"
            )
    if plan.out is None:
        if data.features is None:
            raise UsageError("data.features is null: there is nowhere to keep features; name a folder, or give --out")
        return
    require_h5py()
    if data.unit == "case":
        raise UsageError("--out: files are of slides, not of cases; give --set data.unit=slide")


class Extractor:
    """A model that is loaded once and encodes the patches of one slide at a time, by a plan."""

    def __init__(self, plan: Plan) -> None:
        keep_freed_memory()
        self._plan = plan
        self._device = choose_device(plan.device)
        self._models: dict[int, tuple[PatchModel, DiskFeatures | None]] = {}

    def __call__(self, entry: Entry) -> Extracted:
        """Encode the patches of a slide; it may have failed."""
        with Net() as net:
            return self._extract(entry)
        return Extracted(entry.slide_id, error=net.error)

    def _extract(self, entry: Entry) -> Extracted:
        plan, config = self._plan, self._plan.config
        image = open_sample(entry, config.model, **config.data.opening)
        with closing(image):
            channels = len(image.slides[0].numbers)
            model, store = self._model(channels)
            check_sample(image, config.model, channels)
            centers = model.patch_centers(image)
            source = ""
            if plan.out is not None:
                source = self._source(model, image, centers)
                if not plan.overwrite and holds(plan.out, plan.layout, entry.slide_id, source):
                    return Extracted(entry.slide_id, len(centers))
            elif store is None or not model.can_keep(image):
                raise DataError(f"{entry.path}: {_why_not_kept(store, image)}")
            if plan.given is not None:
                return self._take(entry, image, centers, model, plan.given)
            return self._encode(entry, image, centers, model, store, source)

    def _encode(
        self,
        entry: Entry,
        image: Sample,
        centers: Tensor,
        model: PatchModel,
        store: DiskFeatures | None,
        source: str,
    ) -> Extracted:
        found = store.counts if store else torch.zeros(2)
        boxes, features = [], []
        for some_boxes, some in self._rows(image, centers, model):
            boxes.append(some_boxes)
            if self._plan.out is not None:
                features.append(some)
            else:
                _check_room(store)
        if self._plan.out is not None:
            assert isinstance(image, SlideImage)  # noqa: S101 - cases were refused
            bag = _bag(image, torch.cat(boxes), torch.cat(features), model)
            write_bag(self._plan.out, self._plan.layout, entry.slide_id, bag, source)
        known = int((store.counts - found)[0]) if store else 0
        return Extracted(entry.slide_id, len(centers), len(centers) - known)

    def _take(self, entry: Entry, image: Sample, centers: Tensor, model: PatchModel, given: Path) -> Extracted:
        """Put the features of a file into the store, once some of them were seen to be those of this encoder."""
        assert isinstance(image, SlideImage)  # noqa: S101 - cases were refused
        bag = read_bag(given, [entry.slide_id, Path(entry.path).stem])
        boxes, rows = _boxes_of(bag, image, model)
        wanted = set(map(tuple, model.patch_boxes(centers).tolist()))
        there = torch.tensor([tuple(box) in wanted for box in boxes.tolist()])
        if not there.any():
            raise DataError(
                f"{bag.about['path']}: none of its {len(boxes)} patches is one that the model may look at; set "
                "patch_size, mpp or patch_downsample, and stride or cell, to what they were extracted with"
            )
        boxes, features = boxes[there], torch.from_numpy(bag.features[rows][there.numpy()])
        self._compare(bag, image, boxes, features, model)
        for some, own in zip(torch.split(boxes, _AT_ONCE), torch.split(features, _AT_ONCE), strict=True):
            with autocast(self._device, self._plan.config.train.precision):
                model.remember(image, some, own)
            _check_room(model.store)
        return Extracted(entry.slide_id, len(wanted), missing=len(wanted) - len(boxes))

    def _compare(self, bag: Bag, image: SlideImage, boxes: Tensor, features: Tensor, model: PatchModel) -> None:
        """See that this encoder makes of some of the patches what the file says, or raise DataError.

        An error counts against how much features differ from patch to patch: they have much in common.
        """
        some = torch.linspace(0, len(boxes) - 1, min(_COMPARED, len(boxes))).round().long()
        store, model.store = model.store, None  # which may hold what is to be seen
        try:
            places = (boxes[some, :2] + boxes[some, 2:] / 2) * model.config.patch_downsample
            [own] = self._rows(image, places, model)
        finally:
            model.store = store
        errors = (own[1] - features[some]).norm(dim=-1)
        common = features.mean(0)
        scatter = (features - common).norm(dim=-1).median().clamp_min(_LEAST_SCATTER * common.norm())
        if errors.median() > _TOLERATED * scatter:
            raise DataError(
                f"{bag.about['path']}: its features are not those that model.encoder makes of this slide's patches "
                f"(they differ by {float(errors.median() / scatter):.0%} of what sets patches apart); it is of "
                "another encoder, normalisation, size of patches, or slide"
            )

    def _model(self, channels: int) -> tuple[PatchModel, DiskFeatures | None]:
        """Return the model for images of so many channels, with the weights that a training begins with."""
        if channels not in self._models:
            torch.manual_seed(self._plan.config.seed)
            model = build_model(self._plan.config.model, in_channels=channels, classes=2).to(self._device).eval()
            assert isinstance(model, PatchModel)  # noqa: S101 - others were refused
            self._models[channels] = model, use_features(model, self._plan.config.data.features)
        return self._models[channels]

    def _rows(self, image: Sample, centers: Tensor, model: PatchModel) -> Iterator[tuple[Tensor, Tensor]]:
        """Boxes (P, 4) and features (P, D) of some patches after the other, on the CPU."""
        groups = torch.split(centers, _AT_ONCE) if len(centers) else ()
        readings = (model.extracting(image, group) for group in groups)
        context = partial(autocast, self._device, self._plan.config.train.precision)
        with torch.no_grad(), ThreadPoolExecutor(_READERS) as readers:
            for boxes, features in interleave(readings, readers, ahead=_AHEAD, context=context):
                yield boxes, features.float().cpu()

    def _source(self, model: PatchModel, image: Sample, centers: Tensor) -> str:
        """Digest of all that decides a file: the encoder, the slide's pixels and the places of patches."""
        with autocast(self._device, self._plan.config.train.precision):
            encoder = model.encoder_digest
        slide = image.identity or image.slides[0].slide.location
        text = f"{encoder} {slide} {model.config.patch_size} {model.config.patch_downsample}"
        return hashlib.sha256(text.encode() + centers.numpy().tobytes()).hexdigest()


def _check_room(store: Any) -> None:
    """Raise DataError where the store could not keep all features."""
    if store is not None and store.trouble:
        raise DataError(
            f"{store.trouble}: not all features could be kept; make room, raise data.features.gigabytes, or choose "
            "another data.features.folder, and run the same command again"
        )


def _boxes_of(bag: Bag, image: SlideImage, model: PatchModel) -> tuple[Tensor, NDArray[np.int64]]:
    """Boxes (P, 4) of a file's patches as the model has them, and which of its rows they are; each place once.

    Raises
    ------
    DataError
        The file is of a slide of another size, or its patches or features have another size.
    """
    about, config, path = bag.about, model.config, bag.about["path"]
    to_l0, (height, width) = config.patch_downsample * image.scale, image.slide.shape_yx
    size = (about.get("level0_height", height), about.get("level0_width", width))
    if tuple(map(int, size)) != (height, width) or (bag.coords_xy >= (width, height)).any():
        raise DataError(f"{path}: of another slide than this one of {height} x {width} pixels")
    side = about.get("patch_size_level0")
    if side is not None and abs(int(side) - config.patch_size * to_l0) > 1:
        raise DataError(
            f"{path}: patches of {side} pixels of the finest level, where the model's have "
            f"{config.patch_size * to_l0:g}; set model.patch_size, mpp or patch_downsample"
        )
    if bag.features.shape[1] != model.features:
        raise DataError(f"{path}: {bag.features.shape[1]} features a patch, where model.encoder has {model.features}")
    starts, rows = np.unique(np.rint(bag.coords_xy[:, ::-1] / to_l0).astype(np.int64), axis=0, return_index=True)
    return torch.from_numpy(np.concatenate([starts, np.full_like(starts, config.patch_size)], 1)), rows


def _why_not_kept(store: DiskFeatures | None, image: Sample) -> str:
    if store is None:
        return "the folder of features cannot be used; see above, and name another as data.features.folder"
    if image.identity is None:
        return (
            "OME-Zarr of other writers does not list its chunks, so nothing is kept of it; convert it, or give --out"
        )
    return "features of this encoder are not kept, because its code cannot be read; give --out"


def _bag(image: SlideImage, boxes: Tensor, features: Tensor, model: PatchModel) -> Bag:
    """Make the content of a file of boxes (N, 4), y and x first, and features (N, D)."""
    config = model.config
    to_l0 = config.patch_downsample * image.scale
    side = round(config.patch_size * to_l0)
    height, width = image.slide.shape_yx
    about: dict[str, Any] = {
        "patch_size": config.patch_size,
        "patch_size_level0": side,
        "level0_width": width,
        "level0_height": height,
        "overlap": max(0, round(config.patch_size - config.cell_l0 / config.patch_downsample)),
    }
    if image.own_mpp:
        about["level0_magnification"] = round(10 / image.own_mpp)
        about["target_magnification"] = round(10 / (image.own_mpp * to_l0))
    digest = (model.encoder_digest or "").partition("/")[0]
    about[ENCODER] = f"{config.encoder_name} {digest[:12]}, {config.patch_size} pixels at {config.mpp or to_l0:g}"
    coords = (boxes[:, :2].flip(-1) * to_l0).round().long()
    return Bag(features.numpy().astype(np.float32), coords.numpy(), about)
