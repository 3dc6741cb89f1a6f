"""What a run would take: its stages with seconds, memory and disk, before anything is computed or written."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lensbench.data.sources import refuse_missing
from lensbench.errors import LensbenchError
from lensbench.models import build, count_parameters
from lensbench.models.pretrained import check_context, load_config
from lensbench.results.folder import holds_work, owner_of
from lensbench.run import costs
from lensbench.run.baselines import baselines
from lensbench.run.beginnings import beginning_facts, windows_of
from lensbench.run.context import Context
from lensbench.run.costs import Cost, Counts, Shape, Work
from lensbench.run.curves import has_curve, learning_curve
from lensbench.run.fitting import fitting
from lensbench.run.further_scores import PRECISION, asked_for, further_stages
from lensbench.run.inputs import data_of, read_corpus
from lensbench.run.origin import REMEDY, origin_of
from lensbench.run.probe_costs import LOOPING, OF_VIEWS, READS_SCORED, Asked, probe_cost
from lensbench.run.probing import probing
from lensbench.run.replacing import refuse_replacing
from lensbench.run.schedule import TimedTask, seconds_side_by_side
from lensbench.run.scoring import scoring
from lensbench.run.short_text import refuse_short_text
from lensbench.run.speeds import Speed, measured_speed
from lensbench.run.stage_names import stage_names
from lensbench.run.updating import updating
from lensbench.run.workers import models_at_once
from lensbench.runtime.environment import dtype_named
from lensbench.runtime.left import kind_of
from lensbench.runtime.progress import Quiet
from lensbench.runtime.rates import Rates, Stopwatch, half_is_fast, measured_rates, product_rate
from lensbench.runtime.stages import NotFinished, Stages
from lensbench.streams.half import LEAST_PARAMETERS
from lensbench.streams.products import LEAST_WEIGHTS
from lensbench.streams.stream import ResidualStream
from lensbench.suite.recipes import ModelRecipe, Suite


@dataclass(frozen=True)
class PlannedStage:
    """A stage that a run would compute, or find finished."""

    name: str
    seconds: float
    """Predicted; of a finished one what it took"""
    cost: Cost
    finished: bool
    floor: float = 0.0
    """Seconds of the model's passes alone, at the rate of the products that they are made of"""


@dataclass(frozen=True)
class Forecast:
    """The stages of a run in their order, and the machine that they are predicted for."""

    stages: list[PlannedStage]
    rates: dict[str, Rates]
    """By the type that models compute in"""
    unchecked: tuple[str, ...] = ()
    """What was not checked of the text, in a line each"""
    at_once: int = 1
    """Processes that compute models side by side"""
    side_by_side: float = 0.0
    """Seconds until the last of them is done"""
    half: float = 0.0
    """FLOPs in a second of products in float16, where models are predicted to use them; 0: none does"""

    @property
    def missing(self) -> list[PlannedStage]:
        """Those that would be computed."""
        return [stage for stage in self.stages if not stage.finished]


