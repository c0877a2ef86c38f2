"""Programs that others publish: every executor against the loops, first and second derivatives against differences, some against torch."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import tdsl
from lowering.cpp_launch import compiler
from tdsl.config import config
from tdsl.ir import Program
from tdsl.swap import differentiable, gradient
from tdsl.text import parse
from tdsl.verify import verify
from tests.programs import arguments, check, cotangents, expected, parsed
from tests.published import PUBLISHED
from tests.strange import STRANGE
from tests.test_gradients import assert_directional, is_float

BACKENDS = ("torch", "triton", *(("c++",) if compiler() else ()))


def programs(name: str, dtype: torch.dtype) -> list[tuple[Program, list[Any]]]:
    """A program and its gradient, with arguments."""
    program = verify(parsed(PUBLISHED[name].text))
    args = arguments(program, PUBLISHED[name], dtype)
    found = [(program, args)]
    if any(is_float(a) for n, a in zip(program.inputs, args, strict=True) if n in differentiable(program)):
        found.append((gradient(program), cotangents(gradient(program), args, expected(program, args), dtype=dtype)))
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_executors(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "cpu", "c++" if backend == "c++" else "torch")
    for program, args in programs(name, torch.float32):
        check(program, args, "triton" if backend == "triton" else "torch", scale=4)


@pytest.mark.parametrize("name", PUBLISHED)
def test_derivatives(name: str) -> None:
    program = parsed(PUBLISHED[name].text)
    args = arguments(program, PUBLISHED[name], torch.float64)
    if not any(is_float(a) for n, a in zip(program.inputs, args, strict=True) if n in differentiable(program)):
        return
    derived, given = assert_directional(program, args, tolerance=1e-5)
    assert parse(str(verify(derived))) == derived
    second, more = assert_directional(derived, given, tolerance=1e-4)
    check(second, more, "torch", scale=1e4)


def test_the_table_of_features() -> None:
    """Every example of the README's table is a program, and its gradient prints and parses back."""
    page = (Path(__file__).parent.parent / "README.md").read_text()
    table = page[page.index("| feature | one-line example") :].split("\n\n")[0]
    examples = [re.findall(r"`([^`]+)`", line.split(" | ")[1]) for line in table.splitlines()[2:]]
    assert len(examples) > 15 and all(examples)
    for text in (text for row in examples for text in row):
        derived = gradient(parse(text))
        assert parse(str(verify(derived))) == derived


TWICE = (
    *("scores_of_differences", "updates_of_one_step", "turned_totals", "kept_states", "mixed_updates", "partial_product"),
    *("ties_of_products", "ties_of_functions", "ties_of_a_number", "ties_of_numbers"),
)


