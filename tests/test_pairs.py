"""Kernels that walk pairs of points: sums, maxima and softmax of what is computed of x[i] and y[j], with lanes that keep apart along j."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

import pytest
import torch

import tdsl
from lowering.candidates import family
from lowering.schedule import FEW_LANES
from lowering.state import State
from lowering.targets import TARGETS

DISTANCE = "D[i,j] += (x[i,d] - y[j,d]) ** 2"
SUM = f"def ksum(x[i,d], y[j,d], b[j,e]) -> O[i,e]:\n    {DISTANCE}\n    O[i,e] += exp(-D[i,j]) * b[j,e]"
LOGSUMEXP = f"def lse(x[i,d], y[j,d], b[j,e]) -> O[i]:\n    {DISTANCE}\n    O[i] = logsumexp[j](b[j,0] - D[i,j])"
SOFTMAX = f"def mean(x[i,d], y[j,d], b[j,e]) -> O[i,e]:\n    {DISTANCE}\n    P[i,j] = softmax[j](-D[i,j])\n    O[i,e] += P[i,j] * b[j,e]"
NEAREST = f"def nearest(x[i,d], y[j,d], b[j,e]) -> O[i]:\n    {DISTANCE}\n    O[i] min= D[i,j]"
FORCES = f"def forces(x[i,d], y[j,d], b[j,e]) -> F[i,d]:\n    {DISTANCE}\n    F[i,d] += b[j,0] * (x[i,d] - y[j,d]) / (D[i,j] + 0.5)"
PRODUCT = "def kernel(x[i,d], y[j,d], b[j,e]) -> O[i,e]:\n    S[i,j] += x[i,d] * y[j,d]\n    O[i,e] += exp(S[i,j]) * b[j,e]"

Reference = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x[:, None] - y[None]).square().sum(-1)


PROGRAMS: dict[str, tuple[str, Reference]] = {
    "sum": (SUM, lambda x, y, b: torch.exp(-distance(x, y)) @ b),
    "logsumexp": (LOGSUMEXP, lambda x, y, b: torch.logsumexp(b[None, :, 0] - distance(x, y), 1)),
    "softmax": (SOFTMAX, lambda x, y, b: torch.softmax(-distance(x, y), 1) @ b),
    "nearest": (NEAREST, lambda x, y, b: distance(x, y).amin(1)),
    "forces": (FORCES, lambda x, y, b: (b[None, :, :1] * (x[:, None] - y[None]) / (distance(x, y) + 0.5)[..., None]).sum(1)),
    "product": (PRODUCT, lambda x, y, b: torch.exp(x @ y.T) @ b),
}
LARGE = ("fp32[99991,3]", "fp32[99991,3]", "fp32[99991,4]")


def loops(sass: str) -> list[Counter[str]]:
    """The instructions of each loop of SASS, by name."""
    labels: dict[str, int] = {}
    code: list[str] = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\w+):", line):
            labels[label[1]] = len(code)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.append(re.sub(r"^@!?U?P\w+\s+", "", found[1].strip()))
    found_loops = []
    for n, instruction in enumerate(code):
        jump = re.search(r"BRA.*?(\.L_x_\w+)", instruction)
        if jump and labels.get(jump[1], n) < n:
            found_loops.append(Counter(i.split()[0].split(".")[0] for i in code[labels[jump[1]] : n + 1]))
    return found_loops


def lowered(text: str, *args: str, target: str = "cuda:90") -> State:
    return tdsl.function(text).lower(*args, target=target)


# ---------------------------------------------------------------------------------------------------------------------
# What is computed


@pytest.mark.parametrize("sizes", [(37, 53, 3, 4), (1, 1, 1, 1), (70, 129, 2, 3), (5, 300, 3, 1), (9, 40, 17, 2), (3, 33, 2, 9)])
@pytest.mark.parametrize("name", PROGRAMS)
def test_values_and_gradients(name: str, sizes: tuple[int, int, int, int]) -> None:
    text, reference = PROGRAMS[name]
    n, m, d, e = sizes
    generator = torch.Generator().manual_seed(0)
    tensors = [0.5 * torch.randn(shape, generator=generator) for shape in ((n, d), (m, d), (m, e))]
    x, y, b = (t.clone().requires_grad_() for t in tensors)
    wide = [t.double().requires_grad_() for t in tensors]
    actual, expected = tdsl.function(text, backend="triton")(x, y, b), reference(*wide)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    cotangent = torch.randn(actual.shape, generator=generator)
    found = torch.autograd.grad(actual, [x, y, b], cotangent, allow_unused=True)
    wanted = torch.autograd.grad(expected, wide, cotangent.double(), allow_unused=True)
    for a, w in zip(found, wanted, strict=True):
        if w is not None and a is not None:
            torch.testing.assert_close(a.double(), w, rtol=1e-4, atol=1e-5 * float(w.abs().max()) + 1e-6)


@pytest.mark.parametrize("name", ["logsumexp", "nearest", "forces"])
def test_values_along_points_that_no_row_holds(name: str) -> None:
    """Shorter rows of what is no matrix product are held whole, and reduced in no loop."""
    text, reference = PROGRAMS[name]
    generator = torch.Generator().manual_seed(0)
    x, y, b = (0.5 * torch.randn(shape, generator=generator) for shape in ((6, 3), (4099, 3), (4099, 2)))
    actual, expected = tdsl.function(text, backend="triton")(x, y, b), reference(x.double(), y.double(), b.double())
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["sum", "softmax", "forces"])
def test_no_rows_and_no_points(name: str) -> None:
    f = tdsl.function(PROGRAMS[name][0], backend="triton")
    assert f(torch.ones(0, 3), torch.ones(7, 3), torch.ones(7, 2)).shape[0] == 0
    if name != "softmax":
        assert not f(torch.ones(5, 3), torch.ones(0, 3), torch.ones(0, 2)).any()


def test_lanes_without_a_number_count_for_nothing() -> None:
    """Scores of -inf fill whole lanes, and whole rows; large negative ones must not overflow where lanes meet."""
    text = "def f(a[i], c[j], v[j]) -> L[i], O[i]:\n    S[i,j] = where(j < 2 * i, a[i] - c[j], -inf)\n    L[i] = logsumexp[j](S[i,j])\n    P[i,j] = softmax[j](S[i,j])\n    O[i] += P[i,j] * v[j]"
    a, c, v = -100.0 * torch.arange(1.0, 30.0), torch.arange(17001.0) % 7, torch.arange(17001.0)
    scores = torch.where(torch.arange(17001) < 2 * torch.arange(29)[:, None], a[:, None] - c, -torch.inf)
    f = tdsl.function(text, backend="triton")
    assert all(s.tile.axes[-1].tile <= FEW_LANES and s.tile.axes[-1].role == "loop" for s in f.lower(a, c, v, target="cuda:90").steps)
    sums, means = f(a, c, v)
    torch.testing.assert_close(sums, scores.logsumexp(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(means, scores.softmax(1) @ v, rtol=1e-4, atol=0, equal_nan=True)


def test_an_infinite_or_missing_score_is_seen() -> None:
    text = "def f(a[i], c[j]) -> M[i], L[i]:\n    M[i] max= a[i] * c[j]\n    L[i] = logsumexp[j](a[i] * c[j])"
    a = torch.ones(4)
    for odd in (torch.inf, torch.nan):
        c = torch.zeros(70)
        c[69] = odd
        largest, sums = tdsl.function(text, backend="triton")(a, c)
        torch.testing.assert_close(largest, torch.full((4,), odd), equal_nan=True)
        assert not sums.isfinite().any()


# ---------------------------------------------------------------------------------------------------------------------
# How it is computed


@pytest.mark.parametrize("name", PROGRAMS)
def test_pairs_are_found_and_short_indices_written_out(name: str) -> None:
    state = lowered(PROGRAMS[name][0], *LARGE)
    assert state.plan is not None
    (kernel,) = state.plan.kernels
    assert family(kernel, {**state.dtypes, **state.stored}, state.target) == "pairs"
    assert sorted(kernel.extents) == ["i", "j"]
    (step,) = state.steps
    assert all(a.fill is None for a in step.allocate)  # the columns together write the whole result
    assert [a.name for a in step.tile.axes] == ["i", "j"]


def test_what_tensor_cores_multiply_is_no_pair() -> None:
    state = lowered(PRODUCT, "bf16[4096,64]", "bf16[4096,64]", "bf16[4096,64]")
    assert state.plan is not None
    assert family(state.plan.kernels[0], {**state.dtypes, **state.stored}, state.target) == "stream"


def test_a_matrix_of_pairs_in_memory_is_read_in_rows() -> None:
    """There memory decides: a cost that is given for each pair is no pair of points."""
    state = lowered("def f(C[i,j], b[j]) -> O[i]: O[i] = logsumexp[j](b[j] - C[i,j])", "fp32[4096,65536]", "fp32[65536]")
    assert state.plan is not None
    assert family(state.plan.kernels[0], {**state.dtypes, **state.stored}, state.target) == "rows"


@pytest.mark.parametrize(("name", "most"), [("sum", 17.0), ("logsumexp", 22.0), ("softmax", 33.0), ("nearest", 9.0), ("product", 14.0)])
def test_few_instructions_for_each_pair(name: str, most: float) -> None:
    """No lane meets another one in the loop, nothing goes through shared memory, and there is one exponential where there should be."""
    pytest.importorskip("triton")
    f = tdsl.function(PROGRAMS[name][0])
    (step,) = f.lower(*LARGE, target="cuda:90").steps
    pairs = step.tile.axis("i").tile * step.tile.axis("j").tile / (32 * step.tile.num_warps)
    body = max(loops(f.emit("sass", *LARGE, target="cuda:90")), key=Counter.total)
    assert not {"SHFL", "BAR", "STS", "LDS", "STL", "LDL"} & {*body}
    assert body.total() / pairs <= most
    assert body["MUFU"] / pairs == {"sum": 1, "logsumexp": 2, "softmax": 2, "nearest": 0, "product": 1}[name]


@pytest.mark.parametrize("target", [t for t in TARGETS if t != "cpu"])
def test_no_spills(target: str) -> None:
    pytest.importorskip("triton")
    for name in ("sum", "logsumexp", "softmax"):
        report = tdsl.function(PROGRAMS[name][0]).check(*LARGE, target=target, gradient=True)
        assert [k.spills for k in report.kernels] == [0] * len(report.kernels), (name, target)


def test_sums_stay_in_float32_and_rows_fill_the_chip() -> None:
    (step,) = lowered(SUM, "bf16[20000,3]", "bf16[9000,3]", "bf16[9000,4]").steps
    assert all(op.fill == 0.0 and op.dst.dtype == "float32" for op in step.tile.body if type(op).__name__ == "Full")
    assert step.tile.grid_tiles >= 100
    sizes = [lowered(SUM, f"fp32[{n},3]", f"fp32[{n},3]", f"fp32[{n},4]").steps[0].tile.axis("i").tile for n in (1000, 10000, 100000)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
