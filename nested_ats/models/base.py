"""What all models have in common: their configuration, encoder and head, and what they return.

`ImageModel` encodes patches and is the interface that training and evaluation see; `SamplingModel` is one whose
answer depends on what is drawn.

Shape letters: B batch, n drawn units, k cells of one map, K units in all, P patches, C channels, H W pixels,
D features, Q classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from nested_ats.config import EncoderConfig, PatchConfig
from nested_ats.errors import EncoderError
from nested_ats.images import Image, scale_pixels
from nested_ats.networks.encoders import build_encoder
from nested_ats.networks.trainable import freeze
from nested_ats.phases import Output
from nested_ats.reading import Reading, run
from nested_ats.targets import Target, as_target


class ImageModel(nn.Module):
    """A model that answers for images through an encoder and a linear head.

    Parameters
    ----------
    config
        Configuration of the model. The model keeps a copy in which what was left open is filled in.
    in_channels
        C of the images.
    classes
        Q, the number of classes; or what else the model answers.
    patch_size
        H = W of the patches that the encoder sees; None for whole images.
    location
        Whether features are told where their patch lies: its centre's y and x, -1 to 1 over the image, are appended
        to the encoder's feature vector, and a linear layer maps the D + 2 numbers to D (section 3.3).
    pretrained
        Read the weights that ``encoder`` names.
    attention
        Networks whose parameters come before the encoder's; optimizer states rely on the order.

    Frozen parts of the encoder (``trainable``) stay in evaluation mode and their parameters have
    ``requires_grad = False``; give an optimizer the others.

    Raises
    ------
    EncoderError
        The encoder cannot be built.
    """

    def __init__(
        self,
        config: EncoderConfig,
        *,
        in_channels: int,
        classes: int | Target,
        patch_size: int | None,
        location: bool = False,
        pretrained: bool = True,
        attention: nn.ModuleList | None = None,
    ) -> None:
        super().__init__()
        self._mean: Tensor
        self._std: Tensor
        if attention is not None:
            self.attention = attention
        self.in_channels = in_channels
        self.target = as_target(classes)
        built = build_encoder(
            config.encoder,
            in_channels=in_channels,
            channels=config.features,
            patch_size=patch_size,
            pretrained=pretrained,
        )
        self.encoder, self.features = built.module, built.features
        self.config = config = replace(
            config,
            encoder=built.encoder,
            mean=next(each for each in (config.mean, built.mean, 0.5) if each is not None),
            std=next(each for each in (config.std, built.std, 0.25) if each is not None),
        )
        self._frozen = freeze(self.encoder, config.trainable)
        self.locate = nn.Linear(self.features + 2, self.features) if location else None
        self.head = self.target.head(self.features, config.scale if isinstance(config, PatchConfig) else 1.0)
        for name in ("mean", "std"):  # (C, 1, 1) each; the configuration keeps them, the state does not
            values = getattr(config, name)
            if isinstance(values, tuple) and len(values) != in_channels:
                raise EncoderError(f"{name}: {len(values)} values for images of {in_channels} channels")
            each = torch.tensor([float(v) for v in (values if isinstance(values, tuple) else [values] * in_channels)])
            self.register_buffer(f"_{name}", each[:, None, None], persistent=False)
        self.train()
        # This is a third faster on CPUs and suits tensor cores; torch's annotations lack the overload.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def coarse_view(self, image: Image) -> Tensor:
        """Read what the model looks at first: (C, H, W) of the image's type, or (C, 0, 0) if it looks at nothing.

        It depends on the image alone, so it may be read ahead of the step that uses it.

        Raises
        ------
        ValueError
            The image has no level at the downsample.
        """
        del image
        return torch.empty(self.in_channels, 0, 0)

    def forward(
        self,
        images: Sequence[Image],
        keys: Tensor,
        *,
        views: Sequence[Tensor] | None = None,
        readers: Executor | None = None,
    ) -> Output:
        """Classify a batch of images.

        Parameters
        ----------
        images
            B images of any sizes.
        keys
            (B,) int64: the random key of each image alone decides what is drawn from it.
        views
            `coarse_view` of each image, where it was read ahead.
        readers
            The threads that read; by default this thread does.

        Raises
        ------
        ValueError
            An image lacks a level that the model reads.
        ImpossibleWeightsError
            The attention is not finite: the model has diverged.
        """
        return run(self.classify(images, keys, views=views), readers)

    def classify(
        self, images: Sequence[Image], keys: Tensor, *, views: Sequence[Tensor] | None = None
    ) -> Reading[Output]:
        """`forward` as a generator that yields its reads (`nested_ats.reading`), with the same errors."""
        raise NotImplementedError

    def coarse_views(self, images: Sequence[Image]) -> Reading[Sequence[Tensor]]:
        """Read the `coarse_view` of each image."""
        return (yield [partial(self.coarse_view, image) for image in images])

    def train(self, mode: bool = True) -> ImageModel:
        """Set the mode of all but the frozen parts, which stay in evaluation mode."""
        super().train(mode)
        for part in self._frozen:
            part.eval()
        return self

    def _scale(self, pixels: Tensor) -> Tensor:
        """Pixels of an image's own type -> in [0, 1], on the model's device and of its type."""
        weight = self.head.weight
        return scale_pixels(_to_device(pixels, weight.device)).to(weight.dtype)

    def _normalise(self, pixels: Tensor) -> Tensor:
        return (pixels - self._mean) / self._std

    def _prepare(self, pixels: Tensor) -> Tensor:
        """(P, C, H, W) of an image's own type -> the same as the encoder sees them."""
        return self._normalise(self._scale(pixels)).contiguous(memory_format=torch.channels_last)

    def _encode_seen(self, seen: Tensor) -> Tensor:
        """(P, C, H, W) as the encoder sees them -> (P, D), before normalisation."""
        frozen = self.config.trainable == "none"
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            features: Tensor = self.encoder(seen)
        return features.to(seen.dtype) if frozen else features  # the type that kept features have


def _to_device(pixels: Tensor, device: torch.device) -> Tensor:
    """Copy pixels to a device; to a GPU through pinned memory, so that the CPU need not wait for the copy.

    The pinned block may be freed at once: torch's allocator waits for the copy before it uses the block again.
    """
    if device.type == "cuda" and pixels.device.type == "cpu":
        return pixels.pin_memory().to(device, non_blocking=True)
    return pixels.to(device)
