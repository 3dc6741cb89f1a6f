"""Units of the final norm, and reach, against weights and losses written out."""

import numpy as np
import pytest
import torch
from torch import nn

from lensbench.errors import LensbenchError
from lensbench.lenses.recipe import FitRecipe
from lensbench.measures.update import UpdateResult, decompose, index_estimates
from lensbench.measures.update.decomposition import NORMED
from lensbench.measures.update.norm_units import inverse_scales, norm_units
from lensbench.measures.update.verdict import (
    ADDED,
    NOT_REACHED,
    UNDETERMINED,
    UNEVEN,
    WITHOUT_FIRST,
    UpdateRule,
    decide_update,
)
from lensbench.streams.readout import ReadOut
from lensbench.studies.synthetic import Shape, SyntheticStream, answers, capture_of, orthogonal, read_out

RECIPE = FitRecipe(ridges=(1e-2, 0.1, 1.0), pads=(0.0, 0.4))
QUICK = {"refits": 0, "readable": False}


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_the_scale_is_that_of_the_norm(kind):
    d = 12
    norm = nn.RMSNorm(d) if kind == "rms" else nn.LayerNorm(d)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(0))
        if kind == "layer":
            norm.bias.normal_(generator=torch.Generator().manual_seed(1))
    h = 3 * torch.randn(50, d, generator=torch.Generator().manual_seed(2))
    found = inverse_scales(ReadOut(norm, nn.Linear(d, 20, bias=False)), h)
    scale = h.square().mean(-1).sqrt() if kind == "rms" else h.std(-1, correction=0)
    ratio = found.detach() * scale
    torch.testing.assert_close(ratio, ratio.mean().expand(50), rtol=1e-3, atol=0)


def test_a_norm_without_a_scale_is_refused():
    readout = ReadOut(nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 20, bias=False))
    with pytest.raises(LensbenchError, match="no matrix over a scale"):
        inverse_scales(readout, torch.randn(5, 6))


def loud(tokens, seed, constant=None, *, d=12):
    """A stream that is refined in place, each token as loud as a number of its own says."""
    stream = SyntheticStream("fresh", Shape(d=d, layers=3, vocab=40), seed=0)
    random = torch.Generator().manual_seed(seed + 100)
    size = torch.exp(torch.randn(tokens, 1, generator=random))
    return stream.readout, capture_of(
        stream.readout, stream.states(tokens, seed=seed) * size + 5.0, constant=constant, seed=seed
    )


def test_second_moments_are_those_of_weighted_tokens():
    readout, captured = loud(400, 1)
    states = captured.states.double().numpy()
    # RMSNorm over all entries: 1 / scale^2 of the last state weighs a token.
    weight = 1 / np.square(states[-1]).mean(-1)
    weight /= weight.mean()
    expected = [h - (weight[:, None] * h).mean(0) for h in states]
    found = norm_units(captured, readout, [0, 2]).states.double().numpy()
    for at, row in enumerate((0, 2, 3)):
        other = expected[row].T @ (weight[:, None] * expected[3]) / len(weight)
        np.testing.assert_allclose(found[at].T @ found[2] / len(weight), other, rtol=2e-3, atol=1e-4)


def test_the_variant_is_the_decomposition_of_states_in_these_units():
    readout, fit = loud(1500, 1)
    (_, dev), (_, scored) = (loud(800, k, fit.mean_p) for k in (2, 3))
    one = FitRecipe(ridges=(0.1,), pads=(0.0,))
    found = decompose(readout, fit, dev, scored, one, **QUICK)
    (variant,) = (one for one in found.variants if one.setting == NORMED)
    scaled = [norm_units(captured, readout, [0, 1, 2]) for captured in (fit, dev, scored)]
    alone = decompose(readout, *scaled, one, gating=found.gating, normed=False, **QUICK)
    np.testing.assert_allclose(variant.draws.persistence, alone.draws.persistence, rtol=1e-5)
    assert np.abs(variant.point.persistence - found.point.persistence).max() > 1e-3


def test_a_stream_whose_tokens_are_equally_loud_has_the_same_shares_in_these_units():
    stream = SyntheticStream("partly-carried", Shape(d=24, layers=4, vocab=40), seed=0)
    fit = stream.capture(3000, seed=1)
    dev, scored = (stream.capture(1500, seed=k, constant=fit.mean_p) for k in (2, 3))
    indices = index_estimates(decompose(stream.readout, fit, dev, scored, RECIPE, **QUICK))
    assert indices["in_place_normed"].value == pytest.approx(indices["in_place"].value, abs=0.05)


def test_the_indices_units_and_reach_are_left_out_only_where_nobody_looked():
    readout, fit = loud(1500, 1)
    (_, dev), (_, scored) = (loud(800, k, fit.mean_p) for k in (2, 3))
    found = decompose(readout, fit, dev, scored, RECIPE, normed=False, **QUICK)
    indices = index_estimates(found)
    assert indices["in_place_normed"].reason.startswith("not measured")
    assert indices["reach"].low <= indices["reach"].value <= indices["reach"].high


