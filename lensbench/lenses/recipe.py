"""The settings that lenses are fitted and chosen by."""

import itertools
from typing import Any, Literal, TypedDict

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from lensbench.data.windows import DOCUMENT_SHARE, Turns

Prior = Literal["zero", "identity", "none"]
"""The map B0 that a ridge shrinks towards; ``none`` for a lens that no regression made."""


LensStage = Literal["closed", "refined", "backward", "loaded", "none"]
"""How a lens was made: closed form, refined on KL, by backward passes, loaded from a file, or not fitted at all."""


Tolerance = float | Literal["1se"]
"""The dev loss that a ridge may cost: a share of ``K_0 - best``, or one standard error."""


ADDED_SETTINGS = ("pairs", "search_tokens", "record_tokens", "rotated_own", "turns")


class Sampled(TypedDict):
    """What ``samples`` of a model's data is asked for: the arguments of :func:`lensbench.data.windows.sample_windows`."""

    split: str
    count: int
    positions: int
    share: float | None
    turns: Turns


Further = Literal["jacobian", "jacobian_local", "shared_jacobian"]
"""Kinds of lens that are fitted where a recipe names them"""


class JacobianRecipe(BaseModel):
    """How Jacobian lenses are estimated; what is left out is as published."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    prompts: int = Field(100, ge=2, description="sequences of the fit split at most that the mean is over")
    method: Literal["auto", "exact", "random"] = Field(
        "auto",
        description="exact: a backward pass for every row of J; random: unbiased, from random vectors; auto: the cheaper",
    )
    precision: float = Field(
        0.1, gt=0, description="relative standard error (Frobenius) for which auto chooses the method and the prompts"
    )
    probes: int = Field(4, ge=1, description="random vectors of each prompt")
    positions: int = Field(2, ge=1, description="positions of each prompt of an exact jacobian_local, drawn at random")
    skip_first: int = Field(
        16, ge=-1, description="positions left out at the start of a prompt; -1: those before evaluate.first_position"
    )
    skip_last: int = Field(1, ge=0, description="positions left out at its end")
    rows: int = Field(16, ge=1, description="copies of a prompt, or prompts, in a backward pass")


class FitRecipe(BaseModel):
    """How lenses are fitted and chosen; every choice is made on the dev split."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    sequences: int = Field(512, ge=1, description="sequences of the fit split")
    positions: int = Field(32, ge=1, description="random positions of each of them")
    dev_sequences: int = Field(256, ge=1, description="sequences of the dev split")
    dev_positions: int = Field(16, ge=1, description="random positions of each of them")
    turns: Literal["window", "document", "cluster"] = Field(
        "window",
        description="window: every window of the fit and dev splits is drawn alike, so that long packages weigh most; "
        "document, cluster: windows are taken from these in turn, as in evaluate.turns",
    )
    ridges: tuple[float, ...] = Field(
        (1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3),
        min_length=1,
        description="ridge path, rising, in median eigenvalues",
    )
    pads: tuple[float, ...] = Field(
        tuple(i / 10 for i in range(11)), min_length=1, description="lengths of the pad, in rms of the final state"
    )
    tolerance: float = Field(0.02, ge=0, description="allowed dev loss of the headline matrix, share of K_0 - best")
    tolerances: tuple[float, ...] = Field(
        (0.0, 0.05, 0.1), description="allowed dev losses of the curve beside the headline's, and one standard error"
    )
    layers: int = Field(
        8,
        ge=2,
        description="layers at most, evenly spread, of the curve over tolerances, leave-one-out, pairs and refits",
    )
    pairs: bool = Field(True, description="lenses for every two of these layers")
    pair_rotations: int = Field(2, ge=1, description="rotated views of which pairs of layers get lenses")
    rotations: int = Field(5, ge=1, description="rotated views, each with a shared lens of its own")
    variance: float = Field(0.99, gt=0, le=1, description="share of pooled variance that rotations act on")
    refits: int = Field(5, ge=0, description="refits on document-resampled fit data")
    pooled_dev_tokens: int = Field(
        16384, ge=1, description="dev states at most that a lens of several layers is chosen on, equally many per layer"
    )
    search_tokens: int | None = Field(
        None,
        ge=1,
        description="dev tokens at most that lenses are chosen and refined on, all of them if left out; of a vocabulary "
        "above 8,192 words a sixteenth of them with exact log-partitions",
    )
    record_tokens: int = Field(
        512, ge=1, description="fitting and dev tokens at most that fit_kl and dev_kl of lenses.csv are means over"
    )
    rotated_own: bool = Field(
        True,
        description="the lenses per layer of the first rotated view, which must read as the plain ones do: they check the "
        "algebra",
    )
    refine_tokens: int = Field(16384, ge=1, description="fitting tokens of a pass of refinement")
    refine_passes: int = Field(24, ge=0, description="most passes of a refinement")
    refine_batch: int = Field(256, ge=1, description="tokens of an update of a lens")
    refine_rate: float = Field(
        0.01, gt=0, description="first rate: spectral size of an update, relative to rms(h_L) / rms(h_l)"
    )
    refine_tolerance: float = Field(1e-3, gt=0, description="relative fall of dev KL in a pass that ends a refinement")
    refine_vocabulary: int = Field(
        4096, ge=2, description="rows of the unembedding that refinement sees: half exactly, half drawn from the rest"
    )
    memory_gib: float = Field(
        4.0,
        gt=0,
        description="states beyond this are kept in a memory-mapped temporary file (TMPDIR) instead of in memory",
    )
    lenses: tuple[Further, ...] = Field(
        (), description="further kinds of lens: jacobian, jacobian_local, shared_jacobian (needs jacobian)"
    )
    jacobian: JacobianRecipe = JacobianRecipe()

    @property
    def of_fit(self) -> Sampled:
        """The windows that lenses are fitted on, as the data's ``samples`` take it."""
        return self._sampled("fit", self.sequences, self.positions)

    @property
    def of_dev(self) -> Sampled:
        """The windows that lenses are chosen on."""
        return self._sampled("dev", self.dev_sequences, self.dev_positions)

    def _sampled(self, split: str, count: int, positions: int) -> Sampled:
        in_turn = self.turns != "window"
        return Sampled(
            split=split,
            count=count,
            positions=positions,
            share=DOCUMENT_SHARE if in_turn else None,
            turns="cluster" if self.turns == "cluster" else "document",
        )

    @model_serializer(mode="wrap")
    def _as_asked(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without further kinds, and with defaults of what was added, a recipe says what it said before there were any.

        So keys and manifests stay the same.
        """
        content: dict[str, Any] = serialize(self)
        added = [name for name in ADDED_SETTINGS if getattr(self, name) == FitRecipe.model_fields[name].default]
        for name in (*added, *(() if self.lenses else ("lenses", "jacobian"))):
            content.pop(name, None)
        return content

    @model_validator(mode="after")
    def _mean_of_something(self) -> "FitRecipe":
        if "shared_jacobian" in self.lenses and "jacobian" not in self.lenses:
            raise ValueError("lenses names shared_jacobian, the mean of the lenses jacobian: name jacobian, too")
        if len(set(self.lenses)) < len(self.lenses):
            raise ValueError("lenses names a kind twice")
        return self

    @property
    def fitted(self) -> dict[str, Any]:
        """What a fit depends on."""
        return self.model_dump(exclude={"memory_gib"})

    @field_validator("ridges", "pads")
    @classmethod
    def _rising(cls, path: tuple[float, ...]) -> tuple[float, ...]:
        if any(b <= a for a, b in itertools.pairwise(path)):
            raise ValueError("must rise from one entry to the next")
        return path

    @field_validator("tolerances")
    @classmethod
    def _shares(cls, tolerances: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0 <= t < 1 for t in tolerances):
            raise ValueError("must be shares of K_0 - best: at least 0 and below 1")
        if len({f"{t:g}" for t in tolerances}) < len(tolerances):
            raise ValueError("must differ in their first six digits")
        return tolerances

    @field_validator("ridges")
    @classmethod
    def _positive(cls, ridges: tuple[float, ...]) -> tuple[float, ...]:
        if ridges[0] <= 0:
            raise ValueError("must be above 0: without a ridge a stream that does not fill its space has no solution")
        return ridges


def spread_layers(layers: int, count: int) -> list[int]:
    """At most ``count`` of layers 0..layers-1, evenly spread, the first and the last among them."""
    return sorted({round(k * (layers - 1) / (count - 1)) for k in range(count)})


ONE_STANDARD_ERROR: Literal["1se"] = "1se"
"""Of the allowed losses, the one that is no share of what there is to gain."""
