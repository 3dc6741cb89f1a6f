"""Mistakes on the command line are told in one line, with what would be right, before any work."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from lensbench.cli import app
from lensbench.data.reading import read_documents
from lensbench.errors import LensbenchError
from lensbench.report.trace import LENSES_OF_A_RUN, traced_model
from lensbench.results.folder import OWNER, read_run
from lensbench.run.cluster import Cluster
from lensbench.runtime.hub import refuse_unreachable, unreachable
from lensbench.suite.changes import Changes
from lensbench.suite.files import load_suite

COMMANDS = [command.name or command.callback.__name__ for command in app.registered_commands]
TYPES_OF_PYTHON = ("<int", "<str", "<path", "<float", "<list", "[str]", "[Path]", "int range", "None")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_pages_fit_and_have_no_types_of_python(command):
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "80"})
    assert result.exit_code == 0
    assert [word for word in TYPES_OF_PYTHON if word in result.output] == []
    assert max(map(len, result.output.splitlines())) <= 80


@pytest.mark.parametrize("command", [c for c in COMMANDS if c != "run"])
def test_help_pages_name_no_option_of_another_command(command):
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"})
    own = {line.split()[0] for line in result.output.splitlines() if line.strip().startswith("--")}
    named = {word.strip(".,;:()`'") for word in result.output.split() if word.startswith("--") and word[2:3].isalpha()}
    allowed = {"bits": {"--corpus", "--no-bos"}}  # it says that it takes what this option of `lensbench run` takes
    assert named - own <= allowed.get(command, set())


def test_a_file_of_a_suite_that_comes_with_lensbench_is_named_without_its_ending():
    with pytest.raises(LensbenchError, match=r"no suite file quick\.toml; did you mean quick"):
        load_suite("quick.toml")
    with pytest.raises(LensbenchError, match=r"did you mean quick, which"):
        load_suite("somewhere/quik.toml")


def test_an_unknown_lens_is_refused_with_all_that_a_lens_can_be():
    with pytest.raises(LensbenchError, match="unknown lens 'bogus'") as found:
        traced_model("hub:gpt2", "bogus", None, None)
    line = str(found.value)
    assert all(kind in line for kind in ("logit", *LENSES_OF_A_RUN, "path:FOLDER", "hub:RESOURCE"))


def test_a_hub_that_cannot_be_reached_is_told_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for proxy in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)
    unreachable.cache_clear()
    with pytest.raises(LensbenchError, match=r"hub:nobody/nothing: cannot connect to the hub .*; give path:FOLDER"):
        refuse_unreachable("hub:nobody/nothing", "path:FOLDER")
    with pytest.raises(LensbenchError, match="hf:nobody/texts"):
        refuse_unreachable("hf:nobody/texts@train#text", "file:PATH")
    for elsewhere in ("path:x", "stdlib", f"hf:{tmp_path}", "file:a.txt"):
        refuse_unreachable(elsewhere, "nothing")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy")
    refuse_unreachable("hub:nobody/nothing", "nothing is asked behind a proxy")
    unreachable.cache_clear()


def test_a_cluster_that_does_not_answer_is_refused_before_any_work():
    with pytest.raises(LensbenchError, match=r"no Ray cluster at 127\.0\.0\.1:1|--ray needs Ray"):
        Cluster("127.0.0.1:1").check()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (
            "raise RuntimeError('half installed')",
            r"cannot be imported \(RuntimeError: half installed\); install it again",
        ),
        ("import a_part_that_is_missing", "cannot be imported .*a_part_that_is_missing"),
        ("", "is not Ray, or only a part of it"),
        (None, "--ray needs Ray"),
    ],
)
def test_a_missing_or_broken_ray_is_told_in_one_line_before_any_work(tmp_path, monkeypatch, content, told):
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    if content is None:
        monkeypatch.setattr(sys, "path", [p for p in sys.path if not (Path(p) / "ray").exists()])
    else:
        (tmp_path / "modules").mkdir()
        (tmp_path / "modules" / "ray.py").write_text(content)
        monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    result = CliRunner().invoke(app, ["run", "quick", "--ray", "--out", str(tmp_path / "run")])
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    assert re.search(told, result.stderr)
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("setting", "meant"),
    [
        ("fit.sequencs", "fit.sequences"),
        ("evaluate.sequencs", "evaluate.sequences"),
        ("models.gpt.famly", "models.gpt.family"),
    ],
)
def test_a_misspelt_setting_is_told_with_the_section_of_what_was_meant(setting, meant):
    with pytest.raises(LensbenchError, match=rf"unknown key '{setting}'; did you mean '{meant}'\?"):
        Changes(settings=(f"{setting}=3",)).of("quick")


def test_strict_says_that_it_refuses_and_names_no_file_as_left_out(tmp_path):
    (tmp_path / "a.txt").write_text("a text")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "c.png").write_bytes(b"\x89PNG")
    with pytest.raises(LensbenchError, match=r"is refused \(--strict\): .*c\.png.*b\.txt") as found:
        read_documents(f"file:{tmp_path}", strict=True)
    assert "left out" not in str(found.value)


def test_the_list_of_commands_cuts_no_line_and_has_the_order_of_a_users_work():
    result = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "80"})
    lines = [line.strip(" │").split(" ")[0] for line in result.output.splitlines()]
    assert [line for line in lines if line in ("models", "run", "compare", "trace", "figures")] == [
        "run",
        "figures",
        "compare",
        "trace",
        "models",
    ]
    assert [line for line in result.output.splitlines() if line.endswith("...") and not line.startswith("Usage")] == []


@pytest.mark.parametrize("facts", [{"command": "lensbench run quick --out 'my run'"}, {}])
def test_an_unfinished_folder_is_called_so_with_the_command_that_goes_on(tmp_path, facts):
    (tmp_path / OWNER).write_text(json.dumps({"suite": "quick", **facts}))
    for name in ("tokenizer", "train-gpt-seed0"):
        (tmp_path / "stages" / name).mkdir(parents=True)
    (tmp_path / "stages" / "tokenizer" / "stage.json").write_text("{}")
    with pytest.raises(
        LensbenchError, match=r"unfinished run of quick \(1 finished stage\); to go on: lensbench run"
    ) as it:
        read_run(tmp_path)
    assert facts.get("command", f"lensbench run quick --out {tmp_path}") in str(it.value)


def test_the_command_that_goes_on_has_every_option_as_it_was_given():
    changes = Changes("glance", ("path:my model", "hub:a/b@v1"), "file:a b.txt", None, ("fit.sequences=96",), 3)
    command = changes.command("pretrained", "runs/it", [("--only", ["b-v1"]), ("--probes", [])])
    assert shlex.split(command) == [
        "lensbench", "run", "pretrained", "--preset", "glance", "--corpus", "file:a b.txt", "--seed", "3",
        "--model", "path:my model", "--model", "hub:a/b@v1", "--set", "fit.sequences=96", "--only", "b-v1",
        "--out", "runs/it",
    ]  # fmt: skip
