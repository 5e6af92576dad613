"""The errors that a user of the pipeline can cause; each message names the file, the cause and the fix."""


class PipelineError(Exception):
    """Any error of the pipeline that a user can cause and mend; the command line exits with `exit_code`."""

    exit_code = 2


class UsageError(PipelineError):
    """Bad arguments, a bad configuration or a bad manifest."""


class DataError(PipelineError):
    """Data that cannot be used: a malformed file, or one that does not hold what it should."""

    exit_code = 4
