"""Scale-free comparison, and the tolerances of tests and benchmarks with their reasons."""

import numpy as np
import torch

# relative RMS against float64; eps is the unit roundoff of the dtype of the operands
TOLERANCE = {
    torch.float32: 1e-5,  # measured 2e-7 (eps 6e-8): two chained GEMMs and sums of up to K terms
    torch.bfloat16: 1e-2,  # measured 4e-3 (eps 4e-3): the pre-activation and the activation are rounded to bf16
}


def relative_rms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """|actual - expected| / |expected| in the Frobenius norm, in float64; 0 for two empty or two zero tensors."""
    assert actual.shape == expected.shape, f"shape {list(actual.shape)}, expected {list(expected.shape)}"
    difference = (actual.double() - expected.double()).norm().item()
    norm = expected.double().norm().item()
    return difference / norm if norm else difference


def assert_close(label: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    error = relative_rms(actual, expected)
    assert error < tolerance, f"{label}: relative RMS error {error:.2e}, allowed {tolerance:.0e}"  # NaN fails too


def assert_same_bits(label: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, f"{label}: {actual.dtype} {actual.shape}"
    different = (actual != expected).nonzero()
    assert not len(different), f"{label}: {len(different)} of {actual.numel()} differ, first at {different[0].tolist()}"


def cosine_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """1 - 2 <a, b> / (|a|^2 + |b|^2) in float64, DeepGEMM's measure: scale-free, and 0 only for equal tensors."""
    a, b = actual.double(), expected.double()
    return (1 - 2 * (a * b).sum() / (a.square().sum() + b.square().sum())).item()


def sqnr_db(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """10 log10(|expected|^2 / |actual - expected|^2) in float64."""
    error = (actual.double() - expected.double()).square().sum()
    return (10 * torch.log10(expected.double().square().sum() / error)).item()


def bits_at_the_edges_of_bf16() -> np.ndarray:
    """uint32 bits of float32: every upper half with lower halves around a tie and single bits, and a million others."""
    lower = np.array([0, 1, 0x7FFF, 0x8001, 0xFFFF, *(1 << bit for bit in range(1, 16))], np.uint32)
    edges = (np.arange(65536, dtype=np.uint32)[:, None] << 16 | lower).reshape(-1)
    return np.concatenate([edges, np.random.default_rng(0).integers(0, 1 << 32, 1 << 20, np.uint32)])
