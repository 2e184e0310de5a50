"""Shared by the tests: random non-trivial weights, the parity measure, and the search for the first
divergence.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qwenedit.taps import Tapped

FP32 = 1e-5  # max |difference| against max |reference|, per component (architecture: numerics)
FP64 = 1e-9  # what stays above this in float64 is a bug; where the reference itself rounds to fp32, FP64_CAST
FP64_CAST = 1e-6
EPS = torch.finfo(torch.float32).eps


@torch.no_grad()
def randomise_(module: nn.Module, seed: int = 0) -> nn.Module:
    """Fill every parameter with non-trivial random values: no zero, no one, no two alike.

    Matrices are scaled by fan-in so that activations keep their size through the depth; vectors (biases and
    norm weights alike) are spread widely enough that leaving one out shows far above any tolerance.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        if parameter.ndim < 2 or parameter[0].numel() == 1:  # biases, norm weights (VAE gammas are (C, 1, 1))
            value = 0.6 + 0.3 * noise
        else:
            value = noise * (1.3 / parameter[0].numel() ** 0.5)
        parameter.copy_(value.to(parameter.dtype))
    return module


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """max |ours - reference| / max |reference|, the measure of every parity test."""
    assert ours.shape == reference.shape, f"shape {tuple(ours.shape)} against {tuple(reference.shape)}"
    assert torch.isfinite(reference).all(), "the reference is not finite"
    scale = reference.abs().max().clamp_min(1e-30)
    return float((ours.double() - reference.double()).abs().max() / scale)


def assert_close(ours: Tensor, reference: Tensor, tolerance: float, what: str = "output") -> None:
    error = relative_error(ours, reference)
    assert error <= tolerance, f"{what}: relative error {error:.3g}, wanted at most {tolerance:.2g}"


def assert_as_close_as(
    got: Tensor, plain: Tensor, exact: Tensor, factor: float = 4.0, what: str = "output"
) -> None:
    """Hold `got` to what the plain form itself loses by rounding: at most `factor` times as far from `exact`.

    `exact` is the plain form in float64, on the same numbers; `plain` is the plain form as it is. The same
    sums in another order lose about as much, on any machine; the factor is for luck. If `plain` is of a lower
    precision than `got`, its loss is taken in last digits. 8 last digits of the largest value (of float32, if
    its own are longer) are allowed in any case: a plain form that is exact by chance would allow nothing.
    """
    assert exact.dtype == torch.float64, f"exact is {exact.dtype}"
    eps = torch.finfo(got.dtype).eps
    lost = relative_error(plain, exact) * eps / torch.finfo(plain.dtype).eps
    assert_close(got, exact, max(factor * lost, 8 * min(eps, EPS)), what)


def copy_weights(ours: nn.Module, reference: nn.Module, table: tuple[tuple[str, str], ...]) -> None:
    """Give our module the reference's weights through the key table; every key on both sides must be used."""
    rules = [(_template_regex(official), own) for official, own in table]
    state = {}
    for key, value in reference.state_dict().items():
        hits = [own.format(**match.groupdict()) for rule, own in rules if (match := rule.fullmatch(key))]
        assert len(hits) == 1, f"{key} matches {len(hits)} rules"
        state[hits[0]] = value
    ours.load_state_dict(state, strict=True, assign=True)


def _template_regex(template: str) -> re.Pattern[str]:
    pattern = re.escape(template).replace(r"\{p\}", "(?P<p>weight|bias)")
    for number in "nm":
        pattern = pattern.replace(rf"\{{{number}\}}", rf"(?P<{number}>\d+)")
    return re.compile(pattern)


@contextmanager
def shapes_checked() -> Iterator[None]:
    """Hold every tap to its shape comment: within the block, each letter has one size everywhere."""
    sizes: dict[str, int] = {}

    def check(instance: Tapped, name: str, x: Tensor, shape: str = "") -> Tensor:
        letters = shape.split()
        assert len(letters) == x.ndim, f"{name}: {tuple(x.shape)} is commented {shape!r}"
        for letter, size in zip(letters, x.shape, strict=True):
            if letter == "*":  # tokens of either stream
                continue
            wanted = int(letter) if letter.isdigit() else sizes.setdefault(letter, size)
            assert size == wanted, f"{name}: {letter} is {size}, elsewhere {wanted}"
        return original(instance, name, x, shape)

    original = Tapped.tap
    Tapped.tap = check  # type: ignore[method-assign]
    try:
        yield
    finally:
        Tapped.tap = original  # type: ignore[method-assign]
