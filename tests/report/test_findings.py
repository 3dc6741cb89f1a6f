"""What titles of figures say is what their frames hold."""

import numpy as np
import pandas as pd

from lensbench.report.figures import findings


def test_numbers_are_named_by_model_and_of_many_models_give_their_range():
    assert findings.by_model(pd.Series({"gpt-2": 0.081})) == "0.081"
    assert findings.by_model(pd.Series({"gpt-2": 0.081, "pc": -0.02})) == "0.081 (gpt-2), \N{MINUS SIGN}0.02 (pc)"
    assert findings.by_model(pd.Series({f"m{k}": float(k) for k in range(1, 9)})) == "1 to 8"


def test_the_cost_of_one_lens_is_the_median_over_layers_and_the_old_title_stands_without_such_lenses():
    frame = pd.DataFrame(
        {
            "model": "gpt",
            "layer": [0, 1, 2] * 2,
            "lens": ["tuned"] * 3 + ["shared"] * 3,
            "kl": [1, 1, 1, 1.5, 1.25, 4.0],
        }
    )
    assert findings.lens_cost(frame, "nats/token").startswith(
        "One lens for all layers costs a median of 0.5 nats/token"
    )
    assert findings.lens_cost(frame[frame["lens"] == "tuned"], "nats/token").startswith("How far")


def test_the_penalty_of_neighbours_and_of_the_farthest_layers_is_a_mean_over_both_directions():
    pairs = pd.DataFrame(
        {"model": "pc-64k", "lens_layer": [0, 1, 0, 2], "stream_layer": [1, 0, 2, 0], "penalty_ce": [0.1, 0.3, 1, 3.0]}
    )
    assert "goes from 0.2 to 2 nats/token" in findings.change_with_distance(pairs, "nats/token")
    many = pd.concat([pairs.assign(model=f"m{k}", penalty_ce=pairs["penalty_ce"] * (-1) ** k) for k in range(5)])
    assert findings.change_with_distance(many, "nats/token").endswith("in 3 of 5 models")


def test_gain_is_seen_where_its_interval_lies_above_zero():
    frame = pd.DataFrame(
        {"model": list("aabbccd"), "value": [1, 1, 1, 1, 1, 1, np.nan], "ci_low": [0.1, 0.2, 0.1, -1, -1, 0, 0]}
    )
    assert findings.seen_at_distances(frame).endswith("at all distances in a; at some in b; at none in c")
    assert findings.seen_at_distances(frame[frame["model"] == "d"]).endswith("?")


def test_models_within_the_interval_of_the_lowest_loss_are_as_low():
    last = pd.DataFrame(
        {"model": ["x", "y", "z"], "ce": [2.0, 2.1, 3.0], "ce_ci_low": [1.9, 2.05, 2.9], "ce_ci_high": [2.1, 2.2, 3.1]}
    )
    assert findings.lowest_loss(last, "nats") == "Lowest loss after all tokens: x and y, 2.00; highest: z, 3.00 nats"


def test_a_series_surely_changes_where_its_first_and_last_intervals_do_not_overlap():
    frame = pd.DataFrame(
        {
            "series": ["a", "a", "b", "b"], "index": "ce", "seed": "all", "x": [2.0, 1.0, 1.0, 2.0],
            "value": [1.0, 2.0, 1.0, 1.1], "ci_low": [0.9, 1.9, 0.9, 1.0], "ci_high": [1.1, 2.1, 1.1, 1.2],
        }
    )  # fmt: skip
    assert findings.sure_changes(frame, {"ce": "loss"}, "tokens").endswith("of 2 series: loss falls in 1")
    assert findings.sure_changes(frame[frame["series"] == "b"], {"ce": "loss"}, "tokens").startswith("Nothing surely")


def test_heads_are_counted_and_halfway_is_half_of_the_layers():
    heads = pd.DataFrame({"model": "gpt", "found": [0.0, 1.0, 1.0]})
    assert findings.heads_found(heads) == "Prediction errors are carried by 2 of 3 heads"
    frame = pd.DataFrame({"model": "vit", "lens": "tuned", "layer": range(5), "value": [0.1, 0.2, 0.5, 0.8, 0.9]})
    assert "right in 50 % of targets" in findings.halfway_accuracy(frame)
    assert findings.models_or_count(["a"], 9) == "1 of 9 models"
