"""Every table from the sums it is made of, and its values from the fitted maps by definition."""

import itertools
from dataclasses import fields, replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.synthetic import DRAWS, HEADLINE, SMALL, deep, estimates_of, known, small, true_kl, true_kls, windows_of

from lensbench import statistics
from lensbench.errors import LensbenchError
from lensbench.lenses.pairs import PAIR_LENS
from lensbench.lenses.per_layer import MATRIX_LENSES, OWN
from lensbench.lenses.read import own_layer_sums
from lensbench.lenses.recipe import FitRecipe
from lensbench.lenses.refined import OWN_REFINED, SHARED_REFINED
from lensbench.lenses.shared import SHARED_BIAS_LENS, SHARED_LENS, SHARED_LOO_LENS
from lensbench.measures.evaluate import evaluate
from lensbench.measures.indices import INDICES
from lensbench.measures.means import Estimate, Means
from lensbench.measures.transfer import transfer_sums
from lensbench.report.terminal import doubts
from lensbench.results import tables
from lensbench.results.folder import Run, read_table, write_table
from lensbench.results.manifest import Manifest
from lensbench.results.schema import columns_of
from lensbench.results.sums import ClusterSums
from lensbench.statistics import interval, mean_with_interval
from lensbench.streams.kl import sum_by_window


def sums_by_document(values, windows):
    """[S, ...] sums by window to [documents, ...], by a loop."""
    out = np.zeros((len(windows.document_names), *values.shape[1:]))
    for s, document in enumerate(windows.documents):
        out[document] += values[s]
    return out


def of_pairs(values, layers, some):
    """Sums ``[..., pairs, 2]``, at the first and second layer of each, as a matrix with the layer read in its columns."""
    matrix = np.full((*values.shape[:-2], layers, layers), np.nan)
    for p, (a, b) in enumerate(itertools.combinations(some, 2)):
        matrix[..., b, a], matrix[..., a, b] = values[..., p, 0], values[..., p, 1]
    return matrix


def of_some(values, layers, some):
    """Sums ``[..., n]`` or ``[..., n, n]`` of some layers among those of all, NaN elsewhere."""
    n = values.ndim - 1
    whole = np.full((*values.shape[:1], *[layers] * n), np.nan)
    whole[np.ix_(range(len(values)), *[some] * n)] = values
    return whole


@pytest.mark.parametrize(("it", "some"), [(small, [0, 1, 2]), (deep, [0, 2, 4])])
def test_the_frame_reproduces_the_sums(it, some):
    it = it(0) if it is small else it()
    layers = it.stream.layers
    windows, scored = windows_of(it.held_out), it.scored
    sums = ClusterSums.of(it.frame)
    assert sums.documents == windows.document_names
    kl = {lens: sums_by_document(read.kl, windows) for lens, read in scored.lenses.items()}
    pairs = [
        of_pairs(kl[lens].reshape(-1, 3, 2), layers, some) for lens in (PAIR_LENS, *map(PAIR_LENS.of_view, (0, 1)))
    ]
    direct = {
        "constant": sums_by_document(scored.constant, windows),
        "transfer": sums_by_document(scored.matrix("kl"), windows),
        "transfer_ce": sums_by_document(scored.matrix("ce"), windows),
        "movement": sums_by_document(scored.matrix("movement"), windows),
        "own": kl[OWN], "shared": kl[SHARED_LENS],
        "shared_loo": of_some(kl[SHARED_LOO_LENS], layers, some),
        "pair": pairs[0], "pair_rotated": np.stack(pairs[1:], 1),
        "rotated": np.stack([kl[SHARED_LENS.of_view(k)] for k in range(2)], 1),
    }  # fmt: skip
    for name, lens in (("own_refined", OWN_REFINED), ("shared_refined", SHARED_REFINED)):  # without an update: no rows
        updated = any(it.fit.summary.records[lens].iterations)
        assert updated == (it.fit is small(0).fit)
        assert (lens in kl) == updated
        direct[name] = kl[lens] if updated else np.full_like(direct["own"], np.nan)
    assert set(direct) == {f.name for f in fields(Means)}
    for name, values in direct.items():
        np.testing.assert_allclose(getattr(sums.totals, name), values, rtol=1e-5, atol=1e-5, err_msg=name)
    top1 = sums_by_document(scored.matrix("top1"), windows)
    np.testing.assert_array_equal(sums.top1, top1)
    curve = {lens.tolerance_label: scored.lenses[lens] for lens in it.fit.summary.curve()}
    assert set(sums.curve) == set(curve) == {"0", "0.05", "0.1", "1se"}
    for tolerance, found in sums.curve.items():
        for name, values in zip(("kl", "movement"), found, strict=True):
            expected = of_some(
                sums_by_document(getattr(curve[tolerance], name).reshape(-1, 3, 3), windows), layers + 1, some
            )
            np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(sums.tokens, np.bincount(it.held_out.document))
    np.testing.assert_array_equal(sums.bytes, np.bincount(it.held_out.document, weights=it.held_out.target_bytes))


