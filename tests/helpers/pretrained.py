"""Pretrained models in folders as others save them, and suites of them."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from helpers.architectures import small_model
from lensbench.cli import app

SUITE = """
name = "pretrained"
question = "Do models of others go all the way?"

[corpus]
spec = "file:{texts}"

[fit]
sequences = 40
positions = 8
dev_sequences = 16
dev_positions = 8
ridges = [1e-2, 0.1, 1.0]
pads = [0.0, 0.4]
tolerances = [0.1]
rotations = 1
pair_rotations = 1
refits = 1
refine_tokens = 256
refine_passes = 2

[evaluate]
sequences = 60
positions = 8
refit_positions = 4
length = 32
max_share = 0.2
draws = 100
"""


def byte_tokenizer(texts: Path, size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of ``size`` entries, as GPT-2 and GPT-NeoX have one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train([str(p) for p in sorted(texts.glob("*.txt"))], trainer)
    assert tokenizer.get_vocab_size() == size
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def save_model(folder: Path, architecture: str, texts: Path, size: int, **changes) -> Path:
    """A ``save_pretrained`` folder whose model does not predict nearly uniformly, so that errors would show."""
    model = small_model(architecture, vocab_size=size, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    model.save_pretrained(folder)
    byte_tokenizer(texts, size).save_pretrained(folder)
    return folder


def write_suite(path: Path, texts: Path, **models: dict[str, str]) -> Path:
    content = SUITE.format(texts=texts)
    for name, keys in models.items():
        content += f'\n[[models]]\nname = "{name}"\n' + "".join(f'{k} = "{v}"\n' for k, v in keys.items())
    path.write_text(content)
    return path


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])
