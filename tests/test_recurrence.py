"""Ordered loops: their gradient is the reversed loop, checked against differences and against torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tdsl import reference
from tdsl.errors import Unsupported
from tdsl.ir import Loop, Program, statements
from tdsl.swap import gradient
from tdsl.text import parse
from tdsl.verify import verify
from tests.corpus import CORPUS
from tests.test_gather import numeric

PROGRAMS: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {
    "cumulative sum": ("for ordered t, b:  Y[b,t] = Y[b,pad(t-1)] + X[b,t]", {"X": (2, 4)}),
    "suffix": ("for reversed t, b:  Y[b,t] = 0.5 * Y[b,pad(t+1)] * X[b,t] + X[b,t]", {"X": (2, 4)}),
    "horner": ("for ordered k: p[k,i] = p[pad(k-1),i] * x[i] + c[k]", {"x": (3,), "c": (4,)}),
    "rnn": (CORPUS["rnn"].text, {"X": (2, 3, 2), "W": (2, 2)}),
    "lstm": (CORPUS["lstm"].text, {"X": (1, 3, 4, 2), "W": (4, 2, 2)}),
    "two orders": (CORPUS["two_orders"].text, {"A": (3, 3)}),
    "a start and the last": (
        "def states(h0[i], X[n,i], W[i,i]) -> H[n+1,i]:\n    H[0,i] = h0[i]\n    for ordered t in 1:size(X,0)+1, i: H[t,i] = sin(X[t-1,i] + sum[j](W[i,j] * H[t-1,j]))",
        {"h0": (2,), "X": (3, 2), "W": (2, 2)},
    ),
    "softmax in a loop": ("for ordered t, i: H[t,i] = softmax[i](X[t,i] * H[pad(t-1),i] + X[t,i])", {"X": (3, 3)}),
    "max in a loop": ("for ordered t, i: H[t,i] = X[t,i] + max[j](X[t,j] * H[pad(t-1),j])", {"X": (3, 3)}),
    "triangular solve": ("for ordered i: x[i] = (b[i] - sum[j in 0:i](L[i,j] * x[j])) / (3 + L[i,i] ** 2)", {"b": (4,), "L": (4, 4)}),
    "rewritten": ("Y[t,i] = X[t,i] ** 2; for ordered t, i: Y[t,i] = 0.5 * Y[t,i] + Y[pad(t-1),i]", {"X": (4, 2)}),
    "a running sum": ("for ordered t:\n    for i: s[i] += X[t,i] * X[t,i]\n    for i: Y[t,i] = s[i] + X[t,i]", {"X": (4, 2)}),
    "before and after": ("Z[t,i] = X[t,i] ** 2; for ordered t, i: H[t,i] = Z[t,i] * H[pad(t-1),i] + Z[t,i]; y[i] += H[t,i] * Z[t,i]", {"X": (4, 2)}),
    "inside each other": (
        "for ordered t:\n    for ordered s, i: A[t,s,i] = A[t,pad(s-1),i] * X[s,i] + X[t,i]\n    for i: H[t,i] = H[pad(t-1),i] + A[t,size(X,0)-1,i] ** 2",
        {"X": (3, 2)},
    ),
    "attention to the past": ("for ordered t, i: H[t,i] = X[t,i] + sum[s in 0:t](H[s,i] * X[s,i] * X[t,i])", {"X": (4, 2)}),
    "affine in a loop": ("for ordered t, x: H[t,x] = tanh(X[t,x] + sum[r](W[r] * H[pad(t-1),pad(2*x+r-1)]))", {"X": (3, 3), "W": (3,)}),
    "a part of a row": ("for ordered t in 1:size(X,0), i: H[t,i] = X[t,i] * H[t-1,i] + X[t-1,i]", {"X": (4, 2)}),
}  # fmt: skip


def inputs_of(program: Program, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {name: generator.normal(size=shapes[name]) for name in program.inputs}


@pytest.mark.parametrize("name", PROGRAMS)
def test_gradient(name: str) -> None:
    """The first order against differences, and the second against differences of the first."""
    text, shapes = PROGRAMS[name]
    program = verify(parse(text))
    first = verify(gradient(program))
    assert parse(str(first)) == first
    inputs = inputs_of(program, shapes)
    generator = np.random.default_rng(1)
    cotangents = {n: generator.normal(size=reference.run(program, inputs)[o].shape) for n, o in zip(first.inputs[len(inputs) :], program.results, strict=True)}
    for n in list(cotangents)[1:]:
        cotangents[n] *= 0
    found = reference.run(first, {**inputs, **cotangents})
    seed = next(iter(cotangents.values()))
    for n, result in zip(program.inputs, first.results, strict=True):
        np.testing.assert_allclose(found[result], numeric(program, inputs, n, seed), rtol=1e-5, atol=1e-7, err_msg=str(first))


@pytest.mark.parametrize("name", ["cumulative sum", "horner", "rnn", "lstm", "a start and the last", "triangular solve", "affine in a loop"])
def test_second_order(name: str) -> None:
    text, shapes = PROGRAMS[name]
    program = parse(text)
    wrt = program.inputs[0]
    first = gradient(program, [wrt])
    second = verify(gradient(first))
    assert parse(str(second)) == second
    inputs = inputs_of(program, shapes)
    generator = np.random.default_rng(1)
    inputs[first.inputs[-1]] = generator.normal(size=reference.run(program, inputs)[program.results[0]].shape)
    seed = generator.normal(size=shapes[wrt])
    found = reference.run(second, {**inputs, second.inputs[-1]: seed})
    for n, result in zip(first.inputs, second.results, strict=True):
        np.testing.assert_allclose(found[result], numeric(first, inputs, n, seed), rtol=1e-4, atol=1e-6, err_msg=str(second))


def torch_rnn(X: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    h, steps = torch.zeros_like(X[:, 0]), []
    for t in range(X.shape[1]):
        h = torch.tanh(X[:, t] + h @ W.T)
        steps.append(h)
    return torch.stack(steps, 1)


def torch_lstm(X: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    c = h = torch.zeros_like(X[:, 0, 0])
    steps = []
    for t in range(X.shape[1]):
        z = X[:, t] + torch.einsum("gkj,bj->bgk", W, h)
        c = torch.sigmoid(z[:, 0]) * c + torch.sigmoid(z[:, 1]) * torch.tanh(z[:, 2])
        h = torch.sigmoid(z[:, 3]) * torch.tanh(c)
        steps.append(h)
    return torch.stack(steps, 1)


@pytest.mark.parametrize(("name", "function"), [("rnn", torch_rnn), ("lstm", torch_lstm), ("cumulative sum", lambda X: X.cumsum(1))])
def test_against_torch(name: str, function: object) -> None:
    text, shapes = PROGRAMS[name]
    program = parse(text)
    inputs = {n: torch.as_tensor(v).requires_grad_() for n, v in inputs_of(program, shapes).items()}
    expected = function(*inputs.values())  # type: ignore[operator]
    values = {n: v.detach().numpy() for n, v in inputs.items()}
    np.testing.assert_allclose(reference.run(program, values)[program.results[0]], expected.detach().numpy())
    seed = torch.randn_like(expected)
    grads = torch.autograd.grad(expected, tuple(inputs.values()), seed)
    first = gradient(program)
    found = reference.run(first, {**values, first.inputs[-1]: seed.numpy()})
    for result, grad in zip(first.results, grads, strict=True):
        np.testing.assert_allclose(found[result], grad.numpy(), rtol=1e-10, atol=1e-12)


def test_printed() -> None:
    """The reversed loop with the swapped statements; each step has temporaries of its own."""
    text = str(gradient(parse(PROGRAMS["horner"][0])))
    assert text.splitlines()[2:] == [
        "    for reversed k:",
        "        for i:  p.grad[pad(k-1),i] += p.grad[k,i] * x[i]",
        "        for i:  x.grad[i] += p[pad(k-1),i] * p.grad[k,i]",
        "        for i:  c.grad[k] += p.grad[k,i]",
    ]
    assert "for b, i, j:  H.sum[t,b,i] += W[i,j] * H[b,pad(t-1),j]" in str(gradient(parse(PROGRAMS["rnn"][0])))


def test_dead_statements_inside() -> None:
    """A gradient with respect to one operand leaves out what only the others need."""
    program = gradient(parse(PROGRAMS["rnn"][0]), ["X"])
    assert "W.grad" not in {s.target.tensor for s in statements(program.body)}
    assert sum(isinstance(node, Loop) for node in program.body) == 2


OVERWRITTEN = {
    "a state": "for ordered t, i: h[i] += tanh(h[i] + X[t,i])",
    "a running product": "for ordered t, i: p[i] *= X[t,i]",
    "a running maximum": "for ordered t, i: m[i] max= X[t,i]",
    "not written yet": "for ordered t, i: H[t,i] = X[t,i] + H[pad(t+1),i] * H[pad(t+1),i]",
    "overwritten where it is read": "H[t,i] = X[t,i]; for ordered t, i: H[t,i] = H[t,i] * H[pad(t-1),i]",
}


@pytest.mark.parametrize("name", OVERWRITTEN)
def test_overwritten_values(name: str) -> None:
    """What a later step overwrites is not there for the backward pass: an error, never a wrong gradient."""
    with pytest.raises(Unsupported):
        gradient(parse(OVERWRITTEN[name]))
