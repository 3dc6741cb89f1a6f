"""The table of lenses between models, against means and jackknives written out."""

import io
import itertools

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from scipy import stats

from lensbench.measures.between import AFFINE, NONE, ORTHOGONAL, OWN_HEAD, READINGS, STATES_HEAD, Between, Reading
from lensbench.report.between_tables import between_rows_table
from lensbench.report.figures.between import between_figure, panels_of
from lensbench.results.between import LATER, NO_NULL_PENALTY, MeasuredPair, between_table

S = 80
HEADS = (OWN_HEAD, STATES_HEAD)


def pair(
    kind="seeds", lens=("gpt", 0, 100), states=("gpt", 1, 100), *, level=1.0, maps=(ORTHOGONAL,), heads=(OWN_HEAD,)
):
    """A pair of two layers whose sums are drawn about known means: own 1, through 1 + level, null 3, same 1.5, per token."""
    rng = np.random.default_rng(abs(hash((lens, states))) % 2**32)
    readings = [Reading(m, h, j, j) for j in (0, 1) for h in heads for m in maps]
    tokens = rng.integers(3, 9, S).astype(float)
    centre = {"own": 1.0, "through": 1 + level, "null": 3.0, "same_tokens": 1.5}
    sums = {
        f"{loss}_{name}": tokens * (centre[name] + 0.05 * rng.standard_normal((len(readings), S)))
        for loss in ("kl", "ce")
        for name in READINGS
    }
    facts = {"kind": kind}
    for role, (model, seed, trained) in (("lens", lens), ("states", states)):
        facts |= {f"{role}_model": model, f"{role}_seed": seed, f"{role}_tokens": trained}
    if NONE in maps:
        for loss in ("kl", "ce"):
            sums[f"{loss}_null"][:] = np.nan
    ridge = [0.1 if r.map == AFFINE else np.nan for r in readings]
    return MeasuredPair(facts, Between(readings, ridge, sums), tokens, np.array([f"d{k // 2}" for k in range(S)]))


def test_penalties_are_differences_per_token_and_the_share_is_of_the_null():
    it = pair(level=0.4)
    table = between_table([it], 400)
    sums, n = it.found.sums, it.tokens.sum()
    for layer in (0, 1):
        row = table[table["states_layer"] == layer].iloc[0]
        own, through, null = (sums[f"kl_{name}"][layer].sum() / n for name in ("own", "through", "null"))
        assert row["penalty"] == pytest.approx(through - own)
        assert row["null_penalty"] == pytest.approx(null - own)
        assert row["saved"] == pytest.approx(null - through)
        assert row["shared"] == pytest.approx(1 - (through - own) / (null - own))
        assert row["penalty_ci_low"] < row["penalty"] < row["penalty_ci_high"]
        assert (row["clusters"], row["tokens"]) == (40, n)
        assert "only 39" in row["note"] or "only 3" in row["note"]
    later = table[table["states_layer"] == LATER].iloc[0]
    assert later["penalty"] == pytest.approx(table[table["states_layer"] == 1]["penalty"].iloc[0])


def test_intervals_are_of_paired_differences():
    """What all readings of a window have in common drops out of a difference."""
    it = pair(level=0.4)
    loud = np.random.default_rng(1).standard_normal(S) * 20
    for name in ("own", "through", "null", "same_tokens"):
        it.found.sums[f"kl_{name}"] += loud
    row = between_table([it], 400).iloc[0]
    assert row["penalty_ci_high"] - row["penalty_ci_low"] < 0.1
    assert row["own_kl_ci_high"] - row["own_kl_ci_low"] > 0.5


def test_means_over_pairs_of_seeds_have_a_jackknife_that_leaves_out_a_seed():
    values = {(a, b): 0.2 + 0.1 * (a + 2 * b) / 3 for a, b in itertools.permutations(range(3), 2)}
    pairs = [pair(lens=("gpt", a, 9), states=("gpt", b, 9), level=v) for (a, b), v in values.items()]
    table = between_table(pairs, 50)
    row = table[(table["lens_seed"] == "all") & (table["states_layer"] == 1)].iloc[0]
    single = table[(table["lens_seed"] != "all") & (table["states_layer"] == 1)]
    assert row["penalty"] == pytest.approx(single["penalty"].mean())
    without = np.array(
        [single[(single["lens_seed"] != s) & (single["states_seed"] != s)]["penalty"].mean() for s in range(3)],
        dtype=float,
    )
    spread = np.sqrt(2 / 3 * np.square(without - without.mean()).sum())
    reach = stats.t.ppf(0.975, 2) * spread
    assert row["penalty_ci_low"] == pytest.approx(row["penalty"] - reach)
    assert row["penalty_ci_high"] == pytest.approx(row["penalty"] + reach)
    two = between_table([pair(), pair(lens=("gpt", 1, 100), states=("gpt", 0, 100))], 50)
    mean = two[two["lens_seed"] == "all"].iloc[0]
    assert pd.isna(mean["penalty_ci_low"])
    assert "3 are needed" in mean["note"]


