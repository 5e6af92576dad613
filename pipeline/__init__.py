"""The product: stages from images to predictions, configuration, and the command line."""
