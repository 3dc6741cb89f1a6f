"""The light form of a run folder: tables, sums by cluster, manifest, and the figures that a text shows.

``results/`` holds folders of this form. Every figure and the page of a run are made again from it, and it is compared as the
run itself is: nothing but what can be made again is left out.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lensbench.errors import LensbenchError
from lensbench.report.figures.draw import check_drawing, draw_figures
from lensbench.report.light_between import export_between
from lensbench.report.verdicts import judged, rule_of
from lensbench.results.between import TABLE
from lensbench.results.draws import kept_draws
from lensbench.results.folder import (
    GZIPPED,
    NO_SUMS,
    PACKED,
    PAGE,
    SEQUENCES,
    STAGES,
    SUMS,
    UPDATE_DRAWS,
    Run,
    owner_of,
    plain_name,
    read_run,
    write_sums,
    write_table,
    write_update_draws,
)
from lensbench.results.manifest import MANIFEST, ExportFacts, Manifest, write_manifest
from lensbench.results.schema import SCHEMA
from lensbench.results.study_folder import LONG, export_study, pack, study_manifest
from lensbench.results.sums import compared_sums, summed_by_cluster
from lensbench.runtime.files import sha256
from lensbench.statistics import FEWEST_CLUSTERS

LONG_TABLES = (
    "lenses.csv", "transfer.csv", "tolerances.csv", "pairs.csv", "update.csv", "distances.csv", "variants.csv",
    "landmarks.csv", "probes.csv",
)  # fmt: skip
"""Tables that are packed; what a reader looks at first (indices, blocks, verdicts, models) stays plain while it is short."""

FIGURES = "figures"
"""The folder of figures in a run folder"""


def export_run(
    source: Path, folder: Path, *, figures: Sequence[str] = (), groups: int | None = None, sums: bool = True
) -> list[Path]:
    """Write the light form of the finished run in ``source`` into ``folder``; return the files that it replaces no more.

    ``figures``: names of those to draw, without suffix. ``groups``: more clusters than this are joined at random; None: as
    many as the run has. Without ``sums`` the sums by cluster and the draws of the decomposition, most of the bytes, are left
    out: tables keep their intervals, but `lensbench compare` cannot read the folder. Verdicts are made again from the other
    tables by the run's own rule, so that an older run says them in today's words. An earlier export of the same suite is
    replaced as a whole; files that no run names stay. Of a study or a sweep, tables alone are written
    (:func:`export_study`), of lenses between models what texts show (:func:`export_between`).

    Raises :class:`LensbenchError` for a folder that holds nothing finished, for a ``folder`` that holds something else, or
    stages of a run, and for a figure that the run does not have. Then ``folder`` stays as it was.
    """
    if groups is not None and groups < FEWEST_CLUSTERS:
        raise LensbenchError(
            f"--groups {groups}: with fewer than {FEWEST_CLUSTERS} clusters, intervals are not to be trusted; give "
            f"--groups {FEWEST_CLUSTERS} or more"
        )
    if (study := study_manifest(source)) is not None:
        return export_study_folder(source, study, folder, figures=figures, grouped=groups is not None)
    check_drawing(names=figures)
    run = read_run(source)
    if "verdicts.csv" in run.manifest.checksums:
        run = judged(run, rule_of(run))
    refuse_other(folder, run.manifest.suite_name)
    if sums and run.manifest.exported is not None and run.manifest.exported.sums == NO_SUMS:
        raise LensbenchError(f"{source} was exported with --no-sums and has no sums to export: give --no-sums again")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as made:
        light = Path(made) / "light"
        write_light(run, light, figures, groups, sums)
        written = [path.relative_to(light) for path in sorted(light.rglob("*")) if path.is_file()]
        removed = [path for path in files_of_a_run(folder) if path not in written]
        for path in removed:
            (folder / path).unlink()
        for path in sorted(written, key=lambda path: path.name == MANIFEST):  # the manifest last: it says what is there
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (light / path).replace(folder / path)
    if (folder / FIGURES).is_dir() and not any((folder / FIGURES).iterdir()):
        (folder / FIGURES).rmdir()
    return [folder / path for path in removed]


def export_study_folder(
    source: Path, study: Mapping[str, Any], folder: Path, *, figures: Sequence[str], grouped: bool
) -> list[Path]:
    """Write the light form of a study, a sweep, or lenses between models; as :func:`export_run`."""
    between = TABLE in map(plain_name, study["files"])
    if grouped or (figures and not between):
        what = "lenses between models" if between else "a sweep" if "schema_version" in study else "a study"
        without = "no clusters to join" if between else "neither figures nor clusters to choose"
        raise LensbenchError(f"{source} holds {what}, with {without}: export it as it is")
    refuse_other(folder, owner_of(source) or "")
    return export_between(source, study, folder, figures) if between else export_study(source, study, folder)


def refuse_other(folder: Path, suite: str) -> None:
    """Raise :class:`LensbenchError` where an export of the suite must not go into ``folder``."""
    if folder.exists() and not folder.is_dir():
        raise LensbenchError(f"{folder} is a file; name a folder")
    if (folder / STAGES).exists():
        raise LensbenchError(f"{folder} holds the stages of a run, not its light form; name another folder")
    if folder.is_dir() and any(folder.iterdir()) and owner_of(folder) != suite:
        raise LensbenchError(f"{folder} holds something else than a run of suite {suite!r}; name another folder")


def files_of_a_run(folder: Path) -> list[Path]:
    """What a run or an export may have written into ``folder``, relative to it."""
    names = [
        *(f"{name}{end}" for name in SCHEMA for end in ("", PACKED, GZIPPED)),
        SUMS,
        SEQUENCES,
        UPDATE_DRAWS,
        MANIFEST,
        PAGE,
    ]
    found = [Path(name) for name in names]
    if (folder / MANIFEST).is_file():
        found += [Path(FIGURES) / name for name in read_run(folder, verify=False).manifest.figures]
    return [path for path in found if (folder / path).is_file()]


def write_light(run: Run, light: Path, figures: Sequence[str], groups: int | None, sums: bool) -> None:
    """Write the light form of ``run`` into the new folder ``light``."""
    light.mkdir()
    tables = {name: run.tables[name] for name in SCHEMA if name in run.manifest.checksums}
    for name, table in tables.items():
        write_table(light, name, table)
    checksums = {name: sha256(light / name) for name in tables}
    for name in tables:
        if name in LONG_TABLES or (light / name).stat().st_size > LONG:
            pack(light / name)
    made_of = write_light_sums(run, light, groups) if sums else NO_SUMS
    if sums and (run.folder / UPDATE_DRAWS).is_file():
        write_update_draws(light / UPDATE_DRAWS, kept_draws(run.update_draws()))
    files = {path.name: sha256(path) for path in sorted(light.iterdir())}
    exported = ExportFacts(tables=checksums, sums=made_of)
    manifest = Manifest.model_validate(run.manifest.content() | {"files": files, "exported": exported.content()})
    write_manifest(light, manifest)
    # Drawn from what is written, as a reader will.
    drawn = draw_figures(read_run(light), light / FIGURES, names=figures) if figures else []
    write_manifest(light, manifest.model_copy(update={"figures": [path.name for path in drawn]}))


def write_light_sums(run: Run, light: Path, groups: int | None) -> str:
    """Write ``cluster_sums.parquet`` of a run; return what it was made of, in words."""
    name = SUMS if (run.folder / SUMS).is_file() else SEQUENCES
    joined = "" if groups is None else f", more than {groups} clusters joined at random"
    if name == SUMS and groups is None:
        shutil.copyfile(run.folder / name, light / SUMS)
        return run.manifest.exported.sums if run.manifest.exported else f"{name} as the run wrote it"
    write_sums(light / SUMS, compared_sums(summed_by_cluster(run.sums(), groups)))
    return f"{name} (SHA-256 {sha256(run.folder / name)}) summed by cluster and rounded{joined}; nothing was run again"
