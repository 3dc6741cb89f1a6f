"""Trials of a sweep: each is held against the best one of its model, on the same tokens."""

import numpy as np
import pandas as pd
import pytest
import torch

from lensbench.run.sweep import held_against_best


def test_a_trial_is_behind_the_best_of_its_own_model_paired_by_tokens():
    tokens = torch.randn(400, generator=torch.Generator().manual_seed(0)) + 3
    document = np.repeat(np.arange(20), 20)
    shifts = [0.2, 0.0, 0.5, 0.4]
    losses = [tokens + shift for shift in shifts]
    rows = [(model, k, float(loss.mean())) for k, (model, loss) in enumerate(zip("aabb", losses, strict=True))]
    found = held_against_best(pd.DataFrame(rows, columns=["model", "trial", "dev_ce"]), losses, document, 200)
    assert found["behind"].tolist() == pytest.approx([0.2, 0.0, 0.1, 0.0], abs=1e-5)
    # Every token is worse by the same: documents differ much in their losses, and not at all in the differences.
    assert found["behind_ci_high"].tolist() == pytest.approx(found["behind_ci_low"].tolist(), abs=1e-5)
    assert found["chosen"].tolist() == [False, True, False, True]
