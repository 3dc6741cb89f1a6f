"""Second moments of which one triangle is computed are those of the whole product."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lensbench.streams.gram import add_gram_


@settings(max_examples=25, deadline=None)
@given(d=st.integers(1, 300), n=st.integers(1, 40), weighted=st.booleans(), seed=st.integers(0, 9))
def test_a_gram_matrix_in_halves_is_the_whole_product(d, n, weighted, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, d, generator=generator, dtype=torch.float64)
    weights = torch.randint(0, 4, (n, 1), generator=generator).double() if weighted else torch.ones(n, 1)
    start = torch.randn(d, d, generator=generator, dtype=torch.float64)
    start = start + start.T
    found = add_gram_(start.clone(), rows, rows * weights if weighted else None)
    torch.testing.assert_close(found, start + torch.einsum("ni,nj->ij", rows * weights, rows), rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("d", [64, 128, 201])
def test_its_triangles_are_the_same_to_the_last_bit(d):
    rows = torch.randn(50, d, dtype=torch.float64)
    found = add_gram_(torch.zeros(d, d, dtype=torch.float64), rows)
    half = d // 2
    assert torch.equal(found[:half, half:], found[half:, :half].T)
