"""New processes that have imported everything: forked, where the system can, from one that has done nothing else."""

import signal
from multiprocessing import forkserver, get_all_start_methods, get_context, resource_tracker
from multiprocessing.context import ForkServerContext, SpawnContext
from typing import Literal

FORKED: Literal["forkserver"] = "forkserver"


def new_processes() -> ForkServerContext | SpawnContext:
    """What starts processes without the threads of this one, which do not survive a fork."""
    return get_context(FORKED) if FORKED in get_all_start_methods() else get_context("spawn")


def import_ahead(*modules: str) -> None:
    """Begin to import modules, in a process that all of :func:`new_processes` are forked from; nothing on Windows.

    Returns at once. The process ends with this one.
    """
    if FORKED not in get_all_start_methods():
        return
    get_context(FORKED).set_forkserver_preload(list(modules))
    # Ctrl-C reaches every process of a terminal: this one answers it, and ends those that it has started.
    resource_tracker.ensure_running()  # which would let the signal through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
