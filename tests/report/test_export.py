"""The light form of a run: what it leaves out can be made again from it, and it is compared as the run is."""

import json
import shutil

import pandas as pd
import pytest
from helpers.commands import refused, run

from lensbench.report.export import LONG_TABLES
from lensbench.results.folder import SEQUENCES, SUMS, UPDATE_DRAWS, read_run
from lensbench.results.manifest import MANIFEST, write_manifest
from lensbench.runtime.files import sha256


@pytest.fixture(scope="module")
def light(tiny_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("light") / "tiny"
    result = run("export", tiny_run, folder, "--figure", "plane")
    assert result.exit_code == 0, result.output
    return folder


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_it_holds_every_table_the_sums_and_the_figures_that_are_named(tiny_run, light):
    whole, small = read_run(tiny_run), read_run(light)
    for name, table in whole.tables.items():
        pd.testing.assert_frame_equal(small.tables[name], table)
    names = {path.name for path in light.iterdir()}
    assert {f"{name}.xz" for name in LONG_TABLES} <= names
    assert not {*LONG_TABLES, "report.html", "stages", SEQUENCES} & names
    assert (light / SUMS).read_bytes() == (tiny_run / SUMS).read_bytes()
    assert [path.name for path in (light / "figures").iterdir()] == ["plane.png"] == small.manifest.figures
    assert small.manifest.exported.tables == {n: c for n, c in whole.manifest.files.items() if n.endswith(".csv")}


@pytest.mark.slow
def test_every_figure_is_drawn_again_from_it_byte_for_byte(tiny_run, light, tmp_path):
    assert run("figures", light, "--out", tmp_path / "figures").exit_code == 0
    assert contents(tmp_path / "figures") == contents(tiny_run / "figures")
    assert (light / "figures" / "plane.png").read_bytes() == (tiny_run / "figures" / "plane.png").read_bytes()


def test_the_page_is_made_again_from_it_with_the_same_tables(tiny_run, light, tmp_path):
    for name, folder in (("whole", tiny_run), ("light", light)):
        assert run("report", folder, "--out", tmp_path / name).exit_code == 0
    assert (tmp_path / "light").read_text() == (tmp_path / "whole").read_text()


def test_it_is_compared_as_the_run_is(tiny_run, light, tmp_path):
    result = run("compare", tiny_run, light, "--out", tmp_path / "out.csv")
    assert "reproduced: byte for byte" in result.output
    rows = pd.read_csv(tmp_path / "out.csv").query("kind == 'difference' and model == against_model")
    assert rows["paired"].all()
    assert len(rows) > 20
    known = rows.dropna(subset=["value"])
    # The light folder keeps all but the draws of the decomposition beyond the first 500, and so does the run.
    assert (known[["value", "ci_low", "ci_high"]] == 0).all(axis=None)


def test_a_comparison_says_of_each_model_what_its_tables_say(tiny_run, tmp_path):
    assert run("compare", tiny_run, "--out", tmp_path / "out.csv").exit_code == 0
    rows = pd.read_csv(tmp_path / "out.csv").query("kind == 'value'").dropna(subset=["value"])
    tables = read_run(tiny_run).tables
    told = tables["indices.csv"].set_index(["model", "index"])
    models = tables["models.csv"].set_index("model")
    for row in rows.to_dict("records"):
        if row["index"] in ("ce", "bits_per_byte"):
            of, names = models.loc[row["model"]], [f"{row['index']}{end}" for end in ("", "_ci_low", "_ci_high")]
        else:
            of, names = told.loc[(row["model"], row["index"])], ["value", "ci_low", "ci_high"]
        expected = [of[name] for name in names]
        if pd.isna(expected[1]):  # a count of pairs has no interval
            assert row["value"] == expected[0], row["index"]
        else:
            assert [row["value"], row["ci_low"], row["ci_high"]] == expected, row["index"]
    assert len(rows) > 20


@pytest.mark.slow
def test_an_export_of_an_export_is_the_same_to_the_byte_and_an_earlier_one_is_replaced(light, tmp_path):
    shutil.copytree(light, tmp_path / "again")
    (tmp_path / "again" / "trace.png").write_bytes(b"a picture of ours")
    result = run("export", light, tmp_path / "again", "--figure", "transfer_penalty")
    assert result.exit_code == 0, result.output
    assert "removed" in result.output
    assert [path.name for path in (tmp_path / "again" / "figures").iterdir()] == ["transfer_penalty.png"]
    assert (tmp_path / "again" / "trace.png").exists()
    assert run("export", tmp_path / "again", tmp_path / "again", "--figure", "plane").exit_code == 0
    (tmp_path / "again" / "trace.png").unlink()
    assert contents(tmp_path / "again") == contents(light)


def test_a_run_of_an_earlier_version_is_compared_and_exported_from_its_sums_by_sequence(tiny_run, light, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(tiny_run, old, ignore=shutil.ignore_patterns("stages", SUMS, "figures"))
    each = [tiny_run / "stages" / f"score-{name}-seed0" / "sequences.parquet" for name in ("gpt", "pc", "pc+state")]
    pd.concat(map(pd.read_parquet, each), ignore_index=True).to_parquet(old / SEQUENCES)
    manifest = json.loads((old / MANIFEST).read_text())
    del manifest["files"][SUMS], manifest["checksum"]
    manifest["files"][SEQUENCES] = sha256(old / SEQUENCES)
    write_manifest(old, manifest)
    assert run("compare", old, light, "--out", tmp_path / "out.csv").exit_code == 0
    rows = pd.read_csv(tmp_path / "out.csv").query("kind == 'difference' and model == against_model")
    assert rows["paired"].all()
    assert rows["value"].abs().max() < 1e-3
    result = run("export", old, old)
    assert result.exit_code == 0, result.output
    assert f"removed: {old / SEQUENCES}" in result.output
    pd.testing.assert_frame_equal(pd.read_parquet(old / SUMS), pd.read_parquet(light / SUMS), check_dtype=False)
    said = read_run(old).manifest.exported.sums
    assert said.startswith(f"{SEQUENCES} (SHA-256 {manifest['files'][SEQUENCES]}) summed by cluster and rounded")


def test_an_older_verdict_is_told_in_todays_words(tiny_run, light, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(light, old)
    path = old / "verdicts.csv"
    pd.read_csv(path).assign(verdict="uncertain", sentence="In the words of an earlier version.").to_csv(
        path, index=False
    )
    manifest = json.loads((old / MANIFEST).read_text())
    del manifest["checksum"]
    manifest["files"][path.name] = manifest["exported"]["tables"][path.name] = sha256(path)
    write_manifest(old, manifest)
    assert run("export", old, tmp_path / "new").exit_code == 0
    assert (tmp_path / "new" / path.name).read_bytes() == (tiny_run / path.name).read_bytes()


def test_a_folder_without_sums_is_refused_with_the_command_that_helps(light, tmp_path):
    shutil.copytree(light, tmp_path / "bare")
    manifest = json.loads((tmp_path / "bare" / MANIFEST).read_text())
    del manifest["files"][SUMS], manifest["checksum"]
    write_manifest(tmp_path / "bare", manifest)
    (tmp_path / "bare" / SUMS).unlink()
    refused(run("compare", light, tmp_path / "bare"), f"has no {SUMS}", "`lensbench run`")


def test_what_cannot_be_exported_is_refused_and_the_folder_stays_as_it_was(tiny_run, light, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("not a run")
    before = contents(light)
    refused(run("export", tmp_path / "nowhere", tmp_path / "out"), "there is no folder")
    refused(run("export", light, tmp_path / "other"), "something else than a run of suite 'tiny'")
    refused(run("export", light, tiny_run), "holds the stages of a run")
    refused(run("export", light, light, "--figure", "plan"), "there is no figure 'plan'", "plane")
    refused(run("export", light, light, "--figure", "learning_curves"), "nothing to draw in figure 'learning_curves'")
    refused(run("export", light, light, "--groups", "10"), "with fewer than 64 clusters")
    refused(run("export", light, tmp_path / "other" / "letter.txt"), "is a file")
    assert contents(light) == before
    assert sorted(path.name for path in light.parent.iterdir()) == [light.name]
    assert not (tmp_path / "out").exists()


def test_without_sums_tables_stay_and_compare_says_what_it_would_need(tiny_run, light, tmp_path):
    result = run("export", tiny_run, tmp_path / "tiny", "--no-sums", "--figure", "plane")
    assert result.exit_code == 0, result.output
    left_out = {path.name for path in light.iterdir()} - {path.name for path in (tmp_path / "tiny").iterdir()}
    assert SUMS in left_out <= {SUMS, UPDATE_DRAWS}
    for name, table in read_run(tiny_run).tables.items():
        pd.testing.assert_frame_equal(read_run(tmp_path / "tiny").tables[name], table)
    assert (tmp_path / "tiny" / "figures" / "plane.png").read_bytes() == (light / "figures" / "plane.png").read_bytes()
    refused(
        run("compare", tiny_run, tmp_path / "tiny"),
        "exported with --no-sums; give the folder of the run itself, or see its tables by `lensbench report ",
    )
