"""Error transport: found where it is planted or built in, and nowhere else; its regressions against brute force."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.planted import PLANTED, D, H, L, planted, subject_of, text
from scipy.optimize import minimize_scalar
from sklearn.linear_model import LinearRegression

from lensbench.models import build
from lensbench.probes import error_transport
from lensbench.probes.registry import PROBES
from lensbench.probes.tools import predictions
from lensbench.probes.tools.transport import Alignment, Rivals, columns_kept, damped, score_layer, solve_damped
from lensbench.streams.stream import ResidualStream

SHAPE = {"vocab_size": 97, "d_model": 32, "layers": 3, "heads": 4, "context": 64, "parameters": 60_000}


def frame_of(model, seed=0, count=128, **changes):
    return PROBES["error_transport"].measure(subject_of(model, seed, count, **changes)).frame()


def at(frame, quantity, column="value"):
    return frame[frame["quantity"] == quantity].set_index(["layer", "other"])[column].astype(float)


@pytest.mark.parametrize("snr", [0.1, *(pytest.param(snr, marks=pytest.mark.slow) for snr in (10.0, 3.0, 1.0, 0.3))])
def test_a_planted_head_that_carries_errors_is_found_first(snr):
    frame = frame_of(planted("error", snr))
    score = at(frame, "error_score")
    assert score.idxmax() == PLANTED
    assert len(score) == L * H
    found = at(frame, "error_transport_found")
    assert found[PLANTED] == 1
    assert found.sum() == 1
    assert frame.set_index("quantity").loc["heads_found", "value"] == pytest.approx(1 / (L * H))
    if snr >= 1:
        ratio = [float(at(frame, "error_ratio", c)[PLANTED]) for c in ("ci_low", "value", "ci_high")]
        assert 0.85 < ratio[0] < ratio[2] < 1.25
        assert abs(ratio[1] - 1) < 0.08
        assert at(frame, "error_alignment")[PLANTED] > 0.75


@pytest.mark.parametrize("share", [0.5, pytest.param(2.0, marks=pytest.mark.slow)])
def test_the_ratio_is_the_one_that_was_planted(share):
    frame = frame_of(planted("error", 10.0, share=share))
    low, high = at(frame, "error_ratio", "ci_low")[PLANTED], at(frame, "error_ratio", "ci_high")[PLANTED]
    assert at(frame, "error_ratio")[PLANTED] == pytest.approx(share, rel=0.05)
    assert high - low < 0.4 * share


@pytest.mark.slow
@pytest.mark.parametrize("snr", [1.0, 10.0])
def test_a_planted_copying_head_has_ratio_nothing(snr):
    frame = frame_of(planted("copy", snr))
    assert at(frame, "error_ratio", "ci_low")[PLANTED] <= 0 <= at(frame, "error_ratio", "ci_high")[PLANTED]
    assert abs(at(frame, "error_ratio")[PLANTED]) < 0.06
    assert snr < 10 or at(frame, "copying_gain").idxmax() == PLANTED
    assert at(frame, "error_transport_found").sum() == 0


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "first"), [("none", 0), ("copy", 40)])
def test_without_errors_a_model_has_a_head_found_no_more_often_than_one_in_twenty(kind, first):
    """Family-wise, over models: of 40, more than 5 have a probability of 1.4 %. Of the 480 heads, 5 % would be 24."""
    seeds = range(first, first + 40)
    hits = [at(frame_of(planted(kind, 1.0, seed), seed), "error_transport_found").sum() for seed in seeds]
    assert np.count_nonzero(hits) <= 5
    assert np.sum(hits) <= 9


def sharp(model, seed=3):
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        for p in model.parameters():  # far from the initial weights, where predictions are all alike
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["exp", "linear", "softmax"])
def test_every_head_of_a_predictive_coding_model_has_ratio_one_at_its_own_places(kernel):
    model = sharp(build("predictive-coding", seed=1, kernel=kernel, error_gradient=False, **SHAPE))
    frame = frame_of(model)
    assert at(frame, "error_ratio").to_numpy() == pytest.approx(np.ones(12), abs=1e-3)
    gain = at(frame, "error_gain") - at(frame, "error_gain_null")
    assert (gain > 0).all()
    assert at(frame, "error_alignment").to_numpy() == pytest.approx(np.ones(12), abs=0.05)
    # All that a head mixes is M (C - P): nothing is left.
    whole = at(frame, "copying_gain") + at(frame, "error_gain")
    assert (whole <= 1 + 1e-9).all()


@pytest.mark.slow
def test_every_head_of_its_control_without_errors_has_ratio_nothing():
    frame = frame_of(sharp(build("predictive-coding", seed=1, error="none", **SHAPE)))
    assert np.abs(at(frame, "error_ratio").to_numpy()).max() < 1e-3
    assert at(frame, "error_transport_found").sum() == 0


@pytest.mark.parametrize("family", ["gpt", *(pytest.param(f, marks=pytest.mark.slow) for f in ("gpt-conv", "gpt2"))])
def test_an_untrained_gpt_has_no_head_found_and_says_that_there_is_no_prediction(family):
    frame = frame_of(build(family, seed=2, **SHAPE).eval())
    assert at(frame, "error_transport_found").sum() == 0
    assert (at(frame, "error_score") < 0.01).all(), "expectations of such a model have their tokens' own sign"
    assert frame.loc[frame["quantity"] == "error_gain", "reason"].str.contains("predicts nearly the same").all()


def test_models_without_attention_weights_are_skipped_with_the_reason():
    from helpers.architectures import small_model

    frame = frame_of(small_model("mamba"))
    assert len(frame) == 1
    assert "no attention weights" in frame["reason"].iloc[0]
    rotated = frame_of(planted("none"), rotated=True)
    assert "rotated view" in rotated["reason"].iloc[0]
    few = PROBES["error_transport"].measure(subject_of(planted("none"), count=4)).frame()
    assert "fewer than four documents" in few["reason"].iloc[0]


@pytest.mark.slow
def test_short_windows_and_padding_count_for_nothing():
    """Windows of two tokens among the others, and any ids behind the end of a window: the same numbers."""
    model = planted("none")
    whole = subject_of(model, count=48)
    lengths = whole.windows.lengths.copy()
    lengths[::8], lengths[1::8] = 2, 25
    frames = []
    for filling in (0, 5):
        ids = whole.windows.ids.copy()
        ids[np.arange(ids.shape[1]) >= lengths[:, None]] = filling
        windows = replace(whole.windows, ids=ids, lengths=lengths)
        frames.append(frame_of(model, count=48, windows=windows)["value"].astype(float).to_numpy())
    np.testing.assert_allclose(*frames, rtol=1e-4, atol=1e-6)
    assert np.isfinite(frames[0]).mean() > 0.9


@pytest.mark.parametrize(("share", "least"), [(0.95, 4), (0.5, 4), (0.95, 30), (1.0, 4)])
def test_the_directions_hold_the_share_that_is_asked_for_and_no_more(share, least, monkeypatch):
    monkeypatch.setattr(predictions, "RANK", least)
    stream, windows = ResidualStream(planted("none")), text(0, 20)
    found = predictions.Directions.holding(stream, windows, share)
    rows = stream.readout.weight.detach().double().numpy()[windows.ids.ravel()]
    variance = np.sort(np.linalg.eigvalsh(np.cov(rows.T)))[::-1]
    held = np.cumsum(variance) / variance.sum()
    expected = max(least, int(np.argmax(held >= min(share, held[-1] - 1e-9))) + 1)
    assert found.rank == min(expected, D)
    assert found.share == pytest.approx(held[found.rank - 1], abs=1e-6)
    assert found.share >= share - 1e-6


def test_too_few_positions_for_the_directions_are_reported(monkeypatch):
    subject = subject_of(planted("none"))
    whole = error_transport.planned(subject, subject.windows)
    assert (whole.directions.rank, whole.stride, whole.reason) == (D, 1, "")
    monkeypatch.setattr(error_transport, "RANK", 4)
    monkeypatch.setattr(error_transport, "ROWS_PER_DIRECTION", 1000)
    limited = error_transport.planned(subject, subject.windows)
    assert limited.directions.rank == 4
    assert limited.directions.share < 0.5
    assert limited.reason == f"{D} directions would hold 95%; memory and the kept positions allow 4"


@pytest.mark.slow
def test_heads_kept_at_every_third_position_still_show_the_planted_one(monkeypatch):
    """Little memory keeps fewer positions, and the regressions are of these alone."""
    subject = subject_of(planted("error", 10.0))
    kept = 128 * 38 * L * H * (40 + D // H) * 4
    monkeypatch.setattr(error_transport, "MEMORY_GIB", 0.4 * kept / 2**30)
    plan = error_transport.planned(subject, subject.windows)
    assert plan.stride == 3
    frame = PROBES["error_transport"].measure(subject).frame()
    assert at(frame, "error_score").idxmax() == PLANTED
    assert at(frame, "error_transport_found")[PLANTED] == 1


# The regressions, from the data themselves


def columns(seed=0, count=300, r=3, size=2, beta=0.7):
    """One head: ``[1, a_0, sum a, D, C, P, permuted P, mixed]``."""
    rng = np.random.default_rng(seed)
    beside = rng.random((count, 2))
    previous, token = rng.standard_normal((2, count, r))
    expected = 0.6 * token + 0.8 * rng.standard_normal((count, r)) + 0.3 * previous
    shape = rng.standard_normal((r, size))
    mixed = (token - beta * expected) @ shape + previous @ rng.standard_normal((r, size)) + beside @ np.ones((2, size))
    mixed = mixed + 0.3 * rng.standard_normal((count, size)) + 5
    permuted = expected[rng.permutation(count)]
    return np.concatenate([np.ones((count, 1)), beside, previous, token, expected, permuted, mixed], 1)


def test_the_best_angle_is_that_of_a_search_over_least_squares():
    r, size = 3, 2
    x = columns()
    rivals = Rivals.of(torch.from_numpy(x.T @ x)[None], r, False)
    metric = torch.eye(size, dtype=torch.float64)[None]
    nuisance, token, expected, mixed = x[:, 1:6], x[:, 6:9], x[:, 9:12], x[:, -size:]

    def left(angle):
        inputs = np.concatenate([nuisance, np.cos(angle) * token - np.sin(angle) * expected], 1)
        return np.square(mixed - LinearRegression().fit(inputs, mixed).predict(inputs)).sum()

    best = minimize_scalar(left, bounds=(0.2, 1.0), method="bounded", options={"xatol": 1e-9}).x
    assert float(rivals.best_angle(metric)) == pytest.approx(best, abs=1e-4)
    assert np.tan(best) == pytest.approx(0.7, abs=0.05)


def of_folds(folds=4, heads=1, **changes):
    """The columns of each fold and head ``[K][H]``, and their sums ``[K, H, F, F]``."""
    each = [[columns(10 * head + fold, **changes) for head in range(heads)] for fold in range(folds)]
    return each, torch.from_numpy(np.stack([[x.T @ x for x in of] for of in each]))


def test_errors_are_those_of_least_squares_without_the_fold_and_a_further_one():
    r, size = 3, 2
    each, sums = of_folds(count=60)
    scores = score_layer(sums, torch.eye(size, dtype=torch.float64)[None], r)
    data = [of[0] for of in each]

    def left(x, angle, expected):
        mixture = np.cos(angle) * x[:, 6:9] - np.sin(angle) * x[:, expected]
        return np.concatenate([x[:, 1:6], mixture], 1)

    rivals = {
        "nuisances": lambda x, _: x[:, 1:6],
        "copying": lambda x, _: left(x, 0.0, slice(9, 12)),
        "free": lambda x, angle: left(x, angle, slice(9, 12)),
    }
    for fold in range(4):
        angle = scores.angle_without[fold, 0]
        for other in range(4):
            rest = np.concatenate([x for k, x in enumerate(data) if k not in (fold, other)])
            for name, inputs in rivals.items():
                plain = LinearRegression().fit(inputs(rest, angle), rest[:, -size:])
                error = np.square(data[fold][:, -size:] - plain.predict(inputs(data[fold], angle))).sum()
                assert getattr(scores, name)[fold, other, 0] == pytest.approx(error, rel=1e-6), name
            about = np.square(data[fold][:, -size:] - rest[:, -size:].mean(0)).sum()
            assert scores.total[fold, other, 0] == pytest.approx(about, rel=1e-9)


def test_intervals_of_gains_fit_all_maps_again_without_each_fold():
    """Maps of all folds share most tokens; a jackknife over the errors of single folds does not see it."""
    _, sums = of_folds(count=60)
    scores = score_layer(sums, torch.eye(2, dtype=torch.float64)[None], 3)
    found = error_transport.Estimates("error_transport", 4)
    error_transport.add_head(found, scores, 0, 0)
    rows = {quantity: (value, without) for quantity, *_, value, without in found.rows}
    parts = {"copying_gain": ("nuisances", "copying"), "error_gain": ("copying", "free"),
             "error_gain_null": ("copying", "null_free"), "error_gain_beyond_null": ("null_free", "free")}  # fmt: skip
    for quantity, names in parts.items():
        more, less = (getattr(scores, name)[..., 0] for name in names)
        value, without = rows[quantity]
        assert value == pytest.approx(np.trace(more - less) / np.trace(scores.total[..., 0]))
        for k in range(4):
            others = [j for j in range(4) if j != k]
            share = sum(more[j, k] - less[j, k] for j in others) / sum(scores.total[j, k, 0] for j in others)
            assert without[k] == pytest.approx(share), quantity


def test_a_head_that_takes_nothing_of_tokens_has_no_score():
    """The halves of the text then disagree on the map of tokens, in about one of two heads."""
    rng, r, size, heads = np.random.default_rng(0), 3, 2, 12
    sums = np.zeros((4, heads, 3 + 4 * r + size, 3 + 4 * r + size))
    for of in sums.reshape(-1, *sums.shape[2:]):
        x = np.concatenate([np.ones((50, 1)), rng.standard_normal((50, 2 + 4 * r + size))], 1)
        of += x.T @ x
    scores = score_layer(torch.from_numpy(sums), torch.eye(size, dtype=torch.float64).repeat(heads, 1, 1), r)
    undefined = np.isnan(scores.score)
    assert 0 < undefined.sum() < heads
    assert np.abs(scores.score[~undefined]).max() < 1
    assert (np.isnan(scores.cosine) | ~undefined).all()
    found = error_transport.Estimates("error_transport", 4)
    error_transport.add_head(found, scores, 0, int(undefined.argmax()))
    row = found.done().frame().set_index("quantity").loc["error_score"]
    assert np.isnan(row["value"])
    assert "cannot be told from zero" in row["reason"]


@pytest.mark.slow
def test_intervals_of_gains_cover_as_often_as_they_say():
    """Few tokens and a gain of half a percent: over folds alone, intervals cover it in 88 % of the texts."""
    heads, r, size = 200, 6, 3
    rng, shape = np.random.default_rng(1), np.random.default_rng(7).standard_normal((2, r, size)) / r**0.5
    sums = np.zeros((8, heads, 3 + 4 * r + size, 3 + 4 * r + size))
    for head in range(heads):
        for document in range(32):
            previous, token, rest = rng.standard_normal((3, 12, r))
            expected = 0.5 * token + 0.3 * previous + 0.8 * rest
            noise = np.exp(0.7 * rng.standard_normal()) * rng.standard_normal((12, size))
            mixed = 0.3 * (token - expected) @ shape[0] + 0.5 * previous @ shape[1] + noise
            order = rng.permutation(12)
            x = [np.ones((12, 1)), rng.random((12, 2)), previous, token, expected, expected[order], mixed]
            of = np.concatenate(x, 1)
            sums[document % 8, head] += of.T @ of
    scores = score_layer(torch.from_numpy(sums), torch.eye(size, dtype=torch.float64).repeat(heads, 1, 1), r)
    found = error_transport.Estimates("error_transport", 8)
    for head in range(heads):
        error_transport.add_head(found, scores, 0, head)
        top, total = (scores.copying - scores.free)[..., head], scores.total[..., head]
        found.share("over folds alone", np.diag(top), np.diag(total), layer=0, other=head)
    frame = found.done().frame()
    covered = {}
    for quantity in ("copying_gain", "error_gain", "error_gain_null", "error_gain_beyond_null", "over folds alone"):
        rows = frame[frame["quantity"] == quantity].astype({"value": float})
        truth = rows["value"].mean()
        covered[quantity] = ((rows["ci_low"] <= truth) & (truth <= rows["ci_high"])).mean()
    assert covered.pop("over folds alone") < 0.92
    assert min(covered.values()) > 0.92


def test_the_null_takes_the_permuted_columns_and_nothing_else():
    kept = columns_kept(3 + 4 * 3 + 2, 3, True).tolist()
    assert kept == [*range(9), 12, 13, 14, 15, 16]
    assert columns_kept(17, 3, False).tolist() == [*range(12), 15, 16]


@pytest.mark.parametrize(("beta", "sign"), [(0.7, 1), (-0.7, -1)])
def test_alignment_is_the_cosine_of_what_is_made_of_expectations_and_of_tokens(beta, sign):
    halves = [torch.from_numpy(x.T @ x)[None] for x in (columns(1, 4000, beta=beta), columns(1, 4000, beta=beta))]
    metric = torch.eye(2, dtype=torch.float64)[None]
    aligned = Alignment.of((halves[0], halves[1]), 3, metric)
    assert float(aligned.cosine()) == pytest.approx(sign, abs=0.01)
    assert np.sign(float(aligned.score())) == sign
    # Three directions: chance alone has all three signs right once in eight.
    assert float(aligned.p_values()[0]) == pytest.approx(0.125 if sign > 0 else 1.0, abs=0.01)


@pytest.mark.parametrize("threads", [1, 2])
def test_many_directions_are_solved_with_any_number_of_threads(threads):
    """torch's batched LU fails with two threads of MKL from some 200 columns on; numpy's solution is the reference."""
    torch.set_num_threads(threads)
    random = torch.Generator().manual_seed(0)
    root, right = (torch.randn(3, 256, n, generator=random, dtype=torch.float64) for n in (300, 5))
    covariance = root @ root.mT / 300
    expected = np.linalg.solve(damped(covariance).numpy(), right.numpy())
    np.testing.assert_allclose(solve_damped(covariance, right).numpy(), expected, rtol=1e-6, atol=1e-8)
