"""Models across run folders: one tidy table, differences paired where the same sequences were scored.

Folders that hold different models of one suite are parts of one run: their models are compared as if they lay in one folder.
Over seeds, a difference is paired by seed. What the suite declares as claims is corrected together (Holm).
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
from scipy import stats

from lensbench.errors import LensbenchError
from lensbench.measures.indices import (
    compared_quantities,
    curve_indices,
    draw_values,
    estimates_from,
    seed_of_rotations,
    tolerance_order,
)
from lensbench.measures.means import Means
from lensbench.measures.verdict import SCOPES, VerdictRule
from lensbench.report.claims import claim_rows, declared
from lensbench.report.comparable import refuse_unlike
from lensbench.report.formatting import shown_seeds
from lensbench.report.joining import grouped, joined, together
from lensbench.report.probe_versions import of_one_version
from lensbench.report.reproduction import reproduction
from lensbench.report.table_values import InTables, values_in_tables, warnings_in_tables
from lensbench.report.updates import Found, indices_of_none, not_measured, updates_of
from lensbench.report.verdicts import judged, rule_of
from lensbench.results.folder import Run, read_run
from lensbench.results.manifest import Manifest
from lensbench.results.sums import ClusterSums, by_document, clustered
from lensbench.runtime.files import write_atomically
from lensbench.statistics import Array, bootstrap_weights, interval, mean_over_seeds
from lensbench.studies.curves import differences

COLUMNS = (
    "kind", "run", "model", "seed", "index", "value", "ci_low", "ci_high", "against_run", "against_model", "against_seed",
    "paired", "seeds", "p", "p_holm", "note", "landmark", "probe", "claim", "status", "outcome",
)  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """``table``: a row per run, model, seed and index, and per pair of them a difference; columns :data:`COLUMNS`.

    ``kind`` is *value*, *fact* (layers and parameters of a model), *verdict* (its outcome; the note names the gate),
    *difference*, *claim* (what the suite declared: a row has it in words, its status and its outcome,
    and the landmark or the probe that it is about), *claim at tolerance* (a declared difference at another loss that a
    lens's ridge may cost, which the note names), or *learning curve* (a difference in cross-entropy; the note names the
    budget and the part of the context). ``seed = all``: over seeds, differences paired by seed, with Student-t intervals
    and the p of the paired t-test; :mod:`lensbench.report.claims` says what the p of a claim is. ``p_holm`` is corrected
    over all claims of the suite. A note has the warnings of the tables, why a value is undefined, and why a difference is
    not paired. ``runs``: the runs read, parts of one run joined. ``reproduction``: a line for each probe
    that is left out, since the runs hold different versions of it, and one for each run after the first.
    """

    table: pd.DataFrame
    reproduction: list[str]
    runs: list[Run]

    def write(self, path: Path) -> None:
        """Write the table as CSV; raises :class:`LensbenchError` where the file cannot be written."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, partial(self.table.to_csv, index=False, lineterminator="\n"))
        except OSError as error:
            raise LensbenchError(f"{path} cannot be written: {error.strerror}") from error


@dataclass(frozen=True)
class ComparedModel:
    """One model and seed of one run: every compared quantity at its point estimate and at the bootstrap draws."""

    run: str
    group: int
    """Number of the run that the folder is a part of."""
    corpus: str
    model: str
    seed: int
    documents: tuple[str, ...]
    tokens: Array
    bytes: Array
    point: dict[str, float]
    draws: dict[str, Array]
    reasons: dict[str, str]
    """Why a quantity is undefined, by its name."""
    in_tables: InTables
    """What the run's tables say of it"""
    warnings: dict[str, str]
    """What the tables warn of, by the name of a quantity"""
    text_tokens: tuple[tuple[str, int], ...] = ()
    """Tokens of each split of the text: of one text, those of one tokenizer are as many"""

    @property
    def who(self) -> dict[str, Any]:
        """The columns that name it."""
        return {"run": self.run, "model": self.model, "seed": self.seed}


