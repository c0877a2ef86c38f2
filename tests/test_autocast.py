"""Precision: the cast policy under torch.autocast, torch's tf32 switches, and dtypes that no kernel computes with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tdsl
from tdsl import devices, errors
from tdsl.autocast import autocast
from tdsl.infer import Spec
from tdsl.text import parse

BF16 = torch.bfloat16
ATTENTION = """
def attention(Q[h,i,d], K[h,j,d], V[h,j,e], scale) -> O[h,i,e]:
    S[h,i,j] += Q[h,i,d] * K[h,j,d]
    P[h,i,j]  = softmax[j](scale * S[h,i,j])
    O[h,i,e] += P[h,i,j] * V[h,j,e]
"""


def cast(text: str, *specs: str) -> str:
    """The body of a program under bfloat16 autocast. specs: dtypes of its parameters, of rank as the signature says."""
    program = parse(text)
    given = {p.name: Spec(tuple(4 for _ in p.dims), dtype) for p, dtype in zip(program.params, specs, strict=True)}
    return str(autocast(program, "bfloat16", given, {}))


@pytest.mark.parametrize(
    "text, dtypes, expected",
    [
        ("Y[i,j] += A[i,k] * B[k,j]", ["float32"] * 2, "for i, j, k:  Y[i,j] += bfloat16(A[i,k]) * bfloat16(B[k,j])"),
        ("y[i] += A[i,k] * x[k]", ["float32"] * 2, "for i, k:  y[i] += bfloat16(A[i,k]) * bfloat16(x[k])"),
        ("y[i] += A[i,k] * x[k]", ["float32", "float16"], "for i, k:  y[i] += bfloat16(A[i,k]) * bfloat16(x[k])"),
        ("Y[x] += X[x+r] * W[r]", ["float32"] * 2, "for x, r:  Y[x] += bfloat16(X[x+r]) * bfloat16(W[r])"),
        ("y[i] = sum[k](A[i,k] * x[k]) + 1", ["float32"] * 2, "for i:  y[i] = sum[k](bfloat16(A[i,k]) * bfloat16(x[k])) + 1"),
        ("Y[i] += s * A[i,k] * exp(x[k])", ["float32"] * 3, "for i, k:  Y[i] += s * bfloat16(A[i,k]) * bfloat16(exp(x[k]))"),
        ("G[i,j] += A[i,k] * A[j,k]", ["float32"], "for i, j, k:  G[i,j] += bfloat16(A[i,k]) * bfloat16(A[j,k])"),
        # float64, sums of squares, dot products of rows, and everything elementwise stay as they are
        ("Y[i,j] += A[i,k] * B[k,j]", ["float64", "float32"], "for i, j, k:  Y[i,j] += A[i,k] * B[k,j]"),
        ("s[n] += X[n,d] * X[n,d]", ["float32"], "for n, d:  s[n] += X[n,d] * X[n,d]"),
        ("s[n] += X[n,d] * Y[n,d]", ["float32"] * 2, "for n, d:  s[n] += X[n,d] * Y[n,d]"),
        ("s[n] += X[n,d]", ["float32"], "for n, d:  s[n] += X[n,d]"),
        ("Y[i,j] = A[i,j] * b[j]", ["float32"] * 2, "for i, j:  Y[i,j] = A[i,j] * b[j]"),
        ("m[i] max= A[i,k] * x[k]", ["float32"] * 2, "for i, k:  m[i] max= A[i,k] * x[k]"),
    ],
)
def test_what_is_cast(text: str, dtypes: list[str], expected: str) -> None:
    assert cast(text, *dtypes) == expected


def arguments(dtype: torch.dtype = torch.float32) -> list[Any]:
    """Of attention."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, n, 8, generator=generator, dtype=dtype).requires_grad_() for n in (5, 7, 7)] + [0.3]


