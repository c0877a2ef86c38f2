"""Rounding errors against float64: no worse than torch's on the same inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from benchmarks.numerics import LONG_SUMS, Sample, errors

# One rounding of a result: errors below it say nothing.
ULP = {"float32": 2.0**-23, "bfloat16": 2.0**-8}


def normal(*sizes: tuple[int, ...], scale: float = 1.0) -> Callable[[torch.Generator, str], Any]:
    return lambda generator, device: [scale * torch.randn(s, generator=generator, dtype=torch.float64) for s in sizes]


ROWS = (
    Sample("matmul", "Y[i,j] += A[i,k] * B[k,j]", torch.matmul, normal((37, 501), (501, 29))),
    Sample("softmax", "Y[i,j] = softmax[j](X[i,j])", lambda x: torch.softmax(x, -1), normal((19, 301), scale=4.0)),
    Sample("log softmax", "Y[i,j] = X[i,j] - logsumexp[j](X[i,j])", lambda x: torch.log_softmax(x, -1), normal((19, 301), scale=4.0)),
    Sample(
        "layer norm",
        "Y[n,d] = (X[n,d] - mean[e](X[n,e])) * rsqrt(var[e](X[n,e]) + 1e-05) * g[d] + b[d]",
        lambda x, g, b: F.layer_norm(x, (x.shape[-1],), g, b),
        normal((23, 257), (257,), (257,)),
    ),
    Sample(
        "attention",
        "S[i,j] += Q[i,d] * K[j,d]; P[i,j] = softmax[j](0.25 * S[i,j]); O[i,e] += P[i,j] * V[j,e]",
        lambda q, k, v: torch.softmax(0.25 * (q @ k.T), -1) @ v,
        normal((70, 16), (301, 16), (301, 16)),
    ),
)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("dtype", ULP)
@pytest.mark.parametrize("sample", ROWS, ids=lambda s: s.name)
def test_rows(sample: Sample, dtype: str, backend: str) -> None:
    compare(sample, dtype, backend)


@pytest.mark.parametrize("dtype", ULP)
@pytest.mark.parametrize("sample", LONG_SUMS, ids=lambda s: s.name)
def test_a_million_terms(sample: Sample, dtype: str) -> None:
    compare(sample, dtype, "auto")


def test_the_kernels_of_a_gpu_sum_pairwise() -> None:
    """Through the interpreter: a long row in float32, as tiles are added lane by lane and folded at the end."""
    text, make = "s += x[k]", lambda generator, device: [1 + torch.rand(100_003, generator=generator, dtype=torch.float64)]
    compare(Sample("sum", text, torch.sum, make), "float32", "triton")


def compare(sample: Sample, dtype: str, backend: str) -> None:
    """Within twice torch's error, or four roundings of the result."""
    found = errors(sample, dtype, "cpu", backend)
    for mine, theirs in (found.forward, found.gradient):
        assert mine <= max(2 * theirs, 4 * ULP[dtype]), found
