"""Small trees in double precision, on which every outcome can be enumerated."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import nn

from nested_ats import ArrayImage, LevelConfig, ModelConfig, NestedATS


@pytest.fixture
def tiny_model() -> Callable[..., NestedATS]:
    """Model of any depth in which every view is a row of three cells (the whole image) or of two (regions)."""

    def build(
        depth: int, *, method: str = "pivotal", samples: int = 2, group: int = 1, **options: object
    ) -> NestedATS:
        levels = [
            LevelConfig(
                downsample=2 ** (depth - i),
                size=8 if i else None,
                samples=samples,
                stride=4 if i == depth - 1 else 4 // group,
                group=1 if i == depth - 1 else group,
                channels=(3,),
            )
            for i in range(depth)
        ]
        torch.manual_seed(depth)
        config = ModelConfig(levels=tuple(levels), patch_size=24, features=4, method=method, **options)
        model = NestedATS(config, in_channels=1, classes=3).double()
        with torch.no_grad():  # attention worth sampling: far from uniform
            for network in model.attention:
                weight = network.layers[-1].weight
                torch.nn.init.uniform_(weight, -7, 7)  # also of networks that would refine by nothing at first
        return model

    return build


@pytest.fixture
def tiny_image() -> Callable[[int], ArrayImage]:
    """Image of one cell by three at the first level of `tiny_model(depth)`, too low for a second row at any."""

    def build(depth: int) -> ArrayImage:
        generator = torch.Generator().manual_seed(depth)
        pixels = torch.rand(1, 2**depth, 12 * 2**depth, generator=generator, dtype=torch.float64)
        return ArrayImage(pixels, levels=depth + 1)

    return build


@pytest.fixture
def follow_brightness() -> Callable[[NestedATS, float], NestedATS]:
    """Makes the attention of every level a function of the brightest pixel of a cell."""

    def follow_brightness(model: NestedATS, sharpness: float) -> NestedATS:
        with torch.no_grad():
            for network in model.attention:
                convolution, last = network.layers[0], network.layers[-1]
                convolution.weight.zero_()
                convolution.weight[0, 0, 1, 1] = 1.0
                convolution.bias.zero_()
                last.weight.fill_(sharpness)
        return model

    return follow_brightness


@pytest.fixture(scope="session")
def torchvision():
    """Whatever torchvision there is, also one that was built for another torch and so lacks its operators.

    Nothing that is tested calls them, but timm and transformers import it, and it asks for their names.
    """
    declared = torch.library.Library("torchvision", "FRAGMENT")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            importlib.import_module("torchvision")
        except RuntimeError:
            for name in ("nms", "qnms"):
                declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
                del sys.modules[name]
        yield importlib.import_module("torchvision")


@pytest.fixture(scope="session")
def timm(torchvision):
    """The real timm."""
    return importlib.import_module("timm")


@pytest.fixture(scope="session")
def transformers(torchvision):
    """The real transformers."""
    return importlib.import_module("transformers")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of the Hugging Face hub; put(repository, file name) gives a path in it, as of a download."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(repository: str, name: str):
        folder = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / "main").write_text("0123abcd")
        (folder / "snapshots" / "0123abcd").mkdir(parents=True, exist_ok=True)
        return folder / "snapshots" / "0123abcd" / name

    return put


@pytest.fixture
def config() -> Callable[..., ModelConfig]:
    """Configuration of a model of one level, with options."""

    def config(**options) -> ModelConfig:
        level = LevelConfig(downsample=4, samples=3, stride=4)
        return ModelConfig(**{"levels": (level,), "patch_size": 27, **options})

    return config


@pytest.fixture
def build(config) -> Callable[..., NestedATS]:
    """The model of that configuration, the same every time."""

    def build(in_channels: int = 3, **options) -> NestedATS:
        torch.manual_seed(0)
        return NestedATS(config(**options), in_channels=in_channels, classes=2)

    return build


@pytest.fixture
def image() -> Callable[..., ArrayImage]:
    """An image for it, the same every time."""

    def image(channels: int = 3, height: int = 60, width: int = 80) -> ArrayImage:
        generator = torch.Generator().manual_seed(1)
        return ArrayImage(torch.rand(channels, height, width, generator=generator), levels=3)

    return image


class Small(nn.Module):
    """A stranger's encoder, without `.features`, with batch statistics."""

    def __init__(self, *, in_channels: int, width: int = 5) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(in_channels, width, 3)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, patches):
        return self.norm(self.convolution(patches)).mean((-2, -1))


@pytest.fixture
def strangers(monkeypatch):
    """Module of encoders that can be imported as ``strangers``."""
    module = ModuleType("strangers")
    module.Small = Small  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "strangers", module)
    return module
