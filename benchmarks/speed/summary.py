"""Tables and figures from the measured parts of the fitting benchmark; reads CSV only."""

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.speed.task import Ledger, write_description
from lensbench.errors import LensbenchError
from lensbench.results import write_atomically

LARGEST_SHARE = {"closed": 1 / 200, "refined": 1 / 100}
"""The shares of the recipe's seconds that each stage is held against."""
COLOURS = {"recipe": "#666666", "closed": "#0072b2", "refined": "#d55e00"}


def ratios(recipe: pd.DataFrame, ours: pd.DataFrame) -> pd.DataFrame:
    """For each lens and stage: what ours reaches within its share of the recipe's seconds, and its time to equal KL.

    Seconds are of all lenses fitted together, on both sides: one forward pass serves them all.
    """
    last = recipe["step"].max()
    ends = recipe[recipe["step"] == last].astype({"lens": str}).set_index("lens")
    seconds = float(ends["model_seconds"].iloc[0] + ends["lens_seconds"].sum())
    rows = []
    for lens, end in ends.iterrows():
        for stage, share in LARGEST_SHARE.items():
            mine = ours[(ours["lens"].astype(str) == lens) & (ours["stage"] == stage)].sort_values("seconds")
            within = mine[mine["seconds"] <= share * seconds]
            equal = mine[mine["eval_kl"] <= end["eval_kl"]]
            row = {
                "lens": lens, "stage": stage, "recipe": f"{end['optimizer']} x{end['lr_scale']:g}",
                "recipe_tokens": int(end["tokens"]), "recipe_seconds": seconds, "recipe_kl": end["eval_kl"],
                "share_allowed": share,
            }  # fmt: skip
            if len(within):
                best = within.loc[within["eval_kl"].idxmin()]
                row |= {"tokens": int(best["budget"]), "seconds": best["seconds"], "kl": best["eval_kl"],
                        "share": best["seconds"] / seconds, "lower": bool(best["eval_kl"] < end["eval_kl"])}  # fmt: skip
            if len(equal):
                row |= {"tokens_to_equal": int(equal["budget"].iloc[0]), "seconds_to_equal": equal["seconds"].iloc[0],
                        "times_faster_to_equal": seconds / equal["seconds"].iloc[0]}  # fmt: skip
            rows.append(row)
    return pd.DataFrame(rows)


def curves(recipe: pd.DataFrame, ours: pd.DataFrame) -> pd.DataFrame:
    """One tidy frame of both sides: lens, side, tokens, seconds (of all lenses together), held-out KL."""
    total = recipe.groupby("step")["lens_seconds"].transform("sum") + recipe["model_seconds"]
    theirs = pd.DataFrame({"lens": recipe["lens"].astype(str), "side": "recipe", "tokens": recipe["tokens"],
                           "seconds": total, "kl": recipe["eval_kl"]})  # fmt: skip
    mine = pd.DataFrame({"lens": ours["lens"].astype(str), "side": ours["stage"], "tokens": ours["budget"],
                         "seconds": ours["seconds"], "kl": ours["eval_kl"]})  # fmt: skip
    return pd.concat([theirs[theirs["tokens"] > 0], mine], ignore_index=True)


def draw(frame: pd.DataFrame, along: str, label: str) -> Figure:
    """Held-out KL along tokens or seconds, a panel for each lens."""
    with sns.axes_style("whitegrid"), sns.plotting_context("paper"):
        grid = sns.relplot(
            frame, x=along, y="kl", hue="side", style="side", col="lens", kind="line", markers=True, dashes=False,
            palette=COLOURS, hue_order=list(COLOURS), style_order=list(COLOURS), height=2.6, aspect=0.95,
            facet_kws={"sharey": False}, errorbar=None, estimator=None,
        )  # fmt: skip
        grid.set(xscale="log")
        grid.set_axis_labels(label, "held-out KL, nats/token")
        grid.set_titles("lens {col_name}")
        sns.move_legend(grid, "upper right", bbox_to_anchor=(0.99, 0.98), title=None, frameon=True)
    return grid.figure


def write(folder: Path, say: Callable[[str], None]) -> None:
    """``fitting.csv``, the figures, and a printed table; raises :class:`LensbenchError` where a part is missing."""
    recipe, ours = Ledger(folder / "recipe.csv", ()).rows(), Ledger(folder / "ours.csv", ()).rows()
    for name, table in (("recipe", recipe), ("ours", ours)):
        if not len(table):
            raise LensbenchError(f"{folder} has no {name}.csv: run the part {name} first")
    found = ratios(recipe, ours)
    write_atomically(folder / "fitting.csv", lambda p: found.to_csv(p, index=False, float_format="%.6g"))
    frame = curves(recipe, ours)
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
    table = Table(title="The published recipe's end against ours within its share of the seconds")
    for column in ("lens", "stage", "recipe KL", "recipe s", "our KL", "our s", "share", "equal KL: times faster"):
        table.add_column(column, justify="right")
    for row in found.to_dict("records"):
        known = pd.notna(row.get("kl"))
        table.add_row(
            str(row["lens"]), str(row["stage"]), f"{row['recipe_kl']:.3f}", f"{row['recipe_seconds']:.0f}",
            f"{row['kl']:.3f}" if known else "-", f"{row['seconds']:.1f}" if known else "-",
            f"1/{1 / row['share']:.0f}" if known else "-",
            f"{row['times_faster_to_equal']:.0f}" if pd.notna(row.get("times_faster_to_equal")) else "not reached",
        )  # fmt: skip
    Console().print(table)
    say(f"tables and figures: {folder}")