def forecast(
    suite: Suite,
    folder: Path,
    *,
    device: torch.device,
    only: tuple[str, ...] = (),
    probes: tuple[str, ...] = (),
    strict: bool = False,
    workers: int | None = 1,
) -> Forecast:
    """What a run into ``folder`` would compute, and what it would take; nothing is computed of it and nothing written.

    The text is read, and of pretrained models the config and the tokenizer. Raises :class:`LensbenchError` where the run
    itself would be refused, for example as the text is too short, and for suites of images.
    """
    if suite.images is not None:
        raise LensbenchError(f"--dry-run is for suites of text: what images of {suite.name} cost is not predicted")
    refuse_missing(suite.corpus.spec)
    asked = [model for model in suite.models if not only or model.name in only]
    noted = Noted()
    context = Context(suite, Stages(folder / "stages", looking=True), device, noted, compute=False)
    if strict:
        context.cache.corpus = read_corpus(suite, noted, strict=True)
    finished = finished_stages(context, noted, asked, probes)
    known: dict[str, Shape] = {}
    shapes = {model.name: shape_of(suite, model, known) for model in asked if suite.seeds_of(model)}
    unchecked = refuse_short_text(context, [model for model in asked if model.name in shapes])
    dtypes = {suite.trained(model).dtype for model in asked}
    width = max(shape.width for shape in shapes.values())
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(suite.threads or before)
        rates: dict[str, Rates] = {
            str(dtype): measured_rates(device, dtype_named(dtype), width) for dtype in sorted(dtypes)
        }
        own = rates_of_models(suite, [m for m in asked if m.name in shapes], shapes, rates, device)
    finally:
        torch.set_num_threads(before)
    stages: list[PlannedStage] = []
    tasks: list[TimedTask] = []
    for model in asked:
        if model.name not in shapes:
            continue
        before_it = len(stages)
        for name, cost in stage_costs(suite, model, shapes[model.name], probes).items():
            if name not in {stage.name for stage in stages}:
                took = finished.get(name)
                predicted = seconds_of_stage(name, cost.work, own[model.name], device)
                floor = cost.work.model / (own[model.name].peak or own[model.name].model)
                stages.append(PlannedStage(name, predicted if took is None else took, cost, took is not None, floor))
        tasks += tasks_of(suite, model, stages[before_it:])
    count = models_at_once(suite, asked, workers, device, before)
    half = max(found.read for found in own.values()) / HALF_READ
    return Forecast(stages, rates, tuple(unchecked), count, seconds_side_by_side(tasks, count), half)


def tasks_of(suite: Suite, model: ModelRecipe, stages: list[PlannedStage]) -> list[TimedTask]:
    """The stages of a model that are missing, as the tasks of :func:`lensbench.run.workers.in_parts` for each seed."""
    owner = suite.whole_training(suite.trained(model))
    found = []
    for seed in suite.seeds_of(model):
        of_all = ("begin-", "tokenizer", "baselines")
        of_seed = [
            s for s in stages if not s.finished and (s.name.endswith(f"-seed{seed}") or s.name.startswith(of_all))
        ]
        shared = sum(stage.seconds for stage in of_seed if stage.name.startswith(("train-", "begin-")))
        own = sum(stage.seconds for stage in of_seed) - shared
        name, rest = f"{owner.name}-seed{seed}", 0.0
        if suite.update is not None and owner.source is None:
            rest = own - sum(s.seconds for s in of_seed if kind_of(s.name) in ("update", "curve"))
        found.append(TimedTask(name, shared, own - rest, owner.source is not None))
        if rest > 0:
            found.append(TimedTask(name, 0.0, rest, first=False))
    return found


REACHED = {"update": 0.55, "fit": 0.6, "share": 0.7, "score": 0.65}
"""Share of a CPU's measured rates that stages of a kind reach, passes of the model apart.

Their products are of middling size, with small steps in between. Of SmolLM2-135M and of the models of `quick`.
"""


def seconds_of_stage(name: str, work: Work, rates: Rates, device: torch.device) -> float:
    """How long a stage takes."""
    if name.startswith("probe-") and rates.own:
        rates = replace(rates, model=rates.own)
    passes = Work(model=work.model, steps=work.steps)
    reached = REACHED.get(kind_of(name), 1.0) if device.type == "cpu" else 1.0
    return seconds(passes, rates) + seconds(replace(work, model=0.0, steps=0.0), rates) / reached


def seconds(work: Work, rates: Rates) -> float:
    """How long some work takes at these rates."""
    return float(sum(getattr(work, kind.name) / (getattr(rates, kind.name) or rates.single) for kind in fields(work)))


def rates_of_models(
    suite: Suite, models: list[ModelRecipe], shapes: dict[str, Shape], rates: dict[str, Rates], device: torch.device
) -> dict[str, Rates]:
    """The rates of each model, by name: of those that are built here with their own, each architecture measured once."""
    speeds: dict[str, Speed] = {}
    found = {}
    for model in models:
        owner, recipe = suite.trained(model), suite.training_of(suite.trained(model))
        found[model.name] = rates[owner.dtype]
        if owner.source is not None:
            if device.type == "cpu":
                found[model.name] = on_processor(suite, owner, shapes[model.name], rates[owner.dtype])
            continue
        trains = not owner.untrained
        alike = repr(
            (owner.family, owner.shape, owner.settings, trains, recipe.deep_supervision, recipe.read_out_alone)
        )
        if alike not in speeds:
            speeds[alike] = measured_speed(
                network_of(suite, owner), shapes[model.name], recipe, rates[owner.dtype], device, trains
            )
        found[model.name] = speeds[alike].within(rates[owner.dtype], shapes[model.name], recipe.length)
    return found


