"""All lenses of one view of a model, fitted job by job, and the files that keep them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from lensbench.errors import LensbenchError
from lensbench.lenses import refined, refits
from lensbench.lenses.jacobian_files import write_jacobian
from lensbench.lenses.jacobian_kinds import JACOBIAN_LENS, JACOBIAN_LOCAL_LENS
from lensbench.lenses.kinds import KINDS
from lensbench.lenses.lens import FittedLens, LensId, LensKey, LensRecord, lenses_in
from lensbench.lenses.maps import AffineMaps
from lensbench.lenses.per_layer import headline_of
from lensbench.lenses.planning import FitContext, Job
from lensbench.lenses.read import mean_kls
from lensbench.lenses.refined import OWN_REFINED, SHARED_REFINED
from lensbench.lenses.search import thinned
from lensbench.lenses.shared import SHARED_BIAS_LENS
from lensbench.lenses.tuned import SharedLens, save_tuned_lens, tuned_lens
from lensbench.runtime.files import write_json
from lensbench.runtime.mapped import give_back_pages
from lensbench.runtime.sealed import read_tensors, write_tensors
from lensbench.streams.capture import Capture
from lensbench.streams.readout import ReadOut
from lensbench.streams.rotated import RotatedView

FIT_FORMAT = 5
"""Version of the files that a fit leaves: part of the keys of stages, so that older files are fitted anew."""


MAPS, FIT_SUMMARY = "maps.safetensors", "fit.json"


class FitSummary(BaseModel):
    """What a fit says of itself next to its maps."""

    model_config = ConfigDict(extra="forbid")

    headline: LensKey
    """The lenses of the transfer matrix."""
    records: dict[LensKey, LensRecord]
    depth: int
    """Layers before the last state, L: lenses are fitted at 0..L-1."""
    fit_tokens: int
    dev_tokens: int
    rotated_rank: int
    rotations: int
    pair_rotations: int
    refits: int
    layers: list[int]
    """The layers of what takes long: curve over tolerances, leave-one-out, pairs, refits of the matrix."""
    dev_constant_kl: float
    constant: list[float]

    @classmethod
    def load(cls, path: Path) -> "FitSummary":
        """From ``fit.json``; raises :class:`LensbenchError` for a damaged file."""
        try:
            return cls.model_validate_json(path.read_text())
        except (OSError, ValueError, LensbenchError) as error:
            raise LensbenchError(f"{path} is damaged; delete its folder to fit anew") from error

    def curve(self) -> list[LensId]:
        """The lenses of the curve over tolerances, other than the transfer matrix's own."""
        return [
            lens
            for lens, record in self.records.items()
            if record.transfers and lens != self.headline and lens.refit < 0
        ]


@dataclass(frozen=True)
class Fit:
    """Every lens of one view of a model, float32, with the random bases of the null and what the fit says of itself.

    What a run has just fitted lies in files of its stage until it is saved.
    """

    lenses: dict[LensId, FittedLens]
    views: list[RotatedView]
    summary: FitSummary

    def __getitem__(self, lens: LensId) -> FittedLens:
        """A lens by its id; raises KeyError for one that was not fitted."""
        return self.lenses[lens]

    @cached_property
    def headline(self) -> FittedLens:
        """The lenses of the transfer matrix, one per layer."""
        return self.lenses[self.summary.headline]

    @property
    def constant(self) -> Tensor:
        """Mean of p over the fitting tokens, ``[V]``."""
        return torch.tensor(self.summary.constant)

    def save(self, folder: Path) -> None:
        """Write ``maps.safetensors`` and ``fit.json``, each moved into place whole."""
        maps = {str(lens): fitted.maps for lens, fitted in self.lenses.items()}
        tensors = {}
        for name, stack in maps.items():
            tensors[f"{name}.matrix"] = stack.matrix
            tensors[f"{name}.offset"] = stack.offset
        for k, view in enumerate(self.views):
            tensors[_view_name(k)] = view.maps
        write_tensors(tensors, folder / MAPS)
        write_json(folder / FIT_SUMMARY, self.summary.model_dump(mode="json"))

    @classmethod
    def load(cls, folder: Path) -> "Fit":
        """Inverse of :meth:`save`; raises :class:`LensbenchError` for damaged files."""
        summary, path = FitSummary.load(folder / FIT_SUMMARY), folder / MAPS
        try:
            tensors = read_tensors(path, mapped=True)
            lenses = {
                lens: FittedLens(record, AffineMaps(tensors[f"{lens}.matrix"], tensors[f"{lens}.offset"]))
                for lens, record in summary.records.items()
            }
            views = [RotatedView(tensors[_view_name(k)], summary.rotated_rank) for k in range(summary.rotations)]
        except (KeyError, LensbenchError) as error:
            raise LensbenchError(f"lens file {path} is damaged ({error}); delete its folder to fit anew") from error
        return cls(lenses, views, summary)

    def export(
        self, folder: Path, readout: ReadOut, *, model_name: str, source: str | None = None, commit: str = ""
    ) -> None:
        """Write the lenses that others may use: ``tuned``, ``tuned_headline``, ``shared`` and ``shared_bias``.

        Jacobian lenses that were fitted are files, ``jacobian_lens.pt`` and ``jacobian_local_lens.pt``; ``source`` and
        ``commit`` of a pretrained model are recorded in them.
        """
        for name, lens in (("tuned", OWN_REFINED), ("tuned_headline", self.summary.headline)):
            save_tuned_lens(tuned_lens(readout, self[lens].maps, model_name=model_name), folder / name)
        for name, lens in (("shared", SHARED_REFINED), ("shared_bias", SHARED_BIAS_LENS)):
            SharedLens.from_maps(readout, self[lens].maps).save(folder / name)
        for lens in (JACOBIAN_LENS, JACOBIAN_LOCAL_LENS):
            facts = self[lens].record.jacobian if lens in self.lenses else None
            if facts is not None:
                path = folder / f"{lens.kind}_lens.pt"
                write_jacobian(path, self[lens].maps.matrix, facts, model=source or model_name, commit=commit)


