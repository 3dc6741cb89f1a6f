"""Progress bars on a terminal, a line per finished stage elsewhere."""

import time
from collections.abc import Mapping
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from lensbench.runtime.left import TimeLeft, in_words

messages = Console(stderr=True)
"""Where progress and messages go: standard error."""


class Bar:
    """One bar on the terminal; it goes when its ``with`` block ends."""

    def __init__(self, whole: "Bars", task: TaskID, unit: str) -> None:
        """The bar of ``task``, one of those of ``whole``, which counts in ``unit``."""
        self.whole, self.bars, self.task, self.unit = whole, whole.bars, task, unit

    def update(self, done: int, remark: str = "") -> None:
        """Move the bar to ``done`` units, with ``remark`` next to it."""
        self.bars.update(self.task, completed=done, remark=remark)
        self.whole.moved()

    def restored(self, done: int) -> None:
        """Begin to measure at ``done`` units, which an earlier attempt finished."""
        self.bars.reset(self.task, completed=done, unit=self.unit, remark="from an earlier attempt")

    def __enter__(self) -> Self:
        """The bar itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Take the bar away."""
        if self.task in self.bars.task_ids:
            self.bars.remove_task(self.task)


class Count(MofNCompleteColumn):
    """How many units of how many; nothing for a bar of a single unit."""

    def render(self, task: Task) -> Text:
        """``3/10 lenses``."""
        return Text() if task.total is None else super().render(task).append(f" {task.fields['unit']}")


class Bars:
    """The :class:`lensbench.runtime.progress.Progress` of a terminal: bars with the time left; lines elsewhere."""

    def __init__(self) -> None:
        """Bars that are drawn from the beginning of a ``with`` block to its end."""
        self.live = messages.is_terminal
        self.bars = Progress(
            TextColumn("{task.description:<22}"),
            BarColumn(bar_width=16),
            Count(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[remark]}"),
            console=messages,
            disable=not self.live,
        )
        self.whole: TaskID | None = None
        self.count, self.total = 0, 0
        self.left = TimeLeft({})
        self.since = time.monotonic()
        """When the stage under way began"""

    def __enter__(self) -> Self:
        """The bars themselves, drawn from here on."""
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop drawing."""
        self.bars.stop()

    def task(self, name: str, total: int, unit: str) -> Bar:
        """A bar of ``total`` units; one of a single unit moves to and fro, as nothing says how far it is."""
        known = None if total == 1 else total
        return Bar(self, self.bars.add_task(name, total=known, unit=unit, remark=""), unit)

    def stages(self, total: int, predicted: Mapping[str, float] | None = None, at_once: int = 1) -> None:
        """A line for the whole run of ``total`` stages stands above the bars, with the time left."""
        self.total, self.left, self.since = total, TimeLeft(predicted or {}, at_once), time.monotonic()
        self.whole = self.bars.add_task(self._position(), total=total, unit="stages", remark="")

    def finished(self, name: str, seconds: float, reused: bool) -> None:
        """Print the stage's name and its seconds, count it, and say how many there are and what is left."""
        self.count += 1
        self.left.finished(name, seconds, reused)
        self.since = time.monotonic()
        minutes = in_words(self.left.seconds())
        if self.whole is not None:
            self.bars.update(self.whole, completed=self.count, description=self._position(), remark=minutes)
        what = "reused, took" if reused else "done in"
        place = f"stage {self.count} of {self.total}" if self.count <= self.total else ""
        about = ", ".join(filter(None, [place, minutes]))
        messages.print(
            f"{name}: {what} {seconds:.1f} s{f' ({about})' if about else ''}", highlight=False, soft_wrap=True
        )

    def moved(self) -> None:
        """Say anew what is left: the stage under way may have taken longer than expected."""
        if self.whole is not None:
            self.bars.update(self.whole, remark=in_words(self.left.seconds(time.monotonic() - self.since)))

    def _position(self) -> str:
        """``stage 5 of 12``: the one that is under way."""
        return f"stage {min(self.count + 1, self.total)} of {self.total}"

    def say(self, line: str) -> None:
        """Print a line above the bars."""
        messages.print(line, highlight=False, markup=False, soft_wrap=True)
