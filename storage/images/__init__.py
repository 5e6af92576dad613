"""Image files that are read as they are: TIFF, and plain PNG, JPEG and BMP."""
