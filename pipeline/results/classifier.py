"""A trained model that classifies one slide at a time: a slide's row of the table of predictions."""

from __future__ import annotations

import math
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from nested_ats import Image, ImageModel, ImpossibleWeightsError, Prediction, load_model
from nested_ats import predict as estimate
from pipeline.data.features import use_features
from pipeline.data.manifest import Entry
from pipeline.data.slides import SlideImage, check_slide, draw_key, open_slide
from pipeline.errors import DataError, UsageError
from pipeline.net import Net
from pipeline.results.predictions import OF_CLASS, SIGNS
from pipeline.results.settings import Settings, with_samples
from pipeline.results.verdict import Observer
from pipeline.runs import autocast, choose_device
from storage import Slide

_ENCODED_AT_ONCE = 256  # patches of an exact evaluation
_READERS = 8  # threads that read a slide: its draws wait for their reads together


class Classifier:
    """A model loaded once, that classifies one slide at a time.

    Parameters
    ----------
    settings
        Which model, and how.

    Raises
    ------
    nested_ats.ModelFileError
        The model cannot be loaded.
    UsageError
        A GPU is insisted on, and PyTorch sees none here.
    """

    def __init__(self, settings: Settings) -> None:
        if settings.device == "cuda" and choose_device(settings.device) == "cpu":
            raise UsageError(
                f"--device cuda: PyTorch sees no GPU on {platform.node()}; install its CUDA build, or choose auto"
            )
        model, self.classes = load_model(
            Path(settings.model), expect=ImageModel, trust_encoder=settings.trust_encoder
        )
        model.config = with_samples(model.config, settings.samples)  # its weights do not depend on it
        self.settings = settings
        self.model = model.to(choose_device(settings.device))
        use_features(self.model, settings.features)
        self.observer = Observer(self.model)

    def open(self, entry: Entry) -> Slide:
        """Open a slide that has what the model reads.

        Raises
        ------
        storage.StorageError, DataError
            It cannot be opened, or has not.
        """
        slide = open_slide(entry.path, self.settings.cache)
        check_slide(slide, self.model.config, self.model.in_channels, entry.mpp, self.settings.channels)
        return slide

    def image(self, entry: Entry, slide: Slide) -> SlideImage:
        """The slide as the model looks at it."""
        return SlideImage(
            slide,
            background=self.settings.background,
            mpp=self.model.config.mpp,
            own_mpp=entry.mpp,
            channels=self.settings.channels,
        )

    def estimate(self, entry: Entry, image: Image) -> Prediction:
        """Classify an image; equal slides and settings draw equal patches.

        Raises
        ------
        DataError
            Attention or probabilities are not finite.
        """
        settings = self.settings
        keys = [draw_key(settings.seed, "predict", entry.slide_id, i) for i in range(settings.draws)]
        with (
            suppress(ImpossibleWeightsError),
            autocast(choose_device(settings.device), settings.precision),
            ThreadPoolExecutor(_READERS) as readers,
        ):
            prediction = estimate(
                self.model,
                [image],
                torch.tensor([keys]),
                readers=readers,
                target_error=settings.target_error,
                exact=_ENCODED_AT_ONCE if settings.exact else 0,
            )
            if prediction.probabilities.isfinite().all():
                return prediction
        raise DataError(f"{entry.path}: what the model computes is not finite; has the slide pixels that are not?")

    def __call__(self, entry: Entry) -> dict[str, Any]:
        """Classify a slide and return its row of the table, without the slide's identity; it may have failed."""
        with Net() as net:
            return self._row(entry)
        return failed(net.error)

    def _row(self, entry: Entry) -> dict[str, Any]:
        began = time.monotonic()
        with self.open(entry) as slide:
            prediction = self.estimate(entry, self.image(entry, slide))
            read = slide.statistics
        limits = (prediction.low, prediction.high)
        columns = [each[0].tolist() for each in (prediction.probabilities, prediction.standard_error, *limits)]
        probabilities = columns[0]
        return {
            "prediction": self.classes[max(range(len(probabilities)), key=probabilities.__getitem__)],
            **{
                f"{prefix}{name}": None if math.isnan(value) else value
                for prefix, column in zip(OF_CLASS, columns, strict=True)
                for name, value in zip(self.classes, column, strict=True)
            },
            "draws": int(prediction.draws[0]),
            **self._signs(prediction),
            "requests": read.requests,
            "bytes_read": read.bytes_read,
            "seconds": round(time.monotonic() - began, 4),
            "status": "ok",
            "error": "",
        }

    def _signs(self, prediction: Prediction) -> dict[str, float | None]:
        """What tells an attention that has learned nothing (`verdict`), over the draws of one slide."""
        background, patches = self.observer.take().tolist()
        drawn = patches and not self.settings.exact  # or else patches were encoded that nobody has chosen
        uniform = torch.cat([self.observer.uniform_entropy(output) for output in prediction.outputs])
        entropy = torch.cat([output.entropy for output in prediction.outputs]).mean()
        share = background / patches if drawn else None
        return dict(zip(SIGNS, (float(entropy), float(uniform.mean()), share), strict=True))


def failed(error: str | None) -> dict[str, Any]:
    """Row of a slide that failed."""
    return {"status": "failed", "error": error}
