"""Gradients against finite differences of the loops, and against torch: first and second order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tdsl
from tdsl.errors import ArgumentError, Unsupported
from tdsl.ir import Program
from tdsl.ops import DTYPES, OPERATORS, OPS
from tdsl.swap import differentiable, gradient
from tdsl.text import parse
from tests.corpus import CORPUS, Case
from tests.programs import arguments, assert_close, cotangents, expected, parsed, program_of
from tests.strange import STRANGE

ALL = {**CORPUS, **STRANGE}


def is_float(a: Any) -> bool:
    return isinstance(a, Tensor) and a.dtype.is_floating_point


def moved(args: Sequence[Any], directions: Sequence[Tensor | None], step: float) -> list[Any]:
    return [a if d is None else a + step * d for a, d in zip(args, directions, strict=True)]


def assert_directional(program: Program, args: list[Any], step: float = 1e-5, tolerance: float = 1e-6) -> tuple[Program, list[Any]]:
    """<gradient, v> is the derivative of <program, cotangents> along random v; returns the gradient program with its arguments."""
    derived = gradient(program)
    given = cotangents(derived, args, expected(program, args))
    weights = given[len(args) :]
    grads = dict(zip(differentiable(program), expected(derived, given), strict=True))
    generator = torch.Generator().manual_seed(3)
    for name, a in zip(program.inputs, args, strict=True):
        if name not in grads or not is_float(a):
            continue
        direction = torch.randn(a.shape, generator=generator, dtype=torch.float64)
        directions = [direction if n == name else None for n in program.inputs]
        high, low = (expected(program, moved(args, directions, s)) for s in (step, -step))
        slopes = [torch.where(h == b, 0.0, h.double() - b.double()) / (2 * step) for h, b in zip(high, low, strict=True)]
        numeric = sum(float((s * w).sum()) for s, w in zip(slopes, weights, strict=True))
        exact = float((grads[name] * direction).sum())
        assert abs(numeric - exact) <= tolerance * max(1.0, abs(exact)), f"d {name}: {exact} but {numeric} by differences, in\n{program}\n{derived}"
    return derived, given


# ---------------------------------------------------------------------------------------------------------------------
# Every function of the table

ON_INTEGERS = {"bitwise_and", "bitwise_or", "bitwise_xor", "left_shift", "right_shift", "mix", "rand"}


def call(op: str) -> str:
    """One statement that applies an op to x, z, .. (comparisons and casts make numbers again, so that they can be summed)."""
    names = [f"{x}[i]" for x in ("x", "z", "w")[: OPS[op].arity]]
    if op == "where":
        return "Y[i] = where(x[i] > 0, z[i], w[i])"
    if op in ("and", "or", "not"):
        names = [f"({n} > 0)" for n in names]
    symbol = OPERATORS[op][0] if op in OPERATORS else ""
    if len(names) == 2 and symbol:
        text = f"{names[0]} {symbol} {names[1]}"
    else:
        text = f"{symbol} {names[0]}" if symbol else f"{op}({', '.join(names)})"
    return f"Y[i] = float64({text})"


@pytest.mark.parametrize("op", [op for op in OPS if op not in ON_INTEGERS])
def test_every_function(op: str) -> None:
    """At points away from kinks and jumps, with positive arguments where the function needs them."""
    program = parse(call(op))
    points = [torch.tensor([0.37, 1.41, 2.73, 0.83]), torch.tensor([1.21, 0.62, 1.83, 2.37]), torch.tensor([-0.3, 0.9, 1.7, -2.2])]
    args = [p.double() for p in points[: len(program.params)]]
    if op == "stop_gradient":
        derived = gradient(program)
        assert not expected(derived, cotangents(derived, args, args))[0].any()
        return
    assert_directional(program, args)
    if op not in ("log", "log2", "sqrt", "rsqrt", "log1p", "pow"):
        assert_directional(program, [args[0] * torch.tensor([1.0, -1, 1, -1]), *args[1:]])
    assert_directional(gradient(program), cotangents(gradient(program), args, expected(program, args)))


def test_functions_of_integers_have_no_gradient() -> None:
    for op in sorted(ON_INTEGERS):
        a = torch.tensor([1, 2, 3])
        result = tdsl.function(f"Y[i] = x[i] * {op}(a[i], 1)")(torch.ones(3, requires_grad=True), a)
        (grad,) = torch.autograd.grad(result.sum(), result.grad_fn.next_functions[0][0].variable)
        assert torch.equal(grad, result.detach())
    assert {op for op in OPS if op in DTYPES} == set(DTYPES)


# ---------------------------------------------------------------------------------------------------------------------
# The corpus

SMOOTH = [name for name in ALL if "stop_gradient" not in ALL[name].text]


@pytest.mark.parametrize("name", SMOOTH)
def test_differences(name: str) -> None:
    program = parsed(ALL[name].text)
    if not differentiable(program):
        return
    args = arguments(program, ALL[name], torch.float64)
    try:
        derived, given = assert_directional(program, args)
        if differentiable(derived):
            assert_directional(derived, given, step=1e-6, tolerance=2e-5)
    except Unsupported as error:
        assert "swap rule" in error.what or "expand" in error.what


def training(case: Case, program: Program) -> list[Any]:
    args = arguments(program, case, torch.float64)
    return [a.requires_grad_() if is_float(a) and n in differentiable(program) else a for n, a in zip(program.inputs, args, strict=True)]


def floats_of(program: Program, backend: str | None = None) -> Callable[..., Any]:
    """The function, returning its float outputs only."""
    f = tdsl.function(program, backend=backend)

    def call(*args: Any) -> Any:
        results = f(*args)
        results = results if isinstance(results, tuple) else (results,)
        return tuple(r for r in results if r.dtype.is_floating_point)

    return call


@pytest.mark.parametrize("name", CORPUS)
def test_gradgradcheck(name: str) -> None:
    """Through torch's own graph, with what the forward saves and what the backward recomputes."""
    program = program_of(name)
    args = training(CORPUS[name], program)
    call = floats_of(program)
    if not any(is_float(a) and a.requires_grad for a in args):
        return
    try:
        results = call(*args)
    except Unsupported:
        return
    if not results or not any(r.requires_grad for r in results):
        return
    assert torch.autograd.gradcheck(call, args, fast_mode=True, atol=1e-4)
    if name != "softmax_stopped":  # stop_gradient: the gradient is no derivative of anything
        assert torch.autograd.gradgradcheck(call, args, fast_mode=True, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Written by hand in torch

f64 = torch.float64
gen = torch.Generator().manual_seed(11)


def rand(*shape: int, positive: bool = False) -> Tensor:
    x = torch.randn(shape, generator=gen, dtype=f64)
    return x.abs() + 0.5 if positive else x


IDS, POSITIONS = torch.tensor([2, 0, 2, 1, 4]), torch.tensor([3, 0, 4, 1, 2])
ZEROS = torch.tensor([[2.0, 0.0, 3.0], [0.0, 0.0, 1.0], [1.0, 2.0, 3.0]], dtype=f64)
TIES = torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0], [5.0, 1.0, 0.0]], dtype=f64)
BAD = torch.tensor([0.0, -1.0, 4.0, float("nan")], dtype=f64)


