"""Every program of the corpus on every executor that runs here, against the loops: torch on the CPU, and the very Triton kernels through
the interpreter."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from tdsl.arguments import layout
from tdsl.errors import Error, Unsupported
from tdsl.infer import infer
from tdsl.ir import Const, Loop, Program, statements
from tdsl.swap import differentiable, gradient
from tdsl.text import parse
from tests.corpus import CORPUS
from tests.programs import LAYOUTS, arguments, check, cotangents, expected, gradient_of, parsed, program_of, resized, run
from tests.strange import STRANGE

BACKENDS = ("torch", "triton")
STAGES = ("lowering", "tiling", "triton source", "swap rule", "residuals")


def assert_honest(error: Unsupported, program: Program, args: list[Any]) -> None:
    """A refusal names the construct and the stage, and the program has that construct: nothing simpler may be refused."""
    stage = re.search(r"\(([\w ]+)\)$", error.what)
    assert stage is not None and stage[1] in STAGES, f"no stage in: {error.what}"
    found = layout(program, args)
    inferred = infer(program, found.specs, found.values)
    ranges = [b for loops in (*inferred.ranges, *inferred.inner) for bounds in loops.values() for b in bounds]
    writes = Counter(s.target.tensor for s in statements(program.body))
    constructs = {
        "ordered loop": any(isinstance(node, Loop) for node in program.body),
        "range": any(not isinstance(b, int | Const) for b in ranges),
        "booleans": any(s.op in ("max=", "min=") for s in statements(program.body)),
        "partial": any(s.op != "=" and writes[s.target.tensor] > 1 for s in statements(program.body)),
    }
    assert any(there and word in error.what for word, there in constructs.items()), f"refused without reason: {error.what}"


def assert_agrees(program: Program, args: list[Any], backend: str, scale: float = 1.0) -> None:
    """The executor computes what the loops compute, or refuses honestly; what the loops refuse, it refuses too."""
    try:
        wanted = expected(program, args)
    except Error as error:
        with pytest.raises((type(error), Unsupported)):
            run(program, args, backend)
        return
    try:
        check(program, args, backend, scale, wanted)
    except Unsupported as error:
        assert_honest(error, program, args)


def with_gradient(program: Program, args: list[Any], derivative: Program | None = None) -> tuple[Program, list[Any]] | None:
    """The gradient program with arguments, or None where no input has a gradient, or it is refused honestly."""
    if not differentiable(program):
        return None
    try:
        derivative = gradient(program) if derivative is None else derivative
    except Unsupported as error:
        assert_honest(error, program, args)
        return None
    return derivative, cotangents(derivative, args, expected(program, args))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CORPUS)
def test_forward(name: str, backend: str) -> None:
    assert_agrees(program_of(name), arguments(program_of(name), CORPUS[name]), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CORPUS)
def test_gradient(name: str, backend: str) -> None:
    found = with_gradient(program_of(name), arguments(program_of(name), CORPUS[name]))
    if found is not None:
        assert_agrees(*found, backend)


@pytest.mark.parametrize("name", STRANGE)
def test_strange_programs(name: str) -> None:
    program = parsed(STRANGE[name].text)
    args = arguments(program, STRANGE[name])
    pairs = [(program, args)]
    while len(pairs) < 3 and (found := with_gradient(*pairs[-1])) is not None:
        pairs.append(found)
    for order, (derived, given) in enumerate(pairs):
        for backend in BACKENDS if order < 2 else BACKENDS[:1]:
            assert_agrees(derived, given, backend, scale=1 + 2 * order)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "name",
    ["lecture", "matvec", "row_max", "product", "linear", "softmax", "log_softmax", "layernorm", "attention_causal", "cross_entropy", "kernel_sum",
     "rewriting", "concatenate", "conv_strided", "blur", "gather", "scatter", "scatter_max", "casts", "functions", "scalars", "zero_d", "pick_argmax"],
)  # fmt: skip
def test_other_float_types(name: str, dtype: torch.dtype) -> None:
    program, case = program_of(name), CORPUS[name]
    args = arguments(program, case, dtype)
    for backend in BACKENDS:
        assert_agrees(program, args, backend)
        found = with_gradient(program, args)
        if found is not None:
            assert_agrees(*found, backend)


INTEGERS = ["Y[i] += a[i,j]", "Y[i] max= a[i,j]; Z[j] min= a[i,j]", "Y[i,j] = a[i,j] * 2 + b[j]", "Y[i,j] = a[i,j] // 3 - a[i,j] % 3", "Y[i] += a[i,j] * b[j]"]


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("text", INTEGERS)
def test_integers_and_bools(text: str, dtype: torch.dtype) -> None:
    program = parse(text)
    generator = torch.Generator().manual_seed(0)
    low = 0 if dtype in (torch.bool, torch.uint8) else -9
    args = [torch.randint(low, 2 if dtype == torch.bool else 10, (5, 7)[2 - len(p.dims) :], generator=generator).to(dtype) for p in program.params]
    for backend in BACKENDS:
        check(program, args, backend)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.bool, torch.float16, torch.bfloat16], ids=str)
def test_scattered_maxima_of_narrow_types(dtype: torch.dtype) -> None:
    text = "def top(t[n], x[n], V) -> H[V]:\n    for v in 0:V:  H[v] = x[0]\n    H[t[n]] max= x[n]\n    H[t[n]] min= x[n]"
    args = [torch.tensor([0, 1, 1, 2]), torch.tensor([1, 0, 1, 1]).to(dtype), 3]
    for backend in BACKENDS:
        assert_agrees(parsed(text), args, backend)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_long_sums_keep_their_digits(dtype: torch.dtype) -> None:
    """Thousands of ones: a sum that is rounded at each step stops at 256 or 2048."""
    count, ones = torch.zeros(5000, dtype=torch.int64), torch.ones(5000, dtype=dtype)
    for text in ("def h(t[n], x[n], V) -> H[V]: H[t[n]] += x[n]", "def h(t[n], x[n], V) -> H[V]: H[V-1-0*t[n]] += x[n]"):
        for backend in BACKENDS:
            (found,) = run(parse(text), [count, ones, 1], backend)
            assert found[0] == torch.tensor(5000.0).to(dtype)
    for text in ("H += x[n]", "H += x[n] * x[n]", "H[i] += x[n] * w[i]"):
        for backend in BACKENDS:
            program = parse(text)
            (found,) = run(program, [ones, ones[:1]][: len(program.params)], backend)
            assert found.reshape(()) == torch.tensor(5000.0).to(dtype)


@pytest.mark.parametrize("kind", ["int32", "int64", "int16", "uint8"])
def test_index_tensors_of_every_integer_type(kind: str) -> None:
    for name in ("gather", "scatter", "cross_entropy"):
        program = program_of(name)
        args = [a.to(getattr(torch, kind)) if isinstance(a, torch.Tensor) and not a.is_floating_point() else a for a in arguments(program, CORPUS[name])]
        for backend in BACKENDS:
            check(program, args, backend)


@pytest.mark.parametrize("memory", LAYOUTS[1:])
@pytest.mark.parametrize(
    "name", ["batched", "row_sum", "product", "outer", "linear", "softmax", "layernorm_by_hand", "attention", "conv2d", "blur", "gather", "scatter", "diagonal"]
)
def test_memory_layouts(name: str, memory: str) -> None:
    program = program_of(name)
    args = arguments(program, CORPUS[name], memory=memory)
    derived, given = with_gradient(program, args)  # type: ignore[misc]
    given = [*args, *(a.expand(2, *a.shape)[0].transpose(0, -1).contiguous().transpose(0, -1) if a.dim() else a for a in given[len(args) :])]
    for backend in BACKENDS:
        check(program, args, backend)
        check(derived, given, backend)


SIZES = [
    (name, old, new)
    for name, others in {
        "lecture": (0, 1, 17, 130), "softmax": (0, 1, 17, 130), "layernorm": (0, 1, 130), "attention": (0, 1, 17), "cross_entropy": (0, 1, 130),
        "kernel_sum": (1, 130), "row_max": (0, 1, 130), "product": (0, 1, 17), "gather": (0, 130), "scatter": (0, 1, 130),
        "concatenate": (0, 1, 130), "accumulate_twice": (0, 1, 17), "agree_by_name": (0, 130), "linear": (0, 1, 130),
    }.items()
    for old in sorted({n for shape in CORPUS[name].shapes.values() for n in shape})
    for new in others
    if (name, old, new) != ("attention", 7, 0) and (old, new) != (2, 130)
]  # fmt: skip


@pytest.mark.parametrize(("name", "old", "new"), SIZES)
def test_sizes(name: str, old: int, new: int) -> None:
    case = resized(CORPUS[name], old, new)
    if any(lo >= hi for lo, hi in case.ints.values()):
        case = replace(case, shapes={n: (0, *s[1:]) if n in case.ints else s for n, s in case.shapes.items()}, ints=dict.fromkeys(case.ints, (0, 1)))
    program = program_of(name)
    args = arguments(program, case)
    for backend in BACKENDS:
        assert_agrees(program, args, backend)
    try:
        found = with_gradient(program, args, gradient_of(name))
    except Error:
        return  # the forward has no value
    assert found is not None
    for backend in BACKENDS:
        assert_agrees(*found, backend)


def test_attention_to_no_keys() -> None:
    args = arguments(program_of("attention"), resized(CORPUS["attention"], 7, 0))
    check(program_of("attention"), args, "torch")


NAN, INF = float("nan"), float("inf")
ROWS = torch.tensor([[1.0, NAN, 3.0, NAN], [2.0, 2.0, 1.0, 0.0], [-INF, -INF, -INF, -INF], [INF, 0.0, -1.0, INF], [-0.0, 0.0, -1.0, -2.0]])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("text", "by_torch"),
    [
        ("Y[i] max= X[i,j]", lambda x: x.amax(1)),
        ("Y[i] min= X[i,j]", lambda x: x.amin(1)),
        ("Y[i] = argmax[j](X[i,j])", lambda x: x.argmax(1)),
        ("Y[i] = argmin[j](X[i,j])", lambda x: x.argmin(1)),
        ("Y[i,j] = softmax[j](X[i,j])", lambda x: x.softmax(1)),
        ("Y[i] = logsumexp[j](X[i,j])", lambda x: x.logsumexp(1)),
        ("Y[i,j] = relu(X[i,j])", torch.relu),
        ("Y[i,j] = maximum(X[i,j], 0.5)", lambda x: torch.maximum(x, torch.tensor(0.5))),
        ("Y[i,j] = where(isnan(X[i,j]), 0.0, X[i,j])", lambda x: torch.where(x.isnan(), 0.0, x)),
        ("Y[i,j] = sign(X[i,j]) * 1.0", torch.sign),
        ("Y[i] = sum[j](where(X[i,j] > 0, X[i,j], 0))", lambda x: torch.where(x > 0, x, 0).sum(1)),
        ("Y[i,j] = tanh(X[i,j]) + sigmoid(X[i,j]) + erf(X[i,j])", lambda x: x.tanh() + x.sigmoid() + x.erf()),
        ("Y[i,j] = softplus(X[i,j]) + log1p(exp(-abs(X[i,j])))", lambda x: torch.nn.functional.softplus(x) + torch.log1p(torch.exp(-x.abs()))),
    ],
)
def test_nan_and_infinity_are_as_in_torch(text: str, by_torch: Any, backend: str) -> None:
    (found,) = run(parse(text), [ROWS], backend)
    torch.testing.assert_close(found, by_torch(ROWS), equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_values_are_errors_of_ours(backend: str) -> None:
    from tdsl.errors import BoundsError, NotInjective, RangeError, SizeMismatch

    cases: list[tuple[str, list[Any], type[Error]]] = [
        ("Y[b,k] = A[ids[b],k]", [torch.randn(3, 2), torch.tensor([0, 3])], BoundsError),
        ("Y[b,k] = A[ids[b],k]", [torch.randn(3, 2), torch.tensor([0, -1])], BoundsError),
        ("def f(p[i], X[i]) -> Y[i]: Y[p[i]] = X[i]", [torch.tensor([1, 0, 1]), torch.randn(3)], NotInjective),
        ("Y[i] max= A[i,k]", [torch.randn(3, 0)], RangeError),
        ("Y[i] = mean[k](A[i,k])", [torch.randn(3, 0)], RangeError),
        ("Y[i,j] += A[i,k] * B[k,j]", [torch.randn(3, 4), torch.randn(5, 2)], SizeMismatch),
        ("def f(X[i], K[m], n) -> Y[i]: Y[i] = X[i] + K[i//n]", [torch.randn(3), torch.randn(3), 0], BoundsError),
    ]
    for text, args, error in cases:
        program = parse(text)
        with pytest.raises(error):
            run(program, args, backend)

