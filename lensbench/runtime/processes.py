"""New processes that have imported everything: forked, where the system can, from one that has done nothing else."""

from multiprocessing import get_all_start_methods, get_context
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
    from multiprocessing.forkserver import ensure_running

    get_context(FORKED).set_forkserver_preload(list(modules))
    ensure_running()
