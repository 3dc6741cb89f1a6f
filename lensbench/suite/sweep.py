"""What to try: a sweep, read from TOML and checked before anything starts."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Trial(_Strict):
    """One setting to try for one model of a suite."""

    model: str
    training: dict[str, Any] = Field(default_factory=dict)
    settings: dict[str, Any] = Field(default_factory=dict)


class Sweep(_Strict):
    """Declared trials, equally many for each model, judged by cross-entropy on the dev split."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    question: str = Field(min_length=1)
    suite: str = Field(description="the suite whose corpus and model sizes the trials use")
    preset: str | None = Field(
        None, description="the preset of the suite that has these sizes; default: its file as it is"
    )
    tokens: int = Field(gt=0, description="training tokens of each trial")
    trials: tuple[Trial, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _fair(self) -> "Sweep":
        counts = {t.model: sum(u.model == t.model for u in self.trials) for t in self.trials}
        if len(set(counts.values())) > 1:
            raise ValueError(f"every model must get equally many trials, not {counts}")
        return self
