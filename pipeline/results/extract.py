"""``features``: encode all patches that a model may look at, once, into the store of features or files of others."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import cluster
from nested_ats.models.kinds import build_model
from nested_ats.models.patches import PatchModel
from nested_ats.reading import interleave
from pipeline.config import Config
from pipeline.data.bags import Bag, Layout, holds, require_h5py, write_bag
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
    """

    config: Config
    out: Path | None = None
    layout: Layout = "trident"
    device: str = "auto"
    overwrite: bool = False


@dataclass(frozen=True)
class Extracted:
    """What was done for one slide."""

    slide_id: str
    patches: int = 0
    encoded: int = 0  # those of them that were not in the store
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
            elif store and store.trouble:
                raise DataError(
                    f"{store.trouble}: not all features could be kept; make room, raise data.features.gigabytes, or "
                    "choose another data.features.folder, and run the same command again"
                )
        if self._plan.out is not None:
            assert isinstance(image, SlideImage)  # noqa: S101 - cases were refused
            bag = _bag(image, torch.cat(boxes), torch.cat(features), model)
            write_bag(self._plan.out, self._plan.layout, entry.slide_id, bag, source)
        known = int((store.counts - found)[0]) if store else 0
        return Extracted(entry.slide_id, len(centers), len(centers) - known)

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
        text = f"{encoder} {image.identity} {model.config.patch_size} {model.config.patch_downsample}"
        return hashlib.sha256(text.encode() + centers.numpy().tobytes()).hexdigest()


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
    about = {
        "patch_size": config.patch_size,
        "patch_size_level0": side,
        "level0_width": width,
        "level0_height": height,
        "overlap": max(0, round(config.patch_size - config.cell_l0 / config.patch_downsample)),
    }
    if image.own_mpp:
        about["level0_magnification"] = round(10 / image.own_mpp)
        about["target_magnification"] = round(10 / (image.own_mpp * to_l0))
    coords = (boxes[:, :2].flip(-1) * to_l0).round().long()
    return Bag(features.numpy().astype(np.float32), coords.numpy(), about)
