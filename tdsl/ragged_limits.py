"""How long the ranges are that depend on the values of tensors: read once per call, which waits for a GPU; kernels are made for that.

for j in 0:len[b]:  Y[b] += X[off[b] + j]      -->      the greatest element of len, as a power of two
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from tdsl.affine import linear
from tdsl.extents import as_expr
from tdsl.guards import axes, value_of
from tdsl.infer import Inferred
from tdsl.ir import Access, Expr, Program, Reduce, bounds, expressions, statements, walk

if TYPE_CHECKING:
    from lowering.ragged import Limits

Extent = tuple[Expr, tuple[tuple[str, int | Expr, int | Expr], ...]]  # how long a range is, and the ranges of the indices in that
NO_LIMITS: Limits = {}


def is_ragged(program: Program) -> bool:
    """Whether a range depends on the values of a tensor."""
    tops = [top for node in program.body for top in expressions(node)]
    found = [b for s in statements(program.body) for b in bounds(s.ranges)]
    found += [b for top in tops for e in walk(top) if isinstance(e, Reduce) for b in bounds(e.ranges)]
    return any(isinstance(a, Access) and a.subscripts for b in found for a in walk(b))


def ragged_extents(inferred: Inferred, inputs: frozenset[str]) -> Iterator[Extent]:
    """The lengths of ranges that depend on the values of input tensors."""
    for ranges in inferred.ranges:
        before: list[tuple[str, int | Expr, int | Expr]] = []
        for name, (lo, hi) in ranges.items():
            extent = (linear(as_expr(hi)) - linear(as_expr(lo))).expr()
            read = [a for a in walk(extent) if isinstance(a, Access) and a.subscripts]
            if read and all(a.tensor in inputs for a in walk(extent) if isinstance(a, Access)):
                yield extent, tuple(before)
            before.append((name, lo, hi))


def limits_of(extents: tuple[Extent, ...], tensors: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Limits:
    """The most that each of some extents is, for such tensors, as powers of two; the terms beyond a range are masked."""
    limits: dict[Expr, int] = {}
    for extent, ranges in extents:
        grid, _, runs = axes(ranges, tensors, shapes)
        values = torch.as_tensor(value_of(extent, grid, tensors, shapes)) * runs
        most = max(0, int(values.max())) if values.numel() else 0
        limits[extent] = 1 << (most - 1).bit_length() if most else 0
    return limits
