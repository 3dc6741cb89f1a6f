"""Mistakes that a user can mend."""


class LensbenchError(Exception):
    """Something is wrong with what lensbench was given; the message is one line saying what, and what would be right.

    The command line prints the message and exits with code 2; ``--debug`` shows the traceback.
    """
