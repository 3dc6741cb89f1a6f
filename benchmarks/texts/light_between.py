"""``python -m benchmarks.texts.light_between FOLDER LIGHT``: what of a folder of ``lensbench transfer-between`` texts show.

Checkpoints, seeds and layers give tens of thousands of rows. The light form has means over layers from 1 on, to four digits.
"""

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from lensbench.errors import LensbenchError
from lensbench.measures.between import STATES_HEAD
from lensbench.report.export import pack
from lensbench.report.figures.between import between_figure
from lensbench.report.figures.style import write_figure
from lensbench.results.between import LATER, TABLE, WHO
from lensbench.results.folder import write_csv
from lensbench.results.manifest import MANIFEST, write_manifest
from lensbench.runtime.files import sha256, write_atomically

FIGURE = "between.png"
SHOWN = ("own_kl", "penalty", "null_penalty", "shared", "same_tokens")
VALUES = tuple(f"{name}{end}" for name in SHOWN for end in ("", "_ci_low", "_ci_high"))
DPI = 80


def light(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of ``between.csv`` that a text shows: means over the later layers.

    Between checkpoints in the middle of a training those that the states' own head reads, over seeds alone; with the end of
    a training, on which claims are tested, through both heads and of each seed; of pairs of seeds and of sizes all.
    """
    table = table[table["states_layer"].astype(str) == LATER]
    end = table["lens_tokens"].max()
    ends = (table["kind"] != "training") | (table["lens_tokens"] == end) | (table["states_tokens"] == end)
    ends |= (table["head"] == STATES_HEAD) & (table["lens_seed"].astype(str) == "all")
    rows = table[ends].reindex(columns=[*WHO, *VALUES, "tokens", "clusters"])
    rounded = {name: [float(f"{x:.4g}") if np.isfinite(x) else x for x in rows[name].astype(float)] for name in VALUES}
    return rows.assign(**rounded)


def write_light(source: Path, folder: Path) -> None:
    """Write table, figure (over time) and manifest of the light form.

    Raises :class:`LensbenchError` for a table that was changed.
    """
    manifest = json.loads((source / MANIFEST).read_text())
    if (whole := sha256(source / TABLE)) != manifest["files"][TABLE]:
        raise LensbenchError(f"{source / TABLE} is not the table that its manifest names")
    folder.mkdir(parents=True, exist_ok=True)
    rows = light(pd.read_csv(source / TABLE))
    write_csv(folder / TABLE, rows)
    pack(folder / TABLE)
    names = [f"{TABLE}.xz"]
    if (rows["kind"] == "training").any():
        write_atomically(folder / FIGURE, partial(write_figure, between_figure(rows), dpi=DPI))
        names.append(FIGURE)
    content = {name: value for name, value in manifest.items() if name != "checksum"}
    # The models of the suite are written out in the manifest of its run.
    content["suite"] = {part: manifest["suite"][part] for part in ("fit", "evaluate")}
    content |= {"files": {name: sha256(folder / name) for name in names}, "exported": {"tables": {TABLE: whole}}}
    write_manifest(folder, content)


if __name__ == "__main__":
    write_light(Path(sys.argv[1]), Path(sys.argv[2]))
