"""What each stage of a run costs, before it runs: products, eigendecompositions, passes over logits, memory and disk.

One function for each kind of stage returns its :class:`Cost`, made of the ingredients below. Symbols: L layers, d width,
V words, T tokens of a window, N tokens that are looked at.

| ingredient | costs |
|---|---|
| a training step, and a pass of a model that is built here | measured: the model itself does some |
| a token of the model's forward pass | ``2 P + 4 L T d`` FLOPs, P parameters without embedding and head |
| a state read out over all words | ``2 d V`` FLOPs and V exponentials |
| the model's own prediction at a token | ``4 d V`` FLOPs: logits and ``W^T p`` |
| second moments of a layer | ``4 N d^2`` FLOPs, float64 |
| a solution at a ridge | a Cholesky factor and what it solves, ``(2 + 1/3) d^3`` FLOPs, float64 |
| the unit of a covariance's ridge | its eigenvalues, 0.4 of an eigendecomposition of ``d^3`` |
| a choice on dev | 3 pads at each of about 4 ridges, or all, each for one product with the unembedding |
| an update of refinement | ``4 d V'`` FLOPs a token, V' = ``fit.refine_vocabulary``; ``30 d^3`` to orthogonalise |

The counts are those of the present algebra; what changes there changes here. Searches end where dev says, so that their
counts are typical ones.
"""

from dataclasses import dataclass, fields

from lensbench.lenses.estimated import USUAL_SHARE, worth_estimating
from lensbench.lenses.estimated import WORDS as WORDS_FOR_ALL
from lensbench.lenses.jacobian import PILOT_PROBES, PILOT_PROMPTS
from lensbench.lenses.per_layer import curve_tolerances
from lensbench.lenses.planning import matrices, paired_views
from lensbench.lenses.room import SHARE
from lensbench.lenses.shared import REFITTED_VIEWS
from lensbench.measures.share import PILOT_TOKENS
from lensbench.measures.update.folds import FOLDS
from lensbench.measures.update.readable import DEV_TOKENS, EXACT_SHARE, FURTHER_PAIRS, HELD_OUT_TOKENS
from lensbench.measures.update.stacking import WORDS
from lensbench.suite.recipes import Suite

GIB = 2.0**30

DOUBLE, FLOAT = 8, 4
"""Bytes of a number"""

PROCESS_GIB = 0.6
"""What Python, torch and transformers take before anything is loaded"""

RIDGES_FROM_MIDDLE, RIDGES_FROM_NEAR = 5.0, 3.5
"""Ridges that a search on dev looks at, from the middle of the path, and from the choice for a similar lens"""

PRODUCTS_OF_PADS = 1.2
"""Products with the unembedding at each ridge, each for :data:`PADS` pads"""

PADS = 3

VALUES_ALONE = 0.4
"""What eigenvalues take, of a decomposition with eigenvectors"""

READABLE_STEPS = 4
"""Evaluations of a fit of readable gain"""

AUTO_SHARE = 0.05
"""The mean share of exact log-partitions that ``evaluate.exact_share = "auto"`` is taken to find"""

LANDMARKS = 5
"""Views of the model's own states that are decomposed"""


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that costs depend on."""

    layers: int
    width: int
    vocabulary: int
    body: int
    """Parameters without embedding and head"""
    outer: int
    """Parameters of embedding and head"""
    bytes_each: int = FLOAT
    """Of a weight"""
    heads: int = 1
    """Of attention, in each layer"""
    errors: bool = False
    """Whether each layer sees its prediction error, which costs products with the embedding"""

    @property
    def parameters(self) -> int:
        """All of them, an embedding that is tied to the head counted once."""
        return self.body + self.outer


@dataclass(frozen=True)
class Work:
    """What has to be computed."""

    model: float = 0.0
    """FLOPs of products in the model's type"""
    single: float = 0.0
    """FLOPs of products in float32"""
    read: float = 0.0
    """FLOPs of products of states with the unembedding, which may be made in half precision"""
    double: float = 0.0
    """FLOPs of products in float64"""
    eigen: float = 0.0
    """Sum of ``d^3`` over symmetric eigendecompositions in float64"""
    words: float = 0.0
    """Logits that are shifted, exponentiated and added up"""
    steps: float = 0.0
    """Training steps of the model, whose seconds are measured"""

    def __add__(self, other: "Work") -> "Work":
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Work)))

    def __mul__(self, times: float) -> "Work":
        return Work(*(getattr(self, f.name) * times for f in fields(Work)))

    __rmul__ = __mul__


