"""What the stages of a run would take on a machine that nobody measured: what the time left is told from.

:mod:`lensbench.run.forecast` measures the machine first, which takes seconds. Here the machine is a supposed one. Progress
scales what it is told by what the stages of the run take, so that only their proportions count.
"""

from collections.abc import Set
from dataclasses import replace

import torch

from lensbench.errors import LensbenchError
from lensbench.run.costs import Shape, forward
from lensbench.run.forecast import seconds, shape_of, stage_costs
from lensbench.run.stage_names import stage_names
from lensbench.runtime.left import kind_of
from lensbench.runtime.rates import Rates
from lensbench.suite.recipes import ModelRecipe, Suite

TWO_CORES = Rates(model=2e11, single=1e11, double=5e10, eigen=1e9, words=1e9, copied=1e10, read=2e11)
ACCELERATOR = Rates(model=2e13, single=1e13, double=5e11, eigen=1e9, words=1e11, copied=1e12)
"""What a machine does in a second, roughly"""

SECONDS_OF_LAYER = 0.005
"""What the operations of a layer take in a training step however small the model is"""

OF_PROBE = 3.0
"""Seconds that a probe of a model takes however small it is: that many operations are each a call"""

OF_TRAINING, OF_OTHERS = 100.0, 5.0
"""Seconds of stages whose costs are unknown: those of images, and of a model that cannot be read yet"""


def expected_seconds(
    suite: Suite,
    models: list[ModelRecipe],
    probes: tuple[str, ...],
    device: torch.device,
    there: Set[str] = frozenset(),
) -> dict[str, float]:
    """The stages of models in the order that they run in, with the seconds that each would take.

    A model is not looked at where all of its stages are among those that are ``there``: they take no time.
    """
    reused = dict.fromkeys(sorted(stage_names(suite, models, probes) & there), 0.0)
    models = [model for model in models if stage_names(suite, [model], probes) - there]
    names = stage_names(suite, models, probes)
    found: dict[str, float] = {}
    known: dict[str, Shape] = {}
    if suite.images is None:
        for model in models:
            try:
                found |= {k: v for k, v in of_model(suite, model, probes, device, known).items() if k not in found}
            except LensbenchError:
                continue  # the run itself says what is wrong with a model, and where
    last = [name for name in found if name.startswith("baselines")]  # of all models, after them
    order = [name for name in found if name in names and name not in last] + last
    unknown = [name for model in models for name in in_order(stage_names(suite, [model], probes)) if name not in found]
    return (
        reused
        | {name: found[name] for name in order}
        | {name: OF_TRAINING if kind_of(name) == "train" else OF_OTHERS for name in unknown}
    )


KINDS = ("tokenizer", "begin", "train", "curve", "update", "fit", "share", "plan", "score")
"""Kinds of stages of a model in their order; probes and the like come after them"""


def in_order(names: set[str]) -> list[str]:
    """The stages of a model, about in the order that they run in."""
    return sorted(names, key=lambda name: (KINDS.index(kind) if (kind := kind_of(name)) in KINDS else len(KINDS), name))


def of_model(
    suite: Suite, model: ModelRecipe, probes: tuple[str, ...], device: torch.device, known: dict[str, Shape]
) -> dict[str, float]:
    """The stages of one model; none where the suite's seeds leave it out. ``known``: see :func:`shape_of`."""
    if not suite.seeds_of(model):
        return {}
    with torch.random.fork_rng(devices=[]):  # a model is built for its sizes; no draw of the run may depend on that
        shape = shape_of(suite, model, known)
    rates = supposed_rates(suite, model, shape, device)
    return {
        name: max(seconds(cost.work, rates), OF_PROBE if name.startswith("probe-") else 0.0)
        for name, cost in stage_costs(suite, model, shape, probes).items()
    }


def supposed_rates(suite: Suite, model: ModelRecipe, shape: Shape, device: torch.device) -> Rates:
    """What the supposed machine does, with the training steps of a model that is trained here."""
    rates, owner = TWO_CORES if device.type == "cpu" else ACCELERATOR, suite.trained(model)
    if owner.source is not None:
        return rates
    recipe = suite.training_of(owner)
    step = seconds(3 * forward(shape, recipe.batch, recipe.length, recipe.length), rates)
    return replace(rates, steps=1 / (step + SECONDS_OF_LAYER * shape.layers))
