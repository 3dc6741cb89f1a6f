"""The stages of a learning curve: trainings of several budgets, scored by position."""

from pathlib import Path

from lensbench.data.windows import Windows
from lensbench.run.context import Context
from lensbench.run.inputs import data_of, eval_samples
from lensbench.run.training import TRAINING, trained_network, training
from lensbench.runtime.stages import ANEW, Stage
from lensbench.runtime.texts import read_json
from lensbench.studies.curves import CurvePoint, PositionSums, score_positions
from lensbench.suite.recipes import ModelRecipe, Suite


def has_curve(suite: Suite, model: ModelRecipe) -> bool:
    """Whether the suite asks for a learning curve and trains this model; a view or a checkpoint has none."""
    trained = model.view_of is None and model.source is None and not model.untrained and model.checkpoint is None
    return suite.curve is not None and trained


def learning_curve(context: Context, model: ModelRecipe, seed: int) -> list[CurvePoint]:
    """The learning curve of a model that is trained here, a point per budget; else empty."""
    recipe = context.suite.curve
    if recipe is None or not has_curve(context.suite, model):
        return []
    data, points = data_of(context), []
    for tokens in (*recipe.budgets, context.suite.training.tokens):
        trained = training(context, data, model, seed, tokens=tokens)

        def measure(folder: Path, trained: Stage = trained) -> None:
            windows = eval_samples(context, data)
            assert isinstance(windows, Windows)
            score_positions(trained_network(context, trained).eval(), windows, recipe.positions).save(folder)

        evaluate = context.suite.evaluate.model_dump(
            include={"sequences", "positions", "max_share", "turns", "first_position"}
        )
        key = {"trained": trained.digest, "texts": data.digest, "length": context.suite.length}
        key |= {"evaluate": evaluate, "sequences": context.sequences, "positions": recipe.positions}
        scored = PositionSums.load(context.stage(f"curve-{model.name}-seed{seed}-{tokens}", key, measure).folder)
        timed = trained.folder / TRAINING
        # A stage of an earlier version knows only what it took as a whole.
        whole = context.stages.seconds[timed.parent.name]
        seconds = read_json(timed, ANEW)["seconds"] if timed.exists() else whole
        points.append(CurvePoint(model.name, seed, tokens, seconds, scored))
    return points
