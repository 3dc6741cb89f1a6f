"""Is a result the same wherever it was computed? ``python -m benchmarks.speed.agreement --processes 2,4 --ray``

The small suite's models are trained once, here; their lenses are then fitted, scored and probed by one process on the CPU
(the reference), by several processes and over a Ray cluster. ``agreement.csv`` has for each way and kind of number the
largest difference from the reference; exit code 1 where one is beyond its tolerance. ``benchmarks.speed.gpu`` does the same
with a GPU.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import torch
import typer
from rich.table import Table

from benchmarks.speed.task import console, numbers_of, refusals, say, write_description, write_table
from lensbench.errors import LensbenchError
from lensbench.lenses.fit import Fit
from lensbench.results.folder import read_run
from lensbench.runtime.environment import git_revision, hardware, versions

SUITE = Path("benchmarks/speed/small.toml")
TOLERANCES = {
    # Largest difference relative to the number, or to what FLOORS says where the number is smaller.
    "processes": {"closed-form maps": 1e-6, "matrices": 1e-6, "closed-form lenses": 1e-6, "refined lenses": 0.05},
    "ray": dict.fromkeys(
        (
            "closed-form maps", "matrices", "closed-form lenses", "refined lenses", "indices", "update decomposition",
            "probes",
        ),
        0.0,
    ),
}  # fmt: skip
FLOORS = {"indices": 0.1, "update decomposition": 0.1}
"""Kind of number -> what a difference is relative to where the number is smaller; of others a hundredth"""


def launched(arguments: list[str], processes: int = 1, threads: int | None = 1) -> None:
    """A run of the command line in processes of its own; raises :class:`LensbenchError` with what it said where it fails.

    ``threads`` of each; None: as many as torch takes.
    """
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *start, "-m", "lensbench", *arguments]
    environment = os.environ if threads is None else {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        told = [line for line in done.stderr.splitlines() if line.startswith("lensbench: ")] or done.stderr.splitlines()
        raise LensbenchError(f"{' '.join(arguments)}: {told[-1] if told else done.returncode}")


def numbers(folder: Path) -> dict[str, np.ndarray]:
    """What a run measured, by kind, each as one array of numbers in the order of its rows."""
    run = read_run(folder)

    def flat(table: pd.DataFrame) -> np.ndarray:
        columns = [c for c in table if pd.api.types.is_numeric_dtype(table[c])]
        return table[columns].to_numpy(float).ravel()

    lenses = run.tables["lenses.csv"]
    kinds = {
        "matrices": np.concatenate([flat(run.tables[n]) for n in ("transfer.csv", "tolerances.csv", "pairs.csv")]),
        "closed-form lenses": flat(lenses[lenses["stage"] != "refined"]),
        "refined lenses": flat(lenses[lenses["stage"] == "refined"]),
        "indices": flat(run.tables["indices.csv"]),
        "update decomposition": np.concatenate([flat(run.tables[n]) for n in ("update.csv", "blocks.csv")]),
        "probes": flat(run.tables["probes.csv"]),
    }
    norms = []
    for stage in sorted((folder / "stages").glob("fit-*")):
        fit = Fit.load(stage)
        closed = [lens for lens in fit.lenses if lens.stage == "closed" and lens.view < 0 and lens.refit < 0]
        for maps in (fit[lens].maps for lens in sorted(set(closed) - set(fit.summary.curve()))):
            norms += [maps.matrix.double().numpy().ravel(), maps.offset.double().numpy().ravel()]
    kinds["closed-form maps"] = np.concatenate(norms)
    return kinds


def trained_models(out: Path) -> list[str]:
    """What asks the command line for a run of the small suite's models, which are first trained on the CPU."""
    trained = out / "trained"
    launched(["run", str(SUITE), "--out", str(trained), "--device", "cpu"])
    models = sorted((trained / "stages").glob("train-*"))
    return ["run", str(SUITE), *(word for m in models for word in ("--model", f"path:{m}"))]


def measured(asked: list[str], out: Path, name: str, *more: str, processes: int = 1) -> Path:
    """The folder of a run that is made anew."""
    folder = out / name.replace(" ", "-")
    shutil.rmtree(folder, ignore_errors=True)
    launched([*asked, "--out", str(folder), *(more or ("--device", "cpu"))], processes)
    return folder


def differences(way: str, reference: Path, folder: Path, tolerances: Mapping[str, float]) -> list[dict[str, object]]:
    """A row per kind of number."""
    rows = []
    ours, theirs = numbers(folder), numbers(reference)
    for name, x in theirs.items():
        y = ours[name]
        row: dict[str, object] = {"way": way, "numbers": name, "count": len(x)}
        if len(x) != len(y) or (np.isnan(x) != np.isnan(y)).any():
            rows.append({**row, "agrees": False, "note": "other rows"})
            continue
        apart = np.abs(x - y)
        if name == "closed-form maps":  # a map as a whole: its small entries are sums of large ones
            relative = float(np.linalg.norm(x - y) / np.linalg.norm(x))
        else:
            relative = float(np.nanmax(apart / np.maximum(np.abs(x), FLOORS.get(name, 1e-2)), initial=0))
        allowed = tolerances.get(name)
        row |= {"largest_difference": float(np.nanmax(apart, initial=0)), "largest_relative": relative}
        row |= {"tolerance": allowed, "agrees": allowed is None or relative <= allowed, "note": ""}
        rows.append(row)
    return rows


def main(
    processes: Annotated[str, typer.Option(help="Numbers of processes, separated by commas.")] = "2,4",
    ray: Annotated[bool, typer.Option("--ray", help="Also over a Ray cluster on this machine.")] = False,
    out: Path = Path("runs/agreement"),
) -> None:
    """Measure, print and write agreement.csv and agreement.json into OUT."""
    revision = git_revision()
    with refusals():
        say("training the models")
        asked = trained_models(out)
        reference = measured(asked, out, "one process")
        rows: list[dict[str, object]] = []
        for count in numbers_of(processes):
            name = f"{count} processes"
            say(name)
            rows += differences(name, reference, measured(asked, out, name, processes=count), TOLERANCES["processes"])
        if ray:
            say("ray")
            rows += differences(
                "ray", reference, measured(asked, out, "ray", "--device", "cpu", "--ray"), TOLERANCES["ray"]
            )
        table = pd.DataFrame(rows)
        write_table(out / "agreement.csv", table, "%.3g")
        write_description(
            out,
            "agreement",
            {"hardware": hardware(torch.device("cpu")), "versions": versions(), "git_revision": revision},
        )
    shown = Table(*(c.replace("_", " ") for c in table), title="largest difference from one process on the CPU")
    for row in table.itertuples(index=False):
        shown.add_row(*("" if pd.isna(v) else f"{v:.2g}" if isinstance(v, float) else str(v) for v in row))
    console.print(shown)
    if (table.get("agrees") == False).any():  # noqa: E712  (a column of True, False and missing)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
