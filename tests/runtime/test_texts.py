"""Files that a user gives as text: read right, or one line that says what would be right."""

import json
import os
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lensbench.data import reading
from lensbench.data.reading import Document, read_documents
from lensbench.errors import LensbenchError
from lensbench.suite.files import load_suite


def refusal(spec, **options):
    """The one line with which a text is refused."""
    with pytest.raises(LensbenchError) as error:
        read_documents(spec, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


DEEP = b'{"text": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.txt", "hello world".encode("utf-16"), "UTF-16 text: save it as UTF-8"),
        ("x.txt", "hello world".encode("utf-16-be"), "looks like UTF-16"),
        ("x.txt", "hello world".encode("utf-32"), "UTF-32 text: save it as UTF-8"),
        ("x.jsonl", '{"text": "hello"}\n'.encode("utf-32-le"), "looks like UTF-32"),
        ("x.txt", b"\x1f\x8b\x08" + zlib.compress(b"a" * 99), "gzip-compressed: unpack it first"),
        ("x.jsonl", b"PAR1\0\x15\xff", "a Parquet file: give its folder as hf:FOLDER"),
        ("x.txt", b"PK\x03\x04\0\0", "a zip archive"),
        ("x.jsonl", DEEP, "line 1 is nested too deeply"),
        ("x.jsonl", b'{"text": "a", "text": "b"}', "has the field 'text' twice"),
        ("x.jsonl", b'{"text": NaN}', "is a number"),
        (
            "x.jsonl",
            b'{\n "text": "a"\n}',
            "line 1 is not valid JSON (expecting property name enclosed in double quotes",
        ),
        ("x.jsonl", b'[{"text": "a"}]', "a JSON list: expected an object on each line"),
        ("x.json", b'[{"text": "a"}]', "give a .jsonl file"),
        ("x.txt", b'{"text": "a"}\n{"text": "b"}\n', "name it .jsonl"),
    ],
)
def test_a_file_that_is_no_text_is_named_for_what_it_is(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    assert says in refusal(f"file:{tmp_path / name}")


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("x.JSONL", b'{"text": "a"}\n', ["a"]),
        ("x.ndjson", b'{"text": "a"}\r{"text": "b"}\r\n{"text": "c"}', ["a", "b", "c"]),
        ("x.jsonl", '{"text": "one\u2028two\x85"}\n'.encode(), ["one\u2028two\x85"]),
        ("x.jsonl", b'{"n": ' + b"9" * 5000 + b', "text": "a"}', ["a"]),
        ("x.jsonl", b'{"n": Infinity, "n": 2, "text": "a"}', ["a"]),
        ("x.jsonl", '{"text": "a"}\n\ufeff{"text": "b\ufeff"}'.encode(), ["a", "b\ufeff"]),
        ("x.TXT", "one\ufefftwo\rthree".encode(), ["one\ufefftwo\rthree"]),
        ("x.txt", b"GGUF, PAR1 and %PDF- are magic words", ["GGUF, PAR1 and %PDF- are magic words"]),
        ("x.txt", b"PAR1 is how a Parquet file begins", ["PAR1 is how a Parquet file begins"]),
    ],
)
def test_an_odd_file_that_is_text_is_read_as_it_is(tmp_path, name, content, texts):
    (tmp_path / name).write_bytes(content)
    assert [d.text for d in read_documents(f"file:{tmp_path / name}")] == texts


