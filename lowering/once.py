"""What a kernel computes twice is computed once.

s = dot(q, k); ..; s1 = dot(q, k); e1 = exp(s1)      -->      s = dot(q, k); ..; e1 = exp(s)

A statement that is stored and one that is summed are tiled one by one; where both are made of the same intermediate, each
brings it along.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lowering import tile_ir as ir
from lowering.merge import assigned, nameless, renamed, used


def once(kernel: ir.Kernel) -> ir.Kernel:
    """`kernel` without repeated loads, arithmetic, products and folds; what reads a carried value stays where it is."""
    return replace(kernel, body=_body(kernel.body, {}, {}, frozenset()))


def _body(
    body: tuple[ir.Operation, ...], outside: Mapping[ir.Operation, ir.Value], to: dict[str, ir.Value], changing: frozenset[str]
) -> tuple[ir.Operation, ...]:
    known = dict(outside)
    changing = changing | assigned(body)
    result: list[ir.Operation] = []
    for op in body:
        op = renamed(op, to)
        if isinstance(op, ir.For):
            op = replace(op, body=_body(op.body, known, to, changing))
        elif isinstance(op, ir.Load | ir.Elementwise | ir.IndexOf | ir.Fold | ir.Dot | ir.Mask) and not changing & used((op,)):
            same = known.setdefault(_what(op), op.dst)
            if same is not op.dst:
                to[op.dst.name] = same
                continue
        result.append(op)
    return tuple(result)


def _what(op: ir.Load | ir.Elementwise | ir.IndexOf | ir.Fold | ir.Dot | ir.Mask) -> ir.Operation:
    """What an operation computes: sums and products the same either way round."""
    if isinstance(op, ir.Elementwise) and op.op in ("add", "mul"):
        op = replace(op, args=tuple(sorted(op.args, key=lambda a: a.name if isinstance(a, ir.Value) else repr(a))))
    return nameless(op)
