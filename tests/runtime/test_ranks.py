"""Processes that share a run agree with one process, read disjoint sequences, and one of them writes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lensbench.errors import LensbenchError
from lensbench.lenses.refine import own_rows
from lensbench.results.folder import read_run
from lensbench.runtime.ranks import ALONE, Ranks

ROOT = Path(__file__).resolve().parents[2]
EXACT = ("models.csv", "transfer.csv", "tolerances.csv", "pairs.csv", "probes.csv", "verdicts.csv", "baselines.csv")


def launched(processes: int, *arguments: object, timeout: float = 250) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command += [str(a) for a in arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)


def with_models_of(reference: Path, folder: Path) -> Path:
    """A run folder that has the models trained already, and nothing else."""
    (folder / "stages").mkdir(parents=True)
    shutil.copy(reference / "run.json", folder)
    for stage in (reference / "stages").iterdir():
        if stage.name.startswith(("train-", "tokenizer")):
            shutil.copytree(stage, folder / "stages" / stage.name)
    return folder


def differences(a: pd.DataFrame, b: pd.DataFrame) -> float:
    """Largest difference of two tables, relative to each number, or to a hundredth (of a nat, say) where it is smaller."""
    assert list(a.columns) == list(b.columns)
    assert len(a) == len(b)
    largest = 0.0
    for column in a:
        if pd.api.types.is_numeric_dtype(a[column]):
            x, y = a[column].to_numpy(float), b[column].to_numpy(float)
            assert (np.isnan(x) == np.isnan(y)).all(), column
            largest = max(largest, float(np.nanmax(np.abs(x - y) / np.maximum(np.abs(x), 1e-2), initial=0)))
        else:
            assert a[column].equals(b[column]), column
    return largest


def agree(folder: Path, reference: Path) -> None:
    ours, theirs = read_run(folder), read_run(reference)
    for name in EXACT:
        assert differences(ours.tables[name], theirs.tables[name]) < 1e-6, name
    # A refinement's steps amplify last digits; what they end with is as good.
    closed = [t.tables["lenses.csv"].query("stage != 'refined'").reset_index(drop=True) for t in (ours, theirs)]
    assert differences(*closed) < 1e-6
    refined = [t.tables["lenses.csv"].query("stage == 'refined'").reset_index(drop=True) for t in (ours, theirs)]
    assert differences(*refined) < 0.05
    maps = [f / "stages" / "fit-gpt-seed0" / "fit.json" for f in (folder, reference)]
    chosen = [{k: v["ridge"] for k, v in json.loads(m.read_text())["records"].items()} for m in maps]
    assert chosen[0] == chosen[1]


@pytest.mark.run
def test_processes_agree_with_one_in_closed_forms_and_matrices(tiny_suite, tiny_run, tmp_path):
    """Of three, one has fewer of the 32 dev sequences than the others."""
    processes = 3
    folder = with_models_of(tiny_run, tmp_path / "run")
    found = launched(processes, "-m", "lensbench", "run", tiny_suite, "--out", folder)
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stdout.count("Tables and figures:") == 1
    assert found.stderr.count("\nfit-gpt-seed0: done") == 1
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["hardware"]["processes"] == processes
    agree(folder, tiny_run)


@pytest.mark.run
def test_processes_train_one_model_together(tiny_suite, tiny_run, tmp_path):
    """A few steps agree to the digits of their sums; more steps amplify these."""
    short = tmp_path / "short.toml"
    text = tiny_suite.read_text().replace("tokens = 8_192", "tokens = 1_536")
    short.write_text(text)
    from typer.testing import CliRunner

    from lensbench.cli import app

    alone = CliRunner().invoke(app, ["run", str(short), "--out", str(tmp_path / "one"), "--only", "gpt"])
    assert alone.exit_code == 0, alone.output
    found = launched(2, "-m", "lensbench", "run", short, "--out", tmp_path / "two", "--only", "gpt")
    assert found.returncode == 0, found.stdout + found.stderr
    assert "train-gpt-seed0: done" in found.stderr
    ce = [read_run(tmp_path / n).tables["models.csv"]["ce"].iloc[0] for n in ("one", "two")]
    assert ce[1] == pytest.approx(ce[0], rel=1e-5)


@pytest.mark.run
def test_what_a_user_can_mend_is_said_once_by_several_processes(tiny_suite, tmp_path):
    foreign = tmp_path / "home"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    found = launched(2, "-m", "lensbench", "run", tiny_suite, "--out", foreign)
    assert found.returncode != 0
    told = [line for line in found.stderr.splitlines() if line.startswith("lensbench: ")]
    assert len(told) == 1
    assert "not empty and not a run folder" in told[0]
    assert [p.name for p in foreign.iterdir()] == ["thesis.tex"]


CHECKED = """
import numpy as np, torch
from lensbench.errors import LensbenchError
from lensbench.runtime.ranks import join_ranks, leave_ranks
ranks = join_ranks()
assert ranks.size == 3
mine = ranks.share(10)
whole = torch.arange(10.0, dtype=torch.float64)[:, None] ** 2
part = whole[mine]
assert ranks.span(len(part)) == (mine.start, 10)
assert torch.equal(ranks.sum(part.sum(0)), whole.sum(0)) and ranks.most(mine.stop) == 10
assert np.array_equal(ranks.joined(part.numpy()), whole.numpy())
assert torch.equal(ranks.rows(part, torch.tensor([9, 0, 4, 4])), whole[[9, 0, 4, 4]])
assert ranks.told(f"of {ranks.rank}") == "of 0"
assert ranks.agreed(lambda: ranks.rank) == 0
try:
    ranks.agreed(lambda: (_ for _ in ()).throw(LensbenchError("no")))
