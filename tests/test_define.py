"""Gradients that a user wrote: what is accepted, what is used, and what is an error with a place."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tdsl
from tdsl import reference
from tdsl.define import define_grad
from tdsl.errors import ArgumentError, Error, NameError_, ParseError, RankMismatch, SizeMismatch, Unsupported
from tdsl.ir import Loop, Program, statements
from tdsl.printer import print_statement
from tdsl.swap import gradient
from tdsl.text import parse
from tdsl.verify import verify
from tests.corpus import CORPUS
from tests.derivatives import assert_near, directions, floats, values_of

MATMUL = "C[i,j] += A[i,k] * B[k,j]"


def printed(program: Program, name: str) -> str | None:
    """The statements of a printed gradient that write one of its outputs; None where a loop does."""
    nodes = [node for node in program.body if any(s.target.tensor == name for s in statements((node,)))]
    return None if any(isinstance(node, Loop) for node in nodes) else "\n".join(print_statement(node) for node in nodes)


@pytest.mark.parametrize("name", [n for n in CORPUS if floats(*values_of(n)) and n != "scatter_max"])
def test_printed_statements(name: str) -> None:
    """Every printed gradient is one that could have been written: it is accepted, and gives the same."""
    program, values = values_of(name)
    for tensor in floats(program, values):
        first = gradient(program, [tensor])
        (result,) = first.results
        text = printed(first, result)
        if text is None:
            continue
        second = verify(gradient(define_grad(program, tensor, text), [tensor]))
        outputs = reference.run(program, values)
        shapes = dict(zip(first.inputs[len(program.inputs) :], (outputs[o] for o in program.results), strict=True))
        given = {**values, **directions(list(shapes), shapes)}
        assert_near(reference.run(second, given)[result], reference.run(first, given)[result], 1e-12, str(second))


def test_used() -> None:
    """By grad(), for one operand or all, and by autograd at every order."""
    function = tdsl.function(MATMUL)
    a, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 4), (4, 5)))
    c = torch.randn(3, 5, dtype=torch.float64)
    before = function.grad("A")(a, b, c)
    torch.autograd.grad(function(a, b), a, c)
    function.define_grad("A", "A.grad[i,k] += 2 * C.grad[i,j] * B[k,j]")
    torch.testing.assert_close(function.grad("A")(a, b, c), 2 * before)
    torch.testing.assert_close(function.grad()(a, b, c)[0], 2 * before)
    torch.testing.assert_close(function.grad()(a, b, c)[1], a.T @ c)
    (once,) = torch.autograd.grad(function(a, b), a, c, create_graph=True)
    torch.testing.assert_close(once, 2 * before)
    torch.testing.assert_close(torch.autograd.grad(once.sum(), b)[0], 2 * c.sum(0).expand(4, 5))
    function.define_grad("A", "A.grad[i,k] += 3 * C.grad[i,j] * B[k,j]")
    torch.testing.assert_close(torch.autograd.grad(function(a, b), a, c)[0], 3 * before)
    assert str(function.program) == "for i, j, k:  C[i,j] += A[i,k] * B[k,j]"


def test_straight_through() -> None:
    """A gradient where the rule has none, from tensors of its own."""
    function = tdsl.function("Y[i] = floor(x[i])")
    x = torch.tensor([-2.5, 0.25, 0.75, 3.5], requires_grad=True)
    assert not torch.autograd.grad(function(x).sum(), x)[0].any()
    function.define_grad("x", "near[i] = abs(x[i]) < 1\nx.grad[i] = where(near[i], Y.grad[i], 0)")
    assert torch.autograd.grad(function(x).sum(), x)[0].tolist() == [0, 1, 1, 0]


def test_intermediates() -> None:
    """What the forward pass computes can be read, and the cotangents of that; a name of one's own stays apart from those of the rule."""
    text = "def f(Q[i,d], K[j,d], V[j,e]) -> O[i,e]:\n    S[i,j] += Q[i,d] * K[j,d]\n    P[i,j] = softmax[j](S[i,j])\n    O[i,e] += P[i,j] * V[j,e]"
    function = tdsl.function(text)
    q, k, v, c = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (5, 7, 7, 5))
    expected = torch.autograd.grad(function(q, k, v), (q, k, v), c)
    function.define_grad("Q", "P.own[i,d] += S.grad[i,j] * K[j,d]; Q.grad[i,d] = minimum(P.own[i,d], 0.1)")
    function.define_grad("V", "V.grad[j,e] += P[i,j] * O.grad[i,e] / 2")
    found = torch.autograd.grad(function(q, k, v), (q, k, v), c)
    torch.testing.assert_close(found, (expected[0].clamp(max=0.1), expected[1], expected[2] / 2))


