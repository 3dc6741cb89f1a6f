"""Visibility of predictions: seen where a stream keeps them, not where it holds the two tokens alone."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.planted import D, L, V, planted, subject_of, text

from lensbench.data.ngram import KneserNeyBigram
from lensbench.probes.registry import PROBES
from lensbench.probes.tools.predictions import BigramPredictions, Directions, MeansByToken, after, batches
from lensbench.streams.stream import ResidualStream


class Kept(ResidualStream):
    """A stream whose states are replaced: tokens alone, and with the last prediction or surprise mixed in by layer."""

    amount = (0.0, 0.0, 0.0, 0.0)
    what = "prediction"

    def forward(self, ids):
        states, logits = super().forward(ids)
        p = logits.softmax(-1)
        kept = after(p @ self.readout.weight)
        if self.what == "surprise":
            nats = -p.log()[:, :-1].gather(-1, ids[:, 1:, None])
            kept = torch.nn.functional.pad(nats, (0, 0, 1, 0)) * torch.linspace(-1, 1, D)
        table = self.model.get_input_embeddings().weight.detach()
        tokens = table[ids] + after(table[ids]).roll(1, -1)
        noise = torch.randn(states.shape, generator=torch.Generator().manual_seed(int(ids.sum())))
        return torch.stack([tokens + a * kept + 0.1 * n for a, n in zip(self.amount, noise, strict=True)]), logits


def frame_of(amount, what="prediction", seed=0):
    stream = Kept(planted("none", seed=seed))
    stream.amount, stream.what = amount, what
    return PROBES["prediction_visibility"].measure(subject_of(stream.model, seed, stream=stream)).frame()


def by_layer(frame, quantity, column="value"):
    rows = frame[frame["quantity"] == quantity]
    return rows.set_index("layer")[column].astype(float)


def test_a_kept_prediction_is_seen_and_two_tokens_are_not():
    frame = frame_of((0.0, 0.3, 1.0, 3.0))
    gain, low, high = (by_layer(frame, "prediction_gain", c) for c in ("value", "ci_low", "ci_high"))
    assert low[0] <= 0.005
    assert gain[0] < 0.01
    assert (np.diff(gain) > 0).all()
    assert (low[1:] > 0).all()
    assert (low < gain).all()
    assert (gain < high).all()
    assert by_layer(frame, "prediction_r2")[3] > 0.93
    rest = by_layer(frame, "prediction_gain_of_rest")[3]
    base = float(frame.set_index("quantity").loc["prediction_baseline_r2", "value"])
    assert rest == pytest.approx(gain[3] / (1 - base), rel=1e-6)
    assert 0 < base < 0.9


def test_a_kept_surprise_is_seen():
    frame = frame_of((0.0, 0.0, 1.0, 3.0), "surprise")
    gain = by_layer(frame, "surprise_gain")
    assert abs(gain[0]) < 0.05
    assert gain[2] > 0.2
    assert gain[3] > gain[2]


def test_the_last_state_of_a_model_shows_its_next_prediction():
    frame = PROBES["prediction_visibility"].measure(subject_of(planted("none"))).frame()
    r2 = by_layer(frame, "expectation_r2")
    assert len(r2) == L + 1
    assert r2[L] > r2[0]
    assert r2[L] > 0.5


def test_means_by_token_are_interpolated_as_said():
    ids, previous = torch.tensor([1, 1, 2, 2, 1]), torch.tensor([0, 0, 0, 3, 3])
    values = torch.tensor([[1.0], [3.0], [5.0], [7.0], [9.0]])
    means = MeansByToken.of(ids, previous, values, 4)
    mean = 5.0
    token = (1 + 3 + 9 + 2 * mean) / 5
    before = (1 + 3 + 5 + 2 * mean) / 5
    pair = (1 + 3 + 2 * before) / 4
    found = means.at(torch.tensor([1, 2]), torch.tensor([0, 1]))
    torch.testing.assert_close(found[0], torch.tensor([token, pair]))
    torch.testing.assert_close(found[1, 1], torch.tensor(mean))  # a pair and a token that never came


def test_bigram_expectations_are_those_of_its_distribution():
    windows = text(3, 32)
    bigram = KneserNeyBigram.fit(windows.ids.ravel(), V)
    rows = torch.randn(V, 5, generator=torch.Generator().manual_seed(0))
    found = BigramPredictions(bigram, SimpleNamespace(rows=rows))
    for token in (0, 7, 96):
        expected = bigram.distribution(token) @ rows.double().numpy()
        np.testing.assert_allclose(found.expected[token].numpy(), expected, atol=1e-5)
    ids = torch.from_numpy(windows.ids[:2])
    assert float(found.surprise(ids)[0, 0]) == 0
    nats = -np.log(bigram.distribution(int(ids[1, 4]))[int(ids[1, 5])])
    assert float(found.surprise(ids)[1, 5]) == pytest.approx(nats, rel=1e-5)


def test_batches_hold_what_the_model_expects_and_is_surprised_by():
    stream, windows = ResidualStream(planted("none")), text(0, 20)
    directions = Directions.of(stream, windows)
    assert directions.share == pytest.approx(1, abs=1e-6)
    assert directions.rows.shape == (V, D)
    parts = list(batches(stream, windows, directions))
    assert sum(len(b.ids) for b in parts) == 20
    with torch.no_grad():
        p = stream.model(parts[0].ids).logits.softmax(-1)
    weight = stream.readout.weight
    torch.testing.assert_close(parts[0].expected, directions.seen(p @ weight), rtol=1e-3, atol=1e-4)
    ids = parts[0].ids
    nats = -p[2, 6, ids[2, 7]].log()
    torch.testing.assert_close(parts[0].surprise[2, 7], nats, rtol=1e-3, atol=1e-5)
