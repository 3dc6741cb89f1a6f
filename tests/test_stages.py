"""A stage runs again exactly when what it depends on changed, and never believes a damaged file."""

import json

import pytest

from lensbench.errors import LensbenchError
from lensbench.stages import NotFinished, Stages, open_run_folder


def write(content):
    return lambda folder: (folder / "out.txt").write_text(content)


def test_a_finished_stage_is_reused_until_its_key_changes(tmp_path):
    stages = Stages(tmp_path)
    first = stages.run("a", {"x": 1}, write("one"))
    again = stages.run("a", {"x": 1}, write("never"))
    other = stages.run("a", {"x": 2}, write("two"))
    assert (first.reused, again.reused, other.reused) == (False, True, False)
    assert first.digest == again.digest != other.digest
    assert (other.folder / "out.txt").read_text() == "two"
    with pytest.raises(NotFinished):
        stages.run("b", {"x": 1}, None)


def test_an_interrupted_stage_finds_what_it_had(tmp_path):
    stages = Stages(tmp_path)

    def interrupted(folder):
        (folder / "checkpoint").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stages.run("a", {"x": 1}, interrupted)
    found = []
    stages.run("a", {"x": 1}, lambda folder: found.append((folder / "checkpoint").read_text()))
    assert found == ["half"]


def test_what_an_interrupted_stage_left_is_thrown_away_when_its_key_changed(tmp_path):
    stages = Stages(tmp_path)

    def interrupted(folder):
        (folder / "checkpoint").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stages.run("a", {"x": 1}, interrupted)
    found = []
    stages.run("a", {"x": 2}, lambda folder: found.append((folder / "checkpoint").exists()))
    assert found == [False]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_file_is_named_and_nothing_is_overwritten(tmp_path, damage):
    stages = Stages(tmp_path)
    path = stages.run("a", {"x": 1}, write("precious")).folder / "out.txt"
    if damage == "remove":
        path.unlink()
    else:
        path.write_text("precioux" if damage == "flip" else "prec")
    with pytest.raises(LensbenchError, match=r"out\.txt.*delete"):
        stages.run("a", {"x": 1}, write("new"))
    assert damage == "remove" or path.read_text() != "new"


def test_a_damaged_record_is_named(tmp_path):
    stages = Stages(tmp_path)
    stages.run("a", {"x": 1}, write("one"))
    (tmp_path / "a" / "stage.json").write_text("{")
    with pytest.raises(LensbenchError, match=r"stage\.json is damaged"):
        stages.run("a", {"x": 1}, write("two"))


def test_a_run_folder_belongs_to_one_suite_and_one_run_at_a_time(tmp_path):
    lock = open_run_folder(tmp_path / "run", "quick")
    with pytest.raises(LensbenchError, match="another run is writing"):
        open_run_folder(tmp_path / "run", "quick")
    lock.release()
    with pytest.raises(LensbenchError, match="holds a run of suite 'quick', not 'slow'"):
        open_run_folder(tmp_path / "run", "slow")
    foreign = tmp_path / "home"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    with pytest.raises(LensbenchError, match="not empty and not a run folder"):
        open_run_folder(foreign, "quick")
    assert [p.name for p in foreign.iterdir()] == ["thesis.tex"]
    with pytest.raises(LensbenchError, match="is a file"):
        open_run_folder(foreign / "thesis.tex", "quick")


def test_the_record_says_what_was_written(tmp_path):
    stage = Stages(tmp_path).run("a", {"x": 1}, write("one"))
    record = json.loads((stage.folder / "stage.json").read_text())
    assert list(record["files"]) == ["out.txt"]
    assert record["seconds"] >= 0
