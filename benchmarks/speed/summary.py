"""Tables and figures from the measured parts of the fitting benchmark; reads CSV only."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.speed.task import Ledger, console, paired_difference, write_description
from lensbench.errors import LensbenchError
from lensbench.runtime.files import write_atomically

LARGEST_SHARE = {"closed": 1 / 200, "refined": 1 / 100}
"""The shares of the recipe's seconds that each stage is held against."""
READ_THERE = (
    "tokens", "seconds", "kl", "times_faster", "times_fewer_flops", "less_recipe", "less_recipe_ci_low",
    "less_recipe_ci_high",
)  # fmt: skip
"""Of a budget that was chosen."""
COLUMNS = ("lens", "stage", "recipe", "in its share", "faster", "first at equal KL", "faster")
"""Of the printed table; differences are ours less the recipe's."""
COLOURS = {"recipe": "#666666", "closed": "#0072b2", "refined": "#d55e00"}


AGAIN = "again/recipe.csv"
"""Where some steps of the recipe are that were timed again, beside a later measurement of ours"""


def timed_again(recipe: pd.DataFrame, again: pd.DataFrame) -> pd.DataFrame:
    """``recipe.csv`` with the seconds of a step as they were when some steps were timed again; KL stays what it was."""
    last = again[again["step"] == again["step"].max()].astype({"lens": str}).set_index("lens")
    steps = float(last["step"].iloc[0])
    each = recipe["lens"].astype(str).map(last["lens_seconds"])
    return recipe.assign(
        model_seconds=recipe["step"] * float(last["model_seconds"].iloc[0]) / steps,
        lens_seconds=recipe["step"] * each / steps,
    )


def ratios(recipe: pd.DataFrame, ours: pd.DataFrame, ends: pd.DataFrame, documents: pd.DataFrame) -> pd.DataFrame:
    """For each lens and stage: what ours reaches within its share of the recipe's seconds, and its time to equal KL.

    Budgets: within the share, that of the lowest dev KL; for equal KL, the first at the recipe's or below on dev and on
    eval, both. Read there: eval, with the interval of the difference (paired bootstrap over documents, lenses fixed).
    Seconds are of all lenses fitted together, on both sides: one forward pass serves them all.
    """
    last_step = recipe["step"].max()
    last = recipe[recipe["step"] == last_step].astype({"lens": str}).set_index("lens")
    ends = ends[ends["step"] == str(last_step)]
    seconds = float(last["model_seconds"].iloc[0] + last["lens_seconds"].sum())
    gflop = float(last["model_gflop"].iloc[0] + last["lens_gflop"].sum())
    rows = []
    for lens, end in last.iterrows():
        for stage, share in LARGEST_SHARE.items():
            mine = budgets_of(ours, lens, stage)
            row = {
                "lens": lens, "stage": stage, "recipe": f"{end['optimizer']} x{end['lr_scale']:g}",
                "recipe_tokens": int(end["tokens"]), "recipe_seconds": seconds, "recipe_kl": end["eval_kl"],
                "share_allowed": share,
            }  # fmt: skip
            within = mine[mine["seconds"] <= share * seconds]
            equal = mine[(mine["dev_kl"] <= end["dev_kl"]) & (mine["eval_kl"] <= end["eval_kl"])]
            for prefix, found in (("within", within.nsmallest(1, "dev_kl")), ("equal", equal.head(1))):
                row |= {f"{prefix}_{name}": float("nan") for name in READ_THERE}
                for at in found.to_dict("records"):
                    of = (documents["lens"] == lens) & (documents["stage"] == stage)
                    budget = documents[of & (documents["budget"] == str(int(at["budget"])))]
                    difference = paired_difference(budget, ends[ends["lens"] == lens])
                    values = (at["budget"], at["seconds"], at["eval_kl"], seconds / at["seconds"], gflop / at["gflop"])
                    row |= {f"{prefix}_{name}": v for name, v in zip(READ_THERE, (*values, *difference), strict=True)}
            rows.append(row)
    return pd.DataFrame(rows)


