"""Probes of which two runs hold different versions: their quantities have one name and are not the same number."""

from dataclasses import replace

from lensbench.results.folder import Run

TABLE = "probes.csv"


def of_one_version(runs: list[Run]) -> tuple[list[Run], list[str]]:
    """The runs without the quantities of probes whose versions differ between them, and a line for each such probe."""
    found: dict[str, set[int]] = {}
    for run in runs:
        for probe in run.tables[TABLE]["probe"].unique():
            found.setdefault(str(probe), set()).add(run.manifest.probe_versions.get(str(probe), 1))
    unlike = {probe: sorted(versions) for probe, versions in found.items() if len(versions) > 1}
    lines = [
        f"probe {probe} is left out: the runs hold its versions {' and '.join(map(str, versions))}; run the older again"
        for probe, versions in unlike.items()
    ]
    kept = [run.tables[TABLE]["probe"].isin(list(unlike)) for run in runs]
    return [
        replace(run, tables=run.tables | {TABLE: run.tables[TABLE][~out].reset_index(drop=True)})
        for run, out in zip(runs, kept, strict=True)
    ], lines
