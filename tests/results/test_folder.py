"""Whose results a folder holds, also where its files are damaged."""

import json

import pytest

from lensbench.results.folder import OWNER, owner_of
from lensbench.results.manifest import MANIFEST


@pytest.mark.parametrize(
    "damaged", ["{", "[]", "[" * 200_000, '{"suite_name": ' * 200_000], ids=["cut", "list", "lists", "objects"]
)
def test_a_damaged_manifest_leaves_the_folder_to_the_suite_that_claimed_it(tmp_path, damaged):
    (tmp_path / MANIFEST).write_text(damaged)
    assert owner_of(tmp_path) is None
    (tmp_path / OWNER).write_text(json.dumps({"suite": "quick"}))
    assert owner_of(tmp_path) == "quick"
