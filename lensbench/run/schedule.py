"""When processes that compute models side by side are done, from what their stages take."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TimedTask:
    """The stages of one model and seed, which a process computes one after the other."""

    training: str
    """What names the training, or the pretrained model, that tasks may share"""
    shared: float
    """Seconds of what they share; the first of them computes it"""
    own: float
    """Seconds of its own stages"""
    whole: bool = False
    """Whether others that share it wait for its own stages, too, as those of a pretrained model do"""
    first: bool = True
    """Whether it is dealt out before all that are not, which follow by their length, the longest first"""


def seconds_side_by_side(tasks: Sequence[TimedTask], count: int) -> float:
    """When the last of the tasks is done that ``count`` processes compute, seconds.

    A process that is free takes the first task that may start: a training is made by the first of its tasks, and the others
    wait for it. That is how :class:`lensbench.run.workers.Workers` deals them out.
    """
    late = sorted((task for task in tasks if not task.first), key=lambda task: -task.own)
    waiting, ends, there = [*(task for task in tasks if task.first), *late], list[float](), dict[str, float]()
    clock = last = 0.0
    while waiting:
        ends = [end for end in ends if end > clock]
        ready = [task for task in waiting if there.get(task.training, clock) <= clock] if len(ends) < count else []
        if not ready:
            clock = min(time for time in (*ends, *there.values()) if time > clock)
            continue
        task = ready[0]
        waiting.remove(task)
        begun = clock if task.training in there else clock + task.shared
        ends.append(begun + task.own)
        there.setdefault(task.training, ends[-1] if task.whole else begun)
        last = max(last, ends[-1])
    return last
