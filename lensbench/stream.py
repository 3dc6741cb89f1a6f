"""The stream of any causal LM or image classifier: h_0..h_L before the final norm, what lenses need of it, the rotated view.

Everything downstream sees a model only through :class:`ResidualStream` and what :func:`capture` reads off it.
"""

import inspect
import math
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lensbench.errors import LensbenchError
from lensbench.memory import in_pieces
from lensbench.ranks import ALONE, Ranks
from lensbench.readout import (
    ReadOut,
    behind_the_head,
    block_input,
    example_inputs,
    find_parts,
    find_readout,
    first_tensor,
    input_device,
)
from lensbench.samples import Samples

__all__ = ["Capture", "ReadOut", "ResidualStream", "RotatedView", "capture", "find_readout", "room_for"]

IDENTITY_TOLERANCE = 1e-4
"""Largest relative error, in float32, between reading out h_L and the model's own logits; less precise types allow more."""


class ResidualStream:
    """h_0..h_L of a causal LM or an image classifier, verified on load to read out to the model's own logits.

    ``view="state"`` is everything that the blocks hand on; ``view="prediction"`` keeps the leading ``d_read`` entries,
    those that norm and head see (for the predictive-coding LM: z alone). What a model predicts from is one state: of a LM
    that of a token, of an image classifier that of an image, pooled as the model pools its last one.
    """

    def __init__(self, model: PreTrainedModel, view: str = "state"):
        if view not in ("state", "prediction"):
            raise LensbenchError(f"unknown view {view!r}; there are 'state' and 'prediction'")
        fed = getattr(model, "main_input_name", "input_ids")
        if fed not in ("input_ids", "pixel_values"):
            raise LensbenchError(f"{type(model).__name__} is fed with {fed}: lensbench reads token ids and images")
        refuse_non_finite(model)
        self.model = model.eval()
        self.input_device = input_device(model)
        self._argument = fed
        found = find_parts(model)
        self.readout, self.pooling, self._entry = found.readout, found.pooling, found.entry
        self._head, self._blocks, self._block_list = found.readout.unembedding, found.members, found.blocks
        self.device = self._head.weight.device
        self.view = view
        name = type(model).__name__
        accepted = inspect.signature(model.forward).parameters
        # Image classifiers take any keyword too, and some hand it on to where it is not known.
        self._options = {"use_cache": False} if {"use_cache", "kwargs"} & set(accepted) and not self.pooling else {}
        inputs = example_inputs(model, 2)
        self.readout.scale, self.readout.softcap = behind_the_head(model, self._head, {self._argument: inputs})
        reported, last, logits = self._reported(inputs)
        # bfloat16 has three digits: what is compared are the same operations, in another order where logits are scaled.
        allowed = max(IDENTITY_TOLERANCE, 4 * torch.finfo(self._head.weight.dtype).eps)
        if self.pooling is None:
            if not any(
                state.shape == reported[-1].shape
                and torch.allclose(state, reported[-1], rtol=10 * allowed, atol=allowed)
                for state in (last, self.readout.final_norm(last))
            ):
                raise LensbenchError(
                    f"what {name} hands its final norm is not its last hidden state: it does more to the "
                    "stream behind its blocks than norm and head, and lensbench would read the wrong states"
                )
            if not self._blocks and torch.equal(reported[-2], last):
                raise LensbenchError(f"{name} reports its last state twice and not its first; lensbench cannot read it")
        read = self.readout(last if self.pooling is None else self.pooling(last))
        error = math.inf
        if read.shape == logits.shape:
            error = ((read - logits).abs().max() / logits.abs().max()).item()
        if not error < allowed:
            raise LensbenchError(
                f"reading out h_L of {name} does not give its own logits (relative error {error:.1e}, "
                f"allowed {allowed:.0e}): something stands behind its norm and head that lensbench does not see"
            )
        if self.pooling is None:
            changed = inputs.clone()
            changed[:, -1] = (inputs[:, -1] + 1) % self.vocab_size
            difference = (self._reported(changed)[2] - logits)[:, :-1].abs().max() / logits.abs().max()
            if not difference.item() < allowed:
                raise LensbenchError(f"{name} is not causal: its logits depend on tokens that come later")
        # Lenses compute in float32 whatever the model computes in.
        self.readout = self.readout.in_float32()
        self.float32 = self.readout.unembedding is self._head
        rows = torch.arange(len(inputs))
        self.layers = len(self._blocks or reported[1:])
        self.d_model = self.seen(self.places(last, rows, torch.zeros_like(rows))).shape[-1]

    @property
    def vocab_size(self) -> int:
        return self.readout.weight.shape[0]

    @torch.no_grad()
    def at(self, inputs: Tensor, rows: Tensor, columns: Tensor, *, read_out: bool = True) -> tuple[Tensor, Tensor]:
        """States ``[L+1, n, d]`` and logits ``[n, V]`` at n positions of token ids ``[B, T]``; the head reads no others.

        Of images ``[B, C, H, W]`` the n are the images ``rows``. With ``read_out=False`` the head reads none at all, and
        the logits are ``[0, V]``.
        """

        def chosen(h: Tensor) -> Tensor:
            return self.places(h, rows, columns)

        def keep(_: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
            if not read_out:
                return args[0][:1, :0] if self.pooling is None else args[0][:0]
            return chosen(args[0])[None] if self.pooling is None else args[0][rows.to(args[0].device)]

        hook = self._head.register_forward_pre_hook(keep)
        try:
            states, logits = self._states(inputs, chosen)
        finally:
            hook.remove()
        return states, logits.flatten(0, -2).to(self.device)

    def places(self, h: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """What a layer's whole states hold for n predictions, ``[n, d]``: the tokens at those places, or pooled images."""
        if self.pooling is not None:
            h = self.pooling(h)
            return h[rows.to(h.device)]
        return h[rows.to(h.device), columns.to(h.device)]

    @torch.no_grad()
    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """States ``[L+1, B, T, d]`` and the model's logits ``[B, T, V]`` for token ids ``[B, T]``, in one forward pass.

        For images ``[B, C, H, W]`` both without T.
        """
        states, logits = self._states(inputs, torch.clone if self.pooling is None else self.pooling)
        return states, logits.to(self.device)

    def graph(self, inputs: Tensor) -> tuple[list[Tensor], Tensor]:
        """States h_0..h_L, each ``[B, T, d]``, and logits ``[B, T, V]``, as one graph of gradients where these are enabled.

        Whole states, whatever the view: what a view leaves out is on the path of the gradients too. Of images they are
        not pooled: ``[B, N, d]`` or ``[B, d, H, W]``, with logits ``[B, V]``.
        """
        return self._collected(inputs, lambda h: h, self._run)

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """The L blocks in their order; none where layers are not modules of their own."""
        return self._blocks

    @property
    def block_list(self) -> nn.ModuleList:
        """The list that the model calls its blocks from; there is one where there are :attr:`blocks`."""
        blocks = self.model.get_submodule(str(self._block_list))
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    def _states(self, inputs: Tensor, keep: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """What ``keep`` keeps (a copy) of h_0..h_L, stacked, and the logits."""
        states, logits = self._collected(inputs, lambda h: self.seen(keep(h)), self._reported)
        return torch.stack(states), logits

    def _collected(
        self,
        inputs: Tensor,
        keep: Callable[[Tensor], Tensor],
        run: Callable[..., tuple[tuple[Tensor, ...], Tensor, Tensor]],
    ) -> tuple[list[Tensor], Tensor]:
        """``keep`` of h_0..h_L as ``run`` passes them, and the logits.

        Taken from the blocks' own inputs: some models report their states behind each block and leave out the first.
        """
        if not self._blocks:
            reported, last, logits = run(inputs)
            return [keep(h) for h in (*reported[:-1], last)], logits
        states: list[Tensor] = []

        def take(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            h = block_input(args, kwargs)
            assert h is not None
            states.append(keep(h))

        hooks = [block.register_forward_pre_hook(take, with_kwargs=True) for block in self._blocks]
        try:
            _, last, logits = run(inputs, wanted=False)
        finally:
            for hook in hooks:
                hook.remove()
        return [*states, keep(last)], logits

    def seen(self, h: Tensor) -> Tensor:
        """What the view shows of states, beside the head."""
        return h.to(self.device)[..., : self.readout.weight.shape[1] if self.view == "prediction" else None]

    @torch.no_grad()
    def _reported(self, inputs: Tensor, *, wanted: bool = True) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        return self._run(inputs, wanted=wanted)

    def _run(self, inputs: Tensor, *, wanted: bool = True) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """The hidden states that the model reports, h_L, and its logits.

        h_L of a LM is its final norm's input, else its head's; of an image classifier what its last block returns.
        """
        last: list[Tensor] = []
        if self.pooling is None:
            # In front of other hooks: `at` hands the head a few positions only.
            entry = self._entry or self._head
            hooks = [entry.register_forward_pre_hook(lambda _, args: last.append(args[0]), prepend=True)]
        else:
            hooks = [b.register_forward_hook(lambda *call: last.append(_returned(call[-1]))) for b in self._blocks[-1:]]
        given = inputs.to(self.input_device)
        if inputs.is_floating_point():
            given = given.to(self.model.dtype)  # pixels; not every model casts them itself
        asked = {self._argument: given, "output_hidden_states": wanted, "return_dict": True}
        try:
            output = self.model(**asked, **self._options)
        finally:
            for hook in hooks:
                hook.remove()
        return output.hidden_states or (), last[-1] if last else output.hidden_states[-1], output.logits


def _returned(output: Any) -> Tensor:
    """The states that a block returns."""
    h = first_tensor(output)
    assert h is not None
    return h


def refuse_non_finite(model: nn.Module) -> None:
    """Raise :class:`LensbenchError` naming the first parameter that holds NaN or infinity."""
    for name, parameter in model.named_parameters():
        if not parameter.is_meta and not bool(torch.isfinite(parameter).all()):  # meta: offloaded
            raise LensbenchError(
                f"the model's weight {name} holds NaN or infinite values; load an undamaged checkpoint"
            )


def refuse_overflow(h: Tensor, log_z: Tensor, window: int) -> None:
    """Raise :class:`LensbenchError` where states ``[L+1, n, d]`` or log-partitions of the model's logits are not finite."""
    finite = torch.isfinite(h).all(-1).all(-1)
    if not bool(finite.all()):
        what = f"the state behind layer {int((~finite).nonzero()[0, 0])}"
    elif not bool(torch.isfinite(log_z).all()):
        what = "the model's logits"
    else:
        return
    raise LensbenchError(
        f"{what} overflowed to NaN or infinity in or behind window (or image) {window}; "
        "give the model a dtype of larger range (bfloat16 or float32)"
    )


@dataclass(frozen=True)
class Capture:
    """What the lenses need to know of N tokens of a stream; float32, on one device.

    Every array's token axis is the same N positions, in the order of the windows they came from. Of images there is one
    position each: what is called a token, its window and its document here is then an image, and words are classes.
    """

    states: Tensor  # [L+1, N, d]
    expected: Tensor  # [N, d_read]: e = W^T p
    # Where logits are soft-capped, sum p log p alone.
    entropy_term: Tensor  # [N]: sum p log p - sum p bias: KL(p || q) = entropy_term - e.n + logsumexp(W n + bias)
    targets: Tensor  # [N]: the next token's id
    top: Tensor  # [N]: the model's own most probable next token
    model_ce: Tensor  # [N]: the model's own cross-entropy, nats
    mean_p: Tensor  # [V]: mean of p over the N tokens
    constant_kl: Tensor  # [N]: KL of p from the best constant distribution, that of the fitting tokens
    window: np.ndarray  # [N]: row of the windows
    document: np.ndarray  # [N]: index of the document, the cluster of every interval
    target_bytes: np.ndarray  # [N]: bytes of text that the next token stands for
    # The processes that the tokens are shared out among, each with whole windows of its own; means are over all of them.
    ranks: Ranks = ALONE

    @property
    def layers(self) -> int:
        return len(self.states) - 1

    def __len__(self) -> int:
        return self.states.shape[1]

    def take(self, tokens: Tensor) -> "Capture":
        """The given tokens (indices or mask [N]) alone; ``mean_p`` stays that of all."""
        at = tokens.cpu().numpy()
        return Capture(
            self.states[:, tokens], self.expected[tokens], self.entropy_term[tokens], self.targets[tokens],
            self.top[tokens], self.model_ce[tokens], self.mean_p, self.constant_kl[tokens], self.window[at],
            self.document[at], self.target_bytes[at], self.ranks,
        )  # fmt: skip

    @property
    def tokens(self) -> int:
        """Tokens of all processes."""
        return self.ranks.span(len(self))[1]

    def chosen(self, tokens: Tensor) -> "Capture":
        """As :meth:`take`, by sorted numbers among the tokens of all processes."""
        before, _ = self.ranks.span(len(self))
        return self.take(tokens[(tokens >= before) & (tokens < before + len(self))] - before)


@torch.no_grad()
def capture(
    stream: ResidualStream,
    samples: Samples,
    *,
    constant: Tensor | None = None,
    batch: int = 16,
    memory_gib: float = float("inf"),
    report: Callable[[int, int], None] | None = None,
    ranks: Ranks = ALONE,
) -> Capture:
    """One forward pass per batch of windows of text, or of images, kept at the chosen positions only.

    Out of memory, batches are halved. Of several ``ranks`` each captures its own windows; ``mean_p`` is that of all.

    States that would take more than ``memory_gib`` GiB lie in a memory-mapped file of just their size, in the folder for
    temporary files (``TMPDIR``), which is gone when they are.

    ``constant`` ``[V]`` is the distribution that ``constant_kl`` is measured from: ``mean_p`` of the fitting tokens. Left
    out, it is that of the captured tokens themselves. ``report(done, total)`` is called with numbers of windows or images.
    """
    weight, bias = stream.readout.weight, stream.readout.bias
    expected: list[Tensor] = []
    entropy: list[Tensor] = []
    targets: list[Tensor] = []
    top: list[Tensor] = []
    ce: list[Tensor] = []
    constant_kl: list[Tensor] = []
    states, done = torch.empty(0), 0
    log_constant = None if constant is None else constant.double().clamp(min=1e-300).log().float().to(stream.device)
    mean_p = torch.zeros(stream.vocab_size, dtype=torch.float64, device=stream.device)
    own = ranks.share(len(samples))
    total, valid = own.stop - own.start, samples.valid[own]

    def one(rows: slice) -> None:
        nonlocal states, done, mean_p
        inputs, row_at, at = (torch.from_numpy(x).to(stream.device) for x in samples.scored(rows))
        h, logits = stream.at(inputs, row_at, at, read_out=stream.float32)
        if not stream.float32:  # the model's own logits have two or three digits, its states give more
            logits = stream.readout(h[-1].float())
        target = torch.from_numpy(samples.targets(rows)).to(stream.device)
        log_z = logits.logsumexp(-1, keepdim=True)
        best, losses = logits.argmax(-1), (log_z - logits.gather(-1, target[:, None]))[:, 0]
        p = logits.sub_(log_z).exp_()  # in place: fresh memory for [n, V] costs as much as filling it
        # logsumexp over many words is off by 1e-5; a p that sums to 1 + 1e-5 would move every KL by 1e-5 log Z.
        p.div_(p.sum(-1, keepdim=True))
        negative_entropy = -torch.special.entr(p).sum(-1)
        if done == 0:
            shape = (stream.layers + 1, int(valid.sum()), stream.d_model)
            states = room_for(shape, stream.device, memory_gib)
        refuse_overflow(h, log_z, rows.start)
        aim, total_p = p @ weight, p.sum(0).double()
        entropy_term = negative_entropy - (p @ bias if bias is not None and stream.readout.linear else 0.0)
        # Without a constant given, its cross term has the same mean: sum p log mean_p, added below.
        from_constant = negative_entropy - (p @ log_constant if log_constant is not None else 0.0)
        # From here on nothing can run out of memory and leave half of a batch behind.
        states[:, done : done + len(at)] = h
        done += len(at)
        mean_p += total_p
        kept = (expected, aim), (entropy, entropy_term), (targets, target), (top, best), (ce, losses)
        for parts, part in (*kept, (constant_kl, from_constant)):
            parts.append(part)
        if report is not None:
            report(rows.stop - own.start, total)

    in_pieces(own, batch, one, what="a sequence of the capture")
    window = np.nonzero(valid)[0]
    mean_p = ranks.sum(mean_p)
    mean_p /= ranks.span(len(window))[1]
    window += own.start
    from_constant = torch.cat(constant_kl)
    if constant is None:
        from_constant = from_constant - (mean_p * mean_p.clamp(min=1e-300).log()).sum().float()
    return Capture(
        states=states,
        expected=torch.cat(expected),
        entropy_term=torch.cat(entropy),
        targets=torch.cat(targets),
        top=torch.cat(top),
        model_ce=torch.cat(ce),
        mean_p=mean_p.float(),
        constant_kl=from_constant,
        window=window,
        document=samples.documents[window],
        target_bytes=samples.next_bytes[own][valid],
        ranks=ranks,
    )


def room_for(shape: tuple[int, int, int], device: torch.device, memory_gib: float) -> Tensor:
    """An empty float32 tensor; on the CPU, one of more than ``memory_gib`` GiB is a memory-mapped file without a name."""
    size = math.prod(shape)
    if device.type != "cpu" or 4 * size <= memory_gib * 2**30:
        return torch.empty(shape, device=device)
    with tempfile.NamedTemporaryFile(prefix="lensbench-states-") as file:
        free = shutil.disk_usage(file.name).free
        if free < 4 * size:
            raise LensbenchError(
                f"the states take {4 * size / 2**30:.1f} GiB, more than memory_gib allows in memory and more than the "
                f"{free / 2**30:.1f} GiB free in {tempfile.gettempdir()}; set TMPDIR to a larger disk or fit fewer tokens"
            )
        return torch.from_file(file.name, shared=True, size=size).view(shape)


@dataclass(frozen=True)
class RotatedView:
    """A model with every h_l, l < L, seen through its own random orthogonal map of the pooled principal subspace.

    The model itself is untouched, and so is what any lens fitted at one layer (with prior zero) can read there; what
    layers have in common is gone. ``maps`` is ``[L, d, d]``, float64: rotations Q_l of the top-r principal directions that
    hold ``variance`` of the layers' pooled within-layer variance, identity elsewhere.
    """

    maps: Tensor
    rank: int

    @classmethod
    def random(cls, covariances: Tensor, *, seed: int, variance: float = 0.99) -> "RotatedView":
        """Rotations drawn from the Haar measure for layers with ``covariances`` ``[L, d, d]`` (float64)."""
        values, vectors = torch.linalg.eigh(covariances.mean(0))
        share = values.flip(0).clamp(min=0).cumsum(0) / values.clamp(min=0).sum()
        rank = min(len(values), int((share < variance).sum()) + 1)
        basis = vectors[:, -rank:]  # [d, r]
        generator = torch.Generator().manual_seed(seed)
        maps = []
        for _ in covariances:
            gaussian = torch.randn(rank, rank, generator=generator, dtype=torch.float64)
            q, r = torch.linalg.qr(gaussian)
            q = q * r.diagonal().sign()  # without the signs QR is not uniform over rotations
            maps.append(
                torch.eye(len(values), dtype=torch.float64) + basis @ (q - torch.eye(rank, dtype=q.dtype)) @ basis.T
            )
        return cls(torch.stack(maps), rank)

    def save(self, path: Path) -> None:
        save_file({"maps": self.maps.contiguous(), "rank": torch.tensor(self.rank)}, path)

    @classmethod
    def load(cls, path: Path) -> "RotatedView":
        kept = load_file(path)
        return cls(kept["maps"], int(kept["rank"]))

    def apply(self, captured: Capture) -> Capture:
        """The same tokens with rotated states; layer L and everything that is not a state stay as they are."""
        maps = self.maps.to(captured.states)
        rotated = torch.einsum("lde,lne->lnd", maps, captured.states[:-1])
        return Capture(**{**vars(captured), "states": torch.cat([rotated, captured.states[-1:]])})
