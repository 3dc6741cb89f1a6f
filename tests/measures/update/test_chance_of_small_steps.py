"""The analytic spreads where a layer changes the stream little: what cancels is not lost."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lensbench.measures.update.chance import goals_in, spreads_of
from lensbench.measures.update.folds import Readings


@pytest.mark.parametrize(("step", "massive"), [(0.5, 1), (1e-4, 1), (1e-4, 1e3)])
def test_spreads_of_layers_that_hardly_change_are_those_of_float64_by_definition(step, massive):
    random, d, tokens, rank = np.random.default_rng(0), 12, 300, 5
    x = [random.normal(size=(tokens, d))]
    x[0][:, 0] *= massive
    for _ in range(2):
        x.append(x[-1] + step * random.normal(size=(tokens, d)))
    goal, space = x[-1], np.linalg.qr(random.normal(size=(d, d)))[0][:, :rank]
    read, signal = (np.eye(d) + 0.3 * random.normal(size=(2, 2, d, d)) for _ in range(2))
    held, loading = np.array([3.0, 2.0]), np.array([1.4, 1.2])
    own, last, later = (torch.from_numpy(np.stack([z.T @ y / tokens for z, y in pairs])) for pairs in (
        [(x[0], x[0]), (x[1], x[1])], [(x[0], goal), (x[1], goal)], [(x[1], x[0])],
    ))  # fmt: skip
    maps = Readings(*(torch.from_numpy(m) for m in (read, signal, np.eye(d), signal)))
    moments, narrow = SimpleNamespace(own=own, goal=last), torch.from_numpy(space)
    of_s, of_c = spreads_of(moments, 0, later, maps, narrow, goals_in(narrow, moments), held, loading)

    moved, kept, added = x[1] - x[0], [], []
    for a, b in ((0, 1), (1, 0)):
        r, f = x[0] @ read[b, 0].T, goal @ signal[b, 0].T
        onto = read[a, 0] @ space / held[0]
        kept.append(np.square(space.T @ (x[1].T @ f / tokens) @ onto).sum() / rank)
        added.append(np.square(space.T @ (moved.T @ (r - loading[0] * f) / tokens) @ onto).sum() / rank)
    assert of_s[0] == pytest.approx(np.sqrt(np.mean(kept)), rel=1e-5)
    assert of_c[0] == pytest.approx(np.sqrt(np.mean(added)), rel=1e-3)
