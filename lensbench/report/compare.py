"""Models across run folders: one tidy table, differences paired where the same sequences were scored.

Folders that hold different models of one suite are parts of one run: their models are compared as if they lay in one.
Over seeds a difference is paired by seed; those that the suite declares as claims are corrected together (Holm).
"""

import itertools
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.multitest import multipletests

from lensbench.errors import LensbenchError
from lensbench.measures import indices
from lensbench.measures.indices import COMPARED, ON_THE_CURVE, Means, draw_values, seed_of_rotations, tolerance_order
from lensbench.measures.verdict import VerdictRule
from lensbench.results.folder import SEQUENCES, Run, read_run
from lensbench.results.schema import MEASURED_TIME, SCHEMA
from lensbench.results.sums import ClusterSums, by_document, clustered
from lensbench.results.tables import verdict_table
from lensbench.runtime.files import write_atomically
from lensbench.statistics import Array, bootstrap_weights, interval, over_seeds
from lensbench.studies.curves import differences

FEWEST_SEEDS = 5
"""Under these a claim is marked."""


SAME_MEASURE = (
    ("fit", "tolerance"),
    ("fit", "variance"),
    ("fit", "layers"),
    ("evaluate", "first_position"),
    ("evaluate", "length"),
    ("training", "length"),
)
"""Settings without which two numbers of the same name are not the same quantity."""


@dataclass(frozen=True)
class Comparison:
    """``table``: a row per run, model, seed and index, and per pair of them a difference.

    Columns ``kind`` (value, difference, claim: a difference that the suite declared, claim at tolerance: the same at
    another loss that a lens's ridge may cost, which the note tells, or learning curve: a difference in cross-entropy,
    whose note tells the budget and the part of the context), ``run, model, seed, index, value, ci_low, ci_high,
    against_run, against_model, against_seed, paired, seeds, p, p_holm, note``. ``seed = all``: over seeds, differences
    paired by seed, with Student-t intervals and the p of the paired t-test; ``p_holm`` is corrected over all claims of
    the suite. ``runs``: as they were read, parts of one run joined.
    """

    table: pd.DataFrame
    reproduction: list[str]
    runs: list[Run]

    def write(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, partial(self.table.to_csv, index=False, lineterminator="\n"))
        except OSError as error:
            raise LensbenchError(f"{path} cannot be written: {error.strerror}") from error


@dataclass(frozen=True)
class Cell:
    """One model and seed of one run: every compared quantity at its point estimate and at the bootstrap draws."""

    run: str
    group: int
    """Number of the run that the folder is a part of."""
    corpus: str
    model: str
    seed: int
    documents: tuple[str, ...]
    tokens: Array
    point: dict[str, float]
    draws: dict[str, Array]
    reasons: dict[str, str]

    @property
    def who(self) -> dict[str, Any]:
        return {"run": self.run, "model": self.model, "seed": self.seed}


def compare_runs(folders: list[Path], rule: VerdictRule | None = None) -> Comparison:
    """Read, check and compare runs; the first folder is the one that the others are held against.

    All models are judged by one ``rule``, where left out that of the first folder's suite.

    Raises :class:`LensbenchError` for damaged folders, and for runs that do not measure the same thing.
    """
    if len(set(folders)) < len(folders):
        raise LensbenchError("a run folder is named twice")
    runs = [read_run(folder) for folder in folders]
    for one, other in itertools.combinations(runs, 2):
        refuse_unlike(one, other)
    groups = grouped(runs)
    cells = [cell for number, parts in enumerate(groups) for run in parts for cell in cells_of(run, number)]
    rows = [{"kind": "value", **cell.who, "index": name, **value_of(cell, name)} for cell in cells for name in COMPARED]
    for first, second in itertools.combinations(cells, 2):
        if worth_comparing(first, second):
            rows += [difference(second, first, name) for name in COMPARED]
    rule = rule or rule_of(runs[0])
    whole = [judged(joined(parts), rule) for parts in groups]
    for number, parts in enumerate(groups):
        rows += rows_over_seeds([cell for cell in cells if cell.group == number])
        claims = (parts[0].manifest or {})["suite"].get("claims", [])
        rows += claim_rows(claims, rows, [str(run.folder) for run in parts])
        rows += sensitivity_rows(claims, whole[number])
        rows += curve_rows(whole[number])
    columns = ["kind", "run", "model", "seed", "index", "value", "ci_low", "ci_high", "against_run", "against_model",
               "against_seed", "paired", "seeds", "p", "p_holm", "note"]  # fmt: skip
    table = pd.DataFrame(rows, columns=columns)
    return Comparison(table, [reproduction(runs[0], run) for run in runs[1:]], whole)


