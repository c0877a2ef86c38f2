"""Kernels written by hand, in the form that the Triton printer gives, for the tests of launching, compiling and reporting."""

from __future__ import annotations

from lowering.kernel_source import Arg, KernelSource
from tdsl.ops import DTYPES

_HEADER = "import triton\nimport triton.language as tl\n\n"


def source(
    name: str, body: str, helpers: str = "", num_warps: int = 4, constexprs: dict[str, int] | None = None, **args: str
) -> KernelSource:
    """A kernel of the given body. args: name -> "int32", "int64" (an upper-case N.. or lower-case name), "float", or a pointer's dtype."""
    described, printed = [], []
    for arg, dtype in args.items():
        pointer = arg.isupper() and arg not in ("M", "N", "K") or dtype == "bool"
        kind = "pointer" if pointer else "float" if dtype == "float" else "int"
        described.append(Arg(arg, kind, "float32" if kind == "float" else dtype))  # type: ignore[arg-type]
        printed.append(f"{arg}: tl.int64" if kind == "int" and dtype == "int64" else arg)
    for arg, value in (constexprs or {}).items():
        described.append(Arg(arg, "constexpr", value=value))
        printed.append(f"{arg}: tl.constexpr")
    text = f"{_HEADER}{helpers}\n\n@triton.jit\ndef {name}({', '.join(printed)}):{body}"
    return KernelSource(name, text, tuple(described), num_warps=num_warps, num_stages=3)


def elementwise(dtype: str) -> KernelSource:
    """Y[n] = gelu(X[n]) * sigmoid(X[n]), in blocks of 128."""
    compute = DTYPES[dtype].compute
    body = f"""
    n = tl.program_id(0) * TILE + tl.arange(0, TILE)
    x = tl.load(X + n, mask=n < N, other=0.0).to(tl.{compute})
    y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476)) * tl.sigmoid(x)
    tl.store(Y + n, y, mask=n < N)
"""
    return source("elementwise", body, X=dtype, Y=dtype, N="int32", constexprs={"TILE": 128})


def row_softmax(dtype: str) -> KernelSource:
    """Y[program, n] = softmax of X[program, n] over n < N <= 128."""
    helpers = """
@triton.jit
def larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def add(a, b):
    return a + b


@triton.jit
def total(x):
    return tl.reduce(x, 0, add)


@triton.jit
def normalise(x):
    e = tl.exp(x - tl.reduce(x, 0, larger))
    return e / total(e)
"""
    compute = DTYPES[dtype].compute
    body = f"""
    n = tl.arange(0, TILE)
    row = tl.program_id(0).to(tl.int64) * N
    x = tl.load(X + row + n, mask=n < N, other=float("-inf")).to(tl.{compute})
    tl.store(Y + row + n, normalise(x), mask=n < N)
"""
    return source("row_softmax", body, helpers, X=dtype, Y=dtype, N="int32", constexprs={"TILE": 128})


def matmul(
    dtype: str, accumulator: str = "", precision: str = "ieee", tile: tuple[int, int, int] = (32, 32, 32), num_warps: int = 4
) -> KernelSource:
    """C[m, n] = A[m, k] B[k, n], contiguous, every edge masked."""
    accumulator = accumulator or DTYPES[dtype].compute
    body = f"""
    tiles = tl.cdiv(N, TILE_N)
    m = (tl.program_id(0) // tiles) * TILE_M + tl.arange(0, TILE_M)
    n = (tl.program_id(0) % tiles) * TILE_N + tl.arange(0, TILE_N)
    acc = tl.zeros((TILE_M, TILE_N), dtype=tl.{accumulator})
    for k0 in range(0, K, TILE_K):
        k = k0 + tl.arange(0, TILE_K)
        a = tl.load(A + m[:, None] * K + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0)
        b = tl.load(B + k[:, None] * N + n[None, :], mask=(k < K)[:, None] & (n < N)[None, :], other=0)
        acc = tl.dot(a, b, acc, input_precision="{precision}", out_dtype=tl.{accumulator})
    tl.store(C + m[:, None] * N + n[None, :], acc, mask=(m < M)[:, None] & (n < N)[None, :])
"""
    out = accumulator if dtype == "int8" else dtype
    constexprs = dict(zip(("TILE_M", "TILE_N", "TILE_K"), tile, strict=True))
    return source("matmul", body, "", num_warps, constexprs, A=dtype, B=dtype, C=out, M="int32", N="int32", K="int32")


def scatter_add(dtype: str) -> KernelSource:
    """Y[index[n]] += X[n], by atomics, in blocks of 64."""
    body = """
    n = tl.program_id(0) * TILE + tl.arange(0, TILE)
    x = tl.load(X + n, mask=n < N, other=0)
    at = tl.load(INDEX + n, mask=n < N, other=0)
    tl.atomic_add(Y + at, x, mask=n < N, sem="relaxed")
"""
    return source("scatter_add", body, X=dtype, INDEX="int64", Y=dtype, N="int32", constexprs={"TILE": 64})
