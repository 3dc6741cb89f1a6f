"""An installed wheel finds the suites that come with it, far from any checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_suites_work_from_an_installed_wheel(tmp_path):
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", str(tmp_path / "dist"), str(ROOT)], check=True)
    wheel = next((tmp_path / "dist").glob("lensbench-*.whl"))
    # By name: an editable install beside it would find what the wheel has forgotten.
    with zipfile.ZipFile(wheel) as inside:
        packed = {name for name in inside.namelist() if name.startswith("lensbench/")}
    ours = {p.relative_to(ROOT).as_posix() for p in (ROOT / "lensbench").rglob("*.py")}
    suites = {f"lensbench/{p.relative_to(ROOT).as_posix()}" for p in (ROOT / "benchmarks").glob("*.toml")}
    data = {f"lensbench/report/{name}" for name in ("landmarks.csv", "lensbench.mplstyle")} | {"lensbench/py.typed"}
    data |= {p.relative_to(ROOT).as_posix() for p in (ROOT / "lensbench" / "report" / "templates").iterdir()}
    assert (ours | suites | data) - packed == set()
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    script = (
        "import lensbench; from lensbench.suite.files import load_suite; "
        "print(lensbench.__file__, load_suite('quick').name)"
    )
    run = [sys.executable, "-c", script]
    output = subprocess.run(run, env=environment, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    where, name = output.split()
    assert Path(where).is_relative_to(site)
    assert name == "quick"
