"""Whether one run is another one again, in one line: the answer that a comparison begins with."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from lensbench.measures.indices import INDICES
from lensbench.report.defined_once import defined_once, sentence
from lensbench.report.joining import parts_of_one
from lensbench.results.folder import Run
from lensbench.results.manifest import Manifest
from lensbench.results.schema import MEASURED_TIME, SCHEMA

IDENTICAL = "reproduced: byte for byte"
"""What the line of a run says whose tables are those of the other"""

VERDICTS = ("verdict", "fixed_lens_verdict")


MOST_NAMED = 4
"""Settings that a line names, at most"""


def reproduction(reference: Run, run: Run) -> str:
    """One line: whether ``run`` is ``reference`` again, or what makes it another one."""
    return f"{answer(reference, run)} ({run.folder} against {reference.folder})"


def answer(reference: Run, run: Run) -> str:
    """The answer without the names of the folders."""
    a, b = reference.manifest, run.manifest
    if a.corpus.checksum != b.corpus.checksum:
        texts = f"{a.corpus.spec} held other documents"
        if a.corpus.spec != b.corpus.spec:
            texts = f"{a.corpus.spec} and {b.corpus.spec}"
        return f"not the same: text ({texts}); differences are those of the texts, and unpaired"
    if parts_of_one(reference, run):
        return f"other models of the same suite ({', '.join(b.models)}): read as one run"
    changed = settings_that_differ(a, b)
    if changed and not settings_that_differ(a, b, models=False) and not set(a.models) & set(b.models):
        return f"other models, the same text and settings: {', '.join(a.models)}; {', '.join(b.models)}"
    if changed:
        return f"not the same: settings: {changed}"
    if others := [name for name in a.models if name in b.models and other_weights(a, b, name)]:
        return f"not the same: model {others[0]!r} has other weights"
    if a.models != b.models:
        return f"not the same: models: {', '.join(a.models)}; {', '.join(b.models)}"
    alike = [name for name in SCHEMA if name not in MEASURED_TIME]
    changed_tables = [name for name in alike if a.checksums.get(name) != b.checksums.get(name)]
    return numbers_that_differ(reference, run, changed_tables) if changed_tables else IDENTICAL


def settings_that_differ(a: Manifest, b: Manifest, *, models: bool = True) -> str:
    """The settings of two suites that differ, each with both values; empty where none does. Wording is no setting.

    ``models``: which models they have, how these are built, and what is claimed of them are settings, too.
    """
    one, other = (dict(leaves({**m.suite.content(), "seeds": m.seeds})) for m in (a, b))
    found = settings_of_two(a, b, models=models)
    named = [f"{key} is {shown(one.get(key))} and {shown(other.get(key))}" for key in found[:MOST_NAMED]]
    more = [f"and {len(found) - MOST_NAMED} more"] * (len(found) > MOST_NAMED)
    return ", ".join([*named, *more])


def settings_of_two(a: Manifest, b: Manifest, *, models: bool = True) -> list[str]:
    """The names of the settings of two suites that differ; ``models`` as in :func:`settings_that_differ`."""
    one, other = (dict(leaves({**m.suite.content(), "seeds": m.seeds})) for m in (a, b))
    found = [key for key in {**one, **other} if one.get(key) != other.get(key) and key not in ("question", "name")]
    if not models:
        found = [key for key in found if not key.startswith("model") and key != "claims"]
    return sorted(found, key=lambda key: key not in one or key not in other)  # what both say first


def leaves(content: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of every setting; models and claims go by what they are of, so that one more is one setting."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from leaves(value, f"{path}.{key}" if path else str(key))
    elif isinstance(content, list) and content and all(isinstance(one, dict) for one in content):
        if path == "models":
            yield path, [one.get("name") for one in content]
            for one in content:
                yield from leaves({k: v for k, v in one.items() if k != "name"}, f"model {one.get('name')}")
        else:
            yield path, content
    else:
        yield path, content


def shown(value: Any) -> str:
    """A setting's value in a line; a long one by its size."""
    if value is None:
        return "left out"
    if isinstance(value, list) and (len(str(value)) > 30 or any(isinstance(one, dict) for one in value)):
        return f"{len(value)} entries"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def other_weights(a: Manifest, b: Manifest, name: str) -> bool:
    """Whether a pretrained model of two runs is not the same, by what its sources held; so is one with another lens."""
    one, other = (m.sources.get(name, {}) | {f"lens {k}": v for k, v in m.lenses.get(name, {}).items()} for m in (a, b))
    return any(one[key] != other[key] for key in {*one} & {*other})


