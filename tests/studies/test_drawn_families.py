"""What every family of streams that judge the update decomposition keeps to: its seed, and its declared ranges."""

import pytest
import torch

from lensbench.studies.held_out import HELD_OUT_FAMILIES, HeldOutStream
from lensbench.studies.held_out_uneven import UNEVEN_FAMILIES, UnevenStream

KINDS = [(HeldOutStream, HELD_OUT_FAMILIES, 12), (UnevenStream, UNEVEN_FAMILIES, 10)]


@pytest.mark.parametrize(("kind", "family"), [(kind, family) for kind, families, _ in KINDS for family in families])
def test_a_seed_gives_the_same_stream_and_another_seed_another_one(kind, family):
    first, again, other = (kind(family, seed=s).capture(40, seed=1) for s in (3, 3, 4))
    assert torch.equal(first.states, again.states)
    assert torch.equal(first.targets, again.targets)
    assert first.states.shape != other.states.shape or not torch.allclose(first.states, other.states)
    assert not torch.equal(first.states, kind(family, seed=3).states(40, seed=2))


@pytest.mark.parametrize(("kind", "families", "deepest"), KINDS)
def test_streams_differ_in_width_depth_and_noise_within_their_ranges(kind, families, deepest):
    for family, made in families.items():
        streams = [kind(family, seed=seed) for seed in range(6)]
        assert all(24 <= stream.d <= 96 and 4 <= stream.layers <= deepest for stream in streams)
        for name, limits in made.ranges.items():
            values = [stream.drawn[name] for stream in streams]
            assert len(set(values)) > 1
            assert set(values) <= set(limits) if isinstance(limits[0], str) else min(limits) <= min(values)
            assert isinstance(limits[0], str) or max(values) <= max(limits)
