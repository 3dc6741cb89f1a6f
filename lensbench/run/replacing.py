"""A finished run is never replaced by a run of other models or another text."""

from lensbench.errors import LensbenchError
from lensbench.models.pretrained import named
from lensbench.results.folder import earlier_manifest
from lensbench.run.context import Context
from lensbench.run.inputs import source_of


def refuse_replacing(context: Context) -> None:
    """Raise :class:`LensbenchError` where the run folder holds a finished run of other models or another text.

    The same suite with other settings or seeds replaces its own run, also with new files in the place of a model, and
    more of its models make the run grow.
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
        source, model = earlier.sources.get(name, {}).get("source"), models[name]
        if source != (None if model.source is None else named(model.source)):
            other = f"model {name!r} from {source}" if source else f"a model {name!r} trained there"
            raise LensbenchError(f"{holds}with {other}; give --out another folder")