def compare_runs(folders: list[Path], rule: VerdictRule | None = None) -> Comparison:
    """Read, check and compare runs; the others are compared with the first folder.

    All models are judged by one ``rule``; if left out, by that of the first folder's suite.

    Raises :class:`LensbenchError` for damaged folders, and for runs that do not measure the same thing.
    """
    runs, left_out = of_one_version(read_distinct(folders))
    for one, other in itertools.combinations(runs, 2):
        refuse_unlike(one, other)
    groups, names = grouped(runs), compared_quantities()
    models = [m for number, parts in enumerate(groups) for run in parts for m in compared_models(run, number)]
    rows = [{"kind": "value", **m.who, "index": name, **value_of(m, name)} for m in models for name in names]
    for first, second in itertools.combinations(models, 2):
        if worth_comparing(first, second, models):
            rows += [difference(second, first, name) for name in names]
    rows += rows_over_seeds(models)
    rule = rule or rule_of(runs[0])
    whole = [judged(joined(parts), rule) for parts in groups]
    for run in whole:
        rows += facts_and_verdicts(run) + claim_rows(run) + sensitivity_rows(run) + curve_rows(run)
    absent = indices_of_none(runs)
    kept = [row for row in rows if row["kind"] in ("claim", "verdict") or row["index"] not in absent]
    table = pd.DataFrame(kept, columns=list(COLUMNS))
    return Comparison(table, left_out + [reproduction(runs[0], run) for run in runs[1:]], whole)


def read_distinct(folders: list[Path]) -> list[Run]:
    """The runs of different folders; raises :class:`LensbenchError` for a folder named twice, and for a damaged one."""
    if len(set(folders)) < len(folders):
        twice = next(folder for folder in folders if folders.count(folder) > 1)
        raise LensbenchError(f"{twice} is named twice: name each run folder once")
    return [read_run(folder) for folder in folders]


def side_by_side(folders: list[Path], rule: VerdictRule | None = None) -> Run:
    """All models of runs that need not measure the same thing, judged by one rule: to look at together, not to compare.

    Raises :class:`LensbenchError` for damaged folders, for a sweep, and where two runs have a model of one name.
    """
    runs = read_distinct(folders)
    rule = rule or rule_of(runs[0])
    return together([judged(run, rule) for run in runs])


def compared_models(run: Run, group: int) -> list[ComparedModel]:
    """Every model and seed of a run; raises :class:`LensbenchError` where its sums are damaged."""
    sums, draws = run.sums(), run.manifest.suite.evaluate.draws
    found, updates, in_tables, warned = [], updates_of(run), values_in_tables(run), warnings_in_tables(run)
    try:
        for key, rows in sums.groupby(["model", "seed"], observed=True, sort=False):
            model, seed = cast(tuple[str, int], key)
            who = str(model), int(seed)
            known, told, warnings = updates.get(who, not_measured()), in_tables.get(who, {}), warned.get(who, {})
            found.append(compared_model(run, group, *who, clustered(rows), draws, known, told, warnings))
    except (KeyError, ValueError) as error:
        raise LensbenchError(f"the sums by cluster of {run.folder} are damaged: {error}") from error
    return found


def compared_model(
    run: Run,
    group: int,
    model: str,
    seed: int,
    rows: pd.DataFrame,
    draws: int,
    updates: Found,
    told: InTables,
    warned: dict[str, str],
) -> ComparedModel:
    """One model and seed of a run: draws from its ``rows`` of sums by cluster and from ``updates``, values as ``told``."""
    sums = ClusterSums.of(rows)
    weights = bootstrap_weights(len(sums.tokens), draws, 0)
    means = Means.of_clusters(sums.totals, sums.tokens), Means.of_clusters(sums.totals, sums.tokens, weights)
    at_point, at_draws = draw_values(*means, seed_of_rotations(model, seed))
    estimates = estimates_from(at_point, at_draws, means[0], len(sums.tokens))
    point = {name: float(value.value) for name, value in at_point.items()}
    values = {name: value.value for name, value in at_draws.items()}
    reasons = {name: e.reason for name, e in estimates.items() if e.value is None}
    point, values, reasons = point | updates[0], values | updates[1], reasons | updates[2]
    ce = by_document(rows, lens="model")["ce"].to_numpy(float)
    for name, per in (("ce", sums.tokens), ("bits_per_byte", sums.bytes * np.log(2))):
        if per.any():
            point[name] = float(ce.sum() / per.sum())
            values[name] = (weights @ ce) / (weights @ per)
        else:
            reasons[name] = "undefined: images have no bytes of text"
            point[name], values[name] = np.nan, np.full(len(weights), np.nan)
    point |= {name: told[name][0] for name in point if name in told}
    corpus = run.manifest.corpus.checksum
    return ComparedModel(
        str(run.folder), group, corpus, model, seed, sums.documents, sums.tokens, sums.bytes, point, values, reasons,
        told, warned, tokens_of_text(run.manifest, model),
    )  # fmt: skip


def tokens_of_text(manifest: Manifest, model: str) -> tuple[tuple[str, int], ...]:
    """How many tokens a model's tokenizer makes of each split; empty where the run does not say so."""
    known = manifest.tokenizers.get(model, manifest.tokenizers.get("trained here", {}))
    return tuple(sorted(known.get("tokens", {}).items()))