def test_means_of_the_same_seeds_have_students_t():
    pairs = [pair("sizes", ("small", s, 9), ("large", s, 9), level=0.1 * (s + 1), maps=(AFFINE,)) for s in range(3)]
    table = between_table(pairs, 50)
    row = table[(table["lens_seed"] == "all") & (table["states_layer"] == LATER)].iloc[0]
    single = table[(table["lens_seed"] != "all") & (table["states_layer"] == LATER)]["penalty"].astype(float)
    half = stats.t.ppf(0.975, 2) * single.std(ddof=1) / 3**0.5
    assert row["penalty_ci_high"] - row["penalty"] == pytest.approx(half)


def test_without_a_null_there_is_no_share_and_a_null_without_penalty_says_so():
    row = between_table([pair("training", ("gpt@1", 0, 1), ("gpt", 0, 9), maps=(NONE,))], 50).iloc[0]
    assert pd.isna(row["null_penalty"])
    assert pd.isna(row["shared"])
    assert NO_NULL_PENALTY not in row["note"]
    it = pair()
    it.found.sums["kl_null"] = it.found.sums["kl_own"].copy()
    row = between_table([it], 50).iloc[0]
    assert pd.isna(row["shared"])
    assert NO_NULL_PENALTY in row["note"]


def test_the_figure_has_a_matrix_over_time_and_a_panel_for_each_two_models_and_map(tmp_path):
    tokens = {"gpt@10": 10, "gpt@40": 40, "gpt": 160}
    pairs = [
        pair("training", (a, 0, tokens[a]), (b, 0, tokens[b]), level=tokens[a] / tokens[b], maps=(NONE,), heads=HEADS)
        for a, b in itertools.permutations(tokens, 2)
    ]
    pairs.append(pair("sizes", ("small", 0, 9), ("large", 0, 9), maps=(AFFINE,)))
    table = between_table(pairs, 50)
    table.to_csv(tmp_path / "between.csv", index=False)
    again = pd.read_csv(tmp_path / "between.csv")
    names = [name for name, _ in panels_of(again)]
    assert names == ["over training: gpt", "sizes: small on large, affine"]
    drawing = between_figure(again)
    assert isinstance(drawing, Figure)
    numbers = {text.get_text() for panel in drawing.axes for text in panel.texts}
    assert len(numbers) >= 4, "the cells of the matrix have their numbers"
    # Lens of 40 tokens on the states of 160: made at 40 / 160, mean over layers from 1 on.
    cost = again.query("lens_tokens == 40 and states_tokens == 160 and head == 'states' and states_layer == 'later'")
    title = "A lens fitted after 40 of 160 training tokens costs {:.2g} nats/token at the end"
    assert drawing.get_suptitle().replace("\n", " ") == title.format(float(cost["penalty"].iloc[0]))
    assert "Bars:" in drawing.get_supxlabel()
    heatmaps = [panel.collections[0] for panel in drawing.axes if panel.get_title().startswith("over training")]
    assert len(heatmaps) == 1
    shown = between_rows_table(again)
    assert shown.row_count == 6 * 2 + 1


def figure_of(*pairs):
    return between_figure(pd.read_csv(io.StringIO(between_table(list(pairs), 50).to_csv(index=False))))


def test_matrices_share_their_colours_and_their_caption_names_no_bars():
    both = [
        pair("training", (f"{m}@{a}", 0, a), (f"{m}@{b}", 0, b), level=level, maps=(NONE,), heads=HEADS)
        for m, level in (("gpt", 2.0), ("pc", 0.1))
        for a, b in ((10, 40), (40, 10))
    ]
    drawing = figure_of(*both)
    limits = {panel.collections[0].get_clim() for panel in drawing.axes if panel.get_title()}
    assert len(limits) == 1, "one colour bar stands for all"
    assert "Bars" not in drawing.get_supxlabel()
    assert "(gpt)" in drawing.get_suptitle()
    assert "(pc)" in drawing.get_suptitle()


def test_without_a_training_the_title_counts_the_layers_at_which_the_map_helps():
    drawing = figure_of(pair("sizes", ("small", 0, 9), ("large", 0, 9), maps=(AFFINE,)))
    title = " ".join(drawing.get_suptitle().split())
    assert "a lens surely reads another model better than by a random pairing at" in title
    assert "Over training" not in drawing.get_supxlabel()
