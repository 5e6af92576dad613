"""Errors that a user of `nested_ats` can cause."""


class NestedATSError(Exception):
    """Root of the errors of this package."""


class ModelFileError(NestedATSError):
    """A saved model is missing, damaged or not one of ours."""
