"""Kernels written by hand, run on CPU tensors through the interpreter and compared with torch."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from lowering.kernel_source import Arg, KernelSource  # noqa: E402
from lowering.triton_launch import launch, on_launch  # noqa: E402
from tdsl import errors  # noqa: E402
from tests.sample_kernels import elementwise, matmul, row_softmax, scatter_add, source  # noqa: E402

FLOATS = ["float16", "bfloat16", "float32", "float64"]
TOLERANCE = {"float16": 2e-3, "bfloat16": 2e-2, "float32": 1e-5, "float64": 1e-5}


def run(kernel: KernelSource, grid: int, *values: object) -> None:
    launch(kernel, grid, values, interpret=True)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", FLOATS)
def test_elementwise(dtype: str) -> None:
    x = torch.randn(1000).to(getattr(torch, dtype))
    y = torch.full_like(x, 7)
    run(elementwise(dtype), 8, x, y, 1000)
    assert_close(y, torch.nn.functional.gelu(x.double()) * torch.sigmoid(x.double()), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", FLOATS)
def test_row_softmax_with_helpers_that_call_helpers(dtype: str) -> None:
    x = torch.randn(5, 100).to(getattr(torch, dtype))
    y = torch.zeros_like(x)
    run(row_softmax(dtype), 5, x, y, 100)
    assert_close(y, torch.softmax(x.double(), 1), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("m, n, k", [(33, 40, 50), (1, 1, 1), (64, 64, 64)])
def test_masked_matmul(dtype: str, m: int, n: int, k: int) -> None:
    a, b = torch.randn(m, k).to(getattr(torch, dtype)), torch.randn(k, n).to(getattr(torch, dtype))
    c = torch.zeros(m, n).to(a.dtype)
    kernel = matmul(dtype)
    run(kernel, -(-m // 32) * -(-n // 32), a, b, c, m, n, k)
    assert_close(c, a.double() @ b.double(), 10 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16", "int32", "int64"])
def test_atomic_add(dtype: str) -> None:
    index = torch.randint(0, 7, (100,))
    x = torch.randint(-3, 4, (100,)).to(getattr(torch, dtype))
    y = torch.zeros(7).to(x.dtype)
    run(scatter_add(dtype), 2, x, index, y, 100)
    assert_close(y, torch.zeros(7, dtype=torch.float64).index_add(0, index, x.double()), 0)


@pytest.mark.parametrize("op", ["max", "min"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int32", "int64"])
def test_atomic_max_and_min_with_a_mask(op: str, dtype: str) -> None:
    body = f"""
    n = tl.arange(0, 32)
    x = tl.load(X + n)
    tl.atomic_{op}(Y + n % 4, x, mask=n < 30, sem="relaxed")
"""
    x = torch.randn(32).mul(100).to(getattr(torch, dtype))
    y = torch.full((4,), -5 if op == "max" else 5).to(x.dtype)
    run(source("f", body, X=dtype, Y=dtype), 1, x, y)
    masked = torch.cat([x[:30], y[:1].new_tensor([-5 if op == "max" else 5] * 2)]).reshape(8, 4)
    assert_close(y, getattr(masked, f"a{op}")(0).double().clamp(**{"min" if op == "max" else "max": -5 if op == "max" else 5}), 0)


def test_argmax_by_a_tuple_reduction() -> None:
    helper = """
@triton.jit
def first_largest(v, i, w, j):
    take = (v > w) | ((v == w) & (i < j))
    return tl.where(take, v, w), tl.where(take, i, j)
"""
    body = """
    i = tl.arange(0, 4)[:, None] * 16 + tl.arange(0, 16)[None, :]
    x = tl.load(X + i)
    j = tl.broadcast_to(tl.arange(0, 16)[None, :], (4, 16))
    v, where = tl.reduce((x, j), 1, first_largest)
    tl.store(Y + tl.arange(0, 4), where)
    tl.store(Z + tl.arange(0, 4), tl.argmax(x, 1))
