"""What a long computation reports about itself, and to whom.

Code that takes long gets a :class:`Progress` and opens a :class:`Task` for each countable piece of work. The command line
draws bars; everything else uses :data:`QUIET`.
"""

from collections.abc import Mapping
from types import TracebackType
from typing import Protocol, Self


class Task(Protocol):
    """One piece of work under way; leaving its ``with`` block ends it."""

    def update(self, done: int, remark: str = "") -> None:
        """``done`` units are finished by now; ``remark`` is shown next to the bar."""

    def restored(self, done: int) -> None:
        """``done`` units are there from an earlier attempt: rates count from here on."""

    def __enter__(self) -> Self:
        """The task itself."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The task ends."""


class Progress(Protocol):
    """Where progress goes."""

    def task(self, name: str, total: int, unit: str) -> Task:
        """A task of ``total`` units begins."""

    def stages(self, total: int, predicted: Mapping[str, float] | None = None, at_once: int = 1) -> None:
        """The whole run has ``total`` stages; :meth:`finished` counts them.

        ``predicted``: their names (``KIND-MODEL-seedN``) in the order that they run in, with the seconds that each is
        predicted to take on some machine, 0 where nothing is known. With these the time left is told, of ``at_once`` stages
        that run side by side.
        """

    def finished(self, name: str, seconds: float, reused: bool) -> None:
        """A stage is finished, or an earlier run had finished it (``reused``)."""

    def say(self, line: str) -> None:
        """Something that the user has to know now."""


class Quiet:
    """Reports nothing: it is both the :class:`Progress` and every :class:`Task` of it."""

    def task(self, name: str, total: int, unit: str) -> Self:
        """Itself."""
        return self

    def update(self, done: int, remark: str = "") -> None:
        """Nothing is shown."""

    def restored(self, done: int) -> None:
        """Nothing is shown."""

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing is held."""

    def stages(self, total: int, predicted: Mapping[str, float] | None = None, at_once: int = 1) -> None:
        """Nothing is counted."""

    def finished(self, name: str, seconds: float, reused: bool) -> None:
        """Nothing is shown."""

    def say(self, line: str) -> None:
        """Nothing is shown."""


QUIET = Quiet()
"""The default wherever a :class:`Progress` is taken."""
