"""What a long computation reports about itself."""

from collections.abc import Callable
from typing import Protocol


class Progress(Protocol):
    """What the loop tells about itself; the command line draws it."""

    def stage(self, name: str, total: int, unit: str) -> "Callable[[int, str], None]":
        """A stage begins; call the answer with (done, remark)."""

    def finished(self, name: str, seconds: float, reused: bool) -> None: ...

    def say(self, line: str) -> None:
        """Something that the user has to know now."""


class Silent:
    """What a process tells that is not the first of several: nothing."""

    def stage(self, name: str, total: int, unit: str) -> Callable[[int, str], None]:
        return lambda done, remark: None

    def finished(self, name: str, seconds: float, reused: bool) -> None: ...

    def say(self, line: str) -> None: ...