def test_the_frame_does_not_depend_on_the_order_of_its_rows_or_on_parquet(tmp_path):
    it = small(0)
    it.frame.to_parquet(tmp_path / "frame.parquet", index=False)
    shuffled = pd.read_parquet(tmp_path / "frame.parquet").sample(frac=1, random_state=0)
    a, b = ClusterSums.of(it.frame), ClusterSums.of(shuffled)
    assert a.documents == b.documents
    for (name, x), (_, y) in zip(a.totals.items(), b.totals.items(), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6, err_msg=name)


RECIPE = FitRecipe()


@cache
def two_seeds():
    return tables.tables([small(0).part("it", 0), small(1).part("it", 1)], draws=DRAWS)


@cache
def of_deep():
    return tables.tables([deep().part("it", 0)], draws=DRAWS)


def test_tables_have_the_columns_of_the_schema_and_survive_writing(tmp_path):
    for name, table in two_seeds().items():
        assert set(table.columns) == set(columns_of(name, table)), name
        write_table(tmp_path, name, table)
        assert len(read_table(tmp_path / name)) == len(table)


def test_errors_of_jacobian_lenses_of_earlier_tables_are_read_by_the_norm_of_j(tmp_path):
    table = two_seeds()["lenses.csv"].drop(columns="jacobian_error", errors="ignore")
    stated = [0.6, 0.0, 1.0, np.nan]
    rows = table.head(4).assign(relative_error=stated)
    rows.to_csv(tmp_path / "lenses.csv", index=False)
    read = read_table(tmp_path / "lenses.csv")
    assert "relative_error" not in read
    assert np.allclose(read["jacobian_error"], [0.75, 0.0, np.inf, np.nan], equal_nan=True)
    write_table(tmp_path, "lenses.csv", read)
    assert np.allclose(read_table(tmp_path / "lenses.csv")["jacobian_error"], read["jacobian_error"], equal_nan=True)


def test_every_lens_has_a_row_at_every_layer_it_is_meant_for():
    lenses = two_seeds()["lenses.csv"]
    one = lenses[lenses["seed"] == 0]
    found = {key: sorted(rows["layer"]) for key, rows in one.groupby(["model", "lens", "stage", "prior"])}
    layers = [0, 1, 2]
    assert found == {
        ("it", "logit", "none", "none"): [0, 1, 2, 3],
        ("it", "tuned", "closed", "zero"): layers,
        ("it", "tuned", "refined", "zero"): layers,
        ("it", "shared", "closed", "zero"): layers,
        ("it", "shared", "refined", "zero"): layers,
        ("it", "shared_bias", "closed", "zero"): layers,
        ("it", "shared_loo", "closed", "zero"): layers,
        ("it+rotated", "tuned", "closed", "zero"): layers,
        ("it+rotated", "shared", "closed", "zero"): layers,
    }
    fitted = lenses[lenses["lens"] != "logit"]
    assert fitted[["ridge", "pad", "fit_kl", "dev_kl"]].notna().all().all()
    assert (lenses["kl_ci_low"] <= lenses["kl"]).all()
    assert (lenses["kl"] <= lenses["kl_ci_high"]).all()


def test_lens_rows_are_means_over_the_held_out_tokens():
    it, lenses = small(0), two_seeds()["lenses.csv"]
    lenses = lenses[lenses["seed"] == 0].set_index(["model", "lens", "stage", "layer"])
    plain = (OWN, OWN_REFINED, SHARED_LENS, SHARED_REFINED, SHARED_BIAS_LENS, SHARED_LOO_LENS)
    for lens in (*plain, OWN.of_view(0), SHARED_LENS.of_view(0)):
        read, record = it.scored.lenses[lens], it.fit.summary.records[lens]
        kl, ce = (values.sum(0) / len(it.held_out) for values in (read.kl, read.ce))
        for layer in range(3):
            model = "it" if lens in plain else "it+rotated"
            row = lenses.loc[(model, lens.kind, lens.stage, layer)]
            assert row["kl"] == pytest.approx(kl[layer], rel=1e-5)
            assert row["ce"] == pytest.approx(ce[layer], rel=1e-5)
            assert row["ridge"] == record.ridge[0 if lens.kind == "shared" else layer]
            assert row["dev_kl"] == record.dev_kl[layer]