def rule_of(run: Run) -> VerdictRule:
    """The rule that a run was judged by; raises :class:`LensbenchError` for one that is none."""
    try:
        return VerdictRule(**(run.manifest or {})["suite"].get("verdict", {}))
    except (TypeError, ValueError) as error:
        raise LensbenchError(f"{run.folder}: its manifest's verdict is no rule: {error}") from error


def side_by_side(folders: list[Path], rule: VerdictRule | None = None) -> Run:
    """All models of runs that need not measure the same thing, judged by one rule: to be seen together, not compared.

    Raises :class:`LensbenchError` for damaged folders, for a sweep, and where two runs have a model of one name.
    """
    if len(set(folders)) < len(folders):
        raise LensbenchError("a run folder is named twice")
    runs = [read_run(folder) for folder in folders]
    for run in runs:
        if "sweep" in (run.manifest or {}):
            raise LensbenchError(
                f"{run.folder} holds a sweep, which has no lenses: give folders that `lensbench run` wrote"
            )
    rule = rule or rule_of(runs[0])
    return together([judged(run, rule) for run in runs])


def grouped(runs: list[Run]) -> list[list[Run]]:
    """Runs, those that are parts of one together."""
    groups: list[list[Run]] = []
    for run in runs:
        home = next((group for group in groups if all(parts_of_one(other, run) for other in group)), None)
        if home is None:
            groups.append([run])
        else:
            home.append(run)
    return groups


def parts_of_one(one: Run, other: Run) -> bool:
    """Whether two folders hold different models of the same suite, run on the same text with the same seeds."""
    a, b = (run.manifest or {} for run in (one, other))
    same = a["suite"] == b["suite"] and a["corpus"]["checksum"] == b["corpus"]["checksum"] and a["seeds"] == b["seeds"]
    return same and not set(a["models"]) & set(b["models"])


def joined(parts: list[Run]) -> Run:
    """Runs of different models as one, its models in the order of the suite; a baseline told once."""
    if len(parts) == 1:
        return parts[0]
    order = {model["name"]: k for k, model in enumerate((parts[0].manifest or {})["suite"]["models"])}
    tables = {}
    for name in SCHEMA:
        table = pd.concat([part.tables[name] for part in parts if len(part.tables[name])] or [parts[0].tables[name]])
        if "model" in table:
            table = table.sort_values("model", key=lambda names: names.map(order), kind="stable")
        tables[name] = table.drop_duplicates(ignore_index=True)
    return Run(parts[0].folder, None, tables)


def judged(run: Run, rule: VerdictRule) -> Run:
    """The run with verdicts by this rule."""
    told = run.tables["verdicts.csv"].dropna(subset=["known"])
    verdicts = verdict_table(run.tables["indices.csv"], dict(zip(told["model"], told["known"], strict=True)), rule)
    return replace(run, tables={**run.tables, "verdicts.csv": verdicts})


def together(runs: list[Run]) -> Run:
    """All models of several runs in one, for figures; raises :class:`LensbenchError` where two have one name."""
    names = [name for run in runs for name in run.tables["models.csv"]["model"].unique()]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise LensbenchError(f"model {twice!r} is in two of the folders: a figure of them all would show one")
    tables = {name: pd.concat([run.tables[name] for run in runs], ignore_index=True) for name in SCHEMA}
    return Run(runs[0].folder, None, tables)


