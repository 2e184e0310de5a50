"""Shared by the tests: random non-trivial weights, the parity measure, and the search for the first divergence."""

from __future__ import annotations

import torch
from torch import Tensor, nn

FP32 = 1e-5  # max |difference| against max |reference|, per component (architecture: numerics)
FP64 = 1e-9  # what stays above this in float64 is a bug; where the reference itself rounds to fp32, FP64_CAST
FP64_CAST = 1e-6


@torch.no_grad()
def randomise_(module: nn.Module, seed: int = 0) -> nn.Module:
    """Fill every parameter with non-trivial random values: no zero, no one, no two alike.

    Matrices are scaled by fan-in so that activations keep their size through the depth; vectors (biases and norm
    weights alike) are spread widely enough that leaving one out shows far above any tolerance.
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
    assert error <= tolerance, f"{what}: relative error {error:.3g}, wanted at most {tolerance:.0e}"
