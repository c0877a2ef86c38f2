"""Programs of a GPU that walk rows and sum down the columns on the way: what backward passes of norms look like."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")

import tdsl
from lowering import tile_ir
from lowering.fold import LEAST, PROGRAMS, ROW
from lowering.state import State
from lowering.targets import TARGETS
from tdsl.explain import report_of
from tdsl.lowered import lowered
from tests.test_fusion import error

# Names and functions that no layer has.
PROGRAMS_OF = {
    "layer_norm": "def f(X[n,c], w[c], b[c]) -> Y[n,c]:\n    m[n] = mean[c](X[n,c])\n    v[n] = var[c](X[n,c])\n    Y[n,c] = (X[n,c] - m[n]) / sqrt(v[n] + 1e-5) * w[c] + b[c]",
    "rms_norm": "Y[n,c] = X[n,c] * rsqrt(mean[e](X[n,e] ** 2) + 1e-6) * g[c]",
    "softmax_with_bias": "def f(X[n,c], b[c], t) -> Y[n,c]:\n    Y[n,c] = softmax[c](t * X[n,c] + b[c])",
    "turned": "def f(u[a,r], z[a]) -> q[a,r]:\n    k[r] += u[a,r] ** 2 * z[a]\n    q[a,r] = u[a,r] * cos(k[r]) * z[a]",
}


def backward(text: str, *specs: str, target: str = "cuda:90") -> State:
    return lowered(tdsl.function(text), specs, target, gradient=True)[-1].state


def of_rows(rows: int, row: int, dtype: str = "bf16") -> tuple[str, str, str]:
    return (f"{dtype}[{rows},{row}]", f"{dtype}[{row}]", f"{dtype}[{row}]")


def loads(state: State, tensor: str) -> int:
    return sum(isinstance(op, tile_ir.Load) and op.buffer.tensor == tensor for step in state.steps for op in tile_ir.operations(step.tile.body))


def walks(kernel: tile_ir.Kernel) -> bool:
    return any(isinstance(op, tile_ir.For) and op.ahead for op in kernel.body)


@pytest.mark.parametrize("row", [250, 1024, 4096])
@pytest.mark.parametrize("rows", [4096, 8192, 9000])
def test_each_tensor_is_read_once(rows: int, row: int) -> None:
    """One kernel that reads the rows, with programs enough for the chip, and one that sums up what they made of the parameters' gradients."""
    state = backward(PROGRAMS_OF["layer_norm"], *of_rows(rows, row))
    walk, *sums = state.steps
    (loop,) = (op for op in walk.tile.body if isinstance(op, tile_ir.For))
    assert loads(state, "X") == loads(state, "Y.grad") == 1
    assert len(sums) == 1
    assert loop.axis.tile == 1
    assert loop.axis.extent >= LEAST
    sms = TARGETS["cuda:90"].sms
    assert walk.tile.programs * loop.axis.extent == rows
    assert sms // 2 <= walk.tile.programs <= 8 * PROGRAMS * sms
    assert "num_stages=3" in walk.source.source


@pytest.mark.parametrize(("rows", "row"), [(400, 4096), (8191, 1024), (4096, 8192), (4096, ROW + 1)])
def test_not_walked(rows: int, row: int) -> None:
    """Few rows do not fill the chip, a prime number of them has no even parts, and long rows leave no room for sums."""
    assert loads(backward(PROGRAMS_OF["layer_norm"], *of_rows(rows, row)), "X") == 2


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "cuda:100", "hip:gfx942"])
@pytest.mark.parametrize(("dtype", "row"), [("bf16", 1024), ("bf16", 4096), ("fp32", 1000), ("fp32", 4096)])
def test_machine_code(dtype: str, row: int, target: str) -> None:
    state = backward(PROGRAMS_OF["layer_norm"], *of_rows(8192, row, dtype), target=target)
    walk = state.steps[0]
    found = report_of(walk, state)
    assert loads(state, "X") == 1
    assert not found.spills
    assert not found.stack
    assert max(width for width, _ in found.load_bytes) == 16


@pytest.mark.parametrize(("rows", "row"), [(1056, 33), (1188, 17)])
@pytest.mark.parametrize("name", PROGRAMS_OF)
def test_values(name: str, rows: int, row: int) -> None:
    """Through the interpreter against float64: rows that no tile fits, in chunks that no power of two is."""
    generator = torch.Generator().manual_seed(rows)
    function = tdsl.function(PROGRAMS_OF[name], backend="triton")
    exact = tdsl.function(PROGRAMS_OF[name], backend="torch")
    shapes = {1: (row,), 2: (rows, row), 0: ()}
    if name == "turned":
        shapes = {1: (row,), 2: (row, rows)}
    made = [torch.randn(shapes[len(p.dims or ())], generator=generator) for p in function.program.params]
    if name == "turned":  # its rows are the columns of memory
        made[0] = made[0].T.contiguous().T
    found, wanted = ([t.detach().to(dtype, copy=True).requires_grad_() for t in made] for dtype in (torch.float32, torch.float64))
    specs = [f"fp32[{','.join(map(str, t.shape))}]" for t in made]
    assert name == "turned" or any(walks(step.tile) for step in backward(PROGRAMS_OF[name], *specs).steps)
    results = []
    for f, arguments in ((function, found), (exact, wanted)):
        out = f(*arguments)
        (out * torch.sin(torch.arange(math.prod(out.shape)).reshape(out.shape))).sum().backward()
        results.append(out)
    assert error(results[0], results[1]) < 1e-5
    for a, b in zip(found, wanted, strict=True):
        assert error(a.grad, b.grad) < 1e-5


def test_small_sums_are_one_kernel() -> None:
    """The four sums over a batch that BatchNorm's backward needs, each of parts; not one that waits for another."""
    text = (
        "def f(X[n,c,h], g[c], b[c]) -> Y[n,c,h]:\n    m[c] = mean[n,h](X[n,c,h])\n    v[c] = var[n,h](X[n,c,h])\n"
        "    Y[n,c,h] = (X[n,c,h] - m[c]) / sqrt(v[c] + 1e-5) * g[c] + b[c]"
    )
    state = backward(text, "fp32[32,64,3136]", "fp32[64]", "fp32[64]")
    assert state.plan is not None
    assert [len(k.writes) for k in state.plan.kernels] == [4, 4, 1]
    twice = lowered(tdsl.function("s[c] += X[n,c,h]\nq[c] += (X[n,c,h] - s[c]) ** 2"), ("fp32[32,64,3136]",), "cuda:90")[0].state
    assert twice.plan is not None
    assert [k.writes for k in twice.plan.kernels if k.flops < 1e5] in ([("s",), ("q",)], [("s", "q")])


def test_batch_and_sequence() -> None:
    """Rows over two dimensions are rows."""
    text = PROGRAMS_OF["layer_norm"].replace("n,c", "a,n,c").replace("m[n]", "m[a,n]").replace("v[n]", "v[a,n]")
    walk, _ = backward(text, "fp32[8,512,1024]", "fp32[1024]", "fp32[1024]").steps
    assert walks(walk.tile)
