"""One number about a model's layers, with all that tables, figures and documentation say of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lensbench.errors import LensbenchError
from lensbench.measures.means import Means, Value
from lensbench.statistics import Array

Stage = Literal["none", "closed", "refined", "matrix", "backward"]
"""Lenses that an index is read off: none at all, those of the closed form (of folds of documents, for the update
decomposition), those refined on KL, the transfer matrix, or that of Jacobian lenses."""


@dataclass(frozen=True)
class Index:
    """One number about a model's layers, with all that tables, figures and documentation say of it.

    Exactly one of ``compute``, ``at_distance``, ``of_similarity``, ``of_matrix``, ``of_updates`` and ``fact`` says where its
    value comes from.
    """

    name: str
    """In ``indices.csv``; ``K`` at its end stands for a distance of layers."""
    label: str
    """What figures and tables call it."""
    formula: str
    reading: str
    """How to read it: one plain sentence."""
    stage: Stage = "closed"
    unit: str = "share"
    comparable: str = "models of like depth and width"
    """Between what its values can be compared."""
    source: str = "lensbench"
    """arXiv number of the paper that defines it, or ``lensbench``."""
    compute: Callable[[Means], Value] | None = None
    made_of: tuple[str, str] | None = None
    """Two earlier indices, a share kept and its null, whose values (and the null's spread) it is made of."""
    each_view: Callable[[Means], Value] | None = None
    """The values in each random basis ``[views]``, whose spread enters the interval of their mean."""
    at_distance: Callable[[int], Callable[[Means], Value]] | None = None
    """For a family of indices, one for every distance K of layers."""
    of_similarity: Callable[[Means, Array], Value] | None = None
    """Needs the similarity of every two layers ``[L, L]``, which a probe measures."""
    of_matrix: Callable[[Array], Value] | None = None
    """Of KLs ``[..., L+1, L+1]`` of every lens on every layer, in suites that ask for the matrix of Jacobian lenses."""
    of_updates: bool = False
    """Whether it is one of the update decomposition's, which a stage of its own computes"""
    fact: bool = False
    """Known of the stream without an estimate: the tables give its value."""
    variant_of: str = ""
    variant: str = ""
    """What to call it next to the index that it is a variant of."""
    shown: int | None = None
    """Its place among the indices that the terminal prints, ``compare`` compares and a suite may claim; None: in none."""
    on_the_curve: bool = False
    """Whether ``tolerances.csv`` follows it over the loss that a lens's ridge may cost."""

    def __post_init__(self) -> None:
        """Raise ValueError unless it is clear where the value comes from."""
        sources = (
            self.compute, self.at_distance, self.of_similarity, self.of_matrix, self.of_updates or None, self.fact or None
        )  # fmt: skip
        if sum(source is not None for source in sources) != 1:
            raise ValueError(
                f"index {self.name!r} needs one of compute, at_distance, of_similarity, of_matrix, of_updates and fact"
            )

    def value(self, m: Means) -> Value:
        """The index of means; raises :class:`LensbenchError` for an index that needs more than means."""
        if self.compute is None:
            raise LensbenchError(f"index {self.name} is not made of means alone")
        return self.compute(m)


WITHOUT_LAYER_0 = "without layer 0"
