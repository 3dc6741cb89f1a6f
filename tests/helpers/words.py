"""What the words of an estimator say, and lack, written out in float64."""

import torch
from torch import Tensor

from helpers.synthetic import in_double
from lensbench.lenses.estimated import Estimator


def by_words_alone(it: Estimator, n: Tensor) -> Tensor:
    """The words' log-partitions of normalised states ``n`` ``[N, d]``: logits, cap and offsets, ``[N]``."""
    words = it.by_words.words
    readout = in_double(words.readout)
    logits = n.double() @ words.weight.double().T
    return (readout.cap_(logits if words.bias is None else logits + words.bias.double()) + words.offset).logsumexp(-1)


def lacks_to_first_order(it: Estimator, m: Tensor, n: Tensor) -> Tensor:
    """What the words lack at the model's states ``m``, and its gradient there by autograd carried to ``n``: ``[N]``."""
    m = m.double().requires_grad_()
    logits = m @ in_double(it.by_words.words.readout).weight.double().T
    lacks = logits.logsumexp(-1) - by_words_alone(it, m)
    (slope,) = torch.autograd.grad(lacks.sum(), m)
    return (lacks + (slope * (n.double() - m)).sum(-1)).detach()
