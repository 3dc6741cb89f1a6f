"""What a suite scores, and how intervals are computed."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from lensbench.data.tokens import BeginSetting
from lensbench.data.windows import DOCUMENT_SHARE, Turns
from lensbench.statistics import FEWEST_CLUSTERS

LARGEST_GROUPS = 128
"""More clusters than this are joined, unless a suite says otherwise: a bootstrap of so many tells its interval to 6 %."""


class EvaluateRecipe(BaseModel):
    """What is scored, and how intervals are computed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    sequences: int = Field(512, ge=1, description="held-out sequences")
    positions: int = Field(16, ge=1, description="random positions of each of them")
    refit_positions: int | None = Field(
        None, ge=1, description="positions of each sequence that refits are scored at; all of them if left out"
    )
    length: int | None = Field(
        None, ge=2, description="tokens of a sequence; training.length if left out. Fitting and choosing use it too"
    )
    first_position: int = Field(1, ge=0, description="first position that is fitted or scored")
    begin: BeginSetting = Field(
        "auto",
        description="windows that begin with the model's beginning-of-text token: every one, the first of each document, "
        "or auto: every one where the tokenizer adds such a token to a text by itself, else the first",
    )
    precision: float | None = Field(
        None,
        gt=0,
        description="largest half-width of the 95 % interval of a transfer penalty, nats; sequences are then the first try",
    )
    matrix: bool = Field(
        True,
        description="every lens on every layer; without it lenses are read at the layers that they were fitted to, which "
        "leaves out what is made of the matrix: gain visibility, movement, and all by lenses held fixed",
    )
    top: bool = Field(
        False,
        description="top-1 and top-10 precision of every lens in lenses.csv: the share of tokens at which the model's most "
        "probable word is the lens's, or among its ten most probable ones",
    )
    jacobian_matrix: bool = Field(
        False,
        description="the transfer matrix of Jacobian lenses, too: rows of lens jacobian in transfer.csv; fit.lenses must "
        "name jacobian",
    )
    exact_share: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] = Field(
        1.0,
        description="share of the log-partitions (over the whole vocabulary) that are computed: 1 is exact; below it losses "
        "are unbiased estimates, and intervals hold what that adds; auto: the smallest share at which 512 dev tokens "
        "promise no interval more than 1.1 times wider (of losses that a few tokens decide, they may promise too much)",
    )
    half_products: bool = Field(
        True,
        description="make products in half precision where that is faster and agrees with float32: in passes of captures "
        "through large pretrained models (on a processor; the manifest says how well), and in log-partitions",
    )
    probe_sequences: int = Field(128, ge=1, description="held-out sequences that probes look at")
    max_share: float = Field(DOCUMENT_SHARE, gt=0, le=1, description="largest share of the sequences from one document")
    turns: Turns = Field(
        "document",
        description="what sequences are taken from in turn: documents, or clusters of them, such as packages, which "
        "intervals resample. Of clusters, each counts alike however many documents it has",
    )
    draws: int = Field(2000, ge=100, description="bootstrap draws")
    sums: Literal["sequence", "cluster"] = Field(
        "cluster",
        description="cluster: cluster_sums.parquet holds what comparisons read; sequence: per_sequence.parquet next to it "
        "holds every sum of every sequence",
    )

    groups: int | None = Field(
        LARGEST_GROUPS,
        ge=FEWEST_CLUSTERS,
        description="more clusters than this are joined at random into so many, which keeps cluster_sums.parquet small "
        "and leaves intervals as they are but for what a bootstrap of fewer can tell",
    )

    @model_serializer(mode="wrap")
    def _as_asked(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """With the default of what was added, a recipe says what it said before: keys and manifests stay the same."""
        content: dict[str, Any] = serialize(self)
        if self.turns == "document":
            content.pop("turns", None)
        if self.half_products:
            content.pop("half_products", None)
        return content

    @property
    def scored(self) -> dict[str, Any]:
        """What the scores of a model depend on, but for ``begin`` and ``half_products``, which other digests hold.

        Of exact scores of a whole matrix it says what it said before there were others, so that finished ones are found.
        """
        exact = {"exact_share"} if self.exact_share == 1 else set()
        whole = {"matrix"} if self.matrix else set()
        apart = {"draws", "probe_sequences", "sums", "groups", "begin", "top", "jacobian_matrix", "half_products"}
        return self.model_dump(exclude=apart | exact | whole)
