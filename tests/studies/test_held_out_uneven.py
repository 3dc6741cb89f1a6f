"""Uneven streams are what their texts say: loudness, hidden signs and ways to hold an answer, by regressions in numpy."""

import hashlib
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lensbench.studies.held_out import ADDED, CARRIED, HELD_OUT_FAMILIES, REPRESENTED, HeldOutStream
from lensbench.studies.held_out_uneven import UNEVEN_FAMILIES, Hidden, UnevenStream

FAMILIES = sorted(UNEVEN_FAMILIES)
PLACE = ("log-normal-place", "minority-place", "heavy-tails-place", "uneven-layers")
BY_LOUDNESS = ("loud-copied-quiet-place", "loud-place-quiet-copied", "loud-place-quiet-rebased")
HIDDEN = ("little-hidden", "much-hidden")
N = 5000


@cache
def sample(family: str, seed: int = 0) -> tuple[UnevenStream, Hidden, np.ndarray]:
    """A stream, the hidden parts of many tokens that are each a document of its own, and their states."""
    stream = UnevenStream(family, seed=seed)
    parts = stream.parts(N, seed=5, per_document=1)
    return stream, parts, stream.assembled(parts).double().numpy()


def quietened(parts: Hidden, states: np.ndarray) -> np.ndarray:
    """States without loudness: heavy tokens alone would decide a regression on the states as they are."""
    return states / parts.loudness.double().numpy()[:, None]


