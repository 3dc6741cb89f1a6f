"""Settings of a training, on which the data depend too."""

import itertools
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator


class TrainingRecipe(BaseModel):
    """How a model is trained. All models of a suite are trained on the same number of ``tokens``."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    tokens: int = Field(1_000_000, gt=0, description="training tokens; a token counts each time it is read")
    length: int = Field(128, ge=1, description="tokens per sequence")
    batch: int = Field(8, ge=1, description="sequences per step")
    learning_rate: float = Field(1.5e-2, gt=0, description="peak learning rate")
    weight_decay: float = Field(0.1, ge=0, description="decoupled weight decay of the matrices that Muon moves")
    beta2: float = Field(0.95, gt=0, lt=1, description="AdamW's second-moment decay")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps in which the rate rises linearly")
    final_rate: float = Field(0.05, ge=0, le=1, description="share of the peak rate that the cosine ends at")
    clip: float = Field(1.0, gt=0, description="largest gradient norm")
    deep_supervision: float = Field(
        0.0, ge=0, description="weight of the head's mean cross-entropy at layers 1..L-1, added to the last layer's"
    )
    read_out_alone: bool = Field(
        False,
        description="train the read-out alone, with the embedding where the two are tied: blocks stay random features",
    )
    checkpoint_every: int = Field(100, ge=1, description="steps between what an interrupted training goes on from")
    checkpoints: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (), description="training tokens at which the model is kept, and measured as a model NAME@TOKENS of its own"
    )

    @model_validator(mode="after")
    def _checkpoints_differ(self) -> "TrainingRecipe":
        steps = [self.step_of(tokens) for tokens in self.checkpoints]
        if any(later <= earlier for earlier, later in itertools.pairwise(steps)):
            raise ValueError(f"checkpoints must rise, by a step of {self.batch * self.length} tokens at least")
        if steps and steps[-1] >= self.steps:
            raise ValueError(
                f"checkpoints must stay below tokens, {self.tokens}: there the model itself is measured; the last of them "
                f"is {self.checkpoints[-1]}"
            )
        return self

    def step_of(self, tokens: int) -> int:
        """The number of steps behind which ``tokens`` have been read, to the nearest step."""
        return round(tokens / (self.batch * self.length))

    @property
    def steps(self) -> int:
        """Number of training steps."""
        return max(1, round(self.tokens / (self.batch * self.length)))

    def rate(self, step: int) -> float:
        """The learning rate of a step (0-based)."""
        warm = self.warmup * self.steps
        if step < warm:
            return self.learning_rate * min(1.0, (step + 1) / warm)
        progress = (step - warm) / max(1.0, self.steps - warm)
        cosine = float(np.cos(np.pi * progress))
        return self.learning_rate * (self.final_rate + (1 - self.final_rate) * 0.5 * (1 + cosine))