def test_transfer_rows_are_complete_and_cost_nothing_on_the_diagonal():
    it, table = small(0), two_seeds()["transfer.csv"]
    one = table[table["seed"] == 0]
    assert sorted(zip(one["lens_layer"], one["stream_layer"], strict=True)) == [
        (i, j) for i in range(4) for j in range(4)
    ]
    diagonal = one[one["lens_layer"] == one["stream_layer"]]
    penalties = [c for c in one.columns if c.startswith("penalty")]
    assert len(penalties) == 6
    assert (diagonal[penalties] == 0).all().all()
    ce, kl = (it.scored.matrix(k).sum(0) / len(it.held_out) for k in ("ce", "kl"))
    for _, row in one.iterrows():
        i, j = row["lens_layer"], row["stream_layer"]
        assert row["kl"] == pytest.approx(kl[i, j], abs=1e-5)
        assert row["penalty_ce"] == pytest.approx(ce[i, j] - ce[j, j], abs=1e-5)
        assert row["penalty_kl"] == pytest.approx(kl[i, j] - kl[j, j], abs=1e-5)
        assert row["penalty_ce_ci_low"] <= row["penalty_ce"] <= row["penalty_ce_ci_high"]
    assert (one["ridge"].isna() == (one["lens_layer"] == 3)).all()


def test_indices_have_a_row_per_seed_and_one_for_all_of_them():
    table = two_seeds()["indices.csv"]
    for name in (i.name for i in INDICES.values() if i.compute):
        rows = table[table["index"] == name].set_index("seed")
        assert set(rows.index) == {0, 1, "all"}, name
        values = rows.loc[[0, 1], "value"].astype(float)
        if values.notna().all():
            mean, low, high = statistics.mean_over_seeds(list(values))
            found = rows.loc["all", ["value", "ci_low", "ci_high"]].astype(float)
            np.testing.assert_allclose(found, [mean, low, high], rtol=1e-9)
        else:
            assert np.isnan(rows.loc["all", "value"])
            assert "undefined" in rows.loc["all", "reason"]
    expected = estimates_of(small(1).frame)
    rows = table[table["seed"] == 1].set_index("index")
    for name, e in expected.items():
        if e.value is not None and not name.startswith(
            ("rotated_retention", "shared_consistency")
        ):  # they draw by seed
            found = rows.loc[name, ["value", "ci_low", "ci_high"]].astype(float)
            np.testing.assert_allclose(found, [e.value, e.low, e.high], rtol=1e-9)


def test_an_index_undefined_for_one_seed_is_undefined_for_all():
    good, bad = {"movement": Estimate(0.5, 0.4, 0.6)}, {"movement": Estimate(None, None, None, "undefined: so")}
    (row,) = tables.rows_over_seeds([good, bad], small(0).fit.summary.headline)
    assert row["value"] is None
    assert row["reason"] == "undefined for 1 of 2 seeds"


def test_the_spread_over_refits_surrounds_the_fit_and_is_read_off_the_same_formulas():
    it = small(0)
    rows = two_seeds()["indices.csv"]
    rows = rows[rows["seed"] == 0].set_index("index")
    means = [Means(**{name: values[k] for name, values in it.scored.refits.items()}) for k in range(3)]
    for name in ("shared_retention", "gain_visibility", "loo_shared_retention", "rotated_retention"):
        fit, *refits = (float(INDICES[name].value(m).value) for m in means)
        value = rows.loc[name, "value"]
        # The refits' tokens are all of the scored ones here.
        assert fit == pytest.approx(value, rel=1e-5)
        assert rows.loc[name, "fit_low"] == pytest.approx(value + min(refits) - fit)
        assert rows.loc[name, "fit_high"] == pytest.approx(value + max(refits) - fit)
        assert min(refits) < max(refits)
        assert abs(np.mean(refits) - value) < 0.15
    for name in ("shared_retention_refined", "pair_penalty", "pair_consistency"):
        assert np.isfinite(rows.loc[name, "value"]), name
        assert np.isnan(rows.loc[name, "fit_low"]), name


