"""Every command says a mistake in exactly one line, before any work, and leaves nothing behind."""

import json
import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lensbench.cli import app
from lensbench.cli.mistakes import plain_piece
from lensbench.errors import LensbenchError
from lensbench.report.figures import draw
from lensbench.results.folder import OWNER
from lensbench.runtime import hub
from lensbench.suite.changes import Changes

RESULTS = Path(__file__).resolve().parents[2] / "results"
QUICK = RESULTS / "quick"

READERS = {
    "figures": "{} --out {out}",
    "export": "{} {out}",
    "compare": "{} --out {out}.csv",
    "report": "{} --out {out}.html",
    "ruler": "{} --out {out}.png",
    "settings": "{} --out {out}",
    "trends": "{} --out {out}",
    "trace": "gpt text --run {} --out {out}.html",
}
"""Commands that read the folder of a run -> the rest of the line"""


def one_line(command: str, *told: str) -> str:
    """The line that a command ends with; it is the only one, and says each of ``told``."""
    result = CliRunner().invoke(app, command.split("|") if "|" in command else command.split(), env={"COLUMNS": "80"})
    assert result.exit_code == 2, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    lines = result.output.splitlines()
    assert len(lines) == 1, result.output
    assert lines[0].startswith("lensbench: ")
    for words in ("Input should", "Usage", "Traceback", "Errno", "Value error", "dictionary"):
        assert words not in lines[0]
    for part in told:
        assert re.search(part, lines[0]), lines[0]
    return lines[0]


def of_quick(folder: Path) -> Path:
    """A copy of a committed run to damage."""
    shutil.copytree(QUICK, folder, ignore=shutil.ignore_patterns("figures"))
    return folder


def make_bad_folder(kind: str, folder: Path) -> str:
    """A folder that no command can read, of one kind; returns what is said of it."""
    if kind == "missing":
        return "there is no folder .*give the folder of a run"
    if kind == "file":
        folder.write_text("a text")
        return "is a file: give the folder of a run"
    if kind == "unfinished":
        (folder / "stages").mkdir(parents=True)
        (folder / OWNER).write_text(json.dumps({"suite": "quick", "command": "lensbench run quick --out it"}))
        return "unfinished run of quick .*to go on: lensbench run quick --out it"
    if kind == "empty":
        folder.mkdir()
        return r"is not a run folder|has no models\.csv"
    of_quick(folder)
    if kind == "manifest":
        path = folder / "manifest.json"
        path.write_text(path.read_text()[:300])
        return r"manifest\.json is damaged"
    name = {"table": "indices.csv", "packed": "transfer.csv.xz", "parquet": "update_draws.parquet"}.get(kind)
    if name is None:
        (folder / "lenses.csv.xz").unlink()
        return r"not complete: lenses\.csv\.xz is missing; copy the folder again"
    (folder / name).write_bytes((folder / name).read_bytes()[:200])
    return rf"{re.escape(name)} is not what the run wrote .*; copy the folder again"


@pytest.mark.parametrize(
    "kind", ["missing", "file", "unfinished", "empty", "manifest", "table", "packed", "parquet", "incomplete"]
)
def test_a_folder_that_cannot_be_read_is_told_alike_by_every_command(kind, tmp_path):
    told = make_bad_folder(kind, tmp_path / "it")
    for command, rest in READERS.items():
        if command == "trace" and kind in ("table", "packed", "parquet", "incomplete"):
            told = "its stages are missing"  # it reads no tables
        one_line(f"{command} {rest.format(tmp_path / 'it', out=tmp_path / 'out')}", told)
    assert [path.name for path in tmp_path.iterdir()] == (["it"] if kind != "missing" else [])


OF_STUDIES = {
    "calibration": "another command's", "update-calibration": "another command's",
    "predictive-coding/in-context": "holds tasks",
}  # fmt: skip
"""Which ``export`` takes, too"""


@pytest.mark.parametrize(
    ("command", "folder", "told"),
    [
        *((c, "standard-sweep", "holds a sweep") for c in READERS if c not in ("trace", "export")),
        *((c, folder, told) for c in READERS if c not in ("trace", "export") for folder, told in OF_STUDIES.items()),
    ],
)
def test_results_of_another_command_are_told_from_a_run(command, folder, told, tmp_path):
    one_line(f"{command} {READERS[command].format(RESULTS / folder, out=tmp_path / 'out')}", told)


@pytest.mark.parametrize("command", ["compare", "report", "ruler", "settings", "trends"])
def test_a_folder_that_is_named_twice_is_refused(command):
    one_line(f"{command} {QUICK} {QUICK}", "named twice: name each run folder once")


