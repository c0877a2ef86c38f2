"""Affine reads on a CPU: strided views with zeros around them, in place of gathers, and products without copies of the result."""

from __future__ import annotations

import pytest
import torch

import tdsl
from tdsl.config import config

CASES = {
    "window": "for n, i in 0:11, k in 0:3: Y[n,i] += X[n,pad(i+k-1)] * W[k]",
    "stride": "for n, i in 0:5, k in 0:3: Y[n,i] += X[n,pad(2*i+k-1)] * W[k]",
    "dilation": "for n, i in 0:11, k in 0:3: Y[n,i] += X[n,pad(i+2*k-2)] * W[k]",
    "backwards": "for n, i in 0:11, k in 0:3: Y[n,i] += X[n,pad(i-k+1)] * W[k]",
    "reversed": "for n, i: Y[n,i] = X[n,10-i] + X[1-n,i]",
    "far": "for n, i in 0:11, k in 0:3: Y[n,i] += X[n,pad(i-k-4)] * W[k]",
    "both": "for n, i, j in 0:3: Y[i,j] += X[n,i] * X[pad(n+j-1),pad(i-j+1)]",
    "columns": "for n, o, i: Z[n,o,i] += A[n,c,i] * B[o,c]; Y[n,o,i] = tanh(Z[n,o,i])",
    "image": "for n, o, x in 0:6, y in 0:5, c, r in 0:3, s in 0:3: Y[n,o,x,y] += I[n,c,pad(x+r-1),pad(y+s-1)] * V[o,c,r,s]",
}
SIZES = {"X": (2, 11), "W": (3,), "A": (3, 5, 7), "B": (4, 5), "I": (2, 3, 6, 5), "V": (4, 3, 3, 3)}


def inputs(text: str, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(SIZES[name], generator=generator, dtype=torch.float64).to(dtype) for name in tdsl.function(text).program.inputs]


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "expanded"])
@pytest.mark.parametrize("name", CASES)
def test_values(name: str, layout: str) -> None:
    """Against the loops, forward and gradients, whatever the strides of the arguments are."""
    text = CASES[name]
    args = inputs(text, torch.float64)
    if layout == "transposed":
        args = [a.mT.contiguous().mT if a.dim() > 1 else a for a in args]
    elif layout == "expanded":
        args = [a[:1].expand(a.shape) for a in args]
    leaves = [a.detach().requires_grad_() for a in args]
    with config.using(cpu="torch"):
        result = tdsl.function(text, backend="torch")(*leaves)
        grads = torch.autograd.grad(result.sin().sum(), leaves)
    again = [a.detach().requires_grad_() for a in args]
    expected = tdsl.function(text, backend="reference")(*again)
    torch.testing.assert_close(result, expected)
    for grad, want in zip(grads, torch.autograd.grad(expected.sin().sum(), again), strict=True):
        torch.testing.assert_close(grad, want)


@pytest.mark.parametrize("name", ["window", "stride", "dilation", "backwards", "reversed", "image"])
def test_no_gather(name: str) -> None:
    text = CASES[name]
    args = inputs(text, torch.float32)
    with config.using(cpu="torch"):
        source = tdsl.function(text).emit("torch", *args)
    assert "as_strided(" in source and "torch.where(" not in source and "arange" not in source


def test_the_larger_tensor_is_read_forwards() -> None:
    """In the gradient of a convolution the kernel is turned around, not the windows of what is convolved."""
    with config.using(cpu="torch"):
        source = tdsl.function(CASES["image"]).grad("I").emit("torch", *inputs(CASES["image"], torch.float32), torch.randn(2, 4, 6, 5))
    windows = next(line for line in source.splitlines() if "_padded" in line)
    assert ".flip(" not in windows and ".flip(" in source


def test_a_result_in_its_own_order() -> None:
    """A product for each leading index: neither the operand nor the result is brought into another order."""
    with config.using(cpu="torch"):
        source = tdsl.function("for n, o, i, j, c: Y[n,o,i,j] += A[n,c,i,j] * B[o,c]").emit("torch", torch.randn(3, 5, 7, 4), torch.randn(6, 5))
    product = next(line for line in source.splitlines() if "torch.matmul(" in line)
    assert product.strip().startswith("y = torch.matmul(b, a.") and product.endswith(".reshape(3, 5, 7 * 4)).reshape(3, 6, 7, 4)")


def test_operands_are_copied_as_they_lie() -> None:
    """Where a side of several dimensions needs a copy, its last dimension stays the last one; a result that is turned anyway follows."""
    tensors = [torch.randn(2, 3, 5, 7), torch.randn(7, 4, 3, 6), torch.randn(2, 5, 4, 6)]
    with config.using(cpu="torch"):
        grad = tdsl.function("Y[a,b,c,d] += A[a,e,b,f] * B[f,c,e,d]").grad("B")
        source = grad.emit("torch", *tensors)
        found = grad(*tensors)
    product = next(line for line in source.splitlines() if "torch.matmul(" in line)
    assert ".reshape(2 * 5, 3 * 7).mT, " in product  # a, b, e, f: rows of f are copied whole
    expected = torch.einsum("aebf,abcd->fced", tensors[0].double(), tensors[2].double())
    assert (found.double() - expected).abs().max() < 1e-4


def test_little_of_much_padding_stays_a_gather() -> None:
    """A tensor that would be mostly zeros is not made."""
    with config.using(cpu="torch"):
        source = tdsl.function("for i in 0:5: Y[i] = X[pad(i-1000)] + X[i]").emit("torch", torch.randn(11))
    assert "torch.where(" in source
