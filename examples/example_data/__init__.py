"""Data of the examples and benchmarks: Megapixel MNIST, and loaders of published sets."""
