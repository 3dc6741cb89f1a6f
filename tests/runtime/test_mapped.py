"""Arrays in mapped files: what was written is read again after their pages were given back."""

import gc
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.disks import disk

from lensbench.lenses.room import FILE, MatrixFile
from lensbench.runtime import sealed
from lensbench.runtime.mapped import give_back_pages, kept_in_file, mapped
from lensbench.runtime.sealed import Damaged, load_sealed, save_sealed, write_tensors
from lensbench.runtime.stages import Pieces, _kept
from lensbench.streams.kept import mapped_file


def of_files() -> int:
    """Kilobytes of this process's memory that lie in files."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile")]
    return int(line.split()[1])


@pytest.mark.skipif(sys.platform != "linux", reason="/proc says what a process holds")
def test_pages_that_are_given_back_are_no_memory_of_the_process_and_hold_what_was_written(tmp_path: Path) -> None:
    array = mapped(tmp_path / "array", (8, 1024, 1024), np.float32)
    array.copy_(torch.arange(8.0)[:, None, None].expand_as(array))
    before = of_files()
    give_back_pages()
    assert before - of_files() > 24 * 1024
    assert array.mean((1, 2)).tolist() == list(range(8))


def test_moments_and_states_in_files_survive_their_pages(tmp_path: Path) -> None:
    states, file = mapped_file(tmp_path / "states.npy", (3, 5, 4)), MatrixFile(tmp_path / FILE, 32)
    first, second = file((4, 4)), file((4, 4))
    for number, one in enumerate((states, first, second)):
        one.fill_(number + 1)
    give_back_pages()
    assert [float(one.sum()) for one in (states, first, second)] == [60.0, 32.0, 48.0]
    assert np.load(tmp_path / "states.npy").sum() == 60.0


@pytest.mark.skipif(sys.platform != "linux", reason="/proc says what a process holds")
def test_states_that_an_earlier_stage_kept_are_read_from_their_file_again(tmp_path):
    np.save(tmp_path / "states.npy", np.arange(8.0, dtype=np.float32).repeat(1024 * 1024).reshape(8, 1024, 1024))
    states = kept_in_file(np.load(tmp_path / "states.npy", mmap_mode="c"))
    assert states.mean((1, 2)).tolist() == list(range(8))
    before = of_files()
    give_back_pages()
    assert before - of_files() > 24 * 1024
    assert states.mean((1, 2)).tolist() == list(range(8))


NEW_ARRAYS = {
    "states that are kept": lambda folder: mapped_file(folder / "states.npy", (3, 256, 256)),
    "moments": lambda folder: MatrixFile(folder / FILE, 2**17).all,
    "states for a while": lambda folder: mapped(folder / "states", (3, 256, 256), np.float32),
}


@pytest.mark.skipif(
    not hasattr(os, "posix_fallocate"), reason="no place on the disk is taken here before it is written"
)
@pytest.mark.parametrize("make", NEW_ARRAYS.values(), ids=NEW_ARRAYS)
def test_a_new_array_has_its_place_on_the_disk_before_it_is_written(make, tmp_path):
    """A page without a place on a disk that is full by then would kill the process."""
    array = make(tmp_path)
    (file,) = tmp_path.iterdir()
    assert 512 * file.stat().st_blocks >= array.numel() * array.element_size()


@pytest.mark.skipif(shutil.which("mount") is None, reason="no mount here")
@pytest.mark.parametrize("make", NEW_ARRAYS.values(), ids=NEW_ARRAYS)
def test_a_new_array_on_a_disk_that_is_too_small_is_an_error_and_leaves_nothing(make, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**40))  # as another process sees it first
    with disk(tmp_path / "small", "256k"):
        with pytest.raises(OSError, match="No space left"):
            make(tmp_path / "small")
        assert not list((tmp_path / "small").iterdir())


def test_an_array_that_is_forgotten_is_no_longer_asked_for_its_pages(tmp_path: Path) -> None:
    mapped(tmp_path / "array", (4,), np.float64).fill_(1.0)
    gc.collect()
    give_back_pages()
    assert np.fromfile(tmp_path / "array").tolist() == [1.0] * 4


@pytest.mark.skipif(sys.platform != "linux", reason="/proc says what a process holds")
def test_a_sealed_file_that_was_checked_lies_on_disk_alone(tmp_path):
    """Its check reads every byte; what is mapped after it takes no memory until it is used."""
    path = tmp_path / "large.safetensors"
    save_sealed({"x": torch.arange(2**23, dtype=torch.float32)}, path)
    before = of_files()
    found, _ = load_sealed(path, mapped=True)
    assert of_files() - before < 8 * 2**10
    assert float(found["x"].double().sum()) == 2**22 * (2**23 - 1)
    assert of_files() - before > 24 * 2**10
    give_back_pages()
    assert of_files() - before < 8 * 2**10
    assert float(found["x"][-1]) == 2**23 - 1


@pytest.mark.parametrize("dtype", sealed.TYPES.values())
def test_a_mapped_file_holds_what_safetensors_reads(tmp_path, dtype):
    whole = torch.arange(30).view(5, 6).to(dtype)
    content = {
        "b": whole,
        "scalar": whole[2, 3].clone(),
        "a": torch.ones(3, dtype=torch.float32),
        "none": whole[:0].clone(),
    }
    save_sealed(content, tmp_path / "x.safetensors", {"said": "so"})
    found, facts = load_sealed(tmp_path / "x.safetensors", mapped=True)
    assert facts == {"said": "so"}
    assert found.keys() == content.keys()
    for name, tensor in content.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_a_mapped_file_whose_tensors_are_not_aligned_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    save_sealed({"x": torch.arange(5.0)}, path)
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + size].rstrip()
    header += b" " * ((1 - len(header)) % 4)
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])
    assert (
        load_sealed(path, mapped=True)[0]["x"].tolist()
        == load_sealed(path)[0]["x"].tolist()
        == [0.0, 1.0, 2.0, 3.0, 4.0]
    )


@pytest.mark.skipif(sys.platform != "linux", reason="/proc says what a process holds")
def test_tensors_read_from_a_file_give_their_pages_back_after_each_piece(tmp_path):
    path = tmp_path / "maps.safetensors"
    write_tensors({"x": torch.arange(2**23, dtype=torch.float32)}, path)
    found, before = sealed.read_tensors(path, mapped=True), of_files()
    pieces, sums = Pieces(tmp_path / "pieces"), {}
    for name in ("first", "second"):
        sums[name] = pieces.get(name, lambda: {"sum": found["x"].double().sum()[None]})["sum"].item()
        assert of_files() - before < 8 * 2**10
    assert set(sums.values()) == {2**22 * (2**23 - 1)}


@pytest.mark.skipif(sys.platform != "linux", reason="/proc says what a process holds")
def test_tensors_that_lie_in_files_are_written_without_keeping_their_pages(tmp_path, monkeypatch):
    monkeypatch.setattr(sealed, "GIVE_BACK_EVERY", 2**22)
    for k in range(4):
        save_sealed({"x": torch.full((2**22,), float(k))}, tmp_path / str(k))
    mapped_ones = {str(k): load_sealed(tmp_path / str(k), mapped=True)[0]["x"] for k in range(4)}
    most, write = [], sealed.give_back_pages

    def noted() -> None:
        write()
        most.append(of_files())

    monkeypatch.setattr(sealed, "give_back_pages", noted)
    before = of_files()
    write_tensors(mapped_ones, tmp_path / "all")
    assert len(most) == 4
    assert max(most) - before < 8 * 2**10
    assert [float(x[0]) for x in sealed.read_tensors(tmp_path / "all").values()] == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize("fate", ["replaced", "cut", "cut short", "a byte less", "a list", "gone"])
def test_a_sealed_file_that_changes_between_its_check_and_its_use_is_damaged(tmp_path, monkeypatch, fate):
    path, other = tmp_path / "piece.safetensors", tmp_path / "other"
    save_sealed({"x": torch.ones(4)}, path)
    whole, check = path.read_bytes(), sealed.seal_of

    def then_changed(*content):
        found = check(*content)
        if fate == "gone":
            path.unlink()
        else:
            cut = {
                "cut": whole[:20],
                "cut short": whole[:7],
                "a byte less": whole[:-1],
                "a list": b"\x08" + bytes(7) + b"[      ]",
            }
            other.write_bytes(whole[:-16] + bytes(16) if fate == "replaced" else cut[fate])
            other.replace(path)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(sealed, "seal_of", then_changed)
        with pytest.raises(Damaged):
            load_sealed(path, mapped=True)
    path.write_bytes(whole)
    with monkeypatch.context() as patch:
        patch.setattr(sealed, "seal_of", then_changed)
        assert _kept(path, mapped=True) is None
    assert not path.exists()
