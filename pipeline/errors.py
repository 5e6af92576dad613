"""The errors that a user of the pipeline can cause; each message names the file, the cause and the fix."""

# Told by where they are defined: importing all rooms, and torch, would make a misspelt option wait for seconds.
_OURS = ("pipeline.errors", "storage.errors", "cluster.errors", "nested_ats.errors")


def is_ours(error: BaseException) -> bool:
    """Whether an error is one that a user can cause and mend, of any of the four rooms."""
    return type(error).__module__ in _OURS


class PipelineError(Exception):
    """Any error of the pipeline that a user can cause and mend; the command line exits with `exit_code`."""

    exit_code = 2


class UsageError(PipelineError):
    """Bad arguments, a bad configuration or a bad manifest."""


class DataError(PipelineError):
    """Data that cannot be used: a malformed file, or one that does not hold what it should."""

    exit_code = 4