def refuse_unlike(one: Run, other: Run) -> None:
    """Raise where two runs do not measure the same thing, saying what differs."""
    a, b = (run.manifest or {} for run in (one, other))
    if "sweep" in a or "sweep" in b:
        raise LensbenchError("a sweep has no lenses to compare: give folders that `lensbench run` wrote")
    if a["code_version"] != b["code_version"]:
        raise LensbenchError(
            f"{one.folder} and {other.folder} do not measure the same thing: code versions {a['code_version']} and "
            f"{b['code_version']}; run one of them again"
        )
    if a["corpus"]["spec"] != b["corpus"]["spec"]:
        raise LensbenchError(
            f"{one.folder} and {other.folder} do not measure the same thing: corpus {a['corpus']['spec']} and "
            f"{b['corpus']['spec']}"
        )
    if a["corpus"]["spec"] != "stdlib" and a["corpus"]["checksum"] != b["corpus"]["checksum"]:
        raise LensbenchError(
            f"{one.folder} and {other.folder} do not measure the same thing: {a['corpus']['spec']} held other texts"
        )
    for section, key in SAME_MEASURE:
        first, second = (manifest["suite"].get(section, {}).get(key) for manifest in (a, b))
        if first != second:
            raise LensbenchError(
                f"{one.folder} and {other.folder} do not measure the same thing: {section}.{key} is {first} and {second}"
            )


def cells_of(run: Run, group: int) -> list[Cell]:
    manifest = run.manifest or {}
    sequences = run.sequences()
    draws = manifest["suite"]["evaluate"]["draws"]
    cells = []
    try:
        for key, rows in sequences.groupby(["model", "seed"], observed=True, sort=False):
            model, seed = cast(tuple[str, int], key)
            rows = clustered(rows)
            sums = ClusterSums.of(rows)
            weights = bootstrap_weights(len(sums.tokens), draws, 0)
            means = Means.of_clusters(sums.totals, sums.tokens), Means.of_clusters(sums.totals, sums.tokens, weights)
            of_rotations = seed_of_rotations(str(model), int(seed))
            at_point, at_draws = draw_values(*means, of_rotations)
            estimates = indices.estimates(*means, seed=of_rotations, clusters=len(sums.tokens))
            ce = by_document(rows, lens="model")["ce"].to_numpy(float)
            point = {name: float(value.value) for name, value in at_point.items()}
            values = {name: value.value for name, value in at_draws.items()}
            reasons = {name: e.reason for name, e in estimates.items() if e.value is None}
            for name, per in (("ce", sums.tokens), ("bits_per_byte", sums.bytes * np.log(2))):
                if not per.any():
                    reasons[name] = "undefined: images have no bytes of text"
                    point[name], values[name] = np.nan, np.full(len(weights), np.nan)
                    continue
                point[name] = float(ce.sum() / per.sum())
                values[name] = (weights @ ce) / (weights @ per)
            cells.append(
                Cell(
                    str(run.folder),
                    group,
                    manifest["corpus"]["checksum"],
                    str(model),
                    int(seed),
                    sums.documents,
                    sums.tokens,
                    point,
                    values,
                    reasons,
                )  # fmt: skip
            )
    except (KeyError, ValueError) as error:
        raise LensbenchError(f"{run.folder / SEQUENCES} is damaged: {error}") from error
    return cells


def value_of(cell: Cell, name: str) -> dict[str, Any]:
    if name in cell.reasons:
        return {"value": None, "ci_low": None, "ci_high": None, "note": cell.reasons[name]}
    low, high = interval(cell.draws[name])
    return {"value": cell.point[name], "ci_low": float(low), "ci_high": float(high), "note": ""}


def worth_comparing(first: Cell, second: Cell) -> bool:
    """Models of one run at one seed, and the same model across runs."""
    return first.seed == second.seed if first.group == second.group else first.model == second.model