def scatter_add(ids: Tensor, m: Tensor) -> Tensor:
    return torch.zeros(5, m.shape[1], dtype=m.dtype).index_add(0, ids, m)


HAND: dict[str, tuple[str, Callable[..., Any], list[Any]]] = {
    "scores": ("Y[h,i,j] += A[h,i,k] * B[h,j,k]", lambda a, b: a @ b.mT, [rand(2, 5, 3), rand(2, 7, 3)]),
    "attention": (CORPUS["attention"].text, lambda q, k, v, s: F.softmax(s * q @ k.mT, -1) @ v, [rand(2, 5, 3), rand(2, 7, 3), rand(2, 7, 4), 0.5]),
    "causal attention": (
        CORPUS["attention_causal"].text,
        lambda q, k, v, s: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=s),
        [rand(2, 5, 3), rand(2, 5, 3), rand(2, 5, 4), 0.5],
    ),
    "layer norm": (CORPUS["layernorm"].text, lambda x, g, b: F.layer_norm(x, (7,), g, b), [rand(5, 7), rand(7), rand(7)]),
    "rms norm": ("Y[n,d] = X[n,d] * rsqrt(mean[e](X[n,e] ** 2) + 1e-6) * g[d]", lambda x, g: F.rms_norm(x, (7,), g, 1e-6), [rand(5, 7), rand(7)]),
    "softmax": ("P[i,j] = softmax[j](X[i,j])", lambda x: F.softmax(x, 1), [rand(5, 7)]),
    "softmax over two": ("P[b,i,j] = softmax[i, j](X[b,i,j])", lambda x: F.softmax(x.flatten(1), 1).view_as(x), [rand(2, 3, 5)]),
    "log softmax": ("L[i,j] = X[i,j] - logsumexp[k](X[i,k])", lambda x: F.log_softmax(x, 1), [rand(5, 7)]),
    "cross entropy": (CORPUS["cross_entropy"].text, lambda x, w, t: F.cross_entropy(x @ w.T, t), [rand(5, 3), rand(7, 3), IDS]),
    "linear and gelu": (CORPUS["linear"].text, lambda x, w, b: F.gelu(F.linear(x, w, b)), [rand(5, 3), rand(7, 3), rand(7)]),
    "swiglu": (CORPUS["swiglu"].text, lambda x, w, v, o: (F.silu(x @ w) * (x @ v)) @ o, [rand(3, 5), rand(5, 7), rand(5, 7), rand(7, 5)]),
    "max with ties": ("m[i] max= X[i,j]", lambda x: x.amax(1), [TIES]),
    "min with ties": ("m[i] min= X[i,j]", lambda x: x.amin(1), [-TIES]),
    "max of two with ties": ("Y[i,j] = maximum(X[i,j], Z[i,j])", torch.maximum, [TIES, TIES.flip(1)]),
    "product with zeros": ("p[i] *= A[i,j]", lambda a: a.prod(1), [ZEROS]),
    "product of two dimensions with zeros": ("p *= A[i,j]", lambda a: a.prod(), [ZEROS]),
    "where with NaN": ("Y[i] = where(x[i] > 0, sqrt(x[i]), 0)", lambda x: torch.where(x > 0, torch.where(x > 0, x, 1).sqrt(), 0), [BAD]),
    "where with a NaN factor": ("Y[i] = where(x[i] > 0, x[i] / x[i] * z[i], z[i])", lambda x, z: torch.where(x > 0, z, z), [BAD, rand(4)]),
    "broadcast": ("Y[i,j] = A[i,j] * b[j] + c[i]", lambda a, b, c: a * b + c[:, None], [rand(5, 7), rand(7), rand(5)]),
    "scalars": ("Y[i] = alpha * x[i] + beta", lambda a, x, b: a * x + b, [rand(), rand(5), rand()]),
    "gather": ("Y[b,d] = E[ids[b],d]", lambda e, i: F.embedding(i, e), [rand(5, 3), IDS]),
    "scatter": ("def s(dst[e], m[e,d]) -> Y[5,d]: Y[dst[e],d] += m[e,d]", scatter_add, [IDS, rand(5, 3)]),
    "permutation": ("def p(p[i], x[i]) -> Y[i]: Y[p[i]] = x[i]", lambda p, x: torch.zeros_like(x).index_copy(0, p, x), [POSITIONS, rand(5)]),
    "convolution": ("Y[n,o,x] += X[n,c,2*x+r] * W[o,c,r]", lambda x, w: F.conv1d(x, w, stride=2), [rand(2, 3, 11), rand(2, 3, 3)]),
    "padded convolution": ("Y[n,o,x] += X[n,c,pad(x+r-1,1,1)] * W[o,c,r]", lambda x, w: F.conv1d(x, w, padding=1), [rand(2, 3, 7), rand(2, 3, 3)]),
    "transposed convolution": (
        "def t(X[c,n], W[c,o,r]) -> Y[o,2*n+1]: Y[o,2*i+r] += X[c,i] * W[c,o,r]",
        lambda x, w: F.conv_transpose1d(x[None], w, stride=2)[0],
        [rand(3, 5), rand(3, 2, 3)],
    ),
    "pooling": ("def m(X[n,x]) -> Y: for n, x in 0:5, r in 0:2:  Y[n,x] max= X[n,2*x+r]", lambda x: F.max_pool1d(x, 2), [rand(2, 10)]),
    "concatenation": (CORPUS["concatenate"].text, lambda a, b: torch.cat([a, b]), [rand(5), rand(3)]),
    "variance": ("Y[i] = var[j](X[i,j])", lambda x: x.var(1, correction=0), [rand(5, 7)]),
    "distances": ("D[i,j] += (X[i,k] - Y[j,k]) ** 2; S[i,j] = sqrt(D[i,j])", torch.cdist, [rand(5, 3), rand(7, 3)]),
    "kernel sum": (CORPUS["kernel_sum"].text, lambda x, y, b: torch.exp(-((x[:, None] - y) ** 2).sum(-1)) @ b, [rand(5, 3), rand(7, 3), rand(7, 2)]),
    "diagonal and trace": ("t += A[i,i]; Y[i] = A[i,i] * t", lambda a: a.diagonal() * a.trace(), [rand(5, 5)]),
    "powers": ("Y[i] = x[i] ** y[i] + x[i] ** 3 + 2.0 ** x[i]", lambda x, y: x**y + x**3 + 2.0**x, [rand(5, positive=True), rand(5)]),
    "rewriting": (CORPUS["rewriting"].text, lambda a, b, c: torch.tanh(a @ b + c), [rand(5, 3), rand(3, 7), rand(7)]),
    "bias that is cut": ("Y[i] = x[i]; for i in 0:2: Y[i] = z[i]", lambda x, z: torch.cat([z, x[2:]]), [rand(5), rand(2)]),
}
HAND["bias that is cut"] = ("def cut(x[n], z[m]) -> Y[n]:\n    Y[i] = x[i]\n    for i in 0:2:  Y[i] = z[i]", *HAND["bias that is cut"][1:])


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("name", HAND)
def test_against_torch(name: str, backend: str) -> None:
    text, by_hand, values = HAND[name]
    f = tdsl.function(parsed(text), backend=backend)
    args = [v.clone().requires_grad_() if is_float(v) else v for v in values]
    inputs = [a for a in args if is_float(a)]
    found, wanted = f(*args), by_hand(*args)
    found = found[-1] if isinstance(found, tuple) else found
    assert_close(found, wanted, 1e-9, name)
    seed = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(5), dtype=f64)
    first = [torch.autograd.grad(y, inputs, seed, create_graph=True, allow_unused=True) for y in (found, wanted)]
    for a, b, x in zip(*first, inputs, strict=True):
        assert_close(torch.zeros_like(x) if a is None else a, torch.zeros_like(x) if b is None else b, 1e-8, f"the gradient of {name}")
    if name in ("pooling", "distances") or "ties" in name or "NaN" in name:
        return  # torch has no second derivative there, or another one at the kink
    second = []
    for grads in first:
        total = sum((g * torch.sin(g + x)).sum() for g, x in zip(grads, inputs, strict=True) if g is not None)
        second.append(torch.autograd.grad(total, inputs, allow_unused=True))
    for a, b, x in zip(*second, inputs, strict=True):
        assert_close(torch.zeros_like(x) if a is None else a, torch.zeros_like(x) if b is None else b, 1e-7, f"the second derivative of {name}")


