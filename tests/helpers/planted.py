"""A small Llama into one head of which something is planted by hand, and what probes are given to look at it."""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lensbench.data.windows import Windows
from lensbench.probes.subject import Subject
from lensbench.streams.stream import ResidualStream

V, D, L, H = 97, 32, 3, 4
LENGTH = 40
PLANTED = (1, 2)
"""Layer and head."""


class PlantedLlama(LlamaForCausalLM):
    """Random weights, but that one head's values are, beside its own, what ``kind`` says; it is mixed as its attention says.

    ``error``: ``M (e_{x_s} - ebar_{s-1})``; ``copy``: ``M e_{x_s}``; ``none``: its own values alone. ``snr`` is the ratio
    of variances of what is planted and of the head's own values. What a token's prediction is depends on errors at earlier
    ones, so the pass is repeated until nothing changes.
    """

    kind, share = "none", 1.0

    def plant(self, kind: str, snr: float, share: float = 1.0, seed: int = 0) -> "PlantedLlama":
        """``share`` is beta / alpha of ``error``."""
        if kind == "none":
            return self
        self.kind, self.share = kind, share
        layer, head = PLANTED
        generator = torch.Generator().manual_seed(seed)
        planted_map = torch.randn(D // H, D, generator=generator) / D**0.5
        place = slice(head * D // H, (head + 1) * D // H)
        # Not a module of this one: its passes are nobody's business.
        self.hidden = [copy.deepcopy(self)]
        scale: list[Tensor] = []

        def value(_: Any, __: Any, output: Tensor) -> Tensor:
            planted, own = self.carried @ planted_map.T, output[..., place]
            if not scale:  # from the first text that it sees
                scale.append((snr * own.var() / planted.var()).sqrt())
            output = output.clone()
            output[..., place] = own + scale[0] * planted
            return output

        for model in (self, *self.hidden):
            model.model.layers[layer].self_attn.v_proj.register_forward_hook(value)
        with torch.no_grad():
            self(torch.from_numpy(text(99, 32).ids))
        return self

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:  # type: ignore[override]
        if self.kind == "none":
            return super().forward(input_ids, **kwargs)
        weight, hidden = self.lm_head.weight, self.hidden[0]
        token, expected = weight[input_ids], torch.zeros(*input_ids.shape, D)
        for _ in range(input_ids.shape[1] + 1):
            carried = token - self.share * expected if self.kind == "error" else token
            self.carried = torch.cat([torch.zeros_like(carried[:, :1]), carried[:, 1:]], 1)
            if self.kind == "copy":
                break
            before = expected
            p = LlamaForCausalLM.forward(hidden, input_ids).logits.softmax(-1)
            expected = torch.nn.functional.pad((p @ weight)[:, :-1], (0, 0, 1, 0))
            if float((expected - before).abs().max()) < 1e-6:
                break
        return super().forward(input_ids, **kwargs)


def planted(kind: str, snr: float = 1.0, seed: int = 0, share: float = 1.0) -> PlantedLlama:
    """Weights far from the initial ones: attention looks somewhere, and predictions are sharp and depend on the context."""
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=D,
        num_hidden_layers=L,
        num_attention_heads=H,
        intermediate_size=64,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = PlantedLlama(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 2:
                    parameter.normal_(std=1.0 if "embed" in name else 1.5 * parameter.shape[1] ** -0.5)
            model.lm_head.weight.normal_(std=0.4)
    return model.plant(kind, snr, share, seed)


def text(seed: int, windows: int = 128) -> Windows:
    """A Markov chain of few likely followers, two windows a document."""
    rng = np.random.default_rng(seed)
    followers = np.random.default_rng(1).dirichlet(np.full(V, 0.1), V)
    ids = np.zeros((windows, LENGTH), dtype=np.int64)
    ids[:, 0] = rng.integers(0, V, windows)
    chances, drawn = followers.cumsum(1), rng.random((LENGTH - 1, windows))
    for t in range(1, LENGTH):
        chance = chances[ids[:, t - 1]]
        ids[:, t] = (chance / chance[:, -1:] <= drawn[t - 1, :, None]).sum(1)
    positions = np.sort(np.stack([rng.permutation(np.arange(2, LENGTH - 1))[:8] for _ in range(windows)]), 1)
    return Windows(
        ids=ids,
        lengths=np.full(windows, LENGTH),
        positions=positions,
        valid=np.ones_like(positions, dtype=bool),
        documents=np.arange(windows) // 2,
        document_names=tuple(f"doc{k}" for k in range(windows // 2)),
        sequence=np.arange(windows) % 2,
        next_bytes=np.ones_like(positions, dtype=np.int32),
    )


def words() -> Tokenizer:
    """Words of two letters, with and without a space before them, and what stands between them in prompts."""
    bare = [a + b for a in "abcdefg" for b in "klmnopq"][: (V - 3) // 2]
    entries = [*(f" {word}" for word in bare), *bare, "?", ":", "\n"]
    tokenizer = Tokenizer(WordLevel({w: k for k, w in enumerate(entries)}, unk_token="?"))
    tokenizer.pre_tokenizer = Split(Regex(" ?[a-z]+|:|\n"), "isolated")
    tokenizer.decoder = Fuse()
    return tokenizer


def subject_of(model: Any, seed: int = 0, count: int = 128, **changes: Any) -> Subject:
    """As outside a suite: the logit lens."""
    stream = changes.get("stream") or ResidualStream(model)
    subject = Subject.plain(stream, text(seed, count), text(seed + 1000, count), words())
    assert subject.text is not None
    beside = {name: changes.pop(name) for name in ("fit_windows", "bigram", "tokenizer") if name in changes}
    if "windows" in changes:
        changes["samples"] = changes.pop("windows")
    return replace(subject, text=replace(subject.text, **beside), **changes)
