"""What the stage of the update decomposition prints when it is done."""

from lensbench.measures.update import UpdateResult, UpdateRule
from lensbench.run.updating import first_words


def test_a_run_first_says_the_verdict_from_layer_1_on():
    reason = "undefined: the norm has no gain"
    assert first_words(UpdateResult.undefined(reason), UpdateRule()) == (
        "undetermined. From layer 1 on nothing can be said: the norm has no gain."
    )
