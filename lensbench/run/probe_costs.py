"""What each probe costs: the passes of the model and the products that its code makes, counted one by one.

:data:`WORK` has a function for every probe; the tests hold each to the FLOPs that the probe really makes. Symbols are those
of :mod:`lensbench.run.costs`. W is the number of windows that a probe looks at, and c a number of chosen layers. Regressions
and tests of small matrices are left out where passes of the model take many times as long.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from lensbench.probes import block_order, causal_fidelity, gradient_steps, injection_survival, lens_rank, top1_kept
from lensbench.probes.block_paths import RANDOM_SETS, TOKENS_AT_ONCE
from lensbench.probes.error_transport import FIRST, MEMORY_GIB, ROWS_PER_DIRECTION
from lensbench.probes.head_weights import TOKENS
from lensbench.probes.head_weights import WINDOWS as HEAD_WINDOWS
from lensbench.probes.loops import BEYOND
from lensbench.probes.representation import RIDGES
from lensbench.probes.tools.crossfit import FOLDS
from lensbench.probes.tools.crossfit import RIDGES as CROSSFIT_RIDGES
from lensbench.probes.tools.layer_lenses import FITTED_ALWAYS, PROBED
from lensbench.probes.tools.predictions import RANK
from lensbench.probes.tools.prompts import EXAMPLES, PROMPTS
from lensbench.run.costs import (
    GIB,
    VALUES_ALONE,
    Cost,
    Counts,
    Shape,
    Work,
    eigendecompositions,
    forward,
    held,
    jacobian_products,
    moments,
    products,
    read_out,
    solutions,
)
from lensbench.suite.recipes import Suite

READS_SCORED = (
    "representation", "matched_transfer", "loops", "guess_and_refine", "lens_rank", "decodable_used", "jacobian_halves",
    "injection_survival", "linearity", "early_exit",
)  # fmt: skip
"""Probes that read the states at the scored tokens. The first one makes the pass where the scores are of more windows."""

OF_VIEWS = (
    "representation", "matched_transfer", "guess_and_refine", "lens_rank", "decodable_used", "jacobian_halves",
    "linearity", "early_exit",
)  # fmt: skip
"""Probes that a view with a random basis for every layer has, too"""

LOOPING = ("gpt-looped", "gpt-tied")
"""Families with one layer for all depths"""

SHARE_OF_DIRECTIONS = 0.8
"""Of the width: directions that hold 95 % of the unembedding's variance"""

TOKENS_OF_EXAMPLE = 4
"""Of a few-shot prompt: query, colon, label, and what ends the line"""

FRACTION_BEFORE = 0.53
"""Mean place of a token that is drawn from a window, as a share of its length"""

CHOSEN_RIDGES = 1.5
"""Ridges that the folds of one regression choose, on average"""


