"""The benchmark of many windows against many positions of each: its windows, its lenses, and what it compares."""

import json

import numpy as np
import pandas as pd
import pytest
import typer
from helpers.pretrained import save_model
from helpers.suites import write_texts
from typer.testing import CliRunner

from benchmarks.speed import positions
from benchmarks.speed.positions import Bench, Drawing, Setting, in_place_of, windows_of
from lensbench.data.tokens import TokenizedDocument
from lensbench.data.windows import sample_windows
from lensbench.errors import LensbenchError
from lensbench.lenses.fit import fit_some
from lensbench.lenses.per_layer import OWN
from lensbench.lenses.planning import FitContext
from lensbench.lenses.recipe import FitRecipe
from lensbench.measures.update import decompose, index_estimates
from lensbench.measures.update.summary import pair_weights
from lensbench.streams.capture import capture
from lensbench.studies.synthetic import Shape, SyntheticStream
from lensbench.suite.changes import Changes

LENGTH, FIT = 64, 768
GIVEN = {
    "fit.dev_sequences": 40, "fit.dev_positions": 8, "evaluate.sequences": 60, "evaluate.max_share": 0.1,
    "evaluate.positions": 4, "evaluate.length": LENGTH, "fit.sequences": FIT // 8, "fit.positions": 8,
}  # fmt: skip
SET = tuple(f"{key}={value}" for key, value in GIVEN.items())


def documents(lengths, clusters=70):
    random = np.random.default_rng(0)
    return [
        TokenizedDocument(f"c{k % clusters}/{k}", random.integers(0, 50, n).astype(np.int32), np.ones(n, np.int32))
        for k, n in enumerate(lengths)
    ]


def drawn(texts, tokens, number, draw=0):
    return windows_of(
        texts, tokens, number, split="fit", draw=draw, length=LENGTH, max_share=0.05, turns="cluster", first_position=1
    )


@pytest.mark.parametrize("number", [1, 7, 8, 31, 62])
def test_windows_hold_as_many_tokens_whatever_their_positions_and_lengths(number):
    texts = documents(np.random.default_rng(1).integers(40, 400, 140))
    windows = drawn(texts, 400, number)
    assert windows.valid.sum() == 400
    assert windows.valid.sum(1).max() <= number
    assert windows.valid.any(1).all()
    # One window fewer would not do.
    assert windows.valid[:-1].sum() < 400
    ids, row, at = windows.scored(slice(None))
    assert (at + 1 < windows.lengths[row]).all()
    assert (windows.targets(slice(None)) == ids[row, at + 1]).all()
    assert (windows.next_bytes > 0).sum() == 400
    # Where a window has fewer positions, the last of them stands for the others.
    assert (np.diff(windows.positions, axis=1) >= 0).all()
    assert (windows.positions <= np.where(windows.valid, windows.positions, 0).max(1, keepdims=True)).all()


def test_windows_are_those_that_a_suite_draws():
    texts = documents([300] * 140)
    ours = drawn(texts, 40 * 8, 8)
    theirs = sample_windows(texts, n_sequences=40, length=LENGTH, positions=8, seed=1, max_share=0.05, turns="cluster")
    assert ours.fingerprint == theirs.fingerprint
    assert drawn(texts, 40 * 8, 8, draw=1).fingerprint != theirs.fingerprint
    assert len(set(ours.clusters)) == len(ours)


