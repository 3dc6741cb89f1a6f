"""Do early layers guess frequent words, which later ones revise? Through per-layer lenses, and through one for all."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lensbench.data.windows import Windows
from lensbench.lenses.maps import Reads
from lensbench.probes.catalogue import SAME_TOKENIZER, Probe, Quantity, Table, of_model
from lensbench.probes.measured import Measured, Sums
from lensbench.probes.subject import Subject
from lensbench.probes.tools.layer_lenses import NULL_OF, PROBED, layer_lenses, top_words
from lensbench.runtime.progress import Task
from lensbench.statistics import Array
from lensbench.streams.capture import Capture
from lensbench.streams.kl import sum_by_window

FREQUENT = 10
"""How many words count as frequent"""

SMALLEST_GUESS = 0.02
"""A share is taken of no smaller excess of frequent words"""

NO_NULL = "undefined: no such lens was fitted"
NO_EARLY = "undefined: it has one block, and no layer between the embeddings and the end"

BY_LAYER = {"frequent": "frequent top-1", "revised": "revised top-1", "settled": "settled top-1"}
"""What is compared between lenses, layer by layer -> its name"""


def guess_and_refine(subject: Subject) -> Measured:
    """Frequent words among the top-1 of every layer, their revision, and where the final top-1 is settled.

    The measures of "guess, then refine" (arXiv 2510.18871) through the logit lens, per-layer lenses and one shared lens, on
    the scored tokens. Frequent are the ten most frequent words of the fitting text. Early are the layers after the first
    quarter of the blocks, layer 0 aside. What chance gives is exact: a guess against the final top-1 of each token of other
    documents. Nulls: see :func:`~lensbench.probes.tools.layer_lenses.layer_lenses`. A null that knows nothing of a token
    says the most frequent word: only what differs from it was read from the layer.

    Takes one product with the unembedding for every lens, null, layer and token; kept are the words alone.
    """
    scored, layers = subject.eval, subject.stream.layers
    frequent = most_frequent(subject.words.fit_windows, subject.stream.vocab_size)
    final = scored.top.cpu().numpy()
    sums = Sums("guess_and_refine", subject.windows, sum_by_window(torch.ones(len(scored)), scored))
    add = _Adder(sums, scored)
    add.mean("frequent_model", frequent[final])
    add.mean("frequent_text", frequent[scored.targets.cpu().numpy()])
    add.mean("frequent_bigram", frequent[bigram_words(subject)])
    lenses, chance = layer_lenses(subject), Chance(final, scored.document, len(frequent))
    readers = [(kind, lens.reads) for kind, lens in lenses.items()]
    readers += [(f"{kind}_null", lens.null) for kind, lens in lenses.items() if lens.null is not None]
    found: dict[str, Guesses] = {}
    named = f"guesses-{subject.name}" if subject.name else "guesses"
    with subject.progress.task(named, len(readers) * layers, "layers") as task:
        for number, (name, reads) in enumerate(readers):
            found[name] = Guesses.of(words_of(subject, reads, task, number * layers), final, frequent, chance)
    early = early_layers(layers)
    for kind in lenses:
        add.layers(kind, found[kind], found.get(f"{kind}_null"))
        add.early(kind, found[kind], early)
        if kind not in ("logit", "tuned"):
            add.difference(kind, found["tuned"], found[kind], early)
    return sums.measured()


def early_layers(layers: int) -> list[int]:
    """The layers 1 to L/4, one at least; layer 0, the embeddings, is none of them."""
    return list(range(1, min(layers, max(2, layers // 4 + 1))))


def most_frequent(windows: Windows, vocab_size: int) -> NDArray[np.bool_]:
    """Which words are among the :data:`FREQUENT` most frequent of a text, ``[V]``; of equals those of smaller ids."""
    counts = np.bincount(windows.ids[windows.inside], minlength=vocab_size)
    frequent = np.zeros(vocab_size, dtype=bool)
    frequent[np.argsort(-counts, kind="stable")[:FREQUENT]] = True
    return frequent


def bigram_words(subject: Subject) -> NDArray[np.int64]:
    """The word that an interpolated bigram holds most probable at each scored position, ``[N]``."""
    ids, row, at = subject.windows.scored(slice(None))
    contexts, of = np.unique(ids[row, at], return_inverse=True)
    bigram = subject.words.bigram()
    best: NDArray[np.int64] = np.array([bigram.distribution(int(word)).argmax() for word in contexts])[of]
    return best


def words_of(subject: Subject, reads: Reads, task: Task, done: int) -> NDArray[np.int64]:
    """The top-1 of a lens at every layer and scored token, ``[L, N]``."""
    scored, readout, found = subject.eval, subject.stream.readout, []
    for layer in range(subject.stream.layers):
        found.append(top_words(readout, reads.read(layer, scored.states[layer])))
        task.update(done + layer + 1)
    return np.stack(found)


class Chance:
    """How often a guess would be the final top-1 of a token of another document.

    ``final`` ``[N]``: the final top-1 of each token; ``document`` ``[N]``; V words.
    """

    def __init__(self, final: NDArray[np.int64], document: NDArray[np.int64], words: int):
        _, self.document, sizes = np.unique(document, return_inverse=True, return_counts=True)
        self.words, self.count = words, np.bincount(final, minlength=words)
        # Documents times words would be too many to count: only the pairs that occur are kept.
        self.pairs, self.in_document = np.unique(self.document * words + final, return_counts=True)
        self.others = (len(final) - sizes)[self.document].astype(float)

    def of(self, guess: NDArray[np.int64]) -> Array:
        """The share of tokens of other documents whose final top-1 is each guess: ``[..., N]`` of that shape.

        Not a number where there is no other document.
        """
        wanted = self.document * self.words + guess
        at = np.minimum(np.searchsorted(self.pairs, wanted), len(self.pairs) - 1)
        own = np.where(self.pairs[at] == wanted, self.in_document[at], 0)
        with np.errstate(invalid="ignore"):
            share: Array = (self.count[guess] - own) / self.others
        return share


@dataclass(frozen=True)
class Guesses:
    """What becomes of a lens's top-1: each ``[L, N]`` for L layers and N tokens; NaN where logits overflow."""

    frequent: Array
    """1 where it is a frequent word"""
    excess: Array
    """The same, minus 1 where the final top-1 is frequent"""
    revised: Array
    """1 where it is not the final top-1"""
    settled: Array
    """1 where it is the final top-1, here and at all later layers"""
    revised_by_chance: Array
    """The share of tokens of other documents whose final top-1 is another word"""

    @classmethod
    def of(
        cls, words: NDArray[np.int64], final: NDArray[np.int64], frequent: NDArray[np.bool_], chance: Chance
    ) -> "Guesses":
        """Of the top-1 at every layer ``[L, N]`` (-1: unknown), the final one ``[N]``, and the frequent words ``[V]``."""
        unknown = words < 0
        kept = (words == final) & ~unknown
        settled = np.logical_and.accumulate(kept[::-1], axis=0)[::-1]
        said = frequent[words].astype(float)
        each = (said, said - frequent[final], ~kept, settled, 1 - chance.of(words))
        return cls(*(np.where(unknown, np.nan, values) for values in each))


