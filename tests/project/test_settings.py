"""Importing lensbench changes no setting of the process: nothing happens behind a caller's back."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


IMPORTS = """
import importlib, logging, pkgutil, warnings
import datasets, matplotlib, matplotlib.pyplot, numpy, pandas, seaborn, sklearn.datasets, torch, transformers
import tuned_lens.nn.unembed
from datasets.utils import logging as datasets_logging
from huggingface_hub.utils import are_progress_bars_disabled
from transformers.utils import logging as transformers_logging

def settings():
    return {
        "transformers verbosity": transformers_logging.get_verbosity(),
        "transformers progress bars": transformers_logging.is_progress_bar_enabled(),
        "hub progress bars": not are_progress_bars_disabled(),
        "datasets verbosity": datasets_logging.get_verbosity(),
        "torch type": torch.get_default_dtype(),
        "torch threads": torch.get_num_threads(),
        "torch gradients": torch.is_grad_enabled(),
        "torch deterministic": torch.are_deterministic_algorithms_enabled(),
        "torch float32 products": torch.get_float32_matmul_precision(),
        "torch random state": hash(torch.get_rng_state().numpy().tobytes()),
        "numpy random state": hash(numpy.random.get_state()[1].tobytes()),
        "numpy errors": numpy.geterr(),
        "pandas columns": pandas.get_option("display.max_columns"),
        "warnings": list(warnings.filters),
        "matplotlib": dict(matplotlib.rcParams),
        "logging": (logging.getLogger().level, list(logging.getLogger().handlers)),
    }

before = settings()
import lensbench
for module in pkgutil.walk_packages(lensbench.__path__, "lensbench."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
after = settings()
print([name for name in before if before[name] != after[name]])
"""


@pytest.mark.slow
def test_importing_every_module_changes_no_setting_of_other_libraries():
    found = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, cwd=ROOT, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip().splitlines()[-1] == "[]"