@dataclass(frozen=True)
class Cost:
    """Work, memory that is held at once, and what is left on disk, bytes."""

    work: Work
    memory: float
    disk: float = 0.0


# Ingredients
def forward(shape: Shape, windows: int, length: int, scored: int) -> Work:
    """The model reads windows, and its predictions at ``scored`` tokens of each are kept."""
    tokens, rows = windows * length, windows * scored
    per_token = 2 * shape.body + 4 * shape.layers * length * shape.width
    if shape.errors:
        per_token += 4 * shape.layers * shape.width * shape.vocabulary
    return Work(
        model=tokens * per_token, single=rows * 4 * shape.width * shape.vocabulary, words=3 * rows * shape.vocabulary
    )


def read_out(shape: Shape, rows: float, pads: int = 1) -> Work:
    """So many states are mapped and read out over all words, at one or several lengths of the pad."""
    passes = 1.0 if pads == 1 else 2.0 * pads
    mapped, read = (rows * 2 * shape.width * columns for columns in (shape.width, shape.vocabulary))
    return Work(single=mapped, read=read, words=rows * shape.vocabulary * passes)


def softmax_moments(shape: Shape, rows: float) -> Work:
    """``W^T q`` of so many read-outs."""
    return Work(single=rows * 4 * shape.width * shape.vocabulary, words=2 * rows * shape.vocabulary)


def moments(shape: Shape, tokens: float, layers: int) -> Work:
    """Covariance of so many layers, and with the last state."""
    return Work(double=4.0 * tokens * layers * shape.width**2)


def eigendecompositions(shape: Shape, count: float) -> Work:
    """Of ``[d, d]``, with one product each for what is projected on the eigenvectors."""
    return Work(eigen=count * shape.width**3, double=2 * count * shape.width**3)


def solutions(shape: Shape, count: float) -> Work:
    """Of ridge regressions: a Cholesky factor and what it solves."""
    return Work(double=count * (2 + 1 / 3) * shape.width**3)


def products(shape: Shape, count: float) -> Work:
    """Of two ``[d, d]`` in float64."""
    return Work(double=2 * count * shape.width**3)


def searches(shape: Shape, rows: float, ridges: float) -> Work:
    """Choices of ridge and pad for lenses that are chosen on ``rows`` states altogether."""
    return of_share(shape, USUAL_SHARE) * read_out(shape, rows * ridges * PRODUCTS_OF_PADS, PADS)


def states_bytes(shape: Shape, tokens: int) -> float:
    """What the stream holds at so many tokens, the expectations of the prediction with it."""
    return FLOAT * tokens * shape.width * (shape.layers + 2)


