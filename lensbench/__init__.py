"""lensbench: does a language model refine one prediction, kept in one representation, layer by layer?

``load``, ``decompose``, ``fit``, ``evaluate``, ``transfer_matrix``, ``plot``, ``plot_profile`` and ``read_run`` are the
way in. torch and transformers are imported when one of them is first used.
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lensbench.api import (
        Lenses,
        UpdateRecipe,
        UpdateRule,
        Updates,
        decompose,
        evaluate,
        fit,
        load,
        plot,
        plot_profile,
        read_run,
        transfer_matrix,
    )
    from lensbench.errors import LensbenchError

# Large tensors lie in large pages of memory where Linux gives them, so that passes of a model take less time. torch reads
# this with its first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__version__ = "0.2.0"
__all__ = [
    "LensbenchError",
    "Lenses",
    "UpdateRecipe",
    "UpdateRule",
    "Updates",
    "decompose",
    "evaluate",
    "fit",
    "load",
    "plot",
    "plot_profile",
    "read_run",
    "transfer_matrix",
]


def __getattr__(name: str) -> Any:
    if name == "LensbenchError":
        from lensbench.errors import LensbenchError

        return LensbenchError
    if name in __all__:
        from lensbench import api

        return getattr(api, name)
    raise AttributeError(f"module 'lensbench' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
