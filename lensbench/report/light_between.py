"""The light form of a folder of `lensbench transfer-between`: what texts show of its table, and its figure.

Checkpoints, seeds and layers give tens of thousands of rows. The light form has means over layers from 1 on, to four digits.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd

from lensbench.errors import LensbenchError
from lensbench.measures.between import STATES_HEAD
from lensbench.report.figures.between import between_figure
from lensbench.report.figures.style import write_figure
from lensbench.results.between import LATER, TABLE, WHO
from lensbench.results.folder import write_csv
from lensbench.results.manifest import CHECKSUM, write_manifest
from lensbench.results.study_folder import ENDINGS, pack, verified_tables
from lensbench.runtime.files import sha256, write_atomically

FIGURE = "between"
"""Its one figure; of a light form, matrices over training alone"""

SHOWN = ("own_kl", "penalty", "null_penalty", "shared", "same_tokens")
VALUES = tuple(f"{name}{end}" for name in SHOWN for end in ("", "_ci_low", "_ci_high"))
DPI = 120


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
    shown: pd.DataFrame = rows.assign(**rounded)
    return shown


def export_between(source: Path, manifest: Mapping[str, Any], folder: Path, figures: Sequence[str]) -> list[Path]:
    """Write the light form of the folder ``source`` into ``folder``; return the files that it replaces no more.

    ``figures``: :data:`FIGURE`, or none. Raises :class:`LensbenchError` for a table that is not what its manifest names, for
    another figure, and for one that would be empty; then ``folder`` stays as it was.
    """
    if other := [name for name in figures if name != FIGURE]:
        raise LensbenchError(f"{source} has one figure, {FIGURE}, and no {other[0]!r}")
    content = verified_tables(source, manifest)[TABLE]
    rows = light(pd.read_csv(BytesIO(content)))
    if figures and not (rows["kind"] == "training").any():
        raise LensbenchError(f"{source} has no checkpoints of a training: its light form has no figure")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as made:
        written = Path(made)
        write_csv(written / TABLE, rows)
        pack(written / TABLE)
        if figures:
            write_atomically(written / f"{FIGURE}.png", partial(write_figure, between_figure(rows), dpi=DPI))
        files = {path.name: sha256(path) for path in sorted(written.iterdir())}
        folder.mkdir(exist_ok=True)
        earlier = [folder / name for name in (*(f"{TABLE}{end}" for end in ENDINGS), f"{FIGURE}.png")]
        removed = [path for path in earlier if path.is_file() and path.name not in files]
        for path in removed:
            path.unlink()
        for name in files:
            (written / name).replace(folder / name)
    kept = {name: value for name, value in manifest.items() if name != CHECKSUM}
    # The models of the suite are written out in the manifest of its run.
    kept["suite"] = {part: manifest["suite"][part] for part in ("fit", "evaluate")}
    of_the_whole = manifest.get("exported", {"tables": {TABLE: manifest["files"].get(TABLE)}})
    write_manifest(folder, kept | {"files": files, "exported": of_the_whole})
    return removed
