"""Loops in explicit vectors: which nests they are, their functions to the last place, ends of rows, masks and indices as values,
division by what a row shares, stores past the caches; at every width that the processor has."""

from __future__ import annotations

import ctypes
import platform
from typing import Any

import numpy as np
import pytest
import torch

from lowering import cpp_launch, cpp_math
from lowering.cpp_prelude import HELPERS
from lowering.cpp_vectors import VECTORS
from tdsl import function
from tdsl.arguments import layout
from tdsl.config import config
from tdsl.runtime import Executor
from tests.programs import parsed
from tests.test_cpp import EXACT, ULPS, called, samples, ulps

pytestmark = pytest.mark.skipif(cpp_launch.compiler() is None, reason="there is no C++ compiler")

# What takes the wider vectors away; other processors have one width.
WIDTHS = {"widest": (), "eight": ("-mno-avx512f",), "four": ("-mno-avx",)} if platform.machine() == "x86_64" else {"widest": ()}


@pytest.fixture(params=WIDTHS)
def width(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every kernel that can be C++ is, compiled for vectors of one width."""
    monkeypatch.setattr(config, "cpu", "c++")
    monkeypatch.setattr(cpp_launch, "FLAGS", (*cpp_launch.FLAGS, *WIDTHS[request.param]))
    return str(request.param)


def sources(text: str, *args: Any) -> list[str]:
    """The C++ of each kernel."""
    program = parsed(text)
    executor = Executor(program, "torch")
    return [step.cpp.source if step.cpp else "" for step in executor.lower(layout(program, args, executor.integers), "cpu").steps]


# ---------------------------------------------------------------------------------------------------------------------
# Functions


def loops_of(names: list[str]) -> ctypes.CDLL:
    text = "".join(
        f'extern "C" void {name}_float(const float* __restrict__ x, float* __restrict__ y, i64 n) {{\n'
        f"    vectors<1>(0, n, [&](i64 i, auto at) {{ at.store(&y[i], {name}(at.load(&x[i]))); }});\n}}\n"
        for name in names
    )
    return cpp_launch.load(cpp_math.TYPES + "enum { FUSED = 1 };\n" + cpp_math.prelude([*names, "maximum", "exp", "abs", "sign"]) + HELPERS + VECTORS + text)


@pytest.mark.parametrize("name", [*ULPS, "abs", "sign"])
def test_functions(name: str, width: str) -> None:
    exact = {**EXACT, "sign": lambda x: torch.sign(torch.from_numpy(x)).numpy()}.get(name, getattr(np, name, None))
    with np.errstate(all="ignore"):
        x = samples(np.float32)
        assert ulps(called(loops_of([*ULPS, "abs", "sign"]), name, x), exact(x.astype(np.float64))) <= ULPS.get(name, 0) * (1.1 if width == "four" else 1)


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_halves_round_as_those_of_torch(kind: str, width: str) -> None:
    dtype = getattr(torch, kind)
    x = torch.from_numpy(samples(np.float32))
    assert "Half" in sources(f"Y[i] = {kind}(x[i])", x)[0]
    assert torch.equal(function(f"Y[i] = {kind}(x[i])")(x).view(torch.int16)[~x.isnan()], x.to(dtype).view(torch.int16)[~x.isnan()])
    assert function(f"Y[i] = {kind}(x[i])")(x).isnan().equal(x.isnan())
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)[:-3]
    torch.testing.assert_close(function("Y[i] = float32(x[i])")(every), every.float(), rtol=0, atol=0, equal_nan=True)
    rows = torch.randn(37, 203).to(dtype)
    torch.testing.assert_close(function("Y[n,c] = softmax[c](X[n,c])")(rows), rows.softmax(-1))


def test_a_maximum_is_nan_where_either_is(width: str) -> None:
    pair = torch.tensor([float("nan"), 1.0, -0.0, float("inf"), -float("inf"), 3.0])
    a, b = (t.reshape(-1).repeat(3) for t in torch.meshgrid(pair, pair, indexing="ij"))
    high, low = function("H[i] = maximum(a[i], b[i]); L[i] = minimum(a[i], b[i])")(a, b)
    torch.testing.assert_close(high, torch.maximum(a, b), equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(low, torch.minimum(a, b), equal_nan=True, rtol=0, atol=0)
    rows = torch.randn(9, 67)
    rows[range(9), torch.arange(9) * 8] = float("nan")
    assert function("m[i] max= x[i,j]")(rows).isnan().all() and function("m[i] min= x[i,j]")(rows).isnan().all()


def test_division_by_what_a_row_shares_is_exact(width: str) -> None:
    special = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-45, 1e-38, 3e38, 2e-39, 1e37, 1.0, 3.0, 49.0, -7.0]
    s = torch.cat([torch.tensor(special), torch.randn(50) * 10.0 ** torch.randint(-30, 30, (50,))])
    x = torch.cat([torch.tensor(special), torch.randn(1000) * 10.0 ** torch.randint(-38, 38, (1000,)), s])
    text = "y[n,c] = x[c] / s[n]"
    assert "Divisor" in sources(text, x, s)[0]
    ours, exact = function(text)(x, s), x / s[:, None]
    plain = ((x.abs() >= 2.0**-101) & ((exact.abs() > 1.2e-38) | (exact == 0))) | exact.isnan()
    torch.testing.assert_close(ours[plain], exact[plain], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(ours, exact, rtol=2**-23, atol=2e-45, equal_nan=True)


# ---------------------------------------------------------------------------------------------------------------------
# Nests

SIZES = [(7, 130), (33, 67), (3, 16), (5, 1), (20, 64), (2, 0)]


def agrees(text: str, *args: Any) -> None:
    ours, wanted = (function(text, backend=backend)(*args) for backend in ("torch", "reference"))
    ours, wanted = (r if isinstance(r, tuple) else (r,) for r in (ours, wanted))
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(("n", "m"), SIZES)
def test_masks_in_memory(n: int, m: int, width: str) -> None:
    text = "def f(X[n,c], m[n,c], b[c]) -> Y, Z, W:\n    Y[n,c] = where(m[n,c], X[n,c], b[c]) * 2\n    Z[n,c] = not m[n,c] or X[n,c] > 0\n    W[n,c] = X[n,c] * m[n,c]"
    args = torch.randn(n, m), torch.rand(n, m) > 0.5, torch.randn(m)
    agrees(text, *args)
    assert m < 64 or not any("omp simd" in source for source in sources(text, *args))


@pytest.mark.parametrize(("n", "m"), SIZES)
def test_indices_as_values(n: int, m: int, width: str) -> None:
    text = "def f(X[n,c], k[n]) -> A, B, C:\n    A[n] += X[n,c] * (c == k[n])\n    B[n] max= where(not (2*c - n < k[n]), X[n,c], -1.0)\n    C[n,c] = X[n,c] + 3 * (c - 2*n)"
    for k in (torch.randint(-3, m + 3, (n,)), torch.randint(-(2**40), 2**40, (n,)), torch.full((n,), 2**32)):
        if m:
            agrees(text, torch.randn(n, m), k)
    assert m < 64 or not any("omp simd" in source or "lanes(" in source for source in sources(text, torch.randn(n, m), k))


@pytest.mark.parametrize("n", [137, 64, 19])
def test_attention_in_a_band(n: int, width: str) -> None:
    text = """
    S[h,i,j] += Q[h,i,d] * K[h,j,d]
    P[h,i,j] = softmax[j](where(j <= i and i - j < 40, 0.3 * S[h,i,j] - 0.5 * (i - j), -inf))
    O[h,i,e] += P[h,i,j] * V[h,j,e]
    """
    q, k, v = (torch.randn(2, n, 20) for _ in range(3))
    apart = torch.arange(n)[:, None] - torch.arange(n)
    scores = torch.where((apart >= 0) & (apart < 40), 0.3 * (q @ k.mT) - 0.5 * apart, -torch.inf)
    torch.testing.assert_close(function(text)(q, k, v), scores.softmax(-1) @ v, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("step", [-3, 2**20])
def test_indices_beyond_32_bits_are_no_vectors(step: int, width: str) -> None:
    x = torch.randn(3, 4096)
    text = f"y[n,c] = x[n,c] * (c * {step} < 5000)"
    assert ("vectors<" in sources(text, x)[0]) == (step == -3)
    agrees(text, x)


def test_what_is_no_vector(width: str) -> None:
    x = torch.randn(40, 64)
    for text, *args in (
        ("y[i,j] = x[i,j] + 1", x.double()),
        ("y[i,j] = x[i,j] ** z[i,j]", x, x),
        ("y[i,j] = x[i,2*j]", torch.randn(40, 128)),
        ("for i, j in 0:65: y[i,j] = x[i,pad(j-1)]", x),
        ("y[i,j] = t[k[i,j]]", x[0], torch.randint(64, (40, 64))),
    ):
        assert not any("vectors<" in source for source in sources(text, *args)), text
        agrees(text, *args)


@pytest.mark.parametrize("columns", [1024, 1023])
def test_large_results_go_past_the_caches(columns: int, width: str) -> None:
    x = torch.randn(2100, columns)
    text = "Y[n,c] = softmax[c](X[n,c])"
    assert "at.stream(" in sources(text, x)[0]
    assert "at.stream(" not in sources(text, x[:100])[0]
    torch.testing.assert_close(function(text)(x), x.softmax(1))
    torch.testing.assert_close(function("Y[n,c] = x[n,c] + 1")(x[:, 1:]), x[:, 1:] + 1)


@pytest.mark.parametrize(("term", "fused"), [("2*c - n", True), ("(c / 3) * n", False), ("exp(c) * n", False), ("0.1 * c", False)])
def test_only_integers_are_not_rounded_before_a_sum(term: str, fused: bool) -> None:
    """A maximum is looked for among its terms again: what is rounded in one kernel may not go unrounded into a sum in another."""
    executor = Executor(parsed(f"m[n] max= x[n,c] + {term}"), "torch")
    (step,) = executor.lower(layout(executor.program, [torch.randn(5, 64)], executor.integers), "cpu").steps
    assert step.tile.fused == fused
