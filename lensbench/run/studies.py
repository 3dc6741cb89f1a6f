"""The studies of the command line: each runs, writes its tables, and has its figure drawn next to them."""

from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from lensbench.report.figures import studies as figures
from lensbench.report.figures.style import write_figure
from lensbench.runtime.environment import git_revision, versions
from lensbench.runtime.files import write_atomically
from lensbench.runtime.progress import QUIET, Progress
from lensbench.studies.calibration import Calibration, run_calibration
from lensbench.studies.curves import ALL, names_of
from lensbench.studies.in_context import TABLE, InContext, run_in_context
from lensbench.studies.regression import RegressionRecipe, run_regression
from lensbench.studies.update_calibration import Group, UpdateCalibration, run_update_calibration
from lensbench.studies.update_tokens import UpdateTokens, run_update_tokens


def code_facts() -> dict[str, Any]:
    """What the manifest of a study says of the code that ran."""
    return {"git_revision": git_revision(), "versions": versions()}


def in_context_study(
    recipe: InContext, folder: Path, *, device: torch.device, progress: Progress = QUIET
) -> dict[str, pd.DataFrame]:
    """The tables of :func:`lensbench.studies.in_context.run_in_context`; ``in_context.png`` is drawn in ``folder``."""
    written = run_in_context(recipe, folder, device=device, code=code_facts(), progress=progress)
    parts = written[TABLE][written[TABLE]["positions"] != ALL]
    figure = figures.in_context(parts, names_of(recipe.positions, recipe.training.length))
    write_atomically(folder / "in_context.png", partial(write_figure, figure))
    return written


def regression_study(recipe: RegressionRecipe, folder: Path, *, progress: Progress = QUIET) -> pd.DataFrame:
    """The table of :func:`lensbench.studies.regression.run_regression`; ``regression.png`` is drawn in ``folder``."""
    table = run_regression(recipe, folder, code=code_facts(), progress=progress)
    write_atomically(folder / "regression.png", partial(write_figure, figures.regression(table)))
    return table


def calibration_study(
    recipe: Calibration, folder: Path, *, workers: int, progress: Progress = QUIET
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Streams and summary of :func:`lensbench.studies.calibration.run_calibration`."""
    return run_calibration(recipe, folder, workers=workers, code=code_facts(), progress=progress)


def update_calibration_study(
    recipe: UpdateCalibration, folder: Path, *, workers: int, groups: tuple[Group, ...], progress: Progress = QUIET
) -> dict[str, pd.DataFrame]:
    """The tables of :func:`lensbench.studies.update_calibration.run_update_calibration`."""
    return run_update_calibration(recipe, folder, workers=workers, groups=groups, code=code_facts(), progress=progress)


def update_tokens_study(
    recipe: UpdateTokens, folder: Path, *, workers: int, up_to: int | None = None, progress: Progress = QUIET
) -> dict[str, pd.DataFrame]:
    """The tables of :func:`lensbench.studies.update_tokens.run_update_tokens`."""
    return run_update_tokens(recipe, folder, workers=workers, up_to=up_to, code=code_facts(), progress=progress)
