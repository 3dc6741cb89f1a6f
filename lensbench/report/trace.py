"""What every layer predicts next in one text, through any lens: the model and lens that a command names, and the trajectory.

The trajectory is tuned-lens's own, for any model and lens. :mod:`lensbench.report.trace_tables` shows it in the terminal,
:mod:`lensbench.report.trace_page` as a page by itself.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tuned_lens.nn.lenses import Lens, LogitLens
from tuned_lens.plotting import PredictionTrajectory

from lensbench.data.reading import Document
from lensbench.data.tokens import check_ids, tokenize
from lensbench.errors import LensbenchError
from lensbench.lenses.fit import FIT_SUMMARY, Fit
from lensbench.lenses.kinds import KINDS
from lensbench.lenses.trajectory import prediction_trajectory, trajectory_in_place
from lensbench.lenses.tuned import SharedLens, load_tuned_lens, tuned_lens
from lensbench.models.pretrained import Pretrained, check_context, check_source, identity, locate, named
from lensbench.models.training import checkpoint_folder
from lensbench.results.folder import OWNER, refuse_no_folder, refuse_unfinished
from lensbench.results.manifest import Manifest, read_manifest
from lensbench.runtime.texts import read_json
from lensbench.streams.readout import ReadOut
from lensbench.streams.stream import ResidualStream
from lensbench.suite.files import name_of

LENSES_OF_A_RUN = ("tuned", "shared", "shared_bias", "tuned_headline")
"""Lenses that a run leaves in its stages."""


LENSES = (
    f"logit; of a run (with --run FOLDER) {', '.join(LENSES_OF_A_RUN)} or another kind that it fitted "
    f"({', '.join(kind for kind in KINDS if kind not in LENSES_OF_A_RUN)}); path:FOLDER of a tuned or shared lens; "
    "hub:RESOURCE of a tuned lens"
)
"""What a lens can be"""


@dataclass(frozen=True)
class TracedModel:
    """What to trace: the source of a model, the view of its stream, and the source of a lens (None: the logit lens)."""

    model: str
    view: str
    lens: str | None


def traced_model(model: str, lens: str | None, run: Path | None, seed: int | None) -> TracedModel:
    """What ``model`` and ``lens`` name, alone or in the folder of a run.

    In a run, ``model`` is a name of one of its models, or a source whose lenses the run fitted. The lens is the run's shared
    one where none is named, the seed is its first. Raises :class:`LensbenchError` for what is missing.
    """
    of_a_run = (*LENSES_OF_A_RUN, *(kind for kind in KINDS if kind != "logit"))
    if lens is not None and lens not in (*of_a_run, "logit") and not lens.startswith(("path:", "hub:")):
        raise LensbenchError(f"unknown lens {lens!r}: a lens is {LENSES}")
    if run is not None:
        return _of_a_run(model, lens or "shared", run, seed)
    if lens in of_a_run:
        raise LensbenchError(f"--lens {lens} is one that a run fitted: give its folder with --run")
    if seed is not None:
        raise LensbenchError("--seed chooses among the trainings of a run: give its folder with --run")
    try:
        check_source(model)
    except LensbenchError as error:
        hint = "" if ":" in model else "; the name of a run's model needs that run's folder, --run FOLDER"
        raise LensbenchError(f"{error}{hint}") from error
    return TracedModel(model, "state", None if lens == "logit" else lens)


def _of_a_run(model: str, lens: str, run: Path, seed: int | None) -> TracedModel:
    """A model of a run with one of its lenses, or with another."""
    refuse_no_folder(run)
    refuse_unfinished(run)
    manifest = read_manifest(run)
    if manifest.sweep is not None:
        raise LensbenchError(f"{run} holds a sweep, which has no lenses: give a folder of `lensbench run`")
    if manifest.suite.images is not None:
        raise LensbenchError(f"the models of {run} classify images: there is no text to trace")
    known = {m.name: m.content() for m in manifest.suite.models}
    name = _name_in(run, manifest, model)
    recipe = known[name]
    if recipe.get("rotated"):
        raise LensbenchError(
            f"model {name!r} is a rotated view: what its lenses read is no state of the model; trace {recipe['view_of']!r}"
        )
    owner = known[recipe.get("view_of") or name]
    seed = (owner.get("seeds") or manifest.seeds)[0] if seed is None else seed
    if lens != "logit" and ":" not in lens:
        lens = f"path:{_stage(run, 'fit', name, seed, 'lenses of') / lens}"
    source = model if ":" in model else _source_of(run, owner, seed)
    return TracedModel(source, recipe.get("view", "state"), None if lens == "logit" else lens)


def _source_of(run: Path, owner: dict[str, Any], seed: int) -> str:
    """Where the weights of a run's model are: its own source, or the folder of its training."""
    source: str | None = owner.get("source")
    if not source:
        folder = _stage(run, "train", owner.get("checkpoint_of") or owner["name"], seed, "training of")
        tokens = owner.get("checkpoint")
        return f"path:{folder if tokens is None else checkpoint_folder(folder, tokens)}"
    if source.startswith(("path:", "gguf:")):
        kind, _, held = source.partition(":")
        given = _source_given(run, owner["name"])
        if given is not None:
            return given
        raise LensbenchError(
            f"model {owner['name']!r} was read from {source}, and results hold nobody's folders: name the place of {held}, "
            f"lensbench trace {kind}:PLACE TEXT --run {run}"
        )
    # The results name the file that a package ships, too.
    return source.partition("/")[0] if source.startswith("package:") else source


