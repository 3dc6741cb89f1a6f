"""How often the model's most probable word is among the few most probable ones of a lens: precision at k."""

import torch
from torch import Tensor

from lensbench.lenses.maps import Reads
from lensbench.runtime.memory import in_pieces
from lensbench.streams.capture import Capture
from lensbench.streams.kl import TOKEN_BLOCK
from lensbench.streams.readout import ReadOut


@torch.no_grad()
def top_word_ranks(readout: ReadOut, h: Tensor, maps: Reads, k: int, captured: Capture) -> Tensor:
    """How many words a lens finds more probable than the model's most probable one, at every token: int64 ``[N]``.

    ``h`` ``[N, d]`` are states of the k-th layer of ``maps``. Precision at m is the share of tokens below m
    (arXiv 2303.09435, section 3.2). Logits that differ in their last digits alone are equal.
    """

    def one(rows: slice) -> Tensor:
        logits = readout.logits(readout.final_norm(maps.read(k, h[rows])))
        own = logits.gather(-1, captured.top[rows, None])
        return (logits > own + 1e-5 * own.abs().clamp(min=1)).sum(-1)

    if not len(h):
        return torch.zeros(0, dtype=torch.int64, device=h.device)
    return torch.cat(in_pieces(slice(0, len(h)), TOKEN_BLOCK, one, what="a token of a lens's words"))
