"""Every probe of every family of models that read text: it measures, or says in one line why it cannot."""

import pytest
from helpers.planted import LENGTH, V, subject_of

from lensbench.errors import LensbenchError
from lensbench.models import FAMILIES, build
from lensbench.probes.registry import PROBES

SHAPE = {"vocab_size": V, "d_model": 16, "layers": 3, "heads": 2, "context": LENGTH, "parameters": 20_000}
TEXT = [name for name, family in FAMILIES.items() if not family.images]


def what_it_says(family, probe):
    """What a probe measures of a model with a few large weights, or its reason."""
    subject = subject_of(build(family, seed=1, **SHAPE).eval(), 0, 16)
    try:
        found = PROBES[probe].measure(subject)
    except LensbenchError as error:
        return str(error)
    return found.reason or found.frame()


def check(family, probe):
    said = what_it_says(family, probe)
    if isinstance(said, str):
        assert said.strip()
        assert "\n" not in said, said
    else:
        assert len(said), (family, probe)


@pytest.mark.parametrize("probe", ["error_transport", "head_weights"])
def test_heads_of_a_loop_are_not_read_and_the_reason_fits_a_line(probe):
    assert "inside a loop, after an adapter" in what_it_says("gpt-looped", probe)


@pytest.mark.slow
@pytest.mark.parametrize("probe", list(PROBES))
@pytest.mark.parametrize("family", TEXT)
def test_a_probe_of_any_family_measures_or_says_in_one_line_why_it_cannot(family, probe):
    check(family, probe)
