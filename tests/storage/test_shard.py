"""The bytes of one shard file."""

import numpy as np

from storage.format.shard import BloscCodec, ShardLayout, encode_shard

LAYOUT = ShardLayout(1, 16, 64, np.dtype("uint8"), BloscCodec("lz4", 5, "noshuffle", 1))


def test_equal_pixels_make_equal_bytes(rng):
    pixels = rng.integers(0, 255, (1, 64, 40), dtype=np.uint8)
    assert encode_shard(pixels, LAYOUT) == encode_shard(np.asfortranarray(pixels), LAYOUT)


def test_the_checksum_of_a_shard_tells_its_content(rng):
    noise = rng.integers(1, 255, (2, 1, 64, 64), dtype=np.uint8)  # does not compress: chunks of one length
    assert encode_shard(noise[0], LAYOUT).crc32 != encode_shard(noise[1], LAYOUT).crc32
