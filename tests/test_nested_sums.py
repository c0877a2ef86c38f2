"""Sums of the terms of other sums: they sum those, whatever their indices are called, and nothing else changes."""

from __future__ import annotations

import pytest
import torch

import tdsl
from lowering.contraction import contraction
from tdsl.ir import reads

PERCEPTRON = """
    def perceptron(X[n,i], U[h,i], b[h], D[o,h]) -> Y[n,o]:
        A[n,h] += X[n,i] * U[h,i]
        Y[n,o] += gelu(A[n,h] + b[h]) * D[o,h]
    """
SUMMED = {
    "later": ("R[i] += A[i,j,k] * B[j,k]; T += B[j,k] * A[i,j,k]", True),
    "earlier": ("T += A[i,j,k] * B[j,k]; R[i] += A[i,j,k] * B[j,k]", True),
    "renamed": ("R[i] += A[i,j,k] * B[j,k]; T += A[p,q,r] * B[q,r]", True),
    "a_maximum": ("R[i] max= A[i,j,k] * B[j,k]; T max= A[i,j,k] * B[j,k]", True),
    "a_factor_more": ("R[i] += A[i,j,k] * B[j,k]; T += A[i,j,k] * B[j,k] * B[j,k]", False),
    "another_reduction": ("R[i] += A[i,j,k] * B[j,k]; T max= A[i,j,k] * B[j,k]", False),
    "a_part": ("for i, j in 0:3, k: R[i] += A[i,j,k] * B[j,k]\nT += A[i,j,k] * B[j,k]", False),
    "crossed": ("R[j] += A[i,j,k] * B[j,k]; T[i] += A[i,j,k] * B[j,k]", False),
}


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("form", SUMMED)
def test_a_sum_of_a_sum(form: str, backend: str) -> None:
    text, sums = SUMMED[form]
    function = tdsl.function(f"def f(A[i,j,k], B[j,k]) -> R, T:\n{text}", backend=backend)
    generator = torch.Generator().manual_seed(0)
    args = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((6, 4, 5), (4, 5))]
    made = [s for k in function.plan(*args, target="cuda:90").kernels for s in k.statements]
    assert sums == any(a.tensor == "R" for s in made if s.target.tensor != "R" for a in reads(s))
    for actual, expected in zip(function(*args), tdsl.function(str(function.program), backend="reference")(*args), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("target", ["cuda:90", "cpu"])
def test_the_gradient_of_a_bias_makes_no_product_again(target: str) -> None:
    sizes = ["bf16[8192,1024]", "bf16[4096,1024]", "bf16[4096]", "bf16[1024,4096]"]
    plan = tdsl.function(PERCEPTRON).grad().plan(*sizes, sizes[0], target=target)
    bias = [s for k in plan.kernels for s in k.statements if s.target.tensor.startswith("b.grad")]
    read = {a.tensor for s in bias for a in reads(s)}
    assert "A.grad" in read
    assert set() == read & {"D", "Y.grad"}


def test_a_sum_over_three_operands_is_a_product_of_two_first() -> None:
    """`s` is a number: no order takes fewer multiply-adds, but tensor cores make the first pair."""
    text = "def f(H[n,r], B[o,r], G[n,o]) -> s: s += G[n,o] * H[n,r] * B[o,r]"
    plan = tdsl.function(text).plan("bf16[8192,16]", "bf16[4096,16]", "bf16[8192,4096]", target="cuda:90")
    assert 1 == sum(contraction(s) is not None for k in plan.kernels for s in k.statements)
    generator = torch.Generator().manual_seed(0)
    args = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((40, 16), (48, 16), (40, 48))]
    expected = tdsl.function(text, backend="reference")(*args)
    torch.testing.assert_close(tdsl.function(text, backend="triton")(*args), expected)
