"""Kernels of matrix products that run tile by tile in C++: values and gradients at sizes where tiles and panels end, memory that grows
with the sizes and not with their product, and what happens without a compiler. Also what memory C++ kernels use in other ways: the stack, and pages of large tensors."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lowering import cpp_launch
from tdsl import function
from tdsl.arguments import layout
from tdsl.config import config
from tdsl.ir import reads, statements
from tdsl.residuals import cut
from tdsl.runtime import Executor

needs_compiler = pytest.mark.skipif(cpp_launch.compiler() is None, reason="there is no C++ compiler")

SCORES = "S[h,i,j] += Q[h,i,d] * K[h,j,d]\n"
ATTENTION = SCORES + "P[h,i,j] = softmax[j](0.3 * S[h,i,j])\nO[h,i,e] += P[h,i,j] * V[h,j,e]"
CAUSAL = SCORES + "P[h,i,j] = softmax[j](where(j <= i, S[h,i,j], -inf))\nO[h,i,e] += P[h,i,j] * V[h,j,e]"
CAPPED = SCORES + "P[h,i,j] = softmax[j](2 * tanh(0.5 * S[h,i,j]))\nO[h,i,e] += P[h,i,j] * V[h,j,e]"
LINEAR = "S[h,i,j] += Q[h,i,d] * K[h,j,d]\nO[h,i,e] += max(S[h,i,j], 0) * V[h,j,e]".replace("max(S[h,i,j], 0)", "relu(S[h,i,j])")


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(0.3 * q @ k.mT, -1) @ v


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    return torch.softmax(scores.masked_fill(~mask, -torch.inf), -1) @ v


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(2 * torch.tanh(0.5 * (q @ k.mT)), -1) @ v


def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.relu(q @ k.mT) @ v


PROGRAMS: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "attention": (ATTENTION, attention),
    "causal": (CAUSAL, causal),
    "capped": (CAPPED, capped),
    "no softmax": (LINEAR, linear),
}
# Heads, rows, keys, width of keys and of values: primes, one beside a tile, one of many tiles, what no tile fits, one head, nothing
SIZES = [
    (9, 131, 257, 17, 23),
    (8, 129, 127, 64, 32),
    (11, 300, 1100, 16, 16),
    (16, 40, 16, 33, 65),
    (1, 200, 173, 32, 48),
    (8, 1, 64, 32, 32),
    (3, 0, 5, 16, 16),
]


def operands(sizes: tuple[int, ...], dtype: torch.dtype, memory: str = "contiguous") -> list[Tensor]:
    """Q, K and V."""
    h, i, j, d, e = sizes
    generator = torch.Generator().manual_seed(i)
    made = []
    for rows, width in ((i, d), (j, d), (j, e)):
        if memory == "heads inside":
            x = torch.randn(rows, h, width, generator=generator, dtype=torch.float64).transpose(0, 1)
        elif memory == "turned":
            x = torch.randn(h, width, rows, generator=generator, dtype=torch.float64).mT
        elif memory == "apart":
            x = torch.randn(h, rows, 2 * width, generator=generator, dtype=torch.float64)[..., ::2]
        else:
            x = torch.randn(h, rows, width, generator=generator, dtype=torch.float64)
        made.append(x.to(dtype) if memory == "contiguous" else torch.empty_strided(x.shape, x.stride(), dtype=dtype).copy_(x))
    return [x.requires_grad_() for x in made]


def both(call: Callable[..., Tensor], args: list[Tensor], cotangent: Tensor) -> list[Tensor]:
    """The value and the gradients."""
    output = call(*args)
    return [output.detach(), *torch.autograd.grad(output, args, cotangent.to(output.dtype))]


def assert_agrees(name: str, sizes: tuple[int, ...], dtype: torch.dtype, memory: str = "contiguous") -> None:
    text, exact = PROGRAMS[name]
    args = operands(sizes, dtype, memory)
    wide = [x.detach().double().requires_grad_() for x in args]
    cotangent = torch.randn(*sizes[:2], sizes[4], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tolerance = 2e-5 if dtype == torch.float32 else 1e-12
    for actual, wanted in zip(both(function(text), args, cotangent), both(exact, wide, cotangent), strict=True):
        assert actual.shape == wanted.shape and actual.dtype == dtype
        scale = float(wanted.abs().max()) if wanted.numel() else 1.0
        assert not wanted.numel() or float((actual.double() - wanted).abs().max()) <= tolerance * max(1.0, scale)


@pytest.mark.parametrize("cpu", ["c++", "torch"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", PROGRAMS)
def test_sizes(name: str, sizes: tuple[int, ...], cpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "cpu", cpu)
    assert_agrees(name, sizes, torch.float32)


@needs_compiler
@pytest.mark.parametrize("memory", ["heads inside", "turned", "apart"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_memory(memory: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "cpu", "c++")
    assert_agrees("attention", (8, 130, 67, 24, 16), dtype, memory)


@needs_compiler
def test_half_precision_stays_the_library_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its products of bfloat16 are; loops over them would take a hundred times longer."""
    monkeypatch.setattr(config, "cpu", "c++")
    f = function(ATTENTION)
    q, k, v = (x.bfloat16() for x in operands((8, 130, 67, 24, 16), torch.float32))
    executor = Executor(f.program, "torch")
    assert executor.lower(layout(f.program, [q, k, v], executor.integers), "cpu").text.count("torch.matmul") == 2


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tdsl.devices.compiler", lambda: None)
    assert_agrees("attention", (8, 130, 67, 24, 16), torch.float32)


