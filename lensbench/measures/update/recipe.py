"""The settings of the update decomposition."""

from pydantic import BaseModel, ConfigDict, Field

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
    refits: int = Field(
        4, ge=0, description="refits on resampled fitting documents, whose spread enters every interval"
    )
