"""The product of all terms of a `*=` but one: its derivative with respect to that one, right where factors are zero.

for i, j:  p[i] *= A[i,j]      -->      dp[i] / dA[i,j] = prod[j2](where(j2 == j, 1, A[i,j2]))
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from tdsl.ir import (
    Access,
    Call,
    Clamp,
    Const,
    Expr,
    Index,
    Pad,
    Range,
    Reduce,
    Size,
    Statement,
    free_indices,
    fresh_name,
    rebuild_range,
    substitute,
)

ZERO, ONE = Const(0), Const(1)


def others(s: Statement, ranges: Sequence[Range], outer: Collection[str] = ()) -> Expr | None:
    """The product of the terms of `s` that meet this one in its element, itself left out; None where there is no other.

    ranges: those of `s`, explicit where its value alone does not settle them. outer: the indices of the loops around it.
    Terms meet over the indices that are not on the left, and where the target's subscripts (`Y[dst[e]] *= m[e]`, `Y[x+r] *= ..`)
    give one element.
    """
    plain = {e.name for e in s.target.subscripts if isinstance(e, Index)}
    moving = [r for r in ranges if r.index not in plain]
    if not moving:
        return None
    taken = {*s.indices, *outer}
    to: dict[str, Expr] = {}
    renamed = []
    for r in moving:
        fresh = fresh_name(r.index, taken)
        taken.add(fresh)
        to[r.index] = Index(fresh)
        renamed.append(replace(r, index=fresh))
    inner = tuple(rebuild_range(r, lambda e: substitute(e, to)) for r in renamed)
    conditions = [joined("and", [Call("eq", (i, Index(name))) for name, i in to.items()])]
    for d, e in enumerate(s.target.subscripts):
        if set(free_indices(e)) & set(to):
            place = _place(s.target, d)
            conditions.append(Call("ne", (substitute(place, to), place)))
    return Reduce("prod", inner, Call("where", (joined("or", conditions), ONE, substitute(s.value, to))))


def joined(op: str, conditions: Sequence[Expr]) -> Expr:
    """The conditions, joined by "and" or "or"."""
    result = conditions[0]
    for condition in conditions[1:]:
        result = Call(op, (result, condition))
    return result


def _place(target: Access, d: int) -> Expr:
    """The element that a subscript of a target names, as a value."""
    e = target.subscripts[d]
    if isinstance(e, Clamp):
        return Call("maximum", (Call("minimum", (e.value, Call("sub", (Size(target.tensor, d), ONE)))), ZERO))
    return e.value if isinstance(e, Pad) else e
