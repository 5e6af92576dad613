"""Turn manifests into the images that a model sees."""
