"""Forward mode: against differences through the loops, against torch.func, and mixed with the other transforms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.func import jvp, vjp

import tdsl
from tdsl import reference
from tdsl.errors import ArgumentError, Unsupported
from tdsl.ir import Program
from tdsl.swap import gradient
from tdsl.tangent import tangent
from tdsl.text import parse
from tdsl.verify import verify
from tests.corpus import CORPUS
from tests.derivatives import COUNTERPARTS, Values, along, assert_near, directions, floats, of_floats, randoms, torch_arguments, values_of
from tests.programs import check

DIFFERENTIABLE = [name for name in CORPUS if floats(*values_of(name))]


def forward(program: Program, values: Values, wrt: list[str]) -> tuple[Program, Values]:
    """The tangent program and its arguments; it prints, parses back and is well formed."""
    result = verify(tangent(program, wrt))
    assert parse(str(result)) == result
    direction = directions(wrt, values, seed=11)
    return result, {**values, **dict(zip(result.inputs[len(program.inputs) :], direction.values(), strict=True))}


def backward(program: Program, values: Values, wrt: list[str]) -> tuple[Program, Values]:
    """The same for the gradient, with random cotangents."""
    result = verify(gradient(program, wrt))
    assert parse(str(result)) == result
    outputs = reference.run(program, values)
    generator = np.random.default_rng(12)
    left = zip(result.inputs[len(program.inputs) :], program.results, strict=True)
    return result, {**values, **{n: generator.normal(size=outputs[o].shape) for n, o in left}}


def check_forward(program: Program, values: Values, wrt: list[str], tolerance: float = 1e-5) -> tuple[Program, Values]:
    result, given = forward(program, values, wrt)
    found = reference.run(result, given)
    expected = along(program, values, {n: given[d] for n, d in zip(wrt, result.inputs[len(program.inputs) :], strict=True)})
    for name, value in zip(result.results, expected, strict=True):
        assert_near(found[name], value, tolerance, f"{name} of\n{result}")
    return result, given


# ---------------------------------------------------------------------------------------------------------------------
# The whole corpus, by the loops


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_differences(name: str) -> None:
    """All inputs at once, and each alone: what settled an index may be gone then."""
    program, values = values_of(name)
    names = floats(program, values)
    check_forward(program, values, names)
    for n in names if len(names) > 1 else []:
        check_forward(program, values, [n])


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_twice(name: str) -> None:
    """jvp(jvp): the second direction covers the first tangents too."""
    program, values = values_of(name)
    first, given = forward(program, values, floats(program, values))
    check_forward(first, given, floats(first, given), 1e-4)


@pytest.mark.parametrize("name", [n for n in DIFFERENTIABLE if n != "scatter_max"])
def test_of_the_gradient(name: str) -> None:
    """jvp(grad): with a direction in the inputs this is a Hessian-vector product."""
    program, values = values_of(name)
    first, given = backward(program, values, floats(program, values))
    check_forward(first, given, floats(first, given), 1e-4)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradient_of(name: str) -> None:
    """grad(jvp): <gradient, direction> is <cotangent, difference along the direction>."""
    program, values = values_of(name)
    first, given = forward(program, values, floats(program, values))
    names = floats(first, given)
    second, full = backward(first, given, names)
    found = reference.run(second, full)
    direction = directions(names, given, seed=13)
    cotangents = [full[n] for n in second.inputs[len(first.inputs) :]]
    expected = sum(float((c * d).sum()) for c, d in zip(cotangents, along(first, given, direction), strict=True))
    actual = sum(float((found[o] * direction[n]).sum()) for o, n in zip(second.results, names, strict=True))
    assert_near(actual, expected, 1e-4, str(second))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_executors(name: str, backend: str) -> None:
    """Tangents take the same way down as every program."""
    program, values = values_of(name)
    result, given = forward(program, values, floats(program, values))
    check(result, [as_tensor(given[n]) for n in result.inputs], backend, scale=5)


def as_tensor(value: Any) -> Any:
    """float32 on the way to an executor; numbers stay numbers."""
    tensor = torch.as_tensor(value) if isinstance(value, np.ndarray | np.generic) else value
    return tensor.float() if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() else tensor


# ---------------------------------------------------------------------------------------------------------------------
# Against torch.func


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal in float64; zeros that nothing depends on are in torch's default dtype."""
    torch.testing.assert_close(actual, expected, check_dtype=bool(expected.any()))