@dataclass(frozen=True)
class _Adder:
    """Adds quantities of values per token ``[N]`` to the sums of a probe."""

    sums: Sums
    scored: Capture

    def _by_window(self, values: NDArray[Any]) -> Array:
        return sum_by_window(torch.from_numpy(values.astype(float)), self.scored)

    def mean(self, quantity: str, values: NDArray[Any], layer: int | None = None) -> None:
        """A mean over tokens of values ``[N]``."""
        self.sums.add(quantity, self._by_window(values), layer=layer)

    def ratio(self, quantity: str, top: Array, bottom: Array, layer: int | None = None, floor: float = 0.0) -> None:
        """A ratio of means over tokens of values ``[N]``."""
        self.sums.add(quantity, self._by_window(top), self._by_window(bottom), layer=layer, floor=floor)

    def layers(self, kind: str, own: Guesses, null: Guesses | None) -> None:
        """What a lens says at every layer, and its null where its kind has one."""
        for layer in range(len(own.frequent)):
            for what in BY_LAYER:
                self.mean(f"{what}_{kind}", getattr(own, what)[layer], layer)
                if null is not None:
                    self.mean(f"{what}_{kind}_null", getattr(null, what)[layer], layer)
                elif kind in NULL_OF:
                    self.sums.undefined(f"{what}_{kind}_null", NO_NULL, layer=layer)
            frequent = own.frequent[layer]
            self.ratio(f"frequent_revised_{kind}", frequent * own.revised[layer], frequent, layer)
            self.ratio(f"frequent_revised_{kind}_chance", frequent * own.revised_by_chance[layer], frequent, layer)

    def early(self, kind: str, own: Guesses, early: list[int]) -> None:
        """What a lens says at early layers."""
        if not early:
            for what in ("guess", "early_revised", "early_revised_beyond_chance"):
                self.sums.undefined(f"{what}_{kind}", NO_EARLY)
            return
        frequent, revised, by_chance = own.frequent[early], own.revised[early], own.revised_by_chance[early]
        self.mean(f"guess_{kind}", own.excess[early].mean(0))
        self.ratio(f"early_revised_{kind}", (frequent * revised).sum(0), frequent.sum(0))
        beyond = (frequent * (revised - by_chance)).sum(0)
        self.ratio(f"early_revised_beyond_chance_{kind}", beyond, frequent.sum(0))

    def difference(self, kind: str, tuned: Guesses, other: Guesses, early: list[int]) -> None:
        """Per-layer lenses minus another kind, on the same tokens."""
        for layer in range(len(tuned.frequent)):
            for what in BY_LAYER:
                change = getattr(tuned, what)[layer] - getattr(other, what)[layer]
                self.mean(f"{what}_tuned_minus_{kind}", change, layer)
        if not early:
            for what in ("guess_tuned_minus", "guess_kept", "early_revised_tuned_minus"):
                self.sums.undefined(f"{what}_{kind}", NO_EARLY)
            return
        own, seen = tuned.excess[early].mean(0), other.excess[early].mean(0)
        self.mean(f"guess_tuned_minus_{kind}", own - seen)
        self.ratio(f"guess_kept_{kind}", seen, own, floor=SMALLEST_GUESS)
        self.mean(f"early_revised_tuned_minus_{kind}", (tuned.revised - other.revised)[early].mean(0))


