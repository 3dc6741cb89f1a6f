"""Trends per doubling against closed forms and plain loops, on tables made up of known slopes."""

import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from lensbench.report import slopes, trends
from lensbench.report.figures.trends import FIGURE_OVER, headline_frame, trend_panels
from lensbench.report.series import PARAMETERS, TOKENS, Series, points_of, series_of, values_of
from lensbench.results.folder import Run
from lensbench.results.further import FURTHER
from lensbench.results.schema import SCHEMA, no_rows


def run_of(models: dict[str, dict], values: dict[tuple[str, int], dict[str, float]], reach: float = 0.1) -> Run:
    """A run of made-up tables: model -> columns of ``models.csv``, (model, seed) -> index -> value."""
    rows = [{"model": m, "seed": s, "ce": v["ce"], "ce_ci_low": v["ce"] - reach, "ce_ci_high": v["ce"] + reach, **models[m]}
            for (m, s), v in values.items()]  # fmt: skip
    indices = [
        {"model": m, "seed": s, "index": name, "value": value, "ci_low": value - reach, "ci_high": value + reach}
        for (m, s), found in values.items() for name, value in found.items() if name != "ce"
    ]  # fmt: skip
    tables = {name: no_rows(name) for name in SCHEMA}
    tables["models.csv"] = pd.DataFrame(rows).reindex(columns=list(SCHEMA["models.csv"]))
    tables["indices.csv"] = pd.DataFrame(indices).reindex(columns=list(SCHEMA["indices.csv"]))
    return Run(None, None, tables)


TRAINED = {f"gpt@{t}": {"train_tokens": t, "parameters": 900} for t in (0, 1000, 4000)} | {
    "gpt": {"train_tokens": 8000, "parameters": 900}, "other": {"train_tokens": 8000, "parameters": 900},
}  # fmt: skip
SLOPES = {0: 0.10, 1: 0.13, 2: 0.08}


def trained(seeds=(0, 1, 2)) -> Run:
    values = {}
    for seed in seeds:
        for model, facts in TRAINED.items():
            x = math.log2(max(facts["train_tokens"], 1))
            values[model, seed] = {"ce": 9.0 - 0.2 * x, "in_place_without_layer0": SLOPES[seed] * x, "movement": 0.5}
    return run_of(TRAINED, values)


def table_of(run: Run, monkeypatch, **asked) -> pd.DataFrame:
    monkeypatch.setattr(trends, "read_distinct", lambda _: [run])
    monkeypatch.setattr(trends, "compared_models", lambda *_: [])
    return trends.trends_of(["x"], **asked).table.set_index(["over", "series", "index"])


def test_series_are_checkpoints_with_their_model_and_names_that_differ_in_a_size():
    sizes = {f"gpt-conv-{s}": 1000 * n for s, n in (("64k", 64), ("16k", 16), ("250k", 250))}
    sizes |= {
        "pc-64k+state": 64_000,
        "pc-16k+state": 16_000,
        "pythia-1.4b": 1e9,
        "pythia-70m": 7e7,
        "gpt": 5,
        "alone-3m": 7,
    }
    models = pd.DataFrame(
        [{"model": m, "parameters": p, "train_tokens": None} for m, p in sizes.items()]
        + [{"model": m, **facts} for m, facts in TRAINED.items() if m.startswith("gpt@")]
        + [{"model": f"hub@step{k}", "parameters": 9, "train_tokens": t} for k, t in ((1, 7e9), (2, 2e9), (3, None))]
    )
    found = {(s.over, s.name): list(s.models) for s in series_of(models, [["pythia-70m", "gpt-conv-16k"]])}
    assert found == {
        (TOKENS, "gpt"): ["gpt@1000", "gpt@4000"],
        (TOKENS, "hub"): ["hub@step2", "hub@step1"],
        (PARAMETERS, "gpt-conv"): ["gpt-conv-16k", "gpt-conv-64k", "gpt-conv-250k"],
        (PARAMETERS, "pc+state"): ["pc-16k+state", "pc-64k+state"],
        (PARAMETERS, "pythia"): ["pythia-70m", "pythia-1.4b"],
        (PARAMETERS, "pythia-70m, gpt-conv-16k"): ["gpt-conv-16k", "pythia-70m"],
    }


def test_over_training_each_seed_has_a_slope_and_the_interval_is_students_t_over_them(monkeypatch):
    row = table_of(trained(), monkeypatch).loc[TOKENS, "gpt", "in_place_without_layer0"]
    slopes = list(SLOPES.values())  # the values lie on lines, so that a seed's least squares are its own slope
    mean, error = np.mean(slopes), np.std(slopes, ddof=1) / 3**0.5
    assert row["slope"] == pytest.approx(mean)
    assert [row["ci_low"], row["ci_high"]] == pytest.approx(stats.t.interval(0.95, 2, mean, error))
    assert row["p"] == pytest.approx(stats.ttest_1samp(slopes, 0).pvalue)
    assert (row["models"], row["seeds"], row["x_low"], row["x_high"]) == (3, 3, 1000, 8000)
    assert [row["first"], row["last"]] == pytest.approx([mean * math.log2(1000), mean * math.log2(8000)])