# By definition, from the fitted maps


def true_matrix(it, maps, layers):
    """``K_ij`` of maps fitted at ``layers``, read at them."""
    each = [true_kls(it.stream.readout, it.held_out, maps[[k]], layers) for k in range(len(layers))]
    return np.array(each)


def visibility(k, first=0):
    """Gain visibility of the lenses from the ``first`` on, pair by pair."""
    pairs = [(i, j) for i in range(first, len(k)) for j in range(i + 1, len(k))]
    return sum(k[i, i] - k[i, j] for i, j in pairs) / sum(k[i, i] - k[j, j] for i, j in pairs)


def turned(captured, rotations):
    """The capture with each layer's states in its own basis."""
    states = captured.states.clone()
    for layer, q in enumerate(rotations):
        states[layer] = (captured.states[layer].double() @ q.double().T).float()
    return replace(captured, states=states)


def test_rotated_retention_is_that_of_one_lens_for_states_in_random_bases():
    it = small(0)
    readout, layers = it.stream.readout, range(3)
    own = true_kls(readout, it.held_out, it.fit[OWN].maps, layers)
    gained = sum(float(it.held_out.constant_kl.double().mean()) - kl for kl in own)
    retentions = []
    for view in range(2):
        rotations = it.fit.views[view].maps
        for q in rotations:
            torch.testing.assert_close(q @ q.T, torch.eye(16), atol=1e-5, rtol=0)
        assert (rotations[0] - rotations[1]).abs().max() > 0.1
        one = it.fit[SHARED_LENS.of_view(view)].maps
        assert len(one) == 1
        kls = true_kls(readout, turned(it.held_out, rotations), one, layers)
        retentions.append(1 - (sum(kls) - sum(own)) / gained)
        if view == 0:
            rows = two_seeds()["lenses.csv"].query("model == 'it+rotated' and seed == 0 and lens == 'shared'")
            np.testing.assert_allclose(rows.sort_values("layer")["kl"], kls, rtol=1e-4)
    rows = two_seeds()["indices.csv"].query("seed == 0").set_index("index")
    assert rows.loc["rotated_retention", "value"] == pytest.approx(np.mean(retentions), abs=1e-4)
    assert abs(retentions[0] - retentions[1]) > 1e-3


@pytest.mark.parametrize(("which", "pairs"), [("small", [(0, 1), (0, 2), (1, 2)]), ("deep", [(0, 2), (0, 4), (2, 4)])])
def test_penalties_of_pairs_are_those_of_their_maps(which, pairs):
    """In random bases: of the states in those bases, under a map that the rotations were not folded into."""
    it, rows = (small(0), two_seeds()["pairs.csv"]) if which == "small" else (deep(), of_deep()["pairs.csv"])
    rows = rows[rows["seed"] == 0]
    assert list(zip(rows["layer_i"], rows["layer_j"], strict=True)) == pairs
    readout = it.stream.readout
    own = true_kls(readout, it.held_out, it.fit[OWN].maps, range(it.stream.layers))
    views = [turned(it.held_out, it.fit.views[k].maps) for k in range(2)]
    for p, (_, row) in enumerate(rows.iterrows()):
        i, j = row["layer_i"], row["layer_j"]
        kl_i, kl_j = true_kls(readout, it.held_out, it.fit[PAIR_LENS].maps[[p]], [i, j])
        assert row["kl_i"] == pytest.approx(kl_i, abs=1e-5)
        assert row["kl_j"] == pytest.approx(kl_j, abs=1e-5)
        assert row["penalty"] == pytest.approx((kl_i - own[i] + kl_j - own[j]) / 2, abs=2e-5)
        rotated = [it.fit[PAIR_LENS.of_view(k)].maps[[p]] for k in range(2)]
        anyhow = [true_kl(readout, view, maps, [i, j]) for maps, view in zip(rotated, views, strict=True)]
        assert row["rotated_penalty"] == pytest.approx(np.mean(anyhow) - (own[i] + own[j]) / 2, abs=2e-5)
        for name in ("penalty", "rotated_penalty"):
            assert row[f"{name}_ci_low"] < row[name] < row[f"{name}_ci_high"]
        assert row["ridge"] == it.fit.summary.records[PAIR_LENS].ridge[p]
        assert row["pad"] == it.fit.summary.records[PAIR_LENS].pad[p]


