"""A finished run is never replaced by a run of other models or another text."""

from lensbench.errors import LensbenchError
from lensbench.models.pretrained import named
from lensbench.results.folder import earlier_manifest
from lensbench.results.manifest import Manifest
from lensbench.run.context import Context
from lensbench.run.inputs import identity_of, source_of
from lensbench.suite.recipes import ModelRecipe


def refuse_replacing(context: Context, asked: list[ModelRecipe]) -> None:
    """Raise :class:`LensbenchError` where the run folder holds a finished run of other models or another text.

    The same suite with other settings or seeds replaces its own run, and more of its models make the run grow.
    """
    earlier = earlier_manifest(context.folder)
    if earlier is None:
        return
    holds = f"{context.folder} holds a finished run of suite {earlier.suite_name} "
    if earlier.corpus.checksum != source_of(context).checksum:
        raise LensbenchError(
            f"{holds}on {earlier.corpus.spec} (SHA-256 {earlier.corpus.checksum[:12]}), which is another text or other "
            "images than this run's; give --out another folder"
        )
    models = {m.name: m for m in context.suite.models}
    if gone := [name for name in earlier.models if name not in models]:
        raise LensbenchError(f"{holds}with model {gone[0]!r}, which this run does not have; give --out another folder")
    for name in earlier.models:
        if other := other_source(context, earlier, models[name], checked=models[name] in asked):
            raise LensbenchError(f"{holds}with {other}; give --out another folder")


def other_source(context: Context, earlier: Manifest, model: ModelRecipe, *, checked: bool) -> str | None:
    """What an earlier run's model of this name was, where it is another model; ``checked``: by its files too."""
    facts = dict(earlier.sources.get(model.name, {}))
    source = facts.pop("source", None)
    if source is None and model.source is None:
        return None
    if model.source is None or source != named(model.source):
        return f"model {model.name!r} from {source}" if source else f"a model {model.name!r} trained there"
    if checked and facts != identity_of(context, model.source):
        return f"other weights of model {model.name!r}, also from {source}"
    return None
