"""Progress bars on a terminal, a line per finished stage elsewhere."""

from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

messages = Console(stderr=True)
"""Where progress and messages go: standard error."""


class Bar:
    """One bar on the terminal; it goes when its ``with`` block ends."""

    def __init__(self, bars: Progress, task: TaskID) -> None:
        """The bar of ``task``, one of ``bars``."""
        self.bars, self.task = bars, task

    def update(self, done: int, remark: str = "") -> None:
        """Move the bar to ``done`` units, with ``remark`` next to it."""
        self.bars.update(self.task, completed=done, remark=remark)

    def __enter__(self) -> Self:
        """The bar itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Take the bar away."""
        if self.task in self.bars.task_ids:
            self.bars.remove_task(self.task)


class Bars:
    """The :class:`lensbench.runtime.progress.Progress` of a terminal: bars with the time left; lines elsewhere."""

    def __init__(self) -> None:
        """Bars that are drawn from the beginning of a ``with`` block to its end."""
        self.live = messages.is_terminal
        self.bars = Progress(
            TextColumn("{task.description:<22}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[remark]}"),
            console=messages,
            disable=not self.live,
        )
        self.whole: TaskID | None = None
        self.count, self.total = 0, 0

    def __enter__(self) -> Self:
        """The bars themselves, drawn from here on."""
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop drawing."""
        self.bars.stop()

    def task(self, name: str, total: int, unit: str) -> Bar:
        """A bar of ``total`` units."""
        return Bar(self.bars, self.bars.add_task(name, total=total, unit=unit, remark=""))

    def stages(self, total: int) -> None:
        """A bar for the whole run of ``total`` stages stands above the others, with the time left."""
        self.total = total
        self.whole = self.bars.add_task(self._position(), total=total, unit="stages", remark="")

    def finished(self, name: str, seconds: float, reused: bool) -> None:
        """Print the stage's name and its seconds, and count it."""
        self.count += 1
        if self.whole is not None:
            self.bars.update(self.whole, completed=self.count, description=self._position())
        what = "reused, took" if reused else "done in"
        messages.print(f"{name}: {what} {seconds:.1f} s", highlight=False)

    def _position(self) -> str:
        """``stage 5 of 12``: the one that is under way."""
        return f"stage {min(self.count + 1, self.total)} of {self.total}"

    def say(self, line: str) -> None:
        """Print a line above the bars."""
        messages.print(line, highlight=False, markup=False, soft_wrap=True)
