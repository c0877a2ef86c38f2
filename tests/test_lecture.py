"""The lecture's four examples, letter by letter: a gradient is the same loop with two names swapped.

Each is checked as a Variable (messages over its statement), as a Program (what is printed), and as a Function (what torch finds).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tdsl
from tdsl.swap import gradient
from tdsl.text import parse
from tdsl.variable import Variable, graph

# forward; the loops of the gradient; sizes by operand
EXAMPLES: dict[str, tuple[str, list[str], dict[str, tuple[int, ...]]]] = {
    "scalar product": (
        "z = x * y",
        ["x.grad += z.grad * y", "y.grad += x * z.grad"],
        {"x": (), "y": ()},
    ),
    "inner product": (
        "for i:  y += w[i] * x[i]",
        ["for i:  w.grad[i] += y.grad * x[i]", "for i:  x.grad[i] += w[i] * y.grad"],
        {"w": (5,), "x": (5,)},
    ),
    "matrix times vector": (
        "for i, j:  y[i] += W[i,j] * x[j]",
        ["for i, j:  W.grad[i,j] += y.grad[i] * x[j]", "for i, j:  x.grad[j] += W[i,j] * y.grad[i]"],
        {"W": (3, 5), "x": (5,)},
    ),
    "scores of attention": (
        "for h, i, j, k:  Y[h,i,j] += A[h,i,k] * B[h,j,k]",
        [
            "for h, i, j, k:  A.grad[h,i,k] += Y.grad[h,i,j] * B[h,j,k]",
            "for h, i, j, k:  B.grad[h,j,k] += A[h,i,k] * Y.grad[h,i,j]",
        ],
        {"A": (2, 5, 3), "B": (2, 7, 3)},
    ),
}


def operands(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_printed_gradient(name: str) -> None:
    forward, loops, _ = EXAMPLES[name]
    program = parse(forward)
    assert str(program) == forward
    header, *body = str(gradient(program)).splitlines()
    assert [line.strip() for line in body] == loops
    assert header.startswith(f"def {program.name}_grad(")
    for operand, loop in zip(program.inputs, loops, strict=True):  # one operand alone is one of the loops
        assert str(gradient(program, [operand])).splitlines()[1].strip() == loop


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_gradient_is_a_swap_of_two_names(name: str) -> None:
    """The loop of each operand is the forward's with the operand's name and the output's exchanged, each with its subscripts."""
    forward, loops, shapes = EXAMPLES[name]
    (statement,) = parse(forward).body
    target = statement.target
    for operand, loop in zip(shapes, loops, strict=True):
        (swapped,) = gradient(parse(forward), [operand]).body
        mine = next(a for a in statement.value.args if a.tensor == operand)
        other = next(a for a in statement.value.args if a.tensor != operand)
        assert swapped.indices == statement.indices, loop
        assert (swapped.target.tensor, swapped.target.subscripts) == (f"{operand}.grad", mine.subscripts)
        assert {(a.tensor, a.subscripts) for a in swapped.value.args} == {
            (f"{target.tensor}.grad", target.subscripts),
            (other.tensor, other.subscripts),
        }


@pytest.mark.parametrize("name", EXAMPLES)
def test_messages_between_variables(name: str) -> None:
    forward, loops, shapes = EXAMPLES[name]
    values = operands(shapes)
    leaves = {operand: Variable(value) for operand, value in values.items()}
    y = Variable(forward, **leaves)
    assert set(y.inputs) == set(shapes)
    y.forward()
    rng = np.random.default_rng(1)
    y.grad = rng.normal(size=np.shape(y.value))
    y.backward()
    for operand, loop in zip(shapes, loops, strict=True):  # the printed loop itself is a Variable's statement
        message = Variable(loop, **{n: leaves[n] if n in leaves else Variable(y.grad) for n in parse(loop).inputs})
        np.testing.assert_allclose(leaves[operand].grad, message.forward())


@pytest.mark.parametrize("backend", ["auto", "triton", "reference"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_torch_finds_the_same(name: str, backend: str) -> None:
    forward, _, shapes = EXAMPLES[name]
    values = operands(shapes)
    f = tdsl.function(forward, backend=backend)
    inputs = [torch.tensor(v, requires_grad=True) for v in values.values()]
    result = f(*inputs)
    seed = torch.randn(result.shape, dtype=result.dtype, generator=torch.Generator().manual_seed(2))
    found = torch.autograd.grad(result, inputs, seed)
    network = graph(f.program, values)
    (computed,) = network.forward().values()
    np.testing.assert_allclose(result.detach().numpy(), computed)
    messages = network.backward(**{f.program.results[0]: seed.numpy()})
    for operand, grad in zip(shapes, found, strict=True):
        np.testing.assert_allclose(grad.numpy(), messages[operand], rtol=1e-9, atol=1e-12)
    gradient_function = f.grad()
    for grad, by_call in zip(found, gradient_function(*[i.detach() for i in inputs], seed), strict=True):
        np.testing.assert_allclose(grad.numpy(), by_call.numpy(), rtol=1e-9, atol=1e-12)


def test_one_operand_twice() -> None:
    """A square: two statements of the rule, which are one with a factor of two."""
    assert str(gradient(parse("for i:  y += x[i] * x[i]"))).splitlines()[1].strip() == "for i:  x.grad[i] += 2 * y.grad * x[i]"