def test_after_a_cut() -> None:
    """`=` cuts the cotangent of what it overwrites; statements of one's own read it as it came."""
    program = parse("def f(x[n], y[m]) -> x[n]: for i in 0:3:  x[i] = y[i]")
    own = define_grad(program, "y", "for i in 0:3: y.grad[i] += 2 * x.grad[i]")
    found = reference.run(gradient(own), {"x": np.zeros(5), "y": np.zeros(3), "x.grad": np.arange(5.0)})
    assert [v.tolist() for v in found.values()] == [[0, 0, 0, 3, 4], [0, 2, 4]]


MISTAKES: dict[str, tuple[str, type[Error], str, str]] = {
    "a size": ("A.grad[i,k] += C.grad[j,i] * B[k,j]", SizeMismatch, "index i has the size of dimension", "C.grad[j,i]"),
    "a size inside": ("A.grad[i,k] = sum[j](C.grad[i,j] * B[j,k])", SizeMismatch, "index k has the size of dimension", "B[j,k]"),
    "a name": ("A.grad[i,k] += D.grad[i,j] * B[k,j]", NameError_, "D.grad is neither", "D.grad[i,j]"),
    "the gradient's name": ("A.gard[i,k] += C.grad[i,j] * B[k,j]", NameError_, "nothing here writes A.grad", "A.gard[i,k]"),
    "the gradient's rank": ("A.grad[i] += C.grad[i,j]", RankMismatch, "A.grad has 2 dimensions, and 1 subscript", "A.grad[i]"),
    "a rank": ("A.grad[i,k] += C.grad[i] * B[k,j]", RankMismatch, "C.grad has 2 dimensions", "C.grad[i]"),
    "an input written": ("A.grad[i,k] = 0 * A[i,k]; B[k,j] = 0", NameError_, "B is not theirs to write", "B[k,j]"),
    "another gradient": ("A.grad[i,k] = 0 * A[i,k]; C[i,j] = 0", NameError_, "C is not theirs to write", "C[i,j]"),
    "syntax": ("A.grad[i,k] += ", ParseError, "expected an expression", ""),
    "a header": ("def f(x[i]) -> y[i]: y[i] = x[i]", ParseError, "a `def` line", "def"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str) -> None:
    text, kind, what, place = MISTAKES[name]
    with pytest.raises(kind) as caught:
        tdsl.function(MATMUL).define_grad("A", text)
    assert caught.value.what.startswith(what)
    span = caught.value.span
    assert span is not None and span.text[span.start : span.end].startswith(place)
    assert "^" in str(caught.value) and caught.value.help


def test_no_gradient() -> None:
    function = tdsl.function("Y[i] = E[ids[i]]")
    with pytest.raises(ArgumentError, match="ids has no gradient: it is used as a subscript"):
        function.define_grad("ids", "ids.grad[i] = 0 * Y.grad[i]")
    with pytest.raises(ArgumentError, match="F has no gradient: it is no input of Y"):
        function.define_grad("F", "F.grad[i] = 0 * Y.grad[i]")


def test_other_transforms() -> None:
    """Forward mode and batching know nothing of it, and say so; a gradient is an ordinary program again."""
    function = tdsl.function(MATMUL)
    function.define_grad("A", "A.grad[i,k] += 2 * C.grad[i,j] * B[k,j]")
    with pytest.raises(Unsupported, match="written by hand"):
        function.jvp()
    with pytest.raises(Unsupported, match="written by hand"):
        function.vmap()
    a, b, c = torch.randn(6, 3, 4), torch.randn(4, 5), torch.randn(6, 3, 5)
    torch.testing.assert_close(function.grad("A").vmap((0, None, 0))(a, b, c), 2 * c @ b.T)


def test_a_function_of_the_same_text_keeps_its_own() -> None:
    """In a traced graph too, where Functions are found by what they were made of."""
    text = "Y[i] = x[i] * x[i] * x[i] * 11"
    changed = tdsl.function(text)
    changed.define_grad("x", "x.grad[i] = 100 * Y.grad[i]")
    other = tdsl.function(text)
    x = torch.randn(4, requires_grad=True)
    for function, wanted in ((other, 33 * x.detach() ** 2), (changed, torch.full((4,), 100.0))):
        compiled = torch.compile(lambda x, f=function: f(x).sum(), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(torch.autograd.grad(compiled(x), x)[0], wanted)