def test_reach_is_the_share_of_the_constants_kl_that_the_last_lens_removes():
    readout, fit = loud(1500, 1)
    (_, dev), (_, scored) = (loud(800, k, fit.mean_p) for k in (2, 3))
    found = decompose(readout, fit, dev, scored, FitRecipe(ridges=(0.1,), pads=(0.0,)), **QUICK)
    h = fit.states.double()
    h, goal = h[2], h[3]
    centred, aim = h - h.mean(0), goal - goal.mean(0)
    cov = centred.T @ centred / len(h)
    unit = torch.linalg.eigvalsh(cov).median()
    lens = torch.linalg.solve(cov + 0.1 * unit * torch.eye(len(cov)), centred.T @ aim / len(h))
    said = readout((((scored.states[2].double() - h.mean(0)) @ lens) + goal.mean(0)).float()).double().log_softmax(-1)
    own = readout(scored.states[3]).double().log_softmax(-1)
    constant = readout(fit.states[3]).double().softmax(-1).mean(0).log()
    left, whole = ((own.exp() * (own - other)).sum(-1).mean() for other in (said, constant))
    assert float(found.reach.share(np.ones(found.weights.shape[1]))) == pytest.approx(float(1 - left / whole), abs=2e-4)


class TwoKinds:
    """Loud tokens are refined in their places; the others carry copies along in a room of their own, through new bases."""

    width, layers = 24, 5

    def __init__(self):
        random = torch.Generator().manual_seed(0)
        self.bases = [orthogonal(self.width, random) for _ in range(self.layers)]
        self.readout = read_out(2 * self.width, 120, read=self.width, seed=3)

    def capture(self, tokens, seed, constant=None):
        random = torch.Generator().manual_seed(seed)
        answer = answers(tokens, self.width, random, per_document=8)
        is_loud = (torch.rand(tokens, 1, generator=random) < 0.4).float()
        room, states = torch.zeros_like(answer), []
        for layer, noise in enumerate(torch.linspace(1.6, 0.3, self.layers)):
            x = answer + noise * torch.randn(tokens, self.width, generator=random)
            room = room / 1.6 + (1 - is_loud) * x @ self.bases[layer].T
            states.append(1.6**layer * torch.cat([4 * is_loud * x, room], 1))
        states.append(1.6 ** (self.layers - 1) * torch.cat([torch.where(is_loud > 0, 4 * answer, answer), room], 1))
        return capture_of(self.readout, torch.stack(states), per_document=8, constant=constant, seed=seed)


class QuietInNewBases(TwoKinds):
    """Loud tokens are refined in their places; the others hold the answer in a room apart, in a new basis at every layer."""

    def capture(self, tokens, seed, constant=None):
        random = torch.Generator().manual_seed(seed)
        answer = answers(tokens, self.width, random, per_document=8)
        is_loud = (torch.rand(tokens, 1, generator=random) < 0.3).float()
        states = []
        for layer, noise in enumerate(torch.linspace(1.6, 0.3, self.layers)):
            x = answer + noise * torch.randn(tokens, self.width, generator=random)
            states.append(torch.cat([4 * is_loud * x, (1 - is_loud) * x @ self.bases[layer].T], 1))
        states.append(torch.cat([torch.where(is_loud > 0, 4 * answer, answer), 0 * answer], 1))
        return capture_of(self.readout, torch.stack(states), per_document=8, constant=constant, seed=seed)


class Hidden(TwoKinds):
    """Half of the answer is refined in place; the other half is held with a sign that is drawn for each token."""

    def __init__(self):
        super().__init__()
        self.readout = read_out(self.width, 120, seed=3)

    def capture(self, tokens, seed, constant=None):
        random = torch.Generator().manual_seed(seed)
        answer = answers(tokens, self.width, random, per_document=8)
        sign = 2.0 * torch.randint(2, (tokens, 1), generator=random) - 1
        sign = torch.cat([torch.ones(tokens, self.width // 2), sign.expand(-1, self.width // 2)], 1)
        noises = torch.linspace(1.6, 0.3, self.layers)
        states = [sign * (answer + s * torch.randn(tokens, self.width, generator=random)) for s in noises]
        return capture_of(self.readout, torch.stack([*states, answer]), per_document=8, constant=constant, seed=seed)


def verdict_on(stream):
    fit = stream.capture(4096, 1)
    dev, scored = (stream.capture(2048, k, fit.mean_p) for k in (2, 3))
    return UpdateResult.of(decompose(stream.readout, fit, dev, scored, RECIPE, **QUICK))


def test_loud_tokens_in_place_do_not_speak_for_quiet_ones_that_carry_along():
    result = verdict_on(TwoKinds())
    found = decide_update(UpdateRule(), result.facts(WITHOUT_FIRST))
    assert result.indices["in_place_without_layer0"][0] > 0.9
    assert (found.verdict, found.gate) == (UNDETERMINED, UNEVEN)


def test_loud_tokens_in_place_do_not_speak_for_quiet_ones_in_new_bases():
    result = verdict_on(QuietInNewBases())
    found = decide_update(UpdateRule(), result.facts(WITHOUT_FIRST))
    assert result.indices["clarity_without_layer0"][0] > 0.8
    assert (found.verdict, found.gate) == (UNDETERMINED, UNEVEN)


def test_a_prediction_half_of_which_no_linear_lens_reads_is_not_added_up():
    result = verdict_on(Hidden())
    found = decide_update(UpdateRule(), result.facts(WITHOUT_FIRST))
    assert result.indices["in_place_without_layer0"][0] > 0.9
    assert (found.verdict, found.gate) == (UNDETERMINED, NOT_REACHED)
    assert found.verdict != ADDED
