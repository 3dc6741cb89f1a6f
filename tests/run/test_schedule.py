"""When tasks that are computed side by side are done, against schedules made by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lensbench.run.schedule import TimedTask, seconds_side_by_side

GPT, PC = TimedTask("gpt", 30, 25), TimedTask("pc", 50, 35)
STATE = TimedTask("pc", 50, 70)


@pytest.mark.parametrize(
    ("tasks", "count", "seconds"),
    [
        ([], 2, 0),
        ([GPT], 1, 55),
        ([GPT, PC, STATE], 1, 30 + 25 + 50 + 35 + 70),
        # The view takes the place of gpt at 55, its training being there since 50.
        ([GPT, PC, STATE], 2, 55 + 70),
        # With a third process it starts as soon as the training is there.
        ([GPT, PC, STATE], 3, 50 + 70),
        ([PC, STATE], 2, 50 + 70),
        # What is not first waits for all that is, and the longest of it comes first: 20 in the place of gpt at 55, 9 at 75.
        (
            [GPT, TimedTask("gpt", 0, 9, first=False), PC, TimedTask("pc", 0, 20, first=False)],
            2,
            50 + 35,
        ),
        # Views of a pretrained model wait for one another.
        ([TimedTask("a", 10, 20, True), TimedTask("a", 10, 40, True), TimedTask("b", 10, 5, True)], 2, 30 + 40),
    ],
)
def test_schedules_made_by_hand(tasks, count, seconds):
    assert seconds_side_by_side(tasks, count) == seconds


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 9), st.booleans()), max_size=7), st.integers(1, 5))
def test_bounds_that_any_schedule_has(drawn, count):
    shared = {"a": 3, "b": 5, "c": 0}
    tasks = [TimedTask(name, shared[name], own, whole) for name, own, whole in drawn]
    alone = sum(task.own for task in tasks) + sum(shared[name] for name in {task.training for task in tasks})
    found = seconds_side_by_side(tasks, count)
    assert alone / count <= found + 1e-9 <= alone + 1e-9 + 1e-9
    assert seconds_side_by_side(tasks, 1) == alone
    assert found >= max((task.shared + task.own for task in tasks), default=0)