"""
    x = torch.randint(0, 4, (4, 16)).float()
    y, z = torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    run(source("f", body, helper, X="float32", Y="int64", Z="int64"), 1, x, y, z)
    first = torch.tensor([row.tolist().index(row.max()) for row in x])
    assert y.tolist() == first.tolist()
    assert z.tolist() == first.tolist()


@pytest.mark.parametrize(
    "call, expected",
    [
        ("tl.sum(x, 1)", lambda x: x.sum(1)),
        ("tl.sum(x, axis=0)", lambda x: x.sum(0)),
        ("x.sum(1)", lambda x: x.sum(1)),
        ("tl.max(x, 1)", lambda x: x.amax(1)),
        ("tl.min(x, 1)", lambda x: x.amin(1)),
        ("tl.reduce(x, 1, product)", lambda x: x.prod(1)),
        ("tl.sum(x, 1, keep_dims=True).reshape(16)", lambda x: x.sum(1)),
        ("tl.full((16,), tl.sum(x), tl.float32)", lambda x: x.sum().expand(16)),
        ("tl.cumsum(x, 0).trans().sum(1)", lambda x: x.cumsum(0).sum(0)),
        ("tl.sum(tl.associative_scan(x, 1, product), 1)", lambda x: x.cumprod(1).sum(1)),
        ("tl.sum(tl.associative_scan(x, 1, product, reverse=True), 1)", lambda x: x.flip(1).cumprod(1).sum(1)),
        ("tl.sum(tl.zeros((16, 16), tl.float32) + tl.sigmoid(x), 1)", lambda x: torch.sigmoid(x).sum(1)),
        ("tl.sum(tl.sort(x, 1) * tl.arange(0, 16)[None, :], 1)", lambda x: (x.sort(1)[0] * torch.arange(16)).sum(1)),
        ("tl.sum(x[:, :, None] * x[:, None, :], 2).sum(1)", lambda x: (x[:, :, None] * x[:, None, :]).sum((1, 2))),
        (
            "tl.sum(tl.trans(x) + tl.rsqrt(tl.abs(x)) + tl.exp2(x) + tl.erf(x), 1)",
            lambda x: (x.T + x.abs().rsqrt() + x.exp2() + x.erf()).sum(1),
        ),
        ('tl.sum(tl.dot(x, x, input_precision="ieee"), 1)', lambda x: (x @ x).sum(1)),
        ('tl.sum(tl.dot(x, x, tl.zeros((16, 16), tl.float32), input_precision="tf32"), 1)', lambda x: (x @ x).sum(1)),
        ("tl.sum((x > 0).to(tl.int32), 1).to(tl.float32)", lambda x: (x > 0).sum(1)),
        ("tl.where((tl.max(x, 1) > 1) and not (tl.min(x, 1) > -1), 1.0, 0.0)", lambda x: (x.amax(1) > 1) & ~(x.amin(1) > -1)),
        ("tl.sum(x.to(tl.bfloat16).to(tl.float32), 1)", lambda x: x.bfloat16().float().sum(1)),
        ("tl.sum(tl.dot(x.to(tl.bfloat16), x.to(tl.bfloat16)), 1)", lambda x: (x.bfloat16().float() @ x.bfloat16().float()).sum(1)),
        ("tl.sum(tl.full((16, 16), 1.5, tl.bfloat16) * x, 1)", lambda x: (1.5 * x).sum(1)),
    ],
)
def test_language(call: str, expected) -> None:  # type: ignore[no-untyped-def]
    helper = "@triton.jit\ndef product(a, b):\n    return a * b\n"
    body = f"""
    x = tl.load(X + tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :])
    tl.store(Y + tl.arange(0, 16), {call})