def budgets_of(ours: pd.DataFrame, lens: object, stage: str) -> pd.DataFrame:
    """Rows of one lens and stage, budgets rising."""
    return ours[(ours["lens"].astype(str) == lens) & (ours["stage"] == stage)].sort_values("budget")


def at_equal_tokens(sweep: pd.DataFrame, ours: pd.DataFrame) -> pd.DataFrame:
    """Dev KL of the recipe's best trial, its schedule run to its end, beside ours from the next budget above its tokens.

    What the learning curve does not show: its points of the recipe lie midway on the schedule of a longer run.
    """
    trials = sweep[sweep["dev_kl"].notna()].astype({"lens": str})
    rows = []
    for lens, tried in trials.groupby("lens", sort=False):
        best = tried.loc[tried["dev_kl"].idxmin()]
        row = {"lens": lens, "recipe": f"{best['optimizer']} x{best['lr_scale']:g}", "recipe_tokens": int(best["tokens"]),
               "recipe_dev_kl": best["dev_kl"]}  # fmt: skip
        for stage in LARGEST_SHARE:
            mine = budgets_of(ours, lens, stage)
            for at in mine[mine["budget"] >= best["tokens"]].head(1).to_dict("records"):
                row |= {"tokens": int(at["budget"]), f"{stage}_dev_kl": at["dev_kl"]}
        rows.append(row)
    return pd.DataFrame(rows)


def curves(recipe: pd.DataFrame, ours: pd.DataFrame, ends: pd.DataFrame, documents: pd.DataFrame) -> pd.DataFrame:
    """One tidy frame of both sides: lens, side, tokens, seconds (of all lenses together), held-out KL, its interval."""
    total = recipe.groupby("step")["lens_seconds"].transform("sum") + recipe["model_seconds"]
    theirs = pd.DataFrame({"lens": recipe["lens"].astype(str), "side": "recipe", "tokens": recipe["tokens"],
                           "seconds": total, "kl": recipe["eval_kl"], "key": recipe["step"].astype(str)})  # fmt: skip
    mine = pd.DataFrame({"lens": ours["lens"].astype(str), "side": ours["stage"], "tokens": ours["budget"],
                         "seconds": ours["seconds"], "kl": ours["eval_kl"], "key": ours["budget"].astype(str)})  # fmt: skip
    of_all = pd.concat([ends.assign(side="recipe", key=ends["step"]),
                        documents.assign(side=documents["stage"], key=documents["budget"])])  # fmt: skip
    intervals = [
        dict(zip(("lens", "side", "key"), name, strict=True), low=low, high=high)
        for name, sums in of_all.groupby(["lens", "side", "key"])
        for _, low, high in [paired_difference(sums, sums.assign(kl=0.0))]
    ]
    frame = pd.concat([theirs[theirs["tokens"] > 0], mine], ignore_index=True)
    return frame.merge(pd.DataFrame(intervals), how="left", on=["lens", "side", "key"], validate="one_to_one")


def with_interval(row: dict[str, Any], name: str) -> str:
    """A difference with its sign and its interval, as tables print it."""
    return f"{row[name]:+.3f} [{row[name + '_ci_low']:+.3f}, {row[name + '_ci_high']:+.3f}]"


def print_ratios(found: pd.DataFrame, console: Console) -> None:
    """``fitting.csv`` in short; differences are ours less the recipe's, on eval."""
    table = Table(
        title=f"The recipe's end, {found['recipe_seconds'].iloc[0]:.0f} s, against ours, nats/token", box=None
    )
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for row in found.to_dict("records"):
        cells = [str(row["lens"]), str(row["stage"]), f"{row['recipe_kl']:.3f}"]
        if pd.notna(row.get("within_kl")):
            cells += [with_interval(row, "within_less_recipe"), f"{row['within_times_faster']:.0f}x"]
        else:
            cells += ["-", "-"]
        if pd.notna(row.get("equal_kl")):
            cells += [with_interval(row, "equal_less_recipe"), f"{row['equal_times_faster']:.1f}x"]
        else:
            cells += ["not reached", "-"]
        table.add_row(*cells)
    console.print(table)