# ---------------------------------------------------------------------------------------------------------------------
# What torch's graph asks for


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2), (0, 1, 2)])
def test_some_inputs_only(wanted: tuple[int, ...]) -> None:
    f = tdsl.function(parsed(CORPUS["linear"].text))
    x, w, b = (rand(5, 3), rand(7, 3), rand(7))
    args = [t.clone().requires_grad_(n in wanted) for n, t in enumerate((x, w, b))]
    f(*args).sum().backward()
    plain = [t.clone().requires_grad_() for t in (x, w, b)]
    F.gelu(F.linear(*plain)).sum().backward()
    for n, (a, p) in enumerate(zip(args, plain, strict=True)):
        assert (a.grad is not None) == (n in wanted)
        if n in wanted:
            assert_close(a.grad, p.grad, 1e-9)


def test_inputs_that_are_no_floats_get_none() -> None:
    f = tdsl.function(parsed(CORPUS["cross_entropy"].text))
    x, w = rand(5, 3).requires_grad_(), rand(7, 3).requires_grad_()
    loss = f(x, w, IDS)
    grads = torch.autograd.grad(loss, (x, w), retain_graph=True)
    assert all(g.shape == t.shape for g, t in zip(grads, (x, w), strict=True))
    g = tdsl.function("Y[i] = a[i] * x[i]")  # what turns out to be an integer at the call
    a, y = torch.tensor([1, 2, 3]), torch.ones(3, requires_grad=True)
    g(a, y).sum().backward()
    assert a.grad is None
    assert torch.equal(y.grad, a.float())
    assert tdsl.function("Y[i] = x[i] > 0")(y).requires_grad is False


