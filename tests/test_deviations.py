"""Sums of deviations from a mean leave the gradient, and nothing else does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tdsl
from tdsl.printer import print_statement
from tdsl.simplify import simplify
from tdsl.swap import backward, gradient
from tdsl.text import parse
from tests.programs import assert_close, expected
from tests.test_gradients import assert_directional

NORM = """
    M[n] = mean[c](X[n,c])
    V[n] = var[c](X[n,c])
    Y[n,c] = (X[n,c] - M[n]) * rsqrt(V[n] + 1e-5) * g[c] + b[c]
"""
# Each with the sums over X that its gradient is left with, for the mean and the variance of the forward among them.
NORMS = {
    "norm": (NORM, "M.total V.squares M.grad V.grad"),
    "by_hand": (
        """
        S[n] += X[n,c]
        M[n] = S[n] / size(X, 1)
        Q[n] += (X[n,c] - M[n]) ** 2
        V[n] = Q[n] / size(X, 1)
        Y[n,c] = (X[n,c] - M[n]) * rsqrt(V[n] + 1e-5) * g[c] + b[c]
        """,
        "S Q M.grad V.grad",
    ),
    "named_deviations": (
        """
        M[n] = mean[c](X[n,c])
        D[n,c] = X[n,c] - M[n]
        V[n] = mean[c](D[n,c] * D[n,c])
        Y[n,c] = D[n,c] * rsqrt(V[n] + 1e-5) * g[c] + b[c]
        """,
        "M.total V.total V.grad M.grad",
    ),
    "of_an_expression": ("V[n] = var[c](X[n,c] * g[c])\nY[n] = V[n] * V[n]", "V.total V.squares"),
    "mean_in_one": ("M[n] += X[n,c] / size(X, 1)\nV[n] += (M[n] - X[n,c]) * (M[n] - X[n,c])", "M"),
    "of_products": ("M[n] += X[n,c] * g[c] / size(X, 1)\nV[n] += (g[c] * X[n,c] - M[n]) ** 2", "M"),
    "both_axes": ("M = mean[n,c](X[n,c])\nV[j] += g[j] * (X[n,c] - M) ** 2", "M.total X.grad"),
    "inner_range": ("S[n] = sum[c in 1:4](X[n,c]) / 3\nfor n, c in 1:4: V[n] += (X[n,c] - S[n]) ** 2", "S.sum"),
}
OTHERS = {
    "unbiased": "S[n] += X[n,c]\nM[n] = S[n] / (size(X, 1) - 1)\nV[n] += (X[n,c] - M[n]) ** 2",
    "part": "S[n] += X[n,c]\nM[n] = S[n] / size(X, 1)\nfor n, c in 1:4: V[n] += (X[n,c] - M[n]) ** 2",
    "part_of_mean": "for n, c in 1:4: S[n] += X[n,c]\nM[n] = S[n] / size(X, 1)\nV[n] += (X[n,c] - M[n]) ** 2",
    "part_of_rows": "for n in 1:size(X, 0), c: S[n] += X[n,c]\nM[n] = S[n] / size(X, 1)\nV[n] += (X[n,c] - M[n]) ** 2",
    "weighted": "M[n] = mean[c](X[n,c])\nV[n] += g[c] * (X[n,c] - M[n]) ** 2",
    "masked": "M[n] = mean[c](X[n,c])\nV[n] += where(c < 3, (X[n,c] - M[n]) ** 2, 0)",
    "of_another": "M[n] = mean[c](X[n,c] * g[c])\nV[n] += (X[n,c] - M[n]) ** 2",
    "of_another_row": "M[n] = mean[c](X[n,c])\nV[n] += (X[n,c] - M[pad(n-1)]) ** 2",
    "shifted": "M[n] = mean[c](X[n,c])\nV[n] += (X[n,pad(c+1)] - M[n]) ** 2",
    "along_rows": "M[c] = mean[n](X[n,c])\nV[n] += (X[n,c] - M[c]) ** 2",
    "written_again": "M[n] = mean[c](X[n,c])\nX[n,c] = X[n,c] * g[c]\nV[n] += (X[n,c] - M[n]) ** 2",
    "two_parts": "S[n] += X[n,c]\nS[n] += g[c]\nM[n] = S[n] / size(X, 1)\nV[n] += (X[n,c] - M[n]) ** 2",
}


def sums(text: str) -> set[str]:
    """The tensors that the gradient's statements with X make by a sum along a row."""
    found = set()
    for s in gradient(parse(text)).body:
        if s.reduced and s.target.tensor not in ("g.grad", "b.grad"):
            found.add(s.target.tensor)
    return found


def test_the_gradient_of_a_variance() -> None:
    assert (
        str(tdsl.function("V[n] = var[c](X[n,c])").grad().program)
        == """\
def V_grad(X[n,c], V.grad[n]) -> X.grad[n,c]:
    for n, c:  V.total[n] += X[n,c]
    for n:  V.mean[n] = V.total[n] / size(X, 1)
    for n:  V.var.grad[n] += V.grad[n]
    for n:  V.squares.grad[n] += V.var.grad[n] / size(X, 1)
    for n, c:  X.grad[n,c] += 2 * V.squares.grad[n] * (X[n,c] - V.mean[n])"""
    )


