"""States are captured once for all stages of a model, and disk that they lie on is given back."""

import shutil
from collections import namedtuple
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.commands import csv_bytes
from helpers.gpt_windows import windows
from test_capturing import small_stream
from test_run_folder import Recorded

from lensbench.models import build
from lensbench.run import capturing, cluster
from lensbench.run.capturing import KEPT, captured_states, forget_captures
from lensbench.run.context import Context
from lensbench.run.suite import run_suite
from lensbench.runtime.environment import choose_device
from lensbench.runtime.stages import RECORD, Stages
from lensbench.streams.capture import Capture, capture
from lensbench.streams.stream import ResidualStream
from lensbench.suite.files import load_suite

Usage = namedtuple("Usage", "total used free")


def model(name="m"):
    return SimpleNamespace(name=name, digest=f"digest of {name}")


@pytest.fixture
def context(tiny_suite, tmp_path):
    suite = load_suite(str(tiny_suite))
    return Context(suite, Stages(tmp_path / "stages"), choose_device("cpu"), progress=Recorded())


@pytest.fixture
def passes(monkeypatch):
    """The names of nothing: one entry for each pass over samples."""
    made = []

    def counted(*args, **kwargs):
        made.append(1)
        return capture(*args, **kwargs)

    monkeypatch.setattr(capturing, "capture", counted)
    return made


def same(one: Capture, other: Capture) -> None:
    for field in fields(Capture):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype
            assert torch.equal(a, b), field.name
        elif isinstance(a, np.ndarray):
            assert a.dtype == b.dtype
            assert np.array_equal(a, b), field.name


def taken(context, stream, *, samples=None, origin=None, constant=None):
    return captured_states(
        context, stream, samples or windows(), name="c", origin=origin or model(), constant=constant
    )[0]


def test_a_second_stage_reads_the_same_bytes_without_a_pass(context, passes):
    stream = small_stream()
    whole = capture(stream, windows())
    for _ in range(2):
        same(taken(context, stream), whole)
    assert len(passes) == 1


def test_other_samples_models_views_and_constants_are_captured_anew(context, passes):
    stream = small_stream()
    even = torch.full((61,), 1 / 61)
    cases = (
        {},
        {"samples": windows(1)},
        {"origin": model("other")},
        {"constant": even},
        {"constant": even.flip(0) * 2},
    )
    for how in cases:
        taken(context, stream, **how)
    assert len(passes) == len(cases)
    constant = capture(stream, windows(), constant=even).constant_kl
    assert torch.equal(taken(context, stream, constant=even).constant_kl, constant)


def predictive_stream(view):
    shape = {"vocab_size": 61, "d_model": 16, "layers": 2, "heads": 2, "context": 32, "parameters": 20_000}
    return ResidualStream(build("predictive-coding", seed=0, **shape).eval(), view)


@pytest.mark.parametrize("views", [("prediction", "state"), ("state", "prediction")])
def test_one_pass_serves_both_views_of_a_model(context, passes, views):
    for view in views:
        whole = capture(predictive_stream(view), windows())
        same(taken(context, predictive_stream(view), origin=model("pc")), whole)
    assert len(passes) == 1
    assert len(folders_in(context)) == 1


@pytest.mark.parametrize(("name", "only"), [("pc alone", ()), ("pc", ("gpt", "pc"))])
def test_a_model_of_which_one_view_is_computed_keeps_no_more_than_that(context, passes, name, only):
    stream = predictive_stream("prediction")
    same(taken(replace(context, only=only), stream, origin=model(name)), capture(stream, windows()))
    (folder,) = folders_in(context)
    assert np.load(folder / "states.npy", mmap_mode="r").shape[-1] == stream.d_model < stream.whole().d_model


