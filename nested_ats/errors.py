"""Errors that a user of `nested_ats` can cause."""


class NestedATSError(Exception):
    """Root of the errors of this package."""


class ImpossibleWeightsError(NestedATSError, ValueError):
    """Weights that nothing can be drawn by, such as the attention of a model that has diverged."""


class ModelFileError(NestedATSError):
    """A saved model is missing, damaged or not one of ours."""


class EncoderError(NestedATSError):
    """An encoder cannot be built: a library or a file is missing, an option is wrong, or it takes other patches."""
