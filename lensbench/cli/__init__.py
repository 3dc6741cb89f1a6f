"""The command line: parses, calls, prints."""

# Commands register themselves, in the order in which --help lists them.
from lensbench.cli import running, studies, between, reports, reading, lenses, listing  # noqa: F401, I001
from lensbench.cli.app import app

__all__ = ["app", "main"]


def main() -> None:
    """Entry point of the ``lensbench`` command."""
    app()
