"""Iterative patch selection (IPS; Bergner et al., ICLR 2023), written anew from the paper, for `rivals.py`.

All patches of an image are embedded without gradient, I at a time, and the M of the highest scores so far are kept;
then those M are embedded again, with gradient, and pooled by the same cross-attention with a learned query, whose
attention is the score. Memory does not grow with the image; time does.

What differs from theirs: a patch's score is the log-sum-exp over heads of its attention *before* the softmax over
patches, where theirs is the mean over heads after it. It says nearly the same, and depends on the patch alone, so
that the patches kept are the M best of all, whatever I is. There is no dropout. The feature network is the caller's.

Shape letters: B images, P patches, M kept patches, A heads, D features, E width of the transformer, Q classes.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from nested_ats.images import scale_pixels
from pipeline.data.slides import draw_key
from pipeline.files import write_atomic
from pipeline.sections import TrainConfig
from pipeline.training.course import clip, learning_rate

Chunks = Iterable[tuple[Tensor, Tensor]]  # (P, ...) patches, or what is known of them, and (P, 2) places in [0, 1]


class PatchEncoder(nn.Module):
    """Scales and normalises pixels before a network: (P, C, H, W) of the image's type -> (P, D).

    In training, patches that are black all over are encoded once, as one patch. It changes no result, and saves most
    of the time on canvases that are nearly empty; a test takes what it would take on others.
    """

    def __init__(self, network: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.network = network
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", mean.reshape(-1, 1, 1), persistent=False)
        self.register_buffer("std", std.reshape(-1, 1, 1), persistent=False)

    def forward(self, patches: Tensor) -> Tensor:
        """(P, C, H, W) -> (P, D)."""
        if not self.training:
            return self._encode(patches)
        seen = (patches != 0).flatten(1).any(1)
        different = torch.cat([torch.zeros_like(patches[:1]), patches[seen]])
        return self._encode(different)[seen.cumsum(0) * seen]  # number 0 is the black one

    def _encode(self, patches: Tensor) -> Tensor:
        pixels = (scale_pixels(patches) - self.mean) / self.std
        features: Tensor = self.network(pixels.contiguous(memory_format=torch.channels_last))
        return features


class IPS(nn.Module):
    """Selects patches by the attention that pools them.

    Parameters
    ----------
    encoder
        (P, ...) -> (P, D); a patch's features may not depend on the others, as batch statistics would have it.
    features
        D.
    classes
        Q.
    width, heads
        E, a multiple of 4, and A, of the transformer.
    kept
        M, patches that are kept.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        features: int,
        classes: int,
        width: int = 128,
        heads: int = 8,
        kept: int = 100,
    ) -> None:
        super().__init__()
        self.encoder, self.heads, self.kept = encoder, heads, kept
        self.project = nn.Sequential(nn.LayerNorm(features), nn.Linear(features, width), nn.ReLU())
        self.query = nn.Parameter(torch.randn(width))
        self.asks, self.answers, self.values, self.joins = (nn.Linear(width, width) for _ in range(4))
        self.after = nn.LayerNorm(width)
        self.mix = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))
        self.last = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def embed(self, patches: Tensor, places: Tensor) -> Tensor:
        """(P, ...) patches at (P, 2) places -> (P, E)."""
        embedded: Tensor = self.project(self.encoder(patches))
        return embedded + position(places, embedded.shape[-1])

    def attend(self, embedded: Tensor) -> Tensor:
        """(..., P, E) -> (..., P, A), before the softmax over patches."""
        keys = self.answers(embedded).unflatten(-1, (self.heads, -1))
        query = self.asks(self.query).unflatten(-1, (self.heads, -1))
        logits: Tensor = (keys * query).sum(-1) / math.sqrt(query.shape[-1])
        return logits

    def score(self, embedded: Tensor) -> Tensor:
        """(P, E) -> (P,): the patches of the highest scores are kept."""
        return self.attend(embedded).logsumexp(-1)

    @torch.no_grad()
    def select(self, chunks: Chunks) -> tuple[Tensor, Tensor]:
        """Go through all patches of an image and return the M best, (M, ...), and their places (M, 2)."""
        best: tuple[Tensor, ...] = ()
        for patches, places in chunks:
            fresh = (patches, places, self.score(self.embed(patches, places)))
            joined = tuple(map(torch.cat, zip(best, fresh, strict=True))) if best else fresh
            order = joined[2].topk(min(self.kept, len(joined[2]))).indices
            best = tuple(each[order] for each in joined)
        return best[0], best[1]

    def forward(self, patches: Tensor, places: Tensor) -> Tensor:
        """(B, M, ...) patches at (B, M, 2) places -> (B, Q) logits."""
        embedded = self.embed(patches.flatten(0, 1), places.flatten(0, 1)).unflatten(0, places.shape[:2])
        weights = self.attend(embedded).softmax(-2)  # (B, M, A)
        values = self.values(embedded).unflatten(-1, (self.heads, -1))
        pooled = self.joins((weights[..., None] * values).sum(1).flatten(1))  # (B, E)
        pooled = self.after(self.query + pooled)
        logits: Tensor = self.head(self.last(pooled + self.mix(pooled)))
        return logits


