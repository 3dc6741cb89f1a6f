"""Nothing is lost and nothing wrong is believed: kills, full and read-only disks, damaged files, memory that runs out."""

import contextlib
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.commands import refused, run
from helpers.disks import disk
from helpers.gpt_windows import windows
from helpers.suites import without_figures, write_suite
from helpers.training import CPU, STREAM, model_of, recipe
from hypothesis import given, settings
from hypothesis import strategies as st

from lensbench.errors import LensbenchError
from lensbench.lenses import read
from lensbench.lenses.maps import AffineMaps
from lensbench.measures.transfer import transfer_sums
from lensbench.models import training
from lensbench.results import schema as results
from lensbench.results.folder import SUMS, read_run
from lensbench.runtime import memory
from lensbench.runtime.memory import in_pieces
from lensbench.runtime.sealed import Damaged, load_sealed, save_sealed
from lensbench.streams import kl
from lensbench.streams.capture import capture
from lensbench.streams.stream import ResidualStream

ROOT = Path(__file__).resolve().parents[2]
TABLES = list(results.WRITTEN)


def same_tables(folder: Path, reference: Path) -> bool:
    names = [*TABLES, SUMS]
    return all((folder / n).read_bytes() == (reference / n).read_bytes() for n in names)


# Kills


def killed(suite: Path, out: Path, kills: int) -> pd.DataFrame:
    command = [sys.executable, "-m", "benchmarks.speed.survival", suite, "--kills", str(kills), "--out", out]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert found.returncode == 0, found.stdout + found.stderr
    return pd.read_csv(out / "kills.csv")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_twelve_kills_change_no_byte_of_a_result(tmp_path):
    """Of a run as short as one with every stage can be: there are the same places to be killed at."""
    short = {"tokens = 8_192": "tokens = 2_048", "refine_passes = 8": "refine_passes = 1", "draws = 200": "draws = 100"}
    table = killed(write_suite(tmp_path / "suite", **short), tmp_path, 12)
    assert len(table) == 12
    assert set(table["how"]) == {"after seconds", "before change", "after change"}
    assert len(table[["stages_finished", "interrupted"]].drop_duplicates()) > 4, "kills at many places of a run"


def test_a_folder_that_holds_no_more_than_a_lock_is_a_new_one(tiny_suite, tmp_path):
    from lensbench.results.folder import lock_run_folder

    for left in (".lock", "run.json.partial"):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / left).write_text("")
    lock_run_folder(tmp_path / "run", "tiny").release()


# Disks


@pytest.mark.run
@pytest.mark.skipif(shutil.which("mount") is None, reason="no mount here")
def test_a_full_disk_stops_a_run_in_one_line_and_more_room_finishes_it(tiny_suite, tiny_run, tmp_path):
    with disk(tmp_path / "small", "300k") as change:
        out = tmp_path / "small" / "run"
        stops = 0
        for size in ("300k", "600k", "1m", "2m", "4m"):
            change(f"size={size}")
            result = run("run", tiny_suite, "--out", out)
            if result.exit_code == 0:
                break
            refused(result, "the disk is full")
            stops += 1
        else:
            change("size=200m")
            assert run("run", tiny_suite, "--out", out).exit_code == 0
        assert stops > 2
        assert same_tables(out, tiny_run)


@pytest.mark.run
@pytest.mark.skipif(shutil.which("mount") is None, reason="no mount here")
def test_a_read_only_folder_is_told_in_one_line(tiny_suite, tiny_run, tmp_path):
    with disk(tmp_path / "disk", "50m") as change:
        shutil.copytree(tiny_run, tmp_path / "disk" / "run")
        change("ro")
        refused(run("run", tiny_suite, "--out", tmp_path / "disk" / "run"), "disk")
        refused(run("run", tiny_suite, "--out", tmp_path / "disk" / "new"), "read-only")
        assert same_tables(tmp_path / "disk" / "run", tiny_run)


# Damaged files


def damage(path: Path, chance: random.Random) -> None:
    """Truncate a file or flip one of its bits."""
    raw = bytearray(path.read_bytes())
    if chance.random() < 0.3:
        raw = raw[: chance.randrange(len(raw))]
    else:
        raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
    path.write_bytes(raw)


def reading_error(folder: Path) -> LensbenchError | None:
    """Why a run folder is refused; None where it is read."""
    try:
        read_run(folder)
    except LensbenchError as error:
        return error
    return None


