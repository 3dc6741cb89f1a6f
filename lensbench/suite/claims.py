"""What a suite claims before it runs: differences of models, and bounds on indices, landmarks and quantities of probes."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lensbench.errors import nearest
from lensbench.measures.indices import compared_quantities, update_indices
from lensbench.measures.update.views import LANDMARKS
from lensbench.probes.registry import PROBES

DIFFERENCES = ("shared_consistency", "gain_visibility")
"""What a difference of two models is of, unless it says so."""


TESTS = ("against", "above", "below", "within", "differs_from")
"""What a claim may be: it sets exactly one of them."""


class Claim(BaseModel):
    """One statement about a model, declared before it runs, and tested by ``lensbench compare``."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: str = Field(description="the model; a list of names makes the same claim of each")
    against: str | None = Field(None, description="another model: the claim is that the two differ, paired by seed")
    direction: Literal["above", "below"] | None = Field(
        None, description="side of 0 that a difference lies on, declared; its test stays two-sided"
    )
    indices: tuple[str, ...] = Field(
        (),
        description="indices that are claimed, each a test of its own; of a difference consistency and gain visibility",
    )
    landmark: str | None = Field(None, description="view of the model that the index is of: " + ", ".join(LANDMARKS))
    probe: str | None = Field(None, description="probe that measures the quantity")
    quantity: str | None = Field(None, description="quantity of the probe, one value for each model")
    above: float | None = Field(None, description="the value lies above this; one-sided")
    below: float | None = Field(None, description="the value lies below this; one-sided")
    within: tuple[float, float] | None = Field(
        None, description="the value lies between these: equivalence, two one-sided tests"
    )
    differs_from: float | None = Field(None, description="the value is not this; two-sided")
    status: Literal["seen in a prototype", "new"] | None = Field(
        None, description="what was known when it was declared: seen in a prototype, or new"
    )

    @model_validator(mode="before")
    @classmethod
    def _of_two(cls, content: Any) -> Any:
        if isinstance(content, Mapping) and content.get("against") is not None:
            return {"indices": DIFFERENCES, **content}
        return content

    @model_validator(mode="after")
    def _one_test_of_one_thing(self) -> "Claim":
        given = [name for name in TESTS if getattr(self, name) is not None]
        if len(given) != 1:
            what = " and ".join(given) or "none of them"
            raise ValueError(f"a claim about {self.model!r} sets one of {', '.join(TESTS)}; this one sets {what}")
        if self.within is not None and not self.within[0] < self.within[1]:
            raise ValueError(
                f"a claim about {self.model!r}: within is [low, high] with low < high, not {[*self.within]}"
            )
        if self.direction is not None and self.against is None:
            raise ValueError(f"a claim about {self.model!r}: direction is for differences, and it has no against")
        if (self.probe is None) != (self.quantity is None):
            raise ValueError(f"a claim about {self.model!r}: probe and quantity go together")
        if self.probe is None and not self.indices:
            raise ValueError(f"a claim about {self.model!r} names indices, or a probe and its quantity")
        self._not_of_two_kinds()
        return self

    def _not_of_two_kinds(self) -> None:
        given = [name for name in ("against", "landmark", "probe") if getattr(self, name) is not None]
        if given == ["probe"] and self.indices:
            given.append("indices")
        if len(given) > 1:
            raise ValueError(f"a claim about {self.model!r} cannot set {' and '.join(given)} together")

    @property
    def statements(self) -> tuple[str, ...]:
        """What is claimed of: indices, or the probe's quantity; each is one test."""
        return self.indices if self.quantity is None else (self.quantity,)

    def in_words(self, of: str) -> str:
        """The claim about one of its :attr:`statements`, in words."""
        if self.against is not None:
            side = f"lies {self.direction} 0, two-sided" if self.direction else "differs from 0"
            return f"{self.model} - {self.against}: {of} {side}"
        who = self.model if self.landmark is None else f"{self.model}+{self.landmark}"
        what = of if self.probe is None else f"{self.probe}, {of}"
        if self.within is not None:
            return f"{who}: {what} lies within {self.within[0]:g} to {self.within[1]:g}"
        if self.differs_from is not None:
            return f"{who}: {what} differs from {self.differs_from:g}"
        side, bound = ("above", self.above) if self.above is not None else ("below", self.below)
        return f"{who}: {what} lies {side} {bound:g}"


def of_each_model(claims: Any) -> Any:
    """Claims as a file has them, those about a list of models written out: one for each of them."""
    if not isinstance(claims, list | tuple):
        return claims
    return [one for claim in claims for one in _written_out(claim)]


def _written_out(claim: Any) -> Iterator[Any]:
    if isinstance(claim, Mapping) and isinstance(claim.get("model"), list | tuple):
        yield from ({**claim, "model": name} for name in claim["model"])
    else:
        yield claim


def check_claim(
    claim: Claim, models: Mapping[str, bool], probes: tuple[str, ...], *, decomposed: bool, landmarks: bool
) -> None:
    """Raise ValueError for a claim about what the suite does not measure.

    ``models``: name -> whether it is a rotated view. ``probes``: those that the suite runs. ``decomposed``, ``landmarks``:
    whether it decomposes updates, and those of landmarks.
    """
    for name in filter(None, (claim.model, claim.against)):
        if name not in models:
            raise ValueError(f"a claim is about model {name!r}; {nearest(name, list(models))}")
    if claim.probe is not None:
        _check_probe(claim.probe, str(claim.quantity), probes)
        return
    known = list(compared_quantities() if claim.landmark is None else update_indices())
    for index in claim.indices:
        if index not in known:
            raise ValueError(f"a claim is about index {index!r}; {nearest(index, known)}")
        if index in update_indices() and not decomposed:
            raise ValueError(f"a claim is about index {index!r}, and the suite has `update = false`")
    if claim.landmark is None:
        return
    if claim.landmark not in LANDMARKS:
        raise ValueError(f"a claim is about landmark {claim.landmark!r}; {nearest(claim.landmark, list(LANDMARKS))}")
    if not landmarks:
        raise ValueError(f"a claim is about landmark {claim.landmark!r}, and the suite leaves landmarks out")
    if models[claim.model]:
        raise ValueError(f"a claim is about a landmark of {claim.model!r}: a rotated view has none")


def _check_probe(probe: str, quantity: str, probes: tuple[str, ...]) -> None:
    if probe not in PROBES:
        raise ValueError(f"a claim is about probe {probe!r}; {nearest(probe, list(PROBES))}")
    if probe not in probes:
        raise ValueError(f"a claim is about probe {probe!r}, which the suite does not run; add it to probes")
    of_models = [q.name for q in PROBES[probe].quantities if q.of == "model"]
    if quantity not in of_models:
        found = PROBES[probe].quantity(quantity)
        if found is not None:
            raise ValueError(
                f"a claim is about {quantity!r} of {probe}, which has a value for each {found.of}; claims are about the "
                f"model: {', '.join(of_models) or 'it has no quantity of a model'}"
            )
        raise ValueError(f"a claim is about quantity {quantity!r} of {probe}; {nearest(quantity, of_models)}")
