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
    assert out.getvalue() == "fit: reused, took 2.0 s\n"
