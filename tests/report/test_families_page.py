"""The page on families, of made-up runs: what rises and falls, what cannot be told, and which layers come first."""

import math

import numpy as np
import pandas as pd
import pytest

from benchmarks.texts.families import Families
from benchmarks.texts.numbers import TextError
from benchmarks.texts.rates import Rates
from lensbench.report import trends
from lensbench.results.folder import Run
from lensbench.results.schema import SCHEMA, no_rows

TOKENS = {"gpt@1000": 1000, "gpt@4000": 4000, "gpt": 16_000}


def made_up() -> Run:
    """Three seeds of checkpoints: cross-entropy falls, consistency rises, clarity is noise; layer 2 adds from 4000 on."""
    rng = np.random.default_rng(0)
    models, indices, steps = [], [], []
    for model, tokens in TOKENS.items():
        for seed in range(3):
            x, wobble = math.log2(tokens), 0.01 * float(rng.normal())
            models.append(
                {"model": model, "seed": seed, "train_tokens": tokens, "parameters": 900, "ce": 9 - 0.2 * x + wobble}
            )
            noise = {
                "clarity_without_layer0": float(rng.normal()),
                "shared_consistency_without_layer0": 0.05 * x + wobble,
            }
            indices += [{"model": model, "seed": seed, "index": name, "value": value} for name, value in noise.items()]
            for low in range(2):
                gate = "cross-entropy" if low == 1 and tokens < 4000 else None
                steps.append(
                    {
                        "model": model,
                        "seed": seed,
                        "from_layer": low,
                        "to_layer": low + 1,
                        "gate": gate,
                        "carried": 0.25,
                    }
                )
            steps.append({"model": model, "seed": seed, "from_layer": 0, "to_layer": 2, "gate": "room", "carried": 0.9})
    tables = {name: no_rows(name) for name in SCHEMA}
    for name, rows in (("models.csv", models), ("indices.csv", indices), ("update.csv", steps)):
        tables[name] = pd.DataFrame(rows).reindex(columns=list(SCHEMA[name]))
    return Run(None, None, tables)


@pytest.fixture
def families(tmp_path, monkeypatch):
    found = Families(tmp_path, ["training"])
    found.run = made_up()
    monkeypatch.setattr(trends, "read_distinct", lambda _: [found.run])
    monkeypatch.setattr(trends, "compared_models", lambda *_: [])
    return found


def test_a_sentence_says_what_surely_rises_and_falls_and_of_what_nothing_can_be_told(families):
    assert families.sentences() == [
        "**`gpt`** over training tokens: consistency rises; cross-entropy falls; no change of clarity can be told."
    ]


def test_the_first_tokens_are_those_from_which_every_seed_passes_the_gates_to_the_end(families):
    heads, _, row = families.first_layers().splitlines()[:3]
    assert heads == "| layers | 0 to 1 | 1 to 2 |"
    assert row == "| `gpt` | 1,000; 0.750 [0.750, 0.750] | 4,000; 0.750 [0.750, 0.750] |"


def test_seeds_that_differ_in_when_a_layer_adds_are_told_apart(families):
    steps = families.run.tables["update.csv"]
    early = (steps["model"] == "gpt@1000") & (steps["from_layer"] == 1) & (steps["seed"] == 2)
    steps.loc[early, "gate"] = None
    assert families.first_layers().splitlines()[2].endswith("| 1,000 to 4,000; 0.750 [0.750, 0.750] |")
    steps.loc[(steps["model"] == "gpt") & (steps["from_layer"] == 1) & (steps["seed"] == 2), "gate"] = "room"
    assert families.first_layers().splitlines()[2].endswith("| at 2 of 3 seeds |")


def test_values_stand_in_the_order_of_tokens(families):
    rows = families.value_table("gpt").splitlines()
    assert [row.split("|")[2].strip() for row in rows[2:]] == ["1,000", "4,000", "16,000"]
    with pytest.raises(TextError, match="training have no series pc"):
        families.value_table("pc")


def test_the_rate_of_a_rule_is_held_against_the_best_of_three(tmp_path):
    (tmp_path / "sweep").mkdir()
    rows = [
        {"model": model, "trial": k, "behind": x, "behind_ci_low": x - 0.01, "behind_ci_high": x + 0.01}
        for model, trials in (("a", (0.1, 0.0, 0.3)), ("b", (0.0, 0.5, 0.9))) for k, x in enumerate(trials)
    ]  # fmt: skip
    pd.DataFrame(rows[::-1]).to_csv(tmp_path / "sweep" / "sweep.csv", index=False)
    rates = Rates(tmp_path, ["sweep"])
    assert "| `a` | 0.100 [0.090, 0.110] | best | 0.300 [0.290, 0.310] |" in rates.table().splitlines()
    assert rates.far() == ["b"]
    pd.DataFrame(rows[:-1]).to_csv(tmp_path / "sweep" / "sweep.csv", index=False)
    with pytest.raises(TextError, match="has 2 trials of b, not 3"):
        Rates(tmp_path, ["sweep"]).table()
