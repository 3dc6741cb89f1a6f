"""A tiny suite on a generated text, run once for all tests that read a run folder."""

import contextlib
import gc
import os
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from helpers.suites import without_figures, write_suite

torch.set_num_threads(1)


def pytest_collection_finish():
    """What is imported by now stays: no collection of garbage goes through it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _one_thread_for_all():
    """Before fixtures of a session too: their runs are compared to the byte with runs of one thread."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_thread():
    """Commands that a test calls set threads of their own, and the same process runs other tests behind it."""
    yield
    torch.set_num_threads(1)


@pytest.fixture
def no_figures():
    with without_figures():
        yield


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory) -> Path:
    """A folder that all processes of a session of tests have in common."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def tiny_suite(shared_folder) -> Path:
    with FileLock(shared_folder / "suite.lock"):
        path = shared_folder / "tiny.toml"
        return path if path.is_file() else write_suite(shared_folder)


@pytest.fixture(scope="session")
def tiny_run(tiny_suite, shared_folder) -> Path:
    """A finished run folder, made by the first process that needs it. Tests must not change it: copy it first."""
    from typer.testing import CliRunner

    from lensbench.cli import app

    folder = shared_folder / "tiny"
    with FileLock(shared_folder / "tiny.lock"):
        if not (folder / "manifest.json").is_file():
            result = CliRunner().invoke(app, ["run", str(tiny_suite), "--out", str(folder)], catch_exceptions=False)
            assert result.exit_code == 0, result.output
    return folder


STANDARD = [Path("results") / "standard" / part for part in ("gpt", "pc", "controls")]


@pytest.fixture(scope="session")
def predictive_comparison():
    """The committed parts of the suite ``predictive-coding``, compared as the command does from the repository's root."""
    from lensbench.report.compare import compare_runs

    with contextlib.chdir(Path(__file__).resolve().parents[1]):
        return compare_runs([Path("results/predictive-coding") / name for name in ("gpt", "pc")])


@pytest.fixture(scope="session")
def standard_comparison():
    """The committed parts of the suite ``standard``, compared as the command does from the root of the repository."""
    from lensbench.report.compare import compare_runs

    with contextlib.chdir(Path(__file__).resolve().parents[1]):
        return compare_runs(STANDARD)
