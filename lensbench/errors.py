"""Mistakes that a user can mend."""

import difflib


class LensbenchError(Exception):
    """Something is wrong with what lensbench was given; the message is one line saying what, and what would be right.

    The command line prints the message and exits with code 2; ``--debug`` shows the traceback.
    """


def nearest(name: str, known: list[str]) -> str:
    """The hint behind an unknown name."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"
