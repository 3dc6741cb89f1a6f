"""A stage runs again exactly when what it depends on changed, and never believes a damaged file."""

import json

import pytest
import torch

from lensbench.errors import LensbenchError
from lensbench.results.folder import lock_run_folder
from lensbench.runtime.stages import NOTHING_KEPT, NotFinished, Pieces, Stages


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


@pytest.mark.parametrize("record", ["{", "[" * 200_000, '{"key": ' * 200_000], ids=["cut", "lists", "objects"])
def test_a_damaged_record_is_named(tmp_path, record):
    stages = Stages(tmp_path)
    stages.run("a", {"x": 1}, write("one"))
    (tmp_path / "a" / "stage.json").write_text(record)
    with pytest.raises(LensbenchError, match=r"stage\.json is damaged"):
        stages.run("a", {"x": 1}, write("two"))


def test_a_run_folder_belongs_to_one_suite_and_one_run_at_a_time(tmp_path):
    lock = lock_run_folder(tmp_path / "run", "quick")
    with pytest.raises(LensbenchError, match="another run is writing"):
        lock_run_folder(tmp_path / "run", "quick")
    Stages(tmp_path / "run" / "stages").run("a", {"x": 1}, write("precious"))
    lock.release()
    with pytest.raises(LensbenchError, match="holds a run of suite 'quick', not 'slow'"):
        lock_run_folder(tmp_path / "run", "slow")
    foreign = tmp_path / "home"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    with pytest.raises(LensbenchError, match="not empty and not a run folder"):
        lock_run_folder(foreign, "quick")
    assert [p.name for p in foreign.iterdir()] == ["thesis.tex"]
    with pytest.raises(LensbenchError, match="is a file"):
        lock_run_folder(foreign / "thesis.tex", "quick")


def test_the_record_says_what_was_written(tmp_path):
    stage = Stages(tmp_path).run("a", {"x": 1}, write("one"))
    record = json.loads((stage.folder / "stage.json").read_text())
    assert list(record["files"]) == ["out.txt"]
    assert record["seconds"] >= 0


# Pieces of a stage


def never():
    raise AssertionError("computed again")


def awkward():
    """Tensors that share memory, are no rows of it or are empty, of several types."""
    whole = torch.arange(12, dtype=torch.float64).view(3, 4)
    return {
        "all": whole, "part": whole[1:], "turned": whole.T, "spread": torch.tensor([1.5]).expand(2, 3),
        "bits": torch.tensor([float("nan"), -0.0, 5e-324]), "count": torch.tensor([3, -1]), "none": torch.zeros(0, 2),
    }  # fmt: skip


def test_a_finished_piece_is_read_back_as_it_was(tmp_path):
    pieces = Pieces(tmp_path / "pieces")
    first, again = pieces.get("a@0.1-2", awkward), Pieces(tmp_path / "pieces").get("a@0.1-2", never)
    for found in (first, again):
        assert set(found) == set(awkward())
        for name, expected in awkward().items():
            assert found[name].dtype == expected.dtype
            assert found[name].shape == expected.shape
            assert found[name].numpy().tobytes() == expected.contiguous().numpy().tobytes(), name
    other = pieces.get("b", lambda: {"x": torch.ones(1)})
    assert set(other) == {"x"}
    assert set(pieces.get("a@0.1-2", never)) == set(awkward())
    pieces.clear()
    assert not (tmp_path / "pieces").exists()
    assert pieces.get("b", lambda: {"x": torch.zeros(1)})["x"] == 0


def test_an_interrupted_piece_leaves_nothing(tmp_path, monkeypatch):
    pieces = Pieces(tmp_path)

    def interrupted(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pieces.get("a", interrupted)
    with monkeypatch.context() as patch:

        def half(content, path, metadata):
            path.write_bytes(b"half")
            raise KeyboardInterrupt

        patch.setattr("lensbench.runtime.sealed.save_file", half)
        with pytest.raises(KeyboardInterrupt):
            pieces.get("a", awkward)
    assert list(tmp_path.iterdir()) == []
    assert set(pieces.get("a", awkward)) == set(awkward())


@pytest.mark.parametrize("end", [0, 4, 8, 20, -1])
def test_a_truncated_piece_is_computed_anew(tmp_path, end):
    pieces, path = Pieces(tmp_path), tmp_path / "a.safetensors"
    pieces.get("a", awkward)
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(whole[:end])
    assert pieces.get("a", lambda: {"x": torch.tensor([7])})["x"] == 7
    assert pieces.get("a", never)["x"] == 7


def test_without_a_folder_every_piece_is_computed_and_none_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = [NOTHING_KEPT.get("a", lambda k=k: {"x": torch.tensor(k)})["x"] for k in (1, 2)]
    assert found == [1, 2]
    assert list(tmp_path.iterdir()) == []
    NOTHING_KEPT.clear()


def test_pieces_of_an_interrupted_stage_are_there_for_the_next_and_gone_with_another_key(tmp_path):
    stages, found = Stages(tmp_path), []

    def work(stop):
        def compute(folder):
            pieces = Pieces(folder / "pieces")
            for name in "abc":
                pieces.get(name, lambda name=name: found.append(name) or {"x": torch.zeros(1)})
                if name == stop:
                    raise KeyboardInterrupt
            pieces.clear()

        return compute

    for key, stop in (({"k": 1}, "b"), ({"k": 1}, None), ({"k": 2}, "a"), ({"k": 3}, None)):
        found.append("|")
        if stop:
            with pytest.raises(KeyboardInterrupt):
                stages.run("s", key, work(stop))
        else:
            stage = stages.run("s", key, work(stop))
            assert [p.name for p in stage.folder.rglob("*") if p.name not in ("stage.json", "key.json")] == []
    assert "".join(found) == "|ab|c|a|abc"
