"""What is raised where the update decomposition of a stream has no value."""

from lensbench.errors import LensbenchError


class Undefined(LensbenchError):
    """The decomposition does not apply to a stream; the message says why, and tables hold it as the reason."""