@pytest.mark.parametrize("name", COUNTERPARTS)
def test_against_torch(name: str) -> None:
    """jvp, jvp(jvp), jvp(grad) and grad(jvp) of Functions, against the same of a torch function."""
    args, used = torch_arguments(name)
    function = tdsl.function(CORPUS[name].text)
    wrt = [function.program.inputs[n] for n in used]
    plain = of_floats(COUNTERPARTS[name], args, used)
    x = [args[n] for n in used]
    u, v, w = (randoms([a.shape for a in x], seed) for seed in (1, 2, 3))
    y, first = jvp(plain, tuple(x), tuple(u))
    (c,) = randoms([y.shape], 4)

    one = function.jvp(wrt)
    torch.testing.assert_close(one(*args, *u), first)

    def along_u(*point: torch.Tensor) -> torch.Tensor:
        n = len(point) // 2
        return jvp(plain, point[:n], point[n:])[1]

    dots = one.program.inputs[len(args) :]
    _, second = jvp(along_u, (*x, *u), (*v, *w))
    torch.testing.assert_close(one.jvp([*wrt, *dots])(*args, *u, *v, *w), second)

    def pulled(*point: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return vjp(plain, *point)[1](c)

    _, hvp = jvp(pulled, tuple(x), tuple(v))
    found = function.grad(wrt).jvp(wrt)(*args, c, *v)
    for actual, expected in zip(found if isinstance(found, tuple) else (found,), hvp, strict=True):
        close(actual, expected)

    found = one.grad(wrt)(*args, *u, c)
    for actual, expected in zip(found if isinstance(found, tuple) else (found,), vjp(along_u, *x, *u)[1](c), strict=False):
        close(actual, expected)


# ---------------------------------------------------------------------------------------------------------------------
# The rules, one by one


def test_printed() -> None:
    program = parse("for h, i, j, k:  Y[h,i,j] += A[h,i,k] * B[h,j,k]")
    assert str(tangent(program)).splitlines() == [
        "def Y_jvp(A[h,i,k], B[h,j,k], A.dot[h,i,k], B.dot[h,j,k]) -> Y.dot:",
        "    for h, i, j, k:  Y.dot[h,i,j] += A.dot[h,i,k] * B[h,j,k]",
        "    for h, i, j, k:  Y.dot[h,i,j] += A[h,i,k] * B.dot[h,j,k]",
    ]
    assert str(tangent(parse("s += x[i] * x[i]"))).splitlines()[1:] == ["    for i:  s.dot += 2 * x.dot[i] * x[i]"]
    assert str(tangent(parse("Y[i] = exp(x[i])"))).splitlines()[1:] == [
        "    for i:  Y[i] = exp(x[i])",
        "    for i:  Y.dot[i] = x.dot[i] * Y[i]",
    ]


def test_names() -> None:
    """A taken name gets a number; a rewritten input is an input and an output."""
    program = tangent(parse("def step(w[i], g[i], lr) -> w: w[i] = w[i] - lr * g[i]"), ["w", "lr"])
    assert (program.inputs, program.results) == (("w", "g", "lr", "w.dot", "lr.dot"), ("w.dot2",))
    assert tangent(tangent(parse("y = x * x"))).inputs == ("x", "x.dot", "x.dot2", "x.dot.dot")


PROGRAMS: dict[str, tuple[str, dict[str, Any]]] = {
    "a scattered maximum": ("def f(dst[e], m[e], N) -> Y[N]: Y[dst[e]] max= m[e]", {"dst": [0, 1, 2, 0, 1, 1], "m": 6, "N": 3}),
    "a scattered maximum onto values": (
        "def f(dst[e], m[e], b[n]) -> Y[n]: Y[n] = b[n]; Y[dst[e]] max= m[e]",
        {"dst": [0, 1, 2, 0, 1, 1], "m": 6, "b": 4},
    ),
    "a scattered product": ("def f(dst[e], m[e], N) -> Y[N]: Y[dst[e]] *= m[e]", {"dst": [0, 1, 2, 0, 1, 1], "m": 6, "N": 3}),
    "a scattered product onto values": (
        "def f(dst[e], m[e], b[n]) -> Y[n]: Y[n] = b[n]; Y[dst[e]] *= m[e]",
        {"dst": [0, 1, 2, 0, 1, 1], "m": 6, "b": 4},
    ),
    "a product at affine places": ("Y[x+r] *= X[x] + W[r]", {"X": 5, "W": 3}),
    "a minimum at affine places": ("Y[x+r] min= X[x] + W[r]", {"X": 5, "W": 3}),
    "a maximum over a part": ("Y[i] = x[i]; for i in 0:3: Y[i] max= A[i,j]", {"x": 5, "A": (5, 4)}),
    "a product over a part": ("Y[i] = x[i]; for i in 0:3: Y[i] *= A[i,j]", {"x": 5, "A": (5, 4)}),
    "a minimum with a part": ("Y[i] = x[i]; for i in 0:3: Y[i] min= z[i]", {"x": 5, "z": 5}),
    "a triangle of factors": ("for k in 0:3, j in 0:k+1: p[i] *= A[i,j] + B[i,k]", {"A": (2, 3), "B": (2, 3)}),
    "a cut": ("Y[i] = x[i] ** 2; for i in 1:3: Y[i] = 7.0", {"x": 5}),
    "a running product": ("for ordered t, i: p[i] *= X[t,i]", {"X": (4, 2)}),
    "a state": ("for ordered t, i: h[i] += tanh(h[i] + X[t,i])", {"X": (4, 2)}),
    "overwritten values": ("H[t,i] = X[t,i]; for ordered t, i: H[t,i] = H[t,i] * H[pad(t-1),i]", {"X": (4, 2)}),
    "a maximum in a loop": ("for ordered t, i: H[t,i] = X[t,i] + max[j](X[t,j] * H[pad(t-1),j])", {"X": (3, 3)}),
    "a start and the last": (
        "def f(h0[i], X[n,i]) -> H[n+1,i]:\n    H[0,i] = h0[i]\n    for ordered t in 1:size(X,0)+1, i: H[t,i] = sin(X[t-1,i] * H[t-1,i])",
        {"h0": 2, "X": (3, 2)},
    ),
    "loops inside each other": (
        "for ordered t:\n    for ordered s, i: A[t,s,i] = A[t,pad(s-1),i] * X[s,i] + X[t,i]\n    for i: H[t,i] = H[pad(t-1),i] + A[t,size(X,0)-1,i] ** 2",
        {"X": (3, 2)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_updates(name: str) -> None:
    """Products and maxima where terms meet, writes onto older versions, and what a loop overwrites."""
    text, given = PROGRAMS[name]
    program = verify(parse(text))
    generator = np.random.default_rng(0)
    values = {n: np.array(g) if isinstance(g, list) else g if n == "N" else generator.normal(size=g) for n, g in given.items()}
    names = floats(program, values)
    check_forward(program, values, names)
    for n in names:
        check_forward(program, values, [n])


def test_ties() -> None:
    """The tangent of a maximum is the mean of the tied terms' tangents, as torch.amax has it."""
    a, v = np.array([[1.0, 2.0, 2.0], [0.0, -1.0, -2.0]]), np.array([[5.0, 3.0, 4.0], [1.0, 2.0, 3.0]])
    found = reference.run(tangent(parse("m[i] max= A[i,j]")), {"A": a, "A.dot": v})["m.dot"]
    np.testing.assert_array_equal(found, [3.5, 1.0])
    np.testing.assert_array_equal(found, jvp(lambda x: x.amax(1), (torch.tensor(a),), (torch.tensor(v),))[1])


def test_zeros_in_a_product() -> None:
    a, v = np.array([[2.0, 0.0, 3.0], [0.0, 0.0, 1.0]]), np.ones((2, 3))
    found = reference.run(tangent(parse("p[i] *= A[i,j]")), {"A": a, "A.dot": v})["p.dot"]
    np.testing.assert_array_equal(found, [6.0, 0.0])


def test_branches_not_taken() -> None:
    """No NaN passes from a branch that was not taken."""
    program = tangent(parse("Y[i] = where(x[i] > 0, sqrt(x[i]) * log(x[i]), 2 * x[i])"))
    found = reference.run(program, {"x": np.array([-1.0, 0.0, 1.0]), "x.dot": np.array([1.0, 1.0, 1.0])})["Y.dot"]
    np.testing.assert_array_equal(found, [2.0, 2.0, 1.0])


def test_masked_rows() -> None:
    """A score of -inf has no part in the tangent of a softmax."""
    program = parse("P[i,j] = softmax[j](where(j <= i, X[i,j], -inf))")
    values = {"X": np.random.default_rng(0).normal(size=(3, 3))}
    result, given = check_forward(program, values, ["X"])
    assert not np.isnan(reference.run(result, given)["P.dot"]).any()


def test_no_tangent() -> None:
    """Integers, comparisons and stop_gradient have none: zeros in the shape of the output."""
    program = parse(
        "def f(X[i,j]) -> a[i], s[i], c[i,j]:\n    a[i] = argmax[j](X[i,j])\n    s[i] += stop_gradient(X[i,j])\n    c[i,j] = X[i,j] > 0"
    )
    found = reference.run(tangent(program), {"X": np.ones((2, 3)), "X.dot": np.ones((2, 3))})
    assert [(v.shape, v.any()) for v in found.values()] == [((2,), False), ((2,), False), ((2, 3), False)]


def test_casts_and_dtypes() -> None:
    """A tangent is cast as its value is, and ties raise no dtype."""
    x = torch.randn(3, 4, dtype=torch.bfloat16)
    assert tdsl.function("m[i] max= A[i,j]").jvp()(x, x).dtype == torch.bfloat16
    assert tdsl.function("Y[i,j] = float32(A[i,j]) * 2").jvp()(x, x).dtype == torch.float32


def test_errors() -> None:
    with pytest.raises(ArgumentError, match="ids: it is used as a subscript"):
        tangent(parse("Y[i] = E[ids[i]]"), ["ids"])
    with pytest.raises(ArgumentError, match="Q: it is no input"):
        tangent(parse("Y[i] = 2 * x[i]"), ["Q"])
    with pytest.raises(ArgumentError, match="no input that could have a tangent"):
        tangent(parse("def iota(n) -> Y[n]: for i in 0:n:  Y[i] = i"))
    with pytest.raises(Unsupported, match="runs over the steps"):
        tangent(parse("for ordered t, i: m[i] max= X[t,i]"))
    with pytest.raises(Unsupported, match="its own target"):
        tangent(parse("for ordered t, i: p[i] *= X[t,i] + p[i]"))
