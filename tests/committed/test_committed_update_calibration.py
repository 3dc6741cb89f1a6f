"""The committed calibration of the update decomposition is what its streams say, and what the guide tells of it."""

import json
from pathlib import Path

import pandas as pd
import pytest

from lensbench.results.study_folder import read_study_table, study_files
from lensbench.studies.update_tables import BLOCKS, COVERAGE, RIGHT, STREAMS, VERDICTS, summaries
from lensbench.suite.files import load_calibration, load_suite

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "results" / "update-calibration"

pytestmark = pytest.mark.results


@pytest.fixture(scope="module")
def tables() -> dict[str, pd.DataFrame]:
    return {name: read_study_table(FOLDER, name) for name in (STREAMS, BLOCKS, VERDICTS, RIGHT, COVERAGE)}


def test_every_stream_of_the_recipe_is_in_the_table(tables):
    recipe = load_calibration("update-calibration")
    manifest = json.loads((FOLDER / "manifest.json").read_text())
    assert manifest["update_calibration"] == recipe.model_dump(mode="json")
    assert manifest["files"] == study_files(FOLDER, tables)
    asked = [(job.group, job.family, job.number) for job in recipe.jobs()]
    streams = tables[STREAMS]
    assert list(zip(streams["set"], streams["family"], streams["number"], strict=True)) == asked


def test_verdicts_and_coverage_follow_from_the_streams_by_the_rule_of_the_suites(tables):
    rule = load_calibration("update-calibration").rule
    assert load_suite("standard").verdict.update == rule
    for name, table in summaries(tables[STREAMS], tables[BLOCKS], rule).items():
        pd.testing.assert_frame_equal(
            table.reset_index(drop=True).replace("", None), tables[name].replace("", None), check_dtype=False
        )


def test_the_folder_is_light():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 0.6e6