def numbers_that_differ(reference: Run, run: Run, changed: list[str]) -> str:
    """How far apart the numbers of two runs' ``changed`` tables are, or that they do not hold the same rows or answers.

    Reproduced means: the same rows, the same verdicts, and no reported value outside the interval of the other run. A value
    that one run alone defines is named. It is no obstacle where a gate stops it in the other run and all that both runs
    define of the same states agrees within intervals: then noise decides the gate.
    """
    if other := other_rows_or_verdicts(reference, run, changed):
        return f"not the same: {other}"
    if outside := outside_interval(reference, run, changed):
        return f"not the same: {outside}"
    once = [value for name in changed for value in defined_once(reference, run, name)]
    if decided := [value for value in once if not value.near_tie]:
        return f"not the same: {sentence(decided)}"
    largest, where = largest_difference(reference, run, changed)
    if not where and not once:
        return f"reproduced: every number is the same, but not the text of {', '.join(changed)}"
    said = "reproduced within what another processor gives: the same verdicts, every index and loss within its interval"
    if where:
        said += f", the largest difference {largest:.3g} ({where})"
    if once:
        many = f"{len(once)} value{'s' * (len(once) > 1)}"
        said += f". One run alone defines {many}, at a near tie of a gate: {sentence(once)}"
    return said


def other_rows_or_verdicts(reference: Run, run: Run, changed: list[str]) -> str:
    """The first table whose verdicts are others, or that has other rows; empty where there is none."""
    for name in changed:
        one, other = reference.tables[name], run.tables[name]
        if len(one) != len(other):
            return f"{name} has {len(other)} rows instead of {len(one)}"
        if name == "verdicts.csv" and any(list(one[column]) != list(other[column]) for column in VERDICTS):
            return f"{name} has other verdicts"
    return ""


def largest_difference(reference: Run, run: Run, changed: list[str]) -> tuple[float, str]:
    """The largest difference of a number that both runs define, and where it is; an empty place where there is none."""
    largest, where = 0.0, ""
    for name in changed:
        one, other = (r.tables[name].select_dtypes("number") for r in (reference, run))
        gap = (one - other).abs()
        if gap.isna().all(axis=None):
            continue  # of words alone, its numbers are all missing
        column = gap.max().idxmax()
        if gap[column].max() > largest:
            largest, where = float(gap[column].max()), f"{name}, column {column}"
    return largest, where


def outside_interval(reference: Run, run: Run, changed: list[str]) -> str:
    """The first reported value of ``run`` that lies outside the interval of ``reference``; empty where none does.

    A rank correlation of a few pairs of layers jumps where rounding exchanges two of them: there the intervals have to be
    apart.
    """
    for name, columns in (("models.csv", ("ce", "ce_")), ("indices.csv", ("value", ""))):
        if name not in changed:
            continue
        one, other = reference.tables[name], run.tables[name]
        value, prefix = columns
        low, high = one[f"{prefix}ci_low"], one[f"{prefix}ci_high"]
        out = (other[value] < low) | (other[value] > high)
        if "index" in one:
            apart = (other["ci_low"] > high) | (other["ci_high"] < low)
            out &= apart | ~one["index"].map(is_rank_correlation)
        if out.any():
            row, new = one[out].iloc[0], float(other.loc[out, value].iloc[0])
            what = row["index"] if "index" in one else "ce"
            ends = f"[{row[f'{prefix}ci_low']:.3f}, {row[f'{prefix}ci_high']:.3f}]"
            return f"{what} of {row['model']} is {new:.3f}, outside the other run's {row[value]:.3f} {ends}"
    return ""


def is_rank_correlation(index: str) -> bool:
    """Whether an index is made of ranks."""
    return index in INDICES and INDICES[index].unit == "rank correlation"


def differs_by_interval(row: pd.Series) -> bool:
    """Whether a difference's interval leaves 0 out; one without an interval differs where it is not 0."""
    if pd.isna(row["value"]):
        return False
    if pd.isna(row["ci_low"]):
        return bool(row["value"] != 0)
    return bool(row["ci_low"] > 0 or row["ci_high"] < 0)


def is_identical(lines: list[str]) -> bool:
    """Whether every line of a comparison says that a run is the first one again, byte for byte."""
    return bool(lines) and bool(np.all([line.startswith(IDENTICAL) for line in lines]))