def test_weights_give_the_least_squares_slope():
    rng = np.random.default_rng(0)
    for _ in range(5):
        x, y = rng.normal(size=7), rng.normal(size=7)
        assert slopes.slope_weights(x) @ y == pytest.approx(stats.linregress(x, y).slope)


def test_p_is_corrected_by_holm_over_the_indices_of_a_series_alone(monkeypatch):
    table = table_of(trained(), monkeypatch)
    p = table.loc[(TOKENS, "gpt", "in_place_without_layer0"), "p"]
    # Of the two others, which are the same at every seed, nothing is tested: they count as a p of 1.
    assert table.loc[(TOKENS, "gpt", "in_place_without_layer0"), "p_holm"] == pytest.approx(min(1, 3 * p))
    assert "the same at every seed" in table.loc[(TOKENS, "gpt", "movement"), "note"]
    alone = table_of(trained(), monkeypatch, indices=["in_place_without_layer0"])
    assert list(alone["p_holm"]) == pytest.approx([p])


def test_a_title_counts_the_slopes_that_differ_from_none_after_correction_over_what_is_drawn(monkeypatch):
    """Intervals of the first and the last model overlap here; the slopes of the seeds do not leave any doubt."""
    run = trained()
    table = table_of(run, monkeypatch)
    share = table.loc[TOKENS, "gpt", "in_place_without_layer0"]
    assert share["p"] < 0.05 < share["p_holm"], "over all three indices"
    frame = headline_frame(run, TOKENS)
    assert frame.groupby("index")["p_holm"].first()["in_place_without_layer0"] == pytest.approx(2 * share["p"])
    assert 2 * share["p"] < 0.05, "over the two that are drawn"
    said = trend_panels(frame, TOKENS, ["ce", "in_place_without_layer0"]).get_suptitle().replace("\n", " ")
    assert said == "As training tokens double, of 1 series: added in place rises in 1"
    frame["p_holm"] = 0.06
    assert trend_panels(frame, TOKENS, ["ce"]).get_suptitle() == "Nothing surely changes as training tokens double"


def sized(counts: dict[str, int]) -> tuple[Run, list[np.ndarray]]:
    rng, models, values, drawn = np.random.default_rng(1), {}, {}, []
    for (model, seeds), size in zip(counts.items(), (16_000, 64_000, 256_000), strict=True):
        models[model] = {"parameters": size, "train_tokens": 1}
        drawn.append(0.1 * math.log2(size) + rng.normal(size=seeds))
        values |= {(model, s): {"ce": float(v)} for s, v in enumerate(drawn[-1])}
    return run_of(models, values), drawn


def test_over_sizes_seeds_are_separate_and_the_interval_is_welchs(monkeypatch):
    run, drawn = sized({"gpt-16k": 5, "gpt-64k": 5, "gpt-256k": 3})
    row = table_of(run, monkeypatch).loc[PARAMETERS, "gpt", "ce"]
    # x = 14, 16, 18 less 16, over 8: the middle one has no weight, and Welch's two-sample test over 4 doublings is left.
    test = stats.ttest_ind(drawn[2], drawn[0], equal_var=False)
    low, high = test.confidence_interval(0.95)
    assert row["slope"] == pytest.approx((drawn[2].mean() - drawn[0].mean()) / 4)
    assert [row["ci_low"], row["ci_high"]] == pytest.approx([low / 4, high / 4])
    assert row["p"] == pytest.approx(test.pvalue)


def test_a_size_of_one_seed_has_the_variance_of_the_others(monkeypatch):
    run, drawn = sized({"gpt-16k": 5, "gpt-64k": 4, "gpt-256k": 1})
    row = table_of(run, monkeypatch).loc[PARAMETERS, "gpt", "ce"]
    pooled = (4 * drawn[0].var(ddof=1) + 3 * drawn[1].var(ddof=1)) / 7
    error = (pooled * (1 / 5 + 1) / 16) ** 0.5
    assert row["ci_high"] - row["slope"] == pytest.approx(stats.t.ppf(0.975, 7) * error)
    assert "one seed of a size" in row["note"]


