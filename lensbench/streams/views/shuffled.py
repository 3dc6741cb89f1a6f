"""The null of adding up: every block's update comes from a token of another document."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lensbench.errors import LensbenchError
from lensbench.runtime.mapped import give_back_pages
from lensbench.runtime.memory import in_pieces
from lensbench.runtime.ranks import Ranks
from lensbench.streams.capture import Capture, predictions, room_for
from lensbench.streams.readout import ReadOut

Split = Literal["fit", "dev", "eval"]
"""A part of the text (or of the images); documents are never in two of them"""

SPLITS: dict[Split, int] = {"fit": 0, "dev": 1, "eval": 2}

LOGITS = 2**24
"""Logits in memory at once: 64 MiB in float32"""

TOKENS = 4096
"""Tokens whose states are moved at a time"""

TRIES = 32
"""Random partners that are tried for a token before all are looked through"""


def donors(document: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """A random order of tokens ``[N]`` in which none stands at a token of its own document.

    Every token gives once, so that sums over tokens stay as they are. A random order is mended by swaps.

    Raises :class:`LensbenchError` where there is one document only, and where one holds more than half of the tokens.
    """
    if not len(document):
        raise LensbenchError("undefined: there is no token whose updates could be shuffled")
    sizes = np.unique(document, return_counts=True)[1]
    if len(sizes) == 1:
        raise LensbenchError("undefined: updates are shuffled between documents, and all tokens are of one document")
    if 2 * sizes.max() > len(document):
        raise LensbenchError(
            f"undefined: updates are shuffled between documents, and one document holds {sizes.max()} of "
            f"{len(document)} tokens, more than half"
        )
    order = rng.permutation(len(document))
    for token in np.flatnonzero(document[order] == document):
        if document[order[token]] != document[token]:  # mended as another's partner
            continue
        own = document[token]
        some = rng.integers(len(document), size=TRIES)
        free = some[(document[some] != own) & (document[order[some]] != own)]
        if not len(free):  # there is one: no document holds more than half of the tokens
            free = rng.permutation(np.flatnonzero((document != own) & (document[order] != own)))
        order[[token, free[0]]] = order[[free[0], token]]
    return order


@dataclass(frozen=True)
class ShuffledView:
    """The stream ``h'_l = h_0 + u_0 + ... + u_{l-1}``, where u_k is the update of block k at a token of another document.

    Block k's update is ``h_{k+1} - h_k``. Every block has donors of its own, and every token gives each update once:
    each layer's updates keep all their moments. p is the read-out of the new last state, next tokens are the real ones.
    """

    layers: tuple[int, ...]
    readout: ReadOut
    seed: int
    constant: Tensor
    """float32 ``[V]``: mean of the new p over the fitting tokens, from which ``constant_kl`` is measured"""
    of_fit: tuple[Capture, dict[str, Tensor]] | None = field(default=None, repr=False, compare=False)
    """The capture that the view was fitted to, and what the new stream says of its tokens: reading it out takes long"""

    @classmethod
    @torch.no_grad()
    def fitted(
        cls, fit: Capture, readout: ReadOut, *, layers: tuple[int, ...], seed: int, memory_gib: float = float("inf")
    ) -> "ShuffledView":
        """The view whose constant distribution is that of the shuffled fitting tokens.

        Raises :class:`LensbenchError` where their documents cannot be shuffled, see :func:`donors`.
        """
        view = cls(layers, readout, seed, torch.empty(0))
        *_, end = view.states_of(fit, "fit", memory_gib)
        said, mean_p = view._said(end, fit, None)
        return replace(view, constant=mean_p.float(), of_fit=(fit, said))

    def states_of(self, captured: Capture, split: Split, memory_gib: float) -> Iterator[Tensor]:
        """The new states ``[N, d]`` of every layer 0..L, one after the other, in the same memory.

        With several processes a donor may be another's token; all of them are asked for states together.
        """
        ranks, states = captured.ranks, captured.states
        document = ranks.joined(captured.document)
        sizes = ranks.joined(np.array([len(captured)]))
        (h,) = room_for((1, *states[0].shape), states.device, memory_gib).to(states.dtype)
        h.copy_(states[0])
        yield h
        for block in range(captured.layers):
            order = donors(document, np.random.default_rng([self.seed, SPLITS[split], block]))
            for rows, update in _updates(states, block, torch.from_numpy(order), sizes, ranks):
                h[rows] += update
            give_back_pages()
            yield h

    @torch.no_grad()
    def apply(self, captured: Capture, split: Split, *, memory_gib: float = float("inf")) -> Capture:
        """The capture ``[n+1, N, d]`` of the shuffled stream, with what its read-out says; ``split`` seeds the shuffle.

        States beyond ``memory_gib`` lie in a memory-mapped file. Raises :class:`LensbenchError` where the documents cannot
        be shuffled, see :func:`donors`.
        """
        shape = (len(self.layers) + 1, len(captured), captured.states.shape[-1])
        states = room_for(shape, captured.states.device, memory_gib).to(captured.states.dtype)
        for layer, h in enumerate(self.states_of(captured, split, memory_gib)):
            if layer in self.layers:
                states[self.layers.index(layer)] = h
        states[-1] = h
        if self.of_fit is not None and split == "fit" and self.of_fit[0] is captured:
            said, mean_p = self.of_fit[1], self.constant
        else:
            said, mean_p = self._said(h, captured, None if split == "fit" else self.constant)
        changed = {"states": states, "mean_p": mean_p.to(captured.mean_p.dtype), **said}
        return Capture(**{**vars(captured), **changed})

    def _said(self, end: Tensor, captured: Capture, constant: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
        """What the read-out says of the last states, and the mean p of all processes, float64.

        ``constant_kl`` is measured from the distribution ``constant`` ``[V]``. Without one it is measured from the mean p,
        as in a capture of fitting tokens: its mean over tokens is exact, single values are not.
        """
        log_constant = (
            None if constant is None else constant.to(end.device).double().clamp(min=1e-300).log().to(end.dtype)
        )
        total = torch.zeros(len(self.readout.weight), dtype=torch.float64, device=end.device)

        def one(rows: slice) -> dict[str, Tensor]:
            found, p = predictions(self.readout, self.readout(end[rows]), captured.targets[rows], log_constant)
            total.add_(p)  # last: nothing can run out of memory any more and be done again
            return found

        parts = in_pieces(slice(0, len(end)), token_block(self.readout), one, what="a token of the shuffled stream")
        said = {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}
        mean_p = captured.ranks.sum(total) / captured.tokens
        if constant is None and said:
            said["constant_kl"] -= mean_p.xlogy(mean_p).sum().to(end.dtype)
        return said, mean_p

    def tensors(self) -> dict[str, Tensor]:
        """``layers`` ``[n]``, ``seed`` and ``constant`` ``[V]``; the read-out is the model's."""
        return {"layers": torch.tensor(self.layers), "seed": torch.tensor(self.seed), "constant": self.constant.cpu()}

    @classmethod
    def of_tensors(cls, kept: dict[str, Tensor], readout: ReadOut) -> "ShuffledView":
        """The view that :meth:`tensors` describes."""
        return cls(tuple(kept["layers"].tolist()), readout, int(kept["seed"]), kept["constant"])


def token_block(readout: ReadOut) -> int:
    """Tokens whose logits are in memory at once."""
    return max(1, LOGITS // len(readout.weight))


def _updates(
    states: Tensor, block: int, order: Tensor, sizes: NDArray[np.int64], ranks: Ranks
) -> Iterator[tuple[slice, Tensor]]:
    """The update of ``block`` at the donors of this process's tokens, some tokens at a time.

    ``order`` ``[N]`` numbers the tokens of all processes, ``sizes`` counts each one's. Processes are served in turn.
    """
    before = 0
    for rank, size in enumerate(sizes.tolist()):
        for start in range(0, size, TOKENS):
            rows = slice(start, min(start + TOKENS, size))
            chosen = order[before + rows.start : before + rows.stop]
            update = ranks.rows(states[block + 1], chosen) - ranks.rows(states[block], chosen)
            if rank == ranks.rank:
                yield rows, update
        before += size