@pytest.mark.parametrize("name", NORMS)
def test_deviations_are_not_summed(name: str) -> None:
    text, left = NORMS[name]
    assert sums(text) == set(left.split()), gradient(parse(text))


def arguments(text: str, rows: int = 4, columns: int = 5) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"X": (rows, columns), "g": (columns,), "b": (columns,)}
    return [torch.randn(shapes[name], generator=generator, dtype=torch.float64) for name in parse(text).inputs]


@pytest.mark.parametrize("name", [*NORMS, *OTHERS])
def test_every_order(name: str) -> None:
    """What is a sum of deviations, and what only looks like one: against differences, and the rule alone, three times."""
    text = NORMS[name][0] if name in NORMS else OTHERS[name]
    program, args = parse(text), arguments(text)
    for _ in range(3):
        derived, given = assert_directional(program, args, tolerance=1e-4)
        for short, long in zip(expected(derived, given), expected(backward(program), given), strict=True):
            assert_close(short, long, 1e-9)
        program, args = derived, given


@pytest.mark.parametrize("name", OTHERS)
def test_what_only_looks_like_deviations_stays(name: str) -> None:
    derived = gradient(parse(OTHERS[name]))
    assert any(s.target.tensor == "M.grad" and s.reduced for s in derived.body), derived


def composed(X: Tensor, g: Tensor, b: Tensor) -> Tensor:
    mean = X.mean(1, keepdim=True)
    return (X - mean) * ((X - mean).pow(2).mean(1, keepdim=True) + 1e-5).rsqrt() * g + b


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (3, 1), (1, 1), (3, 17)])
def test_small_rows(shape: tuple[int, int]) -> None:
    text = NORMS["by_hand"][0]
    args = [a.requires_grad_() for a in arguments(text, *shape)]
    cotangent = torch.randn(shape, dtype=torch.float64)
    for actual, wanted in zip(*(torch.autograd.grad(f(*args), args, cotangent) for f in (tdsl.function(text), composed)), strict=True):
        assert_close(actual, wanted, 1e-9)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite(value: float) -> None:
    args = arguments(NORM, 3, 5)
    args[0][1, 2] = value
    args = [a.requires_grad_() for a in args]
    ours, torchs = (torch.autograd.grad(f(*args), args, torch.ones(3, 5, dtype=torch.float64)) for f in (tdsl.function(NORM), composed))
    assert ours[0][1].isnan().all() and ours[0][[0, 2]].isfinite().all()
    assert all(torch.equal(a.isnan(), b.isnan()) for a, b in zip(ours, torchs, strict=True))
    variances = tdsl.function("V[n] = var[c](X[n,c])"), lambda X: X.var(1, correction=0)
    ours, torchs = (torch.autograd.grad(f(args[0]).sum(), args[0]) for f in variances)
    assert_close(ours[0], torchs[0], 1e-9)


def test_hessian() -> None:
    X, g, b = arguments(NORM, 2, 4)
    weights = torch.randn(2, 4, dtype=torch.float64)
    ours, torchs = (torch.func.hessian(lambda X, f=f: (f(X, g, b) * weights).sum())(X) for f in (tdsl.function(NORM), composed))
    assert_close(ours, torchs, 1e-9)


def test_equal_statements_apart_are_one() -> None:
    """An operand twice gives two swapped statements, with another operand's between them."""
    assert (
        str(tdsl.function("Z[n] += (A[n,c] - b[n]) * (A[n,c] - b[n])").grad().program)
        == """\
def Z_grad(A[n,c], b[n], Z.grad[n]) -> A.grad[n,c], b.grad[n]:
    for n, c:  A.grad[n,c] += 2 * Z.grad[n] * (A[n,c] - b[n])
    for n, c:  b.grad[n] += -(2 * Z.grad[n] * (A[n,c] - b[n]))"""
    )


def test_a_repeated_sum_is_counted_where_nothing_comes_between() -> None:
    """What is read, set or changed between the two keeps them apart."""
    read = "T[i] += x[i]; Y[i] = T[i]; T[i] += x[i]; Z[i] = T[i]"
    changed = "x[i] = 2 * x[i]; T[i] += x[i]; x[i] += 1; T[i] += x[i]"
    begun = "T[i] += x[i]; T[i] = x[i] * x[i]; T[i] += x[i]"
    x = torch.randn(5, dtype=torch.float64)
    for text in (read, changed, begun):
        program = parse(text)
        for short, long in zip(expected(simplify(program), [x]), expected(program, [x]), strict=True):
            assert_close(short, long, 1e-12)


def test_a_part_of_what_is_summed() -> None:
    """Where deviations are added up with something else, that alone is summed: before, and not after, the variance's cotangent is known."""
    derived = gradient(parse(NORMS["named_deviations"][0]))
    (mean,) = [s for s in map(print_statement, derived.body) if "M.grad[n] +=" in s]
    assert "for n, c:  M.grad[n] += -(Y.grad[n,c] * rsqrt(V[n] + 1e-05) * g[c])" == mean.strip()
