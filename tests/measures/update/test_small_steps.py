"""Blocks that change the stream by a ten thousandth of its size or less: what they add is measured, not rounded away."""

import numpy as np
import pytest
import torch

from lensbench.measures.update.chance import chance_and_products
from lensbench.measures.update.folds import Readings
from lensbench.measures.update.products import SecondMoments, cluster_products, means_of, pairs_of
from lensbench.measures.update.quantities import Chance, quantities

D, TOKENS, LAYERS = 12, 3000, 3
NAMES = ("carried", "persistence", "clarity", "room")


def states_of(step: float, mean: float) -> np.ndarray:
    """States ``[L+1, N, d]`` in float32: a large one, and updates of a share ``step`` of its size."""
    rng = np.random.default_rng(0)
    states = [mean + rng.normal(size=(TOKENS, D)) * np.geomspace(1, 30, D)]
    for _ in range(LAYERS):
        states.append(states[-1] + step * rng.normal(size=(TOKENS, D)) * np.geomspace(1, 30, D)[::-1])
    return np.stack(states).astype(np.float32)


def maps_of(step: float) -> Readings:
    """Lenses that differ from layer to layer by a share ``step``, as those of layers do that differ so little."""
    rng = np.random.default_rng(1)
    read = rng.normal(size=(2, 1, D, D)) * 0.2 + np.eye(D)
    read = read + step * np.cumsum(rng.normal(size=(2, LAYERS, D, D)), 1)
    signal = 0.8 * np.eye(D) + 0.1 * rng.normal(size=(2, LAYERS, D, D))
    return Readings(*(torch.from_numpy(m) for m in (read, signal, np.eye(D), signal)))


def by_definition(states: np.ndarray, maps: Readings) -> dict[str, np.ndarray]:
    """Quantities from whole readings in extended precision."""
    x = states.astype(np.longdouble)
    x = x - x.mean(1, keepdims=True)
    read, signal = (m.numpy().astype(np.longdouble) for m in (maps.read, maps.signal))

    def crossed(left, right):
        return ((left[0] * right[1]).sum() + (left[1] * right[0]).sum()) / 2

    found = {name: [] for name in NAMES}
    for i, j in zip(*pairs_of(LAYERS), strict=True):
        r, s, new = ([x[a] @ read[k, b].T for k in (0, 1)] for a, b in ((i, i), (j, i), (j, j)))
        f = [x[-1] @ signal[k, i].T for k in (0, 1)]
        of_r, of_s, of_new = (crossed(z, r) / crossed(z, f) for z in (r, s, new))
        v = [b - a for a, b in zip(r, new, strict=True)]  # r and v span what r and the new reading span
        gram = np.array([[crossed(r, r), crossed(r, v)], [crossed(r, v), crossed(v, v)]])
        along = np.array([crossed(s, r), crossed(s, v)])
        (a, b), (_, c) = gram
        explained = along[0] ** 2 * c - 2 * along[0] * along[1] * b + along[1] ** 2 * a
        explained = explained / (a * c - b * b) / crossed(s, s)
        found["carried"].append((of_s - of_new) / (of_r - of_new))
        found["persistence"].append(crossed(s, f) / crossed(r, f))
        found["clarity"].append(np.sqrt(np.clip(explained, 0, 1)))
        found["room"].append(1 - (of_new - 1) / (of_r - 1))
    return {name: np.array(values, float) for name, values in found.items()}


@pytest.mark.parametrize("mean", [0.0, 1000.0])
@pytest.mark.parametrize("step", [0.3, 1e-4, 1e-6])
@pytest.mark.parametrize("way", ["tokens", "moments"])
def test_quantities_of_small_steps_are_those_of_the_definition_in_extended_precision(way, step, mean):
    states, maps = states_of(step, mean), maps_of(step)
    captured, layers = torch.from_numpy(states), list(range(LAYERS))
    means, pairs = means_of(captured, [*layers, LAYERS]), pairs_of(LAYERS)
    if way == "tokens":
        products = cluster_products(captured, layers, means, torch.zeros(TOKENS, dtype=torch.long), 1, maps).total()
    else:
        moments = SecondMoments.of(captured, layers, means)
        products = chance_and_products(moments, [], [maps])[1][0]
    none = Chance(np.zeros(len(pairs[0])), np.zeros(len(pairs[0])))
    found, expected = quantities(products, pairs, none), by_definition(states, maps)
    for name, values in expected.items():
        np.testing.assert_allclose(getattr(found, name), values, rtol=2e-3, atol=2e-3, err_msg=name)
        gained = values - 1 if name == "persistence" else values
        of = getattr(found, name) - 1 if name == "persistence" else getattr(found, name)
        if name != "clarity":
            np.testing.assert_allclose(of, gained, rtol=5e-3, err_msg=name)