PASSES, HALF_PASSES, HALF_READ = 0.63, 0.3, 0.45
"""Share of a processor's rates that passes of a model reach, in its own type and in float16, and read-outs in float16.

Between products, passes attend, normalise and add. Of SmolLM2-135M.
"""


def on_processor(suite: Suite, owner: ModelRecipe, shape: Shape, rates: Rates) -> Rates:
    """The rates of a pretrained model on a processor, which makes some products in float16 where it is fast at them.

    That they agree with float32 is taken for granted.
    """
    own, peak, read = PASSES * rates.model, rates.model, 0.0
    passes = own
    if suite.evaluate.half_products and half_is_fast():
        half = product_rate(Stopwatch(torch.device("cpu")), torch.float16, shape.width)
        if owner.dtype == "float32" and shape.parameters >= LEAST_PARAMETERS:
            passes, peak = HALF_PASSES * half, half
        if shape.vocabulary * shape.width >= LEAST_WEIGHTS:
            read = HALF_READ * half
    return replace(rates, model=passes, own=own, peak=peak, read=read)


# Shapes
def network_of(suite: Suite, owner: ModelRecipe) -> PreTrainedModel:
    """A model that is trained here, as it is before training."""
    shape = {"vocab_size": suite.corpus.vocab_size, "context": suite.training.length}
    return build(str(owner.family), **shape, **owner.shape, **owner.settings)


def shape_of(suite: Suite, model: ModelRecipe, known: dict[str, Shape] | None = None) -> Shape:
    """The sizes of a model: from its config, or, of one that is trained here, from the model as it is built.

    ``known``: sizes found so far, to which these are added. Of checkpoints of a training, or revisions of a repository, one
    is built.
    """
    owner = suite.trained(model)
    of = None if owner.source is None else owner.source.partition("@")[0]
    alike = repr((of, owner.dtype, owner.family, owner.shape, owner.settings, model.view))
    if known is None or alike not in known:
        found = _built(suite, owner, model.view)
        if known is None:
            return found
        known[alike] = found
    return known[alike]


def _built(suite: Suite, owner: ModelRecipe, view: str) -> Shape:
    if owner.source is not None:
        check_context(f"model {owner.name}", load_config(owner.source), suite.length, REMEDY)
        return shape_of_source(owner.source, owner.dtype)
    network = network_of(suite, owner)
    stream = ResidualStream(network.eval(), view)
    outer = embedded(network)
    body = count_parameters(network) - outer
    heads, errors = getattr(network.config, "num_attention_heads", 1), owner.family == "predictive-coding"
    return Shape(stream.layers, stream.d_model, stream.vocab_size, body, outer, heads=heads, errors=errors)


def shape_of_source(source: str, dtype: str) -> Shape:
    """The sizes of a pretrained model, from its config alone."""
    config = load_config(source)
    try:
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise LensbenchError(f"{source}: no model can be made of its config: {reason}") from error
    text, outer = config.get_text_config(), embedded(network)
    each = torch.empty(0, dtype=dtype_named(dtype)).element_size()
    return Shape(
        text.num_hidden_layers, text.hidden_size, text.vocab_size, count_parameters(network) - outer, outer, each,
        heads=getattr(text, "num_attention_heads", 1),
    )  # fmt: skip


def embedded(network: PreTrainedModel) -> int:
    """Parameters of embedding and head; a tensor that they share counts once."""
    modules: tuple[Any, ...] = (network.get_input_embeddings(), network.get_output_embeddings())
    weights = {id(m.weight): m.weight for m in modules if hasattr(m, "weight")}
    return sum(int(weight.numel()) for weight in weights.values())