except LensbenchError as error:
    assert str(error) == "no"
else:
    raise AssertionError
ranks.wait()
leave_ranks(ranks)
"""


@pytest.mark.run
def test_sums_copies_and_refusals_are_the_same_on_all(tmp_path):
    (tmp_path / "checked.py").write_text(CHECKED)
    found = launched(3, tmp_path / "checked.py")
    assert found.returncode == 0, found.stderr


@given(st.integers(1, 9), st.integers(0, 50))
def test_shares_are_disjoint_contiguous_and_nearly_equal(size, more):
    count = size + more
    shares = [Ranks(rank, size).share(count) for rank in range(size)]
    assert [k for s in shares for k in range(s.start, s.stop)] == list(range(count))
    lengths = [s.stop - s.start for s in shares]
    assert min(lengths) >= 1
    assert max(lengths) - min(lengths) <= 1
    if size > 1:
        with pytest.raises(LensbenchError, match=f"{size} processes for {size - 1} sequences"):
            Ranks(0, size).share(size - 1)


def test_alone_nothing_is_exchanged():
    values = torch.ones(3)
    assert ALONE.sum(values) is values
    assert ALONE.told("x") == "x"
    assert ALONE.span(4) == (0, 4)
    assert ALONE.share(7) == slice(0, 7)


@given(st.integers(1, 4), st.integers(1, 12), st.integers(1, 30), st.randoms(use_true_random=False))
def test_the_processes_rows_of_a_batch_are_all_of_it_once(lenses, batch, count, chance):
    rows = torch.tensor([[chance.randrange(count) for _ in range(batch)] for _ in range(lenses)])
    layers = rows * 7 % 5
    cut = chance.randint(0, count)
    found = []
    for before, size in ((0, cut), (cut, count - cut)):
        if size:
            own, layer, weight = own_rows(rows, layers, before, size)
            assert own.min() >= 0
            assert own.max() < size
            kept = weight[..., 0] > 0
            assert torch.equal(layer[kept], (own[kept] + before) * 7 % 5)
            found.append([sorted((own[m][kept[m]] + before).tolist()) for m in range(lenses)])
    together = [sorted(row for part in found for row in part[m]) for m in range(lenses)]
    assert together == [sorted(row) for row in rows.tolist()]
