"""GGUF files in parts are joined, and parts that make no file are refused in one line."""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest

from lensbench.errors import LensbenchError
from lensbench.models.gguf_parts import joined
from lensbench.models.pretrained import identity, locate
from lensbench.runtime.files import sha256

gguf = pytest.importorskip("gguf")

TENSORS = {f"blk.{k}.attn_q.weight": (3 + k, 32) for k in range(5)}


def written(path: Path, **splitting) -> None:
    """A file, or shards of it, of the package's own writer."""
    writer = gguf.GGUFWriter(path, "llama", **splitting)
    writer.add_name("a name")
    writer.add_array("tokenizer.ggml.tokens", [f"wörd{k}" for k in range(50)])
    writer.add_array("tokenizer.ggml.token_type", list(range(50)))
    writer.add_uint32("llama.block_count", 5)
    for number, (name, shape) in enumerate(TENSORS.items()):
        writer.add_tensor(name, np.arange(np.prod(shape), dtype=np.float32).reshape(shape) + number)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def whole(tmp_path) -> Path:
    written(tmp_path / "m.gguf")
    return tmp_path / "m.gguf"


@pytest.fixture
def shards(tmp_path) -> Path:
    (tmp_path / "shards").mkdir()
    written(tmp_path / "shards" / "m.gguf", split_max_tensors=2)
    return tmp_path / "shards"


def pieces(whole: Path, folder: Path, names: list[str]) -> Path:
    """The bytes of a file in pieces of these names, the last one the shortest."""
    folder.mkdir(parents=True)
    content, size = whole.read_bytes(), -(-whole.stat().st_size // len(names))
    for number, name in enumerate(names):
        (folder / name).write_bytes(content[number * size : (number + 1) * size])
    return folder


def file_of(source: str) -> Path:
    where = locate(source)
    return Path(where.name) / where.options["gguf_file"]


def refusal(source: str) -> str:
    with pytest.raises(LensbenchError) as error:
        locate(source)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(source)
    return str(error.value)


def contents(path: Path):
    reader = gguf.GGUFReader(path)
    fields = {n: f.contents() for n, f in reader.fields.items() if not n.startswith(("split.", "GGUF."))}
    return fields, {t.name: (int(t.tensor_type), t.data.tolist()) for t in reader.tensors}


def test_shards_joined_are_the_file_that_was_split(whole, shards):
    assert len(list(shards.iterdir())) == 3
    made = file_of(f"gguf:{shards}")
    assert made.name == "m.gguf"
    assert contents(made) == contents(whole)
    assert made.read_bytes() == whole.read_bytes()
    assert file_of(f"gguf:{shards / 'm-00002-of-00003.gguf'}") == made


@pytest.mark.parametrize(
    "names",
    [
        [f"m.gguf.part{k}" for k in range(1, 13)],
        [f"m.gguf.{k:03d}" for k in range(3)],
        ["m.gguf.aa", "m.gguf.ab"],
        ["m.part-1.gguf", "m.part-2.gguf"],
    ],
)
def test_pieces_in_their_order_are_the_file_byte_for_byte_and_its_checksum_is_reported(names, whole, tmp_path):
    folder = pieces(whole, tmp_path / "pieces", names)
    assert file_of(f"gguf:{folder}").read_bytes() == whole.read_bytes()
    assert identity(f"gguf:{folder}") == {"m.gguf": hashlib.sha256(whole.read_bytes()).hexdigest()}
    assert identity(f"gguf:{folder / names[1]}") == identity(f"gguf:{whole}")


def test_parts_are_joined_once_and_again_when_one_changes(whole, tmp_path):
    folder = pieces(whole, tmp_path / "pieces", ["m.gguf.part1", "m.gguf.part2"])
    first = file_of(f"gguf:{folder}")
    written_at = first.stat().st_mtime_ns
    assert file_of(f"gguf:{folder}").stat().st_mtime_ns == written_at
    (folder / "m.gguf.part2").write_bytes((folder / "m.gguf.part2").read_bytes()[:-4] + b"abcd")
    assert sha256(file_of(f"gguf:{folder}")) != sha256(first)


def test_a_missing_part_is_named(whole, shards, tmp_path):
    (shards / "m-00002-of-00003.gguf").unlink()
    assert "lacks part 2 of 3 of m.gguf" in refusal(f"gguf:{shards}")
    folder = pieces(whole, tmp_path / "pieces", [f"m.gguf.part{k}" for k in (1, 2, 3)])
    (folder / "m.gguf.part2").unlink()
    assert "lacks part 2 of m.gguf; it has m.gguf.part1 to m.gguf.part3" in refusal(f"gguf:{folder}")
    (folder / "m.gguf.part1").unlink()
    assert "lacks part 1 of m.gguf and 1 more" in refusal(f"gguf:{folder}")


def test_a_missing_end_is_told_by_the_file_itself(whole, tmp_path):
    folder = pieces(whole, tmp_path / "pieces", [f"m.gguf.part{k}" for k in (1, 2, 3)])
    (folder / "m.gguf.part3").unlink()
    assert "its 2 parts are no whole GGUF file" in refusal(f"gguf:{folder}")
    assert not list((tmp_path / "cache").rglob("*.gguf"))


def test_parts_of_several_files_are_not_mixed(whole, shards, tmp_path):
    for path in list(shards.iterdir()):
        shutil.copy(path, shards / path.name.replace("m-", "n-"))
    assert "parts of 2 GGUF files (m.gguf in 3, n.gguf in 3)" in refusal(f"gguf:{shards}")
    assert contents(file_of(f"gguf:{shards / 'n-00001-of-00003.gguf'}")) == contents(whole)
    folder = pieces(whole, tmp_path / "pieces", ["m.gguf.part1", "m.gguf.part01"])
    assert "part 1 of m.gguf twice" in refusal(f"gguf:{folder}")


def test_shards_of_another_set_under_right_names_are_refused(shards):
    shutil.copy(shards / "m-00001-of-00003.gguf", shards / "m-00002-of-00003.gguf")
    assert "no whole GGUF file" in refusal(f"gguf:{shards}")


def test_a_whole_file_beside_parts_is_taken_and_no_part_is_none(whole, tmp_path):
    files = [whole, tmp_path / "n.gguf.part1"]
    assert joined("gguf:x", files) is None
    assert joined("gguf:x", [tmp_path / "README.md", tmp_path / "m-00001-of-00001.gguf"]) is None


def package(folder: Path, name: str, whole: Path, piece: str, number: int, of: int) -> None:
    """An installed distribution that ships a piece."""
    size = -(-whole.stat().st_size // of)
    (folder / name).mkdir()
    (folder / name / piece).write_bytes(whole.read_bytes()[(number - 1) * size : number * size])
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0\n")
    (info / "RECORD").write_text(f"{name}/{piece},,\n")


def test_packages_of_one_part_each_are_one_source(whole, tmp_path, monkeypatch):
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)
    for number in (1, 2):
        package(site, f"cut_model_part{number}", whole, f"m.gguf.part{number}", number, 3)
    assert "no whole GGUF file" in refusal("package:cut-model-part1")
    package(site, "cut_model_part3", whole, "m.gguf.part3", 3, 3)
    for number in (1, 3):
        assert file_of(f"package:cut-model-part{number}").read_bytes() == whole.read_bytes()
