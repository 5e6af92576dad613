"""Errors that a user of `nested_ats` can cause."""

from __future__ import annotations

from pathlib import Path


class NestedATSError(Exception):
    """Root of the errors of this package."""


class ImpossibleWeightsError(NestedATSError, ValueError):
    """Nothing can be drawn by these weights, such as the attention of a model that has diverged.

    Train again with a lower ``train.learning_rate``, and look for NaN among the pixels of floating-point images.
    """


class ModelFileError(NestedATSError):
    """A saved model is missing, damaged or not one of ours.

    Give the folder ``model`` of a run, with all of its files; where one was damaged, copy the folder again.
    """


class UntrustedEncoderError(ModelFileError):
    """A saved model names code to import as its encoder, and nobody has said that it may be.

    Read that code. If you trust it, give ``--trust-encoder``, or ``trust_encoder=True`` in Python.

    Attributes
    ----------
    path
        The description that names the encoder.
    encoder
        The encoder's name, ``package.module:factory``.
    """

    def __init__(self, path: Path, encoder: str) -> None:
        super().__init__(path, encoder)
        self.path, self.encoder = path, encoder

    def __str__(self) -> str:
        """Say which argument allows the import."""
        return (
            f"{self.path}: its encoder is code to import, {self.encoder}; if you trust it, "
            "load the model with trust_encoder=True"
        )


class EncoderError(NestedATSError):
    """An encoder cannot be built: a library or a file is missing, an option is wrong, or the patches do not fit.

    `nested-ats info ENCODER` shows what a published one wants, and how to get its weights.
    """
