"""The matrix products of a call, and the time that they take alone: a lower bound of the call's."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Product = tuple[int, int, int]  # (rows, inner) @ (inner, columns)
LARGE = 8192  # rows and columns of a product that reaches an accelerator's peak rate


class Products(TorchDispatchMode):
    """Counts the matrix products that run under it, with those inside attention kernels, per head."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[Product] = Counter()

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            left, right = args[-2:]
            self.found[(left.shape[-2], left.shape[-1], right.shape[-1])] += left.shape[:-2].numel()
        elif name.startswith("_scaled_dot_product"):
            q, k, v = args[:3]
            heads = q.shape[:-2].numel()
            self.found[(q.shape[-2], q.shape[-1], k.shape[-2])] += heads
            self.found[(q.shape[-2], k.shape[-2], v.shape[-1])] += heads
        return func(*args, **(kwargs or {}))


def products_of(call: Callable[[], object]) -> Counter[Product]:
    """The matrix products of a call; compiled code runs uncompiled meanwhile."""
    with torch.compiler.set_stance("force_eager"), Products() as products:
        call()
    return products.found


def floor_of(call: Callable[[], object], device: str, dtype: torch.dtype) -> Callable[[], float]:
    """A function that measures the seconds of the call's matrix products alone.

    On the CPU each product runs at its own shape. On an accelerator, kernels join small products and run
    faster than any alone, so all of them count at the rate of one large product.
    """
    products = products_of(call)
    if device != "cpu":
        work = sum(count * rows * inner * columns for (rows, inner, columns), count in products.items())
        return lambda: work / LARGE**3 * _seconds({(LARGE,) * 3: 10}, device, dtype) / 10
    return lambda: _seconds(products, device, dtype)


def _seconds(products: dict[Product, int], device: str, dtype: torch.dtype) -> float:
    total = 0.0
    for (rows, inner, columns), count in products.items():
        row = torch.randn(inner, device=device, dtype=dtype)
        left = row.repeat(rows, 1)
        right = row.repeat(columns, 1).t()  # the layout of a layer's weight
        out = torch.empty(rows, columns, device=device, dtype=dtype)
        _run(left, right, out, 1, device)  # the first touches the memory
        start = time.perf_counter()
        _run(left, right, out, count, device)
        total += time.perf_counter() - start
    return total


def _run(left: Tensor, right: Tensor, out: Tensor, count: int, device: str) -> None:
    for _ in range(count):
        torch.mm(left, right, out=out)
    if device != "cpu":
        torch.accelerator.synchronize()