def _source_given(run: Path, name: str) -> str | None:
    """The source that the command named on this machine, where it still holds the files that were run; else None."""
    try:
        source = read_json(run / OWNER)["sources"][name]
        locate(source)
        same = not _other_files(read_manifest(run), name, source)
    except (LensbenchError, KeyError, TypeError):
        return None  # a folder of another version, or moved: the user is asked for the place
    return str(source) if same else None


def _name_in(run: Path, manifest: Manifest, model: str) -> str:
    """The name that a run has for ``model``: a name, or a source, which the run may have given a name of another kind."""
    models = [m.content() for m in manifest.suite.models]
    name = model
    if ":" in model:
        name, source = name_of(model), named(model)
        same = [m["name"] for m in models if m.get("source") == source]
        alike = [n for n in same if not _other_files(manifest, n, model)]
        if len(alike) > 1 and name not in alike:
            raise LensbenchError(f"{run} has {source} under several names; give one of them: {', '.join(alike)}")
        if same and not alike:
            raise LensbenchError(
                f"{run} holds {same[0]!r} from a {source} of other weights: its lenses are not of {model}; give the model "
                "that was run"
            )
        name = alike[0] if alike and name not in alike else name
    if name not in {m["name"] for m in models}:
        raise LensbenchError(f"{run} has no model {name!r}; it has {', '.join(manifest.models)}")
    return name


def _other_files(manifest: Manifest, name: str, source: str) -> bool:
    """Whether ``source`` holds other files, or another commit, than the run's model ``name`` did."""
    held = manifest.sources.get(name, {})
    now = identity(source) if held else {}
    return any(held[file] != now[file] for file in {*held} & {*now})


def _stage(run: Path, kind: str, name: str, seed: int, what: str) -> Path:
    """The folder of a finished stage; raises :class:`LensbenchError` with the seeds that there are."""
    folder = run / "stages" / f"{kind}-{name}-seed{seed}"
    if not (folder / "stage.json").is_file():
        there = sorted(p.parent.name for p in (run / "stages").glob(f"{kind}-{name}-seed*/stage.json"))
        more = f"; it has {', '.join(there)}" if there else ": its stages are missing"
        raise LensbenchError(f"{run} holds no {what} {name!r} at seed {seed}{more}")
    return folder


def load_lens(stream: ResidualStream, source: str | None) -> Lens:
    """The lens that ``source`` names: a tuned or shared one of a folder, a tuned one of the hub, the logit lens for None.

    Raises :class:`LensbenchError` for a lens of another model.
    """
    if source is None:
        return LogitLens(stream.readout)
    folder = Path(source.removeprefix("path:"))
    if source.startswith("path:") and not folder.exists() and (folder.parent / FIT_SUMMARY).is_file():
        return fitted_lens(stream.readout, folder.parent, folder.name).to(stream.device)
    if source.startswith("path:") and (folder / "params.safetensors").is_file():
        lens: Lens = SharedLens.load(stream.readout, folder)
        width, layers = lens.translator.in_features, None if lens.layer_bias is None else len(lens.layer_bias)
    else:
        lens = load_tuned_lens(stream.readout, source)
        width, layers = lens.config.d_model, len(lens)
    if width != stream.d_model or layers not in (None, stream.layers):
        size = f"width {width}" + ("" if layers is None else f" and {layers} layers")
        other = f"{source}: the lens is of another model: it has {size}, the model {stream.d_model} and {stream.layers}"
        if stream.view == "state" and width == stream.readout.weight.shape[1] != stream.d_model:
            other += "; was it fitted to predictions alone? then name model and lens in their run, with --run"
        raise LensbenchError(other)
    return lens.to(stream.device)


def fitted_lens(readout: ReadOut, stage: Path, kind: str) -> Lens:
    """A lens of some kind in the stage of a fit, refined where it was; it reads every layer.

    Raises :class:`LensbenchError` where the fit holds none of that kind, or for some layers alone.
    """
    fit = Fit.load(stage)
    layers = len(fit.headline.maps)
    own = [lens for lens in fit.lenses if lens.view < 0 and lens.refit < 0]
    able = [lens for lens in own if len(fit[lens].maps) in (1, layers) and lens.kind != "pair"]
    found = [lens for lens in able if lens.kind == kind]
    if not found:
        some = " for every layer" if any(lens.kind == kind for lens in own) else ""
        there = ", ".join(sorted({lens.kind for lens in able}))
        raise LensbenchError(f"{stage} holds no lens {kind!r}{some}; it has {there}")
    best = min(
        found, key=lambda lens: (lens.stage != "refined", lens.tolerance is not None, lens.prior != "zero", str(lens))
    )
    maps = fit[best].maps
    if len(maps) == 1:
        return SharedLens.from_maps(readout, maps)
    return tuned_lens(readout, maps, model_name=kind)


