"""Several models at once: every table is that of a run of one process, also after a worker is killed."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from helpers.commands import csv_bytes, refused, run
from helpers.suites import write_suite

from lensbench.results import folder
from lensbench.run.capturing import KEPT, KeptCaptures, captured_states
from lensbench.run.context import Cache, Context
from lensbench.run.inputs import data_of
from lensbench.run.origin import origin_of, stream_of
from lensbench.run.workers import Worker, Workers, models_at_once
from lensbench.runtime.environment import choose_device
from lensbench.runtime.stages import Stages
from lensbench.suite.files import load_suite

ROOT = Path(__file__).resolve().parents[2]


def children(of: int) -> list[int]:
    """Processes that compute for a process: they are forked from one that it has started, which has imported."""
    parents = {}
    for entry in Path("/proc").iterdir():
        try:
            words, stat = (entry / "cmdline").read_bytes(), (entry / "stat").read_text()
        except (OSError, ValueError):
            continue
        if b"forkserver" in words:
            parents[int(entry.name)] = int(stat.rsplit(")", 1)[1].split()[1])
    return [process for process, parent in parents.items() if parents.get(parent) == of]


def command(tiny_suite, out):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "lensbench", "run", str(tiny_suite), "--out", str(out), "--workers", "2"]
    return {"args": words, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}


@pytest.mark.run
def test_two_models_at_once_give_the_tables_of_one_process_and_each_stage_is_told_once(tiny_suite, tiny_run, tmp_path):
    out = tmp_path / "run"
    ended = subprocess.run(**command(tiny_suite, out), timeout=300, check=False)
    assert ended.returncode == 0, ended.stdout
    assert "2 models are computed at once" in ended.stdout
    assert csv_bytes(out) == csv_bytes(tiny_run)
    assert (out / folder.SUMS).read_bytes() == (tiny_run / folder.SUMS).read_bytes()
    for stage in (out / "stages").iterdir():
        if stage.is_dir() and (stage / "stage.json").is_file():
            assert ended.stdout.count(f"{stage.name}: done in") == 1, ended.stdout
    assert not (out / "states").exists()


@pytest.mark.run
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds workers in /proc")
def test_a_killed_worker_is_told_and_the_same_command_goes_on(tiny_suite, tiny_run, tmp_path):
    out = tmp_path / "run"
    with subprocess.Popen(**command(tiny_suite, out)) as process:
        until, killed = time.monotonic() + 200, []
        while not killed and time.monotonic() < until and process.poll() is None:
            if list((out / "stages").glob("train-*.partial")) and (killed := children(process.pid)):
                os.kill(killed[0], signal.SIGKILL)
            time.sleep(0.05)
        output = "".join(filter(None, process.communicate(timeout=200)))
    assert killed, output
    assert process.returncode == 2, output
    assert "its process was ended by signal 9" in output
    assert "--workers 1" in output
    assert not children(process.pid)
    ended = subprocess.run(**command(tiny_suite, out), timeout=300, check=False)
    assert ended.returncode == 0, ended.stdout
    assert csv_bytes(out) == csv_bytes(tiny_run)


@dataclass(frozen=True)
class Endless:
    """A task that does not end by itself, in the place of a :class:`lensbench.run.cluster.ClusterTask`."""

    name: str = "task-endless"

    def compute(self, known: Cache) -> None:
        time.sleep(600)


def alive(process: int) -> bool:
    try:
        return (Path("/proc") / str(process) / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.run
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_a_worker_ends_in_the_middle_of_its_task_when_the_run_is_killed(method, tmp_path):
    script = (
        "import time\n"
        "from multiprocessing import get_context\n"
        "from lensbench.run import workers\n"
        "from run.test_workers import Endless\n"
        "if __name__ == '__main__':\n"
        f"    workers.new_processes = lambda: get_context({method!r})\n"
        "    started = [workers.Worker.started() for _ in range(2)]\n"
        "    for worker in started: worker.begin(Endless(), None)\n"
        "    print(*(worker.process.pid for worker in started), flush=True)\n"
        "    time.sleep(600)\n"
    )
    (tmp_path / "script.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    words = [sys.executable, tmp_path / "script.py"]
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        started = [int(word) for word in process.stdout.readline().split()]
        assert len(started) == 2
        time.sleep(1)
        assert all(map(alive, started))
        process.kill()
    until = time.monotonic() + 60  # one that has not yet imported everything ends when it has
    while any(map(alive, started)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(map(alive, started))


@pytest.mark.run
def test_what_a_user_can_mend_in_a_worker_is_one_line(tiny_suite, tmp_path):
    diverging = tmp_path / "diverging.toml"
    diverging.write_text(tiny_suite.read_text().replace("tokens = 8_192", "tokens = 8_192\nlearning_rate = 1e30"))
    ended = subprocess.run(**command(diverging, tmp_path / "run"), timeout=300, check=False)
    assert ended.returncode == 2
    assert "training diverges" in ended.stdout or "learning_rate" in ended.stdout
    assert "Traceback" not in ended.stdout


def test_workers_and_a_cluster_are_not_asked_for_together(tiny_suite, tmp_path):
    refused(run("run", tiny_suite, "--out", tmp_path / "run", "--ray", "--workers", "2"), "leave out --ray")


@pytest.mark.parametrize(
    ("suite_says", "asked", "threads", "processors", "seeds", "expected"),
    [
        (1, None, None, 8, 2, 1),  # a suite that says nothing
        (4, None, 1, 2, 2, 2),  # as many as the processors have room for
        (4, None, 1, 16, 2, 4),
        (4, None, 1, 16, 1, 3),  # as many as there are models
        (4, None, 2, 2, 2, 1),
        (4, None, None, 1, 2, 1),
        (1, 3, None, 2, 2, 3),  # who asks for more than there are processors gets them
        (4, 1, 1, 16, 2, 1),
    ],
)
def test_how_many_models_are_computed_at_once(tiny_suite, suite_says, asked, threads, processors, seeds, expected):
    changes = {"workers": suite_says, "threads": threads, "seeds": tuple(range(seeds))}
    suite = load_suite(str(tiny_suite)).model_copy(update=changes)
    assert models_at_once(suite, list(suite.models), asked, torch.device("cpu"), processors) == expected
    assert models_at_once(suite, list(suite.models), asked, torch.device("cuda"), processors) == 1


def test_a_view_waits_for_its_training_and_no_seed_for_another(tiny_suite, tmp_path):
    suite = load_suite(str(tiny_suite)).model_copy(update={"seeds": (0, 3)})
    context = Context(suite, Stages(tmp_path / "stages"), choose_device("cpu"))
    workers = Workers.of(context, list(suite.models), 2, 8)
    assert {(t.models, t.seed) for t in workers.waiting if t.part != "rest"} == {
        ((m,), s) for m in ("gpt", "pc", "pc+state") for s in (0, 3)
    }
    assert {t.threads for t in workers.waiting} == {suite.threads or 4}
    started = [t.models[0] for t in workers.waiting if workers._may_start(t)]
    assert sorted(started) == ["gpt", "gpt", "pc", "pc"]


def test_decompositions_come_first_and_the_longest_of_them_and_of_the_rest(tiny_suite, tmp_path):
    suite = load_suite(str(tiny_suite))
    context = Context(suite, Stages(tmp_path / "stages"), choose_device("cpu"))
    expected = {"fit-pc-seed0": 3.0, "score-pc-seed0": 4.0, "fit-pc+state-seed0": 9.0, "update-gpt-seed0": 100.0}
    expected |= {"train-pc-seed0": 60.0, "update-pc+state-seed0": 50.0}
    tasks = Workers.of(context, list(suite.models), 2, 8, expected).waiting
    assert [(t.models[0], t.part) for t in tasks] == [
        ("pc+state", "update"), ("gpt", "update"), ("pc", "update"), ("pc+state", "rest"), ("pc", "rest"), ("gpt", "rest"),
    ]  # fmt: skip
    plain = replace(context, suite=suite.model_copy(update={"update": None}))
    assert {t.part for t in Workers.of(plain, list(suite.models), 2, 8).waiting} == {"all"}


def test_no_decomposition_begins_while_states_of_more_models_than_processes_wait(tiny_suite, tmp_path, monkeypatch):
    suite = load_suite(str(tiny_suite)).model_copy(update={"seeds": (0, 1, 2, 3)})
    context = Context(suite, Stages(tmp_path / "stages"), choose_device("cpu"))
    workers = Workers.of(context, list(suite.models), 2, 8)
    monkeypatch.setattr("lensbench.run.workers.origin_of", lambda *_: None)  # every training is there
    dealt = []
    while workers.waiting:
        task = next(filter(workers._may_start, workers.waiting))
        workers.waiting.remove(task)
        dealt.append((task.models[0], task.seed, task.part))
        begun = {key[:2] for key in dealt if key[2] == "update"} - {key[:2] for key in dealt if key[2] == "rest"}
        assert len(begun) <= 3
    assert [part for *_, part in dealt[:3]] == ["update"] * 3
    assert len(dealt) == len(set(dealt)) == 3 * 4 * 2


@dataclass(frozen=True)
class Failing:
    """A task that raises, in the place of a :class:`lensbench.run.cluster.ClusterTask`."""

    name: str = "task-failing"

    def compute(self, known: Cache) -> None:
        raise EOFError("no data left in file")


def test_an_end_of_file_within_a_task_is_told_with_its_traceback(capfd, monkeypatch):
    # Where processes are forked from one of an earlier test, they write where that one did.
    monkeypatch.setattr("lensbench.run.workers.new_processes", lambda: get_context("spawn"))
    worker = Worker.started()
    worker.begin(Failing(), Cache())
    worker.process.join(60)
    assert "its process failed; what it said stands above" in str(worker.said())
    assert "EOFError: no data left in file" in capfd.readouterr().err


def test_two_processes_make_a_capture_once(tiny_suite, tmp_path):
    """The stages before and after the first answer read the same states, and may run at once."""
    suite = load_suite(str(tiny_suite))
    context = Context(suite, Stages(tmp_path / "stages"), choose_device("cpu"))
    origin, data = origin_of(context, suite.models[0], 0), data_of(context)
    samples, made = data.samples("dev", 4, 4), []

    def look() -> None:
        own = replace(context, cache=context.cache.read_so_far())
        stream = stream_of(own, origin, suite.models[0].view)
        made.append(captured_states(own, stream, samples, name="capture", origin=origin)[0].states.clone())

    with KeptCaptures(context, origin, stream_of(context, origin, suite.models[0].view)).alone(samples, None):
        late = threading.Thread(target=look)
        late.start()
        late.join(1.0)
        assert late.is_alive()
        assert not made
    late.join(60)
    folders = [path for path in (tmp_path / KEPT).iterdir() if path.is_dir()]
    look()
    assert folders == [path for path in (tmp_path / KEPT).iterdir() if path.is_dir()]
    assert len(folders) == 1
    assert torch.equal(made[0], made[1])


@pytest.mark.run
def test_nothing_but_one_line_is_said_of_ctrl_c_while_processes_import(tmp_path):
    """A terminal sends it to every process at once, to those that have not yet begun to listen, too."""
    given = command(write_suite(tmp_path / "suite"), tmp_path / "run") | {"stdout": None, "stderr": subprocess.PIPE}
    process = subprocess.Popen(**given, start_new_session=True)
    time.sleep(1.5)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.count("\n") == 1
    assert "interrupted" in said


def test_processes_have_imported_before_they_are_given_work(tmp_path):
    script = (
        "import sys, time\n"
        "from lensbench.runtime.processes import import_ahead, new_processes\n"
        "def known(line): line.send('torch' in sys.modules)\n"
        "if __name__ == '__main__':\n"
        "    import_ahead('torch')\n"
        "    ours, theirs = new_processes().Pipe()\n"
        "    new_processes().Process(target=known, args=(theirs,)).start()\n"
        "    print(ours.recv(), 'torch' in sys.modules)\n"
    )
    (tmp_path / "script.py").write_text(script)
    found = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True, timeout=60)
    assert found.stdout.split() == ["True", "False"], found.stderr
