"""Progress as a terminal and a file see it."""

import io

from rich.console import Console

from lensbench.runtime import bars
from lensbench.runtime.bars import Bars


def shown(monkeypatch, terminal: bool):
    out = io.StringIO()
    monkeypatch.setattr(bars, "messages", Console(file=out, force_terminal=terminal, width=160))
    return out


def test_a_terminal_counts_the_stages_of_the_whole_run(monkeypatch):
    out = shown(monkeypatch, True)
    with Bars() as progress:
        progress.stages(3)
        progress.finished("train-gpt-seed0", 1.0, False)
        with progress.task("fit-gpt-seed0", 10, "lenses") as task:
            task.update(4, "pairs")
            progress.bars.refresh()
            descriptions = [t.description for t in progress.bars.tasks]
        assert descriptions == ["stage 2 of 3", "fit-gpt-seed0"]
        assert [t.description for t in progress.bars.tasks] == ["stage 2 of 3"], "a bar goes when its task ends"
    assert "train-gpt-seed0: done in 1.0 s" in out.getvalue()


def test_elsewhere_there_is_a_line_for_each_finished_stage_and_no_more(monkeypatch):
    out = shown(monkeypatch, False)
    with Bars() as progress:
        progress.stages(2)
        with progress.task("fit", 10, "lenses") as task:
            task.update(4)
        progress.finished("fit", 2.0, True)
    assert out.getvalue() == "fit: reused, took 2.0 s (stage 1 of 2)\n"


def test_a_finished_stage_says_its_place_and_about_how_long_the_rest_takes(monkeypatch):
    out = shown(monkeypatch, False)
    predicted = {"train-a-seed0": 60.0, "fit-a-seed0": 10.0, "train-b-seed0": 60.0, "fit-b-seed0": 10.0}
    with Bars() as progress:
        progress.stages(len(predicted), predicted)
        progress.finished("train-a-seed0", 600.0, False)
        progress.finished("fit-a-seed0", 60.0, False)
        progress.finished("train-b-seed0", 1.0, True)
        progress.finished("fit-b-seed0", 30.0, False)
    first, second, third, last = out.getvalue().splitlines()
    # The machine is about ten times slower than the supposed one: 800 s, then 700 s and 100 s.
    assert first == "train-a-seed0: done in 600.0 s (stage 1 of 4, about 13 min left)"
    assert second == "fit-a-seed0: done in 60.0 s (stage 2 of 4, about 11 min left)"
    assert third == "train-b-seed0: reused, took 1.0 s (stage 3 of 4, about 1 min left)"
    assert last == "fit-b-seed0: done in 30.0 s (stage 4 of 4)"


def test_a_terminal_says_what_is_left_while_a_stage_lasts(monkeypatch):
    shown(monkeypatch, True)
    clock = [0.0]
    monkeypatch.setattr(bars.time, "monotonic", lambda: clock[0])
    with Bars() as progress:
        progress.stages(3, {"a-x": 600.0, "b-x": 600.0, "c-x": 600.0})
        clock[0] = 600.0
        progress.finished("a-x", 600.0, False)
        with progress.task("b-x", 10, "lenses") as task:
            said = []
            for clock[0] in (601.0, 1080.0, 6000.0):
                task.update(1)
                said.append(progress.bars.tasks[0].fields["remark"])
    assert said[:2] == ["about 20 min left", "about 12 min left"]
    assert int(said[2].split()[1]) > 50


def test_what_an_earlier_attempt_finished_counts_for_no_rate(monkeypatch):
    shown(monkeypatch, True)
    with Bars() as progress, progress.task("fit-gpt-seed0", 10, "lenses") as task:
        task.restored(8)
        (bar,) = progress.bars.tasks
        assert (bar.completed, bar.speed) == (8, None)


def test_a_bar_of_a_single_unit_moves_without_a_count(monkeypatch):
    out = shown(monkeypatch, True)
    with Bars() as progress, progress.task("corpus", 1, "steps") as task:
        (bar,) = progress.bars.tasks
        assert bar.total is None  # rich moves such a bar to and fro
        progress.bars.refresh()
        task.update(1)
    assert "corpus" in out.getvalue()
    assert "0/" not in out.getvalue()
