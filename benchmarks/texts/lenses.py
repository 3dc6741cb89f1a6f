"""What lenses read, in words and tables: which lens is behind which, and what probes say through each."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd

from benchmarks.texts.numbers import Number, TextError, UndefinedNumber, markdown
from benchmarks.texts.tables import ABSENT, Results

Lens = tuple[str, str]
"""Kind and stage of a lens, as ``lenses.csv`` has them"""

LENSES: dict[Lens, str] = {
    ("logit", "none"): "logit",
    ("jacobian", "backward"): "Jacobian",
    ("jacobian_local", "backward"): "Jacobian, own position",
    ("tuned", "closed"): "tuned, ridge",
    ("tuned", "refined"): "tuned, refined",
    ("shared", "closed"): "shared, ridge",
    ("shared", "refined"): "shared, refined",
    ("shared_jacobian", "backward"): "shared Jacobian",
}
"""Lens -> its name in tables"""

ROTATED = "+rotated"
"""What the model's name ends in, in rows of the random-basis null"""

READERS = {"tuned": "a lens per layer", "shared": "one shared lens", "jacobian": "Jacobian lenses",
           "shared_jacobian": "one shared Jacobian lens"}  # fmt: skip
"""Kind through which ``guess_and_refine`` reads -> its name in tables"""

SHORTCUTS = {"tuned": "a lens per layer", "shared": "one shared lens", "single": "best lens of one layer",
             "jacobian": "Jacobian lenses", "shared_jacobian": "one shared Jacobian lens"}  # fmt: skip
"""Maps that ``lens_rank`` cuts -> their name in tables"""

EXITS = {kind: READERS.get(kind, "logit lens") for kind in ("logit", *READERS)}
"""Kind through which ``early_exit`` reads -> its name in tables"""

ROWS = 7
"""Layers of a table at most"""


def by_reader(
    models: Sequence[str], readers: Mapping[str, str], cells_of: Callable[[str, str], list[str]]
) -> list[list[str]]:
    """A row of each model and reader of ``readers`` (kind -> name), without those of which nothing is known."""
    rows = []
    for model in models:
        for kind, name in readers.items():
            cells = cells_of(model, kind)
            if set(cells) != {ABSENT}:
                rows.append([f"`{model}`", name, *cells])
    return rows