"""
    x = torch.randn(16, 16)
    y = torch.zeros(16)
    run(source("f", body, helper, X="float32", Y="float32"), 1, x, y)
    assert_close(y, expected(x), 1e-4)


def test_nan_in_maximum_is_as_on_a_gpu() -> None:
    body = """
    i = tl.arange(0, 4)
    x = tl.load(X + i)
    tl.store(Y + i, tl.maximum(x, 1.0))
    tl.store(Y + 4 + i, tl.maximum(x, 1.0, propagate_nan=tl.PropagateNan.ALL))
    tl.store(Y + 8 + i, tl.minimum(x, 1.0, propagate_nan=tl.PropagateNan.ALL))
"""
    x = torch.tensor([0.0, float("nan"), 2.0, float("inf")])
    y = torch.zeros(12)
    run(source("f", body, X="float32", Y="float32"), 1, x, y)
    expected = [1.0, 1.0, 2.0, float("inf"), *torch.maximum(x, torch.ones(4)).tolist(), *torch.minimum(x, torch.ones(4)).tolist()]
    torch.testing.assert_close(y, torch.tensor(expected), equal_nan=True)


def test_loops_and_scalars() -> None:
    body = """
    total = 0.0
    for k in range(0, N, 4):
        total += tl.sum(tl.load(X + k.to(tl.int64) + tl.arange(0, 4)))
    for k in tl.range(0, N, 4, num_stages=2):
        total += k
    for k in tl.static_range(3):
        total += k
    n = N
    while n > 0:
        total += 1
        n -= 4
    if N > 4:
        total = total * scale
    tl.store(Y, total)
