"""How many blocks could be left out, were each token read at the first layer whose lens is sure of its word?"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lensbench.lenses.maps import Reads
from lensbench.probes.catalogue import SAME_TOKENIZER, Probe, Quantity
from lensbench.probes.measured import Measured, Sums
from lensbench.probes.subject import Subject
from lensbench.probes.tools.layer_lenses import PROBED, layer_lenses
from lensbench.runtime.memory import in_pieces
from lensbench.statistics import Array
from lensbench.streams.capture import Capture
from lensbench.streams.kl import sum_by_window
from lensbench.streams.partition import rows_at_once
from lensbench.streams.readout import ReadOut

NAME = "early_exit"

TARGETS = (90, 95, 99)
"""Percent of the tokens whose top-1 shall be the model's"""

THRESHOLDS = 256
"""Quantiles at most, of the probabilities that a lens gives on dev, that are tried as thresholds"""

ROWS = 256
"""Rows of logits in memory at once on a processor"""


def early_exit(subject: Subject) -> Measured:
    """Blocks saved where each token is read at the first layer at which a lens gives its top-1 enough probability.

    The exit rule of arXiv 2303.09435 (section 5). The threshold is chosen on dev: the lowest one at which, and at all higher
    ones, the top-1 at the exit is the model's at 90, 95 and 99 % of the tokens. A token that no layer is sure of passes
    all blocks. On held-out tokens both are measured: blocks saved, and how often the top-1 is the model's.

    Its control, "blind", does not look at the token: a share of all tokens, drawn at random, exits at one layer, which dev
    chose. Takes one product with the unembedding for every lens, layer and token of dev and of what is scored.
    """
    scored, dev, layers = subject.eval, subject.dev, subject.stream.layers
    readout = subject.stream.readout
    sums = Sums(NAME, subject.samples, sum_by_window(torch.ones(len(scored)), scored))
    lenses = {kind: lens.reads for kind, lens in layer_lenses(subject).items()}
    saved: dict[tuple[str, int], Array] = {}
    named = f"exits-{subject.name}" if subject.name else "exits"
    with subject.progress.task(named, len(lenses), "lenses") as task:
        for number, (kind, reads) in enumerate(lenses.items()):
            on_dev, held = (Said.of(readout, captured, reads, layers) for captured in (dev, scored))
            for target in TARGETS:
                threshold = lowest_threshold(on_dev, target / 100)
                exit_at = held.exits(threshold)
                saved[kind, target] = of_windows(1 - exit_at / layers, scored)
                sums.add(f"exit_saved_{kind}", saved[kind, target], other=target)
                sums.add(f"exit_kept_{kind}", of_windows(held.kept(exit_at), scored), other=target)
                sums.add(f"exit_threshold_{kind}", threshold * sums.tokens, other=target)
                blind = Blind.of(on_dev, target / 100)
                sums.add(f"exit_saved_{kind}_blind", blind.saved * sums.tokens, other=target)
                sums.add(f"exit_kept_{kind}_blind", of_windows(blind.kept(held), scored), other=target)
                if kind != "logit":
                    more = saved[kind, target] - saved["logit", target]
                    sums.add(f"exit_saved_{kind}_minus_logit", more, other=target)
            task.update(number + 1)
    return sums.measured()


def of_windows(values: Array, scored: Capture) -> Array:
    """Sums by window ``[S]`` of values of every token ``[N]``."""
    return sum_by_window(torch.from_numpy(np.asarray(values, dtype=float)), scored)


@dataclass(frozen=True)
class Said:
    """What a lens says at each of L layers, of N tokens."""

    sure: Array
    """Probability of its top-1 ``[L, N]``; not a number where logits overflow"""
    right: Array
    """Whether its top-1 is the model's ``[L, N]``"""

    @classmethod
    def of(cls, readout: ReadOut, captured: Capture, reads: Reads, layers: int) -> "Said":
        """What a lens says of captured states."""
        sure, right = [], []
        for layer in range(layers):
            highest, word = top_of(readout, reads.read(layer, captured.states[layer]))
            sure.append(highest.double().cpu().numpy())
            right.append((word == captured.top).cpu().numpy())
        return cls(np.stack(sure), np.stack(right))

    def exits(self, threshold: float) -> Array:
        """The first layer ``[N]`` at which the lens is as sure as this; L where none is."""
        enough = self.sure >= threshold
        first: Array = np.where(enough.any(0), enough.argmax(0), len(enough))
        return first

    def kept(self, exit_at: Array) -> Array:
        """Whether the top-1 at each token's exit ``[N]`` is the model's."""
        rows = np.vstack([self.right, np.ones(self.right.shape[1], dtype=bool)])
        kept: Array = rows[exit_at, np.arange(rows.shape[1])]
        return kept


