"""Errors against float64: tdsl beside torch's own, on the same inputs and in the same dtype, forward and gradients.

An error is the largest difference from the float64 result of torch's composition, over the largest element of that. Long sums
have a million terms, with a mean that is no zero: rounding errors add up there, and a 16-bit accumulator would stop growing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import tdsl
from benchmarks.cases import CASES

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, slots=True)
class Sample:
    """A program, the same in torch, and its arguments in float64. make: of a generator and a device."""

    name: str
    text: str
    eager: Callable[..., Tensor]
    make: Callable[[torch.Generator, str], Sequence[Tensor]]


@dataclass(frozen=True, slots=True)
class Errors:
    """forward, gradient: the largest errors of tdsl and of torch."""

    name: str
    dtype: str
    forward: tuple[float, float]
    gradient: tuple[float, float]

    def as_json(self) -> Mapping[str, object]:
        """The same as data."""
        return {"case": self.name, "dtype": self.dtype, "forward": self.forward, "gradient": self.gradient}


def _row(sizes: tuple[int, ...], shift: float = 1.0) -> Callable[[torch.Generator, str], Sequence[Tensor]]:
    return lambda generator, device: (torch.randn(sizes, generator=generator, dtype=torch.float64).to(device) + shift,)


def _two(sizes: tuple[int, ...]) -> Callable[[torch.Generator, str], Sequence[Tensor]]:
    return lambda generator, device: tuple(torch.randn(sizes, generator=generator, dtype=torch.float64).to(device) + 0.5 for _ in range(2))


LONG = 1_000_000
LONG_SUMS = (
    Sample("sum of a million", "s += x[k]", torch.sum, _row((LONG,))),
    Sample("dot of a million", "s += x[k] * y[k]", torch.dot, _two((LONG,))),
    Sample("sums over columns", "s[j] += X[k,j]", lambda x: x.sum(0), _row((LONG // 8, 8))),
    Sample("logsumexp of a million", "s = logsumexp[k](x[k])", lambda x: torch.logsumexp(x, 0), _row((LONG,))),
    Sample("variance of a million", "s = var[k](x[k])", lambda x: x.var(correction=0), _row((LONG,), 100.0)),
)


def samples(device: str) -> list[Sample]:
    """The benchmark programs with their own sizes, then long sums."""

    def arguments(case: object) -> Callable[[torch.Generator, str], Sequence[Tensor]]:
        return lambda generator, device: [t.detach().double() if t.is_floating_point() else t for t in case.make(device, torch.float32)]  # type: ignore[attr-defined]

    return [*(Sample(c.name, c.text, c.eager, arguments(c)) for c in CASES), *LONG_SUMS]


def errors(sample: Sample, dtype: str, device: str, backend: str = "auto") -> Errors:
    """The errors of one program in one dtype. Inputs are rounded to the dtype first, so that all three start from the same numbers."""
    kind = getattr(torch, dtype)
    args = [a.to(kind) if a.is_floating_point() else a for a in sample.make(torch.Generator().manual_seed(0), device)]
    exact, exact_grads = _run(sample.eager, [a.double() if a.is_floating_point() else a for a in args])
    found = []
    for f in (tdsl.function(sample.text, backend=backend), sample.eager):
        result, grads = _run(f, args)
        found.append((_error(result, exact), max((_error(g, e) for g, e in zip(grads, exact_grads, strict=True)), default=0.0)))
    (mine, mine_back), (theirs, theirs_back) = found
    return Errors(sample.name, dtype, (mine, theirs), (mine_back, theirs_back))


def _run(f: Callable[..., Tensor], args: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
    leaves = [a.detach().clone().requires_grad_(a.is_floating_point()) for a in args]
    result = f(*leaves)
    wide = torch.randn(result.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32).to(result.device)
    wanted = [a for a in leaves if a.requires_grad]
    # The cotangent is one that bfloat16 has, so that it is the same in every dtype.
    return result.detach(), torch.autograd.grad(result, wanted, wide.bfloat16().to(result.dtype))


def _error(actual: Tensor, exact: Tensor) -> float:
    scale = float(exact.abs().max()) or 1.0
    return float((actual.double() - exact).abs().max()) / scale


def run(console: Console, device: str) -> list[Errors]:
    """Prints the table; its rows."""
    table = Table(title=f"largest error over largest element, against float64, on {device}")
    for head in ("program", "dtype", "forward: tdsl", "torch", "gradient: tdsl", "torch"):
        table.add_column(head, justify="left" if head in ("program", "dtype") else "right")
    found = []
    for sample in samples(device):
        for dtype in DTYPES:
            row = errors(sample, dtype, device)
            found.append(row)
            table.add_row(row.name, dtype, *(f"{e:.1e}" for e in (*row.forward, *row.gradient)))
    console.print(table)
    return found
