"""The pictures of a run, drawn with seaborn from its tables and from nothing else.

One function per figure: a tidy frame in, a :class:`matplotlib.figure.Figure` out. :func:`draw_figures` writes them all.
Nothing here leaves a setting of matplotlib changed, and the same tables give the same bytes.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from lensbench.errors import LensbenchError
from lensbench.report.figures.frames import (
    accuracy_frame,
    curve_frame,
    distance_frame,
    head_frame,
    index_frame,
    lens_frame,
    pair_frame,
    probe_frame,
    tolerance_frame,
    transfer_frame,
)
from lensbench.report.figures.indices import gain_visibility, plane, tolerances, visibility_by_distance
from lensbench.report.figures.lenses import accuracy_by_layer, kl_by_layer
from lensbench.report.figures.probes import error_transport, probes
from lensbench.report.figures.studies import learning_curves
from lensbench.report.figures.style import DPI, FORMATS, HIGHEST_DPI, LOWEST_DPI, SHEETS, on, style, write_figure
from lensbench.report.figures.transfer import pair_penalty, penalty_by_distance, transfer_penalty
from lensbench.results.folder import Run
from lensbench.results.schema import unit
from lensbench.runtime.files import write_atomically


def draw_figures(
    run: Run, folder: Path, *, formats: Sequence[str] = ("png",), dpi: int = DPI, columns: int | None = None
) -> list[Path]:
    """Write every figure of ``run`` into ``folder`` and return their paths.

    ``formats``: of :data:`FORMATS`; ``dpi`` is that of PNG; ``columns``: 1 or 2, of a paper that they are to fit into.
    All are drawn before the first is written: a table that cannot be drawn leaves the folder as it was.
    """
    if strange := [kind for kind in formats if kind not in FORMATS]:
        raise LensbenchError(f"unknown format {strange[0]!r}; figures are {', '.join(FORMATS)}")
    if not LOWEST_DPI <= dpi <= HIGHEST_DPI:
        raise LensbenchError(f"{dpi} dots per inch: {LOWEST_DPI} to {HIGHEST_DPI} can be drawn")
    if columns not in SHEETS:
        raise LensbenchError(f"{columns} columns: figures are as wide as 1 or 2")
    transfer, lenses, indices = transfer_frame(run), lens_frame(run), index_frame(run)
    of = unit(run.tables["models.csv"])
    with on(SHEETS[columns]), style():
        figures = {
            "transfer_penalty.png": transfer_penalty(transfer, of),
            "kl_by_layer.png": kl_by_layer(lenses, of),
            "penalty_by_distance.png": penalty_by_distance(transfer, of),
            "gain_visibility.png": gain_visibility(indices),
            "plane.png": plane(indices),
            "tolerances.png": tolerances(tolerance_frame(run)),
            "pair_penalty.png": pair_penalty(pair_frame(run), of),
            "visibility_by_distance.png": visibility_by_distance(distance_frame(run)),
        }
        if len(run.tables["probes.csv"]):
            figures["probes.png"] = probes(probe_frame(run), of)
            accuracies = accuracy_frame(run)
            if len(accuracies):
                figures["accuracy_by_layer.png"] = accuracy_by_layer(accuracies)
            heads = head_frame(run)
            if len(heads):
                figures["error_transport.png"] = error_transport(heads)
        if len(run.tables["curves.csv"]):
            figures["learning_curves.png"] = learning_curves(curve_frame(run))
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for name, figure in figures.items():
            for kind in formats:
                paths.append((folder / name).with_suffix(f".{kind}"))
                write_atomically(paths[-1], partial(write_figure, figure, kind=kind, dpi=dpi))
    return paths


def draw_plane(run: Run, path: Path) -> None:
    """Write the plane alone as a PNG."""
    with style():
        figure = plane(index_frame(run))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, partial(write_figure, figure))
