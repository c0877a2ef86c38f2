"""Fills that a whole write makes useless, and which writes are whole.

    T[n0,n1] = 0.0;  for i, u: T[i,u] += ..      -->      for i, u: T[i,u] += ..
"""

from __future__ import annotations

from dataclasses import replace

from tdsl.affine import Ranges, linear
from tdsl.expand import witness
from tdsl.extents import Sizes, as_expr, loop_ranges, symbolic_ranges
from tdsl.ir import Access, Const, Index, Loop, Size, Statement, expressions, reads, statements, walk

ZERO = Const(0)


def without_fills(body: tuple[Statement | Loop, ...], sizes: Sizes) -> tuple[Statement | Loop, ...]:
    """`T[n0,n1] = 0.0;  for i, u: T[i,u] += ..` --> the second alone, where it writes every element: a sum starts from zero.

    The same where the second is the first to write T in an ordered loop, over all of its steps.
    """
    out = list(body)
    position = 0
    while position < len(out):
        node = out[position]
        following = None
        if isinstance(node, Statement) and is_fill(node):
            following = next((n for n in range(position + 1, len(out)) if touches(out[n], node.target.tensor)), None)
        started = None if following is None or not isinstance(node, Statement) else _started(out[following], node.target.tensor, sizes)
        if following is None or started is None:
            position += 1
            continue
        out[following] = started
        out.pop(position)
    return tuple(out)


def _started(node: Statement | Loop, name: str, sizes: Sizes) -> Statement | Loop | None:
    """`node` as the first one to write `name`; None where it does not write all of it, or reads it before."""
    if isinstance(node, Statement):
        whole = node.target.tensor == name and node.op == "+=" and covers_whole(node, sizes) and all(a.tensor != name for a in reads(node))
        return sized(node, sizes) if whole else None
    first = next((s for s in statements((node,)) if s.target.tensor == name), None)
    if first is None or first.op != "+=" or not any(first is child for child in node.body) or not covers_whole(first, sizes, loop_ranges(node, sizes)):
        return None
    return replace(node, body=tuple(sized(first, sizes) if child is first else child for child in node.body))


def is_fill(s: Statement) -> bool:
    """Whether a statement sets a tensor to zero."""
    return s.op == "=" and isinstance(s.value, Const) and s.value.value == 0 and bool(s.target.subscripts)


def touches(node: Statement | Loop, name: str) -> bool:
    """Whether a node reads, writes or measures a tensor."""
    return any(isinstance(e, Access | Size) and e.tensor == name for top in expressions(node) for e in walk(top))


def covers_whole(s: Statement, sizes: Sizes, outer: Ranges | None = None) -> bool:
    """Whether the text shows that a statement writes every element of its target (over all steps of the loops of `outer`)."""
    names = [e.name for e in s.target.subscripts if isinstance(e, Index)]
    if len({*names}) < len(s.target.subscripts):
        return False
    ranges = symbolic_ranges(s, sizes, outer)
    shape = sizes.shapes[s.target.tensor]
    return all(i in ranges and ranges[i][0] == 0 and linear(as_expr(ranges[i][1])) == linear(e) for i, e in zip(names, shape, strict=True))


def sized(s: Statement, sizes: Sizes) -> Statement:
    """`s` with explicit ranges where only the target's size settles an index: it is the first write now."""
    if s.target.tensor in sizes.declared:
        return s
    shape = dict(zip((e.name for e in s.target.subscripts if isinstance(e, Index)), sizes.shapes[s.target.tensor], strict=False))
    return replace(
        s,
        ranges=tuple(
            r if r.lo is not None or r.index not in shape or witness(r.index, s.value) else replace(r, lo=ZERO, hi=shape[r.index])
            for r in s.ranges
        ),
    )
