"""Messages over graphs of statements."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tdsl.errors import ArgumentError
from tdsl.reference import run
from tdsl.swap import gradient
from tdsl.text import parse
from tdsl.variable import Variable, graph

rng = np.random.default_rng(0)


def test_scalar_product() -> None:
    a, b = Variable(3.0), Variable(4.0)
    y = Variable("y = a * b", a=a, b=b)
    assert y.forward() == 12.0
    y.backward()
    assert (a.grad, b.grad) == (4.0, 3.0)


def test_inner_product() -> None:
    w, x = Variable(rng.normal(size=5)), Variable(rng.normal(size=5))
    y = Variable("for i:  y += w[i] * x[i]", w=w, x=x)
    np.testing.assert_allclose(y.forward(), w.value @ x.value)
    y.backward()
    np.testing.assert_allclose(w.grad, x.value)
    np.testing.assert_allclose(x.grad, w.value)


def test_matrix_times_vector() -> None:
    w, x, g = rng.normal(size=(3, 5)), rng.normal(size=5), rng.normal(size=3)
    y = Variable("for i, j:  y[i] += W[i,j] * x[j]", W=w, x=x)
    np.testing.assert_allclose(y.forward(), w @ x)
    y.grad = g
    y.backward()
    np.testing.assert_allclose(y.inputs["W"].grad, np.outer(g, x))
    np.testing.assert_allclose(y.inputs["x"].grad, w.T @ g)


def test_scores() -> None:
    a, b, g = rng.normal(size=(2, 3, 4)), rng.normal(size=(2, 5, 4)), rng.normal(size=(2, 3, 5))
    y = Variable("for h, i, j, k:  Y[h,i,j] += A[h,i,k] * B[h,j,k]", A=a, B=b)
    np.testing.assert_allclose(y.forward(), a @ b.transpose(0, 2, 1))
    y.grad = g
    y.backward()
    np.testing.assert_allclose(y.inputs["A"].grad, g @ b)
    np.testing.assert_allclose(y.inputs["B"].grad, g.transpose(0, 2, 1) @ a)


def test_messages_add_up() -> None:
    x = Variable(np.array([1.0, 2.0]))
    y = Variable("Y[i] = X[i] * X[i]", X=x)
    z = Variable("Z += Y[i] * X[i]", X=x, Y=y)
    assert z.forward() == 9.0
    z.backward()
    y.backward()
    np.testing.assert_allclose(x.grad, [3.0, 12.0])


PROGRAMS: list[tuple[str, dict[str, Any]]] = [
    (
        "S[h,i,j] += Q[h,i,d] * K[h,j,d]\nP[h,i,j] = softmax[j](scale * S[h,i,j])\nO[h,i,e] += P[h,i,j] * V[h,j,e]",
        {"Q": (2, 3, 4), "K": (2, 5, 4), "V": (2, 5, 3), "scale": 0.3},
    ),
    ("H[b,i] += W[i,j] * X[b,j]\nH[b,i] += c[i]\nY[b,i] = tanh(H[b,i])\nL += Y[b,i] * Y[b,i]", {"W": (4, 3), "X": (2, 3), "c": (4,)}),
    ("Y[i] = 2 * A[i]\nfor i in 1:3: Y[i] = B[i] * B[i]\nZ[i] = Y[i] * A[i]", {"A": (4,), "B": (4,)}),
    ("M[i] max= A[i,k]\nY[i,k] = exp(A[i,k] - M[i])", {"A": (3, 4)}),
    ("Y[b,d] = E[ids[b],d]\nZ[b] += Y[b,d] * w[d]", {"E": (4, 3), "ids": np.array([1, 3, 1]), "w": (3,)}),
]


@pytest.mark.parametrize(("text", "shapes"), PROGRAMS)
def test_messages_over_a_graph_are_the_gradient_program(text: str, shapes: dict[str, Any]) -> None:
    program = parse(text)
    inputs = {name: rng.normal(size=s) if isinstance(s, tuple) else s for name, s in shapes.items()}
    network = graph(program, inputs)
    values = network.forward()
    for name, value in run(program, inputs).items():
        np.testing.assert_allclose(values[name], value)
    grads = {name: rng.normal(size=np.shape(value)) for name, value in values.items()}
    found = network.backward(**grads)
    swapped = gradient(program)
    expected = run(swapped, {**inputs, **{f"{name}.grad": g for name, g in grads.items()}})
    assert set(expected) == {f"{name}.grad" for name, g in found.items() if g is not None}
    for name, value in expected.items():
        np.testing.assert_allclose(found[name.removesuffix(".grad")], value, rtol=1e-10, atol=1e-12)


def test_mistakes_are_named() -> None:
    with pytest.raises(ArgumentError, match="reads W, x, but got W"):
        Variable("y[i] += W[i,j] * x[j]", W=np.zeros((2, 2)))
    with pytest.raises(ArgumentError, match="one value"):
        Variable("Y[i] = X[i]; Z[i] = X[i]", X=np.zeros(2))
    y = Variable("Y[i] = X[i]", X=np.zeros(2))
    with pytest.raises(ArgumentError, match="no value yet"):
        y.backward()
    y.forward()
    with pytest.raises(ArgumentError, match=r"shape \[2\]"):
        y.backward()
