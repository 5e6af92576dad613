"""Run one function on N workers, or many items over restartable workers, with Ray or without.

Notable: this is the only room that imports Ray, and it does so inside functions. Importing `cluster`, and every
call with the address ``"none"``, works without Ray installed and does not pay for its start-up.
"""

from cluster.context import Context, LocalContext
from cluster.errors import ClusterError, WorkerLostError
from cluster.fit import fit
from cluster.pool import Outcome, run_tasks
from cluster.session import session

__all__ = ["ClusterError", "Context", "LocalContext", "Outcome", "WorkerLostError", "fit", "run_tasks", "session"]
