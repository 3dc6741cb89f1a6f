"""Tasks of known Bayes predictor, against brute force over all tables."""

import itertools
import json

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from lensbench.cli import app
from lensbench.errors import LensbenchError
from lensbench.studies.in_context import InContext, TaskRecipe
from lensbench.suite.files import load_in_context


def task(kind, **changes):
    return TaskRecipe(name="t", kind=kind, **({"vocab_size": 4} | changes))


def enumerated(documents, weights, tables):
    """Posterior predictive by Bayes' rule over an explicit list of tables ``[K, V, V]``."""
    found = np.empty((len(documents), documents.shape[1] - 1, tables.shape[1]))
    for d, ids in enumerate(documents):
        likelihood = np.log(weights)
        for t in range(len(ids) - 1):
            posterior = np.exp(likelihood - likelihood.max())
            posterior /= posterior.sum()
            found[d, t] = posterior @ tables[:, ids[t]]
            likelihood = likelihood + np.log(tables[:, ids[t], ids[t + 1]])
    return found


@pytest.mark.parametrize("noise", [0.1, 0.6])
def test_the_predictor_of_a_noisy_map_is_bayes_rule_over_all_maps(noise):
    recipe = task("noisy-map", vocab_size=3, noise=noise)
    maps = np.array(list(itertools.product(range(3), repeat=3)))
    tables = noise / 3 + (1 - noise) * np.eye(3)[maps]
    ids = recipe.documents([5], 6, 30)
    expected = enumerated(ids, np.full(len(tables), 1 / len(tables)), tables)
    np.testing.assert_allclose(recipe.bayes(ids), expected, rtol=0, atol=1e-12)


def test_the_predictor_of_thresholds_is_bayes_rule_over_all_pairs_of_rules():
    recipe = task("thresholds", vocab_size=4, noise=0.15)
    rules = [lambda a, k=k, s=s: int((a >= k) != s) for s in (False, True) for k in range(4)]
    tables = []
    for first, second in itertools.product(rules, repeat=2):
        table = np.empty((4, 4))
        for a, b in itertools.product(range(4), repeat=2):
            right = [(b & 1) == first(a), (b >> 1) == second(a)]
            table[a, b] = np.prod([0.85 if r else 0.15 for r in right])
        tables.append(table)
    ids = recipe.documents([2], 5, 25)
    expected = enumerated(ids, np.full(len(tables), 1 / len(tables)), np.array(tables))
    np.testing.assert_allclose(recipe.bayes(ids), expected, rtol=0, atol=1e-12)


