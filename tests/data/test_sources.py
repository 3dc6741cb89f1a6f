"""A text of several sources: installed packages, files and the standard library, named by checksum, without duplicates."""

import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pytest

from lensbench.data.corpus import load_corpus
from lensbench.data.reading import read_documents
from lensbench.data.sources import read_sources, sources_of
from lensbench.errors import LensbenchError
from lensbench.run.context import Cache
from lensbench.run.training import warn_of_repeats
from lensbench.suite.changes import without_folder


def prose(number, words=120):
    """Words of a made-up text, others for each number."""
    return " ".join(f"w{number}x{k}" for k in np.random.default_rng(number).integers(10**6, size=words))


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """An installed package of sources, documentation, a test, data and metadata."""
    site = tmp_path / "site"
    files = {
        "pack/__init__.py": prose(1), "pack/guide.rst": prose(2), "pack/notes.md": prose(3), "pack/short.py": "x = 1",
        "pack/tests/test_a.py": prose(4), "pack/table.csv": prose(5), "pack-1.2.dist-info/notice.txt": prose(6),
        "pack-1.2.dist-info/METADATA": "Metadata-Version: 2.1\nName: pack\nVersion: 1.2\n",
    }  # fmt: skip
    files["pack-1.2.dist-info/RECORD"] = "".join(f"{name},,\n" for name in files)
    for name, text in files.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text)
    monkeypatch.syspath_prepend(str(site))
    return files


def folder_of(tmp_path, **texts):
    """A folder of texts."""
    (tmp_path / "own").mkdir()
    for name, text in texts.items():
        (tmp_path / "own" / f"{name}.txt").write_text(text)
    return f"file:{tmp_path / 'own'}"


def test_a_package_gives_its_sources_and_documentation(installed):
    found = {d.name: d.text for d in read_documents("package:pack")}
    assert found == {name: installed[name] for name in ("pack/__init__.py", "pack/guide.rst", "pack/notes.md")}
    with pytest.raises(LensbenchError, match="package:no-such-pack is not installed: python -m pip install"):
        read_documents("package:no-such-pack")


def test_sources_are_joined_by_a_plus_and_a_path_may_hold_one():
    assert sources_of("stdlib + package:numpy + file:/a + b/c + hf:x") == [
        "stdlib", "package:numpy", "file:/a + b/c", "hf:x",
    ]  # fmt: skip
    assert without_folder("stdlib + file:/home/me/texts") == "stdlib + file:texts"


@pytest.mark.usefixtures("installed")
def test_each_source_is_named_by_its_checksum_and_one_of_near_duplicates_is_kept(tmp_path):
    spec = folder_of(tmp_path, a=prose(7), guide=prose(2), b=prose(8), again=prose(8) + " end")
    read = read_sources(f"package:pack + {spec}")
    assert [d.name for d in read.documents] == [
        "pack/__init__.py",
        "pack/guide.rst",
        "pack/notes.md",
        "a.txt",
        "again.txt",
    ]
    first, second = read.sources
    assert (first.documents, first.duplicates, first.version) == (3, 0, "1.2")
    assert (second.documents, second.duplicates, second.version) == (4, 2, None)
    parts = [
        hashlib.sha256(name.encode()).digest() + hashlib.sha256(text.encode()).digest()
        for name, text in (
            ("a.txt", prose(7)), ("guide.txt", prose(2)), ("b.txt", prose(8)), ("again.txt", prose(8) + " end"),
        )
    ]  # fmt: skip
    assert second.checksum == hashlib.sha256(b"".join(sorted(parts))).hexdigest()
    assert second.bytes == sum(len(t) for t in (prose(7), prose(2), prose(8), prose(8) + " end"))


def test_a_single_source_keeps_its_near_duplicates_in_one_split(tmp_path):
    texts = {f"t{k}": prose(k) for k in range(30)} | {"twin": prose(3)}
    corpus = load_corpus(folder_of(tmp_path, **texts))
    assert sum(len(documents) for documents in corpus.splits.values()) == 31
    assert corpus.sources[0].checksum == corpus.checksum
    assert corpus.sources[0].duplicates == 0


def test_a_name_that_two_sources_have_is_told_apart_and_bytes_are_counted_over_both(tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.txt").write_text(prose(9))
    own = folder_of(tmp_path, a=prose(7))
    assert [d.name for d in read_sources(f"{own} + file:{other}").documents] == ["a.txt", "a.txt (2)"]
    limit = len(prose(7)) + 50
    cut = read_sources(f"{own} + file:{other}", limit)
    assert [s.bytes for s in cut.sources] == [len(prose(7)), 50]
    with pytest.raises(LensbenchError, match="100 bytes end before file:"):
        read_sources(f"{own} + file:{other}", 100)


def test_a_text_that_is_read_more_than_four_times_is_said_once():
    lines: list[str] = []
    context = SimpleNamespace(cache=Cache(), progress=SimpleNamespace(say=lines.append))
    warn_of_repeats(context, 4000, 1000)
    assert lines == []
    warn_of_repeats(context, 4100, 1000)
    warn_of_repeats(context, 9000, 1000)
    (line,) = lines
    assert "4,100 training tokens read the 1,000 tokens of the train split 4.1 times" in line


@pytest.mark.run
def test_a_manifest_says_how_often_the_train_split_was_read(tiny_run):
    facts = json.loads((tiny_run / "manifest.json").read_text())
    tokens = facts["suite"]["training"]["tokens"] / facts["corpus"]["tokens"]["train"]
    assert facts["corpus"]["epochs"] == pytest.approx(tokens, abs=5e-4)