def rows_over_seeds(cells: list[Cell]) -> list[dict[str, Any]]:
    """Of one run: every model's mean over seeds, and every two models' difference, paired by seed."""
    by_model: dict[str, dict[int, Cell]] = {}
    for cell in cells:
        by_model.setdefault(cell.model, {})[cell.seed] = cell
    rows = []
    for model, seeds in by_model.items():
        if len(seeds) < 2:
            continue
        who = {
            "kind": "value",
            "run": next(iter(seeds.values())).run,
            "model": model,
            "seed": "all",
            "seeds": len(seeds),
        }
        for name in COMPARED:
            reason = next((cell.reasons[name] for cell in seeds.values() if name in cell.reasons), "")
            rows.append(who | {"index": name} | mean_row([cell.point[name] for cell in seeds.values()], reason))
    for one, other in itertools.combinations(by_model, 2):
        common = [seed for seed in by_model[one] if seed in by_model[other]]
        if len(common) < 2:
            continue
        pairs = [(by_model[other][seed], by_model[one][seed]) for seed in common]
        here, there = pairs[0]
        who = {"kind": "difference", "run": here.run, "model": other, "seed": "all", "against_run": there.run}
        who |= {"against_model": one, "against_seed": "all", "paired": True, "seeds": len(common)}
        for name in COMPARED:
            reason = next((c.reasons[name] for pair in pairs for c in pair if name in c.reasons), "")
            gaps = [a.point[name] - b.point[name] for a, b in pairs]
            row = who | {"index": name} | mean_row(gaps, reason)
            if not reason and np.std(gaps) > 0:
                row["p"] = float(stats.ttest_1samp(gaps, 0.0).pvalue)
            rows.append(row)
    return rows


def mean_row(values: list[float], reason: str) -> dict[str, Any]:
    """Mean over seeds with its Student-t interval, or the reason why it is undefined at one of them."""
    if reason:
        return {"value": None, "ci_low": None, "ci_high": None, "note": f"undefined for a seed: {reason}"}
    mean, low, high = over_seeds(values)
    return {"value": mean, "ci_low": low, "ci_high": high, "note": ""}


def claim_rows(claims: list[dict[str, Any]], rows: list[dict[str, Any]], folders: list[str]) -> list[dict[str, Any]]:
    """The differences that a suite declared, seed-paired, their p corrected together; absent where a model is."""
    over = {
        (row["model"], row["against_model"], row["index"]): row
        for row in rows
        if row["kind"] == "difference" and row["seed"] == "all" and row["run"] in folders
    }
    found = []
    for claim in claims:
        for index in claim["indices"]:
            row = over.get((claim["model"], claim["against"], index))
            reverse = over.get((claim["against"], claim["model"], index))
            if row is None and reverse is not None:
                row = turned_round(reverse)
            if row is not None:
                few = f"only {row['seeds']} seeds" if row["seeds"] < FEWEST_SEEDS else ""
                found.append(row | {"kind": "claim", "note": row["note"] or few})
    tested = [row for row in found if row.get("p") is not None]
    declared = sum(len(claim["indices"]) for claim in claims)
    if tested:
        # Corrected for all that was declared: what is undefined or not there yet counts as a test that found nothing.
        rest = [1.0] * (declared - len(tested))
        corrected = multipletests([*(row["p"] for row in tested), *rest], method="holm")[1]
        for row, p in zip(tested, corrected[: len(tested)], strict=True):
            row["p_holm"] = float(p)
    return found


def sensitivity_rows(claims: list[dict[str, Any]], run: Run) -> list[dict[str, Any]]:
    """Claims about gain visibility at every loss that a lens's ridge may cost: seed-paired differences, uncorrected.

    Two models' lenses may lie at ridges that differ by orders of magnitude, and visibility depends on them.
    """
    curve = run.tables["tolerances.csv"]
    curve = curve[curve["index"].isin(ON_THE_CURVE)]
    values = curve.set_index(["model", "index", "tolerance", "seed"])["value"].sort_index()
    labels = sorted(curve["tolerance"].unique(), key=tolerance_order)
    found = []
    for claim, index in ((c, i) for c in claims for i in c["indices"]):
        for label in labels:
            try:
                one, other = (values.loc[claim[side], index, label] for side in ("model", "against"))
            except KeyError:
                continue
            gaps = (one - other).dropna()
            if len(gaps) < 2:
                continue
            row = {"kind": "claim at tolerance", "run": str(run.folder), "model": claim["model"], "seed": "all"}
            row |= {"index": index, "against_run": str(run.folder), "against_model": claim["against"]}
            row |= {"against_seed": "all", "paired": True, "seeds": len(gaps)}
            found.append(row | mean_row(list(gaps), "") | {"note": label})
    return found