def test_the_predictor_of_a_dirichlet_table_is_the_mean_over_tables_weighted_by_their_likelihood():
    recipe = task("dirichlet", vocab_size=3, concentration=2.0)
    ids = recipe.documents([7], 4, 12)
    tables = recipe.tables(np.random.default_rng(1), 200_000)
    expected = enumerated(ids, np.full(len(tables), 1.0), tables)
    np.testing.assert_allclose(recipe.bayes(ids), expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("kind", ["noisy-map", "dirichlet", "thresholds"])
def test_tables_and_predictions_are_distributions_and_documents_follow_their_table(kind):
    recipe = task(kind)
    tables = recipe.tables(np.random.default_rng(0), 50)
    assert tables.shape == (50, 4, 4)
    assert tables.min() >= 0
    np.testing.assert_allclose(tables.sum(-1), 1)
    ids = recipe.documents([3], 1, 20_000)
    np.testing.assert_allclose(recipe.bayes(ids[:, :200]).sum(-1), 1)
    table = recipe.tables(np.random.default_rng([3]), 1)[0]
    counts = np.zeros((4, 4))
    np.add.at(counts, (ids[0, :-1], ids[0, 1:]), 1)
    seen = counts.sum(1) > 1000
    assert seen.any()
    np.testing.assert_allclose((counts / counts.sum(1, keepdims=True).clip(1))[seen], table[seen], atol=0.05)


@pytest.mark.parametrize("kind", ["noisy-map", "dirichlet", "thresholds"])
def test_no_other_predictor_loses_less_than_bayes(kind):
    recipe = task(kind, vocab_size=8)
    ids = recipe.documents([11], 400, 60)
    bound = recipe.bayes_nats(ids).mean()
    p = recipe.bayes(ids)
    for other in (
        0.9 * p + 0.1 / 8,
        p**1.3 / (p**1.3).sum(-1, keepdims=True),
        p**0.7 / (p**0.7).sum(-1, keepdims=True),
    ):
        nats = -np.log(np.take_along_axis(other, ids[:, 1:, None], 2)).mean()
        assert nats > bound


TINY = """
name = "tiny"
question = "q"
seeds = [1, 2]
tuning_seed = 0
claim = ["gpt", "pc"]
threads = 1
d_model = 16
layers = 2
heads = 2
parameters = 7_000
documents = 40
positions = [1, 8]
learning_rates = [0.01, 0.03]
[training]
tokens = 4_000
length = 24
batch = 8
[[tasks]]
name = "map"
kind = "noisy-map"
vocab_size = 6
[[contestants]]
name = "pc"
family = "predictive-coding"
[[contestants]]
name = "gpt"
family = "gpt-conv"
"""


@pytest.mark.run
def test_a_run_scores_every_model_against_the_bound_pairs_seeds_and_is_taken_up(tmp_path):
    (tmp_path / "tiny.toml").write_text(TINY)
    command = ["in-context", str(tmp_path / "tiny.toml"), "--out", str(tmp_path / "run")]
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0, first.output
    table = pd.read_csv(tmp_path / "run" / "task.csv")
    gaps = pd.read_csv(tmp_path / "run" / "differences.csv")
    cells = table.set_index(["model", "seed", "positions"])
    for model in ("pc", "gpt"):
        for seed in "12":
            row = cells.loc[model, seed, "all"]
            bound = cells.loc["bayes", "1", "all"]["ce"]
            assert row["excess"] == pytest.approx(row["ce"] - bound, abs=1e-6)
            assert row["excess_ci_low"] < row["excess"] < row["excess_ci_high"]
        assert cells.loc[model, "all", "all"]["ce"] == pytest.approx(
            np.mean([cells.loc[model, seed, "all"]["ce"] for seed in "12"])
        )
    each = [cells.loc["gpt", seed, "all"]["ce"] - cells.loc["pc", seed, "all"]["ce"] for seed in "12"]
    whole = gaps[gaps["positions"] == "all"].iloc[0]
    assert (whole["model"], whole["against"], whole["seeds"]) == ("gpt", "pc", 2)
    assert whole["p_holm"] == whole["p"], "one task, one claim"
    assert gaps.loc[gaps["positions"] != "all", "p_holm"].isna().all()
    assert whole["value"] == pytest.approx(np.mean(each), abs=1e-9)
    recipe = load_in_context(str(tmp_path / "tiny.toml"))
    ids = recipe.tasks[0].documents([2, 0, 1], 40, 24)
    assert cells.loc["bayes", "1", "all"]["ce"] == pytest.approx(recipe.tasks[0].bayes_nats(ids)[:, 1:].mean())
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").glob("*.csv")}
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 0
    assert "reused" in again.output + (again.stderr or "")
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").glob("*.csv")} == before
    assert (tmp_path / "run" / "in_context.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["in_context"]["seeds"] == [1, 2]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("vocab_size = 6", 'vocab_size = 6\nnois = 0.1'), "nois"),
        (('family = "gpt-conv"', 'family = "gtp-conv"'), "gtp-conv"),
        (("positions = [1, 8]", "positions = [1, 80]"), "positions"),
        (('kind = "noisy-map"', 'kind = "thresholds"'), "power of two"),
        (("parameters = 7_000", "parameters = 70"), "parameters"),
        (('name = "gpt"', 'name = "pc"'), "one name"),
        (("tuning_seed = 0", "tuning_seed = 2"), "tuning_seed"),
        (('name = "gpt"\nfamily', 'name = "bayes"\nfamily'), "bayes"),
        (('claim = ["gpt", "pc"]', 'claim = ["gpt", "nobody"]'), "nobody"),
        (("positions = [1, 8]", "positions = [8, 1]"), "positions must rise"),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_one_line(tmp_path, change, said):
    (tmp_path / "tiny.toml").write_text(TINY.replace(*change))
    result = CliRunner().invoke(app, ["in-context", str(tmp_path / "tiny.toml"), "--out", str(tmp_path / "run")])
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert said in result.output + (result.stderr or "")
    assert not (tmp_path / "run").exists()


def test_a_file_of_another_kind_names_the_command_that_runs_it():
    with pytest.raises(LensbenchError, match="lensbench run quick"):
        load_in_context("quick")
    assert isinstance(load_in_context("in-context"), InContext)
