"""A training step on a scene of more than a gigapixel reads the coarse view and what it drew, and nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from nested_ats import NestedATS, attention_sampling_loss
from pipeline.config import Config
from pipeline.data.slides import SlideImage
from storage import Slide, convert, write_tiff

SIDE = 33000  # not a multiple of chunk, shard or cell
TILE = 1024


@pytest.fixture(scope="module")
def gigapixel(tmp_path_factory) -> Path:
    """Make a pyramid of a scene of 1.09 gigapixels: even ground with a bright square in every tile."""
    folder = tmp_path_factory.mktemp("gigapixel")
    ground = np.full((TILE, TILE, 3), 90, np.uint8)
    ground[500:540, 500:540] = (220, 30, 40)
    tiles = -(-SIDE // TILE)
    cut = [TILE] * (tiles - 1) + [SIDE - TILE * (tiles - 1)]
    source = folder / "scene.tif"
    parts = (ground[:h, :w] for h in cut for w in cut)
    write_tiff(source, parts, shape=(SIDE, SIDE, 3), dtype="uint8", tile=TILE, compression="deflate")
    convert(source, folder / "scene.ome.zarr")
    source.unlink()
    return folder / "scene.ome.zarr"


def touched(level, boxes: torch.Tensor) -> set[tuple[int, int]]:
    """Chunks of a level that boxes (N, 4) share a pixel with, worked out box by box."""
    height, width = level.shape_yx
    chunks = set()
    for y, x, h, w in boxes.tolist():
        rows = range(max(y, 0) // level.chunk, (min(y + h, height) - 1) // level.chunk + 1)
        columns = range(max(x, 0) // level.chunk, (min(x + w, width) - 1) // level.chunk + 1)
        chunks |= {(row, column) for row in rows for column in columns}
    return chunks


class Recorder(SlideImage):
    """A slide that notes what is asked of it."""

    def __init__(self, slide: Slide) -> None:
        super().__init__(slide)
        self.asked: list[tuple[int, torch.Tensor]] = []

    def read(self, level: int, boxes: torch.Tensor) -> torch.Tensor:
        self.asked.append((level, boxes))
        return super().read(level, boxes)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_step_reads_only_what_it_drew(gigapixel):
    config = Config().model
    torch.manual_seed(0)
    model = NestedATS(config, in_channels=3, classes=4)
    with Slide(gigapixel) as slide:
        image = Recorder(slide)
        opened = slide.statistics
        output = model([image], torch.tensor([1]))
        loss, _ = attention_sampling_loss(output.logits, torch.tensor([2]), output.entropy, entropy_weight=0.01)
        torch.autograd.backward(loss.sum())
        read = slide.statistics - opened

        # Three reads: the coarse view, as many regions as budgeted, as many patches as budgeted.
        (coarse, view), (middle, regions), (fine, patches) = image.asked
        assert [slide.levels[i].downsample for i in (coarse, middle, fine)] == [16, 4, 1]
        assert len(view) == 1
        assert len(regions) == config.levels[0].samples
        assert len(patches) == config.levels[1].samples
        # Regions and patches lie where the phases drew them.
        for boxes, phase, downsample in ((regions, output.phases[0], 4), (patches, output.phases[1], 1)):
            centers = (boxes[:, :2] + boxes[:, 2:] / 2) * downsample
            assert (centers - phase.centers_l0[0]).abs().max() <= downsample

        # The store was asked for the chunks under those boxes, each once, and for the shards' indexes.
        chunks = {i: touched(slide.levels[i], boxes) for i, boxes in image.asked}
        assert read.chunks_decoded == sum(len(place) for place in chunks.values())
        shards = sum(
            len(
                {(row * level.chunk // level.shard, column * level.chunk // level.shard) for row, column in chunks[i]}
            )
            for i, level in ((i, slide.levels[i]) for i in chunks)
        )
        assert read.requests <= read.chunks_decoded + shards
        budget = 4 * (config.levels[0].samples + config.levels[1].samples)  # a box touches at most four chunks
        assert len(chunks[middle]) + len(chunks[fine]) <= budget
        chunk_bytes = 3 * 256 * 256 + 1024  # raw, with room for what a codec adds
        index_bytes = 64 * 16 + 4
        assert read.bytes_read <= read.chunks_decoded * chunk_bytes + shards * index_bytes
        whole = sum(path.stat().st_size for path in gigapixel.rglob("*") if path.is_file())
        assert read.bytes_read < whole / 50
        assert 3 * (len(chunks[middle]) + len(chunks[fine])) * 256 * 256 < 3 * SIDE**2 / 200
