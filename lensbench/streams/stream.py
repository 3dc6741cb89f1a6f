"""The residual stream of any causal LM or image classifier: h_0..h_L, all before the final norm, and the read-out.

All later code sees a model only through :class:`ResidualStream` and what :func:`capture` reads from it.
"""

import copy
import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lensbench.errors import LensbenchError
from lensbench.streams.parts import (
    after_the_head,
    block_input,
    evaluating,
    example_inputs,
    find_parts,
    first_tensor,
    input_device,
)
from lensbench.streams.readout import ReadOut

IDENTITY_TOLERANCE = 1e-4
"""Largest relative difference, in float32, between the read-out of h_L and the model's logits; other types allow more."""


class ResidualStream:
    """h_0..h_L of a causal LM or an image classifier; loading checks that h_L reads out to the model's own logits.

    ``view="state"`` shows the whole state that the blocks pass on. ``view="prediction"`` shows the first ``d_read`` entries,
    which norm and head see (for the predictive-coding LM: z). A prediction is made from one state: that of a token in a
    LM, in an image classifier that of an image, pooled as the model pools its last one.

    The model stays as it is: its passes are in evaluation mode, and it is then in the mode that it was in; the read-out
    shares the memory of its weights, but takes no gradient.

    Raises :class:`LensbenchError` for a model that cannot be read, with weights that are not finite, whose read-out does
    not give its logits, or that is not causal.
    """

    def __init__(self, model: PreTrainedModel, view: str = "state"):
        if view not in ("state", "prediction"):
            raise LensbenchError(f"unknown view {view!r}; there are 'state' and 'prediction'")
        argument = getattr(model, "main_input_name", "input_ids")
        if argument not in ("input_ids", "pixel_values"):
            raise LensbenchError(f"{type(model).__name__} reads {argument}: lensbench is for token ids and images")
        refuse_non_finite(model)
        self.model = model
        self.half: object | None = None
        """Not None: captures multiply in float16; how well that agrees (:class:`lensbench.streams.half.HalfAgreement`)"""
        with evaluating(model):
            self._find(argument, view)

    def _find(self, argument: str, view: str) -> None:
        """Find the parts of the model, which is in evaluation mode, and check that they give its logits."""
        model = self.model
        self.input_device = input_device(model)
        self._argument = argument
        found = find_parts(model)
        self.readout, self.pooling, self._entry = found.readout.frozen(), found.pooling, found.entry
        self._head, self._blocks, self._block_list = found.readout.unembedding, found.members, found.blocks
        self.device = self._head.weight.device
        self.view = view
        accepted = inspect.signature(model.forward).parameters
        # Image classifiers accept any keyword too, but some pass it on to modules that do not know it.
        self._options = {"use_cache": False} if {"use_cache", "kwargs"} & set(accepted) and not self.pooling else {}
        inputs = example_inputs(model, 2)
        after, self.readout.softcap = after_the_head(model, self._head, {self._argument: inputs})
        self.readout.scale *= after  # some models scale the head's input, others its output
        reported, last, logits = self._reported(inputs)
        # The same operations in another order, in a type that may have three digits only.
        allowed = max(IDENTITY_TOLERANCE, 4 * torch.finfo(self._head.weight.dtype).eps)
        if self.pooling is None:
            self._check_last_state(reported, last, allowed)
        self._check_read_out(last, logits, allowed)
        self._check_kept(inputs, reported)
        if self.pooling is None:
            self._check_causal(inputs, logits, allowed)
        # Lenses compute in float32, whatever type the model computes in.
        own, self.readout = self.readout, self.readout.in_float32()
        self.float32 = self.readout is own
        rows = torch.arange(len(inputs))
        self.layers = len(self._blocks or reported[1:])
        self.width = self.places(last, rows, torch.zeros_like(rows)).shape[-1]

    @property
    def _name(self) -> str:
        return type(self.model).__name__

    def _check_last_state(self, reported: tuple[Tensor, ...], last: Tensor, allowed: float) -> None:
        """The final norm's input must be the last hidden state that the model reports."""
        if not any(
            state.shape == reported[-1].shape and torch.allclose(state, reported[-1], rtol=10 * allowed, atol=allowed)
            for state in (last, self.readout.final_norm(last))
        ):
            raise LensbenchError(
                f"the input of the final norm of {self._name} is not its last hidden state: it does more to the "
                "stream after its blocks than norm and head, and lensbench would read the wrong states"
            )
        if not self._blocks and torch.equal(reported[-2], last):
            raise LensbenchError(
                f"{self._name} reports its last state twice and not its first; lensbench cannot read it"
            )

    def _check_read_out(self, last: Tensor, logits: Tensor, allowed: float) -> None:
        """The read-out of h_L must be the model's own logits."""
        read = self.readout(last if self.pooling is None else self.pooling(last))
        error = math.inf
        if read.shape == logits.shape:
            error = ((read - logits).abs().max() / logits.abs().max()).item()
        if not error < allowed:
            raise LensbenchError(
                f"reading out h_L of {self._name} does not give its own logits (relative error {error:.1e}, "
                f"allowed {allowed:.0e}): the model does something after its norm and head that lensbench does not see"
            )

    def _check_kept(self, inputs: Tensor, reported: tuple[Tensor, ...]) -> None:
        """No block may change its input in place: a state that is kept would become a later one."""
        if self._blocks:
            copies: list[Tensor] = []

            def keep(h: Tensor) -> Tensor:
                copies.append(h.clone())
                return h

            kept = self._collected(inputs, keep, self._reported)[0]
            changed = any(not torch.equal(h, copy) for h, copy in zip(kept, copies, strict=True))
        else:
            changed = any(a.data_ptr() == b.data_ptr() for a, b in itertools.pairwise(reported))
        if changed:
            raise LensbenchError(
                f"a block of {self._name} changes its input in place, so that states are lost; let it return a new tensor"
            )

    def _check_causal(self, inputs: Tensor, logits: Tensor, allowed: float) -> None:
        """Logits must not depend on later tokens."""
        changed = inputs.clone()
        changed[:, -1] = (inputs[:, -1] + 1) % self.vocab_size
        difference = (self._reported(changed)[2] - logits)[:, :-1].abs().max() / logits.abs().max()
        if not difference.item() < allowed:
            raise LensbenchError(f"{self._name} is not causal: its logits depend on tokens that come later")

    def with_readout(self, readout: ReadOut) -> "ResidualStream":
        """This stream, its model shared, with another read-out of the same modules."""
        other = copy.copy(self)
        other.readout = readout
        return other

    def whole(self) -> "ResidualStream":
        """This stream, its model shared, in the view of the whole state."""
        other = copy.copy(self)
        other.view = "state"
        return other

    @property
    def d_model(self) -> int:
        """Entries of a state that the view shows."""
        return self.width if self.view == "state" else min(self.width, self.readout.weight.shape[1])

    @property
    def vocab_size(self) -> int:
        """Number V of words or classes."""
        return self.readout.weight.shape[0]

    @torch.no_grad()
    def at(self, inputs: Tensor, rows: Tensor, columns: Tensor, *, read_out: bool = True) -> tuple[Tensor, Tensor]:
        """States ``[L+1, n, d]`` and logits ``[n, V]`` at n positions of token ids ``[B, T]``; the head runs on these only.

        For images ``[B, C, H, W]`` the n states are those of the images ``rows``. With ``read_out=False`` the head runs on
        none, and the logits are ``[0, V]``.
        """

        def chosen(h: Tensor) -> Tensor:
            return self.places(h, rows, columns)

        def keep(_: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
            if not read_out:
                return args[0][:1, :0] if self.pooling is None else args[0][:0]
            return chosen(args[0])[None] if self.pooling is None else args[0][rows.to(args[0].device)]

        with self.before_the_head(keep):
            states, logits = self._states(inputs, chosen)
        return states, logits.flatten(0, -2).to(self.device)

    @contextmanager
    def before_the_head(self, chosen: Callable[..., Tensor]) -> Iterator[None]:
        """A context in which the head reads what ``chosen``, a forward pre-hook, makes of its arguments."""
        hook = self._head.register_forward_pre_hook(chosen)
        try:
            yield
        finally:
            hook.remove()

    def places(self, h: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """The states ``[n, d]`` of n predictions, from a layer's whole states: tokens at these places, or pooled images."""
        if self.pooling is not None:
            h = self.pooling(h)
            return h[rows.to(h.device)]
        return h[rows.to(h.device), columns.to(h.device)]

    @torch.no_grad()
    def states_at(self, inputs: Tensor, rows: Tensor, columns: Tensor, *, half: bool = False) -> Tensor:
        """The states of :meth:`at`, without logits; ``half``: by a pass with products in float16, on the CPU."""
        # Without its cache: copies of all weights would be held until the pass ends, and gain nothing.
        with torch.autocast("cpu", torch.float16, cache_enabled=False) if half else nullcontext():
            return self.at(inputs, rows, columns, read_out=False)[0].float()

    @torch.no_grad()
    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """States ``[L+1, B, T, d]`` and the model's logits ``[B, T, V]`` for token ids ``[B, T]``, in one forward pass.

        For images ``[B, C, H, W]`` neither has the T axis.
        """
        states, logits = self._states(inputs, torch.clone if self.pooling is None else self.pooling)
        return states, logits.to(self.device)

    def graph(self, inputs: Tensor, *, read_out: bool = True) -> tuple[list[Tensor], Tensor]:
        """States h_0..h_L, each ``[B, T, d]``, and logits ``[B, T, V]``, in one autograd graph if gradients are enabled.

        The states are whole, whatever the view: gradients flow through the entries that a view leaves out. States of
        images are not pooled: ``[B, N, d]`` or ``[B, d, H, W]``, with logits ``[B, V]``. With ``read_out=False`` the head
        runs at no position, and the logits hold none.
        """
        if read_out:
            return self._collected(inputs, lambda h: h, self._run)
        none = self._head.register_forward_pre_hook(
            lambda _, args: args[0][:1, :0] if self.pooling is None else args[0][:0]
        )
        try:
            return self._collected(inputs, lambda h: h, self._run)
        finally:
            none.remove()

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """The L blocks in order; empty where layers are not modules of their own."""
        return self._blocks

    @property
    def block_list(self) -> nn.ModuleList:
        """The module list of the blocks; it exists where :attr:`blocks` is not empty."""
        blocks = self.model.get_submodule(str(self._block_list))
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    def _states(self, inputs: Tensor, keep: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """``keep`` (which copies) of h_0..h_L, stacked, and the logits."""
        states, logits = self._collected(inputs, lambda h: self.seen(keep(h)), self._reported)
        return torch.stack(states), logits

    def _collected(
        self,
        inputs: Tensor,
        keep: Callable[[Tensor], Tensor],
        run: Callable[..., tuple[tuple[Tensor, ...], Tensor, Tensor]],
    ) -> tuple[list[Tensor], Tensor]:
        """``keep`` of each of h_0..h_L, and the logits.

        States are the inputs of the blocks: some models report the states after each block and leave out the first.
        """
        if not self._blocks:
            reported, last, logits = run(inputs)
            return [keep(h) for h in (*reported[:-1], last)], logits
        states: list[Tensor] = []

        def take(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
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
        """The entries of states that the view shows, on the device of the head."""
        return h.to(self.device)[..., : self.readout.weight.shape[1] if self.view == "prediction" else None]

    @torch.no_grad()
    def _reported(self, inputs: Tensor, *, wanted: bool = True) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        return self._run(inputs, wanted=wanted)

    def _run(self, inputs: Tensor, *, wanted: bool = True) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """The hidden states that the model reports, h_L, and the logits.

        h_L of a LM is the input of its final norm (or of its head); of an image classifier the output of its last block.
        """
        last: list[Tensor] = []
        if self.pooling is None:
            # Before other hooks: the hook of `at` gives the head a few positions only.
            entry = self._entry or self._head
            hooks = [entry.register_forward_pre_hook(lambda _, args: last.append(args[0]), prepend=True)]
        else:
            hooks = [b.register_forward_hook(lambda *call: last.append(_returned(call[-1]))) for b in self._blocks[-1:]]
        try:
            with evaluating(self.model):
                output = self.model(**self.asked(inputs, wanted=wanted))
        finally:
            for hook in hooks:
                hook.remove()
        return output.hidden_states or (), last[-1] if last else output.hidden_states[-1], output.logits

    def asked(self, inputs: Tensor, *, wanted: bool = False) -> dict[str, Any]:
        """The arguments of a call of the model with these inputs; ``wanted``: with the hidden states that it reports."""
        given = inputs.to(self.input_device)
        if inputs.is_floating_point():
            given = given.to(self.model.dtype)  # pixels; not every model casts them itself
        return {self._argument: given, "output_hidden_states": wanted, "return_dict": True, **self._options}


def _returned(output: Any) -> Tensor:
    """The states that a block returns."""
    h = first_tensor(output)
    assert h is not None
    return h


def refuse_non_finite(model: nn.Module) -> None:
    """Raise :class:`LensbenchError` that names the first parameter with NaN or infinite values."""
    for name, parameter in model.named_parameters():
        if not parameter.is_meta and not bool(torch.isfinite(parameter).all()):  # meta: offloaded
            raise LensbenchError(
                f"the model's weight {name} holds NaN or infinite values; load an undamaged checkpoint"
            )