def _of_layer(name: str, label: str, formula: str, reading: str, table: Table | None = None) -> Quantity:
    return Quantity(name, label, formula, "layer", reading, SAME_TOKENIZER, table)


def quantities_of(kind: str) -> Iterator[Quantity]:
    """The quantities of one kind of lens."""
    lens, null = PROBED[kind], NULL_OF.get(kind, "")
    yield _of_layer(
        f"frequent_{kind}",
        f"frequent top-1, {lens}",
        f"share of tokens whose top-1 through the {lens} is one of the ten most frequent words",
        "Above `frequent_model`, the layer says frequent words more often than the model does.",
        "layers",
    )
    yield _of_layer(
        f"revised_{kind}",
        f"revised top-1, {lens}",
        "share of tokens whose top-1 there is not the model's",
        "It falls to 0 at the end; a slow fall says that late layers still decide.",
    )
    yield _of_layer(
        f"settled_{kind}",
        f"settled top-1, {lens}",
        "share of tokens whose top-1 there, and at all later layers, is the model's",
        "How many predictions have been made by this layer, as far as the lens sees.",
        "layers",
    )
    if null:
        for what in BY_LAYER:
            yield _of_layer(
                f"{what}_{kind}_null",
                f"{BY_LAYER[what]}, {null}",
                f"`{what}_{kind}` through the {null}",
                "What no knowledge of the token, or no common basis, gives.",
            )
    yield _of_layer(
        f"frequent_revised_{kind}",
        f"revised frequent guesses, {lens}",
        "of the tokens with a frequent top-1 there, the share whose final top-1 differs",
        "Published: above 0.7 at early layers. Compare its chance, the next row.",
    )
    yield _of_layer(
        f"frequent_revised_{kind}_chance",
        f"the same by chance, {lens}",
        "share of tokens of other documents whose final top-1 is not that frequent word",
        "A rate of revision equal to it says that the guess knew nothing of its token.",
    )
    yield of_model(
        f"guess_{kind}",
        f"excess of frequent guesses, {lens}",
        f"mean of `frequent_{kind}` over early layers, minus `frequent_model`",
        "Above 0, early layers guess frequent words; so does a lens that knows nothing: see its null.",
    )
    yield of_model(
        f"early_revised_{kind}",
        f"early frequent guesses revised, {lens}",
        f"`frequent_revised_{kind}` over all early layers together",
        "The share of early frequent guesses that do not stay.",
    )
    yield of_model(
        f"early_revised_beyond_chance_{kind}",
        f"the same beyond chance, {lens}",
        f"`early_revised_{kind}` minus its chance, same tokens",
        "Below 0, early frequent guesses are right more often than a guess at any other token: they are no mere prior.",
    )
    if kind not in ("logit", "tuned"):
        yield from _against_tuned(kind, lens)