def test_null_texts_are_left_out_and_counted_in_one_line(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": null}\n{"text": "a"}\n{"text": null}\n{"text": "half \\ud83d"}')
    said = []
    found = read_documents(f"file:{tmp_path / 'x.jsonl'}", say=said.append)
    assert [d.text for d in found] == ["a", "half \ufffd"]
    (line,) = said
    assert "2 text(s) that are null, left out" in line
    assert "1 text(s) with half of a surrogate pair" in line
    with pytest.warns(UserWarning, match="2 text"):
        read_documents(f"file:{tmp_path / 'x.jsonl'}")


def test_a_field_within_another_is_named_with_a_dot(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"meta": {"body": "a"}}\n{"meta": null}\n{"meta.body": "b"}\n')
    said = []
    assert [d.text for d in read_documents(f"file:{path}#meta.body", say=said.append)] == ["a", "b"]
    assert "1 text(s) that are null" in said[0]
    assert "no field 'meta.no'" in refusal(f"file:{path}#meta.no")


def test_pipes_devices_links_in_circles_and_lost_files_do_not_hang(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.txt")
    assert "pipe or device" in refusal(f"file:{tmp_path / 'pipe.txt'}")
    assert "pipe or device" in refusal("file:/dev/zero")
    assert "pipe.txt" in refusal(f"file:{tmp_path}")
    (tmp_path / "pipe.txt").unlink()
    (tmp_path / "round").symlink_to(tmp_path)
    (tmp_path / "a.txt").write_text("hello")
    assert read_documents(f"file:{tmp_path}") == [Document("a.txt", "hello")]
    (tmp_path / "b.txt").symlink_to(tmp_path / "nowhere.txt")
    assert "b.txt cannot be read" in refusal(f"file:{tmp_path}")
    (tmp_path / "c.txt").symlink_to("c.txt")
    assert "cannot be read" in refusal(f"file:{tmp_path / 'c.txt'}")
    assert "file:~nobody-here/x" in refusal("file:~nobody-here/x")
    assert "null" in refusal("file:a\0b")

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", denied)
    assert refusal(f"file:{tmp_path / 'a.txt'}") == "a.txt cannot be read: Permission denied"


def test_a_linked_folder_is_read_and_files_of_other_kinds_are_counted(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "a.txt").write_text("hello")
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "there")
    (folder / "b.csv").touch()
    said = []
    assert read_documents(f"file:{folder}", say=said.append) == [Document("link/a.txt", "hello")]
    assert "1 file(s) of other kinds" in said[0]


def test_odd_names_are_printable_on_one_line(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/a\n\xff.txt"))
    path.write_bytes(b"hello")
    (found,) = read_documents(f"file:{tmp_path}")
    assert found.name.isprintable()
    assert found.name.encode()
    path.write_bytes(b"")
    assert "is empty" in refusal(f"file:{path}")


def test_max_bytes_bounds_memory(tmp_path, monkeypatch):
    with (tmp_path / "x.txt").open("wb") as file:
        file.write(b"hello world " * 100)
        file.truncate(1 << 40)  # a terabyte of nothing
    assert read_documents(f"file:{tmp_path / 'x.txt'}", max_bytes=5)[0].text == "hello"
    assert "NUL" in refusal(f"file:{tmp_path / 'x.txt'}")
    (tmp_path / "y.txt").write_text("hello")
    assert read_documents(f"file:{tmp_path / 'y.txt'}", max_bytes=10**30)[0].text == "hello"
    monkeypatch.setattr("lensbench.runtime.texts.LINE_BYTES", 1000)
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"text": "' + "b" * 2000 + '"}\n')
    assert len(read_documents(f"file:{tmp_path / 'x.jsonl'}")) == 2
    assert "line 2 is longer than 1000 bytes" in refusal(f"file:{tmp_path / 'x.jsonl'}", max_bytes=100)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a = " + b"[" * 100_000, "nested too deeply"),
        (b"a = " + b"9" * 5000, "not valid TOML"),
        ("name = 'x'".encode("utf-16"), "save it as UTF-8"),
        ("\ufeffname = 'x'".encode(), "question is missing"),
    ],
)
def test_suites_are_read_as_texts_are(tmp_path, content, says):
    (tmp_path / "suite.toml").write_bytes(content)
    with pytest.raises(LensbenchError, match=says):
        load_suite(str(tmp_path / "suite.toml"))


rows = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "a"]), inner, max_size=2),
    max_leaves=5,
)
encodings = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1"])
suffixes = st.sampled_from([*reading.TEXT_SUFFIXES, ".jsonl", ".JSONL", ".ndjson", ".json", ".csv", "", ".gz"])


@pytest.mark.slow
@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(rows, max_size=5), st.binary(max_size=30), encodings, suffixes, st.sampled_from(["\n", "\r", "\r\n"]))
def test_any_file_of_any_suffix_is_read_or_refused_in_one_line(tmp_path_factory, rows, raw, encoding, suffix, end):
    path = tmp_path_factory.mktemp("any") / f"x{suffix}"
    lines = end.join(json.dumps(row) for row in rows)
    path.write_bytes(lines.encode(encoding) + raw)
    for spec in (f"file:{path}", f"file:{path.parent}"):
        found, line = (), ""
        try:
            found = read_documents(spec, say=lambda _: None)
        except LensbenchError as error:
            line = str(error)
        assert "\n" not in line
        assert bool(line) != bool(found)
        assert all(d.text.encode() and d.name.isprintable() for d in found)