"""
    x = torch.randn(16)
    y = torch.zeros(1)
    run(source("f", body, X="float32", Y="float32", N="int64", scale="float"), 1, x, y, 16, 0.5)
    assert_close(y, (x.sum() + 24 + 3 + 4).reshape(1) * 0.5, 1e-5)


def test_booleans_integers_and_offsets_beyond_32_bits() -> None:
    body = """
    i = tl.arange(0, 8)
    keep = tl.load(M + i)
    far = N * N
    x = tl.load(X + (i + far - far))
    tl.store(Y + i, tl.where(keep, x // -3, x % 3))
    tl.store(M + i, keep == 0)
"""
    x = torch.arange(-4, 4, dtype=torch.int8)
    keep = torch.tensor([True, False] * 4)
    y = torch.zeros(8, dtype=torch.int64)
    run(source("f", body, X="int8", Y="int64", M="bool", N="int64"), 1, x, y, keep, 100000)
    assert keep.tolist() == [False, True] * 4
    wide = x.long()
    assert y.tolist() == torch.where(~keep, torch.div(wide, -3, rounding_mode="trunc"), torch.fmod(wide, 3)).tolist()


def test_bfloat16_views_and_aliases_share_memory() -> None:
    body = """
    i = tl.arange(0, 4)
    tl.store(Y + i, tl.load(X + i * 2) + 1.0)
"""
    base = torch.arange(12).bfloat16()
    run(source("f", body, X="bfloat16", Y="bfloat16"), 1, base[1:], base[8:])
    assert base.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 2, 4, 6, 8]


def test_launches_are_observed_and_an_empty_grid_is_none() -> None:
    seen = []
    x = torch.randn(10)
    with on_launch(seen.append):
        run(elementwise("float32"), 1, x, torch.zeros(10), 10)
        run(elementwise("float32"), 0, x, torch.zeros(10), 10)
    run(elementwise("float32"), 1, x, torch.zeros(10), 10)
    assert [(s.kernel.name, s.grid, s.interpreted) for s in seen] == [("elementwise", 1, True)]


def test_bad_values_are_errors() -> None:
    x = torch.randn(10)
    with pytest.raises(errors.ArgumentError, match=r"takes 3 values \(X, Y, N\), got 2"):
        run(elementwise("float32"), 1, x, x)
    with pytest.raises(errors.DtypeError, match="X has dtype torch.float64"):
        run(elementwise("float32"), 1, x.double(), x, 10)
    with pytest.raises(errors.DeviceError, match="X is on meta"):
        run(elementwise("float32"), 1, x.to("meta"), x, 10)
    with pytest.raises(errors.DeviceError, match="X is on cpu"):
        launch(elementwise("float32"), 1, (x, x, 10))


def test_a_block_has_no_truth_value() -> None:
    body = """
    x = tl.load(X + tl.arange(0, 4))
    if x > 0:
        tl.store(X, 1.0)
"""
    with pytest.raises(ValueError, match="no truth value"):
        run(source("f", body, X="float32"), 1, torch.zeros(4))


def test_the_language_is_restored() -> None:
    import triton
    import triton.language as tl

    places = [triton, tl, tl.core, tl.math, tl.standard, tl.tensor, tl.dtype]
    run(elementwise("float32"), 1, torch.randn(8), torch.zeros(8), 8)  # the first run imports more modules
    before = [dict(vars(p)) for p in places]
    run(elementwise("float32"), 1, torch.randn(8), torch.zeros(8), 8)
    with pytest.raises(ZeroDivisionError):
        run(source("f", "\n    tl.store(X, 1 // 0)\n", X="float32"), 1, torch.zeros(1))
    assert [dict(vars(p)) for p in places] == before
    assert "TRITON_INTERPRET" not in os.environ


def test_threads_take_turns() -> None:
    outputs = [torch.zeros(64) for _ in range(4)]
    x = torch.randn(64)
    threads = [threading.Thread(target=run, args=(elementwise("float32"), 1, x, y, 64)) for y in outputs]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(torch.equal(y, outputs[0]) for y in outputs[1:])
    assert outputs[0].abs().sum() > 0


def test_a_traceback_shows_the_kernel() -> None:
    import traceback

    with pytest.raises(ZeroDivisionError) as info:
        run(source("f", "\n    tl.store(X, 1 // 0)\n", X="float32"), 1, torch.zeros(1))
    assert "tl.store(X, 1 // 0)" in "".join(traceback.format_exception(info.value))


def test_without_triton_the_modules_import_and_say_what_to_install() -> None:
    code = """
import sys
sys.modules["triton"] = None
import lowering.aot, lowering.report, lowering.targets, lowering.triton_launch
from lowering.kernel_source import KernelSource
try:
    lowering.aot.compile(KernelSource("f", "", ()), "cuda:90")
except ImportError as error:
    assert "pip install" in str(error), error
    assert "torch" not in sys.modules
    print("said so")
"""
    environment = {**os.environ, "TDSL_CACHE": os.devnull}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.stdout == "said so\n", done.stderr


def test_arguments_and_source_must_agree() -> None:
    from lowering.triton_direct import jit_function

    wrong = KernelSource("f", source("f", "\n    pass\n", X="float32").source, (Arg("Y", "pointer", "float32"),))
    with pytest.raises(errors.CompileError, match=r"takes \(X\), its description says \(Y\)"):
        jit_function(wrong)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_device_and_the_interpreter_agree(dtype: str, device: str) -> None:
    x, a, b = (torch.randn(*size).to(getattr(torch, dtype)) for size in ((5, 100), (33, 50), (50, 40)))
    index = torch.randint(0, 7, (100,))
    cases = [
        (elementwise(dtype), 4, (x, torch.zeros_like(x), 500)),
        (row_softmax(dtype), 5, (x, torch.zeros_like(x), 100)),
        (matmul(dtype), 4, (a, b, torch.zeros(33, 40).to(a.dtype), 33, 40, 50)),
        (scatter_add(dtype), 2, (x[0], index, torch.zeros(7).to(x.dtype), 100)),
    ]
    for kernel, grid, values in cases:
        there = [v.to(device) if isinstance(v, torch.Tensor) else v for v in values]
        here = [v.clone() if isinstance(v, torch.Tensor) else v for v in values]
        launch(kernel, grid, there)
        launch(kernel, grid, here, interpret=True)
        for actual, expected in zip(there, here, strict=True):
            if isinstance(actual, torch.Tensor):
                assert_close(actual.cpu(), expected, 10 * TOLERANCE[dtype])