def test_an_interval_of_a_pair_resamples_documents():
    it = small(0)
    row = two_seeds()["pairs.csv"].query("seed == 0 and layer_i == 0 and layer_j == 2").iloc[0]
    windows, own = windows_of(it.held_out), it.scored.lenses[OWN].kl
    pair = it.scored.lenses[PAIR_LENS].kl.reshape(-1, 3, 2)
    excess = sums_by_document((pair[:, 1] - own[:, [0, 2]]).sum(-1) / 2, windows)
    tokens = np.bincount(it.held_out.document)
    error = np.sqrt(((excess - row["penalty"] * tokens) ** 2).sum()) / tokens.sum()
    assert excess.sum() / tokens.sum() == pytest.approx(row["penalty"], rel=1e-4)
    assert (row["penalty_ci_high"] - row["penalty_ci_low"]) / 2 == pytest.approx(1.96 * error, rel=0.2)


def test_the_curve_over_tolerances_is_that_of_the_fitted_maps():
    it, rows = deep(), of_deep()["tolerances.csv"]
    some, readout = [0, 2, 4], it.stream.readout
    assert list(rows["tolerance"].unique()) == ["0", "1se", "0.02", "0.05", "0.1"]
    assert (rows["layers"] == "0 2 4").all()
    assert (rows["stage"] == "closed").all()
    for tolerance, group in rows.groupby("tolerance"):
        lens = MATRIX_LENSES.within("1se" if tolerance == "1se" else float(tolerance))
        maps = it.fit[lens].maps[some] if lens == HEADLINE else it.fit[lens].maps
        ridges = it.fit.summary.records[lens].ridge
        expected = [ridges[k] for k in some] if lens == HEADLINE else ridges
        k = true_matrix(it, maps, some)
        by_index = group.set_index("index")
        assert set(by_index.index) == {"gain_visibility", "gain_visibility_without_layer0", "movement"}
        assert [float(r) for r in by_index.loc["movement", "ridge"].split()] == expected
        assert by_index.loc["gain_visibility", "value"] == pytest.approx(visibility(k), abs=1e-3)
        assert by_index.loc["gain_visibility_without_layer0", "value"] == pytest.approx(visibility(k, 1), abs=1e-3)
        np.testing.assert_allclose(group["own_kl"], np.diag(k).mean(), atol=1e-5)
        assert (group["own_kl_ci_low"] < group["own_kl"]).all()
        assert (group["own_kl"] < group["own_kl_ci_high"]).all()
        moved = [true_movement(readout, it.held_out, maps, a, b, some) for a, b in itertools.combinations(range(3), 2)]
        gained = sum(k[a, a] - k[b, b] for a, b in itertools.combinations(range(3), 2))
        assert by_index.loc["movement", "value"] == pytest.approx(sum(moved) / gained, abs=1e-3)


@torch.no_grad()
def true_movement(readout, captured, maps, a, b, layers):
    """``KL(q_aa || q_ab)`` of the lens of layer a, on its own and on layer b."""

    def log_q(layer):
        return readout(captured.states[layer] @ maps.matrix[a].T + maps.offset[a]).double().log_softmax(-1)

    own, other = log_q(layers[a]), log_q(layers[b])
    return float((own.exp() * (own - other)).sum(-1).mean())


def test_at_the_headlines_tolerance_the_curve_is_the_headline():
    found = two_seeds()
    curve = found["tolerances.csv"].query("tolerance == '0.02'").set_index(["seed", "index"])
    headline = found["indices.csv"].set_index(["seed", "index"])
    assert set(curve.index.get_level_values("seed")) == {0, 1}
    columns = ["value", "ci_low", "ci_high", "fit_low", "fit_high"]
    for key, row in curve.iterrows():
        np.testing.assert_allclose(row[columns].astype(float), headline.loc[key, columns].astype(float), rtol=1e-9)
    assert curve.loc[[(0, "gain_visibility"), (0, "movement")], columns].notna().all().all()
    others = found["tolerances.csv"].query("tolerance != '0.02'")
    assert others[["fit_low", "fit_high"]].isna().all().all()


