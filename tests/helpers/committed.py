"""Whether a committed run is of a suite as its file has it now."""

from typing import Any

from lensbench.results.manifest import Manifest
from lensbench.suite.recipes import Suite

OF_DECOMPOSITION = ("injection_survival", "block_order")
"""Probes that came with the update decomposition"""


def settings_of(manifest: Manifest, suite: Suite) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a committed run was asked for, and what the suite asks for: to be equal.

    A run of before the update decomposition says nothing of it. Of such a run alone, the suite is asked without the
    decomposition, its rule, the two probes that came with it, and the claims about them, which all have a ``status``.
    """
    content = manifest.suite.content()
    ran, asked = Suite.model_validate(content).described(), suite.described()
    if "update" not in content:
        asked["update"], asked["verdict"]["update"] = ran["update"], ran["verdict"]["update"]
        asked["probes"] = [name for name in asked["probes"] if name not in OF_DECOMPOSITION]
        asked["claims"] = [claim for claim in asked["claims"] if "status" not in claim]
    return ran, asked