def damaged_copy(reference: Path, path: Path, folder: Path, chance: random.Random) -> Path:
    """A copy of a run folder with one damaged file: no reading believes it."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(reference, folder)
    damage(folder / path, chance)
    refused_reading = reading_error(folder)
    if refused_reading is not None:
        assert path.suffix in (".csv", ".parquet", ".json"), refused_reading
    else:
        assert path.parts[0] in ("stages", "figures") or path.name in (".lock", "run.json", "report.html"), (
            f"{path} was believed"
        )
    return folder


def run_again(suite: Path, reference: Path, path: Path, folder: Path) -> str:
    """What a run makes of a folder with one damaged file: refused by name, or as before."""
    with contextlib.nullcontext() if path.suffix == ".png" else without_figures():
        result = run("run", suite, "--out", folder)
    if result.exit_code == 0:
        assert same_tables(folder, reference), path
        return "as before"
    # Of a stage its folder is named, which is what a user is to delete; its record may name a file that never was.
    refused(result, path.parts[1] if path.parts[0] == "stages" else "")
    return "refused"


def files_of(folder: Path) -> list[Path]:
    return sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file() and p.stat().st_size)


def kind_of(path: Path) -> str:
    """What files of a run that are read and written by the same lines have in common."""
    if path.parts[0] == "stages":
        return re.sub(r"-(gpt|pc|pc\+state)-seed", "-", str(path))
    return path.suffix if path.suffix in (".csv", ".png") else path.name


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_file_of_a_run_is_refused_by_name_or_does_no_harm_when_it_is_damaged(tiny_suite, tiny_run, tmp_path):
    """Every file is read; the run goes on with one of each kind: a table, a figure, a file of a stage of some model."""
    chance, files = random.Random(1), files_of(tiny_run)
    kinds = {kind_of(path): path for path in chance.sample(files, len(files))}
    assert len(kinds) > 30
    outcomes = set()
    for path in files:
        folder = damaged_copy(tiny_run, path, tmp_path / "run", chance)
        if path in kinds.values():
            outcomes.add(run_again(tiny_suite, tiny_run, path, folder))
    assert outcomes == {"as before", "refused"}


CONTENT = {
    "a": torch.arange(6.0).view(2, 3),
    "b": torch.tensor([1, -2]),
    "c": torch.zeros(0, 2),
    "d": torch.tensor(True),
}


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_changed_byte_of_a_sealed_file_is_believed(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("sealed") / "x.safetensors"
    save_sealed(CONTENT, path, {"step": "7"})
    raw = bytearray(path.read_bytes())
    at, value = data.draw(st.integers(0, len(raw) - 1)), data.draw(st.integers(0, 255))
    raw[at] = value
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(raw))))
    path.write_bytes(raw[:cut])
    try:
        tensors, facts = load_sealed(path)
    except Damaged:
        return
    assert facts == {"step": "7"}
    assert set(tensors) == set(CONTENT)
    assert all(torch.equal(tensors[k], v) and tensors[k].dtype == v.dtype for k, v in CONTENT.items())


def test_a_checkpoint_with_one_flipped_bit_is_refused(tmp_path):
    save_sealed({"model.w": torch.ones(4)}, tmp_path / "checkpoint.safetensors", {"step": "3"})
    raw = bytearray((tmp_path / "checkpoint.safetensors").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "checkpoint.safetensors").write_bytes(raw)
    model = model_of()
    with pytest.raises(LensbenchError, match=r"checkpoint\.safetensors is damaged.*checksum"):
        training.load_checkpoint(tmp_path, model, [])


# Memory


def test_work_that_runs_out_of_memory_is_done_in_halves_and_in_order():
    tried = []

    def work(rows):
        tried.append(rows.stop - rows.start)
        if rows.stop - rows.start > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return list(range(rows.start, rows.stop))

    assert [row for piece in in_pieces(slice(5, 30), 16, work) for row in piece] == list(range(5, 30))
    assert tried[:3] == [16, 8, 4]
    assert max(tried[3:]) <= 4

    def never(rows):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory")

    with pytest.raises(LensbenchError, match="out of memory at a token, one at a time"):
        in_pieces(slice(0, 8), 8, never, what="a token")
    with pytest.raises(RuntimeError, match="shape"):
        in_pieces(slice(0, 8), 8, lambda rows: (_ for _ in ()).throw(RuntimeError("shape mismatch")))


def test_torch_tells_a_cpu_out_of_memory_as_it_is_known_here():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert memory.is_out_of_memory(caught.value)


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_a_training_step_in_halves_is_the_same_step(weight, monkeypatch, tmp_path):
    setup = recipe(batch=8, deep_supervision=weight)
    whole = training.train(model_of(), STREAM, setup, seed=0, checkpoints=tmp_path / "a", device=CPU)
    plain, sizes = training.loss_of, []

    def scarce(model, batch, *rest):
        sizes.append(len(batch))
        if len(batch) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(model, batch, *rest)

    monkeypatch.setattr(training, "loss_of", scarce)
    halved = training.train(model_of(), STREAM, setup, seed=0, checkpoints=tmp_path / "b", device=CPU)
    assert sizes[:4] == [8, 4, 2, 2], "what does not fit is not tried again"
    assert set(sizes[4:]) == {2}, "what does not fit is not tried again"
    scale = max(float(p.detach().abs().max()) for p in whole.parameters())
    for a, b in zip(whole.parameters(), halved.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * scale)  # ten steps, each orthogonalised
    gradients = []
    for limit in (8, 3):
        model = model_of()
        monkeypatch.setattr(training, "loss_of", plain if limit == 8 else scarce)
        batch = training.batch_of(STREAM, setup, 0, 0)
        loss, _, _ = training.backward(model, batch, None, setup, 8, 8)
        gradients.append((loss, torch.cat([p.grad.flatten() for p in model.parameters()])))
    assert float(gradients[0][0]) == pytest.approx(float(gradients[1][0]), rel=1e-6)
    assert float((gradients[0][1] - gradients[1][1]).norm() / gradients[0][1].norm()) < 1e-6


def test_captures_and_matrices_in_halves_are_the_same(monkeypatch):
    model = model_of(vocab_size=61, context=32, parameters=20_000).eval()
    stream, samples = ResidualStream(model), windows(count=9)
    whole = capture(stream, samples)
    maps = AffineMaps(torch.eye(stream.d_model).repeat(stream.layers, 1, 1), torch.zeros(stream.layers, stream.d_model))
    matrix = transfer_sums(stream.readout, whole, maps)
    plain_at, plain_partition = ResidualStream.at, kl.partition_and_largest

    def scarce_at(self, inputs, *rest, **options):
        if len(inputs) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain_at(self, inputs, *rest, **options)

    def scarce_partition(readout, n, **options):
        if len(n) > 7:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain_partition(readout, n, **options)

    monkeypatch.setattr(ResidualStream, "at", scarce_at)
    monkeypatch.setattr(read, "partition_and_largest", scarce_partition)
    halved = capture(stream, samples)
    for name in ("states", "expected", "entropy_term", "model_ce", "mean_p", "constant_kl", "targets"):
        torch.testing.assert_close(getattr(halved, name), getattr(whole, name), rtol=1e-5, atol=1e-6)
    assert (halved.window == whole.window).all()
    assert (halved.document == whole.document).all()
    again = transfer_sums(stream.readout, halved, maps)
    for name in ("kl", "ce", "movement", "top1"):
        np.testing.assert_allclose(getattr(again, name), getattr(matrix, name), rtol=1e-5, atol=1e-5)


# Losses that are no number


@pytest.mark.parametrize("layer", [0, 1])
def test_a_loss_that_is_not_finite_is_told_with_its_step_its_layer_and_the_likely_cause(layer, tmp_path, monkeypatch):
    model = model_of()
    block = model.model.layers[layer]

    def overflow(_, __, output):
        return (output[0] + torch.inf, *output[1:]) if isinstance(output, tuple) else output + torch.inf

    setup = recipe(checkpoint_every=2)
    steps = []

    def report(at):
        steps.append(at.step)
        if at.step == 5:
            block.register_forward_hook(overflow)

    match = rf"at step 6 of 10.*the state after layer {layer + 1} overflowed.*learning_rate.*last good checkpoint kept"
    with pytest.raises(LensbenchError, match=match):
        training.train(model, STREAM, setup, seed=0, checkpoints=tmp_path, device=CPU, report=report)
    assert load_sealed(tmp_path / "checkpoint.safetensors")[1] == {"step": "4"}


def test_weights_and_gradients_that_are_not_finite_are_named(tmp_path):
    model = model_of()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(
        LensbenchError, match=r"step 1 of .*the weights model.layers.1.mlp.up_proj.weight are not finite"
    ):
        training.train(model, STREAM, recipe(), seed=0, checkpoints=tmp_path, device=CPU)
    model = model_of()
    model.model.layers[1].mlp.up_proj.weight.register_hook(lambda g: g * torch.inf)
    with pytest.raises(LensbenchError, match=r"the gradient of model.layers.1.mlp.up_proj.weight is not finite"):
        training.train(model, STREAM, recipe(), seed=0, checkpoints=tmp_path, device=CPU)
