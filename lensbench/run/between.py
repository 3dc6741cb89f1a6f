"""Lenses of one model of a finished run on states of another: checkpoints of a training, seeds, sizes, and named pairs."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lensbench.data.corpus import clusters_of
from lensbench.errors import LensbenchError, nearest
from lensbench.lenses.fit import Fit
from lensbench.measures.between import (
    AFFINE,
    NONE,
    ORTHOGONAL,
    OWN_HEAD,
    STATES_HEAD,
    Between,
    Peer,
    Reading,
    read_between,
)
from lensbench.report.figures.between import between_figure
from lensbench.report.figures.style import write_figure
from lensbench.results.between import TABLE, MeasuredPair, between_table
from lensbench.results.folder import claimed, write_csv
from lensbench.results.manifest import write_manifest
from lensbench.run.context import Context, digest_of
from lensbench.run.description import described_suite
from lensbench.run.fitting import fitting
from lensbench.run.inputs import data_of, eval_samples
from lensbench.run.origin import origin_of, stream_of
from lensbench.run.studies import code_facts
from lensbench.runtime.files import sha256, write_atomically
from lensbench.runtime.progress import QUIET, Progress
from lensbench.runtime.stages import NotFinished, Pieces, Stages
from lensbench.streams.capture import capture
from lensbench.suite.recipes import ModelRecipe, Suite
from lensbench.suite.snapshots import AT

FIGURE = "between.png"
FORMAT = 1
"""Raised when pieces hold something else"""

KINDS = ("training", "seeds", "sizes", "named")
"""What may relate two models, in the order of the table"""

MAPS, HEADS = (NONE, ORTHOGONAL, AFFINE), (OWN_HEAD, STATES_HEAD)


@dataclass(frozen=True)
class Member:
    """A model of a run at one seed, whose lenses are there."""

    context: Context
    """Of its run"""
    model: ModelRecipe
    seed: int
    digest: str
    """Of its fit"""
    folder: Path

    @property
    def name(self) -> str:
        """``MODEL-seedN``."""
        return f"{self.model.name}-seed{self.seed}"


@dataclass(frozen=True)
class Pair:
    """The lenses of one model, the states of another, and what relates the two."""

    kind: str
    """training, seeds, sizes or named"""
    lens: Member
    states: Member

    @property
    def name(self) -> str:
        """A name of its own among the pairs of a run."""
        return f"{self.kind}-{self.lens.name}-on-{self.states.name}"

    @property
    def group(self) -> tuple[int, str, int]:
        """What sorts pairs so that those which share models stand together."""
        root = self.lens.model.name.partition(AT)[0] if self.kind in ("training", "seeds") else ""
        return KINDS.index(self.kind), root, self.lens.seed if self.kind == "training" else 0


def transfer_between(
    suite: Suite,
    run: Path,
    folder: Path,
    *,
    device: torch.device,
    named: Sequence[tuple[str, str]] = (),
    others: Sequence[tuple[Suite, Path]] = (),
    progress: Progress = QUIET,
) -> pd.DataFrame:
    """``between.csv`` of the models of ``suite`` that ``run`` has finished lenses of, written into ``folder``.

    Pairs: the checkpoints of each training, the seeds of each model, the sizes of each family, and models ``named``
    together. ``others``: further presets of the suite with their runs, where each size has a run of its own. Nothing is
    trained or fitted again, and runs stay as they are; finished pairs are reused. ``folder`` also gets a manifest
    and a figure.

    Raises :class:`LensbenchError` for a suite of images, a run without lenses of these settings, and models between which
    there is nothing to transfer.
    """
    if suite.images is not None:
        raise LensbenchError("transfer-between is for suites of text")
    context, *further = (
        Context(one, Stages(folder / "stages", looking=True), device, compute=False)
        for one, folder in ((suite, run), *others)
    )
    members = [member for one in (context, *further) for member in members_of(one, progress)]
    if not members:
        raise LensbenchError(
            f"{run} has no lenses with these settings of {suite.name}: give the --preset and each --set that the run had"
        )
    # Those of one training one after the other: no more models than its checkpoints are held at a time.
    pairs = sorted(pairs_of(members, named), key=lambda pair: pair.group)
    if not pairs:
        raise LensbenchError(
            f"the models of {run} have no two checkpoints, seeds or sizes to transfer between; name two with --pair A,B"
        )
    with claimed(folder, f"{suite.name}-between", suite.threads):
        pieces, peers = Pieces(folder / "pieces"), Peers()
        measured = []
        with progress.task("transfer-between", len(pairs), "pairs") as task:
            for number, pair in enumerate(pairs):
                key = {"fits": [pair.lens.digest, pair.states.digest], "suite": key_of(suite), "format": FORMAT}
                found = pieces.get(f"{pair.name}-{digest_of(key)[:12]}", partial(measure, pair, peers))
                measured.append(measured_pair(pair, found))
                peers.keep(pairs[number + 1 :])
                task.update(number + 1, pair.name)
        table = between_table(measured, suite.evaluate.draws)
        write_csv(folder / TABLE, table)
        write_atomically(folder / FIGURE, partial(write_figure, between_figure(pd.read_csv(folder / TABLE))))
        write_manifest(folder, manifest_of(context, pairs, folder))
        pieces.clear()
    return table


def key_of(suite: Suite) -> dict[str, Any]:
    """What a pair's sums depend on beside the two fits."""
    return {"fit": suite.fit.model_dump(mode="json", exclude={"memory_gib"}), "evaluate": suite.evaluate.scored}