PLACES = [
    ("figures {run} --out {it}", True),
    ("export {run} {it}", True),
    ("compare {run} --out {it}", False),
    ("compare {run} --html {it}", False),
    ("compare {run} --figures {it}", True),
    ("report {run} --out {it}", False),
    ("ruler {run} --out {it}", False),
    ("settings {run} --out {it}", True),
    ("trends {run} --out {it}", True),
    ("trends {run} --figures {it}", True),
    ("trace path:model text --out {it}", False),
    ("run quick --out {it}", True),
    ("sweep quick-sweep --out {it}", True),
    ("calibrate --out {it}", True),
    ("in-context --out {it}", True),
    ("regression --out {it}", True),
]


@pytest.mark.parametrize(("command", "is_folder"), PLACES)
def test_a_place_that_cannot_be_written_is_told_before_any_work(command, is_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("mine")
    Path("folder").mkdir()
    one_line(command.format(run=QUICK, it="a.txt/deep/er.x"), "a.txt is a file, not a folder; name another place")
    if is_folder:
        one_line(command.format(run=QUICK, it="a.txt"), "a.txt is a file; (give --[a-z]+ a|name a) folder")
    else:
        one_line(command.format(run=QUICK, it="folder"), "folder is a folder: name a file")
    if Path("/proc").is_dir():
        one_line(command.format(run=QUICK, it="/proc/it"), "/proc/it cannot be written .*may write to")
    assert Path("a.txt").read_text() == "mine"
    assert list(Path("folder").iterdir()) == []


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("run quick --seed -1", "--seed must be at least 0, not -1"),
        ("run quick --seed abc", "--seed must be a whole number, not 'abc'"),
        ("run quick --limit 0", "--limit must be at least 1, not 0"),
        ("run quick --max-hours nan", "--max-hours must be at least 0"),
        ("calibrate calibration --workers 0", "--workers must be at least 1"),
        ("calibrate update-calibration --only foo", "must be one of 'tune', 'held_out', 'uneven', not 'foo'"),
        ("figures x --dpi 5", "--dpi must be at least 50, not 5"),
        ("figures x --columns 3", "--columns must be at most 2, not 3"),
        ("export x y --groups 0", "--groups 0: .*give --groups 64 or more"),
        ("bits path:x y --length 1", "--length must be at least 2, not 1"),
        ("bits path:x y --begin foo", "--begin must be one of 'auto', 'every', 'first', not 'foo'"),
        ("bits path:x y --max-bytes 0", "--max-bytes must be at least 1"),
        ("trace path:x y --tokens 0", "--tokens must be at least 1"),
        ("compare-lenses path:x --length 3", "--length must be at least 32, not 3"),
        ("compare-lenses path:x --jacobian -2", "--jacobian must be at least 0, not -2"),
    ],
)
def test_a_number_out_of_range_is_told_with_its_range(command, told):
    one_line(command, told)


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("run", "SUITE is missing: lensbench run SUITE"),
        ("bits hub:x", "TEXT is missing: lensbench bits MODEL TEXT"),
        ("report", r"FOLDER\.\.\. is missing: lensbench report FOLDER\.\.\."),
        ("compare-lenses", r"MODEL is missing: lensbench compare-lenses MODEL \[LENS\.\.\.\]"),
        ("run quick other", "'other' is one argument too many: lensbench run SUITE"),
        ("run quick --ray foo", "--ray: foo is no address of a cluster: give HOST:PORT"),
        ("schema foo", "'foo' is one argument too many: lensbench schema"),
        ("run quick --sed 3", "there is no option --sed; did you mean --seed"),
        ("run quick --nothing", "there is no option --nothing; `lensbench run --help`"),
        ("run quick --seed", "--seed needs a value"),
        ("--nothing", "there is no option --nothing"),
        ("compar x", "there is no command 'compar'; did you mean compare?"),
        ("nonsense", "there is no command 'nonsense'; `lensbench --help`"),
    ],
)
def test_a_line_that_does_not_fit_is_told_in_one(command, told):
    one_line(command, told)


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("bits path:x y --begin every --no-bos", "--begin every and --no-bos contradict"),
        ("schema --further --studies", "--further and --studies are two lists"),
        ("compare-lenses path:x --refine 3 --fit 0", "--refine refines our own lenses, and --fit 0 fits none"),
        ("compare-lenses path:x --jacobian 8 --fit 0", "--fit above 0"),
        ("compare x --figure plane", "say where with --figures"),
        ("calibrate calibration --only tune", "--only is for update-calibration"),
        ("calibrate calibration --up-to 3", "--up-to is for update-tokens"),
        ("trace path:x text --lens tuned", "give its folder with --run"),
        ("trace path:x text --seed 3", "give its folder with --run"),
        ("run|quick|--only|", "--only '' names nothing"),
        ("run|quick|--probes|,", "--probes ',' names nothing"),
    ],
)
def test_options_that_contradict_each_other_are_told_before_any_work(command, told):
    one_line(command, told)


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("run nosuch", "unknown suite 'nosuch'; there are (?!.*sweep).*quick"),
        ("sweep nosuch", "unknown sweep 'nosuch'; there are (?!.*calibration).*quick-sweep"),
        ("calibrate nosuch", "unknown calibration 'nosuch'; there are calibration, update-calibration"),
        ("sweep nowhere.toml", "there is no sweep file nowhere.toml"),
        ("sweep quick", "is a suite, not a sweep: `lensbench run quick`"),
        ("run lensbench", "lensbench is a folder: give the name of a suite"),
        ("compare {quick} --rule nosuch", "unknown suite 'nosuch'"),
        ("figures {quick} --figure plan", "no figure 'plan'; did you mean plane?"),
        ("export {quick} nowhere --figure nosuch", "no figure 'nosuch'; figures are .*plane"),
        ("compare {quick} --figures nowhere --figure nosuch", "no figure 'nosuch'"),
        ("settings {quick} --index nosuch", "nosuch"),
        ("trends {quick} --index nosuch", "index 'nosuch'"),
        ("trends {quick} --series gpt", "--series gpt: name at least two models"),
        ("trends {quick} --series gpt,nosuch", "no run has a model 'nosuch'"),
        ("transfer-between quick --run {quick}", "holds no stages .*leaves them out.*with --run"),
        ("transfer-between quick --run nowhere", "there is no folder nowhere.*with --run"),
        ("bits gpt2 stdlib", "did you mean hub:gpt2"),
        ("bits path:x nowhere.txt", "'nowhere.txt': there is no file of this name here"),
        ("bits path:x hf:", "unknown corpus 'hf:'"),
        ("bits path:x file:nowhere", "there is no such file"),
        ("compare-lenses path:x --corpus file:nowhere", "there is no such file"),
        ("compare-lenses path:x --corpus README.md", "did you mean file:README.md?"),
        ("trace nosuch text --run {quick}", "no model 'nosuch'; it has gpt"),
    ],
)
def test_a_wrong_name_is_told_with_what_there_is(command, told, monkeypatch):
    monkeypatch.chdir(RESULTS.parent)
    one_line(command.format(quick=QUICK), told)
    assert not Path("nowhere").exists()


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("fit.sequences=abc", "fit.sequences must be a whole number, not 'abc'"),
        ("fit.sequences=3.5", "fit.sequences must be a whole number, not 3.5"),
        ("fit.sequences=-3", "fit.sequences must be at least 1, not -3"),
        ("fit.tolerance=abc", "fit.tolerance must be a number, not 'abc'"),
        ("fit=3", "fit must be a table of settings, not 3; set one of them, fit.sequences=VALUE"),
        ("fit.turns=foo", "fit.turns must be 'window', 'document' or 'cluster', not 'foo'"),
        ("evaluate.matrix=maybe", "evaluate.matrix must be true or false, not 'maybe'"),
        ("seeds=abc", "seeds must be a list in brackets, not 'abc'"),
        ("models=3", "models are set one by one, models.NAME.KEY=VALUE"),
        ("question=3", "question must be a text, not 3"),
        ("sequences=3", "did you mean 'fit.sequences' or 'evaluate.sequences'?"),
        ("d_model=3", "did you mean 'models.NAME.d_model'?"),
        ("fit.ridges=[]", "fit.ridges must have at least 1 entries"),
        ("update.tolerances=[a]", r"give a number, true, false, a word, a list such as \[1, 2\]"),
    ],
)
def test_a_wrong_setting_is_told_in_plain_words(setting, told):
    with pytest.raises(LensbenchError, match=told) as found:
        Changes(settings=(setting,)).of("quick")
    assert "Input should" not in str(found.value)


