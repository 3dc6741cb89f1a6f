"""Kill a run at random moments, go on, and hold what it ends with against an undisturbed run, byte for byte.

``python -m benchmarks.speed.survival SUITE --kills 50 --out runs/survival`` writes ``kills.csv``: a row per kill. Two kinds:
after a random time, and at a random call that changes the run folder (a move, a removal, a write), before or after it.
Every run is a process of its own, forked with the packages loaded, so that it spends its life in the run itself.
"""

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from benchmarks.speed.task import say
from lensbench.errors import LensbenchError
from lensbench.results import schema as results
from lensbench.results.folder import read_run
from lensbench.run.suite import run_suite
from lensbench.runtime import files
from lensbench.runtime.environment import choose_device
from lensbench.runtime.progress import Quiet
from lensbench.suite.files import load_suite

CHANGES = ((os, "replace"), (os, "unlink"), (os, "rename"), (shutil, "rmtree"), (Path, "mkdir"), (Path, "unlink"))
"""Calls that change a folder; a run is killed around one of them."""


def whole_run(suite: str, folder: Path) -> None:
    """Run a suite from its beginning, or from where it was killed, to its end."""
    run_suite(load_suite(suite), folder, device=choose_device("cpu"), only=[], progress=Quiet())


def in_a_process(work: Callable[[], None]) -> int:
    """A forked process at work: its number."""
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        try:
            work()
        except BaseException as error:  # what a run ends with is the parent's to judge
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return process


def finished(process: int) -> bool:
    """Wait for a process: whether it ended well. Raises :class:`LensbenchError` where it failed by itself."""
    _, status = os.waitpid(process, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise LensbenchError("a run that was killed before cannot go on: see above")
    return os.WIFEXITED(status)


def dying_at(change: int, after: bool, work: Callable[[], None]) -> None:
    """``work`` in this process, killed at its ``change``-th change of a folder, before or ``after`` it."""
    count = 0

    def watched(call: Callable) -> Callable:
        def replacement(*args, **kwargs):
            nonlocal count
            count += 1
            if count == change and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            answer = call(*args, **kwargs)
            if count == change and after:
                os.kill(os.getpid(), signal.SIGKILL)
            return answer

        return replacement

    for owner, name in CHANGES:
        setattr(owner, name, watched(getattr(owner, name)))
    work()


def kill_and_go_on(
    suite: str, folder: Path, kills: int, seed: int, report: Callable[[str], None] = lambda line: None
) -> pd.DataFrame:
    """``kills`` kills, each run going on where the last was killed; a row for each.

    A folder whose run was finished is compared with the undisturbed one, thrown away and begun anew. Raises
    :class:`LensbenchError` for a table that differs, and for a run that does not go on.
    """
    chance = random.Random(seed)
    reference = folder / "undisturbed"
    begun = time.perf_counter()
    finished(in_a_process(lambda: whole_run(suite, reference)))
    seconds = time.perf_counter() - begun
    report(f"undisturbed in {seconds:.1f} s")
    rows: list[dict[str, object]] = []
    attempt, runs = folder / "killed", 0
    while True:
        moment, change, after = chance.uniform(0, seconds), chance.randint(1, 60), chance.random() < 0.5
        by_time, last = chance.random() < 0.5, len(rows) == kills
        if last:
            process = in_a_process(lambda: whole_run(suite, attempt))
        elif by_time:
            process = in_a_process(lambda: whole_run(suite, attempt))
            time.sleep(moment)
            os.kill(process, signal.SIGKILL)
        else:
            process = in_a_process(lambda c=change, a=after: dying_at(c, a, lambda: whole_run(suite, attempt)))
        runs += 1
        if not finished(process):
            stages = attempt / "stages"
            there = sorted(p.name for p in stages.iterdir()) if stages.is_dir() else []
            row: dict[str, object] = {
                "kill": len(rows) + 1,
                "how": "after seconds" if by_time else "after change" if after else "before change",
                "when": round(moment, 2) if by_time else change,
                "stages_finished": sum(not name.endswith((".partial", ".old")) for name in there),
                "interrupted": " ".join(n.removesuffix(".partial") for n in there if n.endswith(".partial")) or "none",
            }
            rows.append(row)
            report(" ".join(f"{k} {v}" for k, v in row.items()))
            continue
        refuse_difference(reference, attempt)
        report(f"finished after {runs} runs: every table as undisturbed, byte for byte")
        if rows:
            rows[-1]["then"] = "finished, byte for byte"
        if last:
            return pd.DataFrame(rows).fillna({"then": "killed again"})
        shutil.rmtree(attempt)
        runs = 0


def refuse_difference(reference: Path, attempt: Path) -> None:
    """Raise :class:`LensbenchError` where a table, or what comparisons read, is not the same to the byte."""
    names = sorted(p.name for p in reference.iterdir() if p.suffix in (".csv", ".parquet"))
    for name in names:
        if name in results.MEASURED_TIME:
            continue
        if not (attempt / name).is_file() or (attempt / name).read_bytes() != (reference / name).read_bytes():
            raise LensbenchError(f"{attempt / name} is not what the undisturbed run wrote")
    read_run(attempt)
    left = [p.name for p in attempt.rglob("*") if p.name.endswith((".partial", ".old"))]
    if left:
        raise LensbenchError(f"{attempt} keeps {left[0]}, which an interrupted run left")


def main(
    suite: Annotated[str, typer.Argument(help="A suite.")] = "benchmarks/speed/small.toml",
    kills: Annotated[int, typer.Option(min=1)] = 50,
    seed: int = 0,
    out: Path = Path("runs/survival"),
) -> None:
    """Kill a run so many times; exit code 1 where it did not end as an undisturbed one."""
    shutil.rmtree(out / "killed", ignore_errors=True)
    shutil.rmtree(out / "undisturbed", ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    try:
        table = kill_and_go_on(suite, out, kills, seed, say)
    except LensbenchError as error:
        say(str(error))
        raise SystemExit(1) from error
    files.write_atomically(out / "kills.csv", lambda path: table.to_csv(path, index=False, lineterminator="\n"))
    say(f"{len(table)} kills, {(table['then'] != 'killed again').sum()} finished runs, all as undisturbed")


if __name__ == "__main__":
    typer.run(main)
