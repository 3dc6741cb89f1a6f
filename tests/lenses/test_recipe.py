"""What lenses are fitted and chosen on, as a recipe says it."""

from collections import Counter

import numpy as np
import pytest

from lensbench.data.tokens import TokenizedDocument
from lensbench.data.windows import DOCUMENT_SHARE, sample_windows
from lensbench.lenses.recipe import FitRecipe


def test_a_recipe_without_turns_says_what_it_said_before_there_were_any():
    assert "turns" not in FitRecipe().model_dump()
    assert FitRecipe(turns="document").model_dump()["turns"] == "document"


@pytest.mark.parametrize("split", ["fit", "dev"])
@pytest.mark.parametrize(
    ("turns", "share"), [("window", None), ("document", DOCUMENT_SHARE), ("cluster", DOCUMENT_SHARE)]
)
def test_both_splits_are_sampled_by_the_turns_and_their_own_numbers(split, turns, share):
    recipe = FitRecipe(sequences=40, positions=3, dev_sequences=20, dev_positions=5, turns=turns)
    asked = recipe.of_fit if split == "fit" else recipe.of_dev
    numbers = (40, 3) if split == "fit" else (20, 5)
    assert (asked["split"], asked["count"], asked["positions"]) == (split, *numbers)
    assert asked["share"] == share
    assert asked["turns"] == ("cluster" if turns == "cluster" else "document")


def test_turns_of_clusters_fit_on_each_package_alike():
    """One package of 40 documents among 64 of one: alike in turn, far ahead where every window is drawn alike."""
    names = [f"large/{k}" for k in range(40)] + [f"small{k}/0" for k in range(64)]
    ids = np.arange(64, dtype=np.int32)
    documents = [TokenizedDocument(name, ids, np.ones(64, dtype=np.int32)) for name in names]
    by = {}
    for turns in ("window", "cluster"):
        asked = FitRecipe(sequences=65, positions=2, turns=turns).of_fit
        windows = sample_windows(
            documents, n_sequences=asked["count"], length=64, positions=asked["positions"], seed=0,
            max_share=asked["share"], turns=asked["turns"],
        )  # fmt: skip
        by[turns] = Counter(windows.document_names[k].partition("/")[0] for k in windows.documents)
    assert set(by["cluster"].values()) == {1}
    assert by["window"]["large"] > 10
