"""The command line: parses, calls, prints."""

import atexit  # noqa: I001
import gc

# Commands register themselves, in the order in which --help lists them.
from lensbench.cli import running, studies, between, reports, reading, lenses, listing  # noqa: F401
from lensbench.cli.app import app

__all__ = ["app", "main"]


def main() -> None:
    """Entry point of the ``lensbench`` command."""
    atexit.register(gc.freeze)  # else Python looks through all that is left before it ends: a second
    app()
