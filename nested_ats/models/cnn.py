"""A CNN that sees the whole image at one downsample (paper, section 4.1.1), behind the same interface.

Shape letters: B batch, C channels, H W pixels, D features, Q classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nested_ats.config import CNNConfig
from nested_ats.images import Image, find_level
from nested_ats.models.base import ImageModel
from nested_ats.phases import Output
from nested_ats.reading import Reading
from nested_ats.targets import Target


class CNN(ImageModel):
    """An encoder that sees the whole image at one downsample; every draw is the same.

    Its feature is not normalised, since nothing is weighted. Memory grows with the image.

    Its parameters and errors are those of `nested_ats.build_model`.
    """

    config: CNNConfig

    def __init__(
        self, config: CNNConfig, *, in_channels: int, classes: int | Target, pretrained: bool = True
    ) -> None:
        super().__init__(config, in_channels=in_channels, classes=classes, patch_size=None, pretrained=pretrained)

    def coarse_view(self, image: Image) -> Tensor:
        """Read the whole image at the model's downsample; see `ImageModel.coarse_view`."""
        level = find_level(image, self.config.downsample)
        return image.read(level, torch.tensor([[0, 0, *image.shapes[level]]]))[0]

    def classify(
        self, images: Sequence[Image], keys: Tensor, *, views: Sequence[Tensor] | None = None
    ) -> Reading[Output]:
        """Classify a batch of images; see `ImageModel.forward`. Images of one size run as one batch."""
        del keys
        if views is None:
            views = yield from self.coarse_views(images)
        features: dict[int, Tensor] = {}
        for shape in dict.fromkeys(view.shape for view in views):
            rows = [i for i, view in enumerate(views) if view.shape == shape]
            encoded = self._encode_seen(self._prepare(torch.stack([views[i] for i in rows])))
            features |= dict(zip(rows, encoded, strict=True))
        pooled = torch.stack([features[i] for i in range(len(views))])
        return Output(self.head(pooled), pooled.new_zeros(len(views)), pooled, ())
