"""Tensors that an ordered loop overwrites, step after step, made fit for a gradient: the forward loop keeps what the backward one needs.

    for ordered t:                                      for ordered t:
        for i:  s[i] *= X[t,i]                              for i:  s.at[t,i] = s[i]
                                             -->            for i:  s.new[t,i] = s.at[t,i] * X[t,i]
                                                            for i:  s[i] = s.new[t,i]

(Reverse mode by a tape: Griewank and Walther, "Evaluating Derivatives", 2008, chapter 4; memory grows with the number of steps.)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from tdsl.affine import Ranges, enclosure, linear
from tdsl.extents import Sizes, as_expr, loop_ranges, settled, symbolic_ranges, varies
from tdsl.ir import (
    REDUCTION_OF,
    Access,
    Call,
    Const,
    Expr,
    Index,
    Loop,
    Range,
    Size,
    Statement,
    bounds,
    free_indices,
    fresh_name,
    rebuild,
    statements,
    walk,
)
from tdsl.ops import REDUCTIONS

_Visit = Callable[[Statement, Ranges], "list[Statement] | None"]
_COMBINE = {"*=": "mul", "max=": "maximum", "min=": "minimum"}


def with_kept(loop: Loop, s: Statement, access: Access, sizes: Sizes, taken: set[str]) -> Loop | None:
    """`loop`, whose statement `s` reads `access` from a tensor of its own, which has an element for every step; None where it cannot."""
    if not any(e == access for e in walk(s.value)):
        return None
    return _in_loop(loop, {}, lambda t, around: _kept(t, access, around, sizes, taken) if t is s else [t], sizes)


def explicit_updates(loop: Loop, active: Collection[str], started: Collection[str], sizes: Sizes, taken: set[str]) -> list[Statement | Loop]:
    """The loop with products, maxima and minima onto what it wrote before as plain assignments, after what starts such tensors.

    active: the tensors that may change. started: those that have values before the loop.
    """
    writes = Counter(s.target.tensor for s in statements((loop,)))
    changed: set[str] = set()

    def visit(s: Statement, around: Ranges) -> list[Statement]:
        running = not set(around) <= set(free_indices(s.target)) or writes[s.target.tensor] > 1
        if s.op not in _COMBINE or s.target.tensor not in active or not running:
            return [s]
        made = _explicit(s, around, sizes, taken)
        if made is None:
            return [s]
        changed.add(s.target.tensor)
        return made

    new = _in_loop(loop, {}, visit, sizes)
    if new is None or not changed:
        return [loop]
    starts: list[Statement | Loop] = []
    for name in sorted(changed - set(started)):
        op = next(s.op for s in statements((loop,)) if s.target.tensor == name)
        shape = sizes.shapes[name]
        if any(e == Size(name, d) for d, e in enumerate(shape)):
            return [loop]  # only what is written tells the size
        if op in _COMBINE:
            value = REDUCTIONS[REDUCTION_OF[op]].identity
            indices = tuple(Index(f"n{d}") for d in range(len(shape)))
            ranges = tuple(Range(i.name, Const(0), n) for i, n in zip(indices, shape, strict=True))
            starts.append(Statement(ranges, Access(name, indices), "=", Const(int(value) if math.isfinite(value) else value)))
    return [*starts, new]


def _in_loop(loop: Loop, around: Ranges, visit: _Visit, sizes: Sizes) -> Loop | None:
    """`loop` with every statement replaced by what `visit` makes of it inside the loops around it; None where it made nothing."""
    inside = {**around, **loop_ranges(loop, sizes)}
    body: list[Statement | Loop] = []
    for child in loop.body:
        if isinstance(child, Loop):
            new = _in_loop(child, inside, visit, sizes)
            made: Sequence[Statement | Loop] | None = None if new is None else [new]
        else:
            made = visit(child, inside)
        if made is None:
            return None
        body += made
    return replace(loop, body=tuple(body))


def _kept(s: Statement, access: Access, around: Ranges, sizes: Sizes, taken: set[str]) -> list[Statement] | None:
    ranges = symbolic_ranges(s, sizes, around)
    own = set(free_indices(access))
    for r in reversed(s.ranges):  # a range may depend on indices before it
        own |= {i for b in bounds((r,)) for i in free_indices(b)} if r.index in own else set()
    place = _place([*around, *(i for i in s.indices if i in own)], ranges)
    if place is None:
        return None
    kept = Access(_name(f"{access.tensor}.at", taken), place)
    first = settled(Statement(tuple(r for r in s.ranges if r.index in own), kept, "=", access, s.span), ranges, sizes, around)
    sizes.note(first, around)

    def visit(e: Expr) -> Expr:
        return kept if e == access else rebuild(e, visit)

    return [first, settled(replace(s, value=visit(s.value)), ranges, sizes, around)]


def _explicit(s: Statement, around: Ranges, sizes: Sizes, taken: set[str]) -> list[Statement] | None:
    """`T[i] max= f(i,j)` --> `T.part[t,i] max= f(i,j);  T.new[t,i] = maximum(T[i], T.part[t,i]);  T[i] = T.new[t,i]`."""
    ranges = symbolic_ranges(s, sizes, around)
    left = [i for i in s.indices if i not in s.reduced]
    place = _place([*around, *left], ranges)
    if place is None or not set(left) <= {e.name for e in s.target.subscripts if isinstance(e, Index)}:
        return None
    outer = tuple(r for r in s.ranges if r.index in left)
    result: list[Statement] = []
    value = s.value
    if s.reduced:
        value = Access(_name(f"{s.target.tensor}.part", taken), place)
        result.append(settled(replace(s, target=value), ranges, sizes, around))
        sizes.note(result[-1], around)
    new = Access(_name(f"{s.target.tensor}.new", taken), place)
    made = Statement(outer, new, "=", Call(_COMBINE[s.op], (s.target, value)), s.span)
    result.append(settled(made, ranges, sizes, around))
    sizes.note(result[-1], around)
    return [*result, settled(Statement(outer, s.target, "=", new, s.span), ranges, sizes, around)]


def _place(indices: Sequence[str], ranges: Ranges) -> tuple[Expr, ...] | None:
    """Subscripts, from zero, for an element per value of some indices; None where their ranges depend on the elements of a tensor.

    An index that starts or ends at an outer one, as in k+1:n and 0:k, has a place for each value that it ever takes.
    """
    subscripts: list[Expr] = []
    for i in indices:
        if i not in ranges or any(isinstance(e, Access) and e.subscripts for e in walk(as_expr(ranges[i][1]))):
            return None
        lo = ranges[i][0]
        if varies(as_expr(lo)):
            if enclosure(linear(as_expr(lo)), ranges)[0] < 0:
                return None
            lo = 0
        subscripts.append(Index(i) if lo == 0 else Call("sub", (Index(i), as_expr(lo))))
    return tuple(subscripts)


def _name(name: str, taken: set[str]) -> str:
    fresh = fresh_name(name, taken)
    taken.add(fresh)
    return fresh
