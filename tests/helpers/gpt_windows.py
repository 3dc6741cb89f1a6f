"""Windows of random tokens."""

import numpy as np

from lensbench.data.windows import Windows


def windows(seed: int = 0, count: int = 12) -> Windows:
    rng = np.random.default_rng(seed)
    positions = np.stack([np.sort(rng.choice(np.arange(1, 19), 5, replace=False)) for _ in range(count)])
    valid = np.ones_like(positions, dtype=bool)
    valid[3, -2:] = False
    return Windows(
        ids=rng.integers(0, 61, (count, 20)),
        lengths=np.full(count, 20),
        positions=positions,
        valid=valid,
        documents=np.arange(count) // 2,
        document_names=tuple(f"doc{k}" for k in range(count // 2)),
        sequence=np.arange(count) % 2,
        next_bytes=np.ones_like(positions, dtype=np.int32),
    )
