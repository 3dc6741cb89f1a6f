"""Progress that tests read, or that interrupts."""

from collections.abc import Callable
from typing import Self

from lensbench.runtime.progress import Quiet


class Steps(Quiet):
    """Keeps the total and every number of finished units; ``watch`` may raise to end the work."""

    def __init__(self, watch: Callable[[int, str], None] = lambda done, remark: None):
        self.total = 0
        self.done: list[int] = []
        self.found: list[int] = []
        """Numbers of units that were finished before"""
        self.watch = watch

    def task(self, name: str, total: int, unit: str) -> Self:
        """Itself, with the total that was announced."""
        self.total = total
        return self

    def restored(self, done: int) -> None:
        """Kept apart: nothing was computed."""
        self.found.append(done)

    def update(self, done: int, remark: str = "") -> None:
        """Kept, then shown to ``watch``."""
        self.done.append(done)
        self.watch(done, remark)
