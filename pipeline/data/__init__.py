"""From manifests to the images that a model sees."""
