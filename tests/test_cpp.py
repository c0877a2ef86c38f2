"""The kernels that a CPU runs as C++: every program of the corpus against the loops, larger sizes against torch code in float64, the scalar
functions against the C library's, and what becomes of compilers, caches and threads."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from lowering import cpp_launch, cpp_math
from tdsl import function
from tdsl.arguments import layout
from tdsl.config import config
from tdsl.devices import CPP_OPERATIONS, CPP_POINTS
from tdsl.errors import ArgumentError, Error, Unsupported
from tdsl.ir import Program
from tdsl.lowered import lowered
from tdsl.ops import OPS
from tdsl.runtime import Executor
from tdsl.swap import differentiable
from tests.corpus import CORPUS
from tests.programs import LAYOUTS, arguments, check, cotangents, expected, gradient_of, parsed, program_of, resized, tolerance_of

pytestmark = pytest.mark.skipif(cpp_launch.compiler() is None, reason="there is no C++ compiler")


@pytest.fixture(autouse=True)
def cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel that can be C++ is, whatever the sizes."""
    monkeypatch.setattr(config, "cpu", "c++")


def in_cpp(program: Program, args: list[Any]) -> list[bool]:
    """For each kernel, whether it is C++."""
    executor = Executor(program, "torch")
    return [step.cpp is not None for step in executor.lower(layout(program, args, executor.integers), "cpu").steps]


# ---------------------------------------------------------------------------------------------------------------------
# The corpus


def pairs(name: str, dtype: torch.dtype = torch.float32, memory: str = "contiguous") -> Iterator[tuple[Program, list[Any]]]:
    """A program and its gradient, with arguments."""
    program = program_of(name)
    args = arguments(program, CORPUS[name], dtype, memory)
    yield program, args
    if differentiable(program):
        yield gradient_of(name), cotangents(gradient_of(name), args, expected(program, args))


def assert_agrees(name: str, dtype: torch.dtype = torch.float32, memory: str = "contiguous") -> None:
    try:
        for program, args in pairs(name, dtype, memory):
            check(program, args, "torch")
    except Unsupported:
        pytest.skip("not supported by any compiler")


@pytest.mark.parametrize("name", CORPUS)
def test_corpus(name: str) -> None:
    assert_agrees(name)


