"""The errors of this room, and how any error becomes one line or crosses a process boundary."""


class ClusterError(Exception):
    """The base of all errors that a user of the cluster can cause or meet; each message is one line."""


class WorkerLostError(ClusterError):
    """Workers died or stopped answering, and the finite number of restarts is used up.

    Mostly there was too little memory: start fewer workers on a machine, or set a smaller ``train.batch_size``. The
    same command goes on from the last checkpoint.
    """


def one_line(error: BaseException) -> str:
    """Put the type and the message of an error into one line.

    Parameters
    ----------
    error
        Any exception.

    Returns
    -------
    str
        For example ``"KeyError: 'label'"``; where there is no message, the type alone.
    """
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def portable(error: Exception) -> Exception:
    """Return the error if it survives pickling, else a `ClusterError` naming it.

    An exception whose constructor takes other arguments than its message pickles but does not unpickle, so the
    round trip is tried here, in the Ray worker that raised it.

    Parameters
    ----------
    error
        The exception to send to another process.

    Returns
    -------
    Exception
        ``error`` itself or a `ClusterError` with its type and message.
    """
    from ray import cloudpickle

    try:
        same = type(cloudpickle.loads(cloudpickle.dumps(error))) is type(error)
    except Exception:  # noqa: BLE001 - __reduce__ and __init__ are the user's code and may raise anything
        same = False
    return error if same else ClusterError(one_line(error))
