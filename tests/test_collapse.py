"""Indices that stand side by side become one where a sum walks both, and only where that is the same walk."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

import tdsl
from lowering.collapse import collapse
from tdsl.infer import Spec, infer, resolve
from tdsl.ir import statements
from tdsl.printer import print_statement
from tests.test_fusion import error

Shapes = Mapping[str, tuple[int, ...]]


def collapsed(text: str, strides: Shapes | None = None, fixed: tuple[str, ...] = (), **shapes: tuple[int, ...]) -> tuple[list[str], Shapes]:
    """The statements after `collapse`, and the shapes that they see."""
    program = tdsl.function(text).program
    found = infer(program, {name: Spec(shape, "float32") for name, shape in shapes.items()})
    made = collapse(tuple(statements(resolve(program, found).body)), found.shapes, strides or {}, fixed)
    return [print_statement(s) for s in made.body], made.shapes


def test_a_sum_over_both() -> None:
    body, shapes = collapsed("Y[a,t,c] = X[a,t,c] * w[c]\ng[c] += X[a,t,c] * Y[a,t,c]", X=(2, 3, 5), w=(5,))
    assert body == ["for a_t in 0:6, c in 0:5:  Y[a_t,c] = X[a_t,c] * w[c]", "for c in 0:5, a_t in 0:6:  g[c] += X[a_t,c] * Y[a_t,c]"]
    assert shapes == {"X": (6, 5), "w": (5,), "Y": (6, 5), "g": (5,)}


def test_three_become_one_and_names_are_local() -> None:
    body, shapes = collapsed("s[k] += X[a,b,c,k]\nY[p,q,r,k] = X[p,q,r,k] - s[k]", X=(2, 3, 5, 7))
    assert shapes["X"] == shapes["Y"] == (30, 7)
    assert [line.count(" in ") for line in body] == [2, 2]


@pytest.mark.parametrize(
    ("text", "shapes", "strides"),
    [
        ("Y[a,t,c] = X[a,t,c] + 1", {"X": (2, 3, 5)}, {}),  # nothing sums both
        ("s[t,c] += X[a,t,c]", {"X": (2, 3, 5)}, {}),
        ("s[c] += X[a,t,c] * z[t]", {"X": (2, 3, 5), "z": (3,)}, {}),  # one of them stands alone
        ("s[c] += X[a,t,c] * t", {"X": (2, 3, 5)}, {}),  # as a value
        ("s[c] += where(t <= a, X[a,t,c], 0)", {"X": (2, 3, 5)}, {}),
        ("s[c] += X[a,t,c] * Z[t,a]", {"X": (2, 3, 5), "Z": (3, 2)}, {}),  # the other way round
        ("s[c] += X[a,t,c]\nY[a,c] = X[a,2*a,c]", {"X": (2, 3, 5)}, {}),  # another statement sees the dimensions apart
        ("s[c] += X[a,t,c]\nq[t] += X[a,t,c]", {"X": (2, 3, 5)}, {}),
        ("for a in 0:1, t, c: s[c] += X[a,t,c]", {"X": (2, 3, 5)}, {}),  # not all of a dimension
        ("for a, t in 1:3, c: s[c] += X[a,t,c]", {"X": (2, 3, 5)}, {}),
        ("s[c] += X[a,t,c]", {"X": (2, 3, 5)}, {"X": (30, 5, 1)}),  # rows of a larger tensor
        ("s[c] += X[a,t,c]", {"X": (2, 3, 5)}, {"X": (0, 5, 1)}),  # expanded
        ("s[c] += X[a,a,c]", {"X": (3, 3, 5)}, {}),
        ("s[c] += X[a,t,c] * Z[t,c]", {"X": (1, 3, 5), "Z": (3, 5)}, {}),
    ],
)
def test_left_apart(text: str, shapes: Mapping[str, tuple[int, ...]], strides: Shapes) -> None:
    assert collapsed(text, strides, **shapes)[1].items() >= shapes.items()


def test_inside_of_a_computed_place() -> None:
    """`X[a,t,ids[a,t]]`: both tensors, one inside the other."""
    program = tdsl.function("s += X[a,t,ids[a,t]]").program
    found = infer(program, {"X": Spec((2, 3, 5), "float32"), "ids": Spec((2, 3), "int64")})
    made = collapse(tuple(statements(resolve(program, found).body)), found.shapes, {})
    assert [print_statement(s) for s in made.body] == ["for a_t in 0:6:  s += X[a_t,ids[a_t]]"]


def test_fixed_tensors_stay() -> None:
    assert collapsed("s[c] += X[a,t,c]", fixed=("X",), X=(2, 3, 5))[1]["X"] == (2, 3, 5)


def test_strides_collapse_too() -> None:
    program = tdsl.function("s[c] += X[a,t,c]").program
    found = infer(program, {"X": Spec((2, 3, 5), "float32")})
    made = collapse(tuple(statements(resolve(program, found).body)), found.shapes, {"X": (48, 16, 2)})
    assert made.strides == {"X": (16, 2)}


PROGRAMS = {
    "norm": "def f(X[a,t,c], w[c], b[c]) -> Y[a,t,c]:\n    m[a,t] = mean[c](X[a,t,c])\n    v[a,t] = var[c](X[a,t,c])\n"
    "    Y[a,t,c] = (X[a,t,c] - m[a,t]) / sqrt(v[a,t] + 1e-5) * w[c] + b[c]",
    "columns": "def f(X[a,t,c], w[c]) -> s[c], Y[a,t,c]:\n    Y[a,t,c] = X[a,t,c] * w[c]\n    s[c] += sin(Y[a,t,c]) * X[a,t,c]",
    "all": "def f(X[a,t,c], w[c]) -> s:\n    s += X[a,t,c] * exp(w[c])",
    "turned": "def f(X[t,a,c], w[c]) -> Y[a,t,c]:\n    Y[a,t,c] = tanh(X[t,a,c]) * w[c]",
    "maximum": "def f(X[a,t,c], w[c]) -> m[c]:\n    m[c] max= X[a,t,c] * w[c]",
    "linear": "def f(X[a,t,c], w[c], b[c], W[o,c]) -> Y[a,t,o]:\n    Z[a,t,c] = X[a,t,c] * w[c] + b[c]\n    Y[a,t,o] += Z[a,t,c] * W[o,c]",
}
# How a tensor lies in memory: contiguous; every other row of a larger one; dimensions swapped; columns of a larger one.
LAYOUTS = {
    "plain": lambda x: x,
    "strided": lambda x: torch.stack([x, x], 1).flatten(0, 1)[::2] if x.ndim > 1 else x,
    "swapped": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1) if x.ndim > 1 else x,
    "wide": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
}


@pytest.mark.parametrize("sizes", [{"a": 3, "t": 7, "c": 11, "o": 5}, {"a": 40, "t": 30, "c": 64, "o": 17}, {"a": 1, "t": 5, "c": 3, "o": 2}, {"a": 0, "t": 5, "c": 3, "o": 2}])
@pytest.mark.parametrize("lie", LAYOUTS)
@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_values(backend: str, name: str, lie: str, sizes: Mapping[str, int]) -> None:
    """Values and gradients as the reference has them, however the tensors lie in memory."""
    if backend == "triton":
        pytest.importorskip("triton")
    if backend == "triton" and sizes["a"] == 40 and name != "norm":
        sizes = {**sizes, "a": 5}
    if sizes["a"] == 0 and name == "maximum":
        sizes = {**sizes, "a": 2}
    generator = torch.Generator().manual_seed(0)
    function, reference = (tdsl.function(PROGRAMS[name], backend=b) for b in (backend, "torch"))
    made = [LAYOUTS[lie](torch.randn([sizes[d] for d in p.dims], generator=generator)) for p in function.program.params]
    found, wanted = [x.detach().requires_grad_() for x in made], [x.detach().double().contiguous().requires_grad_() for x in made]
    given, expected = (list(out) if isinstance(out, tuple) else [out] for out in (function(*found), reference(*wanted)))
    for a, b in zip(given, expected, strict=True):
        assert error(a, b) < 1e-5 if a.numel() else a.shape == b.shape
    weights = [torch.cos(torch.arange(b.numel(), dtype=torch.float64)).reshape(b.shape) for b in expected]
    sum((a * w).sum() for a, w in zip(given, weights, strict=True)).backward()
    sum((b * w).sum() for b, w in zip(expected, weights, strict=True)).backward()
    for x, y in zip(found, wanted, strict=True):
        assert error(x.grad, y.grad) < 1e-5 if x.numel() else x.grad.shape == y.grad.shape
