"""Deep multiple-instance learning over all patches of a grid (Ilse et al. 2018), behind the same interface.

Shape letters: B batch, K patches of a grid, C channels, H W pixels, D features, L attention features, Q classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from nested_ats.config import DeepMILConfig
from nested_ats.estimators import entropy
from nested_ats.images import Image
from nested_ats.models.patches import PatchModel
from nested_ats.phases import Output, Phase, Population, draw_phase, take_all
from nested_ats.reading import Reading
from nested_ats.targets import Target


class _AttentionPooling(nn.Module):
    """Logits of the attention to each feature: equation 8 of Ilse et al. (2018), or 9 where gated."""

    def __init__(self, features: int, width: int, *, gated: bool) -> None:
        super().__init__()
        self.hidden = nn.Linear(features, width)
        self.gate = nn.Linear(features, width) if gated else None
        self.logit = nn.Linear(width, 1, bias=False)  # a bias would not change the softmax

    def forward(self, features: Tensor) -> Tensor:
        """(K, D) -> (K,)."""
        hidden = self.hidden(features).tanh()
        if self.gate is not None:
            hidden = hidden * self.gate(features).sigmoid()
        logits: Tensor = self.logit(hidden)
        return logits.squeeze(-1)


class DeepMIL(PatchModel):
    """Attention over the features of **all** patches of a grid; every draw is the same.

    Patches are centred on the cells of a grid that tiles the image; the configuration's ``prior`` leaves some out.

    The memory of a training step grows with the image: the activations of every patch are kept, as in the paper, or
    with ``recompute`` those of one chunk at a time, for one more forward pass. The pixels of all patches, (K, C,
    patch_size, patch_size), are kept either way. Without gradients one chunk is held at a time.

    Its parameters and errors are those of `nested_ats.build_model`.
    """

    config: DeepMILConfig

    def __init__(
        self, config: DeepMILConfig, *, in_channels: int, classes: int | Target, pretrained: bool = True
    ) -> None:
        super().__init__(config, in_channels=in_channels, classes=classes, pretrained=pretrained)
        gated = config.attention == "gated"
        self.pooling = _AttentionPooling(self.features, config.attention_features, gated=gated)

    def classify(
        self, images: Sequence[Image], keys: Tensor, *, views: Sequence[Tensor] | None = None
    ) -> Reading[Output]:
        """Classify a batch of images; see `ImageModel.forward`. The one phase holds every patch, with z = 1."""
        del keys, views
        centers, possible = self._grid(images)
        grids = [own[mine] for own, mine in zip(centers, possible, strict=True)]
        most = max(map(len, grids))
        bags = []
        for image, own in zip(images, grids, strict=True):
            bags.append((yield from self._bag(image, own)))
        logits = [functional.pad(self.pooling(bag), (0, most - len(bag)), value=-torch.inf) for bag in bags]
        places = [functional.pad(own, (0, 0, 0, most - len(own))) for own in grids]
        stacked = torch.stack(logits)
        log_attention = stacked.log_softmax(-1, dtype=torch.promote_types(stacked.dtype, torch.float32))
        attention = log_attention.exp()
        # Not a matrix product: autocast would make it one of bf16.
        pooled = torch.stack([(a[: len(f), None] * f).sum(0) for a, f in zip(attention, bags, strict=True)])
        phase = _draw_all(Population(log_attention[:, None], torch.stack(places)[:, None], self.config.cell_l0))
        return Output(self.head(pooled), entropy(log_attention), pooled, (phase,))

    def _bag(self, image: Image, centers_l0: Tensor) -> Reading[Tensor]:
        """Features of all patches of an image: (K, 2) level-0 pixels -> (K, D)."""
        features = []
        for chunk in torch.split(centers_l0, self.config.chunk):
            if self.config.recompute and torch.is_grad_enabled() and not self._keeps:
                pixels, location = yield from self._read(image, chunk)
                features.append(checkpoint(self._embed, pixels, location, use_reentrant=False))
            else:
                features.append((yield from self.encoding_of_many(image, chunk)))
        return torch.cat(features)


def _draw_all(population: Population) -> Phase:
    """Make the phase that has drawn every cell."""
    ones = torch.ones_like(population.log_attention[:, :, 0])
    return draw_phase(population, ones, ones, take_all, 0, torch.empty(0))