def test_refits_of_some_layers_leave_out_the_headline_and_show_on_the_curve():
    """The matrix of a refit is that of layers 0, 2 and 4 alone; shared lenses are refitted on all."""
    it, found = deep(), of_deep()
    some, readout = [0, 2, 4], it.stream.readout
    rows = found["indices.csv"].set_index("index")
    for name in (i.name for i in INDICES.values() if i.stage == "matrix" and i.compute):
        assert np.isnan(rows.loc[name, "fit_low"]), name
        assert np.isnan(rows.loc[name, "fit_high"]), name
    assert rows.loc["gain_visibility", "value"] == pytest.approx(
        visibility(true_matrix(it, it.fit.headline.maps, range(5))), abs=1e-3
    )
    curve = found["tolerances.csv"].query("tolerance == '0.02'").set_index("index")
    chosen = [it.fit.headline.maps[some], *(it.fit[HEADLINE.of_refit(n)].maps for n in range(2))]
    fit, *refits = (visibility(true_matrix(it, m, some)) for m in chosen)
    value = curve.loc["gain_visibility", "value"]
    assert curve.loc["gain_visibility", "fit_low"] == pytest.approx(value + min(refits) - fit, abs=2e-3)
    assert curve.loc["gain_visibility", "fit_high"] == pytest.approx(value + max(refits) - fit, abs=2e-3)
    assert max(refits) - min(refits) > 0.005

    def retention(refit, layers, shared):
        own = np.array(true_kls(readout, it.held_out, it.fit[OWN.of_refit(refit)].maps, range(5)))[layers]
        one = true_kls(readout, it.held_out, it.fit[shared.of_refit(refit)].maps, layers)
        constant = float(it.held_out.constant_kl.double().mean())
        return 1 - (sum(one) - sum(own)) / sum(constant - own)

    for index, shared, layers in (
        ("shared_retention", SHARED_LENS, [0, 1, 2, 3, 4]),
        ("loo_shared_retention", SHARED_LOO_LENS, some),
    ):
        fit, *refits = (retention(refit, layers, shared) for refit in (-1, 0, 1))
        value = rows.loc[index, "value"]
        assert value == pytest.approx(fit, abs=1e-4)
        assert rows.loc[index, "fit_low"] == pytest.approx(value + min(refits) - fit, abs=2e-4)
        assert rows.loc[index, "fit_high"] == pytest.approx(value + max(refits) - fit, abs=2e-4)


def test_refits_on_some_tokens_say_how_the_value_on_all_may_change():
    it, some = deep(), [0, 2, 4]
    few = evaluate(it.stream.readout, it.held_out, it.fit, refit_positions=1)
    found = tables.tables([replace(it.part("it", 0), refits=few.refits)], draws=20)
    curve = found["tolerances.csv"].query("tolerance == '0.02'").set_index("index").loc["gain_visibility"]
    sample = replace(it, held_out=it.held_out.take(torch.arange(3, 640, 4)))  # the last of each window's four
    maps = [it.fit.headline.maps[some], *(it.fit[HEADLINE.of_refit(n)].maps for n in range(2))]
    fit, *refits = (visibility(true_matrix(sample, m, some)) for m in maps)
    assert curve["fit_low"] == pytest.approx(curve["value"] + min(refits) - fit, abs=1e-3)
    assert curve["fit_high"] == pytest.approx(curve["value"] + max(refits) - fit, abs=1e-3)
    row = found["indices.csv"].set_index("index").loc["shared_retention"]

    def kept(refit):
        own, shared = (true_kls(it.stream.readout, sample.held_out, it.fit[lens.of_refit(refit)].maps, range(5))
                       for lens in (OWN, SHARED_LENS))  # fmt: skip
        return 1 - (sum(shared) - sum(own)) / sum(float(sample.held_out.constant_kl.double().mean()) - x for x in own)

    fit, *refits = (kept(refit) for refit in (-1, 0, 1))
    assert abs(fit - row["value"]) > 0.01
    assert row["fit_low"] == pytest.approx(row["value"] + min(refits) - fit, abs=1e-4)
    assert row["fit_high"] == pytest.approx(row["value"] + max(refits) - fit, abs=1e-4)


