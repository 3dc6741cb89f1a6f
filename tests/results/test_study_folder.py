"""Tables of a study: long ones are packed, the same table gives the same bytes, and an export changes no number."""

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers.commands import refused, run

from lensbench.results.manifest import MANIFEST, write_manifest
from lensbench.results.study_folder import LONG, read_study_table, study_files, write_study_table
from lensbench.runtime.files import sha256

LONG_ONE = pd.DataFrame({"family": "fresh", "number": np.arange(4000), "value": np.arange(4000) / 7})
SHORT = LONG_ONE[:3]


@pytest.fixture
def earlier(tmp_path):
    """The folder of a study as earlier versions wrote it: one table packed in another way, a long one plain."""
    folder = tmp_path / "earlier"
    folder.mkdir()
    (folder / "streams.csv.gz").write_bytes(gzip.compress(LONG_ONE.to_csv(index=False).encode(), mtime=0))
    LONG_ONE.to_csv(folder / "verdicts.csv", index=False)
    SHORT.to_csv(folder / "right.csv", index=False)
    files = {path.name: sha256(path) for path in folder.iterdir()}
    write_manifest(folder, {"suite_name": "little", "update_calibration": {"name": "little"}, "files": files})
    return folder


def test_a_long_table_is_packed_a_short_one_is_not_and_no_other_form_stays(tmp_path):
    (tmp_path / "streams.csv.gz").write_bytes(b"of an earlier version")
    for table, name in ((LONG_ONE, "streams.csv.xz"), (SHORT, "streams.csv"), (LONG_ONE, "streams.csv.xz")):
        written = write_study_table(tmp_path, "streams.csv", table)
        assert [path.name for path in tmp_path.iterdir()] == [name]
        pd.testing.assert_frame_equal(written, read_study_table(tmp_path, "streams.csv"))
        np.testing.assert_allclose(written["value"], table["value"], rtol=1e-5)
    before = sha256(tmp_path / "streams.csv.xz")
    write_study_table(tmp_path, "streams.csv", LONG_ONE)
    assert study_files(tmp_path, ["streams.csv"]) == {"streams.csv.xz": before}
    assert (tmp_path / "streams.csv.xz").stat().st_size < LONG < len(LONG_ONE.to_csv(index=False))


def test_an_export_packs_what_is_long_in_place_and_changes_no_number(earlier):
    before = {name: read_study_table(earlier, name) for name in ("streams.csv", "verdicts.csv", "right.csv")}
    result = run("export", earlier, earlier)
    assert result.exit_code == 0, result.output
    assert "streams.csv.gz" in result.output
    assert {path.name for path in earlier.iterdir()} == {"streams.csv.xz", "verdicts.csv.xz", "right.csv", MANIFEST}
    for name, table in before.items():
        pd.testing.assert_frame_equal(read_study_table(earlier, name), table)
    manifest = json.loads((earlier / MANIFEST).read_text())
    assert manifest["files"] == study_files(earlier, before)
    assert manifest["update_calibration"] == {"name": "little"}


def test_an_export_of_an_export_elsewhere_is_the_same_to_the_byte(earlier, tmp_path):
    for source, to in (("earlier", "first"), ("first", "second")):
        assert run("export", tmp_path / source, tmp_path / to).exit_code == 0
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()


def test_what_is_no_study_or_damaged_is_refused_in_one_line(earlier, tmp_path):
    refused(run("export", earlier, tmp_path / "to", "--groups", "64"), "export it as it is")
    (earlier / "right.csv").write_text("other,numbers\n1,2\n")
    refused(run("export", earlier, tmp_path / "to"), "is not what the study wrote")
    (earlier / "right.csv").unlink()
    refused(run("export", earlier, tmp_path / "to"), "is missing")
    assert not (tmp_path / "to").exists()


def test_a_folder_of_something_else_is_not_replaced(earlier, tmp_path):
    other = shutil.copytree(earlier, tmp_path / "other")
    manifest = json.loads((other / MANIFEST).read_text())
    write_manifest(other, {**{k: v for k, v in manifest.items() if k != "checksum"}, "suite_name": "another"})
    refused(run("export", earlier, other), "holds something else")


def test_a_sweep_is_exported_as_it_is(tmp_path):
    sweep = tmp_path / "runs" / "sweep"
    (sweep / "stages" / "trial-00").mkdir(parents=True)
    SHORT.to_csv(sweep / "sweep.csv", index=False)
    files = {"sweep.csv": sha256(sweep / "sweep.csv")}
    write_manifest(sweep, {"schema_version": 1, "suite_name": "a", "sweep": {"trials": []}, "files": files})
    result = run("export", sweep, tmp_path / "light")
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "light").iterdir()} == {"sweep.csv", MANIFEST}
    for path in (tmp_path / "light").iterdir():
        assert path.read_bytes() == (sweep / path.name).read_bytes()
    refused(run("export", sweep, tmp_path / "light", "--figure", "plane"), "holds a sweep", "export it as it is")


@pytest.mark.results
def test_an_export_of_a_committed_sweep_has_the_same_table_and_says_the_same_of_it(tmp_path):
    sweeps = sorted(Path("results").glob("*sweep*"))
    assert len(sweeps) >= 6
    for sweep in sweeps:
        assert run("export", sweep, tmp_path / sweep.name).exit_code == 0
        one, other = sweep, tmp_path / sweep.name
        assert (
            {path.name for path in other.iterdir()} == {"sweep.csv", MANIFEST} == {path.name for path in one.iterdir()}
        )
        assert (other / "sweep.csv").read_bytes() == (one / "sweep.csv").read_bytes()
        facts = [json.loads((folder / MANIFEST).read_text()) for folder in (one, other)]
        # Manifests of earlier versions have no checksum.
        assert facts[0].pop("checksum", facts[1]["checksum"]) == facts[1].pop("checksum")
        assert facts[0] == facts[1]