@dataclass(frozen=True)
class Counts:
    """How many tokens and lenses the stages of a suite have for a model."""

    windows: dict[str, tuple[int, int, int]]
    """Split -> windows, tokens of each, and scored ones"""
    chosen: int
    pairs: int
    """With those of rotated views"""
    views: int
    pair_views: int
    curve: int
    """Tolerances of the curve, other than the matrix's"""
    pooled: int
    """Dev states that a lens of all layers is chosen on"""
    searched: int
    """Dev tokens that a lens of one layer is chosen on"""
    there: bool = False
    """Whether an earlier stage has passed over the splits"""

    @classmethod
    def of(cls, suite: Suite, shape: Shape, sequences: int | None = None) -> "Counts":
        """As the suite says; ``sequences``: held-out ones in place of the suite's number."""
        fit, evaluate, length = suite.fit, suite.evaluate, suite.length
        windows = {
            "fit": (fit.sequences, length, fit.positions),
            "dev": (fit.dev_sequences, length, fit.dev_positions),
            "eval": (sequences or evaluate.sequences, length, evaluate.positions),
        }
        chosen, pair_views = min(fit.layers, shape.layers), paired_views(fit)
        pairs = chosen * (chosen - 1) // 2 * (1 + pair_views) if fit.pairs else 0
        dev = fit.dev_sequences * fit.dev_positions
        searched = dev if fit.search_tokens is None else min(dev, fit.search_tokens)
        pooled = min(fit.pooled_dev_tokens, shape.layers * searched)
        return cls(windows, chosen, pairs, fit.rotations, pair_views, len(curve_tolerances(fit)), pooled, searched)

    def tokens(self, split: str) -> int:
        """Tokens of a split that are looked at."""
        windows, _, scored = self.windows[split]
        return windows * scored

    def captured(self, shape: Shape, *splits: str) -> Work:
        """The passes over splits; a run makes each once."""
        if self.there:
            return Work()
        return sum((forward(shape, *self.windows[split]) for split in splits), Work())


def held(shape: Shape, suite: Suite, tokens: int) -> tuple[float, float]:
    """Bytes of memory and of a temporary file that a model and the states of so many tokens take."""
    readout = 0 if shape.bytes_each == FLOAT else FLOAT * shape.width * shape.vocabulary
    model = shape.bytes_each * shape.parameters + readout
    states = states_bytes(shape, tokens)
    on_disk = states if states > suite.fit.memory_gib * GIB else 0.0
    return PROCESS_GIB * GIB + model + states - on_disk, on_disk


# Stages
def fit_cost(suite: Suite, shape: Shape, of: Counts) -> Cost:
    """All lenses of a model: capture, moments, closed forms, choices on dev, refits, refinement."""
    fit, n, dev, layers = suite.fit, of.tokens("fit"), of.tokens("dev"), shape.layers
    closed = of.chosen + 1 + of.views  # leave-one-out, shared, its null
    refitted = min(of.views, REFITTED_VIEWS)
    again = fit.refits * (layers + 2 * of.chosen + 1 + refitted)
    units = layers + closed + of.pairs + again  # the eigenvalues of each covariance, for the unit of its ridge
    solves: float = layers * (len(fit.ridges) + 2) + (of.curve + 1) * of.chosen + again
    solves += RIDGES_FROM_NEAR * (2 * layers + of.views + of.pairs) + RIDGES_FROM_MIDDLE * (2 + of.chosen)
    turned = layers * (of.views * (3 + RIDGES_FROM_NEAR) + 3 * refitted * fit.refits)
    work = of.captured(shape, "fit", "dev")
    work += moments(shape, n * (1 + fit.refits), layers)
    work += (
        eigendecompositions(shape, of.views + VALUES_ALONE * units) + solutions(shape, solves) + products(shape, turned)
    )
    own = (1 + fit.rotated_own) * layers
    work += searches(shape, layers * of.searched, len(fit.ridges))  # the matrix: all ridges
    work += searches(shape, own * of.searched + of.views * of.pooled, RIDGES_FROM_NEAR)
    work += searches(shape, (2 + of.chosen) * of.pooled, RIDGES_FROM_MIDDLE)
    work += searches(shape, of.pairs * min(of.pooled, 2 * of.searched), RIDGES_FROM_NEAR)
    work += searches(shape, of.chosen * of.searched, len(fit.ridges) / 2 / PRODUCTS_OF_PADS)  # one standard error
    work += read_out(shape, 6 * layers * (min(n, fit.record_tokens) + min(dev, fit.record_tokens)))
    work += refinement(suite, shape, of) + jacobians(suite, shape)
    maps = 8 * layers + (of.curve + of.chosen) + of.views * (1 + layers) + of.pairs + 4
    maps += again
    memory, disk = held(shape, suite, n + dev)
    square = shape.width**2
    algebra = DOUBLE * square * (layers + 8)  # the solutions of one lens; moments lie in a file
    return Cost(work, memory + algebra, disk + square * (FLOAT * maps + DOUBLE * matrices(fit, layers)))


