"""A lens as data: which one it is, what was chosen for it, and its maps."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import total_ordering
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    model_serializer,
)
from torch import Tensor

from lensbench.errors import LensbenchError
from lensbench.lenses.jacobian import JacobianFacts
from lensbench.lenses.maps import AffineMaps, rotated_maps
from lensbench.lenses.recipe import ONE_STANDARD_ERROR, LensStage, Prior, Tolerance
from lensbench.streams.rotated import RotatedView

SPELLING = re.compile(
    r"(?P<kind>[a-z][a-z0-9_]*)-(?P<prior>zero|identity|none)-(?P<stage>closed|refined|backward|loaded|none)"
    r"(@(?P<tolerance>1se|[0-9.]+(e[+-]?[0-9]+)?))?(-view(?P<view>[0-9]+))?(-refit(?P<refit>[0-9]+))?"
)


@total_ordering
@dataclass(frozen=True)
class LensId:
    """Which lens of a fit: its kind, its prior, how it was made, and of which view and refit.

    ``tolerance``: the dev loss that its ridge may cost; None where dev chose the best ridge. ``view``: number of the
    rotated view whose moments it was fitted to, -1 for the stream itself. ``refit``: number of the resample of the fitting
    documents, -1 for the documents themselves.
    """

    kind: str
    prior: Prior
    stage: LensStage
    tolerance: Tolerance | None = None
    view: int = -1
    refit: int = -1

    def __str__(self) -> str:
        """``tuned-identity-closed@0.02``, ``shared-zero-closed-view0-refit1``: names of files and of tensors in them."""
        tolerance = "" if self.tolerance is None else f"@{self.tolerance}"
        view = "" if self.view < 0 else f"-view{self.view}"
        return f"{self.kind}-{self.prior}-{self.stage}{tolerance}{view}" + (
            "" if self.refit < 0 else f"-refit{self.refit}"
        )

    @classmethod
    def parse(cls, text: str) -> Self:
        """Inverse of ``str``; raises :class:`LensbenchError` for a text that names no lens."""
        found = SPELLING.fullmatch(text)
        if found is None:
            raise LensbenchError(f"{text!r} names no lens")
        how: dict[str, str] = found.groupdict()
        tolerance = how["tolerance"]
        return cls(
            how["kind"],
            how["prior"],  # type: ignore[arg-type]
            how["stage"],  # type: ignore[arg-type]
            tolerance if tolerance is None or tolerance == ONE_STANDARD_ERROR else float(tolerance),
            int(how["view"] or -1),
            int(how["refit"] or -1),
        )

    def __lt__(self, other: "LensId") -> bool:
        """By kind, then prior, stage, tolerance as text, view and refit."""
        return self._order() < other._order()

    def _order(self) -> tuple[str | int, ...]:
        return self.kind, self.prior, self.stage, str(self.tolerance), self.view, self.refit

    def of_view(self, view: int) -> Self:
        """The lens of this kind that is fitted to a rotated view."""
        return replace(self, view=view)

    def of_refit(self, refit: int) -> Self:
        """The same lens fitted again to resampled documents."""
        return replace(self, refit=refit)

    def within(self, tolerance: Tolerance) -> Self:
        """The same lens with the strongest ridge that a tolerance allows."""
        return replace(self, tolerance=tolerance)

    @property
    def tolerance_label(self) -> str:
        """The tolerance as tables write it; how the lens was made where it has none."""
        return self.stage if self.tolerance is None else tolerance_label(self.tolerance)


def tolerance_label(tolerance: Tolerance) -> str:
    """A tolerance as tables write it: ``0.02``, ``1se``."""
    return tolerance if isinstance(tolerance, str) else f"{tolerance:g}"


CURVE = "@"
"""In the column ``lens``: what parts a kind from the tolerance, in rows of the curve over tolerances."""


def curve_column(lens: LensId) -> str:
    """What the column ``lens`` of ``per_sequence.parquet`` says of a lens of the curve over tolerances."""
    return f"{lens.kind}{CURVE}{lens.tolerance_label}"


def tolerance_in(column: str) -> str | None:
    """The tolerance that a value of the column ``lens`` holds; None off the curve over tolerances."""
    return column.partition(CURVE)[2] or None


def _parsed(value: object) -> object:
    return LensId.parse(value) if isinstance(value, str) else value


LensKey = Annotated[LensId, BeforeValidator(_parsed), PlainSerializer(str, return_type=str)]
"""A :class:`LensId` in a pydantic model; JSON spells it."""


class LensRecord(BaseModel):
    """How a lens was fitted: what its maps read, what dev chose for each, and KLs on fitting and dev tokens, nats/token."""

    model_config = ConfigDict(extra="forbid")

    lens: LensKey
    reads: list[list[int]]
    """For each map the layers that it was fitted for and reads as its own."""
    transfers: bool = False
    """Whether every map is also read at the layers of the others: a row of the transfer matrix."""
    basis: Literal["plain", "view"] = "plain"
    """What the maps read: states of the stream, or states of the lens's rotated view."""
    ridge: list[float | None] = []
    pad: list[float | None] = []
    fit_kl: list[float] = []
    dev_kl: list[float] = []
    iterations: list[int] = []
    """Updates that a refinement kept, for each map."""
    ended: list[str] = []
    jacobian: JacobianFacts | None = None
    """How it was estimated, of a Jacobian lens"""

    @model_serializer(mode="wrap")
    def _as_made(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Only of Jacobian lenses does a record say how they were estimated."""
        content: dict[str, Any] = serialize(self)
        if self.jacobian is None:
            content.pop("jacobian", None)
        return content

    @property
    def layers(self) -> list[int]:
        """The layers that are read, map by map."""
        return [layer for own in self.reads for layer in own]

    def map_of(self, layer: int) -> int:
        """The number of the first map that reads a layer."""
        return next(m for m, own in enumerate(self.reads) if layer in own)

    def at(self, layer: int, column: str) -> float | None:
        """``ridge``, ``pad``, ``fit_kl`` or ``dev_kl`` of a lens at a layer that it reads; None where it has none."""
        values: list[float | None] = getattr(self, column)
        if not values:
            return None
        return values[self.map_of(layer) if column in ("ridge", "pad") else self.layers.index(layer)]

    @property
    def unchanged(self) -> bool:
        """Whether this is a refinement that kept no update: the closed form again."""
        return self.lens.stage == "refined" and not any(self.iterations)


@dataclass(frozen=True)
class FittedLens:
    """One lens of a fit: its maps ``[M]`` and the record of how they were chosen."""

    record: LensRecord
    maps: AffineMaps

    @property
    def id(self) -> LensId:
        """Which lens it is."""
        return self.record.lens

    @property
    def reads(self) -> list[list[int]]:
        """For each map the layers that it reads as its own."""
        return self.record.reads

    def to_plain(self, number: int, views: Sequence[RotatedView]) -> AffineMaps:
        """Map ``number`` as one map of plain states, or as one for each layer that it reads."""
        own = self.maps[[number]]
        if self.record.basis == "plain":
            return own
        return rotated_maps(own, views[self.id.view])[self.reads[number]]

    def float32(self) -> "FittedLens":
        """The same lens with maps of single precision, on the CPU."""
        return replace(self, maps=AffineMaps(self.maps.matrix.float().cpu(), self.maps.offset.float().cpu()))

    def tensors(self) -> dict[str, Tensor]:
        """Maps and record by names that start with the lens's own, for a file of pieces."""
        record = torch.tensor(list(self.record.model_dump_json().encode()), dtype=torch.uint8)
        parts = {".matrix": self.maps.matrix, ".offset": self.maps.offset, RECORD: record}
        return {f"{self.id}{part}": tensor for part, tensor in parts.items()}


RECORD = ".record"
"""End of the name of the tensor that holds a record, as bytes of JSON."""


def lenses_in(tensors: dict[str, Tensor]) -> list[FittedLens]:
    """The lenses whose :meth:`FittedLens.tensors` a file holds, sorted by name."""
    names = sorted(name.removesuffix(RECORD) for name in tensors if name.endswith(RECORD))
    return [
        FittedLens(
            LensRecord.model_validate_json(bytes(tensors[name + RECORD].tolist())),
            AffineMaps(tensors[f"{name}.matrix"], tensors[f"{name}.offset"]),
        )
        for name in names
    ]


def joined(parts: Sequence[FittedLens]) -> FittedLens:
    """Lenses of some layers each as one lens of all of them."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0].record
    columns = ("reads", "ridge", "pad", "iterations", "ended")
    record = first.model_copy(update={name: [v for p in parts for v in getattr(p.record, name)] for name in columns})
    return FittedLens(record, AffineMaps.stack([p.maps for p in parts]))
