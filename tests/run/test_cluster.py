"""A suite over a Ray cluster ends as it would have ended by itself, also when a worker is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.commands import csv_bytes, refused, run

from lensbench.results import folder
from lensbench.run.cluster import cluster_tasks
from lensbench.run.context import Context
from lensbench.runtime.environment import choose_device
from lensbench.runtime.stages import Stages
from lensbench.suite.files import load_suite

pytestmark = pytest.mark.run

ROOT = Path(__file__).resolve().parents[2]
ray = pytest.importorskip("ray", reason="needs pip install -e '.[ray]'")


def workers() -> list[int]:
    """Processes of Ray that are at work on one of our tasks, and belong to this test's own cluster."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes()
            ours = f"LENSBENCH_TEST={os.getpid()}".encode() in (entry / "environ").read_bytes()
        except (OSError, ValueError):
            continue
        if words.startswith(b"ray::task-") and ours:
            found.append(int(entry.name))
    return found


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds workers in /proc")
def test_a_killed_workers_task_is_retried_and_every_table_is_that_of_a_local_run(tiny_suite, tiny_run, tmp_path):
    out = tmp_path / "run"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "LENSBENCH_TEST": str(os.getpid())}
    command = [sys.executable, "-m", "lensbench", "run", str(tiny_suite), "--out", str(out), "--ray"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        killed, until = [], time.monotonic() + 200
        while not killed and time.monotonic() < until and process.poll() is None:
            begun = list((out / "stages").glob("*.partial")) if (out / "stages").is_dir() else []
            if begun and (at_work := workers()):
                os.kill(at_work[0], signal.SIGKILL)
                killed = at_work
            time.sleep(0.05)
        output = "".join(process.communicate(timeout=200))
    assert killed, output
    assert process.returncode == 0, output
    assert "task-gpt-seed0: finished after" in output
    assert "train-gpt-seed0: reused" in output
    assert csv_bytes(out) == csv_bytes(tiny_run)
    assert (out / folder.SUMS).read_bytes() == (tiny_run / folder.SUMS).read_bytes()


def test_models_that_share_a_training_are_one_task_and_every_seed_is_its_own(tiny_suite, tmp_path):
    suite = load_suite(str(tiny_suite)).model_copy(update={"seeds": (0, 3)})
    context = Context(suite, Stages(tmp_path / "stages"), choose_device("cpu"))
    tasks = cluster_tasks(context, list(suite.models))
    assert {(t.models, t.seed) for t in tasks} == {(m, s) for m in (("gpt",), ("pc", "pc+state")) for s in (0, 3)}
    view = [m for m in suite.models if m.name == "pc+state"]
    assert [t.models for t in cluster_tasks(context, view)] == [("pc+state",)] * 2


def test_what_a_user_can_mend_in_a_task_or_of_a_cluster_is_one_line(tiny_suite, tmp_path):
    refused(run("run", tiny_suite, "--out", tmp_path / "run", "--ray", "127.0.0.1:1"), "no Ray cluster at 127.0.0.1:1")
    diverging = tmp_path / "diverging.toml"
    diverging.write_text(tiny_suite.read_text().replace("tokens = 8_192", "tokens = 8_192\nlearning_rate = 1e30"))
    result = run("run", diverging, "--out", tmp_path / "diverged", "--ray")
    refused(result, "training diverges" if "training diverges" in result.output else "learning_rate")
