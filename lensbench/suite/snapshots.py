"""Models of a suite written out: rotated views by name, the revisions of a source, and the checkpoints of a training."""

from collections.abc import Iterator, Mapping
from typing import Any

ROTATED = "+rotated"
"""The end of a name that alone says that a model is the rotated view of another"""

AT = "@"
"""Between the name of a model and its revision, or the tokens of its checkpoint"""

Model = Mapping[str, Any]


def written_out(content: Any) -> Any:
    """A suite's content with one model for each that its models stand for; what is malformed stays for the fields to refuse.

    Raises ValueError for revisions and checkpoints that cannot be.
    """
    models = content.get("models") if isinstance(content, Mapping) else None
    if not isinstance(models, list | tuple) or not all(isinstance(m, Mapping) for m in models):
        return content
    whole = [one for model in _rotated_by_name(models) for one in _revisions(model)]
    return {**content, "models": list(_with_checkpoints(whole, content.get("training")))}


def without_checkpoints(models: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The models of a suite that was written out but for its checkpoints, which follow from its training."""
    return [model for model in models if model.get("checkpoint") is None]


def _rotated_by_name(models: list[Model] | tuple[Model, ...]) -> Iterator[Model]:
    """A model that is nothing but ``name = "MODEL+rotated"`` is the rotated view of MODEL, whichever view that is."""
    by_name = {m["name"]: m for m in models if isinstance(m.get("name"), str)}
    for model in models:
        of = by_name.get(str(model.get("name")).removesuffix(ROTATED))
        if set(model) == {"name"} and of is not None and of is not model:
            view = {"view": of["view"]} if "view" in of else {}
            yield {**model, "view_of": of.get("view_of", of["name"]), **view, "rotated": True}
        else:
            yield model


# Revisions
def _revisions(model: Model) -> Iterator[Model]:
    """``MODEL@REVISION`` for each of a source's revisions, with the tokens that it was trained on."""
    revisions = model.get("revisions")
    if not revisions:
        yield model
        return
    name, source, tokens = model.get("name"), model.get("source"), model.get("train_tokens")
    if not isinstance(revisions, list | tuple) or not all(isinstance(r, str) and r for r in revisions):
        raise ValueError(f"model {name!r}: revisions is a list of names, not {revisions!r}")
    if len(set(revisions)) < len(revisions):
        raise ValueError(f"model {name!r}: a revision is named twice")
    if not isinstance(source, str) or not source.startswith(("hub:", "path:")):
        raise ValueError(
            f"model {name!r} has revisions, which are of hub:ORG/NAME, or folders within a path:FOLDER; its source is "
            f"{source!r}"
        )
    if source.startswith("hub:") and AT in source:
        raise ValueError(
            f"model {name!r} has revisions, and its source names one: give hub:{source[4:].partition(AT)[0]}"
        )
    if tokens is not None and (not isinstance(tokens, list | tuple) or len(tokens) != len(revisions)):
        raise ValueError(
            f"model {name!r}: train_tokens is a list of a number for each of its {len(revisions)} revisions"
        )
    for number, revision in enumerate(revisions):
        one = {key: value for key, value in model.items() if key not in ("revisions", "train_tokens")}
        one |= {"name": f"{name}{AT}{revision.replace('/', '-')}", "source": _at_revision(source, revision)}
        yield one if tokens is None else {**one, "train_tokens": tokens[number]}


def _at_revision(source: str, revision: str) -> str:
    """``hub:NAME@REVISION``, or the folder of the revision within that of the source."""
    return f"{source}{AT}{revision}" if source.startswith("hub:") else f"{source.rstrip('/')}/{revision}"


# Checkpoints
def _with_checkpoints(models: list[Model], training: Any) -> Iterator[Model]:
    """``MODEL@TOKENS`` in front of a model that is trained here, for each of its checkpoints; views of it likewise."""
    by_name = {str(m.get("name")): m for m in models}
    kept = {name: _checkpoints_of(model, by_name, training) for name, model in by_name.items()}
    for model in models:
        of, tokens = model.get("checkpoint_of"), model.get("checkpoint")
        if tokens is not None and tokens not in kept.get(str(of), ()):
            raise ValueError(f"model {model.get('name')!r} is a checkpoint that the training of {of!r} does not keep")
        name = str(model.get("name"))
        for at in kept[name]:
            if f"{name}{AT}{at}" not in by_name:
                one = {**model, "name": f"{name}{AT}{at}", "checkpoint": at, "checkpoint_of": name}
                yield one if model.get("view_of") is None else {**one, "view_of": f"{model['view_of']}{AT}{at}"}
        yield model


def _checkpoints_of(model: Model, by_name: Mapping[str, Model], training: Any) -> tuple[int, ...]:
    """The tokens at which the training of a model, or of the model that it is a view of, keeps it."""
    if model.get("checkpoint") is not None or model.get("rotated"):
        return ()
    owner = by_name.get(str(model.get("view_of")), {}) if model.get("view_of") is not None else model
    if owner.get("source") is not None or owner.get("untrained") or owner.get("view_of") is not None:
        return ()
    found: Any = ()
    for table in (training, owner.get("training")):
        if isinstance(table, Mapping):
            found = table.get("checkpoints", found)
    right = isinstance(found, list | tuple) and all(isinstance(n, int) and not isinstance(n, bool) for n in found)
    return tuple(found) if right else ()
