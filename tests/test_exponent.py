"""exp in base 2: where the factor goes, where nothing is won, and that values stay those of exp."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import tdsl
from tests.fused import FUSED


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("exp(X[i,j] - m[i])", "difference = scaled - scaled1[:, None]"),  # x * c - (m * c)
        ("exp(s * X[i,j])", "scaled1 = x * scaled"),  # x * (s * c)
        ("exp(-X[i,j] / m[i])", "scaled = negated * ratio[:, None]"),  # -x * (c / m)
        ("exp(-0.5 * X[i,j])", "scaled = x * -0.7213475204444817"),
    ],
)
def test_the_factor_goes_to_what_varies_less(value: str, line: str) -> None:
    source = tdsl.function(f"def f(X[i,j], m[i], s) -> Y[i,j]: Y[i,j] = {value}").emit("triton", "fp32[256,128]", "fp32[256]", 0.5, target="cuda:90")
    assert "tl.exp2(" in source and "tl.exp(" not in source
    assert line in source


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("exp(X[i,j])", "scaled = x * 1.4426950408889634"),
        ("exp(-X[i,j] * X[i,j])", "scaled1 = scaled * -1.4426950408889634"),
        ("exp(-(X[i,j] + X[i,j] * X[i,j]))", "scaled1 = total * -1.4426950408889634"),
        ("exp(where(i >= j, X[i,j], 0))", "scaled = chosen * 1.4426950408889634"),
        ("exp(m[i]) * X[i,j]", "scaled = m1 * 1.4426950408889634"),
    ],
)
def test_where_nothing_is_won_the_exponent_is_multiplied(value: str, line: str) -> None:
    source = tdsl.function(f"def f(X[i,j], m[i]) -> Y[i,j]: Y[i,j] = {value}").emit(
        "triton", "fp32[256,128]", "fp32[256]", target="cuda:90"
    )
    assert "tl.exp2(" in source and "tl.exp(" not in source
    assert line in source


@pytest.mark.parametrize("op", ["exp", "sigmoid", "silu", "tanh", "softplus", "expm1", "gelu_tanh"])
def test_no_exponential_of_float32_minds_denormals(op: str) -> None:
    """`tl.exp` and `tl.sigmoid` take a comparison and two multiplications more for each result."""
    pytest.importorskip("triton")
    f = tdsl.function(f"Y[i] = {op}(X[i])")
    assert "tl.exp(" not in f.emit("triton", "fp32[4096]", target="cuda:90")
    assert "ex2.approx.f32" not in f.emit("ptx", "fp32[4096]", target="cuda:90")
    assert "ex2.approx.ftz.f32" in f.emit("ptx", "fp32[4096]", target="cuda:90")


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        ("exp", torch.exp),
        ("sigmoid", torch.sigmoid),
        ("silu", torch.nn.functional.silu),
        ("tanh", torch.tanh),
        ("softplus", lambda x: torch.nn.functional.softplus(x, threshold=50)),
        ("expm1", torch.expm1),
    ],
)
def test_extreme_values(op: str, expected: Callable[..., torch.Tensor]) -> None:
    far = torch.tensor([-torch.inf, -3e38, -1e4, -104.0, -88.0, 88.0, 104.0, 1e4, 3e38, torch.inf, torch.nan])
    near = torch.cat([s * 10.0 ** torch.arange(-30, 1) for s in (-1, 1)])
    x = torch.cat([far, near, torch.zeros(1)])
    actual = tdsl.function(f"Y[i] = {op}(X[i])", backend="triton")(x)
    wanted = expected(x.double())
    finite = wanted.float().isfinite() & x.isfinite()
    torch.testing.assert_close(actual[~finite], wanted[~finite].float(), equal_nan=True)
    torch.testing.assert_close(actual[finite].double(), wanted[finite], rtol=1e-5, atol=1.2e-38)
    torch.testing.assert_close(actual[len(far) :].double(), wanted[len(far) :], rtol=1e-6, atol=1.2e-38)


def test_float64_keeps_its_digits() -> None:
    source = tdsl.function("Y[i,j] = exp(X[i,j] - m[i]) + sigmoid(X[i,j])").emit("triton", "fp64[256,128]", "fp64[256]", target="cuda:90")
    assert "tl.exp(" in source
    x = torch.linspace(-30, 30, 37, dtype=torch.float64)
    torch.testing.assert_close(tdsl.function("Y[i] = sigmoid(X[i])", backend="triton")(x), torch.sigmoid(x), rtol=1e-14, atol=0)


def test_attention_multiplies_its_scale_once() -> None:
    """In the gradient scores meet nothing but one fused multiply-add before the exponential."""
    args = ["bf16[64,4096,64]"] * 3
    source = tdsl.function(FUSED["attention"].text).grad().emit("triton", *args, 0.125, "bf16[64,4096,64]", target="cuda:90")
    last = source[source.rindex("def attention_grad") :]
    before, loop = last.split("for i_start")
    assert "scaled = scale1 * 1.4426950408889634" in before
    assert "scaled1 = s * scaled\n" in loop


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("exp(X[i,j] - m[i] + s)", lambda x, m, s: torch.exp(x - m[:, None] + s)),
        ("exp(-(s * X[i,j] - 2 * m[i]) / (1 + m[i] * m[i]))", lambda x, m, s: torch.exp(-(s * x - 2 * m[:, None]) / (1 + m[:, None] ** 2))),
        ("exp(stop_gradient(m[i]) - X[i,j] * (s - X[i,j]) / 3)", lambda x, m, s: torch.exp(m[:, None] - x * (s - x) / 3)),
        ("exp(where(X[i,j] > 0, X[i,j], -inf) - m[i])", lambda x, m, s: torch.exp(torch.where(x > 0, x, -torch.inf) - m[:, None])),
        ("exp(m[i] * (X[i,j] + i))", lambda x, m, s: torch.exp(m[:, None] * (x + torch.arange(len(m))[:, None]))),
        ("exp(k[i] * X[i,j])", lambda x, m, s: torch.exp(torch.arange(len(m)).double()[:, None] * x)),  # an integer factor
    ],
)
def test_values(value: str, expected: Callable[..., torch.Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, m = torch.randn(11, 37, generator=generator), 0.3 * torch.randn(11, generator=generator)
    arguments = {"X": x, "m": m, "s": 0.7, "k": torch.arange(11)}
    used = [n for n in arguments if f"{n}[" in value or n == "s"]
    dims = {"X": "X[i,j]", "m": "m[i]", "k": "k[i]", "s": "s"}
    text = f"def f({', '.join(dims[n] for n in used)}) -> Y[i,j]: Y[i,j] = {value}"
    actual = tdsl.function(text, backend="triton")(*(arguments[n] for n in used))
    torch.testing.assert_close(actual.double(), expected(x.double(), m.double(), 0.7), rtol=3e-6, atol=1e-7)
