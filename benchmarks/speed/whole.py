"""What a whole run takes, stage by stage, next to what was predicted of it: ``python -m benchmarks.speed.whole``.

For each preset ``lensbench run pretrained`` runs into a fresh folder, in a process of its own, after ``--dry-run`` has
predicted it on the same machine. ``whole.csv`` has a row for each stage: the seconds that it took, those predicted, and the
floor, which is what the passes of the model alone take at the measured rate of matrix products. The last row of a preset is
the whole command, with what imports, tables and figures take, the peak memory of the process, and the rates of products
that the prediction rests on, GFLOP/s.
"""

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.speed.agreement import launched
from benchmarks.speed.task import Ledger, console, refusals, say, write_description
from lensbench.results.manifest import MANIFEST
from lensbench.run.forecast import Forecast, forecast
from lensbench.runtime.environment import choose_device, git_revision, hardware, versions
from lensbench.runtime.texts import read_json
from lensbench.suite.changes import Changes

WHOLE = "the whole command"


def stage_rows(predicted: Forecast, took: dict[str, float]) -> list[dict[str, Any]]:
    """A row for each stage that was predicted or took time: seconds, those predicted, and the floor."""
    expected = {stage.name: stage for stage in predicted.stages}
    rows = []
    for name in dict.fromkeys([*expected, *took]):
        stage = expected.get(name)
        rows.append(
            {
                "stage": name,
                "seconds": took.get(name),
                "predicted": None if stage is None else stage.seconds,
                "floor": None if stage is None else stage.floor,
            }
        )
    return rows


def run_preset(preset: str, arguments: list[str], changes: Changes, folder: Path, device: str) -> list[dict[str, Any]]:
    """Predict and run one preset; the rows of ``whole.csv``."""
    predicted = forecast(changes.of("pretrained"), folder, device=torch.device(device))
    start = time.perf_counter()
    launched(["run", "pretrained", "--preset", preset, *arguments, "--out", str(folder)], threads=None)
    whole = time.perf_counter() - start
    manifest = read_json(folder / MANIFEST)
    rows = stage_rows(predicted, manifest["seconds"])
    sums = {name: sum(row[name] or 0.0 for row in rows) for name in ("predicted", "floor")}
    rates = next(iter(predicted.rates.values()))
    measured = {
        "peak_gib": manifest["peak_gib"],
        "model_gflops": rates.model / 1e9,
        "double_gflops": rates.double / 1e9,
    }
    rows.append({"stage": WHOLE, "seconds": whole, **sums, **measured})
    return [{"preset": preset, **row} for row in rows]


def main(
    out: Annotated[Path, typer.Option(help="Folder for the tables.")] = Path("runs/speed/whole"),
    presets: Annotated[str, typer.Option(help="Which, separated by commas.")] = "glance,default",
    model: Annotated[str | None, typer.Option(help="Source of the model; left out, the suite's.")] = None,
    text: Annotated[
        str | None, typer.Option(help="Corpus: stdlib, file:PATH or hf:NAME; left out, the suite's.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    setting: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE of the suite that runs.")] = None,
) -> None:
    """Measure, print and write whole.csv and whole.json into OUT; presets that are there are not run again."""
    with refusals():
        place = str(choose_device(device))
        ledger = Ledger(out / "whole.csv", ("preset", "stage"))
        for preset in presets.split(","):
            if len(ledger.at(preset=preset, stage=WHOLE)):
                say(f"{preset}: done before")
                continue
            changes = Changes(preset, (model,) if model else (), text, settings=tuple(setting or ()))
            given = ["--device", place] if device != "auto" else []
            given += [
                word for name, value in (("--model", model), ("--corpus", text)) if value for word in (name, value)
            ]
            given += [word for change in setting or () for word in ("--set", change)]
            for row in run_preset(preset, given, changes, out / "work" / preset, place):
                ledger.add(**row)
            total = ledger.at(preset=preset, stage=WHOLE).iloc[0]
            numbers = [f"{total[name]:.0f}" for name in ("seconds", "predicted", "floor")]
            say(f"{preset}: {numbers[0]} s, {numbers[1]} predicted, {numbers[2]} of them passes of the model")
        described = {
            "model": model or "the suite's", "text": text or "the suite's", "device": place, "settings": list(setting or ()),
            "hardware": hardware(torch.device(place)), "versions": versions(), "git_revision": git_revision(),
        }  # fmt: skip
        write_description(out, "whole", described)
    console.print(ledger.rows().to_string(index=False), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
