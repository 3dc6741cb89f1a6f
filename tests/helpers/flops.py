"""FLOPs that some work really makes: products as torch counts them, and the linear algebra that it leaves out."""

import math
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten


def attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """Of the scores and of what they weigh, a causal mask left out."""
    return 2 * math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def attention_backward(_: Any, q: Any, k: Any, v: Any, *__: Any, **___: Any) -> int:
    """The scores once more, and both products twice."""
    return attention(q, k, v) * 5 // 2


def cholesky(a: Any, *_: Any, **__: Any) -> int:
    """Of ``[..., d, d]``."""
    return math.prod(a) * a[-1] // 3


def cholesky_solve(b: Any, a: Any, *_: Any, **__: Any) -> int:
    """Two triangular systems of ``[..., d, n]``."""
    return 2 * math.prod(b) * a[-1]


def triangular_solve(a: Any, b: Any, *_: Any, **__: Any) -> int:
    """One triangular system."""
    return math.prod(b) * a[-1]


def vector(a: Any, *_: Any, **__: Any) -> int:
    """A product with a vector."""
    return 2 * math.prod(a)


def product_added(_: Any, a: Any, b: Any, **__: Any) -> int:
    """A product that is added to a matrix in place, which torch leaves out."""
    return 2 * math.prod(a) * b[-1]


FURTHER = {
    aten.addmm_: product_added,
    aten._scaled_dot_product_flash_attention_for_cpu: attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    aten.linalg_cholesky_ex: cholesky,
    aten.cholesky_solve: cholesky_solve,
    aten.linalg_solve_triangular: triangular_solve,
    aten.mv: vector,
    aten.dot: vector,
}


class Counter(TorchDispatchMode):
    """Adds up FLOPs; those of eigenvalues and singular values are not counted.

    torch's own counter follows modules with hooks, which vector-Jacobian products do not allow; its formulas are used here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet in FURTHER:
            self.flops += FURTHER[packet](*(x.shape if isinstance(x, torch.Tensor) else x for x in args))
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=out)
        return out