def by_hand(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention in torch."""
    return torch.softmax(scale * (q @ k.mT), -1) @ v


def test_dtypes_are_those_of_torch_under_autocast() -> None:
    f = tdsl.function(ATTENTION)
    args = arguments()
    with torch.autocast("cpu", BF16):
        found, wanted = f(*args), by_hand(*args)
    assert found.dtype == wanted.dtype == BF16
    torch.testing.assert_close(found, wanted, atol=0.02, rtol=0.02)
    found_grads, wanted_grads = (torch.autograd.grad(y.float().square().sum(), args[:3]) for y in (found, wanted))
    for a, b in zip(found_grads, wanted_grads, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, atol=0.05, rtol=0.05)
    assert f(*args).dtype == torch.float32
    with torch.autocast("cpu", BF16):
        assert f(*arguments(torch.float64)).dtype == torch.float64
        with torch.autocast("cpu", enabled=False):
            assert f(*args).dtype == torch.float32


def test_autocast_keeps_the_kernels_fused_and_their_gradients_in_bfloat16() -> None:
    f = tdsl.function(ATTENTION)
    args = arguments()
    with torch.autocast("cpu", BF16):
        under = f.under_autocast(args)
    assert under is not None
    specs = ("fp32[16,1024,64]",) * 3 + (0.125,)
    assert len(under.plan(*specs).kernels) == len(f.plan(*specs).kernels) == 1
    text = str(under.grad("Q").program)
    assert "Q.grad[h,i,d] += bfloat16(S.grad[h,i,j]) * bfloat16(K[h,j,d])" in text


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_autocast_of_a_compiled_model(where: str) -> None:
    torch._dynamo.reset()
    f = tdsl.function(ATTENTION)
    args = arguments()

    def model(*a: Any) -> Tensor:
        if where == "inside":
            with torch.autocast("cpu", BF16):
                return f(*a)  # type: ignore[no-any-return]
        return f(*a)  # type: ignore[no-any-return]

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", BF16, enabled=where == "outside"):
        found, wanted = compiled(*args), model(*args)
    assert found.dtype == BF16
    torch.testing.assert_close(found, wanted)
    grads = [torch.autograd.grad(y.float().square().sum(), args[:3]) for y in (found, wanted)]
    torch.testing.assert_close(*grads)


def test_autocast_under_torch_func() -> None:
    f = tdsl.function(ATTENTION)
    q, k, v, scale = arguments()
    with torch.autocast("cpu", BF16):
        grads = [torch.func.grad(lambda x, g=g: g(x, k, v, scale).float().square().sum())(q) for g in (f, by_hand)]
    torch.testing.assert_close(*grads, atol=0.05, rtol=0.05)


def test_a_backward_inside_of_autocast_is_what_the_forward_was() -> None:
    f = tdsl.function("Y[i,j] += A[i,k] * B[k,j]")
    a, b = torch.randn(5, 7, requires_grad=True), torch.randn(7, 6)
    for _ in range(3):
        y = f(a, b)
        with torch.autocast("cpu", BF16):
            (grad,) = torch.autograd.grad(y, a, torch.ones_like(y))
        torch.testing.assert_close(grad, torch.ones(5, 6) @ b.T, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("switch", ["older", "newer"])
def test_tf32_follows_torchs_switches(switch: str) -> None:
    assert devices.input_precision() == "ieee"
    matmul = torch.backends.cuda.matmul
    if switch == "older":
        matmul.allow_tf32 = True
    elif hasattr(matmul, "fp32_precision"):
        matmul.fp32_precision = "tf32"
    else:
        pytest.skip("this torch has one switch")
    try:
        f = tdsl.function("Y[i,j] += A[i,k] * B[k,j]")
        assert 'input_precision="tf32"' in f.emit("triton", "fp32[64,64]", "fp32[64,64]", target="cuda:90")
    finally:
        if switch == "older":
            matmul.allow_tf32 = False
        else:
            matmul.fp32_precision = "none"
    assert devices.input_precision() == "ieee"


@pytest.mark.parametrize(
    "dtype, mend",
    [(torch.complex64, "torch.view_as_real"), (torch.float8_e5m2fnuz, "float8_e4m3fn"), (torch.uint16, "int32")],
)
def test_dtypes_that_no_kernel_computes_with(dtype: torch.dtype, mend: str) -> None:
    f = tdsl.function("Y[i] = 2 * x[i]")
    with pytest.raises(errors.DtypeError, match=mend):
        f(torch.zeros(3, dtype=dtype))
