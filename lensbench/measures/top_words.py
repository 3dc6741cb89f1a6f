"""How often the model's most probable word is among the few most probable ones of a lens: precision at k."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lensbench.lenses.lens import FittedLens
from lensbench.lenses.maps import Reads
from lensbench.runtime.memory import in_pieces
from lensbench.statistics import Array
from lensbench.streams.capture import Capture
from lensbench.streams.kl import TOKEN_BLOCK, sums_of_all
from lensbench.streams.readout import ReadOut
from lensbench.streams.rotated import RotatedView

TOP = {"top1": 1, "top10": 10}
"""Precision -> among how many of a lens's most probable words the model's most probable one is looked for"""


@torch.no_grad()
def top_word_ranks(readout: ReadOut, h: Tensor, maps: Reads, k: int, captured: Capture) -> Tensor:
    """How many words a lens finds more probable than the model's most probable one, at every token: int64 ``[N]``.

    ``h`` ``[N, d]`` are states of the k-th layer of ``maps``. Precision at m is the share of tokens below m
    (arXiv 2303.09435, section 3.2). Logits that differ in their last digits alone are equal; where they overflow, all words
    count as more probable.
    """

    def one(rows: slice) -> Tensor:
        logits = readout.logits(readout.final_norm(maps.read(k, h[rows])))
        own = logits.gather(-1, captured.top[rows, None])
        above = (logits > own + 1e-5 * own.abs().clamp(min=1)).sum(-1)
        return torch.where(logits.isfinite().all(-1), above, logits.shape[-1])

    if not len(h):
        return torch.zeros(0, dtype=torch.int64, device=h.device)
    return torch.cat(in_pieces(slice(0, len(h)), TOKEN_BLOCK, one, what="a token of a lens's words"))


def precision_sums(
    readout: ReadOut, captured: Capture, lens: FittedLens, views: Sequence[RotatedView]
) -> dict[str, Array]:
    """Tokens of each window at which a lens is right, for each precision of :data:`TOP`: ``[S, K]``.

    The K layers are those that the lens's maps read as their own, in the order of :attr:`LensRecord.layers`. ``views``: the
    rotated views of the fit.
    """
    found: dict[str, list[Array]] = {name: [] for name in TOP}
    for number, own in enumerate(lens.reads):
        maps = lens.to_plain(number, views)
        for k, layer in enumerate(own):
            ranks = top_word_ranks(readout, captured.states[layer], maps, k, captured)
            for name, most in TOP.items():
                found[name].append(sums_of_all((ranks < most).double(), captured))
    return {name: np.stack(columns, -1) for name, columns in found.items()}
