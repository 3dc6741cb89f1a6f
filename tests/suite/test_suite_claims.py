"""What a suite may claim, and that a claim about what it does not measure is refused when it is read."""

import pytest

from lensbench.errors import LensbenchError
from lensbench.suite.files import load_suite, validated
from lensbench.suite.recipes import Suite

SHAPE = {"family": "gpt", "d_model": 16, "layers": 2, "heads": 2, "parameters": 60_000}
SURVIVAL = {"probe": "injection_survival", "quantity": "mean_survival_error_without_layer0"}


def suite_of(*claims, **settings) -> Suite:
    models = [{"name": n, **SHAPE} for n in "ab"] + [{"name": "a+rotated"}]
    content = {"name": "x", "question": "y", "models": models, "claims": list(claims), "probes": ["injection_survival"]}
    return validated(Suite, "x.toml", {**content, **settings})


@pytest.mark.parametrize(
    ("claim", "says"),
    [
        ({"model": "c", "indices": ["in_place"], "above": 0.8}, "about model 'c'; there are a, b, a\\+rotated"),
        ({"model": "a", "against": "bb"}, "about model 'bb'; did you mean 'b'"),
        ({"model": "a", "indices": ["in_plaice"], "above": 0.8}, "about index 'in_plaice'; did you mean 'in_place'"),
        ({"model": "a", "against": "b", "indices": ["cee"]}, "about index 'cee'; did you mean 'ce'"),
        (
            {"model": "a", "landmark": "carry", "indices": ["in_place"], "below": 0.3},
            "about landmark 'carry'; did you mean 'carried'",
        ),
        ({"model": "a", "landmark": "carried", "indices": ["ce"], "below": 0.3}, "about index 'ce'"),
        (
            {"model": "a+rotated", "landmark": "carried", "indices": ["in_place"], "below": 0.3},
            "landmark of 'a\\+rotated': a rotated view has none",
        ),
        ({"model": "a", **SURVIVAL, "probe": "injektion_survival", "above": 0.0}, "did you mean 'injection_survival'"),
        (
            {"model": "a", "probe": "block_order", "quantity": "order_rise_deleted", "above": 0.0},
            "about probe 'block_order', which the suite does not run; add it to probes",
        ),
        (
            {"model": "a", **SURVIVAL, "quantity": "mean_survival_eror", "above": 0.0},
            "quantity 'mean_survival_eror' of injection_survival; did you mean 'mean_survival_error'",
        ),
        (
            {"model": "a", **SURVIVAL, "quantity": "survival_error", "above": 0.0},
            "'survival_error' of injection_survival, which has a value for each pair; claims are about the model: mean_",
        ),
        (
            {"model": "a", "indices": ["ce"]},
            "sets one of against, above, below, within, differs_from; this one sets none",
        ),
        ({"model": "a", "indices": ["ce"], "above": 1.0, "below": 2.0}, "this one sets above and below"),
        ({"model": "a", "indices": ["ce"], "within": [1.1, 0.9]}, "within is \\[low, high\\] with low < high"),
        ({"model": "a", "above": 1.0}, "names indices, or a probe and its quantity"),
        ({"model": "a", "probe": "injection_survival", "above": 1.0}, "probe and quantity go together"),
        ({"model": "a", "indices": ["ce"], "above": 1.0, "direction": "above"}, "direction is for differences"),
        ({"model": "a", "against": "b", **SURVIVAL}, "cannot set against and probe together"),
        ({"model": "a", "indices": ["ce"], **SURVIVAL, "above": 1.0}, "cannot set probe and indices together"),
        ({"model": "a", "against": "b", "status": "sure"}, "'seen in a prototype' or 'new'"),
        ({"model": "a", "against": "b", "agains": "b"}, "unknown key 'claims.0.agains'; did you mean 'against'"),
    ],
)
def test_a_claim_about_what_is_not_measured_is_refused_in_one_line(claim, says):
    with pytest.raises(LensbenchError, match=says) as refused:
        suite_of(claim)
    assert "\n" not in str(refused.value)


def test_claims_about_the_decomposition_need_it():
    in_place = {"model": "a", "indices": ["in_place"], "above": 0.8}
    with pytest.raises(LensbenchError, match="index 'in_place', and the suite has `update = false`"):
        suite_of(in_place, update=False)
    with pytest.raises(LensbenchError, match="landmark 'carried', and the suite leaves landmarks out"):
        suite_of({**in_place, "landmark": "carried"}, update={"landmarks": False})
    assert len(suite_of(in_place, update={"landmarks": False}).claims) == 1


def test_a_claim_about_a_list_of_models_is_one_for_each():
    suite = suite_of({"model": ["a", "b"], "indices": ["in_place"], "above": 0.8, "status": "new"})
    assert [(c.model, c.above, c.status) for c in suite.claims] == [("a", 0.8, "new"), ("b", 0.8, "new")]
    again = Suite.model_validate(suite.model_dump(exclude_unset=True))
    assert again == suite


def test_a_difference_is_described_as_before_there_were_other_claims():
    old = {"model": "a", "against": "b", "indices": ["shared_consistency", "gain_visibility"]}
    assert suite_of({"model": "a", "against": "b"}).described()["claims"] == [old]
    assert suite_of(old).described()["claims"] == [old]


@pytest.mark.parametrize(
    "name",
    ["standard", "vision", "predictive-coding", "pretrained", "pretrained-updates", "gpt2", "pythia", "qwen", "gemma"],
)
def test_claims_of_the_decomposition_say_whether_a_prototype_had_shown_them(name):
    claims = load_suite(name).claims
    of_decomposition = [c for c in claims if c.against is None or "without_layer0" in c.statements[0]]
    assert of_decomposition
    assert all(claim.status is not None for claim in of_decomposition)
    words = [claim.in_words(of) for claim in claims for of in claim.statements]
    assert len(set(words)) == len(words), "no claim is counted twice"


def test_standard_claims_of_every_trained_gpt_with_whole_skips_the_same():
    words = [c.in_words(of) for c in load_suite("standard").claims if c.status for of in c.statements]
    survival = "injection_survival, mean_survival_error_without_layer0"
    gpts = ("gpt", "gpt-conv", "gpt-ds", "gpt2")
    assert words == [
        *(f"{gpt}: in_place_without_layer0 lies above 0.8" for gpt in gpts),
        *(f"{gpt}+carried: in_place lies below 0.3" for gpt in gpts),
        "pc+state - gpt-conv: in_place_without_layer0 differs from 0",
        "gpt-noskip - gpt: clarity_without_layer0 lies below 0, two-sided",
        *(f"{gpt}: {survival} lies within 0.9 to 1.1" for gpt in gpts),
        f"pc: {survival} differs from 1",
    ]
