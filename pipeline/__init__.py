"""The product: the stages from images to predictions, their configuration, and the command line."""
