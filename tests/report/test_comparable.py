"""Two runs that do not compare are refused with what does: another folder, or the settings to run one of them again with."""

import itertools
import re
from pathlib import Path

import pytest

from lensbench.errors import LensbenchError
from lensbench.report.comparable import refuse_unlike
from lensbench.results.folder import Run
from lensbench.results.manifest import Manifest, read_manifest, write_manifest


def run_in(folder, *models, fit=None, evaluate=None, spec="stdlib", weights="w"):
    """A run folder with a manifest alone."""
    bare = Manifest.of_tables(folder, list(models))
    suite = bare.suite.model_copy(update={"fit": fit or {"layers": 8}})
    if evaluate:
        suite = suite.model_copy(update={"evaluate": suite.evaluate.model_copy(update=evaluate)})
    sources = {name: {"source": f"hub:an/{name}", "model.safetensors": weights} for name in models}
    update = {"suite": suite, "sources": sources, "corpus": bare.corpus.model_copy(update={"spec": spec})}
    folder.mkdir()
    write_manifest(folder, bare.model_copy(update=update).model_dump())
    return Run(folder, read_manifest(folder), {})


def refusal(one, other):
    with pytest.raises(LensbenchError) as caught:
        refuse_unlike(one, other)
    return str(caught.value)


def test_a_folder_next_to_the_two_that_compares_is_named_with_the_command(tmp_path):
    large, other = run_in(tmp_path / "large", "a"), run_in(tmp_path / "other", "b", fit={"layers": 2})
    assert "run the first again with --set fit.layers=2, or the second with --set fit.layers=8" in refusal(large, other)
    run_in(tmp_path / "prose", "a", fit={"layers": 2}, spec="file:prose.txt")
    run_in(tmp_path / "weights", "a", fit={"layers": 2}, weights="of another revision")
    assert "lensbench compare" not in refusal(large, other)
    run_in(tmp_path / "far", "a", fit={"layers": 2, "refits": 3, "sequences": 5})
    run_in(tmp_path / "near", "a", fit={"layers": 2, "refits": 3})
    said = refusal(large, other)
    assert f"`lensbench compare {tmp_path / 'near'} {tmp_path / 'other'}` compares a and b" in said
    assert "both measured with fit.layers 2" in said
    assert f"`lensbench ruler {large.folder} {other.folder}` shows them side by side" in said
    assert f"`lensbench compare {tmp_path / 'other'} {tmp_path / 'near'}` compares a and b" in refusal(other, large)


def test_a_model_on_other_settings_gets_no_third_run(tmp_path):
    one, again = run_in(tmp_path / "one", "a"), run_in(tmp_path / "again", "a", fit={"layers": 2})
    run_in(tmp_path / "third", "a", fit={"layers": 2})
    assert "lensbench compare" not in refusal(one, again)
    assert "--set fit.layers=2" in refusal(one, again)


def test_a_setting_that_one_run_leaves_out_is_not_named_as_one_to_run_with(tmp_path):
    one, other = run_in(tmp_path / "one", "a", evaluate={"length": 256}), run_in(tmp_path / "other", "b")
    assert "--set" not in refusal(one, other)


@pytest.mark.results
def test_commands_that_refusals_of_committed_runs_name_are_not_refused():
    folders = [path.parent for path in sorted(Path("results").rglob("manifest.json"))]
    runs = {folder: Run(folder, read_manifest(folder), {}) for folder in folders if is_run(folder)}
    named = set()
    for one, other in itertools.permutations(runs.values(), 2):
        try:
            refuse_unlike(one, other)
        except LensbenchError as error:
            named |= set(re.findall(r"`lensbench compare (\S+) (\S+)`", str(error)))
    for one, other in named:
        refuse_unlike(runs[Path(one)], runs[Path(other)])
    assert ("results/smollm2-glance", "results/gemma") in named


def is_run(folder):
    """Whether a folder's manifest is a run's; studies have others."""
    try:
        read_manifest(folder)
    except LensbenchError:
        return False
    return True
