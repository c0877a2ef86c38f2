"""Products of matrices get kernels of their own where what reads them would walk them, if the cost model says so."""

from __future__ import annotations

import pytest
import torch

import tdsl
from lowering.contraction import contraction
from lowering.plan import Plan
from tdsl.explain import predictions
from tdsl.ir import free_indices

LINEAR = "Z[n,o] += X[n,i] * W[o,i]\n"
CONSUMERS = {
    "gelu": ("b[o]", "Y[n,o] = gelu(Z[n,o] + b[o])"),
    "relu": ("b[o]", "Y[n,o] = relu(Z[n,o] + b[o])"),
    "softmax": ("b[o]", "Y[n,o] = softmax[o](Z[n,o] + b[o])"),
    "a_norm": ("b[o]", "m[n] = mean[o](Z[n,o]); v[n] = var[o](Z[n,o]); Y[n,o] = (Z[n,o] - m[n]) / sqrt(v[n] + 1e-5) * b[o]"),
    "root_mean_square": ("b[o]", "s[n] = mean[o](Z[n,o]**2); Y[n,o] = Z[n,o] * rsqrt(s[n] + 1e-5) * b[o]"),
}
LARGE = ["bf16[8192,4096]", "bf16[4096,4096]", "bf16[4096]"]


def function(name: str, backend: str = "auto") -> tdsl.Function:
    more, consumer = CONSUMERS[name]
    return tdsl.function(f"def f(X[n,i], W[o,i], {more}) -> Y[n,o]:\n    {LINEAR}    {consumer}", backend=backend)


def made(plan: Plan) -> list[str]:
    """The products that kernels make, once for each kernel that makes them, after checking that each has its rows and columns on the grid."""
    found = []
    for kernel in plan.kernels:
        products = [s for s in kernel.statements if contraction(s) is not None]
        found += [s.target.tensor for s in products]
        assert len(products) <= 1
        assert all({*free_indices(s.target)} <= {*kernel.grid} for s in products), kernel
    return found


@pytest.mark.parametrize("name", CONSUMERS)
@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "cuda:100", "hip:gfx942"])
def test_no_reduction_drags_a_large_product_along(name: str, target: str) -> None:
    linear = function(name)
    assert ["Z"] == made(linear.plan(*LARGE, target=target))
    assert ["W.grad", "X.grad", "Z"] == sorted(made(linear.grad().plan(*LARGE, LARGE[0], target=target)))


@pytest.mark.parametrize("name", CONSUMERS)
def test_a_gradient_takes_little_more_than_its_products(name: str) -> None:
    state = function(name).grad().lower(*LARGE, LARGE[0], target="cuda:90")
    peak = state.target.flops["bfloat16"] * state.target.sustained_flops
    assert sum(p.seconds for p in predictions(state)) < 1.5 * 3 * 2 * 8192 * 4096 * 4096 / peak


def test_what_was_weighed_is_said() -> None:
    plan = function("gelu").grad().plan(*LARGE, LARGE[0], target="cuda:90")
    (choice,) = [c for c in plan.choices if c.subject == "Z" and c.chosen == "a kernel of its own"]
    (_, together), (_, apart) = choice.costs
    assert apart < together


def test_two_large_products_share_a_kernel_where_they_share_an_operand() -> None:
    """Each has an accumulator of its own, so smaller tiles, which are read more often: too often unless one of them serves both."""
    perceptron = tdsl.function("def f(X[n,i], U[h,i], D[o,h]) -> Y[n,o]: A[n,h] += X[n,i] * U[h,i]; Y[n,o] += gelu(A[n,h]) * D[o,h]")
    assert {"A", "A.grad"} <= {*made(perceptron.grad().plan(LARGE[0], "bf16[8192,4096]", "bf16[4096,8192]", LARGE[0], target="cuda:90"))}
    gated = tdsl.function("def f(X[n,i], U[h,i], V[h,i]) -> Y[n,h]: A[n,h] += X[n,i] * U[h,i]; B[n,h] += X[n,i] * V[h,i]; Y[n,h] = silu(A[n,h]) * B[n,h]")
    assert 1 == len(gated.plan(*LARGE[:2], LARGE[1], target="cuda:90").kernels)


def test_a_short_product_stays_with_its_sum() -> None:
    """A launch takes longer than what it would save."""
    plan = function("gelu").grad().plan("bf16[64,512]", "bf16[512,512]", "bf16[512]", "bf16[64,512]", target="cuda:90")
    assert ["Z", "b.grad", "W.grad"] == list(plan.kernels[0].writes)


@pytest.mark.parametrize("name", CONSUMERS)
def test_values_and_gradients(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    args = [torch.randn(shape, generator=generator, dtype=torch.float64) / 8 for shape in ((48, 64), (520, 64), (520,))]
    found, expected = function(name, "triton"), function(name, "reference")
    small = [a.float() for a in args]
    cotangent = torch.randn(48, 520, generator=generator, dtype=torch.float64)
    assert len(made(found.plan(*small, target="cuda:90"))) == 1
    torch.testing.assert_close(found(*small).double(), expected(*args), rtol=1e-4, atol=1e-5)
    for actual, wanted in zip(found.grad()(*small, cotangent.float()), expected.grad()(*args, cotangent), strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=1e-3, atol=1e-3)