@dataclass(frozen=True)
class Asked:
    """A suite, a model and how much a probe looks at."""

    suite: Suite
    shape: Shape
    of: Counts
    loops: bool = False
    """Whether the model can go on with its one layer"""

    @property
    def windows(self) -> int:
        """Windows at most that probes look at."""
        return min(self.suite.evaluate.probe_sequences, self.of.windows["eval"][0])

    @property
    def scored(self) -> int:
        """Scored tokens of these windows."""
        return self.windows * self.of.windows["eval"][2]

    @property
    def further(self) -> int:
        """Kinds of lens that probes read and that not every fit has."""
        return sum(kind in self.suite.fit.lenses for kind in PROBED if kind not in FITTED_ALWAYS)

    def passes(self, windows: float, length: float, read: float) -> Work:
        """Passes over windows of a length, the logits of ``read`` tokens of each kept."""
        one = forward(self.shape, 1, 1, 0)
        attended = 4 * self.shape.layers * (length - 1) * self.shape.width
        return Work(model=windows * length * (one.model + attended)) + self.logits(windows * read)

    def logits(self, rows: float) -> Work:
        """The head at so many states, and what a softmax takes."""
        return Work(single=rows * 2 * self.shape.width * self.shape.vocabulary, words=2 * rows * self.shape.vocabulary)

    def predicted(self, windows: float, rank: int, *, heads: bool = False) -> Work:
        """Passes with the prediction of every token, seen in so many directions of the unembedding.

        With ``heads`` a predictive-coding model computes every layer's own expectations once more.
        """
        length, shape = self.suite.length, self.shape
        again = 4 * shape.layers * shape.width if heads and shape.errors else 0
        seen = Work(single=windows * length * (2 * (rank + 1) + again) * shape.vocabulary)
        return self.passes(windows, length, length) + seen

    def reordered(self, windows: float, read: float, orders: float) -> Work:
        """Passes with blocks in other orders. A first batch is passed once more, to see what blocks are handed."""
        length = self.suite.length
        batch = min(windows, max(1, TOKENS_AT_ONCE // length))
        return orders * (self.passes(windows, length, read) + self.passes(batch, length, 0))


def accuracy(_: Asked) -> Work:
    """Of images, whose cost is not predicted."""
    return Work()


def gradient_alignment_work(asked: Asked) -> Work:
    """Forward and back through activations, with the logits of every token."""
    return 2 * asked.passes(asked.windows, asked.suite.length, asked.suite.length)


def block_paths_work(asked: Asked) -> Work:
    """The model as it is, without each block, with neighbours exchanged, and without random sets of blocks."""
    layers, read = asked.shape.layers, asked.of.windows["eval"][2]
    plain = 1 + layers + RANDOM_SETS * max(0, layers - 2)
    whole = plain * asked.passes(asked.windows, asked.suite.length, read)
    return whole + asked.reordered(asked.windows, read, layers - 1)


def block_order_work(asked: Asked) -> Work:
    """The model as it is, without some blocks, and with its middle blocks in other orders."""
    layers, read = asked.shape.layers, asked.of.windows["eval"][2]
    if layers < 4:
        return Work()
    windows, middle = min(block_order.WINDOWS, asked.windows), layers - 2
    plain = 1 + min(block_order.BLOCKS, middle)
    orders = min(block_order.BLOCKS, middle - 1) + 1 + len(block_order.random_orders(layers))
    return plain * asked.passes(windows, asked.suite.length, read) + asked.reordered(windows, read, orders)


def top1_kept_work(asked: Asked) -> Work:
    """As :func:`block_paths_work`, of fewer blocks and windows, with the logits of every token."""
    windows, length = min(top1_kept.WINDOWS, asked.windows), asked.suite.length
    deleted, exchanged = (min(top1_kept.BLOCKS, count) for count in (asked.shape.layers, asked.shape.layers - 1))
    return (1 + deleted) * asked.passes(windows, length, length) + asked.reordered(windows, length, exchanged)


def known_places_work(asked: Asked) -> Work:
    """Of predictive coding: a pass, read-outs and expectations of every layer, and two passes over prefixes."""
    if not asked.shape.errors:
        return Work()
    shape, length = asked.shape, asked.suite.length
    rows = asked.windows * length
    each = Work(single=rows * 6 * shape.width * shape.vocabulary, words=4 * rows * shape.vocabulary)
    return 3 * asked.passes(asked.windows, length, length) + (shape.layers + 1) * each


def gradient_steps_work(asked: Asked) -> Work:
    """Of predictive coding: for every layer and head of some prefixes a forward and a backward pass of the read-out."""
    if not asked.shape.errors:
        return Work()
    shape = asked.shape
    rows = min(gradient_steps.WINDOWS, asked.windows) * asked.suite.length
    steps = rows * shape.layers * shape.heads
    one = asked.passes(rows / asked.suite.length, asked.suite.length, asked.suite.length)
    read = steps * 4 * shape.width * shape.vocabulary
    return Work(double=one.model + one.single + read, words=3 * steps * shape.vocabulary)


def prefix_read_out_work(asked: Asked) -> Work:
    """Of predictive coding: passes over a prefix and over the whole of every window."""
    if not asked.shape.errors:
        return Work()
    length = asked.suite.length
    prefix = FRACTION_BEFORE * length
    return asked.passes(asked.windows, length, length) + asked.passes(asked.windows, prefix, prefix)


def representation_work(asked: Asked) -> Work:
    """Moments of all layers, and regressions between every two of the chosen ones at every ridge."""
    shape, of, chosen = asked.shape, asked.of, asked.of.chosen
    pairs, square = chosen * (chosen - 1) / 2, asked.shape.width**2
    rows = of.tokens("fit") + 0.5 * len(RIDGES) * of.tokens("dev") + 0.5 * asked.scored  # float32 is half the work
    work = moments(shape, of.tokens("fit"), shape.layers + 1) + eigendecompositions(shape, shape.layers + 1)
    work += Work(double=2 * (shape.layers + 1) ** 2 * square)
    return work + Work(double=pairs * 2 * square * rows) + products(shape, pairs * (1 + len(RIDGES)))


def matched_transfer_work(asked: Asked) -> Work:
    """Every lens on every layer, as it is and matched."""
    return read_out(asked.shape, 2 * asked.scored * asked.of.chosen**2)


def loops_work(asked: Asked) -> Work:
    """The head at every state; a model that can loop passes over the windows with several times as many loops."""
    evaluate, shape, times = asked.suite.evaluate, asked.shape, BEYOND if asked.loops else 1
    work = read_out(shape, asked.scored * (times * shape.layers + 1))
    if asked.loops:
        work += BEYOND * forward(shape, asked.windows, asked.suite.length, 0)
        work += forward(shape, asked.windows, 0, evaluate.positions)
    return work


def guess_and_refine_work(asked: Asked) -> Work:
    """One read-out for every lens, null, layer and token; the null of per-layer lenses is fitted."""
    shape, nulls = asked.shape, 1 + bool(asked.of.views) + ("shared_jacobian" in asked.suite.fit.lenses)
    readers = len(FITTED_ALWAYS) + asked.further + nulls
    fitted = moments(shape, 2 * asked.of.tokens("fit"), shape.layers) + solutions(shape, shape.layers)
    return read_out(shape, asked.scored * readers * shape.layers) + fitted + eigendecompositions(shape, shape.layers)


def lens_rank_work(asked: Asked) -> Work:
    """At every rank each kind of lens on the chosen layers; on dev every layer's lens on all of them, with six pads."""
    shape, of = asked.shape, asked.of
    chosen, ranks = min(lens_rank.LAYERS, shape.layers), len(lens_rank.ranks_of(shape.width))
    kinds = len(lens_rank.SETS) - 2 + asked.further
    dev = min(lens_rank.DEV_TOKENS, of.tokens("dev")) * (chosen**2 + chosen * (kinds - 2))
    rows = ranks * dev
    work = Work(
        single=rows * 2 * shape.width * shape.vocabulary, words=rows * 2 * len(lens_rank.PADS) * shape.vocabulary
    )
    work += Work(double=ranks * (dev + kinds * chosen * asked.scored) * 2 * shape.width**2)
    work += asked.logits(ranks * kinds * chosen * asked.scored)
    cuts = chosen * (1 + asked.further) + 1
    work += (
        moments(shape, of.tokens("fit") / 2, chosen) + products(shape, 4 * cuts) + eigendecompositions(shape, 9 * cuts)
    )
    return work + metric(asked)


def metric(asked: Asked) -> Work:
    """The read-out's Fisher metric."""
    return Work(double=2 * asked.shape.vocabulary * asked.shape.width**2) + eigendecompositions(asked.shape, 1)


def decodable_used_work(asked: Asked) -> Work:
    """Local Jacobians and regressions of two halves of the fitting text, and what they make of the scored states."""
    if not asked.suite.fit.lenses:
        return Work()
    shape, layers = asked.shape, asked.shape.layers
    work = 2 * jacobian_products(asked.suite, shape, "jacobian_local", asked.suite.fit.jacobian.prompts // 2)
    work += moments(shape, asked.of.tokens("fit"), layers) + eigendecompositions(shape, 2 * layers)
    work += products(shape, layers * (2 + 5)) + Work(double=layers * 5 * asked.scored * 2 * shape.width**2)
    return work + metric(asked)


def jacobian_halves_work(asked: Asked) -> Work:
    """Jacobians of four quarters of the prompts, their products with the scored states, and two read-outs."""
    if not asked.suite.fit.lenses:
        return Work()
    shape, layers = asked.shape, asked.shape.layers
    work = 4 * jacobian_products(asked.suite, shape, "jacobian", asked.suite.fit.jacobian.prompts // 4)
    work += products(shape, layers * 3) + Work(double=layers * 3 * asked.scored * 2 * shape.width**2)
    return work + read_out(shape, 2 * layers * asked.scored) + metric(asked)


def linearity_work(asked: Asked) -> Work:
    """Least squares of every layer on the one before it, with all tokens and with the quiet ones, and its residuals."""
    shape, layers = asked.shape, asked.shape.layers
    work = moments(shape, 2 * asked.of.tokens("fit"), layers) + eigendecompositions(shape, 2 * layers)
    return work + products(shape, 2 * layers) + Work(double=2 * layers * asked.scored * 2 * shape.width**2)


def early_exit_work(asked: Asked) -> Work:
    """One read-out for every lens, layer and token of dev and of what is scored."""
    readers = len(FITTED_ALWAYS) + asked.further
    return read_out(asked.shape, (asked.scored + asked.of.tokens("dev")) * readers * asked.shape.layers)


def refitted(inputs: float, outputs: float, chosen: float = CHOSEN_RIDGES) -> Work:
    """Cross-fitted ridge regressions: each of the folds with each ridge, then every two folds left out."""
    solved = FOLDS * len(CROSSFIT_RIDGES) + chosen * FOLDS * (FOLDS + 1) / 2
    return Work(double=solved * (inputs**3 / 3 + 4 * inputs**2 * outputs))


def prediction_visibility_work(asked: Asked) -> Work:
    """Predictions of fitting and scored windows, second moments with every layer, and cross-fitted regressions."""
    shape, length, d = asked.shape, asked.suite.length, asked.shape.width
    rank = min(RANK, d)
    known, targets = 2 * d + (rank + 1) + 2 * (rank + 1), 2 * rank + 1
    columns = 1 + known + targets
    states = shape.layers + 1
    rows = asked.windows * (length - FIRST)
    work = asked.predicted(asked.of.windows["fit"][0] + asked.windows, rank) + metric(asked)
    work += Work(double=rows * (2 * columns**2 + states * 2 * d * (columns + d)))
    return work + refitted(known, targets) + states * refitted(known + d, targets)


def error_transport_work(asked: Asked) -> Work:
    """A pass with all heads, what each may have carried at some positions, and its regressions."""
    shape, length, d = asked.shape, asked.suite.length, asked.shape.width
    heads, size = shape.layers * shape.heads, d / shape.heads
    positions, most = asked.windows * (length - FIRST), MEMORY_GIB * GIB
    stride = math.ceil(positions * heads * (length + size) * 4 / most)
    columns = (most / 2 / (8 * FOLDS * shape.heads)) ** 0.5
    allowed = min((columns - 3 - size) / 4, max(RANK, positions / stride / ROWS_PER_DIRECTION))
    rank = int(min(d, allowed, max(RANK, SHARE_OF_DIRECTIONS * d)))
    wide = 3 + 4 * rank + size
    each = heads * positions / stride * (8 * length * rank + 2 * wide**2)
    # Maps of three groups of columns, fitted without each fold, at each of several angles.
    tests = Work(double=heads * HEAD_TESTS * (4 * rank) ** 3) + Work(eigen=heads * 10 * rank**3)
    return asked.predicted(asked.windows, rank, heads=True) + metric(asked) + Work(double=each) + tests


HEAD_TESTS = 55
"""Cubes of all directions' columns that a head's regressions and tests take"""


def head_weights_work(asked: Asked) -> Work:
    """Single tokens through all blocks, twice; what each head writes of them, by all of them; and attention weights."""
    shape, d = asked.shape, asked.shape.width
    tokens = min(TOKENS, shape.vocabulary)
    heads = shape.layers * shape.heads
    written = 2 * tokens * heads * 2 * d * (d / shape.heads)
    by_all = 2 * heads * tokens**2 * 2 * d
    # Predictive coding has its heads' maps at hand; other models are given single tokens.
    alone = Work() if shape.errors else 2 * asked.passes(tokens, 1, 1)
    return (
        alone + Work(single=written, double=by_all) + asked.predicted(min(HEAD_WINDOWS, asked.windows), 1, heads=True)
    )


def few_shot_work(asked: Asked) -> Work:
    """Prompts with and without an example, and after labels in another order, up to the example."""
    length = min(asked.suite.length, 1 + EXAMPLES * TOKENS_OF_EXAMPLE)
    return asked.passes(2.6 * PROMPTS, length, 2)


def causal_fidelity_work(asked: Asked) -> Work:
    """Moves of the last state of some prefixes at every layer, as the model and as three lenses see them."""
    shape, length = asked.shape, asked.suite.length
    windows = min(causal_fidelity.WINDOWS, asked.windows)
    moves = windows * 2 * causal_fidelity.DIRECTIONS * shape.layers
    work = asked.passes(2 * windows, 0.9 * length, 1) + moved(asked, moves + windows, 0.9 * length)
    work += read_out(shape, 6 * moves) + Work(double=4 * moves * 6 * shape.vocabulary)
    work += asked.predicted(min(causal_fidelity.COVARIANCE_WINDOWS, asked.windows), 1)
    rows = min(causal_fidelity.COVARIANCE_WINDOWS, asked.windows) * length
    work += moments(shape, rows / 2, shape.layers) + eigendecompositions(shape, 2 * shape.layers)
    return work + metric(asked) + products(shape, 3 * shape.layers)


def moved(asked: Asked, moves: float, place: float) -> Work:
    """The last tokens of prefixes that end at a place, computed again with a cache of the tokens before."""
    shape = asked.shape
    one = forward(shape, 1, 1, 0).model + 4 * shape.layers * (place - 1) * shape.width
    return Work(model=moves * one) + asked.logits(moves)


def injection_survival_work(asked: Asked) -> Work:
    """Lenses of two folds; of one token a window a pass over its prefix, and six changes of it at every layer."""
    shape, n = asked.shape, min(injection_survival.LAYERS, asked.of.chosen)
    if n < 2:
        return Work()
    windows, d = min(injection_survival.WINDOWS, asked.windows), shape.width
    place, moves = FRACTION_BEFORE * asked.suite.length, 6 * (n - 1)
    work = asked.passes(windows, place, 1) + moved(asked, windows * (2 + moves), place)
    work += read_out(shape, windows * 7 * (n - 1))
    later = 3 * (n - 1) * n  # readings of all later layers, both folds
    work += Work(double=windows * 2 * d**2 * (later + 12 * (n - 1) + 6 * (n - 1)))
    work += moments(shape, asked.of.tokens("fit"), n + 1) + products(shape, 14 * n)
    work += solutions(shape, 2 * n) + eigendecompositions(shape, 3 * n + 2 + VALUES_ALONE * 2 * n)
    return work + metric(asked)


WORK: dict[str, Callable[[Asked], Work]] = {
    "accuracy": accuracy,
    "gradient_alignment": gradient_alignment_work,
    "block_paths": block_paths_work,
    "block_order": block_order_work,
    "known_places": known_places_work,
    "representation": representation_work,
    "matched_transfer": matched_transfer_work,
    "prediction_visibility": prediction_visibility_work,
    "error_transport": error_transport_work,
    "head_weights": head_weights_work,
    "few_shot": few_shot_work,
    "causal_fidelity": causal_fidelity_work,
    "injection_survival": injection_survival_work,
    "gradient_steps": gradient_steps_work,
    "prefix_read_out": prefix_read_out_work,
    "guess_and_refine": guess_and_refine_work,
    "lens_rank": lens_rank_work,
    "decodable_used": decodable_used_work,
    "jacobian_halves": jacobian_halves_work,
    "top1_kept": top1_kept_work,
    "linearity": linearity_work,
    "early_exit": early_exit_work,
    "loops": loops_work,
}
"""Probe -> what it takes of a model that it applies to, the states of all splits being there"""


def probe_cost(asked: Asked, probe: str, *, captured: bool) -> Cost:
    """A probe's cost; ``captured``: whether the states at the scored tokens are there already."""
    work = WORK[probe](asked) if probe in WORK else Work()  # unknown of a probe that a script registers
    if probe in READS_SCORED and not captured:
        work += forward(asked.shape, asked.windows, asked.suite.length, asked.suite.evaluate.positions)
    tokens = asked.scored + (asked.of.tokens("fit") if probe in READS_SCORED else 0)
    memory, disk = held(asked.shape, asked.suite, tokens)
    return Cost(work, memory, disk)
