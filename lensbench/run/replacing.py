"""A finished run is never replaced by a run of other models or another text."""

from collections.abc import Callable
from functools import partial

from lensbench.errors import LensbenchError
from lensbench.models.pretrained import named
from lensbench.results.folder import earlier_manifest
from lensbench.results.manifest import MANIFEST
from lensbench.run.context import Context
from lensbench.run.inputs import identity_of, source_of
from lensbench.run.sources import lens_identity


def refuse_replacing(context: Context) -> None:
    """Raise :class:`LensbenchError` where the run folder holds a finished run of other models or another text.

    The same suite with other settings or seeds replaces its own run, and more of its models make the run grow. A model is
    another one where its name, its source or its files differ; a lens that others fitted likewise.
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
        file = _changed(earlier.sources.get(name, {}), model.source, partial(identity_of, context))
        lens = _changed(earlier.lenses.get(name, {}), model.lens, lens_identity)
        if changed := file or lens:
            now = model.source if file else model.lens
            raise LensbenchError(
                f"{holds}with model {name!r}, of which {changed} is another one now ({now}): its results would be replaced "
                f"by those of another model; give --out another folder, or delete {context.folder / MANIFEST} first"
            )


def _changed(before: dict[str, str], source: str | None, identified: Callable[[str], dict[str, str]]) -> str | None:
    """The first file (or the commit) of a source that is another one than ``before``; None where nothing is known of it."""
    if not before or source is None:
        return None
    try:
        now = identified(source)
    except LensbenchError:
        return None  # a model that is asked for is refused for it, and of another one the rows are kept or it is told
    names = ({*before} | {*now}) - {"source", "lens"}
    return next((name for name in sorted(names) if before.get(name) != now.get(name)), None)
