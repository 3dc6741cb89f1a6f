"""The stream of any causal LM or image classifier: h_0..h_L before the final norm, what lenses need of it, the rotated view.

Everything downstream sees a model only through :class:`ResidualStream` and what :func:`capture` reads off it.
"""

import copy
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lensbench.errors import LensbenchError
from lensbench.streams.parts import behind_the_head, block_input, example_inputs, find_parts, first_tensor, input_device
from lensbench.streams.readout import ReadOut

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

    def with_readout(self, readout: ReadOut) -> "ResidualStream":
        """This stream, its model shared, with another read-out of the same modules."""
        other = copy.copy(self)
        other.readout = readout
        return other

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
