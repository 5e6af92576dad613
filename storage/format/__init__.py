"""OME-Zarr: metadata, shards and codecs, ours and those of others."""