# Stages
def stage_costs(suite: Suite, model: ModelRecipe, shape: Shape, probes: tuple[str, ...]) -> dict[str, Cost]:
    """The stages of a model in the order that they run in, with their costs: the names of :func:`stage_names`."""
    found: dict[str, Cost] = {}
    none, owner = Cost(Work(), costs.PROCESS_GIB * costs.GIB), suite.trained(model)
    for seed in suite.seeds_of(model):
        who, of = f"{model.name}-seed{seed}", Counts.of(suite, shape)
        if owner.source is None:
            found["tokenizer"] = none
            recipe = suite.training_of(owner)
            steps = 0 if owner.untrained else recipe.steps
            found[f"train-{suite.whole_training(owner).name}-seed{seed}"] = costs.train_cost(suite, shape, steps)
            if suite.curve is not None and has_curve(suite, model):
                for tokens in (*suite.curve.budgets, suite.training.tokens):
                    if tokens != suite.training_of(model).tokens:
                        steps = recipe.model_copy(update={"tokens": tokens}).steps
                        found[f"train-{who}-{tokens}"] = costs.train_cost(suite, shape, steps)
                    found[f"curve-{who}-{tokens}"] = Cost(of.captured(shape, "eval"), none.memory)
        else:
            found[f"begin-{owner.name}"] = costs.begin_cost(suite, shape, windows_of(suite))
        if suite.update is not None:
            found[f"update-{who}"] = costs.update_cost(suite, shape, of)
            of = replace(of, there=True)
        found[f"fit-{who}"] = costs.fit_cost(suite, shape, of)
        if suite.evaluate.exact_share == "auto":
            found[f"share-{who}"] = costs.share_cost(suite, shape, of)
        if suite.evaluate.precision is not None:
            found[f"plan-{who}"] = costs.score_cost(suite, shape, of)
        found[f"score-{who}"] = costs.score_cost(suite, shape, of)
        for what in asked_for(suite):
            cost = costs.precision_cost if what == PRECISION else costs.jacobian_matrix_cost
            found[f"{what}-{who}"] = cost(suite, shape, of)
        asked = Asked(suite, shape, of, loops=owner.family in LOOPING)
        captured = asked.windows == of.windows["eval"][0]
        for probe in probes or suite.probes:
            applies = not model.rotated or probe in OF_VIEWS
            found[f"probe-{probe}-{who}"] = probe_cost(asked, probe, captured=captured) if applies else none
            captured |= probe in READS_SCORED
    if found:
        found["baselines" if owner.source is None else f"baselines-{owner.name}"] = none
    return found


@dataclass
class Noted(Quiet):
    """Progress that notes which stages are there, and what they took."""

    finished_stages: dict[str, float] = field(default_factory=dict)

    def finished(self, name: str, seconds: float, reused: bool) -> None:
        """Note a stage."""
        self.finished_stages[name] = seconds


def finished_stages(
    context: Context, noted: Noted, models: list[ModelRecipe], probes: tuple[str, ...]
) -> dict[str, float]:
    """The stages that an earlier run finished and this one would reuse, with the seconds that they took."""
    suite, folder = context.suite, context.folder
    if not folder.is_dir() or not holds_work(folder):
        return {}
    if (owner := owner_of(folder)) not in (None, suite.name):
        raise LensbenchError(f"{folder} holds a run of suite {owner!r}, not {suite.name!r}; give --out another folder")
    refuse_replacing(context)
    for model in models:
        for seed in suite.seeds_of(model):
            looked_for(context, model, seed, probes or suite.probes)
    names = stage_names(suite, models, probes)
    return {name: took for name, took in noted.finished_stages.items() if name in names}


def looked_for(context: Context, model: ModelRecipe, seed: int, probes: tuple[str, ...]) -> None:
    """Ask for each stage of a model and seed; those that are there report themselves to the context's progress."""
    asks: list[Callable[[Context, ModelRecipe, int], Any]] = [origin_of, beginning_facts, updating, fitting, scoring]
    asks.append(further_stages)
    if has_curve(context.suite, model):
        asks.append(learning_curve)
    for ask in asks:
        try:
            ask(context, model, seed)
        except NotFinished:
            continue
    for probe in probes:
        try:
            probing(replace(context, suite=context.suite.model_copy(update={"probes": (probe,)})), model, seed)
        except NotFinished:
            continue
    try:
        baselines(context, data_of(context, model))
    except NotFinished:
        return
