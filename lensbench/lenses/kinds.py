"""What kinds of lens there are."""

from lensbench.lenses.jacobian_kinds import JACOBIAN, JACOBIAN_LOCAL, SHARED_JACOBIAN, SHARED_JACOBIAN_LOO
from lensbench.lenses.logit import LOGIT
from lensbench.lenses.pairs import PAIR
from lensbench.lenses.per_layer import TUNED
from lensbench.lenses.planning import LensKind
from lensbench.lenses.shared import SHARED, SHARED_BIAS, SHARED_LOO

KINDS: dict[str, LensKind] = {
    kind.name: kind
    for kind in (
        LOGIT, TUNED, SHARED, SHARED_BIAS, SHARED_LOO, PAIR,
        JACOBIAN, JACOBIAN_LOCAL, SHARED_JACOBIAN, SHARED_JACOBIAN_LOO,
    )
}  # fmt: skip
"""Name -> kind, in the order of figures and of rows. Adding one is a file of its own and a row here."""


def layer_kinds() -> list[LensKind]:
    """The kinds that are compared layer by layer: all but pairs."""
    return [kind for kind in KINDS.values() if kind.reads != "pair"]


def kinds_in_words() -> str:
    """The kinds of the column ``lens`` as the description of the tables says them."""
    *most, last = (f"{kind.name} ({kind.note})" if kind.note else kind.name for kind in layer_kinds())
    return f"{', '.join(most)} or {last}"
