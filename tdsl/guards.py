"""What inference could not prove is checked once per call: subscripts that depend on tensor values, and writes that must not collide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tdsl.access_checks import Check
from tdsl.errors import BoundsError, NotInjective
from tdsl.ir import Access, Call, Clamp, Const, Expr, Index, Pad, Size, free_indices, walk
from tdsl.ops import OPS
from tdsl.printer import print_expr


def run_checks(checks: Sequence[Check], tensors: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises BoundsError or NotInjective, with the values found, where a check fails. tensors: the call's arguments by name."""
    for check in checks:
        limits = [b for _, lo, hi in check.ranges for b in (lo, hi) if not isinstance(b, int)]
        if any(a.tensor not in tensors for e in (check.access, *limits) for a in accesses(e)):
            continue  # a subscript that the program itself computes: the kernel that reads it runs later
        if check.kind == "bounds" and _all_inside(check, tensors, shapes):
            continue
        grid, starts, runs = axes(check.ranges, tensors, shapes)
        sizes = [axis.numel() for axis in grid.values()]
        if 0 in sizes:
            continue
        if check.kind == "bounds":
            _bounds(check, grid, starts, runs, tensors, shapes)
        else:
            _injective(check, grid, runs, tensors, shapes, sizes)


def _all_inside(check: Check, tensors: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a subscript is a tensor's element and every element of that tensor would do; the points need not be visited then."""
    subscript = check.access.subscripts[check.dimension]
    if not isinstance(subscript, Access) or not subscript.subscripts or not tensors[subscript.tensor].numel():
        return False
    least, greatest = tensors[subscript.tensor].aminmax()
    return int(least) >= 0 and int(greatest) < shapes[check.access.tensor][check.dimension]


def axes(
    ranges: Sequence[tuple[str, Any, Any]], tensors: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, torch.Tensor], dict[str, int], torch.Tensor]:
    """The values of loop indices, each along a dimension of its own; the first value of each; and which points the loops run over.

    A range that depends on the indices before it spans all that it can be.
    """
    grid: dict[str, torch.Tensor] = {}
    starts: dict[str, int] = {}
    runs = torch.ones((), dtype=torch.bool)
    for n, (name, *bounds) in enumerate(ranges):
        lo, hi = (torch.as_tensor(b if isinstance(b, int) else value_of(b, grid, tensors, shapes)) for b in bounds)
        first, last = (int(lo.min()), int(hi.max())) if lo.numel() and hi.numel() else (0, 0)
        axis = torch.arange(first, max(first, last)).reshape([-1 if d == n else 1 for d in range(len(ranges))])
        runs = runs & (axis >= lo) & (axis < hi)
        grid[name], starts[name] = axis, first
    return grid, starts, runs


def _bounds(
    check: Check,
    grid: Mapping[str, torch.Tensor],
    starts: Mapping[str, int],
    runs: torch.Tensor,
    tensors: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    subscript = check.access.subscripts[check.dimension]
    values = torch.as_tensor(value_of(subscript, grid, tensors, shapes))
    name, size = check.access.tensor, shapes[check.access.tensor][check.dimension]
    outside = (((values < 0) | (values >= size)) & runs).nonzero()
    if len(outside):
        point = tuple(int(n) for n in outside[0])  # the grid is broadcast: an index that the subscript lacks has one place in it
        used = free_indices(subscript)
        at = [f"{index} = {lo + point[d]}" for d, (index, lo) in enumerate(starts.items()) if index in used]
        found = int(torch.broadcast_to(values, torch.broadcast_shapes(values.shape, runs.shape))[point])
        raise BoundsError(
            f"subscript {print_expr(subscript)} of {name} is {found}{' at ' if at else ''}{', '.join(at)}, "
            f"but dimension {check.dimension} of {name} has size {size}",
            span=getattr(subscript, "span", None) or check.access.span,
            help="indices count from 0; pad(..) reads zero outside, clamp(..) the nearest element",
        )


def _injective(
    check: Check,
    grid: Mapping[str, torch.Tensor],
    runs: torch.Tensor,
    tensors: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    sizes: list[int],
) -> None:
    flat = torch.zeros(sizes, dtype=torch.int64)
    inside = torch.broadcast_to(runs, sizes)
    for d, subscript in enumerate(check.access.subscripts):
        values = torch.as_tensor(value_of(subscript, grid, tensors, shapes))
        size = shapes[check.access.tensor][d]
        if isinstance(subscript, Pad):
            inside = inside & (values >= 0) & (values < size)
        if isinstance(subscript, Clamp):
            values = values.clamp(0, size - 1)
        flat = flat * size + values
    places = flat[inside]
    if places.unique().numel() < places.numel():
        raise NotInjective(
            f"`=` writes an element of {check.access.tensor} more than once, at {print_expr(check.access)}",
            span=check.access.span,
            help="write `+=` to add them up, or make the subscripts distinct",
        )


def accesses(e: Expr) -> list[Access]:
    """The accesses inside an integer expression, or in the subscripts of an access."""
    return [a for top in (e.subscripts if isinstance(e, Access) else (e,)) for a in walk(top) if isinstance(a, Access)]


def value_of(e: Expr, grid: Mapping[str, torch.Tensor], tensors: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Any:
    """An integer expression over all points of the grid, broadcast."""
    match e:
        case Const(value=value):
            return int(value)
        case Index(name=name):
            return grid[name]
        case Pad() | Clamp():
            return value_of(e.value, grid, tensors, shapes)
        case Access(tensor=name, subscripts=()):
            return int(tensors[name])
        case Access(tensor=name, subscripts=subscripts):
            tensor = tensors[name].cpu()
            places = [torch.as_tensor(value_of(s, grid, tensors, shapes)) for s in subscripts]
            # Points beyond a ragged range may lie outside; a real one has a check of its own.
            return tensor[tuple(p.clamp(0, max(0, n - 1)) for p, n in zip(places, tensor.shape, strict=True))]
        case Call(op=op, args=args):
            values = [value_of(a, grid, tensors, shapes) for a in args]
            if op in ("floordiv", "mod") and (torch.as_tensor(values[1]) == 0).any():
                raise BoundsError(f"a subscript divides by zero: {print_expr(e)}", span=e.span, help="check the divisor before the call")
            if not any(isinstance(v, torch.Tensor) for v in values) and op in ("floordiv", "mod"):
                return values[0] // values[1] if op == "floordiv" else values[0] % values[1]
            return eval(OPS[op].torch.format(*(f"v[{n}]" for n in range(len(values)))), {"torch": torch, "v": [torch.as_tensor(v) for v in values]})
        case Size(tensor=name, dim=dim):
            return shapes[name][dim]
    raise AssertionError(e)
