"""Progress bars on a terminal, a line per finished stage elsewhere."""

from collections.abc import Collection
from statistics import fmean
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

messages = Console(stderr=True)
"""Where progress and messages go: standard error."""


class Bar:
    """One bar on the terminal; it goes when its ``with`` block ends."""

    def __init__(self, bars: Progress, task: TaskID, unit: str) -> None:
        """The bar of ``task``, one of ``bars``, which counts in ``unit``."""
        self.bars, self.task, self.unit = bars, task, unit

    def update(self, done: int, remark: str = "") -> None:
        """Move the bar to ``done`` units, with ``remark`` next to it."""
        self.bars.update(self.task, completed=done, remark=remark)

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
        self.left: set[str] = set()
        self.took: dict[str, list[float]] = {}

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
        return Bar(self.bars, self.bars.add_task(name, total=known, unit=unit, remark=""), unit)

    def stages(self, total: int, names: Collection[str] = ()) -> None:
        """A line for the whole run of ``total`` stages stands above the bars, with the time left."""
        self.total, self.left = total, set(names)
        self.whole = self.bars.add_task(self._position(), total=total, unit="stages", remark="")

    def finished(self, name: str, seconds: float, reused: bool) -> None:
        """Print the stage's name and its seconds, count it, and say how many there are and what is left."""
        self.count += 1
        self.left.discard(name)
        if not reused:
            self.took.setdefault(kind_of(name), []).append(seconds)
        minutes = time_left(self.left, self.took)
        if self.whole is not None:
            self.bars.update(self.whole, completed=self.count, description=self._position(), remark=minutes)
        what = "reused, took" if reused else "done in"
        place = f"stage {self.count} of {self.total}" if self.count <= self.total else ""
        about = ", ".join(filter(None, [place, minutes]))
        messages.print(
            f"{name}: {what} {seconds:.1f} s{f' ({about})' if about else ''}", highlight=False, soft_wrap=True
        )

    def _position(self) -> str:
        """``stage 5 of 12``: the one that is under way."""
        return f"stage {min(self.count + 1, self.total)} of {self.total}"

    def say(self, line: str) -> None:
        """Print a line above the bars."""
        messages.print(line, highlight=False, markup=False, soft_wrap=True)


def kind_of(stage: str) -> str:
    """What stages of one kind have in common: the beginning of their names, of a probe with the name of the probe."""
    parts = stage.split("-")
    return "-".join(parts[:2]) if parts[0] == "probe" else parts[0]


def time_left(names: Collection[str], took: dict[str, list[float]]) -> str:
    """``about 6 min left`` for the stages ``names``, by the mean of what others of their kind took, else of all.

    Empty where nothing was measured yet, or nothing is left.
    """
    every = [seconds for of_kind in took.values() for seconds in of_kind]
    if not names or not every:
        return ""
    seconds = sum(fmean(took.get(kind_of(name), every)) for name in names)
    if seconds < 60:
        return "under a minute left"
    return f"about {seconds / 60:.0f} min left" if seconds < 5400 else f"about {seconds / 3600:.1f} h left"