SAMPLE = [
    "row_max",
    "product",
    "softmax",
    "layernorm",
    "attention_causal",
    "cross_entropy",
    "kernel_sum",
    "conv_strided",
    "blur",
    "gather",
    "scatter",
    "casts",
    "functions",
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", SAMPLE)
def test_float_types(name: str, dtype: torch.dtype) -> None:
    assert_agrees(name, dtype)


@pytest.mark.parametrize("memory", LAYOUTS[1:])
@pytest.mark.parametrize(
    "name", ["row_sum", "outer", "softmax", "layernorm_by_hand", "transpose", "conv2d", "blur", "gather", "scatter", "diagonal"]
)
def test_memory_layouts(name: str, memory: str) -> None:
    assert_agrees(name, memory=memory)


def test_most_of_the_corpus_is_cpp() -> None:
    """Only products of matrices, and what updates in place, are left to torch code."""
    kinds = []
    for name in CORPUS:
        try:
            kinds += [kind for program, args in pairs(name) for kind in in_cpp(program, args)]
        except (Unsupported, ArgumentError):
            continue
    assert sum(kinds) > 0.75 * len(kinds)


# ---------------------------------------------------------------------------------------------------------------------
# Sizes at which tiles, vectors and their ends matter


def in_torch(program: Program, args: list[Any], monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Tensor, ...]:
    """What torch code computes in float64."""
    wide = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
    with monkeypatch.context() as m:
        m.setattr(config, "cpu", "torch")
        return Executor(program, "torch")(wide)


def close(actual: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    same = (actual == wanted) | (actual.isnan() & wanted.isnan())
    error = torch.where(same, 0.0, (actual.double() - wanted.double()).abs())
    scale = max(1.0, float(wanted[wanted.isfinite()].abs().max())) if wanted.isfinite().any() else 1.0
    assert actual.shape == wanted.shape
    assert not error.numel() or float(error.max()) <= tolerance * scale, float(error.max()) / scale


LARGE = [
    "row_sum", "total", "product", "row_max", "max_plus", "sqdist", "broadcast_add", "kernel_sum", "softmax", "log_softmax", "layernorm", "rmsnorm", "transpose",
    "outer", "blur", "conv_same", "pool", "gather", "scatter", "scatter_max", "argmax", "spread", "centred", "causal_mask", "attention", "linear", "concatenate", "permute",
]  # fmt: skip


@pytest.mark.parametrize(("five", "seven"), [(1, 67), (64, 1), (131, 257), (1021, 16), (0, 7)])
@pytest.mark.parametrize("name", LARGE)
def test_sizes(name: str, five: int, seven: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = resized(resized(CORPUS[name], 7, -7), 5, five)
    case = resized(case, -7, seven)
    if case.values or any(lo >= hi for lo, hi in case.ints.values()):
        pytest.skip("its values are made for one size")
    program = program_of(name)
    args = arguments(program, case)
    try:
        wanted = in_torch(program, args, monkeypatch)
        programs = [(program, args, wanted)]
        if differentiable(program):
            given = cotangents(gradient_of(name), args, wanted)
            programs.append((gradient_of(name), given, in_torch(gradient_of(name), given, monkeypatch)))
    except Error:
        return  # no value at this size
    for derived, given, results in programs:
        for actual, value in zip(Executor(derived, "torch")(given), results, strict=True):
            close(actual, value, tolerance_of(given))


TURNED = "Z[i,j] = X[i,j] == Y[j,i]; B[j,i] = X[i,j]; C[i,j] = Y[j,i]"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int8, torch.bool, torch.int64], ids=str)
@pytest.mark.parametrize(("n", "m"), [(64, 64), (65, 130), (200, 16), (17, 33), (1, 5), (0, 4)])
def test_transpositions(n: int, m: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(n)
    x, y = ((torch.randn(shape, generator=generator) * 50).to(dtype) for shape in ((n, m), (m, n)))
    same, b, c = function(TURNED)(x, y)
    assert torch.equal(same, x == y.T) and torch.equal(b, x.T) and torch.equal(c, y.T)
    cube = torch.stack([x, x.flip(0), x])
    assert torch.equal(function("B[b,j,i] = X[b,i,j]")(cube), cube.mT)
    assert torch.equal(function("B[j,b,i] = X[b,i,j]")(cube), cube.permute(2, 0, 1))


SUMS: dict[str, tuple[str, tuple[int, ...], Callable[[torch.Tensor], torch.Tensor]]] = {
    "all": ("s += x[i]", (1_000_003,), torch.sum),
    "rows": ("s[i] += x[i,j]", (3, 1_000_000), lambda x: x.sum(1)),
    "few columns": ("s[j] += x[i,j]", (400_000, 3), lambda x: x.sum(0)),
    "columns": ("s[j] += x[i,j]", (20_000, 300), lambda x: x.sum(0)),
    "around": ("s[j] += x[i,j,k]", (100, 100, 101), lambda x: x.sum((0, 2))),
    "logsumexp": ("s[i] = logsumexp[j](x[i,j])", (3, 100_003), lambda x: x.logsumexp(1)),
    "softmax": ("s[i,j] = softmax[j](x[i,j])", (2, 50_000), lambda x: x.softmax(1)),
    "softmax down": ("s[i,j] = softmax[i](x[i,j])", (50_000, 3), lambda x: x.softmax(0)),
    "variance": ("s[i] = var[j](x[i,j])", (3, 100_003), lambda x: x.var(1, correction=0)),
}


@pytest.mark.parametrize("name", SUMS)
def test_long_sums_are_as_exact_as_those_of_torch(name: str) -> None:
    text, shape, exact = SUMS[name]
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    wanted = exact(x.double())
    ours, torchs = (float(((value.double() - wanted) / wanted).abs().max()) for value in (function(text)(x), exact(x)))
    assert ours <= 2 * torchs + 2**-22


ROWS = {
    "layer norm": "Y[n,c] = (X[n,c] - mean[k](X[n,k])) * rsqrt(var[k](X[n,k]) + 1e-5) * g[c] + b[c]",
    "rms norm": "Y[n,c] = X[n,c] * rsqrt(mean[k](X[n,k] * X[n,k]) + 1e-5) * g[c] + b[c]",
    "activation": "Y[n,c] = tanh(X[n,c] * g[c] + b[c]) * sigmoid(X[n,c])",
    "scaled softmax": "Y[n,c] = g[c] * softmax[c](X[n,c] + b[c])",
}


@pytest.mark.parametrize(("n", "c"), [(2048, 128), (1999, 130), (4096, 33)])
@pytest.mark.parametrize("name", ROWS)
def test_sums_down_the_columns_ride_along_with_the_rows(name: str, n: int, c: int) -> None:
    f = function(ROWS[name])
    generator = torch.Generator().manual_seed(n)
    wide = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((n, c), (c,), (c,), (n, c))]
    names = [*f.program.inputs, "Y.grad"]
    order = {"X": 0, "g": 1, "b": 2, "Y.grad": 3}
    args = [wide[order[name]] for name in names]
    derivative = Executor(f.grad().program, "torch")
    exact = derivative(args)
    for actual, wanted in zip(derivative([a.float() for a in args]), exact, strict=True):
        close(actual, wanted, 2e-5)
    with torch.enable_grad():  # torch's own derivative of the forward that the loops compute
        leaves = [a.clone().requires_grad_() for a in args[:-1]]
        X, g, b = (leaves[names.index(x)] for x in "Xgb")
        composed = {
            "layer norm": lambda: torch.nn.functional.layer_norm(X, (c,), g, b),
            "rms norm": lambda: X * torch.rsqrt(X.square().mean(1, keepdim=True) + 1e-5) * g + b,
            "activation": lambda: torch.tanh(X * g + b) * torch.sigmoid(X),
            "scaled softmax": lambda: g * torch.softmax(X + b, 1),
        }[name]()
        grads = torch.autograd.grad(composed, leaves, args[-1])
    for actual, wanted in zip(exact, grads, strict=True):
        close(actual, wanted, 1e-10)


def test_one_pass_over_the_rows() -> None:
    """The backward of a layer norm reads its cotangent once: the parameters' gradients are collected where the rows are."""
    x, g, b = (torch.randn(shape) for shape in ((4096, 256), (256,), (256,)))
    backward = lowered(function(ROWS["layer norm"]), (x, g, b), "cpu", gradient=True)[-1]
    assert backward.role == "backward" and backward.state.plan is not None
    assert sum("Y.grad" in k.reads for k in backward.state.plan.kernels) == 1


def test_integers_wrap_and_sum_in_64_bits() -> None:
    x = torch.full((1000, 1000), 2**31 - 1, dtype=torch.int32)
    assert function("s += x[i,j]")(x).item() == (2**31 - 1) * 10**6
    assert function("s += x[i,j]")(x > 0).item() == 10**6
    y = torch.arange(-128, 128).to(torch.int8)
    assert torch.equal(function("Y[i] = y[i] + y[i]")(y), y + y)


def test_not_a_number_is_the_maximum() -> None:
    x = torch.randn(40, 700)
    x[3, 650], x[5, 1], x[7, 0] = float("nan"), float("nan"), float("inf")
    x[9] = -float("inf")
    f = function("m[i] max= x[i,j]; n[j] min= x[i,j]")
    for actual, wanted in zip(f(x), (x.amax(1), x.amin(0)), strict=True):
        torch.testing.assert_close(actual, wanted, equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(function("Y[i,j] = softmax[j](x[i,j])")(x), x.softmax(1), equal_nan=True)


# ---------------------------------------------------------------------------------------------------------------------
# The scalar functions

# Units in the last place of the result; gelu and silu lose what their formulas lose in torch.
ULPS = {
    "exp": 1.1,
    "exp2": 1.1,
    "expm1": 2,
    "log": 1,
    "log2": 2,
    "log1p": 2,
    "tanh": 2,
    "erf": 1.1,
    "sqrt": 0.5,
    "rsqrt": 1.5,
    "softplus": 2,
    "floor": 0,
    "ceil": 0,
    "round": 0,
}
EXACT: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "softplus": lambda x: np.logaddexp(x, 0),
    "round": np.rint,
    "erf": lambda x: torch.erf(torch.from_numpy(x)).numpy(),
}
MANY = 1 << 20


def loops_of(names: list[str]) -> ctypes.CDLL:
    """A library with a loop around each function."""
    text = "".join(
        f'extern "C" void {name}_{kind}(const {kind}* __restrict__ x, {kind}* __restrict__ y, i64 n) {{\n'
        f"    #pragma omp simd\n    for (i64 i = 0; i < n; ++i) y[i] = {name}(x[i]);\n}}\n"
        for name in names
        for kind in ("float", "double")
    )
    return cpp_launch.load(cpp_math.TYPES + cpp_math.prelude(names) + text)


def called(library: ctypes.CDLL, name: str, x: np.ndarray) -> np.ndarray:
    y = np.empty_like(x)
    getattr(library, f"{name}_{'float' if x.dtype == np.float32 else 'double'}")(
        *(ctypes.c_void_p(a.ctypes.data) for a in (x, y)), ctypes.c_longlong(len(x))
    )
    return y


def samples(dtype: Any) -> np.ndarray:
    """Every kind of number: random bits, ordinary ones, those around overflow and underflow, and the special ones."""
    random = np.random.default_rng(0)
    bits = random.integers(0, 2**32, MANY, dtype=np.uint64).astype(np.uint32).view(np.float32)
    if dtype == np.float64:
        bits = random.integers(0, 2**63, MANY, dtype=np.int64).view(np.float64)
    edge = 110 if dtype == np.float32 else 750
    special = [
        0.0,
        -0.0,
        np.inf,
        -np.inf,
        np.nan,
        1,
        -1,
        88.72283,
        88.7229,
        -103.97,
        -104,
        1e-45,
        -1e-45,
        1e-38,
        709.78,
        709.79,
        -745.1,
        -746,
    ]
    return np.concatenate(
        [bits, random.normal(size=MANY).astype(dtype), random.uniform(-edge, edge, MANY).astype(dtype), np.array(special, dtype)]
    )


def ulps(actual: np.ndarray, exact: np.ndarray) -> float:
    """The largest deviation; infinite where one of the two is infinite or not a number and the other is not."""
    rounded = exact.astype(actual.dtype)
    with np.errstate(all="ignore"):
        found = np.abs(actual.astype(np.float64) - exact) / np.spacing(np.abs(rounded)).astype(np.float64)
    same = (actual == rounded) | (np.isnan(actual) & np.isnan(rounded))
    found = np.where(same, np.where(np.isfinite(found), np.minimum(found, 0.5), 0), found)
    return float(np.where(np.isnan(found), np.inf, found).max())


@pytest.mark.parametrize("name", ULPS)
def test_scalar_functions(name: str) -> None:
    exact = EXACT.get(name, getattr(np, name, None))
    library = loops_of(list(ULPS))
    with np.errstate(all="ignore"):
        x = samples(np.float32)
        assert ulps(called(library, name, x), exact(x.astype(np.float64))) <= ULPS[name]
        x = samples(np.float64)
        assert ulps(called(library, name, x), exact(x)) <= 3


@pytest.mark.parametrize("name", ["sin", "cos"])
def test_turns_of_any_size(name: str) -> None:
    library = loops_of(["sin", "cos"])
    x = samples(np.float32)
    with np.errstate(all="ignore"):
        error = np.abs(called(library, name, x) - getattr(np, name)(x.astype(np.float64)))
    assert np.array_equal(np.isnan(error), ~np.isfinite(x))
    assert np.nanmax(error) <= 1.2e-7


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_halves_round_as_those_of_torch(kind: str) -> None:
    dtype = getattr(torch, kind)
    x = torch.from_numpy(samples(np.float32))
    assert torch.equal(function(f"Y[i] = {kind}(x[i])")(x).view(torch.int16)[~x.isnan()], x.to(dtype).view(torch.int16)[~x.isnan()])
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    torch.testing.assert_close(function("Y[i] = float32(x[i])")(every), every.float(), rtol=0, atol=0, equal_nan=True)


def test_powers() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(100_000, generator=generator) * 3, torch.randn(100_000, generator=generator).mul(8).round() / 2
    a[:12] = torch.tensor([0, -0.0, 1, -1, -1, 2, float("inf"), -float("inf"), -float("inf"), float("nan"), 0, -8])
    b[:12] = torch.tensor([0, 3, float("nan"), float("inf"), 3, float("nan"), -1, 3, 0.5, 0, -1, 1 / 3])
    torch.testing.assert_close(function("Y[i] = a[i] ** b[i]")(a, b), (a.double() ** b.double()).float(), equal_nan=True, rtol=2e-7, atol=0)


def test_every_function_of_the_table_has_a_spelling() -> None:
    """A new row needs a definition by other functions, or its formula in cpp_math.py; without, its kernels stay torch code."""
    x = torch.rand(50) + 0.5
    for row in OPS.values():
        if row.arity == 1 and row.kind == "float":
            assert all(in_cpp(parsed(f"Y[i] = {row.name}(x[i])"), [x])), row.name


# ---------------------------------------------------------------------------------------------------------------------
# Around the compiler


def test_small_programs_of_few_operations_run_torch_code(monkeypatch: pytest.MonkeyPatch) -> None:
    several = parsed(f"Y[i] = {'tanh(' * CPP_OPERATIONS}x[i]{')' * CPP_OPERATIONS}")
    few = parsed(f"Y[i] = {'tanh(' * (CPP_OPERATIONS - 1)}x[i]{')' * (CPP_OPERATIONS - 1)}")
    for cpu, small in (("auto", True), ("large", False)):
        monkeypatch.setattr(config, "cpu", cpu)
        assert in_cpp(several, [torch.ones(CPP_POINTS - 1)]) == [small]
        assert in_cpp(few, [torch.ones(CPP_POINTS - 1)]) == [False]
        assert in_cpp(few, [torch.ones(CPP_POINTS)]) == [True]
    monkeypatch.setattr(config, "cpu", "auto")
    assert in_cpp(parsed("Y[i,j] += A[i,k] * B[k,j]"), [torch.ones(3, 4), torch.ones(4, 5)]) == [False]
    assert all(in_cpp(parsed("Y[i] = softmax[i](x[i])"), [torch.ones(3)]))


def test_one_library_serves_many_sizes() -> None:
    sources = {function("Y[i,j] = softmax[j](x[i,j])").emit("c++", f"fp32[{n},1000]").split("/*")[0] for n in (50, 60, 1000)}
    assert len(sources) == 1


def test_threads_do_not_change_results() -> None:
    x, ids = torch.randn(300, 600), torch.randint(7, (300,))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(
                [
                    *function("s += x[i,j]; c[j] += x[i,j] * x[i,j]")(x),
                    function("def f(ids[i], x[i,j]) -> Y[7,j]: Y[ids[i],j] += x[i,j]")(ids, x),
                ]
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    torch.testing.assert_close(results[0][2], torch.zeros(7, 600).index_add(0, ids, x))


def test_without_a_compiler_everything_is_torch_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tdsl.devices.compiler", lambda: None)
    x = torch.randn(200, 300)
    assert in_cpp(parsed("Y[i,j] = softmax[j](x[i,j])"), [x]) == [False]
    torch.testing.assert_close(function("Y[i,j] = softmax[j](x[i,j])")(x), x.softmax(1))


def test_a_compiler_that_fails_costs_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("TDSL_CACHE", str(tmp_path))
    monkeypatch.setattr(cpp_launch, "compiler", lambda: "false")
    x = torch.randn(37, 300)
    f = function("Y[i,j] = softmax[j](x[i,j] * 1.0625)")
    with pytest.warns(RuntimeWarning, match="runs as torch code"):
        torch.testing.assert_close(f(x), (x * 1.0625).softmax(1))


def test_a_damaged_library_is_compiled_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("TDSL_CACHE", str(tmp_path))
    source = 'extern "C" int answer() { return 42; }\n'
    monkeypatch.setattr(cpp_launch, "_loaded", {})
    assert cpp_launch.load(source).answer() == 42
    (library,) = (tmp_path / "cpp").glob("*.so")
    whole = library.read_bytes()
    library.unlink()  # the old file stays mapped; a new one takes its place
    library.write_bytes(whole[:1000])
    monkeypatch.setattr(cpp_launch, "_loaded", {})
    assert cpp_launch.load(source).answer() == 42
    (entry,) = (tmp_path / "cpp").glob("*.json")
    assert json.loads(entry.read_text())["sha256"] == cpp_launch._checksum(library)
    assert not list((tmp_path / "cpp").glob("tmp*"))


def test_names_that_cpp_keeps_for_itself() -> None:
    text = "def double(int[i,j], float[j], exp[i], lane, size_i[i]) -> class[i,j]:\n    class[i,j] = exp(int[i,j] * lane) + float[j] * exp[i] + size_i[i]"
    a, b, c, d = torch.randn(40, 50), torch.randn(50), torch.randn(40), torch.randn(40)
    torch.testing.assert_close(function(text)(a, b, c, 0.5, d), torch.exp(a * 0.5) + b * c[:, None] + d[:, None])