def reader(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Least-squares matrix ``[d, n]`` of y on x."""
    return np.linalg.lstsq(x, y, rcond=1e-8)[0]


def explained(x: np.ndarray, y: np.ndarray) -> float:
    """Share of y's power that the best linear reading of x explains, less what a fit to so many tokens gains by chance."""
    weights, _, rank, _ = np.linalg.lstsq(x, y, rcond=1e-8)
    return 1 - np.square(y - x @ weights).sum() / np.square(y).sum() * len(x) / (len(x) - rank)


def in_place_by_its_words(stream: UnevenStream) -> np.ndarray:
    """Shares of power that readings of layers 0..L-1 explain of entries of size 1 in place, from the drawn words alone."""
    steps, how = np.arange(1, stream.layers + 1), stream.drawn["how"]
    sigma = np.geomspace(stream.drawn["first_noise"], stream.drawn["last_noise"], stream.layers)
    if how == "added":
        return steps / (stream.layers + 1)
    return 1 / (1 + (sigma**2 if how in ("fresh", "removed") else sigma[0] ** 2 / steps))


def with_gains(stream: UnevenStream) -> float:
    """Share of the power of ``g y`` that y explains for gains g = exp(s z): (E g)^2 / E g^2, by the log-normal moments."""
    return float(np.exp(-(stream.drawn.get("spread_of_layers", 0.0) ** 2)))


def test_names_of_uneven_families_are_not_those_of_the_first_held_out_ones():
    assert not set(UNEVEN_FAMILIES) & set(HELD_OUT_FAMILIES)
    with pytest.raises(ValueError, match="unknown family 'growing'"):
        UnevenStream("growing")


def test_an_uneven_stream_offers_what_measures_ask_of_a_held_out_stream_and_declares_no_shares():
    uneven, first = UnevenStream("much-hidden"), HeldOutStream("growing")
    for name in ("family", "made", "drawn", "layers", "d", "width", "growth", "readout", "verdicts", "size"):
        assert type(getattr(uneven, name)) is type(getattr(first, name)) or name == "made"
    captured = uneven.capture(64, seed=1, per_document=4, constant=torch.full((200,), 1 / 200))
    assert captured.states.shape == (uneven.layers + 1, 64, uneven.d)
    assert captured.document.max() == 15
    assert uneven.shares is None


@pytest.mark.parametrize("family", FAMILIES)
def test_loudness_is_spread_over_tokens_as_drawn(family):
    """From the last states alone, next to the answers that they should be."""
    stream, parts, states = sample(family)
    answer = parts.answer.double().numpy()
    assert answer.var(0).mean() == pytest.approx(stream.size.square().mean().item(), rel=0.05)
    last = states[-1, :, : stream.width] / stream.growth**stream.layers
    found = np.linalg.norm(last, axis=1) / np.linalg.norm(answer, axis=1)
    kind = UNEVEN_FAMILIES[family].loudness
    if kind == "log-normal":
        assert np.log(found).mean() == pytest.approx(0, abs=0.05)
        assert np.log(found).std() == pytest.approx(stream.drawn["spread"], rel=0.05)
    elif kind == "heavy tails":
        # Entries of a multivariate t with 4 degrees of freedom: quartiles at +-.7407, and 1 % above 3.747.
        assert np.quantile(last, [0.25, 0.75, 0.99]) == pytest.approx([-0.7407, 0.7407, 3.747], rel=0.05)
    elif kind == "minority":
        assert np.unique(np.round(found, 4)) == pytest.approx([1, stream.drawn["loudness"]], abs=1e-3)
        assert (found > 1.5).mean() == pytest.approx(stream.drawn["loud"], abs=0.03)
        assert np.array_equal(found > 1.5, parts.loud.numpy())
    else:
        assert found == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("family", BY_LOUDNESS)
def test_loud_tokens_hold_the_power_that_was_drawn(family):
    stream, parts, states = sample(family)
    power = np.square(states[-1, :, : stream.width]).sum(1)
    share, factor = stream.drawn["loud"], stream.drawn["loudness"]
    of_loud = power[parts.loud.numpy()].sum() / power.sum()
    assert of_loud == pytest.approx(share * factor**2 / (share * factor**2 + 1 - share), abs=0.05)
    if family.startswith("loud-place"):
        (least, most), (softest, _) = (UNEVEN_FAMILIES[family].ranges[name] for name in ("loud", "loudness"))
        assert most < 0.5 < least * softest**2 / (least * softest**2 + 1 - least)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_final_norm_undoes_loudness(family):
    stream, parts, states = sample(family)
    some = slice(0, 500)
    p = stream.readout(torch.tensor(states[-1, some]).float()).softmax(-1)
    even = quietened(parts, states)[-1, some]
    assert (p - stream.readout(torch.tensor(even).float()).softmax(-1)).abs().sum(-1).max() < 0.02


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("family", PLACE)
def test_every_layer_in_place_reads_the_share_that_its_noise_leaves(family, seed):
    stream, parts, states = sample(family, seed)
    even, y = quietened(parts, states), parts.answer.double().numpy()
    found = [explained(x, y) for x in even[:-1]]
    expected = 1 / (1 + (1 / in_place_by_its_words(stream)) / with_gains(stream) - 1)
    assert found == pytest.approx(expected, abs=0.025)
    assert (np.diff(found) > -0.01).all()


@pytest.mark.parametrize("family", PLACE)
def test_a_reading_of_an_early_layer_reads_later_ones_in_place_better_and_better(family):
    stream, parts, states = sample(family)
    even, y = quietened(parts, states), parts.answer.double().numpy()
    weights = reader(even[1], y)
    along = [np.corrcoef((x @ weights).ravel(), y.ravel())[0, 1] ** 2 for x in even[1:-1]]
    own = [explained(x, y) for x in even[1:-1]]
    assert along == pytest.approx(own, abs=0.02, rel=0.1)  # chance in the reading costs each layer alike
    assert along[-1] > along[0] + 0.05
    # As lenses are fitted, loudness and all: the loud tokens decide, yet the directions are the same ones.
    loud = reader(states[1], states[-1])[: stream.width, : stream.width]
    assert np.sum(loud * np.eye(stream.width)) / np.linalg.norm(loud) / stream.width**0.5 > 0.9


def test_copies_stay_where_older_layers_read_them_and_new_bases_do_not():
    for family, stays in (("log-normal-copied", True), ("log-normal-rebased", False)):
        stream, parts, states = sample(family)
        even, y = quietened(parts, states), parts.answer.double().numpy()
        own = [explained(x, y) for x in even[:-1]]
        assert (np.diff(own) > 0).all()
        old = even[1]
        error = old - y @ reader(y, old)
        persists = np.sum(error * even[-2]) / np.sum(error * old)
        # What layer 1 reads wrongly is there in full at the last layer where copies lie on top of each other.
        assert persists == pytest.approx(1.0 if stays else 0.0, abs=0.1)
        agrees = np.corrcoef((even[-2] @ reader(old, y)).ravel(), y.ravel())[0, 1] ** 2
        assert agrees < own[-1] / 3
        assert (states[:-1, :, : stream.width] == 0).all() == stays


@pytest.mark.parametrize("family", BY_LOUDNESS)
def test_loud_and_quiet_tokens_are_where_they_should_be(family):
    stream, parts, states = sample(family)
    even, y, loud = quietened(parts, states), parts.answer.double().numpy(), parts.loud.numpy()
    kinds = dict(zip(("loud", "quiet"), family.removeprefix("loud-").split("-quiet-"), strict=True))
    for who, tokens in (("loud", loud), ("quiet", ~loud)):
        place, room = even[:-1, tokens, : stream.width], even[:-1, tokens, stream.width :]
        used, empty = (place, room) if kinds[who] == "place" else (room, place)
        assert (empty == 0).all()
        own = [explained(x, y[tokens]) for x in used]
        assert own[-1] > own[0] + 0.1
        if kinds[who] == "place":
            assert own == pytest.approx(in_place_by_its_words(stream), abs=0.04)
        along = [np.corrcoef((x @ reader(used[1], y[tokens])).ravel(), y[tokens].ravel())[0, 1] ** 2 for x in used[1:]]
        if kinds[who] == "place":
            assert along == pytest.approx(own[1:], abs=0.04)
        else:
            assert along[-1] < own[-1] / 3
        # One lens for all tokens reads both kinds, so neither is hidden.
        both = [even[layer] @ reader(even[layer], y) for layer in (0, stream.layers - 1)]
        left = [np.square(y[tokens] - read[tokens]).sum() / np.square(y[tokens]).sum() for read in both]
        assert left[1] < left[0] - 0.1


def hidden_entries(stream: UnevenStream) -> slice:
    (signed,) = (holder for holder in stream.holders if holder.signed)
    return slice(signed.first, signed.first + signed.channel.entries)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
@pytest.mark.parametrize("family", HIDDEN)
def test_a_hidden_part_is_invisible_to_linear_readings_before_the_last_layer(family, seed):
    stream, parts, states = sample(family, seed)
    y, hidden = states[-1, :, : stream.width], hidden_entries(stream)
    sign = parts.sign.numpy()[:, None]
    assert abs(sign.mean()) < 0.05
    share = np.square(y[:, hidden]).sum() / np.square(y).sum()
    assert share == pytest.approx(stream.drawn["share"], abs=0.02)
    seen, known = [], []
    for x in states[:-1]:
        assert explained(x, y[:, hidden]) < 0.05
        seen.append(explained(x, y[:, : hidden.start]))
        known.append(explained(x * sign, y[:, hidden]))
    assert seen == pytest.approx(in_place_by_its_words(stream), abs=0.03)
    # Undoing the sign, which a direction of the state holds, is all that it takes to read the hidden part.
    assert np.sign(states[0, :, -1]) == pytest.approx(sign[:, 0])
    assert known[-1] > max(known[0] + 0.05, 0.5)


def test_much_hidden_is_copied_or_in_new_bases_as_drawn():
    for how in ("copied", "rebased"):
        seed = next(s for s in range(20) if UnevenStream("much-hidden", seed=s).drawn["hidden"] == how)
        stream, parts, states = sample("much-hidden", seed)
        hidden, x = hidden_entries(stream), states * parts.sign.numpy()[:, None]
        y = states[-1, :, hidden] / stream.growth**stream.layers
        room = slice(stream.width, -1) if how == "copied" else hidden
        old, new = x[1, :, room], x[-2, :, room]
        error = old - y @ reader(y, old)
        assert np.sum(error * new) / np.sum(error * old) == pytest.approx(float(how == "copied"), abs=0.1)
        read = np.corrcoef((new @ reader(old, y)).ravel(), y.ravel())[0, 1] ** 2
        assert read < explained(new, y) / 3


def test_gains_of_uneven_layers_are_each_tokens_and_layers_own_and_the_last_layer_has_none():
    stream, parts, states = sample("uneven-layers")
    gain = np.log(parts.gain.double().numpy())
    assert gain.std(1) == pytest.approx(stream.drawn["spread_of_layers"], rel=0.06)
    assert np.abs(np.corrcoef(gain) - np.eye(stream.layers)).max() < 0.08
    sizes = np.log(np.linalg.norm(states, axis=-1))
    last = np.linalg.norm(parts.answer.double().numpy(), axis=1)
    assert sizes[-1] == pytest.approx(np.log(last), abs=1e-4)
    for layer in range(stream.layers):
        assert np.corrcoef(sizes[layer], gain[layer])[0, 1] > 0.85


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_cross_entropy_of_a_least_squares_lens_falls_with_depth(family):
    """Lenses from each state to the last one, fitted on one half of the tokens, and read out on the other half."""
    stream, half = UnevenStream(family, seed=0), N // 2
    captured = stream.capture(N, seed=8)
    found = []
    for layer in (0, stream.layers // 2, stream.layers - 1):
        x, y = captured.states[layer].double().numpy(), captured.states[-1].double().numpy()
        logits = stream.readout(torch.tensor(x[half:] @ reader(x[:half], y[:half])).float())
        found.append(F.cross_entropy(logits, captured.targets[half:]).item())
    assert (np.diff(found) < -0.01).all()
    assert captured.model_ce.mean().item() < found[-1]


@pytest.mark.slow
def test_verdicts_of_uneven_streams_are_their_families_and_of_the_quiet_where_nearly_all_are():
    for family in PLACE:
        assert UnevenStream(family).verdicts == (ADDED,)
    assert UnevenStream("log-normal-copied").verdicts == (CARRIED,)
    assert UnevenStream("log-normal-rebased").verdicts == (REPRESENTED,)
    assert ADDED not in UnevenStream("much-hidden").verdicts
    for seed in range(20):
        assert ADDED not in UnevenStream("loud-place-quiet-copied", seed=seed).verdicts
        stream = UnevenStream("loud-copied-quiet-place", seed=seed)
        assert (ADDED in stream.verdicts) == (stream.drawn["loud"] < 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_stream_of_a_calibration_improves_at_every_step_and_is_narrow_enough(family):
    for seed in range(50):
        stream = UnevenStream(family, seed=seed)
        assert 24 <= stream.d <= 96
        for holder in stream.holders:
            read = [holder.channel.explained_power(layer) for layer in range(stream.layers)]
            assert (np.diff(read) > 0).all()


def fingerprint(family: str) -> tuple[str, float]:
    """A digest of the sizes of the first stream, and a weighted sum over its read-out and some of its states."""
    stream = UnevenStream(family, seed=0)
    sizes = {name: round(value, 9) if isinstance(value, float) else value for name, value in stream.drawn.items()}
    total = 0.0
    states = stream.states(16, seed=0).double()
    for x in (states / states.square().mean((1, 2), keepdim=True).sqrt(), stream.readout.weight.double()):
        total += (x * torch.cos(torch.arange(x.numel(), dtype=torch.float64)).view_as(x)).sum().item()
    return hashlib.sha256(repr(sorted(sizes.items())).encode()).hexdigest()[:12], total


FROZEN: dict[str, tuple[str, float]] = {
    "heavy-tails-place": ("d7a04f2b5a4b", 8.7390),
    "little-hidden": ("83c9fa3ae9ee", -37.8739),
    "log-normal-copied": ("b32b10e74065", 11.9210),
    "log-normal-place": ("1d7af670a11c", -4.7667),
    "log-normal-rebased": ("754361637efa", 1.1501),
    "loud-copied-quiet-place": ("126aafe760a1", -3.6435),
    "loud-place-quiet-copied": ("66f48dd35d7f", 38.2731),
    "loud-place-quiet-rebased": ("d26aed2384ba", 6.7916),
    "minority-place": ("7cc5f3083691", -70.0283),
    "much-hidden": ("d123a34841fd", 31.8859),
    "uneven-layers": ("52856c3849b2", 237.4530),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_first_uneven_streams_are_those_that_were_frozen(family):
    """They were frozen before any measure was run on them; a changed family needs another name."""
    digest, total = fingerprint(family)
    assert digest == FROZEN[family][0]
    assert total == pytest.approx(FROZEN[family][1], abs=1e-3)
