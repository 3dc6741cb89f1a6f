"""A tiny suite on a generated text."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

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


@contextmanager
def without_figures() -> Iterator[None]:
    """Runs in it draw nothing, which takes a third of a small run's time: their tests are about something else."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("lensbench.run.suite.draw_side_by_side", lambda *_: [])
        yield


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
