"""Models as a caller has them: between two steps of a training, with hooks and an attention of its own."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from helpers.architectures import small_model
from helpers.planted import V, planted, words
from lensbench.models import build

SHAPE = {"vocab_size": V, "d_model": 32, "layers": 3, "heads": 4, "context": 64, "parameters": 60_000}


def blocks_of(model: Any) -> nn.ModuleList:
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList))


def in_training(model: Any) -> Any:
    """In training mode but for one block, with some weights frozen, and gradients that no step has used."""
    with (
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
    ):  # transformers leaves hooks of its own at the first such call
        ids = torch.ones(1, 4, dtype=torch.long)
        for asked in ("output_hidden_states", "output_attentions"):
            model(input_ids=ids, **{asked: True})
    model.train()
    blocks_of(model)[0].eval()
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 != 1)
    model.get_output_embeddings().weight.requires_grad_(True)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5) if parameter.requires_grad else None
    return model


def hooked(model: Any) -> Any:
    """With a hook of each kind that changes nothing."""
    blocks = blocks_of(model)
    blocks[1].register_forward_hook(lambda *_: None)
    blocks[1].register_forward_hook(lambda *_: None, with_kwargs=True, always_call=True)
    blocks[2].register_forward_pre_hook(lambda *_: None, with_kwargs=True)
    model.register_forward_hook(lambda *_: None)
    model.get_output_embeddings().register_forward_pre_hook(lambda *_: None)
    model.get_output_embeddings().register_forward_hook(lambda *_: None)
    blocks[1].register_full_backward_hook(lambda *_: None)
    next(p for p in model.parameters() if p.requires_grad).register_hook(lambda _: None)
    return model


def llama() -> Any:
    return in_training(planted("none"))


def gemma() -> Any:
    settings = {"attn_implementation": "sdpa", "tie_word_embeddings": True}
    return in_training(small_model("gemma3_text", vocab_size=V, **settings))


def gpt2() -> Any:
    """With dropout of a tenth, eager attention, and hooks of the caller."""
    return hooked(in_training(small_model("gpt2", vocab_size=V, attn_implementation="eager")))


def predictive_coding() -> Any:
    return in_training(build("predictive-coding", seed=1, **SHAPE))


def own_attention() -> Any:
    """With an attention that the caller registered, cache flags that are no default, and hooks."""
    AttentionInterface.register("of_the_caller", sdpa_attention_forward)
    AttentionMaskInterface.register("of_the_caller", sdpa_mask)
    model = small_model("qwen3", vocab_size=V, attn_implementation="of_the_caller", attention_dropout=0.2)
    model.config.use_cache = False
    model.generation_config.use_cache = False
    return hooked(in_training(model))


MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "gemma": gemma,
    "gpt2": gpt2,
    "predictive-coding": predictive_coding,
    "own attention": own_attention,
}


class Stopped(Exception):
    """What a hook of the tests raises."""


@contextmanager
def stopping(model: Any, after: float = float("inf")) -> Iterator[list[int]]:
    """Calls of a middle block and of the head, as a list; the call behind ``after`` of them raises :class:`Stopped`."""
    calls: list[int] = []

    def stop(*_: Any) -> None:
        calls.append(1)
        if len(calls) > after:
            raise Stopped

    hooks = [m.register_forward_hook(stop) for m in (blocks_of(model)[1], model.get_output_embeddings())]
    yield calls
    for hook in hooks:
        hook.remove()


def tokenizer() -> Tokenizer:
    """Of the words that :func:`write_texts` writes."""
    made = Tokenizer(WordLevel(words().get_vocab(), unk_token=":"))
    made.pre_tokenizer = WhitespaceSplit()
    return made


def write_texts(folder: Path, documents: int = 80, length: int = 120) -> Path:
    draw, named = random.Random(0), sorted(words().get_vocab())
    named = [word for word in named if word.isalpha()]
    for k in range(documents):
        chosen = draw.choices(named, weights=[1 / (n + 1) for n in range(len(named))], k=length)
        (folder / f"{k:03}.txt").write_text(" ".join(chosen))
    return folder


def settings_of_the_process() -> dict[str, Any]:
    """What a function may leave changed behind itself."""
    return {
        "dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "products": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads(),
        "random numbers of torch": torch.get_rng_state().tolist(),
        "random numbers of numpy": repr(np.random.get_state()),  # noqa: NPY002
        "random numbers of Python": random.getstate(),
    }
