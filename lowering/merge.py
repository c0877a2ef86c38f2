"""Loops of a kernel over the same axis become one, and what both compute is computed once.

    for n: s[c] += x[n,c] * g[n,c]                       for n: x, g = load; s[c] += x * g
    store s                                       -->           t = sum of x * g along c; store y[n,c] = t * g
    for n: t = sum of x * g along c; ...                 store s

The second loop moves to the first where it waits for nothing that is made after that one starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace

from lowering import tile_ir as ir
from tdsl.ir import Expr, Index, free_indices, substitute


def merge(kernel: ir.Kernel) -> ir.Kernel:
    """`kernel` with its outermost loops over one axis merged."""
    body: list[ir.Operation] = []
    for op in kernel.body:
        place = next(
            (n for n, other in enumerate(body) if isinstance(other, ir.For) and isinstance(op, ir.For) and other.axis == op.axis), None
        )
        if place is None or not isinstance(op, ir.For):
            body.append(op)
            continue
        first = body[place]
        assert isinstance(first, ir.For)
        before = _needed(op.body, body[place + 1 :], assigned(first.body))
        if before is None or op.lo != first.lo or op.hi != first.hi:
            body.append(op)
            continue
        rest = [x for x in body[place + 1 :] if not any(x is y for y in before)]
        body = [*body[:place], *before, replace(first, body=_joined(first.body, op.body)), *rest]
    return replace(kernel, body=tuple(body))


def _needed(body: tuple[ir.Operation, ...], between: list[ir.Operation], changing: set[str]) -> list[ir.Operation] | None:
    """What a loop needs of the operations before it, all of which can go before the loop that changes some values; else None."""
    needed = used(body)
    found: list[ir.Operation] = []
    for op in reversed(between):
        made = assigned(op.body) if isinstance(op, ir.For) else set() if isinstance(op, ir.Store) else {op.dst.name}
        if not made & needed:
            continue
        if not isinstance(op, ir.Load | ir.Elementwise | ir.IndexOf | ir.Full):
            return None
        needed |= used((op,))
        found.insert(0, op)
    return None if needed & changing else found


def assigned(body: tuple[ir.Operation, ...]) -> set[str]:
    """The carried values that a body changes."""
    return {op.dst.name for op in ir.operations(body) if isinstance(op, ir.Assign)}


def used(body: tuple[ir.Operation, ...]) -> set[str]:
    """The names that a body reads, and the carried values that it changes."""
    found = assigned(body)
    for op in ir.operations(body):
        for name in [f.name for f in fields(op)]:
            value = getattr(op, name)
            for x in value if isinstance(value, tuple) else (value,):
                if isinstance(x, ir.Value) and name != "dst":
                    found.add(x.name)
                elif name in ("subscripts", "expr"):
                    found |= set(free_indices(x))
    return found


def _joined(first: tuple[ir.Operation, ...], second: tuple[ir.Operation, ...]) -> tuple[ir.Operation, ...]:
    """The second body after the first, under the first's names for what both compute."""
    changing = assigned(first) | assigned(second)
    known: dict[ir.Operation, ir.Value] = {}
    for op in first:
        if isinstance(op, ir.Load | ir.Elementwise | ir.IndexOf | ir.Fold) and not changing & used((op,)):
            known[nameless(op)] = op.dst
    result = list(first)
    to: dict[str, ir.Value] = {}
    for op in second:
        op = renamed(op, to)
        if isinstance(op, ir.Load | ir.Elementwise | ir.IndexOf | ir.Fold) and not changing & used((op,)):
            same = known.get(nameless(op))
            if same is not None:
                to[op.dst.name] = same
                continue
        result.append(op)
    return tuple(result)


def nameless(op: ir.Load | ir.Elementwise | ir.IndexOf | ir.Fold | ir.Dot | ir.Mask) -> ir.Operation:
    """What an operation computes, whatever its result is called."""
    return replace(op, dst=replace(op.dst, name=""))


def renamed(op: ir.Operation, to: Mapping[str, ir.Value]) -> ir.Operation:
    """An operation that reads other values in place of some."""
    if not to:
        return op
    if isinstance(op, ir.For):
        return replace(op, body=tuple(renamed(x, to) for x in op.body))
    names: dict[str, Expr] = {old: Index(new.name) for old, new in to.items()}
    changed: dict[str, object] = {}
    for f in fields(op):
        value = getattr(op, f.name)
        if f.name in ("src", "lhs", "rhs", "acc") and isinstance(value, ir.Value):
            changed[f.name] = to.get(value.name, value)
        elif f.name == "args":
            changed[f.name] = tuple(to.get(a.name, a) if isinstance(a, ir.Value) else a for a in value)
        elif f.name == "subscripts":
            changed[f.name] = tuple(substitute(e, names) for e in value)
        elif f.name == "expr":
            changed[f.name] = substitute(value, names)
    return replace(op, **changed)  # type: ignore[arg-type]
