"""Whatever stands in a JSON file, each reader of one says in one line which file it is, or reads it."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import lensbench
from lensbench.errors import LensbenchError
from lensbench.lenses.fit import FitSummary
from lensbench.lenses.tuned import SharedLens, load_tuned_lens
from lensbench.models.pretrained import load_config
from lensbench.probes.measured import Measured
from lensbench.probes.tools.crossfit import Jackknifed
from lensbench.results.folder import owner_of
from lensbench.results.manifest import read_manifest
from lensbench.runtime.sealed import read_tensors
from lensbench.runtime.stages import Stage, Stages
from lensbench.runtime.texts import read_json
from lensbench.streams.rotated import RotatedView
from lensbench.studies.curves import PositionSums

ROOT = Path(lensbench.__file__).parent

DAMAGE = {
    "deep": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep, not closed": b"[" * 100_000,
    "a huge number": b"9" * 5000,
    "huge, within": b'{"seconds": ' + b"9" * 5000 + b"}",
    "NaN": b"NaN",
    "NaN within": b'{"seconds": NaN, "key": "a", "peak_gib": 0, "files": []}',
    "twice": b'{"key": "a", "key": "b"}',
    "list": b'[{"key": 1}]',
    "string": b'"a"',
    "null": b"null",
    "nothing": b"",
    "object of nothing": b"{}",
    "cut": b'{"key": "a", "sec',
    "UTF-16": '{"key": "a"}'.encode("utf-16"),
    "Latin-1": b'{"key": "\xe9"}',
    "zeros": b"\0" * 100,
    "other types": b'{"key": [], "seconds": {}, "peak_gib": "", "files": 3}',
    "other types, too": b'{"schema_version": {}, "files": 3, "checksum": [], "unembed_hash": 3, "d_model": "x"}',
}
OBJECTS = ("object of nothing", "huge, within", "NaN within", "other types", "other types, too")
"""Files that are JSON objects: only who knows what should stand in them can refuse them"""


def stage(folder):
    (folder / "x").mkdir()
    (folder / "stage.json").rename(folder / "x" / "stage.json")
    Stages(folder).run("x", {}, None)


def lens(reader):
    def read(folder):
        save_file({}, folder / "params.safetensors")
        torch.save({}, folder / "params.pt")
        unembed = torch.nn.Module()
        unembed.unembedding = torch.nn.Linear(2, 3)
        reader(unembed, folder)

    return read


def with_sums(name, reader):
    def read(folder):
        save_file({"value": torch.zeros(1)}, folder / f"{name}.safetensors")
        reader(folder)

    return read


ENDS = re.compile(r"(; |: )(copy|delete|download|give|train|fit|repeat)[^;]*$")
"""How each message ends: with what to do"""

READERS = {
    "manifest": ("manifest.json", read_manifest),
    "stage": ("stage.json", stage),
    "plain": ("row.json", lambda folder: read_json(folder / "row.json")),
    "checksums": ("stage.json", lambda folder: Stage(folder, "", True).checksums("")),
    "measured": ("labels.json", with_sums("sums", Measured.load)),
    "jackknifed": ("labels.json", with_sums("estimates", Jackknifed.load)),
    "fit": ("fit.json", lambda folder: FitSummary.load(folder / "fit.json")),
    "shared lens": ("config.json", lens(SharedLens.load)),
    "tuned lens": ("config.json", lens(lambda unembed, folder: load_tuned_lens(unembed, f"path:{folder}"))),
    "model": ("config.json", lambda folder: load_config(f"path:{folder}")),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_json_file_is_one_line_that_names_it(tmp_path, reader, damage):
    name, read = READERS[reader]
    (tmp_path / name).write_bytes(DAMAGE[damage])
    if reader == "plain" and damage in OBJECTS:
        read(tmp_path)
        return
    with pytest.raises(LensbenchError) as error:
        read(tmp_path)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)
    if damage not in (*OBJECTS, "twice"):  # these are JSON objects, which say something wrong
        assert ENDS.search(str(error.value)), error.value


def refusal(path):
    with pytest.raises(LensbenchError) as error:
        read_json(path)
    return str(error.value)


def test_the_place_of_damage_is_said_once_and_in_words(tmp_path):
    lines = {"config.json": b'{\n "a": 1,\n "b" 2\n}', "row.json": b'{"a": "b', "labels.json": b" \n"}
    for name, content in lines.items():
        (tmp_path / name).write_bytes(content)
    told = [refusal(tmp_path / name) for name in lines]
    assert "it is not valid JSON (expecting ':' delimiter at line 3, column 6); copy the folder" in told[0]
    assert "it is not valid JSON (unterminated string starting at column 7); copy the folder" in told[1]
    assert "labels.json is damaged: it is empty; copy the folder" in told[2]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_folder_with_a_damaged_file_has_no_owner(tmp_path, damage):
    for name in ("manifest.json", "run.json"):
        (tmp_path / name).write_bytes(DAMAGE[damage])
    assert owner_of(tmp_path) is None


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"\xff" * 100, b"\x08\0\0\0\0\0\0\0[[[[[[[[", b"\xff\xff\xff\xff\xff\xff\xff\x7f{}"]
)
@pytest.mark.parametrize("reader", [read_tensors, RotatedView.load, lambda path: PositionSums.load(path.parent)])
def test_a_damaged_file_of_tensors_is_one_line_that_names_it(tmp_path, reader, content):
    path = tmp_path / "sums.safetensors"
    path.write_bytes(content)
    with pytest.raises(LensbenchError) as error:
        reader(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_files_are_read_by_one_function():
    """json.loads elsewhere takes back what json.dumps gave, or reads the header of a file that was checked."""
    for path in ROOT.rglob("*.py"):
        text = path.read_text()
        name = path.relative_to(ROOT).as_posix()
        assert "json.load(" not in text, name
        others = text.count("json.loads(json.dumps(") + (name in ("runtime/texts.py", "runtime/sealed.py"))
        assert text.count("json.loads(") == others, name
        assert "load_file(" not in text or name == "runtime/sealed.py", name