def members_of(context: Context, progress: Progress) -> Iterator[Member]:
    """The models of a run whose lenses are finished; others are named. Rotated views share their model's lenses."""
    missing, there = [], False
    for model in context.suite.models:
        if model.rotated:
            continue
        for seed in context.suite.seeds_of(model):
            try:
                fitted = fitting(context, model, seed)
            except NotFinished:
                missing.append(f"{model.name}-seed{seed}")
                continue
            there = True
            yield Member(context, model, seed, fitted.digest, fitted.folder)
    if missing and there:  # without any the caller says so
        progress.say(
            f"left out: {context.folder} has no lenses of {', '.join(missing)} with the settings of {context.suite.name}"
        )


def pairs_of(members: Sequence[Member], named: Sequence[tuple[str, str]]) -> Iterator[Pair]:
    """Every ordered pair of checkpoints of a training, of seeds of a model, of sizes of a family, and the named ones."""
    for a, b in itertools.permutations(members, 2):
        if (kind := kind_of(a, b)) is not None:
            yield Pair(kind, a, b)
    there = {member.model.name for member in members}
    for names in named:
        for name in names:
            if name not in there:
                raise LensbenchError(f"--pair names {name!r}; {nearest(name, sorted(there))}")
        for a, b in itertools.permutations(members, 2):
            if {a.model.name, b.model.name} == {*names} and a.seed == b.seed and kind_of(a, b) is None:
                yield Pair("named", a, b)


def kind_of(a: Member, b: Member) -> str | None:
    """What relates two members: ``training``, ``seeds``, ``sizes``; None: nothing that is looked at unasked."""
    first, second = (member.context.suite.trained(member.model) for member in (a, b))
    if a.model.view != b.model.view:
        return None
    roots = [owner.checkpoint_of or owner.name for owner in (first, second)]
    if roots[0] == roots[1]:
        if a.seed == b.seed:
            return "training" if first.name != second.name else None
        return "seeds" if a.model.name == b.model.name and first.checkpoint is None else None
    alike = all(getattr(first, key) == getattr(second, key) for key in ("family", "settings", "untrained"))
    whole = first.checkpoint is None and second.checkpoint is None and first.source is None and second.source is None
    sizes = alike and whole and first.parameters != second.parameters
    return "sizes" if sizes and a.seed == b.seed else None