def test_lenses_of_some_layers_have_rows_there_alone():
    it, lenses = deep(), of_deep()["lenses.csv"]
    rows = lenses[lenses["lens"] == "shared_loo"]
    assert list(rows["layer"]) == [0, 2, 4]
    expected = true_kls(it.stream.readout, it.held_out, it.fit[SHARED_LOO_LENS].maps, [0, 2, 4])
    np.testing.assert_allclose(rows["kl"], expected, rtol=1e-4)
    record = it.fit.summary.records[SHARED_LOO_LENS]
    for column in ("ridge", "pad", "fit_kl", "dev_kl"):
        assert list(rows[column]) == getattr(record, column)
    assert sorted(lenses[lenses["lens"] == "tuned"]["layer"].unique()) == [0, 1, 2, 3, 4]
    transfer = of_deep()["transfer.csv"]
    assert len(transfer) == 36
    assert transfer["kl"].notna().all()


def test_models_table_says_what_was_scored():
    it, models = small(0), two_seeds()["models.csv"]
    row = models[models["seed"] == 0].iloc[0]
    assert row["scored_tokens"] == len(it.held_out)
    assert row["clusters"] == 80
    assert row["ce"] == pytest.approx(float(it.held_out.model_ce.mean()), rel=1e-5)
    nats, size = float(it.held_out.model_ce.double().sum()), it.held_out.target_bytes.sum()
    assert row["bits_per_byte"] == pytest.approx(nats / np.log(2) / size, rel=1e-5)


def test_mean_with_interval_resamples_documents():
    rng = np.random.default_rng(0)
    document = np.repeat(np.arange(100), rng.integers(1, 9, 100))
    effect = rng.normal(size=100)[document]
    low, mean, high = mean_with_interval(torch.from_numpy(effect), document, 2000)
    assert mean == pytest.approx(effect.mean())
    # Tokens of a document are one observation: the ratio estimator's standard error, not sd / sqrt(N).
    sums, counts = np.bincount(document, weights=effect), np.bincount(document)
    error = np.sqrt(((sums - mean * counts) ** 2).sum()) / counts.sum()
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fresh", "overlapping"])
def test_intervals_over_documents_cover_the_value_of_the_whole_population(kind):
    """95 % intervals of a fixed fitted lens on 1000 sets of 100 documents, drawn from a population of 12000."""
    it = known(kind)
    documents, per_document, sets = 12_000, 8, 1000
    chunks: list[dict[str, np.ndarray]] = []
    for chunk in range(10):
        captured = it.stream.capture(
            documents * per_document // 10, seed=500 + chunk, per_document=per_document, constant=it.fit.constant
        )
        matrix = transfer_sums(it.stream.readout, captured, it.fit.headline.maps)
        windows = windows_of(captured)
        own, shared = (
            own_layer_sums(it.stream.readout, captured, it.fit[lens].maps, range(6))[0] for lens in (OWN, SHARED_LENS)
        )
        sums = {
            "transfer": matrix.kl,
            "transfer_ce": matrix.ce,
            "movement": matrix.movement,
            "own": own,
            "shared": shared,
        }
        sums["constant"] = sum_by_window(captured.constant_kl, captured)
        chunks.append({name: sums_by_document(values, windows) for name, values in sums.items()})
    pool = {name: np.concatenate([c[name] for c in chunks]) for name in chunks[0]}
    pool |= dict.fromkeys({f.name for f in fields(Means)} - set(pool), np.zeros((documents, 1)))
    tokens = np.full(documents, float(per_document))
    names = ("shared_retention", "gain_visibility", "movement", "constant_kl")
    truth = Means.of_clusters(Means(**pool), tokens)
    rng = np.random.default_rng(0)
    missed = {name: np.zeros(2) for name in names}
    for k in range(sets):
        at = rng.integers(0, documents, 100)
        drawn = Means.of_clusters(
            Means(**{name: v[at] for name, v in pool.items()}), tokens[at], statistics.bootstrap_weights(100, 1000, k)
        )
        for name in names:
            low, high = interval(INDICES[name].value(drawn).value)
            value = INDICES[name].value(truth).value
            missed[name] += value < low, value > high
    print(kind, {name: f"{1 - n.sum() / sets:.3f}, below {n[0] / sets:.3f}, above {n[1] / sets:.3f}"
                 for name, n in missed.items()})  # fmt: skip
    # Percentile intervals of 100 clusters reach 93 to 94 % of the nominal 95.
    assert all(1 - n.sum() / sets > 0.91 for n in missed.values())


@pytest.mark.parametrize("lens", ["tuned", "shared", "model", "pair"])
def test_a_score_that_is_no_number_is_not_taken_for_a_perfect_one(lens):
    frame = small(0).frame.copy()
    row = frame.index[frame["lens"] == lens][5]
    frame.loc[row, "kl"] = float("nan")
    with pytest.raises(LensbenchError, match=f"the KL of lens {lens} at layer .* is not a number"):
        ClusterSums.of(frame)


