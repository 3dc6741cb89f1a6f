"""The command line: parses, calls, prints."""

import atexit
import gc

# Commands register themselves, in the order in which --help lists them.
from lensbench.cli import between, lenses, listing, reading, reports, running, studies  # noqa: F401
from lensbench.cli.app import app

__all__ = ["app", "main"]


def main() -> None:
    """Entry point of the ``lensbench`` command."""
    atexit.register(gc.freeze)  # else Python looks through all that is left before it ends: a second
    app()