def position(places: Tensor, width: int) -> Tensor:
    """Sines and cosines of (P, 2) places in [0, 1], wavelengths from 0.02 of the image to all of it: (P, width)."""
    waves = 2 * math.pi * torch.logspace(0, math.log10(50), width // 4)
    angles = (places[..., None] * waves).flatten(1)  # (P, width / 2)
    return torch.cat([angles.sin(), angles.cos()], -1)


def learn(
    model: IPS, scan: Callable[[int], Chunks], labels: Sequence[int], course: TrainConfig, seed: int, state: Path
) -> float:
    """Train, or go on from the last whole epoch, and return the seconds of all epochs.

    Parameters
    ----------
    model
        What is trained.
    scan
        Gives the patches of the image of this row.
    labels
        Classes of the rows.
    course
        Epochs, batch, learning rate with its warm-up and cosine, weight decay.
    seed
        Of the order of the rows.
    state
        File in which every epoch ends.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=course.learning_rate, weight_decay=course.weight_decay)
    first, seconds = _resume(state, model, optimizer)
    for epoch in range(first, course.epochs):
        began, total = time.monotonic(), 0.0
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(draw_key(seed, epoch) >> 1))
        batches = order.split(course.batch_size)
        for step, rows in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(course, (epoch + (step + 0.5) / len(batches)) / course.epochs)
            chosen = rows.tolist()
            total += _step(model, optimizer, course, [scan(r) for r in chosen], [labels[r] for r in chosen])
        seconds += time.monotonic() - began
        print(f"IPS, epoch {epoch + 1}: cross-entropy {total / len(batches):.3f}, {seconds:.0f} s", flush=True)
        kept = io.BytesIO()
        whole = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({"epoch": epoch + 1, "seconds": seconds, **whole}, kept)
        write_atomic(state, kept.getbuffer())
    return seconds


def _step(
    model: IPS, optimizer: torch.optim.Optimizer, course: TrainConfig, scans: list[Chunks], labels: list[int]
) -> float:
    chosen = [model.select(chunks) for chunks in scans]
    patches, places = (torch.stack(part) for part in zip(*chosen, strict=True))
    loss = functional.cross_entropy(model(patches, places), torch.tensor(labels))
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    clip(list(model.parameters()), course.clip)
    optimizer.step()
    return loss.item()


def _resume(state: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """Epochs that are done, and their seconds."""
    if not state.exists():
        return 0, 0.0
    found = torch.load(state, weights_only=True)
    model.load_state_dict(found["model"])
    optimizer.load_state_dict(found["optimizer"])
    return found["epoch"], found["seconds"]
