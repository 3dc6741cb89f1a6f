"""The settings of the update decomposition."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from lensbench.measures.update.metric import MetricKind


class UpdateRecipe(BaseModel):
    """How the update decomposition is made; the tokens, the ridges and the tolerance are those of the lenses."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    layers: int = Field(32, ge=2, description="layers at most, evenly spread")
    metric: MetricKind = Field("fisher", description="metric of readings: fisher, logit, euclidean or whitened")
    readable: bool = Field(True, description="the readable gain of neighbours and of 12 further pairs at most")
    landmarks: bool = Field(
        True,
        description="nulls and landmarks made of the model itself (rotated, carried, drifting, shuffled), at fit.layers",
    )
    tolerances: tuple[float, ...] = Field(
        (), description="further tolerances that the shares are told at, with the same pairs of layers"
    )
    metrics: tuple[MetricKind, ...] = Field((), description="further metrics that they are told in")
    largest_norm: float | None = Field(
        4.0,
        gt=1,
        description="tokens with a state of a larger norm, in medians of its layer, have a massive activation: the "
        "decomposition is told with and without them; false: only with them",
    )
    refits: int = Field(
        4, ge=0, description="refits on resampled fitting documents, whose spread enters every interval"
    )

    @field_validator("largest_norm", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        """TOML has no null: false stands for it."""
        return None if value is False else value

    @field_validator("tolerances")
    @classmethod
    def _shares(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        for value in values:
            if not 0 <= value < 1:
                raise ValueError(f"a tolerance is a share from 0 to 1, not {value:g}")
        return values