def _view_name(number: int) -> str:
    return f"view{number}"


def plan(context: FitContext) -> list[Job]:
    """All jobs of a fit in the order that they run in; names are unique."""
    jobs = [job for kind in KINDS.values() for job in kind.plan(context)]
    return sorted([*jobs, *refits.plan(context), *refined.plan(context)], key=lambda job: job.phase)


def fit(context: FitContext, *, task: str = "fit") -> Fit:
    """Every lens that the kinds plan; jobs whose pieces are finished are taken up.

    ``task``: what the progress is called. Its total is the number of jobs.
    """
    jobs = plan(context)
    with context.progress.task(task, len(jobs), "lenses") as shown:
        for number, job in enumerate(jobs):

            def say(remark: str, done: int = number) -> None:
                shown.update(done, remark)

            there = job.name in context.pieces
            found = context.pieces.get(job.name, lambda job=job, say=say: job.run(say))  # type: ignore[misc]
            lenses = lenses_in(found)
            for lens in lenses:
                context.parts.setdefault(lens.id, []).append(lens)
            if not lenses:
                context.searched[job.name] = found
            if there:
                shown.restored(number + 1)
            else:
                shown.update(number + 1, job.remark)
            give_back_pages()
    return _summarised(context)


def fit_some(context: FitContext, wanted: Sequence[LensId], *, task: str = "fit") -> dict[LensId, FittedLens]:
    """Some lenses of a fit, float32, and nothing else; what they are made from must be among them.

    Raises KeyError for one that the kinds do not plan.
    """
    names = {str(lens) for lens in wanted} | ({"refined"} if any(w.stage == "refined" for w in wanted) else set())
    jobs = [job for job in plan(context) if job.name in names]
    with context.progress.task(task, len(jobs), "lenses") as shown:
        for number, job in enumerate(jobs):

            def say(remark: str, done: int = number) -> None:
                shown.update(done, remark)

            for lens in lenses_in(job.run(say)):
                context.parts.setdefault(lens.id, []).append(lens)
            shown.update(number + 1, job.remark)
            give_back_pages()
    return {lens: context.lens(lens).float32() for lens in wanted}


def _summarised(context: FitContext) -> Fit:
    """The finished lenses, with KLs on fitting and dev tokens in the records of those that the tables list."""
    headline, most = headline_of(context), context.recipe.record_tokens
    samples = {"fit_kl": thinned(context.fit, most), "dev_kl": thinned(context.dev, most)}
    lenses: dict[LensId, FittedLens] = {}
    for name in context.parts:
        lens = context.lens(name)
        if _is_listed(name, headline):
            kls = {key: _mean_kls(context, lens, tokens, key) for key, tokens in samples.items()}
            lens = FittedLens(lens.record.model_copy(update=kls), lens.maps)
        lenses[name] = lens.float32()
        give_back_pages()
    summary = FitSummary(
        headline=headline,
        records={name: lens.record for name, lens in lenses.items()},
        depth=len(context.layers),
        fit_tokens=context.fit.tokens,
        dev_tokens=context.dev.tokens,
        rotated_rank=context.views[0].rank,
        rotations=context.recipe.rotations,
        pair_rotations=context.pair_rotations,
        refits=context.recipe.refits,
        layers=context.chosen,
        dev_constant_kl=context.search.constant_kl,
        constant=context.fit.mean_p.tolist(),
    )
    views = context.views
    if context.pieces.folder is None:  # else they lie in a file, and are written from it
        views = [RotatedView(view.maps.float(), view.rank) for view in views]
    return Fit(lenses, views, summary)


def _is_listed(lens: LensId, headline: LensId) -> bool:
    """Whether tables list a lens layer by layer: the transfer matrix's, those with prior zero, the null's first view."""
    on_the_curve = lens.tolerance is not None and lens != headline
    return lens.view <= 0 and lens.refit < 0 and not on_the_curve and KINDS[lens.kind].reads != "pair"


def _mean_kls(context: FitContext, lens: FittedLens, tokens: Capture, key: str) -> Sequence[float]:
    def content() -> dict[str, Tensor]:
        return {"kl": torch.tensor(mean_kls(context.readout, tokens, lens, context.views), dtype=torch.float64)}

    return [float(v) for v in context.pieces.get(f"{key}-{lens.id}", content)["kl"]]