class LensResults(Results):
    """Run folders of the suites of lenses."""

    @property
    def models(self) -> list[str]:
        """The models, in the order of the suite."""
        return list(dict.fromkeys(self.table("models.csv")["model"]))

    def depth(self, model: str) -> int:
        """How many layers a model has."""
        return int(self.fact(model, "layers"))

    def some_layers(self, model: str) -> list[int]:
        """At most :data:`ROWS` of a model's layers 0..L-1, evenly spread."""
        depth = self.depth(model)
        count = min(ROWS, depth)
        return sorted({round(k * (depth - 1) / max(1, count - 1)) for k in range(count)})

    def knows(self, column: str) -> bool:
        """Whether ``lenses.csv`` has a column that a suite must ask for."""
        return bool(self.table("lenses.csv")[column].notna().any())

    def knows_probe(self, name: str) -> bool:
        """Whether some model has a value of a probe."""
        rows = self.table("probes.csv")
        return bool(((rows["probe"] == name) & rows["value"].notna()).any())

    def _has(self, model: str, lens: Lens) -> bool:
        rows = self.table("lenses.csv")
        return bool(((rows["model"] == model) & (rows["lens"] == lens[0]) & (rows["stage"] == lens[1])).any())

    def lens_number(self, model: str, lens: Lens, layer: int, column: str = "kl") -> Number:
        """A column of ``lenses.csv`` with its interval."""
        return self.cell("lenses.csv", model, column, lens=lens[0], stage=lens[1], layer=layer)

    def by_layer(self, model: str, column: str = "kl") -> str:
        """A table of every lens at some layers of a model, with the random-basis null of one Jacobian lens."""
        lenses = [lens for lens in LENSES if self._has(model, lens)]
        null = ("shared_jacobian", "backward")
        with_null = self._has(model + ROTATED, null) and column == "kl"
        heads = ["layer", *(LENSES[lens] for lens in lenses), *(["the same, random bases"] if with_null else [])]
        rows = []
        for layer in self.some_layers(model):
            cells = [str(self.lens_number(model, lens, layer, column)) for lens in lenses]
            cells += [str(self.lens_number(model + ROTATED, null, layer, column))] if with_null else []
            rows.append([str(layer), *cells])
        return markdown(heads, rows)

    def behind(self, model: str, lens: Lens, against: Lens, *, null: bool = False) -> list[int]:
        """The layers at which a KL lies above another lens's, intervals apart; ``null``: the other in random bases."""
        other = model + (ROTATED if null else "")
        found = []
        for layer in range(self.depth(model)):
            one, two = self.lens_number(model, lens, layer), self.lens_number(other, against, layer)
            if one.value > two.value and one.apart_from(two):
                found.append(layer)
        return found

    def ahead(self, model: str, lens: Lens, against: Lens, *, null: bool = False) -> list[int]:
        """The layers at which its KL lies below the other's with intervals apart."""
        other = model + (ROTATED if null else "")
        found = []
        for layer in range(self.depth(model)):
            one, two = self.lens_number(model, lens, layer), self.lens_number(other, against, layer)
            if one.value < two.value and one.apart_from(two):
                found.append(layer)
        return found

    def compared(self) -> str:
        """For every model, where its Jacobian lenses are behind or ahead of others."""
        jacobian, shared, logit = ("jacobian", "backward"), ("shared_jacobian", "backward"), ("logit", "none")
        rows = []
        for model in self.models:
            rows.append([
                f"`{model}`",
                in_words(self.behind(model, jacobian, logit), self.depth(model)),
                in_words(self.ahead(model, jacobian, logit), self.depth(model)),
                in_words(self.behind(model, jacobian, ("tuned", "closed")), self.depth(model)),
                in_words(self.ahead(model, shared, shared, null=True), self.depth(model)),
                in_words(self.behind(model, shared, jacobian), self.depth(model)),
            ])  # fmt: skip
        heads = ["model", "Jacobian behind logit", "Jacobian ahead of logit", "Jacobian behind tuned (ridge)"]
        heads += ["one J ahead of one J in random bases", "one J behind a J per layer"]
        return markdown(heads, rows)

    def everywhere(self, *, ahead: bool, lens: Lens, against: Lens, null: bool = False) -> list[str]:
        """The models in which a lens is ahead (or behind) at every layer."""
        side = self.ahead if ahead else self.behind
        return [m for m in self.models if len(side(m, lens, against, null=null)) == self.depth(m)]

    def probed(self, model: str, quantity: str, layer: int | None = None, other: int | None = None) -> str:
        """What a probe measured, a dash where nobody asked, or that it is undefined."""
        try:
            return str(self.probe(model, quantity, layer, other))
        except UndefinedNumber:
            return "undefined"
        except TextError:
            return ABSENT

    def guesses(self, models: Sequence[str]) -> str:
        """``guess_and_refine`` of models through every reader, one row each."""

        def cells(model: str, kind: str) -> list[str]:
            found = [self.probed(model, f"{quantity}_{kind}") for quantity in GUESSES]
            found.append(self.probed(model, f"guess_kept_{kind}"))
            return [*found, self.probed(model, f"settled_{kind}", self.depth(model) // 2)]

        heads = [
            "model",
            "through",
            "frequent guesses beyond the model's",
            "early ones revised",
            "the same beyond chance",
        ]
        return markdown([*heads, "excess kept", "settled at half depth"], by_reader(models, READERS, cells))

    def ranks(self, model: str) -> list[int]:
        """The ranks 0, 1, 4, 16, ... of a model's sweep of lenses, and the whole width."""
        rows = self.rows("probes.csv", model=model, quantity="rank_kl_tuned")
        swept = sorted(int(rank) for rank in rows["other"])
        return [swept[0], *swept[1:-1:2], swept[-1]]

    def shortcuts(self, model: str, score: str) -> str:
        """A table of ``kl`` or ``top10`` of every kind of map at some ranks, and what one map for all layers loses."""
        heads = ["rank", *SHORTCUTS.values()]
        rows = [
            [str(rank), *(self.probed(model, f"rank_{score}_{kind}", other=rank) for kind in SHORTCUTS)]
            for rank in self.ranks(model)
        ]
        return markdown(heads, rows)

    def rank_needed(self, model: str, kind: str, share: float) -> int:
        """The least rank at which a kind of map has this share of the top-10 precision that it has uncut."""
        rows = self.rows("probes.csv", model=model, quantity=f"rank_top10_{kind}").sort_values("other")
        enough = rows[rows["value"] >= share * rows["value"].iloc[-1]]
        return int(enough["other"].iloc[0])

    def first_exit(self, model: str, lens: Lens, share: float) -> int | None:
        """The first layer from which a lens's top-1 is the model's this often, at it and all later ones; None: at none."""
        top1 = [self.lens_number(model, lens, layer, "top1").value for layer in range(self.depth(model))]
        below = [layer for layer, value in enumerate(top1) if value < share]
        first = max(below, default=-1) + 1
        return first if first < len(top1) else None

    def exits(self, models: Sequence[str], target: int) -> str:
        """``early_exit`` of models through every lens, one row each, at a target in percent."""

        def cells(model: str, kind: str) -> list[str]:
            of = (f"saved_{kind}", f"kept_{kind}", f"saved_{kind}_blind", f"saved_{kind}_minus_logit")
            return [self.probed(model, f"exit_{what}", other=target) for what in of]

        heads = [
            "model",
            "through",
            "blocks saved",
            "top-1 kept",
            "blocks saved, blind",
            "blocks saved beyond the logit lens",
        ]
        return markdown(heads, by_reader(models, EXITS, cells))

    def of_models(self, models: Sequence[str], quantities: Mapping[str, str]) -> str:
        """A table of some quantities of whole models, by the name of the quantity; models that have none are left out."""
        rows = [[f"`{model}`", *(self.probed(model, quantity) for quantity in quantities)] for model in models]
        return markdown(["model", *quantities.values()], [row for row in rows if set(row[1:]) != {ABSENT}])

    def used(self, model: str) -> str:
        """What a layer holds against what it does, and how sure the Jacobians are, at some layers."""
        heads = [
            "layer",
            "distance",
            "slope",
            "noise of J",
            "relative error of J",
            "J of other sources",
            "less other windows",
        ]
        rows = []
        for layer in self.some_layers(model):
            names = ("distance", "slope", "noise")
            cells = [self.probed(model, f"decodable_used_{name}", layer) for name in names]
            halves = [self.probed(model, f"jacobian_halves_{n}", layer) for n in ("sources", "sources_minus_windows")]
            rows.append([str(layer), *cells, self.error(model, layer), *halves])
        return markdown(heads, rows)

    def error(self, model: str, layer: int, kind: str = "jacobian") -> str:
        """The relative standard error of a Jacobian lens."""
        error = self.rows("lenses.csv", model=model, lens=kind, layer=layer)["jacobian_error"].iloc[0]
        if pd.isna(error):
            return "one prompt: unknown"
        return f"{error:.2g}" if np.isfinite(error) else "all noise"

    def undecided(self, model: str, most: float, kind: str = "jacobian") -> list[int]:
        """The layers at which the relative standard error of a Jacobian lens is larger than ``most``, or unknown."""
        rows = self.rows("lenses.csv", model=model, lens=kind)
        return sorted(int(k) for k in rows.loc[~(rows["jacobian_error"] <= most), "layer"])

    def explained(self, model: str, which: str = "explained_by_distance") -> str:
        """What the distance of layers explains of a matrix; a dash where the suite does not ask, or it is undefined."""
        rows = self.table("indices.csv")
        found = rows[(rows["model"] == model) & (rows["index"] == which)]
        return ABSENT if found.empty or found["value"].isna().all() else str(self.index(model, which))


GUESSES = ("guess", "early_revised", "early_revised_beyond_chance")
"""Quantities of ``guess_and_refine`` of a whole model, less the kind at their end"""


def in_words(layers: Sequence[int], depth: int) -> str:
    """Some of the layers 0..L-1: ``all``, ``none``, ``1 to 4``, ``0, 2``."""
    if not layers:
        return "none"
    if len(layers) == depth:
        return "all"
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{r[0]} to {r[-1]}" if len(r) > 2 else ", ".join(map(str, r)) for r in runs)


def named(models: Sequence[str]) -> str:
    """Models as a sentence lists them."""
    quoted = [f"`{model}`" for model in models]
    return "no model" if not quoted else quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"