@needs_compiler
def test_scores_are_made_once_per_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward is one kernel of two products. A gradient by itself is one of six: S and O, the gradients of P, V, Q and K."""
    monkeypatch.setattr(config, "cpu", "c++")
    f = function(ATTENTION)
    q, k, v = operands((8, 256, 256, 32, 32), torch.float32)
    for program, args, products in ((f.program, [q, k, v], 2), (f.grad().program, [q, k, v, torch.ones(8, 256, 32)], 6)):
        executor = Executor(program, "torch")
        state = executor.lower(layout(program, args, executor.integers), "cpu")
        assert sum(step.cpp.source.count("gemm(") for step in state.steps if step.cpp is not None) == products
        assert state.plan is not None and not state.plan.memory.keys() & {"S", "P", "P.grad", "S.grad"}


MEASURED = """
import resource, sys, torch
import tdsl
from tests import test_cpp_blocks as tests

torch.set_num_threads(1)
text = getattr(tests, sys.argv[1])
def run(n):
    args = [torch.randn(*((8,) if sys.argv[1] == "ATTENTION" else ()), n, w, requires_grad=True) for w in (int(x) for x in sys.argv[2].split(","))]
    f = tdsl.function(text)
    output = f(*args)
    torch.autograd.grad(output, args, torch.ones_like(output))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
small = run(512)
print(run(int(sys.argv[3])) - small)
"""
KERNEL_SUM = "S[i,j] += (x[i,d] - y[j,d]) ** 2\nO[i,e] += exp(-S[i,j]) * w[j,e]"


@needs_compiler
@pytest.mark.parametrize(("program", "widths", "most"), [("ATTENTION", "32,32,32", 120), ("KERNEL_SUM", "3,3,4", 60)])
def test_memory_is_linear(program: str, widths: str, most: int) -> None:
    """MiB that a pass forward and backward over 6144 points adds to one over 512: 8 x 6144 x 6144 scores would be 1152, the sums' 144."""
    done = subprocess.run([sys.executable, "-c", MEASURED, program, widths, "6144"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < most


TURNED = """
import torch, tdsl
s, x, y = torch.randn(520, 6000), torch.randn(520, 3), torch.randn(6000, 3)
r = tdsl.function("R[i,d] += S[i,j] * (x[i,d] - y[j,d])")(s, x, y)
exact = (s.double()[:, :, None] * (x.double()[:, None] - y.double())).sum(1)
assert float((r - exact).abs().max()) < 1e-2
"""


@needs_compiler
def test_what_is_turned_fits_the_stack() -> None:
    """A tile of 520 x 6000 elements would not."""
    done = subprocess.run([sys.executable, "-c", TURNED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


FAULTS = """
import resource, torch, tdsl
torch.set_num_threads(1)
f = tdsl.function("Y[i,j] = X[i,j] + 1")
x = torch.ones(4096, 4096)
f(x)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
y = f(x)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@needs_compiler
def test_large_tensors_are_mapped_by_large_pages() -> None:
    """64 MiB are 16384 small pages."""
    try:
        if "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
            pytest.skip("the system has no large pages")
    except OSError:
        pytest.skip("the system has no large pages")
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 8192


def test_the_backward_of_softmax_reads_its_output() -> None:
    """No exponential is computed again, so the argument is not read."""
    parts = cut(function("Y[n,c] = softmax[c](X[n,c])").program, ("X",), fuses=True)
    assert (parts.kept, parts.saved) == (("Y",), ("Y.sum",))
    assert not {"X", "Y.max"} & {a.tensor for s in statements(parts.backward.body) for a in reads(s)}
