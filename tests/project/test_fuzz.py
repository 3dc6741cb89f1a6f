"""Whatever a file holds: a clear refusal or a right reading, never a traceback, nothing written outside the run folder."""

import json
import random
import shutil
import string
import tomllib
from pathlib import Path

import pytest
from helpers.suites import SUITE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lensbench.data import corpus, reading, tokens, windows
from lensbench.errors import LensbenchError
from lensbench.report.compare import compare_runs
from lensbench.results import schema as results
from lensbench.results.folder import read_run
from lensbench.results.manifest import seal, write_manifest
from lensbench.suite.files import (
    load_calibration,
    load_in_context,
    load_regression,
    load_suite,
    load_sweep,
)
from lensbench.suite.recipes import Suite
from lensbench.suite.shipped import named_files

LOADERS = (load_suite, load_sweep, load_calibration, load_in_context, load_regression)
settings.register_profile("fuzz", deadline=None, suppress_health_check=list(HealthCheck))
settings.load_profile("fuzz")

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12),
    st.sampled_from(["", "..", "../x", "/etc/x", "a/b"]),
    st.integers(-(2**70), 2**70), st.just("\udc80"), st.just("x" * 5000),
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=6,
)


def toml(value) -> str:
    """A value as TOML, for what TOML can say."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value).replace("inf", "inf")
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list):
        return "[" + ", ".join(toml(v) for v in value if v is not None) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {toml(v)}" for k, v in value.items() if v is not None) + "}"
    return '""'


def document(content: dict) -> str:
    return "\n".join(f"{json.dumps(k)} = {toml(v)}" for k, v in content.items())


def places(content, path=()):
    """Every place of a nested document."""
    yield path
    inside = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in inside:
        yield from places(value, (*path, key))


def put(content, path, value):
    if not path:
        return value
    copy = dict(content) if isinstance(content, dict) else list(content)
    copy[path[0]] = put(content[path[0]], path[1:], value)
    return copy


def or_refused(call, *arguments, **options):
    """What a call returns; None where it refuses, which it has to do with a message."""
    refusal = ""
    try:
        return call(*arguments, **options)
    except LensbenchError as error:
        refusal = str(error)
    assert refusal
    return None


def read(path: Path):
    """What each loader that does not refuse a file makes of it."""
    found = (or_refused(load, str(path)) for load in LOADERS)
    return [suite for suite in found if suite is not None]


VALID = {
    name: tomllib.loads(path.read_text())
    for name in named_files()
    for path in [Path(__file__).resolve().parents[2] / "benchmarks" / f"{name}.toml"]
} | {"tiny": tomllib.loads(SUITE.format(texts="texts"))}


@settings(max_examples=400)
@given(st.sampled_from(sorted(VALID)), st.data())
@pytest.mark.slow
def test_a_suite_with_anything_in_any_place_is_read_or_refused(tmp_path_factory, name, data):
    content = VALID[name]
    where = data.draw(st.sampled_from(sorted(places(content), key=str)))
    new = data.draw(values)
    changed = put(content, where, new) if where else content | {data.draw(st.text(max_size=5)): new}
    if not isinstance(changed, dict):
        return
    path = tmp_path_factory.mktemp("fuzz") / "suite.toml"
    path.write_bytes(document(changed).encode("utf-8", "surrogatepass"))
    for found in read(path):
        if isinstance(found, Suite):
            for named in (found.name, *(m.name for m in found.models), *found.probes):
                assert Path(named).name == named, "a name that leads elsewhere"
                assert named not in ("", ".", ".."), "a name that leads elsewhere"


@settings(max_examples=200)
@given(st.one_of(st.binary(max_size=200), st.text(string.printable, max_size=200).map(str.encode)))
def test_a_suite_of_any_bytes_is_refused(tmp_path_factory, raw):
    path = tmp_path_factory.mktemp("fuzz") / "suite.toml"
    path.write_bytes(raw)
    assert read(path) == []


# Corpora

SURROGATES = b"\xed\xa0\x80", b'"\\ud800"'
ODD = [*SURROGATES, b"\xff\xfe", b"\0", b"\xef\xbb\xbf", b"\r", b"\x0b\x0c\x1c\x85", "\u2028\u202e\U000e0001".encode()]
words = st.text(max_size=40).map(lambda t: t.encode("utf-8", "replace"))
pieces = st.one_of(st.binary(max_size=40), st.sampled_from(ODD), words)


@settings(max_examples=300)
@given(st.lists(pieces, max_size=12), st.sampled_from([".txt", ".jsonl", ".py"]), st.integers(1, 3000))
def test_a_text_of_any_bytes_is_split_or_refused(tmp_path_factory, parts, suffix, times):
    path = tmp_path_factory.mktemp("corpus") / f"text{suffix}"
    path.write_bytes(b" ".join(parts) * times)
    found = or_refused(corpus.load_corpus, f"file:{path}", max_bytes=200_000)
    if found is None:
        return
    for split in corpus.SPLITS:
        for text in found.splits[split]:
            assert "\0" not in text.text
            assert text.text.encode()


json_rows = st.one_of(values, st.dictionaries(st.sampled_from(["text", "body"]), values, max_size=2))


@settings(max_examples=200)
@given(st.lists(json_rows, max_size=30))
def test_json_lines_of_anything_are_read_or_refused(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("corpus") / "rows.jsonl"
    path.write_bytes(b"\n".join(json.dumps(r).encode() for r in rows))
    texts = or_refused(reading.read_documents, f"file:{path}") or ()
    assert all(t.text.encode() for t in texts)


def test_an_enormous_line_and_lone_surrogates_go_through_tokenizer_and_windows(tmp_path):
    path = tmp_path / "line.txt"
    path.write_text("".join(random.Random(0).choices("abcdefgh", k=1_000_000)))
    found = corpus.load_corpus(f"file:{path}")
    tokenizer = tokens.train_tokenizer(found, 300)
    (tmp_path / "rows.jsonl").write_text(
        "\n".join(json.dumps({"text": f"half \ud83d of {k} " * 400}) for k in range(40))
    )
    halves = corpus.load_corpus(f"file:{tmp_path / 'rows.jsonl'}")
    for texts in (found, halves):
        documents = tokens.tokenize(tokenizer, texts.splits["eval"])
        sampled = windows.sample_windows(documents, n_sequences=4, length=64, positions=4, seed=0)
        assert len(sampled)
        assert sampled.valid.any()


# Tables and manifests


@pytest.fixture(scope="module")
def tables(tiny_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables") / "run"
    shutil.copytree(tiny_run, folder, ignore=shutil.ignore_patterns("stages", "figures", ".lock"))
    return folder


@settings(max_examples=60)
@given(st.sampled_from(sorted(results.WRITTEN)), st.data())
def test_a_changed_table_is_refused_and_one_without_a_manifest_is_read_or_refused(tables, name, data):
    path = tables / name
    whole = path.read_bytes()
    at, removed = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 60))
    changed = whole[:at] + data.draw(st.binary(max_size=30)) + whole[at + removed :]
    manifest = (tables / "manifest.json").read_bytes()
    try:
        path.write_bytes(changed)
        if changed != whole:
            with pytest.raises(LensbenchError, match=name):
                read_run(tables)
        (tables / "manifest.json").unlink()
        or_refused(read_run, tables, need_manifest=False)
    finally:
        path.write_bytes(whole)
        (tables / "manifest.json").write_bytes(manifest)


@settings(max_examples=80)
@given(st.data())
@pytest.mark.slow
def test_a_manifest_with_anything_in_any_place_is_refused(tables, data):
    path = tables / "manifest.json"
    whole = path.read_bytes()
    content = json.loads(whole)
    where = data.draw(st.sampled_from(sorted(places(content), key=str)))
    changed = put(content, where, data.draw(values))
    sealed = data.draw(st.booleans()) and isinstance(changed, dict)
    try:
        if sealed:  # by someone who means it
            try:
                changed["checksum"] = seal(changed)
            except ValueError:  # NaN is no JSON
                return
        path.write_bytes(json.dumps(changed).encode("utf-8", "surrogatepass"))
        found = or_refused(read_run, tables)
        if found is None:
            return
        if or_refused(compare_runs, [tables]) is None:
            assert sealed
        else:
            assert sealed or found.manifest.content() == content or changed == content
            assert all(Path(n).name == n for n in found.manifest.files)
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("names", [["../outside.csv"], ["/etc/hostname"], ["stages/x"]])
def test_a_manifest_that_names_files_elsewhere_is_refused(tables, tmp_path, names):
    folder = tmp_path / "run"
    shutil.copytree(tables, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = dict.fromkeys(names, "0" * 64)
    write_manifest(folder, manifest)
    with pytest.raises(LensbenchError, match="no file of this folder"):
        read_run(folder)


def test_a_suite_cannot_name_a_model_that_leads_out_of_its_folder(tmp_path):
    for name in ("../x", "a/b", "/tmp/x", "..", ".", "a\\\\b/../c", ""):
        path = tmp_path / "suite.toml"
        path.write_text(SUITE.format(texts="texts").replace('name = "gpt"', f'name = "{name}"', 1))
        with pytest.raises(LensbenchError, match="name"):
            load_suite(str(path))
        path.write_text(SUITE.format(texts="texts").replace('name = "tiny"', f'name = "{name}"', 1))
        with pytest.raises(LensbenchError, match="name"):
            load_suite(str(path))