def _against_tuned(kind: str, lens: str) -> Iterator[Quantity]:
    """Per-layer lenses minus another kind."""
    for what, label in BY_LAYER.items():
        yield _of_layer(
            f"{what}_tuned_minus_{kind}",
            f"{label}, {PROBED['tuned']} - {lens}",
            f"`{what}_tuned` minus `{what}_{kind}`, same tokens",
            "At 0, it does not depend on a lens for each layer.",
        )
    yield of_model(
        f"guess_tuned_minus_{kind}",
        f"excess of frequent guesses, {PROBED['tuned']} - {lens}",
        f"`guess_tuned` minus `guess_{kind}`, same tokens",
        f"Above 0, part of the guessing is in the per-layer lenses and not in the {lens}.",
    )
    yield of_model(
        f"guess_kept_{kind}",
        f"share of the excess that is left, {lens}",
        f"`guess_{kind}` by `guess_tuned`",
        "At 1, guessing does not depend on a lens for each layer; at 0 or below, it is theirs alone.",
    )
    yield of_model(
        f"early_revised_tuned_minus_{kind}",
        f"early top-1 revised, {PROBED['tuned']} - {lens}",
        f"mean of `revised_tuned` minus `revised_{kind}` over early layers, same tokens",
        f"Below 0, less of the final top-1 is read through the {lens} at early layers.",
        None,
    )


GUESS_AND_REFINE = Probe(
    "guess_and_refine",
    guess_and_refine,
    "per layer and lens, frequent words among the top-1, their revision, and where the final top-1 is settled",
    (
        of_model(
            "frequent_model",
            "frequent top-1 of the model",
            "share of tokens whose final top-1 is one of the ten most frequent words of the fitting text",
            "What the guesses of early layers are compared with.",
        ),
        of_model(
            "frequent_text",
            "frequent words in the text",
            "share of next tokens that are one of the ten",
            "What drawing from the unigram would give.",
        ),
        of_model(
            "frequent_bigram",
            "frequent top-1 of a bigram",
            "share of tokens after which a bigram holds one of the ten most probable",
            "What a reader that knows the present token alone would say.",
        ),
        *(quantity for kind in PROBED for quantity in quantities_of(kind)),
    ),
    control="lenses of shuffled targets; the shared lens of a random basis; guesses at tokens of other documents",
)
