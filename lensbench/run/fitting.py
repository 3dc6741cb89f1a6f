"""The stage that fits the lenses of a model."""

from pathlib import Path
from typing import Any

from lensbench.data.windows import Windows
from lensbench.errors import LensbenchError
from lensbench.lenses.fit import FIT_FORMAT, fit
from lensbench.lenses.jacobian import JacobianSource
from lensbench.lenses.maps import AffineMaps
from lensbench.lenses.moments import Moments
from lensbench.lenses.planning import FitContext
from lensbench.lenses.tuned import load_tuned_lens, maps_of
from lensbench.models.pretrained import commit_of
from lensbench.run.capturing import captured_states
from lensbench.run.context import Context
from lensbench.run.inputs import data_of, identity_of
from lensbench.run.origin import Origin, origin_of, stream_of
from lensbench.run.sources import lens_identity
from lensbench.runtime.stages import Pieces, Stage
from lensbench.streams.capture import Capture
from lensbench.streams.rotated import RotatedView
from lensbench.streams.stream import ResidualStream
from lensbench.suite.recipes import ModelRecipe

ROTATION = "rotation.safetensors"
"""In the fit stage of a rotated view: the maps that its states were seen through."""


ROTATED_MODELS = 1_000_000
"""First seed of the maps of rotated views that are models of a suite; those of the nulls count from zero."""


def fitting(context: Context, model: ModelRecipe, seed: int) -> Stage:
    """The stage that fits a model's lenses, for one view and seed."""
    origin, data, recipe = origin_of(context, model, seed), data_of(context, model), context.suite.fit
    who = f"{model.name}-seed{seed}"

    def compute(folder: Path) -> None:
        stream = stream_of(context, origin, model.view)
        if stream.layers < 2:
            raise LensbenchError(f"model {model.name} has one layer: there is nothing to transfer a lens to")
        loaded = None if model.lens is None else loaded_lens(model.lens, stream)
        samples = windows = data.samples(**recipe.of_fit)
        captured, _ = captured_states(
            context, stream, samples, name=f"capture-fit-{who}", origin=origin, ranks=context.ranks
        )
        samples, constant = data.samples(**recipe.of_dev), captured.mean_p
        dev, readout = captured_states(
            context, stream, samples, name=f"capture-dev-{who}", origin=origin, constant=constant, ranks=context.ranks
        )
        view = None
        if model.rotated:
            view = random_bases(context, captured, seed)
            view.save(folder / ROTATION)
            captured, dev = view.apply(captured), view.apply(dev)
        jacobians = None
        if recipe.lenses:
            assert isinstance(windows, Windows)  # the suite refuses further kinds of images
            jacobians = JacobianSource(
                stream, windows, recipe.jacobian, seed, context.suite.evaluate.first_position, view, context.ranks
            )
        pieces = Pieces(folder / "pieces", context.ranks, mapped=True)
        work = FitContext.of(
            readout, captured, dev, recipe, seed=seed, loaded=loaded, jacobians=jacobians, pieces=pieces,
            progress=context.progress,
        )  # fmt: skip
        fitted = fit(work, task=f"fit-{who}")
        fitted.save(folder)
        source, label = origin.facts["source"], label_of(context, model, origin)
        of_hub = source is not None and source.startswith("hub:")
        commit = commit_of(identity_of(context, source)) if of_hub else ""
        fitted.export(folder, readout, model_name=label, source=source, commit=commit)
        pieces.clear()

    key: dict[str, Any] = {
        "trained": origin.digest,
        "texts": data.digest,
        "length": context.suite.length,
        "view": model.view,
        "fit": recipe.fitted,
        "format": FIT_FORMAT,
        "seed": seed,
        "first_position": context.suite.evaluate.first_position,
    }
    if model.rotated:
        key["rotated"] = True
    if model.lens is not None:
        key["lens"] = lens_identity(model.lens)
    return context.stage(f"fit-{who}", key, compute, together=True)


def random_bases(context: Context, captured: Capture, seed: int) -> RotatedView:
    """The random bases of a rotated view that is a model of the suite, from its fitting tokens."""
    covariance = Moments.of(captured).covariance
    return RotatedView.random(covariance, seed=ROTATED_MODELS + seed, variance=context.suite.fit.variance)


def label_of(context: Context, model: ModelRecipe, origin: Origin) -> str:
    """The model's name in the lenses that others load: its source, or ``SUITE/MODEL``."""
    label = origin.facts["source"] or f"{context.suite.name}/{model.name}"
    return str(label).removeprefix("hub:")


def loaded_lens(source: str, stream: ResidualStream) -> AffineMaps:
    """Per-layer lenses that others fitted, ``[L, d, d]``; raises :class:`LensbenchError` for those of another model."""
    maps = maps_of(load_tuned_lens(stream.readout, source))
    if maps.offset.shape != (stream.layers, stream.d_model):
        raise LensbenchError(
            f"{source}: the lens has {maps.offset.shape[0]} layers of width {maps.offset.shape[1]}, "
            f"the model {stream.layers} of {stream.d_model}"
        )
    return maps


def rotation_of(fitted: Stage) -> RotatedView | None:
    """The maps that a rotated view's states are seen through; None for a model as it is."""
    path = fitted.folder / ROTATION
    return RotatedView.load(path) if path.exists() else None