def peer_of(member: Member) -> Peer:
    """The lenses of a member, and what its stream holds at the tokens that its run fitted, chose and scored on."""
    context, suite, recipe = member.context, member.context.suite, member.context.suite.fit
    stream = stream_of(context, origin_of(context, member.model, member.seed), member.model.view)
    fitted, data = Fit.load(member.folder), data_of(context, member.model)
    fit, dev = (
        data.samples(**recipe.of_fit),
        data.samples(**recipe.of_dev),
    )
    held_out = eval_samples(context, data, suite.evaluate.sequences)
    of = partial(capture, stream, constant=fitted.constant, memory_gib=recipe.memory_gib)
    return Peer(stream.readout, fitted.headline.maps, of(fit), of(dev), of(held_out))


@dataclass
class Peers:
    """Members as they are read, each captured once; states beyond ``fit.memory_gib`` lie in files."""

    read: dict[str, Peer] = field(default_factory=dict)

    def of(self, member: Member) -> Peer:
        """The peer of a member."""
        if member.name not in self.read:
            self.read[member.name] = peer_of(member)
        return self.read[member.name]

    def keep(self, pairs: Sequence[Pair]) -> None:
        """Forget the peers that none of these pairs needs."""
        needed = {member.name for pair in pairs for member in (pair.lens, pair.states)}
        self.read = {name: peer for name, peer in self.read.items() if name in needed}


def measure(pair: Pair, peers: Peers) -> dict[str, Tensor]:
    """The sums of a pair as tensors: readings as numbers of map, head and layers."""
    lens, states = peers.of(pair.lens), peers.of(pair.states)
    same_width = lens.fit.states.shape[-1] == states.fit.states.shape[-1]
    maps: Iterable[str] = (
        (NONE, ORTHOGONAL) if pair.kind == "training" else (ORTHOGONAL, AFFINE) if same_width else (AFFINE,)
    )
    if pair.kind == "sizes":
        maps = (AFFINE,)
    heads = HEADS if pair.kind == "training" else (OWN_HEAD,)
    try:
        found = read_between(lens, states, maps=list(maps), heads=heads, ridges=pair.lens.context.suite.fit.ridges)
    except LensbenchError as error:
        raise LensbenchError(f"{pair.lens.name} on {pair.states.name}: {error}") from error
    readings = [[MAPS.index(r.map), HEADS.index(r.head), r.lens_layer, r.states_layer] for r in found.readings]
    sums = {name: torch.from_numpy(values) for name, values in found.sums.items()}
    return {**sums, "readings": torch.tensor(readings), "ridge": torch.tensor(found.ridge, dtype=torch.float64)}


def measured_pair(pair: Pair, found: dict[str, Tensor]) -> MeasuredPair:
    """A pair's sums with the tokens and clusters of the windows that they are of."""
    readings = [Reading(MAPS[m], HEADS[h], i, j) for m, h, i, j in found["readings"].tolist()]
    sums = {name: values.numpy() for name, values in found.items() if name not in ("readings", "ridge")}
    context = pair.states.context
    data = data_of(context, pair.states.model)
    samples = eval_samples(context, data, context.suite.evaluate.sequences)
    tokens = samples.valid.sum(1)
    windows = np.flatnonzero(tokens)
    names = [samples.document_names[k] for k in samples.documents[windows]]
    of = clusters_of(names)
    facts: dict[str, Any] = {"kind": pair.kind}
    for role, member in (("lens", pair.lens), ("states", pair.states)):
        trained = origin_of(member.context, member.model, member.seed).facts["train_tokens"]
        facts |= {f"{role}_model": member.model.name, f"{role}_seed": member.seed, f"{role}_tokens": trained}
    clusters = np.array([of[name] for name in names])
    return MeasuredPair(
        facts, Between(readings, found["ridge"].tolist(), sums), tokens[windows].astype(float), clusters
    )


def manifest_of(context: Context, pairs: Sequence[Pair], folder: Path) -> dict[str, Any]:
    """What the folder's manifest says: the suite, the fits that were read, the code, and the checksums of the files."""
    fits = {member.name: member.digest for pair in pairs for member in (pair.lens, pair.states)}
    return {
        "between": [pair.name for pair in pairs],
        "suite_name": context.suite.name,
        "suite": described_suite(context),
        "fits": fits,
        "files": {name: sha256(folder / name) for name in (TABLE, FIGURE)},
        **code_facts(),
    }
