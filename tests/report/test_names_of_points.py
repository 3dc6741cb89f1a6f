"""Names next to points: their lines hardly cross one another."""

import itertools

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from lensbench.report.figures.layout import cross, label_points, leader_of, met


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("corner", [(0.95, 0.93), (0.5, 0.9), (0.05, 0.5)])
def test_of_the_lines_from_a_crowd_of_points_to_their_names_two_at_most_cross(
    seed: int, corner: tuple[float, float]
) -> None:
    """In a corner nine names can leave no other place: there a line may cross rather than a name cover another or a bar."""
    rng = np.random.default_rng(seed)
    figure = Figure(figsize=(5.6, 4.3), dpi=100)
    panel = figure.add_subplot()
    panel.set(xlim=(0, 1), ylim=(0, 1))
    places = np.clip(np.array(corner) + 0.06 * rng.standard_normal((9, 2)), 0.01, 0.99)
    points = pd.DataFrame(places, index=[f"model-{k}{'+state' * (k % 3 == 0)}" for k in range(9)])
    label_points(figure, panel, points, [])
    names = [text for text in panel.texts if isinstance(text, Annotation) and text.get_text()]
    lines = {arrow.xy: arrow for arrow in panel.texts if isinstance(arrow, Annotation) and not arrow.get_text()}
    leaders = [leader_of(panel, name) for name in names if name.xy in lines]
    assert len(names) == 9
    assert len(leaders) >= 2, "the points are crowded"
    assert len([pair for pair in itertools.combinations(leaders, 2) if cross(*pair)]) <= 1


def test_lines_cross_between_their_ends_alone() -> None:
    def line(*ends: tuple[float, float]) -> np.ndarray:
        return np.array(ends, dtype=float)

    flat = line((0, 0), (2, 0))
    assert cross(flat, line((1, -1), (1, 1)))
    assert not cross(flat, line((3, -1), (3, 1)))
    assert not cross(flat, line((0, 0), (0, 2))), "from one point"
    assert not cross(flat, line((0, 1), (2, 1)))
    assert met(flat, [], [line((1, -1), (1, 1)), line((3, -1), (3, 1))]) == 1