def test_lenses_at_the_end_of_the_ridge_path_are_told():
    part = small(0).part("it", 0)
    end = SMALL.ridges[-1]
    told = tables.tables([part], draws=100, largest_ridge=end)["tolerances.csv"]
    at_end = [sum(float(r) == end for r in ridges.split()) for ridges in told["ridge"]]
    assert sum(n > 0 for n in at_end) > 0
    for n, reason in zip(at_end, told["reason"], strict=True):
        assert (f"{n} of 3 lenses at the end of the ridge path" in reason) == (n > 0)


def test_intervals_resample_clusters_and_values_do_not_change():
    """Two documents of a folder are drawn together: as one document that holds both."""
    part = small(0).part("it", 0)
    names = sorted(part.sequences["document"].astype(str).unique())
    assert len(names) >= 70
    joined = {name: f"folder{k // 2 if k < 12 else k}/{name}" for k, name in enumerate(names)}
    single = {name: f"folder{k // 2 if k < 12 else k}" for k, name in enumerate(names)}
    rows = part.sequences["document"].astype(str)
    made = [
        tables.tables([replace(part, sequences=part.sequences.assign(document=rows.map(n)))], draws=100)
        for n in (joined, single)
    ]
    for name in made[0]:
        pd.testing.assert_frame_equal(made[0][name], made[1][name])
    apart = tables.tables([part], draws=100)
    assert made[0]["models.csv"]["clusters"][0] == apart["models.csv"]["clusters"][0] - 6
    np.testing.assert_allclose(made[0]["indices.csv"]["value"], apart["indices.csv"]["value"], rtol=1e-4)


def test_a_reader_is_told_what_to_doubt():
    models = pd.DataFrame({"model": ["fine", "worse", "own"], "ce": [3.0, 6.2, 5.0], "bits_per_byte": 1.0})
    tokenizers = ["trained here", "trained here", "own"]
    baselines = pd.DataFrame(
        {"tokenizer": tokenizers, "baseline": ["unigram", "bigram", "unigram"], "ce": [6.0, 4.0, 4.5]}
    )
    rows = [("fine", "shared_retention", 0.6, 0.8, 0.85, 0.9), ("fine", "movement", 1.0, 1.2, 1.1, 1.3),
            ("worse", "gain_visibility", 0.1, 0.2, -0.3, 0.05), ("own", "movement", 1.0, 1.2, None, None)]  # fmt: skip
    found = pd.DataFrame(rows, columns=["model", "index", "ci_low", "ci_high", "fit_low", "fit_high"])
    bare = Manifest.of_tables(Path("x"), [])
    run = Run(Path("x"), bare, {"models.csv": models, "baselines.csv": baselines, "indices.csv": found})
    told = doubts(run)
    assert len(told) == 4
    assert "worse predicts worse (6.200 nats/token) than word frequencies do (6.000)" in told[0]
    assert "own predicts worse (5.000 nats/token) than word frequencies do (4.500)" in told[1]
    assert "fine shared_retention: all refits" in told[2]
    assert "worse gain_visibility: all refits" in told[3]


def test_clusters_beyond_the_groups_asked_for_are_joined_and_sums_stay():
    from lensbench.results.sums import joined_clusters, summed_by_cluster

    names = [f"image-{k:03d}" for k in range(300)]
    of = joined_clusters(names, 100)
    sizes = pd.Series(of).value_counts()
    assert len(sizes) == 100
    assert (sizes == 3).all()
    assert joined_clusters(reversed(names), 100) == of
    assert joined_clusters(names, 300) == joined_clusters(names, None)
    row = {"model": "m", "seed": 0, "lens": "tuned", "lens_layer": 0, "layer": 0, "stage": "closed", "prior": "zero"}
    rows = pd.DataFrame({"document": names, **row, "view": -1, "sequence": 0, "tokens": 1, "bytes": 0})
    kl = np.random.default_rng(0).gamma(1.0, size=300)
    rows = rows.assign(kl=kl, ce=kl, movement=np.nan, top1=1.0)
    summed = summed_by_cluster(rows, 100)
    assert len(summed) == 100
    assert summed["kl"].sum() == pytest.approx(kl.sum())
    assert summed["movement"].isna().all()
    assert (summed["tokens"] == 3).all()
