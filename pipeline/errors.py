"""The errors that a user of the pipeline can cause; each message names the file, the cause and the fix."""

# The module of an error tells whose it is: to import all rooms, and torch, would make a misspelt option wait.
_OURS = ("pipeline.errors", "storage.errors", "cluster.errors", "nested_ats.errors")


def is_ours(error: BaseException) -> bool:
    """Tell whether a user can cause and mend this error; each of the four rooms has such errors."""
    return type(error).__module__ in _OURS


class PipelineError(Exception):
    """The base of the pipeline's errors that a user can cause and mend; the command line exits with `exit_code`."""

    exit_code = 2


class UsageError(PipelineError):
    """The arguments, the configuration or the manifest are wrong.

    Nothing was computed and nothing was changed. Mend what the message names, and run the same command again.
    """


class DataError(PipelineError):
    """Data cannot be used: a file is malformed, or does not hold what it should.

    Of several slides the others went on. `nested-ats doctor SLIDE` looks at a slide that is named; mend it, or take
    its row out of the manifest, and run the same command again.
    """

    exit_code = 4