def test_a_lens_of_a_hub_that_cannot_be_reached_is_told_at_once(monkeypatch):
    monkeypatch.setattr(hub, "unreachable", lambda endpoint: "no answer")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    for proxy in hub.PROXIES:
        monkeypatch.delenv(proxy, raising=False)
    for lens in ("hub:nobody", "hub:nobody/nothing/lens.pt@main"):
        one_line(f"trace path:x text --lens {lens}", "cannot connect to the hub .*; give a lens on this machine")
        one_line(f"compare-lenses path:x {lens}", "cannot connect to the hub .*; give a lens on this machine")


def test_an_unknown_figure_is_refused_before_a_run_is_read(monkeypatch):
    monkeypatch.setattr("lensbench.results.folder.read_run", lambda *_, **__: pytest.fail("the run was read"))
    with pytest.raises(LensbenchError, match="no figure 'nosuch'"):
        draw.check_drawing(["nosuch"])
    one_line(f"figures {QUICK} --figure nosuch", "no figure 'nosuch'")


@pytest.mark.parametrize(
    ("piece", "plain"),
    [
        ("{SUITE}", "SUITE"),
        ("{FOLDER...}...", "FOLDER..."),
        ("[[LENS...]]...", "[LENS...]"),
        ("[NAME]", "[NAME]"),
        ("[OPTIONS]", "[OPTIONS]"),
    ],
)
def test_the_line_of_usage_names_arguments_without_braces(piece, plain):
    assert plain_piece(piece) == plain