def value_of(model: ComparedModel, name: str) -> dict[str, Any]:
    """One quantity of a model with its interval, or the note why it is undefined."""
    if name in model.reasons:
        return {"value": None, "ci_low": None, "ci_high": None, "note": model.reasons[name]}
    low, high = model.in_tables[name][1:] if name in model.in_tables else interval(model.draws[name])
    return {
        "value": model.point[name],
        "ci_low": float(low),
        "ci_high": float(high),
        "note": model.warnings.get(name, ""),
    }


def facts_and_verdicts(run: Run) -> list[dict[str, Any]]:
    """How deep and how large each model is, and the verdict on each scope, as judged now; of several seeds that over all."""
    rows: list[dict[str, Any]] = []
    for of in run.tables["models.csv"].drop_duplicates("model").to_dict("records"):
        who = {"run": str(run.folder), "model": of["model"], "seed": of["seed"]}
        rows += [
            {"kind": "fact", **who, "index": name, "value": of[name], "note": ""} for name in ("layers", "parameters")
        ]
    for of in shown_seeds(run.tables["verdicts.csv"]).to_dict("records"):
        who = {"run": str(run.folder), "model": of["model"], "seed": of["seed"]}
        gate = of["gate"] if isinstance(of["gate"], str) else ""
        index = f"verdict{SCOPES[of['scope']]}"
        rows.append({"kind": "verdict", **who, "index": index, "outcome": of["verdict"], "note": gate})
    return rows


def worth_comparing(first: ComparedModel, second: ComparedModel, models: list[ComparedModel]) -> bool:
    """Whether a difference is of interest: two models of one run; of two runs, those of one name, and those without.

    A model is without a namesake where the other run has no model of its name; on two texts only namesakes
    compare. Two of one run share their seed; of two runs, too, unless they have none in common. ``models``: all that are
    compared.
    """
    if first.group == second.group:
        return first.seed == second.seed
    ours, theirs = ({m.model for m in models if m.group == one.group} for one in (first, second))
    alone = first.model not in theirs and second.model not in ours and first.corpus == second.corpus
    if first.model != second.model and not alone:
        return False
    seeds = [{m.seed for m in models if (m.group, m.model) == (one.group, one.model)} for one in (first, second)]
    return first.seed == second.seed or not seeds[0] & seeds[1]


def rows_over_seeds(models: list[ComparedModel]) -> list[dict[str, Any]]:
    """Every model's mean over seeds, and the differences that are of interest, paired by seed."""
    by_name: dict[tuple[int, str], dict[int, ComparedModel]] = {}
    for model in models:
        by_name.setdefault((model.group, model.model), {})[model.seed] = model
    rows: list[dict[str, Any]] = []
    for seeds in by_name.values():
        if len(seeds) > 1:
            rows += means_over_seeds(list(seeds.values()))
    for one, other in itertools.combinations(by_name.values(), 2):
        common = [seed for seed in one if seed in other]
        if len(common) > 1 and worth_comparing(one[common[0]], other[common[0]], models):
            rows += differences_over_seeds([(other[seed], one[seed]) for seed in common])
    return rows


def means_over_seeds(seeds: list[ComparedModel]) -> Iterator[dict[str, Any]]:
    """One model's mean over its seeds, a row for every quantity."""
    who = {"kind": "value", "run": seeds[0].run, "model": seeds[0].model, "seed": "all", "seeds": len(seeds)}
    for name in compared_quantities():
        reason = next((one.reasons[name] for one in seeds if name in one.reasons), "")
        row = mean_row([one.point[name] for one in seeds], reason)
        warned = "; ".join(dict.fromkeys(one.warnings[name] for one in seeds if name in one.warnings))
        yield who | {"index": name} | row | {"note": row["note"] or warned}


def differences_over_seeds(pairs: list[tuple[ComparedModel, ComparedModel]]) -> Iterator[dict[str, Any]]:
    """Two models' difference, paired by seed, a row for every quantity, with the p of the paired t-test.

    All seeds of a model are scored on the same documents. Of two texts the documents are others, for all seeds alike: a
    row is then marked as not paired, has no p, and its note says what its interval lacks.
    """
    here, there = pairs[0]
    who: dict[str, Any] = {"kind": "difference", "run": here.run, "model": here.model, "seed": "all"}
    who |= {
        "against_run": there.run,
        "against_model": there.model,
        "against_seed": "all",
        "seeds": len(pairs),
    }
    unpaired = next(filter(None, (other_documents(a, b) for a, b in pairs)), "")
    who["paired"] = not unpaired
    for name in compared_quantities():
        reason = next((m.reasons[name] for pair in pairs for m in pair if name in m.reasons), "")
        reason = reason or other_tokens(name, here, there)
        gaps = [a.point[name] - b.point[name] for a, b in pairs]
        row = who | {"index": name} | mean_row(gaps, reason)
        if unpaired and not reason:
            row["note"] = f"{unpaired}; {OVER_SEEDS_ALONE}"
        if not (reason or unpaired) and np.std(gaps) > 0:
            row["p"] = float(stats.ttest_1samp(gaps, 0.0).pvalue)
        yield row