def token_ids(loaded: Pretrained, text: str) -> Tensor:
    """Ids ``[T]`` of a text, after the beginning-of-text token.

    Raises :class:`LensbenchError` for an empty text, and for one that the model cannot read.
    """
    if any("\ud800" <= c <= "\udfff" for c in text):  # what Python makes of bytes that are no UTF-8
        raise LensbenchError("the text is no valid UTF-8: it holds half a character")
    encoded = tokenize(loaded.tokenizer, [Document("text", text)])
    if not encoded:
        raise LensbenchError("the text is empty: give one that has a token")
    ids = torch.from_numpy(encoded[0].ids.astype(np.int64))
    check_context(loaded.source, loaded.model.config, len(ids), "give a text of at most {} tokens")
    check_ids(loaded.source, ids, loaded.model.config.get_text_config().vocab_size)
    return ids


def traced(
    loaded: Pretrained, text: str, lens: str | None = None, last: int | None = None, view: str = "state"
) -> PredictionTrajectory:
    """The trajectory of ``text``, after the beginning-of-text token, under a lens named as in :func:`load_lens`.

    The model reads all of the text; with ``last``, the lens reads only the states of so many tokens at its end.
    Raises :class:`LensbenchError` for an empty text, and for one longer than the model's context.
    """
    ids = token_ids(loaded, text)
    stream = ResidualStream(loaded.model, view)
    return prediction_trajectory(load_lens(stream, lens), stream, ids, loaded.tokenizer, last=last)


def traced_in_place(
    loaded: Pretrained, text: str, lens: str | None = None, last: int | None = None, view: str = "state"
) -> tuple[PredictionTrajectory, NDArray[np.float64]]:
    """What :func:`traced` gives, and each lens read one layer later, ``[L-1, n]``, for :func:`growth_of`."""
    ids = token_ids(loaded, text)
    stream = ResidualStream(loaded.model, view)
    return trajectory_in_place(load_lens(stream, lens), stream, ids, loaded.tokenizer, last)


@dataclass(frozen=True)
class Growth:
    """How the prediction of each next token grows over depth: log-probabilities of ``n`` targets, nats.

    ``start`` ``[n]``: under the lens of layer 0. ``added`` ``[L, n]``: what each block adds, under the lens of the layer
    that it leads to (the last leads to the model itself); ``start + added.sum(0)`` is the model's own. ``in_place``
    ``[L-1, n]``: the share of it that the lens of the earlier layer sees, in nats; ``fixed``: it is all of it, since one
    lens reads both layers alike.
    """

    start: NDArray[np.float64]
    added: NDArray[np.float64]
    in_place: NDArray[np.float64]

    @property
    def fixed(self) -> bool:
        """Whether all that blocks add is in place: one lens reads all layers."""
        return bool(np.allclose(self.in_place, self.added[:-1], atol=1e-5))


def growth_of(trajectory: PredictionTrajectory, later: NDArray[np.float64]) -> Growth:
    """The growth of a trajectory's predictions of its targets. ``later``: as of :func:`traced_in_place`."""
    targets = np.asarray(trajectory.targets)
    read = trajectory.log_probs[:, np.arange(len(targets)), targets].astype(np.float64)  # [L+1, n]
    return Growth(read[0], np.diff(read, axis=0), later - read[: len(later)])


def next_words(trajectory: PredictionTrajectory) -> list[str]:
    """The text's true next token after each token; '' after the last, where the text ends."""
    words = words_of(trajectory, np.asarray(trajectory.targets))
    return [*words[:-1], ""]


def layer_name(layer: int, layers: int) -> str:
    """What a row of a trajectory of ``layers`` rows is called: the last is the model itself."""
    return f"layer {layer}" if layer < layers - 1 else "model"


def block_name(block: int, blocks: int) -> str:
    """What a row of what blocks add is called, by the layers that the block leads from and to."""
    return f"block {block} to {block + 1 if block < blocks - 1 else 'model'}"


def words_of(trajectory: PredictionTrajectory, ids: Iterable[int]) -> list[str]:
    """Tokens as they are shown: escapes for characters that cannot be printed, and a mark for each blank."""
    tokenizer: Any = trajectory.tokenizer
    shown = []
    for token in map(int, ids):
        # Decoding leaves special tokens out, and rows of the head beyond the vocabulary have no name.
        word = tokenizer.decode([token]) or tokenizer.convert_ids_to_tokens([token])[0] or f"#{token}"
        shown.append(repr(word)[1:-1].replace(" ", "\u2423"))
    return shown