def test_states_stay_while_another_view_of_their_model_has_stages_to_come(tiny_suite, tmp_path, monkeypatch):
    """Else the first view that is finished takes them away, and the other one passes over the windows again."""
    suite, kept_states = load_suite(str(tiny_suite)), []
    for stage in ("learning_curve", "updating", "scoring", "further_stages", "probing"):
        monkeypatch.setattr(cluster, stage, lambda *_: None)
    monkeypatch.setattr(cluster, "forget_own_captures", lambda _: kept_states.append(False))
    (tmp_path / "run.json").write_text("{}")

    def rest_of(name, only=()):
        count = len(kept_states)
        task = cluster.ClusterTask(suite, tmp_path, (name,), 0, "cpu", 1, (), 1.0, None, False, "rest", only)
        assert task.compute() is None
        for made in (f"fit-{name}-seed0", f"score-{name}-seed0", f"update-{name}-seed0", "train-pc-seed0"):
            (tmp_path / "stages" / made).mkdir(parents=True, exist_ok=True)
            (tmp_path / "stages" / made / RECORD).touch()
        return len(kept_states) == count

    assert not rest_of("gpt")
    assert not rest_of("pc", only=("pc",)), "no other view is asked for"
    assert rest_of("pc")
    assert not rest_of("pc+state")


def folders_in(context):
    """The captures that are kept; locks lie beside them."""
    return [path for path in (context.folder / KEPT).iterdir() if path.is_dir()]


@pytest.mark.parametrize("damage", ["states", "predictions", "unfinished"])
def test_a_damaged_or_unfinished_capture_is_made_anew(context, passes, damage):
    stream = small_stream()
    whole = taken(context, stream)
    (folder,) = folders_in(context)
    if damage == "unfinished":
        (folder / "predictions.safetensors").unlink()
    else:
        path = next(folder.glob(f"{damage}.*"))
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.unlink()  # what is mapped stays as it was
        path.write_bytes(content)
    same(taken(context, stream), whole)
    assert len(passes) == 2


def test_changing_states_that_were_read_does_not_change_the_file(context, passes):
    stream = small_stream()
    whole = taken(context, stream).states.clone()
    taken(context, stream).states.zero_()
    assert torch.equal(taken(context, stream).states, whole)


def test_captures_of_another_model_are_removed_when_the_next_ones_are_made(context):
    stream = small_stream()
    kept = [taken(context, stream, samples=windows(k)) for k in (0, 1)]
    whole = kept[0].states.clone()
    assert len(folders_in(context)) == 2
    taken(context, stream, origin=model("next"))
    assert len(folders_in(context)) == 1
    assert torch.equal(kept[0].states, whole)  # a stage that still holds them reads on
    forget_captures(context)
    assert not (context.folder / KEPT).exists()


def test_without_room_each_stage_captures_again_and_says_so_once(context, passes, monkeypatch):
    stream = small_stream()
    size = 4 * 3 * int(windows().valid.sum()) * 16
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10 * size, 8 * size, 2 * size - 1))
    for _ in range(2):
        taken(context, stream)
    assert len(passes) == 2
    assert len(context.progress.lines) == 1
    assert "are not kept, each stage computes them again" in context.progress.lines[0]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10 * size, 8 * size, 2 * size))
    for _ in range(2):
        taken(context, stream)
    assert len(passes) == 3


@pytest.mark.run
def test_a_run_passes_once_over_each_split_and_ends_with_the_same_tables_and_no_states(
    tiny_suite, tiny_run, tmp_path, monkeypatch
):
    seen, alone = [], capturing.captured_states

    def noted(context, stream, samples, **how):
        seen.append((how["origin"].digest, samples.fingerprint))  # of all views
        return alone(context, stream, samples, **how)

    for stage in ("fitting", "updating", "scoring", "probing", "planning"):
        monkeypatch.setattr(f"lensbench.run.{stage}.captured_states", noted)
    monkeypatch.setattr("lensbench.run.suite.draw_side_by_side", lambda *_: [])
    made = []
    monkeypatch.setattr(capturing, "capture", lambda *a, **k: made.append(1) or capture(*a, **k))
    run_suite(load_suite(str(tiny_suite)), tmp_path / "run", device=choose_device("cpu"))
    assert len(made) == len(set(seen)) < len(seen)
    assert csv_bytes(tmp_path / "run") == csv_bytes(tiny_run)
    assert not (tmp_path / "run" / KEPT).exists()
