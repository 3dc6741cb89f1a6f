"""What a dry run counts for a probe is what the probe makes: FLOPs of every probe in a run, held to the counted ones."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.flops import Counter
from helpers.suites import write_suite

from lensbench.probes.registry import PROBES
from lensbench.run import forecast, probe_costs, probing
from lensbench.run.costs import Counts, Shape
from lensbench.run.probe_costs import READS_SCORED, WORK, Asked, probe_cost
from lensbench.run.suite import run_suite
from lensbench.suite.changes import Changes
from lensbench.suite.files import load_suite

SMOLLM2 = Shape(layers=30, width=576, vocabulary=49_152, body=106_203_456, outer=49_152 * 576, heads=9)

TEXTUAL = [name for name in PROBES if name != "accuracy"]

SUITE = f"""name = "tiny"
threads = 1
probes = {json.dumps(TEXTUAL)}"""

MODELS = {
    "vocab_size = 300": "vocab_size = 500",
    "d_model = 16": "d_model = 32",
    "layers = 3": "layers = 4",
    "parameters = 20_000": "parameters = 60_000",
    "[evaluate]": '[fit.jacobian]\nmethod = "random"\nprompts = 8\nprobes = 4\n\n[evaluate]\nprobe_sequences = 48',
    "rotations = 2": 'rotations = 1\nlenses = ["jacobian", "jacobian_local", "shared_jacobian"]',
    "refits = 2": "refits = 0",
    "refine_passes = 8": "refine_passes = 0",
    '[[models]]\nname = "pc+state"\nview_of = "pc"\n': "",
}


def test_every_probe_has_a_cost():
    assert set(WORK) == set(PROBES)
    assert set(READS_SCORED) <= set(PROBES)


def test_an_injection_costs_prefixes_and_single_tokens_not_passes_over_all_windows():
    """By hand, of 128 windows of 256 tokens: a pass over a prefix of half a window, and 44 single tokens each."""
    suite = Changes(preset="default").of("pretrained")
    asked = Asked(suite, SMOLLM2, Counts.of(suite, SMOLLM2))
    work = WORK["injection_survival"](asked)
    by_hand = 128 * (128 + 44) * 2 * SMOLLM2.body
    assert 0.9 < work.model / by_hand < 1.3
    assert work.model < 0.1 * 24 * 5 * 128 * 256 * 2 * SMOLLM2.body, "120 passes, as an earlier version had it"


def test_the_states_that_are_scored_are_read_by_the_first_probe_that_needs_them():
    suite = load_suite("standard")
    shape = Shape(layers=6, width=128, vocabulary=4096, body=1_200_000, outer=4096 * 128, heads=4)
    costs = forecast.stage_costs(suite, suite.models[0], shape, ())
    asked = Asked(suite, shape, replace(Counts.of(suite, shape), there=True))
    name = f"{suite.models[0].name}-seed{suite.seeds_of(suite.models[0])[0]}"
    first, second = costs[f"probe-representation-{name}"], costs[f"probe-matched_transfer-{name}"]
    assert first.work.model > 0
    assert second.work == probe_cost(asked, "matched_transfer", captured=True).work
    assert second.work.model == 0


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """Model and probe -> FLOPs counted and predicted, of the probes that apply."""
    folder = tmp_path_factory.mktemp("costs")
    suite = load_suite(str(write_suite(folder, **{'name = "tiny"': SUITE, **MODELS})))
    found, shapes, reads = {}, {m.name: forecast.shape_of(suite, m) for m in suite.models}, set()

    class Watched:
        def __init__(self, probe):
            self.probe, self.version = probe, probe.version

        def measure(self, subject):
            model = next(m for m in suite.models if f"{m.name}-seed0" == subject.name)
            for split in ("fit", "dev"):  # the fit has made them
                subject.read(split)
            with Counter() as real:
                measured = self.probe.measure(subject)
            shape = shapes[model.name]
            asked = Asked(suite, shape, replace(Counts.of(suite, shape), there=True))
            words = subject.words.fit_windows
            # A real text has more words than the probe takes; this one has fewer than the vocabulary.
            patched.setattr(probe_costs, "TOKENS", len(np.unique(words.ids[words.inside])))
            work = probe_cost(asked, self.probe.name, captured=model.name in reads).work
            if self.probe.name in READS_SCORED:
                reads.add(model.name)
            if not measured.reason:
                found[model.name, self.probe.name] = work.model + work.single + work.read + work.double, real.flops
            return measured

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("lensbench.run.suite.draw_side_by_side", lambda *_: [])
        patched.setattr(probing, "PROBES", {name: Watched(probe) for name, probe in PROBES.items()})
        run_suite(suite, folder / "out", device=torch.device("cpu"))
    return found


@pytest.mark.run
@pytest.mark.parametrize("probe", TEXTUAL)
def test_a_probe_makes_the_flops_that_are_predicted(counted, probe):
    ratios = {
        m: predicted / real for (m, name), (predicted, real) in counted.items() if name == probe and m != "looped"
    }
    assert ratios, "it applies to no model"
    assert all(0.7 < ratio < 1.5 for ratio in ratios.values()), ratios
