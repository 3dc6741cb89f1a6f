"""Two runs with a model of one name are told to be of other weights where they are."""

import json
import shutil

import pytest

from lensbench.report.compare import compare_runs
from lensbench.results.manifest import write_manifest


@pytest.mark.parametrize(
    ("weights", "said"), [("a", "reproduced: byte for byte"), ("b", "not the same: model 'gpt' has other weights")]
)
def test_a_reproduction_is_of_the_same_weights(tiny_run, tmp_path, weights, said):
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder, held in zip(folders, ("a", weights), strict=True):
        shutil.copytree(tiny_run, folder, ignore=shutil.ignore_patterns("stages", ".lock"))
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["sources"] = {"gpt": {"source": "path:hf", "model.safetensors": held}}
        write_manifest(folder, manifest)
    (line,) = compare_runs(folders).reproduction
    assert said in line
