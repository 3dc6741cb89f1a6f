"""What is kept of an update decomposition: rows, indices, and the draws that paired comparisons need."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from lensbench.errors import LensbenchError
from lensbench.measures.means import Estimate
from lensbench.measures.update.decomposition import Decomposition
from lensbench.measures.update.summary import NAMES, WITHOUT_LAYER_0, block_rows, drawn_indices, pair_rows
from lensbench.runtime.files import write_json

RESULT = "update.json"


class UpdateResult(BaseModel):
    """The tables' rows of one model and seed; empty, with a ``reason``, where the decomposition is undefined."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    reason: str = ""
    pairs: list[dict[str, Any]] = []
    blocks: list[dict[str, Any]] = []
    indices: dict[str, tuple[float | None, float | None, float | None, str]] = {}
    """Name -> value, lower and upper end of its interval, reason"""
    draws: dict[str, list[float]] = {}
    """Name -> its draws, of those that have an interval"""

    @classmethod
    def of(cls, found: Decomposition) -> "UpdateResult":
        """All that is kept of a decomposition."""
        drawn = drawn_indices(found)
        return cls(
            pairs=pair_rows(found),
            blocks=block_rows(found),
            indices={n: (e.value, e.low, e.high, e.reason) for n, e in ((n, one.estimate) for n, one in drawn.items())},
            draws={
                name: [float(f"{x:.6g}") for x in one.draws]
                for name, one in drawn.items()
                if one.draws is not None and one.estimate.low is not None
            },
        )

    @classmethod
    def undefined(cls, reason: str) -> "UpdateResult":
        """No pair, and every index without a value."""
        names = [name + suffix for suffix in ("", WITHOUT_LAYER_0) for name in NAMES]
        return cls(reason=reason, indices=dict.fromkeys(names, (None, None, None, reason)))

    def estimates(self) -> dict[str, Estimate]:
        """The indices."""
        return {name: Estimate(*values) for name, values in self.indices.items()}

    def save(self, folder: Path) -> None:
        """Write :data:`RESULT` into a folder."""
        write_json(folder / RESULT, self.model_dump(mode="json"))

    @classmethod
    def load(cls, folder: Path) -> "UpdateResult":
        """Inverse of :meth:`save`; raises :class:`LensbenchError` for a damaged file."""
        path = folder / RESULT
        try:
            return cls.model_validate_json(path.read_text())
        except (OSError, ValueError, ValidationError) as error:
            raise LensbenchError(f"{path} is damaged; delete its folder to compute it anew") from error
