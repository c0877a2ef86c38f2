"""Ordered loops: their gradient is the reversed loop, checked against differences and against torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tdsl
from lowering.state import Repeat
from lowering.triton_launch import on_launch
from tdsl import reference
from tdsl.errors import Unsupported
from tdsl.ir import Loop, Program, statements
from tdsl.runtime import Executor, flatten
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
    "a state": ("for ordered t, i: h[i] += tanh(h[i] + X[t,i])", {"X": (4, 2)}),
    "a running product": ("for ordered t, i: p[i] *= X[t,i]", {"X": (4, 2)}),
    "a running maximum": ("for ordered t, i: m[i] max= X[t,i]", {"X": (4, 2)}),
    "a running minimum of rows": ("def f(X[t,i,j], m[i]) -> m[i]: for ordered t, i, j: m[i] min= X[t,i,j]", {"X": (4, 2, 3), "m": (2,)}),
    "products and maxima that are read": (
        "for ordered t:\n    for i, j: m[i] max= X[t,i,j]\n    for i, j: p[i] *= X[t,i,j]\n    for i: Y[t,i] = m[i] * p[i]",
        {"X": (3, 2, 2)},
    ),
    "not written yet": ("for ordered t, i: H[t,i] = X[t,i] + H[pad(t+1),i] * H[pad(t+1),i]", {"X": (4, 2)}),
    "overwritten where it is read": ("H[t,i] = X[t,i]; for ordered t, i: H[t,i] = H[t,i] * H[pad(t-1),i]", {"X": (4, 2)}),
    "overwritten at each step": ("def f(X[t,i], h[i]) -> h[i]: for ordered t, i: h[i] = h[i] * X[t,i] + 1", {"X": (4, 2), "h": (2,)}),
    "newton": ("def f(a[i]) -> x[i]:\n    x[i] = 1 + 0 * a[i]\n    for ordered t in 0:3, i: x[i] = 0.5 * (x[i] + (2 + a[i] ** 2) / x[i])", {"a": (3,)}),
    "power iteration": (
        "def f(A[i,i], v[i]) -> v[i]:\n    for ordered t in 0:3:\n        for i: w[i] = sum[j](A[i,j] * v[j])\n        for i: v[i] = w[i] / (1 + sum[j](w[j] ** 2))",
        {"A": (3, 3), "v": (3,)},
    ),
    "a matrix of states": (
        "def f(X[t,i], A[t,j]) -> Y[t]:\n    for ordered t in 1:3:\n        for i, j: s[i,j] += X[t,i] * A[t,j]\n        for i, j: Y[t] += s[i,j] * X[t-1,i] * A[t,j]",
        {"X": (3, 2), "A": (3, 2)},
    ),
    "steps that integers name": ("def f(X[t,i]) -> H[t,i]: for ordered t, i: H[t,i] = tanh(X[t,i] + H[pad((3*t)//5-1),i])", {"X": (5, 2)}),
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


def test_nothing_to_keep_values_in() -> None:
    """Rows of different lengths have no size that a tensor with an element for every step could take: an error, never a wrong gradient."""
    with pytest.raises(Unsupported, match=r"had at each step"):
        gradient(parse("def f(len[t], X[t,n], h[n]) -> h[n]: for ordered t, j in 0:len[t]:  h[j] += sin(h[j] * X[t,j])"))


def test_kept_where_needed() -> None:
    """A state that is only added to is not kept; one whose old value matters is, in the forward loop of the gradient."""
    linear = str(gradient(parse("def f(X[t,i]) -> s[i]: for ordered t, i: s[i] += X[t,i] ** 2")))
    assert "s.at" not in linear
    kept = str(gradient(parse(PROGRAMS["a state"][0])))
    assert "h.at[t,i] = h[i]" in kept


# ---------------------------------------------------------------------------------------------------------------------
# Kernels


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_executors(name: str, backend: str) -> None:
    """Forward and gradient as kernels agree with the loops."""
    text, shapes = PROGRAMS[name]
    program = parse(text)
    inputs = {n: torch.as_tensor(v) for n, v in inputs_of(program, shapes).items()}
    for part in (program, gradient(program)):
        for n in part.inputs:
            if n not in inputs:
                inputs[n] = torch.randn(reference.run(program, {k: inputs[k].numpy() for k in program.inputs})[n.removesuffix(".grad")].shape, dtype=torch.float64)
        expected = reference.run(part, {n: inputs[n].numpy() for n in part.inputs})
        found = Executor(part, backend)([inputs[n] for n in part.inputs])
        for o, y in zip(part.results, found, strict=True):
            np.testing.assert_allclose(y.numpy(), expected[o], rtol=1e-9, atol=1e-12, err_msg=str(part))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("name", "function"), [("rnn", torch_rnn), ("lstm", torch_lstm)])
def test_training(name: str, function: object, backend: str) -> None:
    """Saved states and the reversed loop behind torch's autograd; again with other sizes and layouts."""
    f = tdsl.function(PROGRAMS[name][0], backend=backend)
    for steps in (1, 4):
        shapes = {"X": (3, steps, 5), "W": (5, 5)} if name == "rnn" else {"X": (3, steps, 4, 5), "W": (4, 5, 5)}
        inputs = [torch.randn(shapes[n]).transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_() for n in f.program.inputs]
        expected = function(*inputs)  # type: ignore[operator]
        found = f(*inputs)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        seed = torch.randn_like(expected)
        for a, b in zip(torch.autograd.grad(found, inputs, seed), torch.autograd.grad(expected, inputs, seed), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_kernels_of_a_step() -> None:
    """A step of an RNN is one kernel, planned once and launched at every step; what one step needs alone has no memory."""
    f = tdsl.function(PROGRAMS["rnn"][0], backend="triton")
    state = f.lower("fp32[2,5,3]", "fp32[3,3]", target="cuda:90")
    assert len(state.plan.kernels) == 1 and not state.plan.memory
    (repeat,) = state.parts
    assert isinstance(repeat, Repeat) and (repeat.lo, repeat.hi, repeat.reverse) == (0, 5, False)
    launches: list[str] = []
    with on_launch(lambda launch: launches.append(launch.kernel.name)):
        f(torch.randn(2, 5, 3), torch.randn(3, 3))
    assert launches == [state.plan.kernels[0].name] * 5


def test_the_gradient_of_weights_leaves_the_loop() -> None:
    """dW is one contraction over all steps, after the loop; only the recurrence of the states stays."""
    flat = flatten(gradient(parse(PROGRAMS["rnn"][0])))
    last = [s for s in flat.body if not isinstance(s, Loop) and s.target.tensor == "W.grad"]
    assert len(last) == 1 and set(last[0].reduced) == {"t", "b"}
    reverse = [node for node in flat.body if isinstance(node, Loop)][-1]
    assert {s.target.tensor for s in statements((reverse,))} == {"H.sum.grad", "H.grad.v1"}


def test_half_precision_accumulates_in_single() -> None:
    """What the steps add to is kept in float32 when the tensors are bfloat16."""
    f = tdsl.function(PROGRAMS["lstm"][0])
    X, W = torch.randn(2, 6, 4, 8).bfloat16().requires_grad_(), (0.2 * torch.randn(4, 8, 8)).bfloat16().requires_grad_()
    wide = [x.detach().double().requires_grad_() for x in (X, W)]
    found, expected = f(X, W), torch_lstm(*wide)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=0.05, atol=0.02)
    seed = torch.randn_like(found)
    for a, b in zip(torch.autograd.grad(found, (X, W), seed), torch.autograd.grad(expected, wide, seed.double()), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0.1, atol=0.15)


def test_a_loop_of_nothing() -> None:
    for backend in ("torch", "triton"):
        f = tdsl.function(PROGRAMS["rnn"][0], backend=backend)
        X, W = torch.randn(2, 0, 3, requires_grad=True), torch.randn(3, 3, requires_grad=True)
        y = f(X, W)
        assert y.shape == (2, 0, 3)
        _, dW = torch.autograd.grad(y.sum(), (X, W))
        torch.testing.assert_close(dW, torch.zeros(3, 3))
