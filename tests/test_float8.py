"""Tensors of 8-bit floats as inputs, with their scales; complex tensors, which there are none of."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

import tdsl
from tdsl import errors

SCALED = """
def scaled(A[m,k], B[n,k], a[m], b[n]) -> Y[m,n]:
    Z[m,n] += A[m,k] * B[n,k]
    Y[m,n] = Z[m,n] * a[m] * b[n]
"""
KINDS = [torch.float8_e4m3fn, torch.float8_e5m2]


def case(kind: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Arguments of SCALED, and its output in float64."""
    a, b = torch.randn(33, 48).to(kind), torch.randn(17, 48).to(kind)
    s, t = torch.rand(33), torch.rand(17)
    return [a, b, s, t], (a.double() @ b.double().T) * s.double()[:, None] * t.double()


@pytest.mark.parametrize("backend", ["auto", "triton", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_of_bfloat16(kind: torch.dtype, backend: str) -> None:
    f = tdsl.function(SCALED, backend=backend)
    args, wanted = case(kind)
    for _ in range(3):
        found = f(*args)
        assert found.dtype == torch.float32  # as of bfloat16 tensors and float32 scales
        torch.testing.assert_close(found.double(), wanted, rtol=2e-2, atol=2e-2)
    wide = f(*(a.bfloat16() for a in args[:2]), *args[2:])
    torch.testing.assert_close(found, wide, rtol=0, atol=0)


@pytest.mark.parametrize("cpu", ["torch", "c++"])
def test_any_strides(cpu: str) -> None:
    with tdsl.config.using(cpu=cpu):
        f = tdsl.function("Y[i,j] = exp(A[i,j]) + B[j]")
        a = torch.randn(8, 12).to(torch.float8_e4m3fn)
        b = torch.randn(6)
        for view in (a[:, ::2], a.T[:6, :6], a[:1, :6].expand(4, 6)):
            torch.testing.assert_close(f(view, b), view.float().exp().bfloat16().float() + b, rtol=1e-2, atol=1e-2)


def test_other_inputs_have_gradients() -> None:
    f = tdsl.function("Y[n,o] += X[n,i] * W[o,i] * s")
    w = torch.randn(7, 5).to(torch.float8_e5m2)
    x, s = torch.randn(3, 5, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    (f(x, w, s) ** 2).sum().backward()
    a, b = x.detach().clone().requires_grad_(), s.detach().clone().requires_grad_()
    y = (a @ w.float().T) * b
    (y**2).sum().backward()
    torch.testing.assert_close((x.grad, s.grad), (a.grad, b.grad))


@pytest.mark.parametrize("how", ["autograd", "torch.func"])
def test_a_gradient_of_8_bits_is_an_error(how: str) -> None:
    f = tdsl.function("y += x[i] * x[i]")
    x = torch.randn(4).to(torch.float8_e4m3fn)
    with pytest.raises(errors.DtypeError, match="x has dtype float8_e4m3fn and requires a gradient"):
        f(x.requires_grad_()) if how == "autograd" else torch.func.grad(lambda x: f(x).float())(x)


def test_tracers_see_what_a_call_gives() -> None:
    f = tdsl.function(SCALED)
    args, _ = case(torch.float8_e4m3fn)
    found = torch.compile(f, fullgraph=True, backend="aot_eager")(*args)
    torch.testing.assert_close(found, f(*args))
    assert f(*(a.to("meta") for a in args)).shape == (33, 17)


@pytest.mark.parametrize("short", ["e4m3", "e5m2"])
def test_tensor_cores_multiply_them_as_they_are(short: str) -> None:
    f = tdsl.function(SCALED)
    args = (f"{short}[512,512]", f"{short}[512,512]", "fp32[512]", "fp32[512]")
    assert "max_num_imprecise_acc" in f.emit("triton", *args, target="cuda:90")
    assert re.search(rf"wgmma\.mma_async\S*m64n\d+k32\.f32\.{short}\.{short}", f.emit("ptx", *args, target="cuda:90"))
    (kernel,) = f.check(*args, target="cuda:90").kernels
    assert kernel.tensor_core == "wgmma" and not kernel.spills
    older = f.emit("triton", *args, target="cuda:80")  # gets them as bfloat16
    assert "max_num_imprecise_acc" not in older


def test_what_is_made_of_them_is_multiplied_in_16_bits() -> None:
    f = tdsl.function("Y[m,n] += exp(A[m,k]) * B[n,k]")
    source = f.emit("triton", "e4m3[512,512]", "e4m3[512,512]", target="cuda:90")
    assert "tl.bfloat16" in source and "max_num_imprecise_acc" not in source
    f.check("e4m3[512,512]", "e4m3[512,512]", target="cuda:90")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fnuz])
def test_other_dtypes_say_what_to_pass(dtype: torch.dtype) -> None:
    with pytest.raises(errors.DtypeError, match="which no kernel computes with") as caught:
        tdsl.function("Y[i] = x[i] + x[i]")(torch.zeros(3).to(dtype))
    assert ("view_as_real" if dtype.is_complex else "float8_e4m3fn") in str(caught.value)


def test_nothing_is_written_in_8_bits() -> None:
    with pytest.raises(errors.UnknownFunction, match="float8_e4m3fn"):
        tdsl.function("Y[i] = float8_e4m3fn(x[i])")
