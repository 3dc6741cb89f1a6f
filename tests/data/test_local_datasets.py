"""Folders of datasets, through the real library: read right, or one line that says what would be right."""

from functools import partial

import pyarrow as pa
import pytest
from pyarrow import parquet

from lensbench.data.reading import read_documents
from lensbench.errors import LensbenchError


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def _write_parquet(folder, name="a.parquet", **columns):
    parquet.write_table(pa.table(columns), folder / name)


def _write_two(folder, **second):
    _write_parquet(folder, text=["a"])
    _write_parquet(folder, "b.parquet", **second)


def _write_json(second, folder):
    (folder / "a.jsonl").write_bytes(b'{"text": "a"}\n')
    (folder / "b.jsonl").write_bytes(second)


def _write_text(name, content):
    return lambda folder: (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("write", "field", "texts", "says"),
    [
        (partial(_write_parquet, text=pa.array(["a", None], pa.large_string())), "", ["a"], "1 text(s) that are null"),
        (partial(_write_parquet, text=pa.array(["a", "b", None]).dictionary_encode()), "", ["a", "b"], "1 text(s) that"),
        (partial(_write_parquet, meta=[{"body": "a"}, None, {"body": None}]), "#meta.body", ["a"], "2 text(s) that are"),
        (partial(_write_parquet, **{"my text": ["a"], "text": ["b"]}), "#my text", ["a"], ""),
        (_write_text("a.csv", b'text,n\na,1\n"b, c",2\n,3\n'), "", ["a", "b, c"], "1 text(s) that are null"),
        (_write_text("a.json", b'[{"text": "a"}, {"text": null}]'), "", ["a"], "1 text(s) that are null"),
        (partial(_write_json, b'{"text": "b"}\n{"text": null}'), "", ["a", "b"], "1 text(s) that are null"),
        (lambda f: (_write_parquet(f, text=["a"]), (f / "b.jsonl").write_text("{}")), "", ["a"], "1 file(s) of other kinds"),
    ],
)  # fmt: skip
def test_local_datasets_are_read_right_and_say_what_is_left_out(tmp_path, write, field, texts, says):
    write(tmp_path)
    said = []
    assert [d.text for d in read_documents(f"hf:{tmp_path}{field}", say=said.append)] == texts
    assert says in "".join(said)
    assert len(said) == bool(says)


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (partial(_write_parquet, text=[b"a", b"\xff"]), "field 'text' is bytes, and must be a string"),
        (partial(_write_parquet, text=[["a"]]), "field 'text' is a list"),
        (partial(_write_parquet, text=[{"a": "b"}]), "field 'text' is an object"),
        (partial(_write_parquet, text=[1]), "field 'text' of a.parquet is of type int64"),
        (partial(_write_two, text=[1]), "field 'text' of b.parquet is of type int64"),
        (partial(_write_two, body=["b"]), "its files have different columns"),
        (partial(_write_parquet, text=pa.array([], pa.string())), "has no rows"),
        (_write_text("a.csv", b"text,text\na,b\n"), "a.csv has the column 'text' twice: rename one of them"),
        (_write_text("a.tsv", b"n\ttext\ttext\n1\ta\tb\n"), "a.tsv has the column 'text' twice"),
        (partial(_write_json, b'{"text": 1}'), "b.jsonl row 0: field 'text' is a number, and must be a string"),
        (partial(_write_json, b'{"text": "b"}\n{"text": 1}'), "b.jsonl row 1: field 'text' is a number"),
        (partial(_write_json, b'{"text": {"a": "b"}}'), "b.jsonl row 0: field 'text' is an object"),
        (_write_text("a.json", b'[{"text": "a"},\n {"text": true}]'), "a.json row 1: field 'text' is a boolean"),
        (partial(_write_parquet, body=["a"], content=["b"]), "no field 'text': it has 'body', 'content'"),
        (lambda folder: parquet.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), folder / "a.parquet"),
         "stands twice"),
        (_write_text("a.parquet", b"PAR1\0\0\0"), "Parquet file size is 7 bytes"),
        (_write_text("a.csv", b"text\ncaf\xe9\n"), "is not UTF-8: save it as UTF-8"),
        (_write_text("a.jsonl", b'{"text": "a"}\n{"text": 1}\n'), "row 1: field 'text' is a number"),
    ],
)  # fmt: skip
def test_local_datasets_that_hold_no_texts_are_refused_in_one_line(tmp_path, capfd, write, says):
    write(tmp_path)
    with pytest.raises(LensbenchError) as error:
        read_documents(f"hf:{tmp_path}")
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert "Failed to read" not in "".join(capfd.readouterr())