@pytest.mark.parametrize("cpu", [b for b in BACKENDS if b != "triton"])
@pytest.mark.parametrize("name", TWICE)
def test_strange_programs(name: str, cpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the second order, in both float types: what is added twice, lost or rounded in another way shows in some."""
    monkeypatch.setattr(config, "cpu", cpu)
    for dtype in (torch.float64, torch.float32):
        program = parsed(STRANGE[name].text)
        args = arguments(program, STRANGE[name], dtype)
        for order in range(3 if dtype == torch.float64 else 2):
            check(program, args, "torch", scale=1000 if dtype == torch.float64 else 4)
            if order < 2:
                derived = gradient(program)
                args = cotangents(derived, args, expected(program, args), dtype=dtype)
                program = derived


# ---------------------------------------------------------------------------------------------------------------------
# The same in torch


def max_pool(X: torch.Tensor) -> torch.Tensor:
    return F.max_pool2d(X, (3, 2), 2)


def segment_max(x: torch.Tensor, dst: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    return base.scatter_reduce(0, dst, x, "amax", include_self=True)


def ring(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(w), n=x.shape[0])


def normalized(X: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.group_norm(X, 2, w, None, 1e-5)


IN_TORCH: dict[str, tuple[str, dict[str, tuple[int, ...]], Callable[..., torch.Tensor]]] = {
    "convolution, padded, strided, dilated": (
        "Y[n,o,x,y] += X[n,c,pad(2*x+2*r-1,1,1),pad(y+3*s-2,2,2)] * W[o,c,r,s]", {"X": (2, 3, 9, 8), "W": (4, 3, 3, 2)},
        lambda X, W: F.conv2d(X, W, stride=(2, 1), dilation=(2, 3), padding=(1, 2)),
    ),
    "transposed convolution": (
        "def up(X[n,c,x], W[c,o,r]) -> Y[n,o,2*x+1]: Y[n,o,2*x+r] += X[n,c,x] * W[c,o,r]", {"X": (2, 3, 4), "W": (3, 2, 3)},
        lambda X, W: F.conv_transpose1d(X, W, stride=2),
    ),
    "max pool": ("for c, x in 0:3, y in 0:2, r in 0:3, s in 0:2:  Y[c,x,y] max= X[c,2*x+r,2*y+s]", {"X": (2, 7, 5)}, max_pool),
    "circular convolution": ("def ring(x[n], w[n]) -> Y[n]: Y[i] += x[(i-k) % size(x, 0)] * w[k]", {"x": (7,), "w": (7,)}, ring),
    "kronecker": (
        "def kron(A[i,j], B[k,l]) -> Y[i*k,j*l]: Y[i*size(B, 0)+k,j*size(B, 1)+l] = A[i,j] * B[k,l]", {"A": (3, 2), "B": (2, 4)}, torch.kron,
    ),
    "group norm": (
        "for n, g in 0:2, d in 0:3, h:  M[n,g] += X[n,g*3+d,h] / (3 * size(X, 2))\n"
        "for n, g in 0:2, d in 0:3, h:  V[n,g] += (X[n,g*3+d,h] - M[n,g]) ** 2 / (3 * size(X, 2))\n"
        "Y[n,c,h] = (X[n,c,h] - M[n,c//3]) * rsqrt(V[n,c//3] + 1e-5) * w[c]", {"X": (2, 6, 4), "w": (6,)}, normalized,
    ),
    "log-sum-exp": ("Y[i] = logsumexp[j, k](X[i,j,k])", {"X": (3, 4, 5)}, lambda X: X.logsumexp((1, 2))),
    "cube": ("Y[i] = x[i] ** 3", {"x": (5,)}, lambda x: x**3),
    "ties": ("Y[i] max= X[i,j]", {"X": (4, 5)}, lambda X: X.amax(1)),
    "trilinear": ("Y[b,o] += X[b,i] * W[o,i,j] * Z[b,j]", {"X": (3, 2), "W": (4, 2, 3), "Z": (3, 3)}, lambda X, W, Z: F.bilinear(X, Z, W)),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("name", IN_TORCH)
def test_as_torch(name: str, backend: str) -> None:
    text, shapes, other = IN_TORCH[name]
    f = tdsl.function(text, backend=backend)
    generator = torch.Generator().manual_seed(0)
    args = [torch.randn(shapes[n], generator=generator, dtype=torch.float64) for n in f.program.inputs]
    if name == "ties":
        args = [a.round() for a in args]
    args = [a.requires_grad_() for a in args]
    found, wanted = f(*args), other(*args)
    torch.testing.assert_close(found, wanted)
    seed = torch.randn(wanted.shape, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(torch.autograd.grad(found, args, seed), torch.autograd.grad(wanted, args, seed))


def test_scattered_maxima_share_as_torch() -> None:
    """Ties among the terms and the older value, as scatter_reduce counts them."""
    f = tdsl.function("def top(x[e], dst[e], base[n]) -> base[n]: base[dst[e]] max= x[e]")
    x = torch.tensor([1.0, 2.0, 2.0, 0.5, 3.0, 0.0], dtype=torch.float64, requires_grad=True)
    base = torch.tensor([2.0, 1.0, 3.0, 5.0], dtype=torch.float64, requires_grad=True)
    dst = torch.tensor([0, 0, 0, 1, 2, 2])
    found, wanted = f(x, dst, base), segment_max(x, dst, base)
    seed = torch.tensor([6.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(found, (x, base), seed), torch.autograd.grad(wanted, (x, base), seed))


@pytest.mark.parametrize("kernel", range(1, 6))
@pytest.mark.parametrize("dilation", range(1, 5))
@pytest.mark.parametrize("stride", range(1, 5))
def test_every_window(stride: int, dilation: int, kernel: int) -> None:
    """Both gradients of a convolution on every executor, as torch gives them; no kernel adds atomically."""
    text = f"Y[o,x] += X[c,pad({stride}*x+{dilation}*r-2,2,2)] * W[o,c,r]"
    args = [torch.randn(2, 2 * stride + dilation * (kernel - 1) + 1, dtype=torch.float64), torch.randn(3, 2, kernel, dtype=torch.float64)]
    args = [a.requires_grad_() for a in args]
    wanted = F.conv1d(args[0][None], args[1], stride=stride, dilation=dilation, padding=2)[0]
    seed = torch.randn_like(wanted)
    grads = torch.autograd.grad(wanted, args, seed)
    for backend in ("torch", "triton"):
        f = tdsl.function(text, backend=backend)
        torch.testing.assert_close(f(*args), wanted)
        torch.testing.assert_close(torch.autograd.grad(f(*args), args, seed), grads)
    forms = [f"fp64[{','.join(map(str, a.shape))}]" for a in (*args, seed)]
    assert "atomic" not in f.grad().emit("triton", *forms)


def test_dropout_regenerates_its_mask() -> None:
    """The gradient holds no mask: it draws the same numbers again, of the seed and the place."""
    f = tdsl.function("def dropout(x[n,m], seed, p) -> Y[n,m]: Y[i,j] = where(rand(seed, i, j) < p, x[i,j] / p, 0)")
    x = torch.ones(200, 300, requires_grad=True)
    y = f(x, 7, 0.75)
    assert abs(float((y != 0).float().mean()) - 0.75) < 0.01
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], y.detach())
    assert torch.equal(y, f(x, 7, 0.75)) and not torch.equal(y, f(x, 8, 0.75))
    assert "x" not in f.grad("x").plan("fp32[8,8]", 7, 0.75, "fp32[8,8]").kernels[0].reads


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
def test_random_numbers(backend: str) -> None:
    """Every executor draws the same bits; they are uniform, and neighbours do not go together."""
    text = "def draw(n, m, seed) -> Y[n,m]: for i in 0:n, j in 0:m:  Y[i,j] = rand(seed, i, j)"
    small = tdsl.function(text, backend=backend)(7, 5, 2**40 + 3)
    assert torch.equal(small, tdsl.function(text)(7, 5, 2**40 + 3).to(small.dtype))
    y = tdsl.function(text)(600, 500, -1)
    assert float(y.min()) >= 0 and float(y.max()) < 1 and y.unique().numel() > 0.98 * y.numel()
    counts = torch.histc(y, 100, 0, 1)
    assert 60 < float(((counts - 3000) ** 2 / 3000).sum()) < 150
    for other in (y.roll(1, 0), y.roll(1, 1), tdsl.function(text)(600, 500, 0)):
        assert abs(float(torch.corrcoef(torch.stack([y.flatten(), other.flatten()]))[0, 1])) < 0.01


def test_deterministic_sums_do_not_change() -> None:
    """A scatter and the gradient of a gather, a hundred times: the same bits."""
    torch.use_deterministic_algorithms(True)
    try:
        scatter = tdsl.function("def s(p[e], x[e,d], N) -> Y[N,d]: Y[p[e],d] += x[e,d]")
        embed = tdsl.function("Y[t,d] = E[ids[t],d] ** 2")
        p, x = torch.randint(0, 5, (3000,)), torch.randn(3000, 3)
        E = torch.randn(5, 3, requires_grad=True)
        first = scatter(p, x, 5), torch.autograd.grad(embed(E, p).sum(), E)[0]
        for _ in range(100):
            assert torch.equal(scatter(p, x, 5), first[0])
            assert torch.equal(torch.autograd.grad(embed(E, p).sum(), E)[0], first[1])
    finally:
        torch.use_deterministic_algorithms(False)
