"""The generic read-out ``R(h) = head(norm(h))`` of any causal LM, found by watching one forward pass.

No list of classes: the head's input is the output of some module, that is the final norm; the modules that produce the
reported hidden states are the blocks; what happens to the head's output is read off a known input.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from tuned_lens.nn.unembed import Unembed

from lensbench.errors import LensbenchError


class ReadOut(Unembed):
    """``R(h) = head(norm(h))``, found by hooks instead of by a list of classes; usable wherever tuned-lens wants an Unembed.

    ``final_norm`` maps ``[..., d]`` to ``[..., d_read]`` and ``unembedding`` maps that to logits ``[..., V]``, multiplied by
    ``scale`` and bent by ``softcap tanh(. / softcap)`` where the model does so. The modules are the model's own (never
    copied), frozen.
    """

    def __init__(self, final_norm: nn.Module, unembedding: nn.Linear, scale: float = 1.0, softcap: float | None = None):
        nn.Module.__init__(self)  # Unembed's own constructor knows seven architectures and copies the weights
        self.final_norm = final_norm
        self.unembedding = unembedding
        self.scale, self.softcap = scale, softcap
        self.product_dtype: torch.dtype | None = None  # of log-partitions on a GPU; None: that of the states
        self.requires_grad_(False)
        self._scaled: tuple[Tensor, Tensor | None] | None = None
        self._gains: dict[tuple[int, torch.dtype, torch.device], Tensor | None] = {}

    @property
    def linear(self) -> bool:
        """Whether logits are affine in ``norm(h)``, so that ``e = W^T p`` says all about the model's distribution."""
        return self.softcap is None

    @property
    def weight(self) -> Tensor:
        """Unembedding W with the scale of the logits folded in, ``[V, d_read]``."""
        return self.unembedding.weight if self.scale == 1 else self._folded()[0]

    @property
    def bias(self) -> Tensor | None:
        """Bias of the unembedding with the scale of the logits folded in, ``[V]``."""
        return self.unembedding.bias if self.scale == 1 else self._folded()[1]

    def _folded(self) -> tuple[Tensor, Tensor | None]:
        weight, bias = self.unembedding.weight, self.unembedding.bias
        if self._scaled is None or self._scaled[0].device != weight.device or self._scaled[0].dtype != weight.dtype:
            self._scaled = weight * self.scale, None if bias is None else bias * self.scale
        return self._scaled

    def in_float32(self) -> "ReadOut":
        """This read-out, or a float32 copy of it where the model computes in another type."""
        if self.unembedding.weight.dtype == torch.float32 and all(
            p.dtype == torch.float32 for p in self.final_norm.parameters()
        ):
            return self
        return ReadOut(
            copy.deepcopy(self.final_norm).float(), copy.deepcopy(self.unembedding).float(), self.scale, self.softcap
        )

    def cap_(self, logits: Tensor) -> Tensor:
        """Soft-capping in place, where the model has it."""
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def logits(self, n: Tensor) -> Tensor:
        """Logits ``[..., V]`` of normalised states ``[..., d_read]``."""
        scaled = F.linear(n.to(self.weight.dtype), self.weight, self.bias)
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)

    def forward(self, h: Tensor) -> Tensor:
        """Logits ``[..., V]`` of states ``[..., d]``."""
        return self.logits(self.final_norm(h))

    def gain(self, d: int) -> Tensor | None:
        """Matrix G ``[d_read, d]`` with ``norm(x) = G x / scale(x) + norm(0)``, up to a constant; None if there is none.

        Read off the norm's answers to unit vectors, so that RMSNorm, LayerNorm, norms without gain and norms that look at
        a part of the state need no case of their own. The claim is checked on random states before it is used.
        """
        weight = self.unembedding.weight
        key = d, weight.dtype, weight.device
        if key not in self._gains:
            self._gains[key] = self._find_gain(d, weight.dtype, weight.device)
        return self._gains[key]

    def _find_gain(self, d: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        offset = self.final_norm(torch.zeros(d, dtype=dtype, device=device))
        # Long vectors, so that the norm's epsilon does not count; unseen directions map to the offset itself.
        gain = (self.final_norm(1e3 * torch.eye(d, dtype=dtype, device=device)) - offset).T
        x = torch.randn(8, d, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        cosine = F.cosine_similarity(x @ gain.T, self.final_norm(x) - offset, dim=-1)
        return gain if bool((cosine > 1 - 1e-4).all()) else None


@dataclass(frozen=True)
class _Call:
    """A module's call in the watched forward pass."""

    name: str
    module: nn.Module
    received: Tensor | None
    returned: Tensor


def _first_tensor(value: Any) -> Tensor | None:
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return value if isinstance(value, Tensor) else None


def block_input(args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    """The state that a block or norm is called with: its first argument, by position or by its usual name."""
    return _first_tensor(list(args) or kwargs.get("hidden_states"))


def _same(a: Tensor, b: Tensor) -> bool:
    """The same numbers: in the same memory (models hand on slices of what a module returned), or cast to another type."""
    if a.shape != b.shape:
        return False
    return a.data_ptr() == b.data_ptr() or (a.dtype != b.dtype and torch.equal(a.to(b.device, b.dtype), b))


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids go."""
    weight: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    return weight.device


@dataclass(frozen=True)
class Found:
    """Where the read-out of a model begins, and the read-out itself.

    ``entry`` is the module whose input is h_L; None where the head reads h_L itself. ``blocks`` is the name of the list of
    blocks, None where what the model reports does not tell. ``members`` are the blocks, each called once with its state
    as the first argument; empty where that is not so, and the states are those that the model reports.
    """

    readout: ReadOut
    entry: nn.Module | None
    blocks: str | None
    members: tuple[nn.Module, ...]


def find_readout(model: PreTrainedModel) -> ReadOut:
    """The read-out of :func:`find_parts`; what stands behind the head is not looked at here."""
    return find_parts(model).readout


@torch.no_grad()
def find_parts(model: PreTrainedModel) -> Found:
    """The modules between the last block and the logits, whatever their classes are called.

    Raises :class:`LensbenchError` for a model without a linear head on top, an encoder-decoder, and one whose head reads
    what no module returned.
    """
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise LensbenchError(f"{name} is an encoder-decoder: lensbench reads causal language models")
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise LensbenchError(f"{name} has no linear output embedding: lensbench reads causal language models")
    if head.weight.is_meta:
        raise LensbenchError(f"the unembedding of {name} is offloaded; give a device_map that keeps it on a device")
    calls: list[_Call] = []
    head_inputs: list[Tensor] = []

    def remember(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
            returned = _first_tensor(output)
            if returned is not None:
                calls.append(_Call(name, module, block_input(args, kwargs), returned))

        return hook

    hooks = [
        m.register_forward_hook(remember(n), with_kwargs=True) for n, m in model.named_modules() if m is not head and n
    ]
    hooks.append(head.register_forward_pre_hook(lambda _, args: head_inputs.append(args[0])))
    vocabulary = model.config.get_text_config().vocab_size
    ids = (torch.arange(4) % vocabulary)[None].to(input_device(model))
    try:
        reported = model(input_ids=ids, output_hidden_states=True, return_dict=True).hidden_states
    finally:
        for hook in hooks:
            hook.remove()
    if not head_inputs:
        raise LensbenchError(f"{name} never calls its output embedding; lensbench cannot read it")
    if not reported or len(reported) < 2:
        raise LensbenchError(f"{name} does not report its hidden states; lensbench cannot read it")
    blocks = _blocks(calls, reported)

    # From the head back to the last block: usually one norm, in some models a projection behind it.
    chain: list[nn.Module] = []
    wanted = head_inputs[-1]
    while True:
        call = next((c for c in calls if _same(c.returned, wanted)), None)
        if call is None or (blocks is not None and call.name.startswith(blocks + ".")):
            break
        if call.module in chain or isinstance(call.module, nn.Embedding) or call.received is None:
            break
        if call.received.shape[:-1] != call.returned.shape[:-1]:
            break  # a whole decoder, called with token ids
        chain.insert(0, call.module)
        wanted = call.received
        if blocks is None:
            break  # further back may be a block
    if call is None and not chain:
        raise LensbenchError(
            f"no module of {name} produces its head's input; lensbench cannot tell what its head reads"
        )
    norm = chain[0] if len(chain) == 1 else nn.Sequential(*chain) if chain else nn.Identity()
    members = () if blocks is None else tuple(model.get_submodule(blocks).children())
    called = [c for c in calls if any(c.module is m for m in members)]
    in_turn = [c.module for c in called] == list(members)
    if not in_turn or any(c.received is None or c.received.shape != wanted.shape for c in called):
        members = ()
    return Found(ReadOut(norm, head), chain[0] if chain else None, blocks, members)


def _blocks(calls: list[_Call], reported: tuple[Tensor, ...]) -> str | None:
    """Name of the list whose members return the states between the first and the last block."""
    parents = []
    for state in reported[1:-1]:
        names = [c.name for c in calls if c.returned.shape == state.shape and _same(c.returned, state)]
        if not names:
            return None
        # A block and its last sub-module return the same tensor: the block is the outermost.
        parents.append(min(names, key=lambda n: n.count(".")).rpartition(".")[0])
    return parents[0] if parents and len(set(parents)) == 1 else None


@torch.no_grad()
def behind_the_head(model: PreTrainedModel, head: nn.Module, ids: Tensor) -> tuple[float, float | None]:
    """What a model does to its head's output to get its logits: ``(scale, soft cap)``, (1, None) for nothing.

    Read off the answer to known outputs of the head, from a thousandth to ten thousand, so that neither the model's
    weights nor the names in its config matter. The identity check that follows refuses a model that does something else.
    """
    sent: list[Tensor] = []

    def ramp(_: nn.Module, __: tuple, output: Tensor) -> Tensor:
        vocabulary = output.shape[-1]
        values = torch.logspace(-3, 4, vocabulary, dtype=torch.float32, device=output.device)
        sent.append(values.to(output.dtype).expand_as(output).contiguous())
        return sent[-1].clone()  # some models scale in place

    hook = head.register_forward_hook(ramp)
    try:
        got = model(input_ids=ids, return_dict=True).logits.double()
    finally:
        hook.remove()
    x, y = sent[-1].to(got.device).double()[0, 0], got[0, 0]
    if x.shape != y.shape:
        return 1.0, None
    tolerance = 4 * torch.finfo(sent[-1].dtype).eps
    scale = float((y / x)[: max(1, len(x) // 16)].median())
    if not scale > 0:
        return 1.0, None
    scale = 1.0 if abs(scale - 1) < tolerance else float(f"{scale:.9g}")
    if bool(((y - scale * x).abs() <= tolerance * scale * x).all()):
        return scale, None
    cap = float(y[-1])
    bent = cap * torch.tanh(scale * x / cap)
    return (scale, cap) if bool(((y - bent).abs() <= 1e3 * tolerance * cap).all()) else (1.0, None)
