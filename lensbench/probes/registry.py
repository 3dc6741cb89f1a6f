"""The probes by name. A new probe is a file of its own and one line here."""

from lensbench.probes.accuracy import ACCURACY
from lensbench.probes.block_order import BLOCK_ORDER
from lensbench.probes.block_paths import BLOCK_PATHS
from lensbench.probes.catalogue import Probe, Quantity
from lensbench.probes.causal_fidelity import CAUSAL_FIDELITY
from lensbench.probes.decodable_used import DECODABLE_USED
from lensbench.probes.early_exit import EARLY_EXIT
from lensbench.probes.error_transport import ERROR_TRANSPORT
from lensbench.probes.few_shot import FEW_SHOT
from lensbench.probes.gradient_alignment import GRADIENT_ALIGNMENT
from lensbench.probes.gradient_steps import GRADIENT_STEPS
from lensbench.probes.guess_and_refine import GUESS_AND_REFINE
from lensbench.probes.head_weights import HEAD_WEIGHTS
from lensbench.probes.injection_survival import INJECTION_SURVIVAL
from lensbench.probes.jacobian_halves import JACOBIAN_HALVES
from lensbench.probes.known_places import KNOWN_PLACES
from lensbench.probes.lens_rank import LENS_RANK
from lensbench.probes.linearity import LINEARITY
from lensbench.probes.loops import LOOPS
from lensbench.probes.matched_transfer import MATCHED_TRANSFER
from lensbench.probes.prediction_visibility import PREDICTION_VISIBILITY
from lensbench.probes.prefix_read_out import PREFIX_READ_OUT
from lensbench.probes.representation import REPRESENTATION
from lensbench.probes.top1_kept import TOP1_KEPT

PROBES: dict[str, Probe] = {
    probe.name: probe
    for probe in (
        ACCURACY,
        GRADIENT_ALIGNMENT,
        BLOCK_PATHS,
        BLOCK_ORDER,
        KNOWN_PLACES,
        REPRESENTATION,
        MATCHED_TRANSFER,
        PREDICTION_VISIBILITY,
        ERROR_TRANSPORT,
        HEAD_WEIGHTS,
        FEW_SHOT,
        CAUSAL_FIDELITY,
        INJECTION_SURVIVAL,
        GRADIENT_STEPS,
        PREFIX_READ_OUT,
        GUESS_AND_REFINE,
        LENS_RANK,
        DECODABLE_USED,
        JACOBIAN_HALVES,
        TOP1_KEPT,
        LINEARITY,
        EARLY_EXIT,
        LOOPS,
    )
}
"""Name, as a suite's ``probes`` gives it -> probe. Tables and panels show quantities in this order."""


def quantities() -> list[Quantity]:
    """All quantities of all probes, in the order of the registry."""
    return [quantity for probe in PROBES.values() for quantity in probe.quantities]


def quantity_of(probe: str, name: str) -> Quantity | None:
    """The quantity ``name`` of the probe ``probe``; None where the catalogue has no such quantity."""
    return PROBES[probe].quantity(name) if probe in PROBES else None
