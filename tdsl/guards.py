"""What inference could not prove is checked once per call: subscripts that depend on tensor values, and writes that must not collide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tdsl.errors import BoundsError, NotInjective, Unsupported
from tdsl.infer import Check
from tdsl.ir import Access, Call, Clamp, Const, Expr, Index, Pad
from tdsl.ops import OPS
from tdsl.printer import print_expr


def run_checks(checks: Sequence[Check], tensors: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises BoundsError or NotInjective, with the values found, where a check fails. tensors: the call's arguments by name."""
    for check in checks:
        names = [name for name, _, _ in check.ranges]
        if any(not isinstance(b, int) for _, lo, hi in check.ranges for b in (lo, hi)):
            raise Unsupported(
                "ranges that depend on tensor values cannot be compiled yet (lowering)",
                span=check.access.span,
                help='run it with backend="reference"',
            )
        if any(a.tensor not in tensors for a in _inside(check.access)):
            continue  # a subscript that the program itself computes: the kernel that reads it runs later
        grid = {name: _axis(n, lo, hi, len(names)) for n, (name, lo, hi) in enumerate(check.ranges)}
        sizes = [hi - lo for _, lo, hi in check.ranges if isinstance(lo, int) and isinstance(hi, int)]
        if 0 in sizes:
            continue
        if check.kind == "bounds":
            _bounds(check, grid, tensors, shapes)
        else:
            _injective(check, grid, tensors, shapes, sizes)


def _axis(position: int, lo: Any, hi: Any, rank: int) -> torch.Tensor:
    return torch.arange(lo, hi).reshape([-1 if d == position else 1 for d in range(rank)])


def _bounds(check: Check, grid: Mapping[str, torch.Tensor], tensors: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    subscript = check.access.subscripts[check.dimension]
    values = torch.as_tensor(_value(subscript, grid, tensors, shapes))
    size = shapes[check.access.tensor][check.dimension]
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= size:
        where = f"subscript {print_expr(subscript)} of {check.access.tensor} (dimension {check.dimension})"
        raise BoundsError(
            f"{where} is {low if low < 0 else high}; the size there is {size}",
            span=check.access.span,
            help="indices count from 0; pad(..) reads zero outside, clamp(..) the nearest element",
        )


def _injective(
    check: Check, grid: Mapping[str, torch.Tensor], tensors: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], sizes: list[int]
) -> None:
    flat = torch.zeros(sizes, dtype=torch.int64)
    inside = torch.ones(sizes, dtype=torch.bool)
    for d, subscript in enumerate(check.access.subscripts):
        values = torch.as_tensor(_value(subscript, grid, tensors, shapes))
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
            help="write += to add them up",
        )


def _inside(access: Access) -> list[Access]:
    found: list[Access] = []
    pending: list[Expr] = list(access.subscripts)
    while pending:
        e = pending.pop()
        if isinstance(e, Access):
            found.append(e)
            pending += e.subscripts
        elif isinstance(e, Call):
            pending += e.args
        elif isinstance(e, Pad | Clamp):
            pending.append(e.value)
    return found


def _value(e: Expr, grid: Mapping[str, torch.Tensor], tensors: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Any:
    """An integer expression over all points of the grid, broadcast."""
    match e:
        case Const(value=value):
            return int(value)
        case Index(name=name):
            return grid[name]
        case Pad() | Clamp():
            return _value(e.value, grid, tensors, shapes)
        case Access(tensor=name, subscripts=()):
            return int(tensors[name])
        case Access(tensor=name, subscripts=subscripts):
            return tensors[name].cpu()[tuple(_value(s, grid, tensors, shapes) for s in subscripts)]
        case Call(op=op, args=args):
            values = [_value(a, grid, tensors, shapes) for a in args]
            if not any(isinstance(v, torch.Tensor) for v in values) and op in ("floordiv", "mod"):
                return values[0] // values[1] if op == "floordiv" else values[0] % values[1]
            return eval(OPS[op].torch.format(*(f"v[{n}]" for n in range(len(values)))), {"torch": torch, "v": values})
    from tdsl.ir import Size

    if isinstance(e, Size):
        return shapes[e.tensor][e.dim]
    raise AssertionError(e)