OVER_SEEDS_ALONE = "its interval is over seeds, and holds nothing of which documents were scored"
"""Of a difference over seeds between two texts"""


def mean_row(values: list[float], reason: str) -> dict[str, Any]:
    """Mean over seeds with its Student-t interval, or the reason why it is undefined at one of them."""
    if reason:
        return {"value": None, "ci_low": None, "ci_high": None, "note": f"undefined for a seed: {reason}"}
    mean, low, high = mean_over_seeds(values)
    return {"value": mean, "ci_low": low, "ci_high": high, "note": ""}


def sensitivity_rows(run: Run) -> list[dict[str, Any]]:
    """Claimed differences in gain visibility at every loss that a lens's ridge may cost: paired by seed, uncorrected.

    Two models' lenses may lie at ridges that differ by orders of magnitude, and visibility depends on them.
    """
    curve = run.tables["tolerances.csv"]
    curve = curve[curve["index"].isin(curve_indices())]
    values = curve.set_index(["model", "index", "tolerance", "seed"])["value"].sort_index()
    labels = sorted(curve["tolerance"].unique(), key=tolerance_order)
    found = []
    claims = [(c.model, c.against, index) for c in declared(run) if c.against is not None for index in c.indices]
    for model, against, index in claims:
        for label in labels:
            try:
                one, other = (values.loc[name, index, label] for name in (model, against))
            except KeyError:
                continue
            gaps = (one - other).dropna()
            if len(gaps) < 2:
                continue
            row: dict[str, Any] = {"kind": "claim at tolerance", "run": str(run.folder), "model": model, "seed": "all"}
            row |= {"index": index, "against_run": str(run.folder), "against_model": against}
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


def other_documents(model: ComparedModel, against: ComparedModel) -> str:
    """How the documents of two models differ, as a note; empty where they are the same."""
    if model.corpus != against.corpus:
        return "not paired: another corpus"
    if model.documents != against.documents:
        return "not paired: other documents were scored"
    return ""


def other_tokens(name: str, model: ComparedModel, against: ComparedModel) -> str:
    """Why a loss per token is not compared: one text makes other tokens of the two; empty where it is."""
    known = model.text_tokens and against.text_tokens and model.corpus == against.corpus
    if name == "ce" and known and model.text_tokens != against.text_tokens:
        return "undefined: nats per token of another tokenizer; bits_per_byte compares"
    return ""


def why_unpaired(model: ComparedModel, against: ComparedModel) -> str:
    """Why two models' draws do not resample the same text; empty where they do.

    They do where the scored tokens of every cluster of documents are the same text, by its bytes; of images, by how many.
    """
    if other := other_documents(model, against):
        return other
    sizes = (model.bytes, against.bytes) if model.bytes.any() else (model.tokens, against.tokens)
    if not np.array_equal(*sizes):
        alike = np.array_equal(model.tokens, against.tokens)
        why = "as many tokens, other bytes" if alike else "another tokenizer or other windows"
        return f"not paired: other windows of the text were scored ({why})"
    return ""


def difference(model: ComparedModel, against: ComparedModel, name: str) -> dict[str, Any]:
    """``model - against``; paired where both scored the same text of the same documents.

    Both sides' draws come from one seed, so that draw k resamples the same documents on both.
    """
    unpaired = why_unpaired(model, against)
    row = {"kind": "difference", **model.who, "index": name, "paired": not unpaired}
    row |= {f"against_{k}": v for k, v in against.who.items()}
    undefined = model.reasons.get(name) or against.reasons.get(name) or other_tokens(name, model, against)
    if undefined:
        return row | {"note": undefined}
    draws = min(len(model.draws[name]), len(against.draws[name]))
    here, there = model.draws[name][:draws], against.draws[name][:draws]
    if unpaired:
        # Unpaired draws must not move together: pair each with another's.
        there = np.roll(there, len(there) // 2)
    low, high = interval(here - there)
    warned = dict.fromkeys(one.warnings[name] for one in (against, model) if name in one.warnings)
    return row | {
        "value": model.point[name] - against.point[name],
        "ci_low": float(low),
        "ci_high": float(high),
        "note": "; ".join(filter(None, [unpaired, *warned])),
    }
