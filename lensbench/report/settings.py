"""An index of the update decomposition at other settings, and where its uncertainty comes from: appendix tables of runs."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from rich.table import Column, Table

from lensbench.errors import LensbenchError, nearest
from lensbench.measures.update.variants import DOCUMENTS_ALONE
from lensbench.report.formatting import number, with_interval
from lensbench.results.folder import Run
from lensbench.statistics import mean_over_seeds

REPORTED = "reported"

NORMAL = 1.96
"""Half-widths of 95 % intervals over standard deviations, of a normal distribution"""

SETTINGS_COLUMNS = (
    "model", "seeds", "index", "setting", "at", "value", "ci_low", "ci_high", "difference", "difference_ci_low",
    "difference_ci_high",
)  # fmt: skip

DOUBT_COLUMNS = ("model", "seeds", "index", "value", "between_seeds", "documents", "refits")


def settings_frame(runs: Sequence[Run], index: str) -> pd.DataFrame:
    """The index of every model at the reported setting and at all others: columns :data:`SETTINGS_COLUMNS`.

    Of several seeds values and differences are means over seeds, with Student-t intervals; of one, intervals are over
    documents. Seeds at which the index is undefined are left out and not counted.

    Raises :class:`LensbenchError` where no run has the index at another setting.
    """
    rows: list[dict[str, Any]] = []
    for run in runs:
        variants = _of_index(run.tables["variants.csv"], index)
        for model, of_model in variants.groupby("model", sort=False):
            rows.append(_named(model, index, REPORTED, "", _reported(run, str(model), index), ("value",)))
            shown = of_model[of_model["setting"] != DOCUMENTS_ALONE]
            for (setting, at), of_setting in shown.groupby(["setting", "at"], sort=False):
                rows.append(_named(model, index, setting, at, of_setting, ("value", "difference")))
    if not rows:
        names = sorted({str(name) for run in runs for name in run.tables["variants.csv"]["index"]})
        if not names:
            raise LensbenchError(f"no run has {index} at other settings: these runs have no variants.csv with rows")
        known = any((run.tables["indices.csv"]["index"] == index).any() for run in runs)
        # An index that is measured at one setting alone is not misspelt: no other name is meant.
        hint = f"there are {', '.join(names)}" if known else nearest(index, names)
        raise LensbenchError(f"no run has {index} at other settings; {hint}")
    return pd.DataFrame(rows, columns=list(SETTINGS_COLUMNS))


def doubt_frame(runs: Sequence[Run], index: str) -> pd.DataFrame:
    """Standard deviations of the index between seeds, over documents, and by lens refits: columns :data:`DOUBT_COLUMNS`.

    Those within a seed are half-widths of 95 % intervals over 1.96, root-mean-squares over seeds; that of refits is what
    the reported interval has beyond that of documents alone.
    """
    rows = []
    for run in runs:
        variants = _of_index(run.tables["variants.csv"], index)
        alone = variants[variants["setting"] == DOCUMENTS_ALONE].set_index(["model", "seed"])
        for model in dict.fromkeys(variants["model"]):
            of_model = _reported(run, str(model), index).dropna(subset=["value"])
            if of_model.empty:
                continue
            whole, documents = [], []
            for row in of_model.to_dict("records"):
                key = (row["model"], int(row["seed"]))
                if key in alone.index:
                    whole.append(_variance(row))
                    documents.append(_variance(alone.loc[key]))
            values, within = of_model["value"], float(np.mean(documents)) if documents else np.nan
            rows.append(
                {
                    "model": model, "seeds": len(values), "index": index, "value": values.mean(),
                    "between_seeds": values.std(ddof=1) if len(values) > 1 else np.nan, "documents": within**0.5,
                    "refits": max(0.0, float(np.mean(whole)) - within) ** 0.5 if documents else np.nan,
                }
            )  # fmt: skip
    return pd.DataFrame(rows, columns=list(DOUBT_COLUMNS))


def _of_index(table: pd.DataFrame, index: str) -> pd.DataFrame:
    rows = table[table["index"] == index]
    return rows.assign(seed=rows["seed"].astype(int))


def _reported(run: Run, model: str, index: str) -> pd.DataFrame:
    rows = run.tables["indices.csv"]
    return rows[(rows["model"] == model) & (rows["index"] == index) & (rows["seed"] != "all")]


def _variance(row: Any) -> float:
    return float(((row["ci_high"] - row["ci_low"]) / 2 / NORMAL) ** 2)


def _named(model: Any, index: str, setting: Any, at: Any, rows: pd.DataFrame, columns: Sequence[str]) -> dict[str, Any]:
    """One row of :data:`SETTINGS_COLUMNS` from the rows of a model's seeds."""
    known = rows.dropna(subset=["value"])
    found: dict[str, Any] = {"model": model, "seeds": len(known), "index": index, "setting": setting, "at": at}
    for name in columns:
        bounds = [f"{'' if name == 'value' else 'difference_'}{end}" for end in ("ci_low", "ci_high")]
        if len(known) > 1:
            numbers = mean_over_seeds(known[name].to_list())
        elif len(known):
            numbers = tuple(float(known[column].iloc[0]) for column in (name, *bounds))  # type: ignore[assignment]
        else:
            continue
        found |= dict(zip((name, *bounds), numbers, strict=True))
    return found


def settings_tables(frame: pd.DataFrame, doubt: pd.DataFrame) -> Iterator[Table]:
    """The two as tables of the terminal; the first marks each model's largest difference of a kind of setting."""
    index = frame["index"].iloc[0]
    table = Table(
        Column("model", no_wrap=True), "seeds", "setting", "at", "value", "difference", "",
        title=f"{index} at other settings [95 %]; differences are paired",
    )  # fmt: skip
    largest = frame.assign(size=frame["difference"].abs()).groupby(["model", "setting"])["size"].transform("max")
    for (_, row), most in zip(frame.iterrows(), largest, strict=True):
        gap = with_interval(row, "difference", "difference_ci_low", "difference_ci_high")
        mark = "largest" if abs(row["difference"]) == most else ""
        cells = (str(row["seeds"]), row["setting"], str(row["at"]), with_interval(row))
        table.add_row(row["model"], *cells, "" if row["setting"] == REPORTED else gap, mark)
    yield table
    title = f"{index}: standard deviations between seeds, and of one seed over documents and by lens refits"
    shown = Table(Column("model", no_wrap=True), "seeds", "mean", "between seeds", "documents", "refits", title=title)
    for one in doubt.to_dict("records"):
        spreads = (one[name] for name in ("value", "between_seeds", "documents", "refits"))
        shown.add_row(one["model"], str(one["seeds"]), *("-" if pd.isna(x) else number(x) for x in spreads))
    yield shown
