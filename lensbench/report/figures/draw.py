"""Every figure of a run, drawn from its tables and from nothing else.

A figure is a function in a file of this package: a tidy frame in, a :class:`matplotlib.figure.Figure` out. See
:mod:`lensbench.report.figures.registry`. The same tables give the same bytes, and no setting of matplotlib is changed.
"""

import difflib
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib import import_module
from itertools import repeat
from pathlib import Path
from pkgutil import iter_modules
from tempfile import TemporaryDirectory

from matplotlib.figure import Figure

from lensbench.errors import LensbenchError
from lensbench.report import figures
from lensbench.report.figures.plane import plane, plane_frame
from lensbench.report.figures.registry import FIGURES
from lensbench.report.figures.style import DPI, FORMATS, HIGHEST_DPI, LOWEST_DPI, SHEETS, on_sheet, style, write_figure
from lensbench.results.folder import Run
from lensbench.runtime.files import write_atomically
from lensbench.runtime.processes import new_processes

for module in iter_modules(figures.__path__, f"{figures.__name__}."):
    if module.name != __name__:
        import_module(module.name)  # each registers its figures


def draw_figures(
    run: Run,
    folder: Path,
    *,
    formats: Sequence[str] = ("png",),
    dpi: int = DPI,
    columns: int | None = None,
    names: Sequence[str] | None = None,
) -> list[Path]:
    """Write every figure that the tables of ``run`` allow into ``folder``; return the paths, in the order of names.

    ``formats``: of :data:`FORMATS`; ``dpi``: dots per inch of PNG; ``columns``: 1 or 2 columns of a paper that the figures
    fit into, or None for a screen. ``names``: the figures to draw; None: all. All are drawn before the first is written.

    Raises :class:`LensbenchError` for an unknown format, size or name, and for a table that cannot be drawn: then the
    folder stays as it was.
    """
    check_drawing(names, formats, dpi, columns)
    with on_sheet(SHEETS[columns]), style():
        found = {name: FIGURES[name].of_run(run) for name in sorted(FIGURES if names is None else names)}
        if names is not None and (empty := [name for name in names if found[name] is None]):
            raise LensbenchError(f"{run.folder} has nothing to draw in figure {empty[0]!r}")
        return _written(found, folder, formats, dpi)


def draw_side_by_side(run: Run, folder: Path, processes: int) -> list[Path]:
    """:func:`draw_figures` with several processes, each of which draws a share of the figures."""
    if processes == 1:
        return draw_figures(run, folder)
    folder.mkdir(parents=True, exist_ok=True)
    shares = [sorted(FIGURES)[k::processes] for k in range(processes)]
    with (
        TemporaryDirectory(prefix=".", dir=folder) as aside,
        ProcessPoolExecutor(processes, mp_context=new_processes()) as pool,
    ):
        drawn = [path for part in pool.map(_draw_share, repeat(run), repeat(Path(aside)), shares) for path in part]
        return [path.replace(folder / path.name) for path in sorted(drawn)]


def _draw_share(run: Run, folder: Path, names: Sequence[str]) -> list[Path]:
    """Write those of the named figures that the tables allow; returns the paths."""
    with style():
        return _written({name: FIGURES[name].of_run(run) for name in names}, folder)


def _written(
    found: Mapping[str, Figure | None], folder: Path, formats: Sequence[str] = ("png",), dpi: int = DPI
) -> list[Path]:
    """The paths of figures, written under their names; None stands for one that the tables do not allow."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, drawing in found.items():
        if drawing is None:
            continue
        for kind in formats:
            paths.append(folder / f"{name}.{kind}")
            write_atomically(paths[-1], partial(write_figure, drawing, kind=kind, dpi=dpi))
    return paths


def check_drawing(
    names: Sequence[str] | None = None,
    formats: Sequence[str] = ("png",),
    dpi: int = DPI,
    columns: int | None = None,
) -> None:
    """Raise :class:`LensbenchError` for an unknown name, format or size of figures, before anything is read or drawn."""
    if missing := [name for name in names or () if name not in FIGURES]:
        close = difflib.get_close_matches(missing[0], FIGURES, n=1)
        hint = f"did you mean {close[0]}?" if close else f"figures are {', '.join(sorted(FIGURES))}"
        raise LensbenchError(f"there is no figure {missing[0]!r}; {hint}")
    if unknown := [kind for kind in formats if kind not in FORMATS]:
        raise LensbenchError(f"unknown format {unknown[0]!r}; figures are {', '.join(FORMATS)}")
    if not LOWEST_DPI <= dpi <= HIGHEST_DPI:
        raise LensbenchError(f"{dpi} dots per inch: give {LOWEST_DPI} to {HIGHEST_DPI}")
    if columns not in SHEETS:
        raise LensbenchError(f"{columns} columns: figures are as wide as 1 or 2; give 1 or 2")


def draw_plane(run: Run, path: Path) -> None:
    """Write the plane of all models alone, as a PNG."""
    with style():
        figure = plane(plane_frame(run))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, partial(write_figure, figure))