def test_of_one_seed_draws_over_documents_are_paired(monkeypatch):
    run, rng = trained((0,)), np.random.default_rng(2)
    shared, own = rng.normal(size=500), rng.normal(size=(4, 500)) / 100
    models = ["gpt@1000", "gpt@4000", "gpt"]
    alike = {"corpus": "c", "documents": ("d",), "tokens": np.ones(1), "bytes": np.ones(1)}
    compared = {
        (m, 0): SimpleNamespace(
            **alike, draws={"ce": 9 - 0.2 * math.log2(TRAINED[m]["train_tokens"]) + shared + own[k]}
        )
        for k, m in enumerate(models)
    }
    monkeypatch.setattr(trends, "read_distinct", lambda _: [run])
    monkeypatch.setattr(trends, "compared_models", lambda *_: [
        SimpleNamespace(model=m, seed=s, **vars(one)) for (m, s), one in compared.items()
    ])  # fmt: skip
    row = trends.trends_of(["x"]).table.set_index("index").loc["ce"]
    x = np.log2([1000, 4000, 8000])
    slopes = [np.polyfit(x, [compared[m, 0].draws["ce"][k] for m in models], 1)[0] for k in range(500)]
    assert [row["ci_low"], row["ci_high"]] == pytest.approx(np.percentile(slopes, [2.5, 97.5]))
    assert row["ci_high"] - row["ci_low"] < 0.05  # what all models share of a draw does not matter
    assert row["p"] < 1e-6
    assert row["note"] == "one seed: over documents"


def test_without_draws_the_models_own_intervals_count_as_independent(monkeypatch):
    row = table_of(trained((0,)), monkeypatch).loc[TOKENS, "gpt", "in_place_without_layer0"]
    x = np.log2([1000, 4000, 8000])
    reach = 0.1 / np.sqrt(np.square(x - x.mean()).sum())  # all have one half-width
    assert [row["ci_low"], row["ci_high"]] == pytest.approx([0.1 - reach, 0.1 + reach])
    assert row["p"] == pytest.approx(2 * stats.norm.sf(stats.norm.ppf(0.975) * 0.1 / reach))


def test_a_model_at_which_an_index_is_undefined_is_left_out_and_named(monkeypatch):
    run = trained()
    table = run.tables["indices.csv"]
    table.loc[(table["model"] == "gpt@1000") & (table["index"] == "movement"), "value"] = np.nan
    row = table_of(run, monkeypatch).loc[TOKENS, "gpt", "movement"]
    assert row["models"] == 2
    assert row["note"].startswith("undefined at gpt@1000")


def test_points_have_each_seed_and_the_mean_and_the_figure_draws_them():
    run = trained()
    points = points_of(values_of(run), [Series(TOKENS, "gpt", {"gpt@1000": 1000.0, "gpt": 8000.0})])
    means = points[(points["seed"] == "all") & (points["index"] == "in_place_without_layer0")]
    expected = np.mean(list(SLOPES.values())) * np.log2([1000, 8000])
    assert list(means["value"]) == pytest.approx(list(expected))
    frame = headline_frame(run, TOKENS)
    assert set(frame["index"]) == {"ce", "in_place_without_layer0"}
    assert headline_frame(run, PARAMETERS).empty
    drawing = trend_panels(frame, TOKENS, ["ce", "in_place_without_layer0"])
    lines = {line.get_label(): line for line in drawing.axes[1].lines}
    assert list(lines["gpt"].get_xdata()) == [1000, 4000, 8000]
    assert list(lines["gpt"].get_ydata()) == pytest.approx(
        list(np.mean(list(SLOPES.values())) * np.log2([1000, 4000, 8000]))
    )


def test_columns_of_both_tables_are_in_the_schema():
    assert list(FURTHER["trends.csv"]) == list(slopes.TREND_COLUMNS)
    assert list(FURTHER["trend_points.csv"]) == list(points_of(pd.DataFrame(), []).columns)
    assert set(FIGURE_OVER) == {TOKENS, PARAMETERS}


def test_tables_for_the_terminal_show_the_headlines(monkeypatch):
    monkeypatch.setattr(trends, "read_distinct", lambda _: [trained()])
    found = trends.trends_of(["x"])
    assert trends.shown_indices(found, [], everything=False) == ["ce", "in_place_without_layer0"]
    assert "movement" in trends.shown_indices(found, [], everything=True)
    (table,) = trends.trend_tables(found, ["in_place_without_layer0"])
    assert table.row_count == 1


def test_what_has_no_trend_is_told(monkeypatch):
    alone = run_of({"gpt": TRAINED["gpt"]}, {("gpt", 0): {"ce": 1.0}})
    monkeypatch.setattr(trends, "read_distinct", lambda _: [alone])
    with pytest.raises(trends.LensbenchError, match="no series of models"):
        trends.trends_of(["x"])
    monkeypatch.setattr(trends, "read_distinct", lambda _: [trained()])
    with pytest.raises(trends.LensbenchError, match="no run has an index 'movemnt'; did you mean 'movement'"):
        trends.trends_of(["x"], indices=["movemnt"])
    with pytest.raises(trends.LensbenchError, match="of one size"):
        trends.trends_of(["x"], named=[["other", "gpt"]])
    with pytest.raises(trends.LensbenchError, match="no run has a model 'gtp'"):
        trends.trends_of(["x"], named=[["gtp", "gpt"]])
