"""The indices of the update decomposition, as the catalogue of indices has them."""

from lensbench.measures.index import WITHOUT_LAYER_0, Index
from lensbench.measures.update.summary import WITHOUT_LAYER_0 as SUFFIX


def _both(
    name: str, label: str, formula: str, reading: str, *, shown: tuple[int | None, int | None]
) -> tuple[Index, Index]:
    """An index over all pairs of layers i < j < L, and the same over those with i >= 1."""
    return (
        Index(name, label, formula, reading, comparable="all models", of_updates=True, shown=shown[0]),
        Index(
            f"{name}{SUFFIX}", f"{label} {WITHOUT_LAYER_0}", f"{name} over 1 <= i < j", f"{label[0].upper()}{label[1:]}"
            " from layer 1 on.", comparable="all models", of_updates=True, shown=shown[1], variant_of=name,
            variant=WITHOUT_LAYER_0,
        ),
    )  # fmt: skip


OF_UPDATES: tuple[Index, ...] = (
    *_both(
        "in_place", "added in place", "1 - c, c = (a(s_ij) - a(r_j)) / (a(r_i) - a(r_j)), a(z) = <z, r_i> / <z, f_i>",
        "Of what later layers add to the prediction and take off its error, the share that shows in the reading of the "
        "earlier lens as it does in the new one's. 1: added up in one representation, as in any stack of additions. 0: it "
        "was added elsewhere, and the earlier reading is carried along. Over pairs that pass the gates.", shown=(7, 1),
    ),
    *_both(
        "in_place_normed", "added in place, final norm's units", "1 - c with states over the final norm's scale of h_L",
        "The same where every token counts alike. Second moments of states weigh a token by the square of its length, which "
        "the final norm undoes: where the two differ, loud tokens do not do as the others.", shown=(None, None),
    ),
    *_both(
        "clarity_normed", "clarity, final norm's units", "clarity with states over the final norm's scale of h_L",
        "Clarity where every token counts alike.", shown=(None, None),
    ),
    *_both(
        "carried", "added elsewhere", "c", "One minus what is added in place: the share that lies in other "
        "directions, while the earlier reading is carried along.", shown=(None, None),
    ),
    *_both(
        "clarity", "clarity", "sqrt of R2 of s_ij on (r_i, r_j), less chance", "How much of what the earlier lens reads at "
        "a later layer the two layers' own readings explain. Near 1: it reads the same prediction. Near 0: another basis, "
        "or drowned in interference.", shown=(8, 2),
    ),
    *_both(
        "persistence", "persistence", "S = <s_ij, f_i> / <r_i, f_i>", "How much of the signal in the earlier reading is "
        "still there at the later layer; growth of the stream is in it.", shown=(9, 3),
    ),
    *_both(
        "kept_low", "kept, lower end", "clarity where S is above chance, else 0", "The least that is kept of the earlier "
        "reading.", shown=(None, None),
    ),
    *_both(
        "kept_high", "kept, upper end", "min(1, S) where S is above chance, else 0", "The most that is kept of it. A stream "
        "that grows hides a change of basis from S.", shown=(None, None),
    ),
    *_both(
        "news", "news", "share of the gain in explained power where lens i explains < 10 %", "The share of the gain that "
        "lies in directions of the prediction which the earlier lens does not read. Above 1: in those that it reads, the "
        "later lens explains less.", shown=(10, 4),
    ),
    *_both(
        "readable_gain", "readable gain", "V = sum (CE_base - CE_old) / sum (CE_base - CE_new)", "The share of the "
        "cross-entropy gain that the earlier lens itself can read; far too low for mixtures. Well above 0: what is "
        "added in place is what predicts. Near 0 excludes nothing: the gain may be carried along, re-represented, or news, "
        "or interference that depends on the answer may hide it.", shown=(11, 5),
    ),
    *_both(
        "commission", "commission", "E|r_i - f_i|^2 / E|T - r_i|^2", "The share of a lens's error that is loading on what "
        "is no signal: what is added in place speaks of this part of the error alone.", shown=(None, None),
    ),
    *_both(
        "drowned", "drowned", "1 - clarity over pairs with S >= 1", "What of the earlier reading can no longer be told at "
        "the later layer although its signal did not shrink.", shown=(None, None),
    ),
    *_both(
        "pairs_passed", "pairs that pass the gates", "share of pairs i < j", "The share of pairs of layers of which the "
        "decomposition may speak: losses fall, the later lens has less error loading, the signal is above chance.",
        shown=(12, 6),
    ),
    Index(
        "reach", "reach", "1 - KL of the last layer's lens / K_0", "How much of the prediction the lens "
        "of the last layer reads. What no linear lens reads before the last block, no share speaks of.",
        comparable="all models", of_updates=True, shown=13,
    ),
)  # fmt: skip
"""Two for each quantity, over all pairs of layers and without layer 0; reach is of the last layer alone"""