def jacobians(suite: Suite, shape: Shape) -> Work:
    """Jacobian lenses of all prompts that are allowed: exactly, but of the current position, unless asked for otherwise."""
    kinds = [kind for kind in ("jacobian", "jacobian_local") if kind in suite.fit.lenses]
    prompts = suite.fit.jacobian.prompts
    return sum((jacobian_products(suite, shape, kind, prompts) for kind in kinds), Work())


def jacobian_products(suite: Suite, shape: Shape, kind: str, prompts: int) -> Work:
    """Mean Jacobians of one kind over so many prompts, two at least.

    A product with a vector goes back through activations alone and costs about what a forward pass does. Random vectors are
    also multiplied with a control variate and with what comes back, and are tried on some prompts first.
    """
    how, d, prompts = suite.fit.jacobian, shape.width, max(2, prompts)
    local = kind == "jacobian_local"
    exact = how.method == "exact" or (how.method == "auto" and not local)
    count, further = how.positions * d if local else d, Work()
    passes: float = prompts * (1 + count)
    if not exact:
        tried = min(PILOT_PROMPTS, how.rows, prompts)
        passes = prompts * (1 + how.probes) + tried * (1 + PILOT_PROBES)
        vectors = prompts * how.probes + tried * PILOT_PROBES
        further = Work(double=vectors * shape.layers * suite.length * 4 * d**2)
    return passes * forward(shape, 1, suite.length, 0) + further


