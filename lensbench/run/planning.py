"""The stage that finds how many sequences a stated precision needs."""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lensbench.errors import LensbenchError
from lensbench.lenses.estimated import Estimator
from lensbench.lenses.fit import Fit
from lensbench.measures.transfer import penalties, transfer_sums
from lensbench.run.capturing import captured_states
from lensbench.run.context import Context
from lensbench.run.fitting import fitting, rotation_of
from lensbench.run.inputs import data_of, eval_samples
from lensbench.run.origin import origin_of, stream_of
from lensbench.run.sharing import estimate_key, exact_share_of, shares_in
from lensbench.runtime.files import write_json
from lensbench.runtime.stages import Stage
from lensbench.statistics import half_width
from lensbench.suite.recipes import ModelRecipe


@dataclass(frozen=True)
class Pilot:
    """What scoring some of the sequences showed."""

    sequences: int
    exhausted: bool
    """Whether the text has no more sequences"""
    width: float
    """Half-width of the widest interval of a penalty, nats"""
    seconds: float


def planning(context: Context, model: ModelRecipe, seed: int) -> Stage:
    """The stage that finds how many sequences the suite's precision needs for this model, and how long they take.

    Scores the transfer matrix on the suite's ``sequences`` as a pilot, then on as many as that predicts, and on more,
    until the interval of every penalty is narrow enough or the text is used up.
    """
    fitted, recipe = fitting(context, model, seed), context.suite.evaluate
    who = f"{model.name}-seed{seed}"

    def compute(folder: Path) -> None:
        target = recipe.precision
        assert target is not None
        count, spent = recipe.sequences, 0.0
        with context.progress.task(f"plan-{who}", 100, "% of the precision") as task:
            while True:
                pilot = scored_pilot(context, model, seed, count)
                width, spent = pilot.width, spent + pilot.seconds
                reached = min(100, round(100 * (target / width) ** 2)) if width > 0 else 100
                task.update(reached, f"half-width {width:.4f} nats")
                if width <= target or pilot.exhausted:
                    break
                count = next_count(context, model, pilot, count, target)
        context.progress.say(
            f"{model.name}: half-width {width:.4f} nats with {pilot.sequences} sequences, {spent:.0f} s"
            + ("" if width <= target else f"; the text has no more, so precision {target:g} is not reached")
        )
        found = {"sequences": pilot.sequences, "half_width": width, "reached": width <= target}
        write_json(folder / "plan.json", {**found, "seconds": round(spent, 2)})

    key: dict[str, Any] = {"fit": fitted.digest, "evaluate": recipe.scored}
    if recipe.exact_share != 1:
        key["estimate"] = {**estimate_key(), **exact_share_of(context, model, seed)}
    return context.stage(f"plan-{who}", key, compute, together=True)


def scored_pilot(context: Context, model: ModelRecipe, seed: int, count: int) -> Pilot:
    """Widths of the penalties' intervals on at most ``count`` held-out sequences."""
    fitted, who = fitting(context, model, seed), f"{model.name}-seed{seed}"
    fit, share = Fit.load(fitted.folder), shares_in(exact_share_of(context, model, seed))
    origin = origin_of(context, model, seed)
    stream = stream_of(context, origin, model.view)
    start = time.perf_counter()
    samples = eval_samples(context, data_of(context, model), count)
    captured, readout = captured_states(
        context, stream, samples, name=f"capture-plan-{who}", origin=origin, constant=fit.constant,
        rotation=rotation_of(fitted), ranks=context.ranks,
    )  # fmt: skip
    maps = fit.headline.maps
    estimator = Estimator.where_it_saves(readout, captured, maps, share=share, seed=(seed,))
    sums = transfer_sums(readout, captured, maps, movement=False, estimator=estimator)
    seconds = context.ranks.told(time.perf_counter() - start)
    clusters, tokens = samples.clusters, samples.valid.sum(1)
    width = max(float(half_width(penalties(x), tokens, clusters).max()) for x in (sums.kl, sums.ce))
    return Pilot(len(samples), len(samples) < count, width, seconds)


def next_count(context: Context, model: ModelRecipe, pilot: Pilot, asked: int, target: float) -> int:
    """How many sequences to try next; raises :class:`LensbenchError` where they are predicted to take too long."""
    # Somewhat more than the square law says, since the widest of many intervals was picked.
    count = max(asked + 1, math.ceil(1.1 * asked * (pilot.width / target) ** 2))
    hours = pilot.seconds * count / asked / 3600
    context.progress.say(
        f"{model.name}: half-width {pilot.width:.4f} nats at {asked} sequences; {target:g} needs about {count}, "
        f"predicted to take {hours * 3600:,.0f} s"
    )
    if hours > context.max_hours:
        raise LensbenchError(
            f"precision {target:g} is predicted to take {hours:.2f} hours of scoring {model.name} "
            f"({count} sequences), more than --max-hours {context.max_hours:g}; raise one of the two"
        )
    return count
