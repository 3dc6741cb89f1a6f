"""Whether the numbers of two runs compare, and which runs do where these two do not."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lensbench.errors import LensbenchError
from lensbench.report.reproduction import other_weights, settings_of_two
from lensbench.results.folder import Run, earlier_manifest
from lensbench.results.manifest import MANIFEST, Manifest

SAME_MEASURE = (
    ("fit", "tolerance"),
    ("fit", "variance"),
    ("fit", "layers"),
    ("evaluate", "first_position"),
    ("evaluate", "length"),
    ("training", "length"),
)
"""Settings without which two numbers of the same name are not the same quantity."""


def refuse_unlike(one: Run, other: Run) -> None:
    """Raise :class:`LensbenchError` where two runs do not measure the same thing: what differs, and what compares."""
    a, b = one.manifest, other.manifest
    if a.sweep is not None or b.sweep is not None:
        raise LensbenchError("a sweep has no lenses to compare: give folders that `lensbench run` wrote")
    unlike = difference_of_measure(a, b)
    if unlike:
        side_by_side = f"`lensbench ruler {one.folder} {other.folder}` shows them side by side"
        told = [f"not the same: {unlike} ({one.folder} and {other.folder}): their numbers do not compare"]
        raise LensbenchError("; ".join([*told, *what_compares(one, other), side_by_side]))


def difference_of_measure(a: Manifest, b: Manifest) -> str:
    """What makes two runs measure different things, by their manifests; empty where nothing does."""
    if a.code_version != b.code_version:
        return f"code versions {a.code_version} and {b.code_version}; run one of them again"
    # A model on two texts can be compared with itself: its differences are those of the texts.
    if not set(a.models) & set(b.models) and (texts := difference_of_texts(a, b)):
        return f"text: {texts}"
    for name, first, second in measures_that_differ(a, b):
        return f"{name} is {first} and {second}"
    for name in sorted({*a.tokenizers} & {*b.tokenizers}):
        # Runs of earlier versions put the token into the first window alone, and do not say so.
        places = [m.tokenizers[name].get("begin", {}).get("begin", "first window") for m in (a, b)]
        if places[0] != places[1] and "every window" in places:
            return f"the beginning-of-text token of {name} stands in {places[0]} and {places[1]}"
    return ""


def measures_that_differ(a: Manifest, b: Manifest) -> Iterator[tuple[str, Any, Any]]:
    """The settings of :data:`SAME_MEASURE` that differ, with both values."""
    for section, key in SAME_MEASURE:
        first, second = (manifest.suite.content().get(section, {}).get(key) for manifest in (a, b))
        if first != second:
            yield f"{section}.{key}", first, second


def difference_of_texts(a: Manifest, b: Manifest) -> str:
    """How the texts of two runs differ; empty where they do not, or where they are those of two versions of Python."""
    if a.corpus.spec != b.corpus.spec:
        return f"{a.corpus.spec} and {b.corpus.spec}"
    if a.corpus.spec != "stdlib" and a.corpus.checksum != b.corpus.checksum:
        return f"{a.corpus.spec} held other documents"
    return ""


def what_compares(one: Run, other: Run) -> list[str]:
    """A command that compares models of two unlike runs, or the settings that would make them alike; empty without either.

    Another folder next to the two may hold the models of one of them, measured as the other is.
    """
    wanted = list(measures_that_differ(one.manifest, other.manifest))
    for given, fixed, value in ((one, other, 2), (other, one, 1)):
        found = stand_in(given, fixed)
        if found is not None:
            folder, models = found
            folders = [folder, fixed.folder] if given is one else [fixed.folder, folder]
            alike = ", ".join(f"{names[0]} {names[value]}" for names in wanted) or "the same settings"
            who = f"{', '.join(models)} and {', '.join(fixed.manifest.models)}"
            return [f"`lensbench compare {folders[0]} {folders[1]}` compares {who}, both measured with {alike}"]
    if not wanted or any(first is None or second is None for _, first, second in wanted):
        return []
    first, second = (" ".join(f"--set {names[0]}={names[k]}" for names in wanted) for k in (2, 1))
    return [f"run the first again with {first}, or the second with {second}, to compare them"]


def stand_in(given: Run, fixed: Run) -> tuple[Path, list[str]] | None:
    """The folder that holds models of ``given`` measured as ``fixed`` is, and these models; None where there is none.

    Of several the one whose settings differ least from those of ``fixed``. Folders next to the two runs are looked at.
    """
    if set(given.manifest.models) & set(fixed.manifest.models):
        return None  # a model on other settings: a third run says nothing of these
    found: list[tuple[int, Path, list[str]]] = []
    for folder in sorted({path for run in (given, fixed) for path in neighbours(run.folder)}):
        manifest = earlier_manifest(folder)
        if manifest is None or manifest.sweep is not None or difference_of_measure(manifest, fixed.manifest):
            continue
        models = [m for m in given.manifest.models if m in manifest.models]
        same = not any(other_weights(given.manifest, manifest, name) for name in models)
        if models and same and not difference_of_texts(manifest, given.manifest):
            found.append((len(settings_of_two(manifest, fixed.manifest, models=False)), folder, models))
    return min(found)[1:] if found else None


def neighbours(folder: Path) -> Iterator[Path]:
    """The other run folders where a run's folder lies."""
    for path in folder.parent.glob(f"*/{MANIFEST}"):
        if path.parent.resolve() != folder.resolve():
            yield path.parent