def test_a_text_with_too_few_tokens_is_refused():
    with pytest.raises(LensbenchError, match=r"split fit has \d+ tokens at 8 positions of each window, and 9,999 are"):
        drawn(documents([100] * 30), 9_999, 8)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with texts and a model of three layers, neither of which a test changes."""
    folder = tmp_path_factory.mktemp("positions")
    texts = write_texts(folder / "texts")
    save_model(folder / "model", "llama", texts, 300, num_hidden_layers=3)
    return folder


def started(place, out, *options):
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(positions.main)
    arguments = ["--model", f"path:{place / 'model'}", "--text", f"file:{place / 'texts'}", "--out", str(out)]
    arguments += [word for change in SET for word in ("--set", change)]
    return CliRunner().invoke(app, [*arguments, *options])


def test_lenses_are_the_suites_own(place):
    """Their held-out KL is that of the closed form that a run fits to the same windows."""
    suite = Changes(None, (f"path:{place / 'model'}",), f"file:{place / 'texts'}", settings=SET).of("pretrained")
    bench = Bench.of(Drawing.of(suite), layers=3, scored=2, refits=2)
    row, sums = bench.measured(Setting(FIT, 8, 4))
    samples = bench.drawing.texts.samples
    fit = capture(bench.stream, samples(**suite.fit.of_fit))
    assert len(fit) == FIT
    dev = capture(bench.stream, samples(**suite.fit.of_dev))
    held_out = capture(bench.stream, samples("eval", 60, 4, share=suite.evaluate.max_share, turns="cluster"))
    readout = bench.stream.readout
    lenses = fit_some(FitContext.of(readout, fit, dev, suite.fit, seed=0), [OWN])[OWN]
    log_p = readout(held_out.states[-1]).double().log_softmax(-1)
    kls = []
    for layer in (0, 2):
        log_q = readout(lenses.maps.read(layer, held_out.states[layer])).double().log_softmax(-1)
        kls.append((log_p.exp() * (log_p - log_q)).sum(-1).mean().item())
    assert bench.scored == (0, 2)
    assert row["kl"] == pytest.approx(np.mean(kls), rel=1e-4)
    assert sums["kl"].sum() / len(held_out) == pytest.approx(row["kl"])
    assert row["forward_tokens"] == FIT // 8 * LENGTH
    assert row["effective_clusters"] <= row["clusters"] <= row["documents"] <= row["windows"] == FIT // 8


@pytest.mark.slow
def test_rows_are_compared_within_a_draw_and_over_draws_and_are_not_measured_again(place, tmp_path, monkeypatch):
    options = ["--positions", "8,32", "--eval-positions", "4,16", "--layers", "3", "--scored", "2", "--refits", "2"]
    result = started(place, tmp_path, "--draws", "2", *options)
    assert result.exit_code == 0, result.output
    table = pd.read_csv(tmp_path / "positions.csv")
    by_fit = table[table["eval_positions"] == 4].set_index(["positions", "draw"])
    assert sorted(by_fit.index) == [(8, 0), (8, 1), (32, 0), (32, 1)]
    kl = by_fit["kl"]
    assert by_fit["windows"].loc[32].max() < by_fit["windows"].loc[8].min() / 2
    for draw in (0, 1):
        assert by_fit["difference"][32, draw] == pytest.approx(kl[32, draw] - kl[8, draw], abs=1e-5)
        assert np.isnan(by_fit["difference"][8, draw])
    for number in (8, 32):
        assert by_fit["redrawn"][number, 1] == pytest.approx(kl[number, 1] - kl[number, 0], abs=1e-5)
        assert np.isnan(by_fit["redrawn"][number, 0])
    assert (table["kl_ci_low"] < table["kl"]).all()
    assert (table["kl"] < table["kl_ci_high"]).all()
    assert table["eval_windows"].nunique() == 2

    means = pd.read_csv(tmp_path / "positions-mean.csv").set_index(["positions", "eval_positions"])
    row = means.loc[32, 4]
    assert row["draws"] == 2
    assert row["difference"] == pytest.approx((kl[32] - kl[8]).mean(), abs=1e-5)
    assert row["difference_ci_low"] < row["difference"] < row["difference_ci_high"]
    # Student's t of one degree of freedom.
    apart = abs(by_fit["difference"][32, 0] - by_fit["difference"][32, 1])
    assert row["difference_draws_high"] - row["difference"] == pytest.approx(12.7062 * apart / 2, rel=1e-3)
    assert row["kl_sd"] == pytest.approx(kl[32].std(), rel=1e-3)

    before = (tmp_path / "positions.csv").read_bytes()
    monkeypatch.setattr(Bench, "measured", lambda *_: pytest.fail("measured again"))
    assert started(place, tmp_path, "--draws", "2", *options).exit_code == 0
    assert (tmp_path / "positions.csv").read_bytes() == before
    described = json.loads((tmp_path / "positions.json").read_text())
    assert set(described["tables"]) == {"positions.csv", "positions-mean.csv", "positions-documents.parquet"}
    assert str(place) not in json.dumps(described)


def test_half_widths_are_of_the_decompositions_own_interval():
    stream = SyntheticStream("fresh", Shape(d=24, layers=5, vocab=40), seed=0)
    fit = stream.capture(2000, seed=1)
    dev, held_out = (stream.capture(n, seed=k, constant=fit.mean_p) for k, n in ((2, 800), (3, 1500)))
    recipe = FitRecipe(ridges=(1e-2, 1.0, 100.0), pads=(0.0, 0.3))
    found = decompose(stream.readout, fit, dev, held_out, recipe, refits=3, readable=False, normed=False)
    row = in_place_of(found)
    index = index_estimates(found)["in_place_without_layer0"]
    assert (row["in_place"], row["in_place_ci_low"], row["in_place_ci_high"]) == (index.value, index.low, index.high)
    assert row["half_width"] == (index.high - index.low) / 2
    passed = np.array([i > 0 and not gate for i, gate in zip(found.pairs[0], found.gate, strict=True)])
    assert row["pairs_passed"] == passed.sum() > 0
    weights = pair_weights(found, passed)
    # Student's t of two degrees of freedom.
    again = found.refits.carried[:, passed] @ weights
    assert row["of_refits"] == pytest.approx(4.30265 * np.std(again, ddof=1), rel=1e-4)
    by_draw = np.sort(found.draws.carried[:, passed] @ weights)
    assert 2 * row["of_eval"] == pytest.approx(by_draw[974] - by_draw[25], rel=0.02)
    assert row["of_eval"] < row["half_width"]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--positions", "8,x"], "--positions is '8,x': give numbers"),
        (["--eval-positions", ""], "--eval-positions is ''"),
        (["--threads", "0"], "--threads is 0: at least 1"),
        (["--tokens", "999999"], "tokens at 32 positions of each window, and 999,999 are asked for"),
        (["--positions", "63"], "positions is 63: a window of 64 tokens has 62"),
        (["--set", "fit.sequence=3"], "fit.sequence"),
    ],
)
def test_bad_options_are_answered_in_one_line(place, tmp_path, options, line):
    answer = started(place, tmp_path / "out", *options)
    assert answer.exit_code == 2
    assert line in answer.output
    assert len(answer.output.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
