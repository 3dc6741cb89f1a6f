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
    of_one = {"a": "gain at all distances", "b": "gain at some distances", "c": "At no distance does"}
    for model, said in of_one.items():
        assert said in findings.seen_at_distances(frame[frame["model"] == model])


def test_models_within_the_interval_of_the_lowest_loss_are_as_low():
    last = pd.DataFrame(
        {"model": ["x", "y", "z"], "ce": [2.0, 2.1, 3.0], "ce_ci_low": [1.9, 2.05, 2.9], "ce_ci_high": [2.1, 2.2, 3.1]}
    )
    assert findings.lowest_loss(last, "nats") == "Lowest loss after all tokens: x and y, 2.00; highest: z, 3.00 nats"


def test_a_series_surely_changes_where_the_corrected_p_of_its_slope_is_small():
    frame = pd.DataFrame(
        {"series": list("aabbc"), "index": "ce", "slope": [-1, -1, 1, 1, 2.0], "p_holm": [0.01, 0.01, 0.2, 0.2, None]}
    )
    assert findings.sure_trends(frame, {"ce": "loss"}, "tokens") == "As tokens double, of 3 series: loss falls in 1"
    assert findings.sure_trends(frame[frame["series"] != "a"], {"ce": "loss"}, "tokens").startswith("Nothing surely")


def test_heads_are_counted_with_how_much_of_an_error_they_carry_and_no_word_says_that_they_carry_one():
    heads = pd.DataFrame({"model": "gpt", "found": [0.0, 1.0, 1.0], "ratio": [0.9, 0.13, np.nan]})
    said = findings.heads_found(heads)
    assert said == "2 of 3 heads use expectations with the sign turned, beta / alpha at most 0.13 (1 in an error)"
    none = heads.assign(model="pc", found=0.0)
    assert findings.heads_found(none) == "None of 3 heads is found to use expectations with the sign turned"
    assert findings.heads_found(pd.concat([heads, none])).endswith(
        "(1 in an error): gpt 2 of 3 (at most 0.13), pc 0 of 3"
    )
    many = pd.concat([heads.assign(model=f"m{k}") for k in range(5)])
    assert findings.heads_found(many).startswith("10 of 15 heads in 5 models use")


def test_halfway_is_half_of_the_layers():
    frame = pd.DataFrame({"model": "vit", "lens": "tuned", "layer": range(5), "value": [0.1, 0.2, 0.5, 0.8, 0.9]})
    assert "right in 50 % of targets" in findings.halfway_accuracy(frame)
    assert findings.models_or_count(["a"], 9) == "1 of 9 models"


def guesses(model, low, own):
    """Rows of a model whose first layer's top-1 is frequent from ``low`` on, and whose own is so in ``own``."""
    rows = [("model", "", "", None, own, own, own), ("frequent", "tuned", "", 0.0, low + 0.1, low, low + 0.2)]
    rows += [("frequent", "tuned", "", 1.0, 0.0, 0.0, 0.0), ("frequent", "tuned", "null", 0.0, 0.9, 0.9, 0.9)]
    columns = ["what", "lens", "beside", "layer", "value", "ci_low", "ci_high"]
    return pd.DataFrame(rows, columns=columns).assign(model=model)


def test_guesses_of_frequent_words_are_those_of_the_first_layer_against_the_model_itself():
    frame = pd.concat([guesses("a", 0.4, 0.3), guesses("b", 0.2, 0.3), guesses("c", 0.0, 0.3)])
    opening = "At layer 0, the top-1 of lenses is surely a frequent word "
    assert findings.guessed_words(frame, "tuned", "lenses") == (
        opening + "more often than the model's own in a, less often in c"
    )
    unsure = guesses("b", 0.2, 0.3)
    assert findings.guessed_words(unsure, "tuned", "lenses").endswith(
        "neither more nor less often than the model's own"
    )
    assert "?" not in findings.guessed_words(frame.iloc[:0], "tuned", "lenses")


def test_the_rank_that_a_lens_needs_is_the_smallest_whose_interval_overlaps_that_of_the_full_one():
    lines = [(rank, 1 / rank, 1 / rank - 0.05, 1 / rank + 0.05) for rank in (1, 2, 4, 8, 16)]
    frame = pd.DataFrame(lines, columns=["rank", "value", "ci_low", "ci_high"]).assign(
        model="a", what="kl", kind="tuned"
    )
    assert findings.ranks_needed(frame, {"tuned": "lenses", "shared": "one"}) == (
        "As near the output as at full rank from rank: lenses 8"  # 0.125 - 0.05 < 0.0625 + 0.05 < 0.25 - 0.05
    )
    assert "?" not in findings.ranks_needed(frame.iloc[:0], {"tuned": "lenses"})


def test_models_as_near_to_bayes_as_the_nearest_are_named_for_each_task():
    rows = [
        ("t", "a", 0.10, 0.05),
        ("t", "b", 0.14, 0.05),
        ("t", "c", 0.5, 0.05),
        ("u", "c", 0.1, 0.01),
        ("u", "a", 0.2, 0.01),
    ]
    frame = pd.DataFrame(rows, columns=["task", "model", "excess", "half"])
    frame = frame.assign(excess_ci_low=frame["excess"] - frame["half"], excess_ci_high=frame["excess"] + frame["half"])
    assert (
        findings.nearest_to_bayes(frame, "64-126")
        == "Nearest to the Bayes predictor at positions 64-126: t: a and b; u: c"
    )


def test_the_rival_most_like_trained_attention_is_named_with_its_models():
    rows = [
        (1, "linear", "gd", 0.99),
        (1, "linear", "bayes", 0.5),
        (2, "linear", "gd", 0.7),
        (2, "linear", "gd++", 0.72),
    ]
    frame = pd.DataFrame(rows, columns=["layers", "attention", "against", "value"])
    frame = frame.assign(ci_low=frame["value"] - 0.02, ci_high=frame["value"] + 0.02)
    kinds, names = {"gd": "steps", "gd++": "gd++", "bayes": "Bayes"}, {(1, "linear"): "one", (2, "linear"): "two"}
    said = findings.nearest_rival(frame, kinds, names)
    assert said == "Trained attention's sensitivities are most like those of steps (one); steps or gd++ (two)"