def test_gradients_have_the_shape_and_dtype_of_their_inputs() -> None:
    for name in ("attention", "scalars", "conv_strided", "concatenate", "gather", "blur"):
        for dtype in (torch.float32, torch.bfloat16):
            program = program_of(name)
            args = [a.requires_grad_() if is_float(a) else a for a in arguments(program, CORPUS[name], dtype)]
            f = tdsl.function(program)
            result = f(*args)
            result.sum().backward()
            for a in args:
                if is_float(a):
                    assert (a.grad.shape, a.grad.dtype) == (a.shape, a.dtype), name


def test_several_outputs_and_unused_ones() -> None:
    f = tdsl.function("def two(A[i,j]) -> m[i], s:\n    m[i] max= A[i,j]\n    s += A[i,j]")
    a = rand(5, 7).requires_grad_()
    m, s = f(a)
    (only_s,) = torch.autograd.grad(s, a, retain_graph=True)
    assert torch.equal(only_s, torch.ones_like(a))
    (both,) = torch.autograd.grad(m.sum() + 2 * s, a)
    assert_close(both, torch.autograd.grad(a.amax(1).sum() + 2 * a.sum(), a)[0], 1e-12)


def test_an_input_that_nothing_reads_gets_zeros_or_none() -> None:
    x, y = rand(5).requires_grad_(), rand(3, 5).requires_grad_()
    tdsl.function(parsed(CORPUS["unused"].text))(x, y, 1.0).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 2.0))
    assert y.grad is None or not y.grad.any()


def test_gradients_by_name() -> None:
    f = tdsl.function("Y[i,j] += A[i,k] * B[k,j]")
    assert f.grad("A").program.results == ("A.grad",)
    assert f.grad(["B", "A"]).program.results == ("A.grad", "B.grad")
    with pytest.raises(ArgumentError, match="C"):
        f.grad("C")
    with pytest.raises(ArgumentError, match="ids"):
        tdsl.function("Y[b] = E[ids[b]]").grad("ids")