@torch.no_grad()
def top_of(readout: ReadOut, x: Tensor) -> tuple[Tensor, Tensor]:
    """Probability of the most probable word of states ``[n, d]`` before the final norm, and the word: ``[n]`` each."""

    def one(rows: slice) -> tuple[Tensor, Tensor]:
        logits = readout(x[rows])
        highest, word = logits.max(-1)
        return (highest - logits.logsumexp(-1)).exp(), word

    if not len(x):
        return x.new_zeros(0), torch.zeros(0, dtype=torch.int64, device=x.device)
    parts = list(
        in_pieces(slice(0, len(x)), rows_at_once(x, len(readout.weight), ROWS), one, what="a token of a read-out")
    )
    sure, word = (torch.cat(part) for part in zip(*parts, strict=True))
    return sure, word


def thresholds(said: Said) -> Array:
    """The thresholds that are tried, rising: 0, and quantiles of the probabilities that a lens gives."""
    known = said.sure[np.isfinite(said.sure)]
    rising: Array = np.unique([0.0, *(np.quantile(known, np.linspace(0, 1, THRESHOLDS)) if len(known) else ())])
    return rising


def lowest_threshold(said: Said, target: float) -> float:
    """The lowest threshold at which, and at all higher ones that are tried, so many tokens keep the model's top-1.

    2, which no probability reaches, where there is none. A higher threshold may keep less: a token then exits later, where
    its top-1 was right before.
    """
    lowest = 2.0
    for threshold in thresholds(said)[::-1]:
        if said.kept(said.exits(threshold)).mean() < target:
            break
        lowest = float(threshold)
    return lowest


@dataclass(frozen=True)
class Blind:
    """Exits that do not look at the token: a share of the tokens leaves at one layer."""

    layer: int
    share: float
    saved: float
    """Share of the blocks that is saved"""

    @classmethod
    def of(cls, said: Said, target: float) -> "Blind":
        """The layer and the share that save most where so many tokens keep the model's top-1."""
        layers, found = len(said.sure), []
        for layer, right in enumerate(said.right.mean(1)):
            share = 1.0 if right >= target else min(1.0, (1 - target) / (1 - right))
            found.append(cls(layer, share, share * (1 - layer / layers)))
        return max(found, key=lambda one: one.saved)

    def kept(self, said: Said) -> Array:
        """The chance that each token ``[N]`` keeps the model's top-1."""
        kept: Array = 1 - self.share * (1 - said.right[self.layer].astype(float))
        return kept


def quantities_of(kind: str) -> Iterator[Quantity]:
    """The quantities of one kind of lens."""
    lens = PROBED[kind]
    rule = f"the first layer whose {lens} give{'' if lens.endswith('es') else 's'} the top-1 as much probability"
    yield _of_target(
        f"exit_saved_{kind}",
        f"blocks saved by exits, {lens}",
        f"mean share of blocks after each token's exit, {rule} as dev chose; `other` is the target on dev, percent",
        "Read it with `exit_kept`: what dev promised, held-out text may miss.",
    )
    yield _of_target(
        f"exit_kept_{kind}",
        f"top-1 kept by exits, {lens}",
        "share of tokens whose top-1 at their exit is the model's; `other` is the target on dev, percent",
        "Below its target, the threshold of dev was too low for this text.",
    )
    yield _of_target(
        f"exit_threshold_{kind}",
        f"threshold of exits, {lens}",
        "the probability of the top-1 from which on a token exits, chosen on dev; 2: never",
        "It was not chosen on the tokens that are scored.",
    )
    yield _of_target(
        f"exit_saved_{kind}_blind",
        f"blocks saved by blind exits, {lens}",
        "the same where a random share of the tokens exits at one layer; share and layer chosen on dev",
        "What is saved without looking at the token.",
    )
    yield _of_target(
        f"exit_kept_{kind}_blind",
        f"top-1 kept by blind exits, {lens}",
        "share of tokens that keep the model's top-1 so, in expectation",
        "It should be near its target.",
    )
    if kind != "logit":
        yield _of_target(
            f"exit_saved_{kind}_minus_logit", f"blocks saved by exits, {lens} - logit lens",
            f"`exit_saved_{kind}` minus `exit_saved_logit`, same tokens, each at its own threshold",
            "Published for linear maps at 95 %: 0.079 (GPT-2), 0.054 (BERT).",
        )  # fmt: skip


def _of_target(name: str, label: str, formula: str, reading: str) -> Quantity:
    return Quantity(name, label, formula, "target", reading, SAME_TOKENIZER)


EARLY_EXIT = Probe(
    NAME,
    early_exit,
    "per lens, how many blocks are saved where each token is read at the first layer that is sure of its word",
    tuple(quantity for kind in PROBED for quantity in quantities_of(kind)),
    images=True,
    control="exits of a random share of the tokens at one layer",
)