def refinement(suite: Suite, shape: Shape, of: Counts) -> Work:
    """Own and shared lenses refined on KL, for as many passes as are allowed."""
    fit, d, lenses = suite.fit, shape.width, shape.layers + 1
    if not fit.refine_passes:
        return Work()
    tokens = min(fit.refine_tokens, of.tokens("fit"))
    updates, words = max(1, tokens // min(fit.refine_batch, tokens)), min(fit.refine_vocabulary, shape.vocabulary)
    one = Work(single=tokens * lenses * (4 * d * words + 6 * d**2), words=2 * tokens * lenses * words)
    one += Work(single=updates * lenses * 30 * d**3)
    one += read_out(shape, 2 * (shape.layers * of.searched + of.pooled))
    return fit.refine_passes * one


def score_cost(suite: Suite, shape: Shape, of: Counts) -> Cost:
    """Every lens on the held-out tokens: the matrix, its curve, lenses on their own layers, refits."""
    fit, evaluate, n, layers = suite.fit, suite.evaluate, of.tokens("eval"), shape.layers
    whole, block = (layers + 1) ** 2 if evaluate.matrix else 2 * layers + 1, of.chosen**2
    part = estimated_part(suite, shape)
    refined = bool(fit.refine_passes)
    own = layers * (3 + fit.rotated_own + 2 * refined + of.views) + of.chosen + 2 * of.pairs
    work = of.captured(shape, "eval")
    work += part * (read_out(shape, whole * n) + Work(words=whole * n * shape.vocabulary))
    if evaluate.matrix:  # movement is measured from every lens on its own layer
        work += part * softmax_moments(shape, n * (layers + 1 + of.curve * of.chosen))
    work += part * read_out(shape, n * (of.curve * block + own))
    if fit.refits:
        windows, _, scored = of.windows["eval"]
        sample = windows * min(scored, evaluate.refit_positions or scored) * (fit.refits + 1)
        work += part * read_out(shape, sample * (block + of.chosen + layers * (2 + min(of.views, REFITTED_VIEWS))))
        work += part * softmax_moments(shape, sample * of.chosen)
    memory, disk = held(shape, suite, 2 * n)  # movement is measured from as much as the states
    cells = whole + of.curve * block + own + layers
    return Cost(work, memory, disk + 12 * of.windows["eval"][0] * cells)


def precision_cost(suite: Suite, shape: Shape, of: Counts) -> Cost:
    """Words that a lens finds more probable than the model's, of every lens of ``lenses.csv``."""
    fit, n, layers = suite.fit, of.tokens("eval"), shape.layers
    kinds = len(fit.lenses) + ("shared_jacobian" in fit.lenses) * 2
    lenses = layers * (6 + 2 * bool(fit.refine_passes) + kinds)
    memory, disk = held(shape, suite, n)
    return Cost(read_out(shape, n * lenses), memory, disk)


def jacobian_matrix_cost(suite: Suite, shape: Shape, of: Counts) -> Cost:
    """The Jacobian lens of every layer on every layer, with movement."""
    n, layers = of.tokens("eval"), shape.layers
    work = read_out(shape, n * (layers + 1) ** 2) + softmax_moments(shape, n * (layers + 1))
    work += Work(words=(layers + 1) ** 2 * n * shape.vocabulary)
    memory, disk = held(shape, suite, 2 * n)
    return Cost(work, memory, disk)


def estimated_part(suite: Suite, shape: Shape) -> float:
    """What scoring a state takes where only a share of the log-partitions is exact, over what an exact one takes."""
    asked = suite.evaluate.exact_share
    return of_share(shape, AUTO_SHARE if asked == "auto" else asked)


def of_share(shape: Shape, share: float) -> float:
    """What a read-out takes with such a share of exact log-partitions, over what an exact one takes."""
    if share == 1 or not worth_estimating(shape.vocabulary):
        return 1.0
    return share + WORDS_FOR_ALL / shape.vocabulary


def share_cost(suite: Suite, shape: Shape, of: Counts) -> Cost:
    """The share that dev asks for: lenses of the chosen layers on some dev tokens, exactly and by words."""
    if not worth_estimating(shape.vocabulary):
        return Cost(Work(), PROCESS_GIB * GIB)
    each, looked_at = of.pairs // (1 + of.pair_views), min(2, 1 + of.pair_views)  # of rotated views the first
    cells = (of.chosen + 1) ** 2 + 4 * of.chosen + 2 * each * looked_at
    work = read_out(shape, PILOT_TOKENS * cells) + softmax_moments(shape, PILOT_TOKENS * (of.chosen + 1))
    memory, disk = held(shape, suite, of.tokens("dev"))
    return Cost((1 + WORDS_FOR_ALL / shape.vocabulary) * work, memory, disk)


def update_cost(suite: Suite, shape: Shape, of: Counts) -> Cost:
    """The update decomposition with its variants, readable gain and landmarks."""
    settings = suite.update
    assert settings is not None
    n, dev, eval_ = (of.tokens(split) for split in ("fit", "dev", "eval"))
    layers = min(settings.layers, shape.layers)
    work = of.captured(shape, "fit", "dev", "eval")
    work += Work(single=2 * shape.vocabulary * shape.width**2)  # the metric
    one, pairs = decomposed(shape, layers, n, eval_), layers * (layers - 1) / 2
    work += searches(shape, layers * of.searched, RIDGES_FROM_NEAR) + losses_of_gates(shape, layers * dev)
    work += Work(single=dev * shape.width**2 * 24 * layers)  # gates
    work += one + chance(shape, layers, eval_) + news(shape, layers, eval_)
    work += (1 + len(settings.tolerances) + len(settings.metrics)) * one  # in other units, too
    if settings.largest_norm is not None:
        work += one + news(shape, layers, eval_)
    work += settings.refits * (fitted_again(shape, layers, n) + eigendecompositions(shape, layers))
    if settings.readable:
        pairs = min(pairs, layers - 1 + FURTHER_PAIRS)
        words = WORDS if worth_estimating(shape.vocabulary) else shape.vocabulary
        tokens = min(DEV_TOKENS, dev)
        work += Work(
            single=pairs * 6 * tokens * 2 * shape.width * words,
            words=pairs * 3 * READABLE_STEPS * tokens * 3 * words,  # each logit is added up, and read for the slopes
        )
        work += of_share(shape, EXACT_SHARE) * read_out(shape, pairs * 3 * min(HELD_OUT_TOKENS, eval_))
        work += eigendecompositions(shape, 5 * pairs)
    if settings.landmarks:
        some = min(of.chosen, layers)
        of_views = decomposed(shape, some, n, eval_) + chance(shape, some, eval_)
        of_views += searches(shape, some * of.searched, RIDGES_FROM_NEAR) + losses_of_gates(shape, some * dev)
        work += LANDMARKS * of_views + softmax_moments(shape, n + dev + eval_)  # of what the shuffled one says
    memory, disk = held(shape, suite, n + dev + eval_)
    square = layers * shape.width**2
    # Covariances of a layer with all later ones, lenses at two ridges, maps in float32; the rest spills beyond memory_gib.
    spilt = DOUBLE * square * (3 * (FOLDS + 4) + 6 * (len(settings.tolerances) + len(settings.metrics)))
    if spilt < GIB * suite.fit.memory_gib / SHARE:
        return Cost(work, memory + 6 * DOUBLE * square + spilt, disk)
    return Cost(work, memory + 6 * DOUBLE * square, disk + spilt)


def fitted_again(shape: Shape, layers: int, tokens: int) -> Work:
    """Lenses of the folds of some documents with their signals, and products of every pair of layers from moments."""
    pairs = layers * (layers - 1) / 2
    work = moments(shape, 1.4 * tokens, layers + 1) + eigendecompositions(shape, 4)
    return work + products(shape, 24 * layers + 2 * pairs)


def decomposed(shape: Shape, layers: int, tokens: int, held_out: int) -> Work:
    """One decomposition: lenses of folds, products of every pair of layers on held-out tokens."""
    pairs, d = layers * (layers - 1) / 2, shape.width
    work = fitted_again(shape, layers, tokens) + products(shape, 16 * layers) + eigendecompositions(shape, 1)
    return work + Work(single=held_out * d**2 * (24 * layers + 6 * pairs))


def chance(shape: Shape, layers: int, held_out: int) -> Work:
    """The chance of what is carried, from the covariances of every pair of layers."""
    pairs, d = layers * (layers - 1) / 2, shape.width
    return Work(single=7.5 * pairs * d**3, double=2 * held_out * d**2 * pairs)


def losses_of_gates(shape: Shape, rows: float) -> Work:
    """Losses of so many read-outs, estimated where the vocabulary is large."""
    return of_share(shape, USUAL_SHARE) * read_out(shape, rows)


def news(shape: Shape, layers: int, held_out: int) -> Work:
    """Directions that a lens leaves unread, and what later lenses gain there."""
    pairs, d = layers * (layers - 1) / 2, shape.width
    return eigendecompositions(shape, 3 * layers) + Work(single=held_out * d**2 * (12 * layers + 2 * pairs))


def train_cost(suite: Suite, shape: Shape, steps: int) -> Cost:
    """A training: its steps, whose seconds are measured. Operations of a small model take longer than its FLOPs."""
    logits = 2 * FLOAT * suite.training.batch * suite.training.length * shape.vocabulary
    memory = PROCESS_GIB * GIB + 5 * FLOAT * shape.parameters + logits
    return Cost(Work(steps=steps), memory, FLOAT * shape.parameters)


def begin_cost(suite: Suite, shape: Shape, windows: int) -> Cost:
    """What the beginning-of-text token is worth: windows that are read twice."""
    work = 2 * forward(shape, windows, suite.length, suite.length)
    return Cost(work, held(shape, suite, 0)[0])
