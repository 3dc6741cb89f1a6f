"""Colours of heatmaps: one far cell does not make all others alike, and the scale says so."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from lensbench.report.figures import probes, style


def heads(far: float) -> pd.DataFrame:
    """Scores of 10 x 10 heads of about 0.001, one without a score, and one ``far`` away."""
    rows = [(layer, head, 0.001 * np.sin(1 + 10 * layer + head)) for layer in range(10) for head in range(10)]
    frame = pd.DataFrame(rows, columns=["layer", "head", "score"]).assign(model="gpt", ratio=0.1, found=0.0)
    frame.loc[71, "score"], frame.loc[88, "score"] = far, np.nan
    return frame


@pytest.mark.parametrize("far", [0.07, -0.07])
def test_one_far_head_leaves_the_others_their_colours_and_is_named_at_the_scale(far):
    most, label, goes_on = probes.score_scale(heads(far))
    assert most < 0.0011
    assert goes_on == "both", "a twentieth of the others lies beyond, too"
    assert label.endswith(f"the farthest is {far:.2g} (L7.H1)".replace("-", style.MINUS))


def test_without_a_far_head_all_scores_lie_on_the_scale():
    frame = heads(0.0012)
    assert probes.score_scale(frame) == (frame["score"].abs().max(), "score", "neither")
    assert probes.score_scale(frame.assign(score=np.nan))[2] == "neither"


def test_a_high_score_that_is_no_finding_has_no_circle_and_a_missing_one_is_grey():
    frame = heads(0.07)
    frame.loc[24, "found"] = 1.0
    with style.style():
        drawing = probes.error_transport(frame)
    panel = drawing.axes[0]
    assert [tuple(line.get_xydata()[0]) for line in panel.lines if line.get_marker() == "o"] == [(4.5, 2.5)]
    assert panel.get_title().endswith("beta / alpha: L2.H4 0.10")
    assert np.ma.getmaskarray(panel.collections[0].get_array()).sum() == 1
    assert panel.get_facecolor()[:3] == pytest.approx((0xBB / 255,) * 3)


def test_a_picture_keeps_the_colours_of_its_areas_and_changes_no_other_much():
    """Two pale regions of the plane differ by 7 of 255: a palette that merges them draws one region."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (120, 120, 1)).repeat(3, 2).astype(np.uint8)  # letters: every grey
    pixels[:, :30], pixels[:, 30:60] = (249, 241, 223), (248, 234, 223)
    pixels[:, 60:90] = np.linspace((250, 235, 221), (3, 5, 26), 120).astype(np.uint8)[:, None]  # a colour bar
    few = style.of_few_colours(Image.fromarray(pixels))
    shown = np.asarray(few.convert("RGB"))
    assert (shown[:, :60] == pixels[:, :60]).all()
    assert np.abs(shown.astype(int) - pixels).max() < 12
    assert len(few.getcolors()) <= style.PALETTE
