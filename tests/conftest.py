"""A tiny suite on a generated text, run once for all tests that read a run folder."""

import contextlib
import random
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

SUITE = """
name = "tiny"
question = "Does the whole path work?"

[corpus]
spec = "file:{texts}"
vocab_size = 300

[training]
tokens = 8_192
length = 64
batch = 8
checkpoint_every = 4

[fit]
sequences = 48
positions = 16
dev_sequences = 32
dev_positions = 8
ridges = [1e-3, 1e-2, 0.1, 1.0]
pads = [0.0, 0.2, 0.4, 0.6]
rotations = 2
refits = 2
refine_tokens = 512
refine_passes = 8

[evaluate]
sequences = 96
positions = 8
draws = 200

[[models]]
name = "gpt"
family = "gpt"
d_model = 16
layers = 3
heads = 2
parameters = 20_000

[[models]]
name = "pc"
family = "predictive-coding"
d_model = 16
layers = 3
heads = 2
parameters = 20_000
view = "prediction"

[[models]]
name = "pc+state"
view_of = "pc"
"""


def write_texts(folder: Path, *, seed: int = 0, documents: int = 300) -> Path:
    """Documents of a few hundred words with a skewed vocabulary: enough for a small tokenizer and 64 eval documents."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 7))) for _ in range(200)]
    weights = [1 / (rank + 1) for rank in range(len(words))]
    for number in range(documents):
        text = " ".join(rng.choices(words, weights, k=150))
        (folder / f"{number:03d}.txt").write_text(text)
    return folder


def write_suite(folder: Path, **replacements: str) -> Path:
    """The tiny suite and its texts in ``folder``; ``replacements`` are put in place of what they name."""
    content = SUITE.format(texts=write_texts(folder / "texts"))
    for old, new in replacements.items():
        assert old in content
        content = content.replace(old, new)
    path = folder / "tiny.toml"
    path.write_text(content)
    return path


@pytest.fixture(scope="session", autouse=True)
def _one_thread_for_all():
    """Before fixtures of a session too: their runs are compared to the byte with runs of one thread."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_thread():
    """Commands that a test calls set threads of their own, and the same process runs other tests behind it."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_suite(tmp_path_factory) -> Path:
    return write_suite(tmp_path_factory.mktemp("suite"))


@pytest.fixture(scope="session")
def tiny_run(tiny_suite, tmp_path_factory) -> Path:
    """A finished run folder. Tests must not change it: copy it first."""
    from typer.testing import CliRunner

    from lensbench.cli import app

    folder = tmp_path_factory.mktemp("run") / "tiny"
    result = CliRunner().invoke(app, ["run", str(tiny_suite), "--out", str(folder)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return folder


STANDARD = [Path("results") / "standard" / part for part in ("gpt", "pc", "controls")]


@pytest.fixture(scope="session")
def predictive_comparison():
    """The committed parts of the suite ``predictive-coding``, compared as the command does from the repository's root."""
    from lensbench.compare import compare_runs

    with contextlib.chdir(Path(__file__).resolve().parents[1]):
        return compare_runs([Path("results/predictive-coding") / name for name in ("gpt", "pc")])


@pytest.fixture(scope="session")
def standard_comparison():
    """The committed parts of the suite ``standard``, compared as the command does from the root of the repository."""
    from lensbench.compare import compare_runs

    with contextlib.chdir(Path(__file__).resolve().parents[1]):
        return compare_runs(STANDARD)