def draw(frame: pd.DataFrame, along: str, label: str) -> Figure:
    """Held-out KL along tokens or seconds, a panel for each lens, with 95 % intervals over documents."""
    with sns.axes_style("whitegrid"), sns.plotting_context("paper"):
        grid = sns.relplot(
            frame, x=along, y="kl", hue="side", style="side", col="lens", kind="line", markers=True, dashes=False,
            palette=COLOURS, hue_order=list(COLOURS), style_order=list(COLOURS), height=2.6, aspect=0.95,
            facet_kws={"sharey": False}, errorbar=None, estimator=None,
        )  # fmt: skip
        for lens, axis in grid.axes_dict.items():
            # Early checkpoints of the recipe, midway on its schedule, would flatten everything else.
            ours = frame[(frame["lens"] == lens) & (frame["side"] != "recipe")]["kl"]
            axis.set_ylim(0, 1.15 * ours.max())
            for side, rows in frame[frame["lens"] == lens].dropna(subset="low").groupby("side"):
                axis.errorbar(rows[along], rows["kl"], (rows["kl"] - rows["low"], rows["high"] - rows["kl"]), fmt="none",
                              ecolor=COLOURS[str(side)], elinewidth=0.8)  # fmt: skip
        grid.set(xscale="log")
        grid.set_axis_labels(label, "held-out KL, nats/token")
        grid.set_titles("lens {col_name}")
        sns.move_legend(grid, "upper right", bbox_to_anchor=(0.99, 0.98), title=None, frameon=True)
    return grid.figure


def write(folder: Path, say: Callable[[str], None]) -> None:
    """``fitting.csv``, the figures, and a printed table; raises :class:`LensbenchError` where a part is missing."""
    sweep, recipe, ours = (Ledger(folder / f"{name}.csv", ()).rows() for name in ("sweep", "recipe", "ours"))
    if not len(sweep):
        raise LensbenchError(f"{folder} lacks sweep.csv: run the part sweep first")
    for name, table in (("recipe", recipe), ("ours", ours)):
        if not len(table) or not (folder / f"{name}-documents.parquet").exists():
            raise LensbenchError(f"{folder} lacks {name}.csv or {name}-documents.parquet: run the part {name} first")
    if (folder / AGAIN).is_file():
        recipe = timed_again(recipe, Ledger(folder / AGAIN, ()).rows())
    ends, documents = (pd.read_parquet(folder / f"{name}-documents.parquet") for name in ("recipe", "ours"))
    found = ratios(recipe, ours, ends, documents)
    write_atomically(folder / "fitting.csv", lambda p: found.to_csv(p, index=False, float_format="%.6g"))
    equal = at_equal_tokens(sweep, ours)
    write_atomically(folder / "fitting-equal-tokens.csv", lambda p: equal.to_csv(p, index=False, float_format="%.6g"))
    frame = curves(recipe, ours, ends, documents)
    for name, along, label in (
        ("kl-by-seconds", "seconds", "seconds, all lenses together"),
        ("kl-by-tokens", "tokens", "tokens"),
    ):
        figure = draw(frame, along, label)
        write_atomically(
            folder / f"{name}.png",
            lambda p, figure=figure: figure.savefig(p, dpi=150, format="png", metadata={"Software": None}),
        )
        plt.close(figure)
    write_description(folder, "fitting", {"share_allowed": LARGEST_SHARE})
    print_ratios(found, console)
    say(f"tables and figures: {folder}")
