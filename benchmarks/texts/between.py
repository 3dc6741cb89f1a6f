"""What lenses of one model read in another: does a lens survive training, and what do two seeds share? For templates."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import pandas as pd
from scipy import stats

from benchmarks.texts.numbers import Number, TextError, markdown
from lensbench.measures.between import AFFINE, NONE, ORTHOGONAL, OWN_HEAD, STATES_HEAD
from lensbench.report.claims import LEVEL, holm, p_text, t_test
from lensbench.results.between import LATER
from lensbench.statistics import mean_over_seeds

TENTH = 0.1
"""Of the null's penalty: a lens that costs less is said to survive"""

HALF, EARLY = 2_560_000, 79_872
"""Training tokens that were declared: half of a training, and the first 1.6 % of it"""

SHARED = 0.5
"""Share of the null's penalty that was declared of two seeds"""

DECLARED = ("gpt-conv", "gpt-looped", "pc")
"""The models of which all of it was declared before the run"""


class Transfers:
    """The light table of ``lensbench transfer-between`` on checkpoints and seeds (``between.csv.xz`` of a folder)."""

    def __init__(self, folder: Path):
        self.path = folder / "between.csv.xz"

    @cached_property
    def table(self) -> pd.DataFrame:
        """Means over layers from 1 on."""
        if not self.path.is_file():
            raise TextError(f"{self.path} is missing")
        table = pd.read_csv(self.path, dtype={"lens_seed": str, "states_seed": str})
        return table[table["states_layer"].astype(str) == LATER]

    @cached_property
    def models(self) -> list[str]:
        """The models at the end of their trainings."""
        return [name for name in dict.fromkeys(self.table["states_model"]) if "@" not in name]

    @cached_property
    def tokens(self) -> list[int]:
        """The training tokens of the checkpoints, without the end."""
        training = self.table[self.table["kind"] == "training"]
        return sorted({*training["lens_tokens"].astype(int)})[:-1]

    @cached_property
    def end(self) -> int:
        """The tokens of a whole training."""
        return int(self.table["lens_tokens"].max())

    def seeds_of(
        self, model: str, tokens: int, through: str, column: str, *, of_end: bool = True, head: str = STATES_HEAD
    ) -> list[float]:
        """A column at each seed: the lens of a checkpoint on the final states (``of_end``), or the final lens on its own."""
        lens, states = (tokens, self.end) if of_end else (self.end, tokens)
        rows = self.table[(self.table["kind"] == "training") & (self.table["head"] == head)]
        rows = rows[(rows["lens_tokens"] == lens) & (rows["states_tokens"] == states) & (rows["map"] == through)]
        rows = rows[rows["lens_model"].str.split("@").str[0].eq(model) & (rows["lens_seed"] != "all")]
        if rows.empty:
            raise TextError(f"{self.path}: no lens of {model} after {lens} tokens on states after {states}")
        return [float(value) for value in rows.sort_values("lens_seed")[column]]

    def shares(self, model: str, tokens: int, *, of_end: bool = True, head: str = STATES_HEAD) -> list[float]:
        """At each seed the penalty without a map through the states' head, as a share of that of a random pairing.

        ``head``: whose head reads the random pairing.
        """
        cost = self.seeds_of(model, tokens, NONE, "penalty", of_end=of_end)
        null = self.seeds_of(model, tokens, ORTHOGONAL, "null_penalty", of_end=of_end, head=head)
        return [one / other for one, other in zip(cost, null, strict=True)]

    def saved(self, model: str, tokens: int, head: str = OWN_HEAD) -> list[float]:
        """At each seed what a rotation saves of the penalty of a checkpoint's lens on the final states, nats/token."""
        plain, turned = (self.seeds_of(model, tokens, through, "penalty", head=head) for through in (NONE, ORTHOGONAL))
        return [one - other for one, other in zip(plain, turned, strict=True)]

    def cost(self, model: str, tokens: int, head: str = STATES_HEAD) -> Number:
        """The penalty of a checkpoint's lens on the final states without a map, over seeds."""
        values = self.seeds_of(model, tokens, NONE, "penalty", head=head)
        return Number(*mean_over_seeds(values), f"penalty of the lens of {model} after {tokens:,} tokens")

    def own(self, model: str) -> Number:
        """KL of the final lenses on the final states, over seeds."""
        return Number(*mean_over_seeds(self.seeds_of(model, HALF, NONE, "own_kl")), f"KL of the lenses of {model}")

    def turned(self, model: str, tokens: int) -> Number:
        """What a rotation saves of the penalty of a checkpoint's lens on the final states, over seeds."""
        return Number(*mean_over_seeds(self.saved(model, tokens)), f"what a rotation saves of {model} after {tokens:,}")

    # Tables
    def over_time(self, values: Callable[[str, int], list[float]]) -> str:
        """A row for each checkpoint, with its share of the training, and a column for each model: a mean over seeds."""
        body = []
        for tokens in self.tokens:
            cells = [str(Number(*mean_over_seeds(values(model, tokens)), model)) for model in self.models]
            body.append([f"{tokens:,}", f"{100 * tokens / self.end:.1f} %", *cells])
        return markdown(["lens from, tokens", "of the training", *(f"`{model}`" for model in self.models)], body)

    def survival_table(self) -> str:
        """Penalty of each checkpoint's lens on the final states without a map, nats/token."""
        return self.over_time(lambda model, tokens: self.seeds_of(model, tokens, NONE, "penalty"))

    def rotation_table(self) -> str:
        """What a rotation saves of the penalty of each checkpoint's lens on the final states, through its own head."""
        return self.over_time(self.saved)

    def first_share(self, model: str, *, of_end: bool, head: str = STATES_HEAD) -> str:
        """From which share of the training on a lens surely costs less than a tenth of the null."""
        since: int | None = None
        for tokens in reversed(self.tokens):
            if not mean_over_seeds(self.shares(model, tokens, of_end=of_end, head=head))[2] < TENTH:
                break
            since = tokens
        return "only at its end" if since is None else f"{100 * since / self.end:.1f} %"

    def survives_table(self) -> str:
        """For each model from when on the final states read its lenses, and its final lens the states, by two nulls."""
        cases = [(of_end, head) for of_end in (True, False) for head in (STATES_HEAD, OWN_HEAD)]
        body = [
            [f"`{model}`", *(self.first_share(model, of_end=of_end, head=head) for of_end, head in cases)]
            for model in self.models
        ]
        heads = ["its lenses on the final states", "the same, null by the lens's head"]
        heads += ["the final lens on its states", "the same, null by the lens's head"]
        return markdown(["model", *heads], body)

    def seeds_table(self) -> str:
        """A row for each model and map: what the lens of one seed reads in another, next to a random pairing."""
        body = []
        for model in self.models:
            for through in (ORTHOGONAL, AFFINE):
                cells = [str(self.of_seeds(model, through, name)) for name in ("penalty", "null_penalty", "shared")]
                body.append([f"`{model}`", through, *cells, str(self.of_seeds(model, through, "same_tokens"))])
        return markdown(["model", "map", "penalty", "of a random pairing", "shared", "same tokens"], body)

    def of_seeds(self, model: str, through: str, column: str) -> Number:
        """A column of the lens of one seed on another seed's states through a map, over all pairs of seeds."""
        rows = self.table[(self.table["kind"] == "seeds") & (self.table["lens_model"] == model)]
        rows = rows[(rows["map"] == through) & (rows["lens_seed"] == "all")]
        if len(rows) != 1:
            raise TextError(f"{self.path} has {len(rows)} means over seeds of {model}, {through}, not one")
        row = rows.iloc[0]
        return Number(
            *(float(row[name]) for name in (column, f"{column}_ci_low", f"{column}_ci_high")), f"{column} of {model}"
        )

    def sizes_table(self) -> str:
        """A row for each two sizes of a family: what the lens of one reads in the other through an affine map."""
        body = []
        for lens, states in self._sizes():
            cells = [
                self._of_sizes(lens, states, name) for name in ("penalty", "null_penalty", "shared", "same_tokens")
            ]
            body.append([f"`{lens}`", f"`{states}`", *(str(cell) for cell in cells)])
        return markdown(["lens of", "states of", "penalty", "of a random pairing", "shared", "same tokens"], body)

    def sizes_claims(self) -> tuple[int, int]:
        """How many of the declared claims on neighbouring sizes hold, after Holm's correction, and how many there are."""
        order = list(dict.fromkeys(name.rpartition("-")[2] for name, _ in self._sizes()))
        near = [
            (lens, states)
            for lens, states in self._sizes()
            if abs(order.index(lens.rpartition("-")[2]) - order.index(states.rpartition("-")[2])) == 1
        ]
        p = holm([t_test(self._sizes_by_seed(*pair, "shared"), SHARED, True) for pair in near])
        return sum(one < LEVEL for one in p), len(near)

    def seeds_of_sizes_table(self) -> str:
        """A row for each model: what a rotation reads of another seed, by size."""
        body = []
        tokens = dict(zip(self.table["lens_model"], self.table["lens_tokens"], strict=True))
        for model in sorted(self.models, key=lambda name: (name.rpartition("-")[0], tokens[name])):
            cells = [
                self.of_seeds(model, ORTHOGONAL, name) for name in ("penalty", "null_penalty", "shared", "same_tokens")
            ]
            body.append([f"`{model}`", *(str(cell) for cell in cells)])
        return markdown(["model", "penalty", "of a random pairing", "shared", "same tokens"], body)

    def _sizes(self) -> list[tuple[str, str]]:
        rows = self.table[self.table["kind"] == "sizes"]
        return list(dict.fromkeys(zip(rows["lens_model"], rows["states_model"], strict=True)))

    def _sizes_by_seed(self, lens: str, states: str, column: str) -> list[float]:
        rows = self.table[(self.table["kind"] == "sizes") & (self.table["lens_seed"] != "all")]
        rows = rows[(rows["lens_model"] == lens) & (rows["states_model"] == states)]
        return [float(value) for value in rows.sort_values("lens_seed")[column]]

    def _of_sizes(self, lens: str, states: str, column: str) -> Number:
        return Number(*mean_over_seeds(self._sizes_by_seed(lens, states, column)), f"{column} of {lens} on {states}")

    def claims_table(self) -> str:
        """What was declared before the run, each with its value, p corrected over all of it, and outcome."""
        rows: list[tuple[str, Number, float]] = []
        for model in DECLARED:
            for words, values, bound, above in (
                (f"lens of half the training costs less than {TENTH:g} of the null", self.shares(model, HALF), TENTH, False),
                (f"lens of 1.6 % of it costs more than {TENTH:g} of the null", self.shares(model, EARLY), TENTH, True),
                ("a rotation lowers the penalty of the latter", self.saved(model, EARLY, STATES_HEAD), 0.0, True),
            ):  # fmt: skip
                number = Number(*mean_over_seeds(values), words)
                rows.append((f"{model}: {words}", number, t_test(values, bound, above)))
            for through, above in ((ORTHOGONAL, False), (AFFINE, True)):
                words = f"two seeds share {'more' if above else 'less'} than {SHARED:g} of the null, {through}"
                shared = self.of_seeds(model, through, "shared")
                rows.append((f"{model}: {words}", shared, self._p_of_seeds(shared, above)))
        body = []
        for (words, number, _), p in zip(rows, holm([p for _, _, p in rows]), strict=True):
            body.append([words, str(number), p_text(p), "holds" if p < LEVEL else "does not hold"])
        return markdown(["claim", "value", "p (Holm)", "outcome"], body)

    def _p_of_seeds(self, shared: Number, above: bool) -> float:
        """One-sided p of a jackknife over seeds: its interval is of Student's t."""
        if shared.low is None or shared.high is None:
            raise TextError(f"{shared.what} has no interval")
        seeds = self.table.loc[self.table["kind"] == "seeds", "lens_seed"].nunique() - 1  # and `all`
        half = (shared.high - shared.low) / 2
        return one_sided(shared.value - SHARED if above else SHARED - shared.value, half, seeds)


def one_sided(distance: float, half: float, seeds: int) -> float:
    """One-sided p of a distance from a bound, of Student's t whose 95 % interval reaches ``half``."""
    return float(stats.t.sf(stats.t.ppf(0.975, seeds - 1) * distance / half, seeds - 1))
