"""Ranges that depend on other indices or on tensors: every executor agrees with the loops, and so do the gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tdsl
from tdsl import reference
from tdsl.errors import BoundsError, Unsupported
from tdsl.ir import Program
from tdsl.runtime import Executor
from tdsl.swap import gradient
from tdsl.text import parse
from tdsl.verify import verify
from tests.test_gather import numeric

LEN, OFF = [2, 0, 5], [0, 2, 2, 7]
# text, shapes of the float inputs
PROGRAMS: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {
    "packed sum": ("for b, j in 0:len[b]:  Y[b] += X[off[b]+j] ** 2", {"X": (9,)}),
    "packed rows": ("for b, j in 0:len[b], d:  Y[b,d] += X[off[b]+j,d] * w[d]", {"X": (9, 2), "w": (2,)}),
    "compressed rows": ("def f(off[m], X[n], x[k], B[b], col[n]) -> Y[b]: for b in 0:size(B,0), j in off[b]:off[b+1]: Y[b] += X[j] * x[col[j]]", {"X": (9,), "x": (4,), "B": (3,)}),
    "padded sum": ("for b, j in 0:len[b]:  Y[b] += X[b,j] ** 2", {"X": (3, 6)}),
    "padded contraction": ("for b, j in 0:len[b], i, d:  Y[b,i,d] += P[b,i,j] * V[b,j,d]", {"P": (3, 2, 6), "V": (3, 6, 2)}),
    "padded rows": ("def f(len[b], X[b,n]) -> Y[b,n]: for b, j in 0:len[b]:  Y[b,j] = 2 * X[b,j] ** 2", {"X": (3, 6)}),
    "onto an older version": ("def f(len[b], X[b,n]) -> Y[b,n]:\n    Y[b,n] = X[b,n] + 1\n    for b, j in 0:len[b]:  Y[b,j] = 2 * X[b,j] ** 2", {"X": (3, 6)}),
    "scores": ("def f(len[b], Q[b,d], K[b,n,d]) -> S[b,n]: for b, j in 0:len[b], d:  S[b,j] += Q[b,d] * K[b,j,d]", {"Q": (3, 2), "K": (3, 6, 2)}),
    "maximum": ("for b, j in 0:len1[b]:  Y[b] max= X[off[b]+j]", {"X": (9,)}),
    "product": ("for b, j in 0:len[b]:  Y[b] *= X[b,j]", {"X": (3, 6)}),
    "log-sum-exp inside": ("Y[b] = logsumexp[j in 0:len1[b]](X[off[b]+j])", {"X": (9,)}),
    "mean inside": ("Y[b] = mean[j in 0:len1[b]](X[b,j] ** 2)", {"X": (3, 6)}),
    "variance inside": ("Y[b] = var[j in 0:len1[b]](X[off[b]+j])", {"X": (9,)}),
    "softmax by hand": (
        "for b, j in 0:len1[b]:  m[b] max= X[off[b]+j]\nfor b, j in 0:len1[b]:  s[b] += exp(X[off[b]+j] - m[b])\nL[b] = m[b] + log(s[b])", {"X": (9,)},
    ),
    "softmax": ("def f(len1[b], X[b,n]) -> P[b,n]: for b, j in 0:len1[b]: P[b,j] = softmax[j](X[b,j])", {"X": (3, 6)}),
    "attention": (
        "def f(len1[b], Q[b,i,d], K[b,n,d], V[b,n,e]) -> O[b,i,e]:\n"
        "    m[b,i] = max[j in 0:len1[b]](sum[d](Q[b,i,d] * K[b,j,d]))\n"
        "    s[b,i] = sum[j in 0:len1[b]](exp(sum[d](Q[b,i,d] * K[b,j,d]) - m[b,i]))\n"
        "    for b, i, j in 0:len1[b], e:  O[b,i,e] += exp(sum[d](Q[b,i,d] * K[b,j,d]) - m[b,i]) / s[b,i] * V[b,j,e]",
        {"Q": (3, 2, 2), "K": (3, 6, 2), "V": (3, 6, 2)},
    ),
    "gathered": ("for b, j in 0:len[b]:  Y[b] += E[ids[b,j]] ** 2", {"E": (4,)}),
    "triangle": ("for i, j in 0:i+1:  Y[i] += A[i,j] * x[j]", {"A": (4, 4), "x": (4,)}),
    "upper triangle": ("for i, j in i:size(x,0):  Y[i] += A[i,j] * x[j]", {"A": (4, 4), "x": (4,)}),
    "band": ("for i, j in i-1:i+2:  Y[i] += A[i,pad(j)] * x[pad(j)]", {"A": (4, 4), "x": (4,)}),
    "triangle kept": ("def f(A[n,n]) -> Y[n,n]: for i, j in 0:i+1:  Y[i,j] = A[i,j] ** 2", {"A": (4, 4)}),
    "two deep": ("for b, j in 0:len[b], k in 0:j+1:  Y[b] += X[b,j] * X[b,k]", {"X": (3, 6)}),
    "prefix maxima": ("def f(X[n,m]) -> Y[n]: Y[i] = max[j in 0:i](X[i,j], init=-1.5)", {"X": (4, 5)}),
    "index values": ("for b, j in 0:len[b]:  Y[b] += j * X[b,j]", {"X": (3, 6)}),
    "nothing of the range": ("for b, j in 0:len[b]:  Y[b] += X[b]", {"X": (3,)}),
    "in a loop": ("for ordered t, b, j in 0:len[b]:  Y[t,b] += X[b,j] * Y[pad(t-1),b] + X[b,j] * Z[t]", {"X": (3, 6), "Z": (3,)}),
}  # fmt: skip


def arguments(program: Program, shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs; what lies beyond a row's length is not a number, and no index either."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((3, 6), -7)
    for b, n in enumerate(LEN):
        ids[b, :n] = torch.randint(0, 4, (n,), generator=generator)
    integers = {"len": torch.tensor(LEN), "len1": torch.tensor([2, 1, 5]), "ids": ids, "col": torch.randint(0, 4, (9,), generator=generator)}
    integers["off"] = torch.tensor(OFF if "off[b+1]" in str(program) or "off[m]" in str(program) else OFF[:3])
    found = {}
    for name in program.inputs:
        found[name] = integers[name] if name in integers else torch.randn(shapes[name], generator=generator, dtype=torch.float64)
    return found


def loops(program: Program, inputs: dict[str, torch.Tensor]) -> list[np.ndarray]:
    found = reference.run(program, {n: v.numpy() for n, v in inputs.items()})
    return [found[o] for o in program.results]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_executors(name: str, backend: str) -> None:
    """Forward and gradient."""
    text, shapes = PROGRAMS[name]
    program = verify(parse(text))
    inputs = arguments(program, shapes)
    expected = loops(program, inputs)
    for found, wanted in zip(Executor(program, backend)(list(inputs.values())), expected, strict=True):
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-9, atol=1e-12)
    whole = gradient(program)
    cotangents = {n: torch.randn(y.shape, dtype=torch.float64) for n, y in zip(whole.inputs[len(inputs) :], expected, strict=True)}
    inputs.update(cotangents)
    for found, wanted in zip(Executor(whole, backend)(list(inputs.values())), loops(whole, inputs), strict=True):
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-9, atol=1e-12, err_msg=str(whole))


@pytest.mark.parametrize("name", PROGRAMS)
def test_gradient(name: str) -> None:
    """The printed gradient keeps the ranges, and agrees with differences."""
    text, shapes = PROGRAMS[name]
    program = parse(text)
    whole = verify(gradient(program))
    assert parse(str(whole)) == whole
    inputs = {n: v.numpy() for n, v in arguments(program, shapes).items()}
    seed = np.random.default_rng(1).normal(size=reference.run(program, inputs)[program.results[0]].shape)
    found = reference.run(whole, {**inputs, whole.inputs[len(inputs)]: seed})
    for result in whole.results:
        wrt = result.removesuffix(".grad")
        if inputs[wrt].dtype.kind == "f":
            np.testing.assert_allclose(found[result], numeric(program, inputs, wrt, seed), rtol=1e-5, atol=1e-6, err_msg=str(whole))


def test_beyond_the_length_is_never_seen() -> None:
    """Padding may hold anything, also where a factor does not vary along the row and is infinite."""
    text = "for b, j in 0:len[b], d:  Y[b,d] += X[b,j] * V[b,j,d] * w[d]"
    lengths = torch.tensor([1, 0])
    X, V, w = torch.randn(2, 3), torch.randn(2, 3, 2), torch.tensor([1.0, float("inf")])
    for b, n in enumerate(lengths):
        X[b, n:], V[b, n:] = float("nan"), float("inf")
    wanted = torch.stack([X[0, 0] * V[0, 0] * w, torch.zeros(2)])
    for backend in ("torch", "triton"):
        found = tdsl.function(text, backend=backend)(lengths, X, V, w)
        torch.testing.assert_close(found, wanted)


def test_autograd_and_new_lengths() -> None:
    """One function serves batches of other lengths; saved tensors and gradients follow."""
    f = tdsl.function(PROGRAMS["softmax by hand"][0])
    for lengths in ([2, 1, 5], [1, 3, 4], [3, 3, 3]):
        count = torch.tensor(lengths)
        offsets = count.cumsum(0) - count
        X = torch.randn(int(count.sum()), dtype=torch.float64, requires_grad=True)
        values = {"X": X, "off": offsets, "len1": count}
        found = f(*(values[n] for n in f.program.inputs))
        wanted = torch.stack([x.logsumexp(0) for x in X.split(lengths)])
        torch.testing.assert_close(found, wanted)
        seed = torch.randn(3, dtype=torch.float64)
        torch.testing.assert_close(torch.autograd.grad(found, X, seed), torch.autograd.grad(wanted, X, seed))


def test_extent_of_the_call() -> None:
    """A packed row's loop is as long as the longest row of the call, not as long as the data."""
    f = tdsl.function("for b, j in 0:len[b]:  Y[b] += X[off[b]+j]")
    executor = f.executor
    n = 4000
    executor([torch.tensor([3, 2]), torch.randn(n), torch.tensor([0, 3])])
    ((_, limits),) = executor._compiled  # type: ignore[misc]
    assert limits == (4,)


def test_outside() -> None:
    f = tdsl.function("for b, j in 0:len[b]:  Y[b] += X[off[b]+j]")
    with pytest.raises(BoundsError):
        f(torch.tensor([3, 2]), torch.randn(4), torch.tensor([0, 3]))


def test_nothing_bounds_it() -> None:
    """Without the tensors themselves, and without a size, there is no extent."""
    f = tdsl.function("def f(len[b], x[b]) -> Y[b]: for b, j in 0:len[b]:  Y[b] += x[b] * j")
    with pytest.raises(Unsupported):
        f.plan("i64[3]", "fp32[3]")
    torch.testing.assert_close(f(torch.tensor([3, 0, 2]), torch.ones(3)), torch.tensor([3.0, 0.0, 1.0]))