def curve_rows(run: Run) -> list[dict[str, Any]]:
    """Differences of learning curves of every two models, at every budget and part of the context, paired by seed."""
    curves = run.tables["curves.csv"]
    found = []
    for against, model in itertools.combinations(dict.fromkeys(curves["model"]), 2):
        row = {"kind": "learning curve", "run": str(run.folder), "model": model, "seed": "all", "index": "ce"}
        row |= {"against_run": str(run.folder), "against_model": against, "against_seed": "all", "paired": True}
        for gap in differences(curves, model, against):
            note = f"{gap.pop('train_tokens')} tokens, positions {gap.pop('positions')}; p uncorrected"
            found.append(row | gap | {"note": note})
    return found


def turned_round(row: dict[str, Any]) -> dict[str, Any]:
    """The difference the other way about."""
    row = dict(row)
    for name in ("run", "model", "seed"):
        row[name], row[f"against_{name}"] = row[f"against_{name}"], row[name]
    if row["value"] is not None:
        row |= {"value": -row["value"], "ci_low": -row["ci_high"], "ci_high": -row["ci_low"]}
    return row


def difference(cell: Cell, against: Cell, name: str) -> dict[str, Any]:
    """``cell - against``; paired where both scored the same tokens of the same documents.

    Both sides' draws come from one seed, so that draw k resamples the same documents on both.
    """
    paired = cell.documents == against.documents and np.array_equal(cell.tokens, against.tokens)
    paired = paired and cell.corpus == against.corpus
    row = {"kind": "difference", **cell.who, "index": name, "paired": paired}
    row |= {f"against_{k}": v for k, v in against.who.items()}
    undefined = cell.reasons.get(name) or against.reasons.get(name)
    if undefined:
        return row | {"note": undefined}
    draws = min(len(cell.draws[name]), len(against.draws[name]))
    here, there = cell.draws[name][:draws], against.draws[name][:draws]
    if not paired:
        # Unpaired draws must not move together: pair each with another's.
        there = np.roll(there, len(there) // 2)
    low, high = interval(here - there)
    note = "" if cell.corpus == against.corpus else "another corpus"
    return row | {
        "value": cell.point[name] - against.point[name],
        "ci_low": float(low),
        "ci_high": float(high),
        "note": note,
    }


def reproduction(reference: Run, run: Run) -> str:
    """One line: whether ``run`` reproduced ``reference``."""
    a, b = (r.manifest or {} for r in (reference, run))
    who = f"{run.folder} against {reference.folder}"
    if a["corpus"]["checksum"] != b["corpus"]["checksum"]:
        return (
            f"{who}: another corpus ({a['corpus']['spec']} with other texts): compare the intervals of the differences"
        )
    if a["suite"] != b["suite"] or a["seeds"] != b["seeds"]:
        return f"{who}: same corpus, other settings"
    if parts_of_one(reference, run):
        return f"{who}: other models of the same suite ({', '.join(b['models'])}): read as one run"
    if a["models"] != b["models"]:
        return f"{who}: same settings, but {', '.join(a['models'])} there and {', '.join(b['models'])} here"
    alike = [name for name in SCHEMA if name not in MEASURED_TIME]
    csv = [name for name in alike if a["files"].get(name) != b["files"].get(name)]
    if not csv:
        return f"{who}: identical, every CSV byte for byte"
    largest, where = 0.0, f"the text of {', '.join(csv)}"
    for name in csv:
        if name == "verdicts.csv" and list(reference.tables[name]["verdict"]) != list(run.tables[name]["verdict"]):
            return f"{who}: not reproduced, {name} has other verdicts"
        one, other = (r.tables[name].select_dtypes("number") for r in (reference, run))
        if one.shape != other.shape:
            return f"{who}: not reproduced, {name} has {len(other)} rows instead of {len(one)}"
        gap = (one - other).abs()
        if (one.isna() != other.isna()).any(axis=None):
            return f"{who}: not reproduced, other cells of {name} are empty"
        if gap.empty:
            continue  # of words alone
        column = gap.max().idxmax()
        if gap[column].max() >= largest:
            largest, where = float(gap[column].max()), f"{name}, column {column}"
    return f"{who}: reproduced but for a largest absolute difference of {largest:.3g} ({where})"
