"""Every table that any command writes has its columns in the schema."""

from pathlib import Path

import pandas as pd
import pyarrow.parquet
import pytest

from lensbench.report.compare import COLUMNS
from lensbench.report.settings import DOUBT_COLUMNS, SETTINGS_COLUMNS
from lensbench.results.between import BETWEEN_COLUMNS
from lensbench.results.folder import GZIPPED, OF_THE_ESTIMATE, PACKED, plain_name
from lensbench.results.further import FURTHER, describes, further_text
from lensbench.results.further import OF_STUDIES as OF_THE_PAGE
from lensbench.results.schema import SCHEMA
from lensbench.results.verdicts import EARLIER_NAMES

RESULTS = Path(__file__).resolve().parents[2] / "results"
OF_STUDIES = {
    "calibration": {"streams.csv": "streams.csv of calibration"},
    "update-calibration": {n: f"{n} of update-calibration" for n in ("streams.csv", "blocks.csv", "verdicts.csv")},
}
COMMITTED = [p for end in ("", PACKED, GZIPPED) for p in sorted(RESULTS.rglob(f"*.csv{end}")) if "speed" not in p.parts]


def schema_of(path):
    """The name under which a committed table stands in one of the two schemas, or None."""
    name = plain_name(path.name)
    if path.parent.name in OF_STUDIES:
        return OF_STUDIES[path.parent.name].get(name, name)
    if name == "comparison.csv":
        return "compare --out"
    return name if name in (*SCHEMA, *FURTHER) else None


def columns_of(path):
    found = list(pd.read_csv(path, nrows=0))
    if path.name == "verdicts.csv" and "reason" in found:  # of a run before the update decomposition
        return [EARLIER_NAMES.get(column, column) for column in found]
    if plain_name(path.name) == "lenses.csv":
        return ["jacobian_error" if column == OF_THE_ESTIMATE else column for column in found]
    return found


def is_described(name, column):
    return column in SCHEMA.get(name, ()) or (name in FURTHER and describes(name, column))


def test_every_committed_table_is_in_a_schema_with_all_of_its_columns():
    assert len(COMMITTED) > 60
    unknown = {}
    for path in COMMITTED:
        name = schema_of(path)
        place = path.relative_to(RESULTS).as_posix()
        if name is None:
            unknown[place] = "no schema"
        elif missing := [c for c in columns_of(path) if not is_described(name, c)]:
            unknown[place] = missing
    assert unknown == {}


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("compare --out", COLUMNS),
        ("settings.csv", SETTINGS_COLUMNS),
        ("doubt.csv", DOUBT_COLUMNS),
        ("between.csv", BETWEEN_COLUMNS),
    ],
)
def test_tables_that_are_not_committed_have_exactly_the_columns_of_the_schema(name, columns):
    assert set(FURTHER[name]) == set(columns)


def test_parquet_files_have_exactly_the_columns_of_the_schema():
    for name in ("cluster_sums.parquet", "update_draws.parquet"):
        for path in RESULTS.rglob(name):
            assert set(pyarrow.parquet.read_schema(path).names) == set(FURTHER[name]), path


def test_a_column_that_nobody_described_is_found():
    assert not describes("sweep.csv", "luck")
    assert not describes("thresholds.csv", "pure_ci_low")
    assert describes("calibration.csv", "covered_movement_ci_low")


def test_the_page_of_these_tables_is_that_of_the_code():
    assert (RESULTS / "tables.md").read_text() == further_text()
    assert (RESULTS / "study-tables.md").read_text() == further_text(studies=True)
    assert set(OF_THE_PAGE) <= set(FURTHER)
