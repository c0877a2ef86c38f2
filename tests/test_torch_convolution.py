"""Sums over windows that become calls of the library's convolution: which do, and that they agree with im2col in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowering import cpp_launch
from tdsl import function
from tdsl.arguments import layout
from tdsl.config import config
from tdsl.ir import Program
from tdsl.runtime import Executor

pytestmark = pytest.mark.skipif(cpp_launch.compiler() is None, reason="there is no C++ compiler")


@pytest.fixture(autouse=True)
def cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small sizes too."""
    monkeypatch.setattr(config, "cpu", "c++")


# Text, shapes, how many of the forward's and of the gradient's kernels are convolutions: where a range is narrower than the tensors may be,
# the gradient of the image has a mask, and stays a loop.
FORMS: dict[str, tuple[str, list[tuple[int, ...]], int, int]] = {
    "line": ("for x in 0:20, r in 0:3:  Y[x] += X[x+r] * W[r]", [(22,), (3,)], 0, 0),
    "channels": ("for x in 0:20, r in 0:3:  Y[n,o,x] += X[n,c,x+r] * W[o,c,r]", [(2, 5, 22), (7, 5, 3)], 1, 1),
    "same": ("for x in 0:23, r in 0:5:  Y[n,o,x] += X[n,c,pad(x+r-2)] * W[o,c,r]", [(2, 5, 23), (7, 5, 5)], 1, 1),
    "one side": ("for x in 0:23, r in 0:4:  Y[n,o,x] += X[n,c,pad(x+r-3)] * W[o,c,r]", [(2, 5, 23), (7, 5, 4)], 1, 1),
    "strided": ("for x in 0:11, r in 0:3:  Y[n,o,x] += X[n,c,pad(2*x+r-1)] * W[o,c,r]", [(3, 4, 22), (6, 4, 3)], 1, 1),
    "dilated": ("for x in 0:18, r in 0:3:  Y[n,o,x] += X[n,c,x+2*r] * W[o,c,r]", [(3, 4, 22), (6, 4, 3)], 1, 1),
    "inside": ("for x in 0:10, r in 0:3:  Y[n,o,x] += X[n,c,x+r+4] * W[o,c,r]", [(3, 4, 22), (6, 4, 3)], 1, 1),
    "plane": (
        "for x in 0:9, y in 0:8, r in 0:3, s in 0:4:  Y[n,o,x,y] += X[n,c,pad(x+r-1),pad(y+s-1)] * W[o,c,r,s]",
        [(2, 3, 9, 9), (5, 3, 3, 4)], 1, 1,
    ),
    "channels last": ("for x in 0:9, y in 0:9, r in 0:3, s in 0:3:  Y[n,x,y,o] += X[n,x+r,y+s,c] * W[r,s,c,o]", [(2, 11, 11, 3), (3, 3, 3, 5)], 1, 1),
    "no batch": ("for x in 0:9, y in 0:9, r in 0:3, s in 0:3:  Y[o,x,y] += X[c,x+r,y+s] * W[o,c,r,s]", [(3, 11, 11), (5, 3, 3, 3)], 1, 1),
    "space": (
        "for x in 0:4, y in 0:5, z in 0:6, r in 0:2, s in 0:2, t in 0:2:  Y[n,o,x,y,z] += X[n,c,x+r,y+s,z+t] * W[o,c,r,s,t]",
        [(2, 3, 5, 6, 7), (4, 3, 2, 2, 2)], 1, 1,
    ),
    "transposed": ("for x in 0:12, r in 0:3:  Y[n,o,x+r] += X[n,c,x] * W[c,o,r]", [(2, 3, 12), (3, 5, 3)], 0, 2),
    "by channel": ("for x in 0:20, r in 0:3:  Y[n,c,x] += X[n,c,x+r] * W[c,r]", [(2, 5, 22), (5, 3)], 0, 0),
    "sizes of the signature": (
        "def f(X[n,c,h,w], W[o,c,r,s]) -> Y[n,o,h,w]:\n    for r in 0:3, s in 0:3:  Y[n,o,x,y] += X[n,c,pad(x+r-1),pad(y+s-1)] * W[o,c,r,s]",
        [(2, 3, 9, 7), (5, 3, 3, 3)], 1, 2,
    ),
}  # fmt: skip


def operands(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def convolutions(program: Program, args: list[Tensor]) -> int:
    executor = Executor(program, "torch")
    return executor.lower(layout(program, args, executor.integers), "cpu").text.count("conv")


@pytest.mark.parametrize("name", FORMS)
def test_forms(name: str) -> None:
    text, shapes, forward, backward = FORMS[name]
    f = function(text)
    results = {}
    for dtype in (torch.float32, torch.float64):
        args = operands(shapes, dtype)
        output = f(*args)
        cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(dtype)
        results[dtype] = [output, *torch.autograd.grad(output, args, cotangent)]
        given = [*args, cotangent]
        counts = convolutions(f.program, args), convolutions(f.grad().program, given)
        assert counts == ((forward, backward) if dtype == torch.float32 else (0, 0))
    for actual, exact in zip(results[torch.float32], results[torch.float64], strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=1e-4, atol=1e-4)


def test_a_program_that_is_torch_code_alone_convolves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """That text also runs on a GPU, whose library may round its operands."""
    monkeypatch.setattr(config, "cpu", "torch")
    text, shapes, _, _ = FORMS["same"]
    assert convolutions(function(text).program, operands(shapes, torch.float32)) == 0
