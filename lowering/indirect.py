"""Reads and writes at computed places that need not go through memory.

y[n] = S[n,t[n]]            -->  S.at[n] += A[n,d]*B[t[n],d];  y[n] = S.at[n]     (S[n,v] += A[n,d]*B[v,d])
T[n,v] = 0; T[n,t[n]] += e  -->  T[n,v] = 0 + where(v == t[n], e, 0)
Y[p[e]] *= x[e]             -->  Y[n] *= where(n == p[e], x[e], 1)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from lowering.statement import extents, plain
from tdsl.ir import (
    Access,
    Call,
    Clamp,
    Const,
    Expr,
    Index,
    Loop,
    Pad,
    Program,
    Range,
    Statement,
    free_indices,
    fresh_name,
    rebuild,
    statements,
    substitute,
    walk,
)
from tdsl.simplify import simplify_expr

# A sum is made again for single elements if those are so many times fewer than all of them.
_FEWER = 8


def direct(program: Program) -> Program:
    """`program` (loops from zero) with `points` and `one_hot` applied wherever they can be."""
    return points(one_hot(program))


def wide_sums(
    program: Program, shapes: Mapping[str, tuple[int, ...]], narrow: frozenset[str], small: frozenset[str] = frozenset()
) -> tuple[Program, dict[str, str]]:
    """Sums that are collected in memory, element by element, need more digits than 16-bit tensors have:

        E.grad[ids[b],d] += g[b,d]   -->   E.grad.sum[ids[b],d] += g[b,d];  E.grad[n0,n1] = E.grad.sum[n0,n1]

    narrow: the 16-bit tensors. small: tensors that cannot be collected as they are, since no GPU has atomics for their type.
    Returns the program and, per new tensor, the one that it stands for.
    """
    body = list(statements(program.body))
    counts = Counter(s.target.tensor for s in body)
    by_element = [s for s in body if counts[s.target.tensor] > 1 or not plain(s.target)]
    collected = {s.target.tensor for s in by_element if s.op == "+="} & (narrow | small)
    collected |= {s.target.tensor for s in by_element if s.op in ("max=", "min=")} & small
    names: dict[str, str] = {}
    taken = {*counts, *program.inputs, *shapes}
    for name in sorted(collected - {*program.inputs}):
        names[name] = fresh_name(f"{name}.sum", taken)
        taken.add(names[name])
    if not names:
        return program, {}
    result: list[Statement] = []
    for s in body:
        name = s.target.tensor
        result.append(replace(s, target=replace(s.target, tensor=names.get(name, name))))
        counts[name] -= 1
        if name in names and not counts[name]:
            indices = tuple(Index(f"n{d}") for d in range(len(shapes[name])))
            ranges = tuple(Range(i.name, Const(0), Const(n)) for i, n in zip(indices, shapes[name], strict=True))
            result.append(Statement(ranges, Access(name, indices), "=", Access(names[name], indices), s.span))
    return replace(program, body=tuple(result)), {new: old for old, new in names.items()}


def places_of_products(program: Program, shapes: Mapping[str, tuple[int, ...]]) -> Program:
    """Products at computed places, or of some elements only, walk all elements: there are no atomic products.

        Y[p[e]] *= x[e]   -->   Y[n] *= where(n == p[e], x[e], 1)
    """
    return replace(program, body=tuple(_placed(node, shapes, frozenset()) for node in program.body))


def _placed(node: Statement | Loop, shapes: Mapping[str, tuple[int, ...]], outer: frozenset[str]) -> Statement | Loop:
    if isinstance(node, Loop):
        outer |= {r.index for r in node.ranges}
        return replace(node, body=tuple(_placed(child, shapes, outer) for child in node.body))
    if node.op != "*=":
        return node
    shape = shapes[node.target.tensor]
    whole = {r.index: r.hi for r in node.ranges if r.lo == Const(0)}
    kept: set[str] = set()
    taken = {*outer, *node.indices, *(e.name for e in walk(node.value) if isinstance(e, Index))}
    subscripts: list[Expr] = []
    ranges: list[Range] = []
    conditions: list[Expr] = []
    for d, e in enumerate(node.target.subscripts):
        if isinstance(e, Index) and whole.get(e.name) == Const(shape[d]) and e.name not in kept:
            kept.add(e.name)
            subscripts.append(e)
        elif not isinstance(e, Clamp) and free_indices(e) and set(free_indices(e)) <= outer:
            subscripts.append(e)  # the step of an ordered loop settles it
        else:
            place = Index(fresh_name(f"n{d}", taken))
            taken.add(place.name)
            value = e.value if isinstance(e, Pad | Clamp) else e
            if isinstance(e, Clamp):
                value = Call("maximum", (Call("minimum", (value, Const(shape[d] - 1))), Const(0)))
            subscripts.append(place)
            ranges.append(Range(place.name, Const(0), Const(shape[d])))
            conditions.append(Call("eq", (place, value)))
    if not conditions:
        return node
    hit = conditions[0]
    for c in conditions[1:]:
        hit = Call("and", (hit, c))
    target = replace(node.target, subscripts=tuple(subscripts))
    return replace(node, ranges=(*ranges, *node.ranges), target=target, value=Call("where", (hit, node.value, Const(1))))


# ---------------------------------------------------------------------------------------------------------------------
# Reads


def points(program: Program) -> Program:
    """Few elements of a large sum, at computed places, are summed for themselves."""
    body = list(statements(program.body))
    counts = Counter(s.target.tensor for s in body)
    sums: dict[str, Statement] = {}
    taken = {*counts, *program.inputs}
    result: list[Statement] = []
    for s in body:
        added: list[Statement] = []
        made: dict[Expr, Access] = {}
        value = _replaced(s, s.value, sums, taken, added, made)
        result += [*added, replace(s, value=value)]
        if s.op == "+=" and s.reduced and counts[s.target.tensor] == 1 and all(isinstance(i, Index) for i in s.target.subscripts):
            sums[s.target.tensor] = s
    return replace(program, body=tuple(result))


def _replaced(
    s: Statement, e: Expr, sums: Mapping[str, Statement], taken: set[str], added: list[Statement], made: dict[Expr, Access]
) -> Expr:
    e = rebuild(e, lambda x: _replaced(s, x, sums, taken, added, made))
    if not (isinstance(e, Access) and e.tensor in sums) or all(isinstance(i, Index) for i in e.subscripts):
        return e
    if any(isinstance(i, Pad | Clamp) for i in e.subscripts):
        return e
    definition = sums[e.tensor]
    size, mine = extents(definition), extents(s)
    free = free_indices(e)
    everything = math.prod(size[i] for i in free_indices(definition.target))
    if math.prod(mine[i] for i in free) * _FEWER > everything:
        return e
    if e in made:
        return made[e]
    fresh: dict[str, str] = {}
    used = {*mine}
    for i in definition.reduced:
        fresh[i] = fresh_name(i, used)
        used.add(fresh[i])
    to: dict[str, Expr] = {i.name: x for i, x in zip(definition.target.subscripts, e.subscripts, strict=True) if isinstance(i, Index)}
    to.update({i: Index(name) for i, name in fresh.items()})
    name = fresh_name(f"{e.tensor}.at", taken)
    taken.add(name)
    target = Access(name, tuple(Index(i) for i in free))
    ranges = [Range(i, Const(0), Const(mine[i])) for i in free] + [Range(fresh[i], Const(0), Const(size[i])) for i in definition.reduced]
    added.append(Statement(tuple(ranges), target, "+=", substitute(definition.value, to), s.span))
    made[e] = target
    return target


# ---------------------------------------------------------------------------------------------------------------------
# Writes


def one_hot(program: Program) -> Program:
    """A tensor that is filled and then added to at one computed place per element of the loops is one elementwise formula.

    It applies where every loop index is a subscript of its own, so that no element gets two terms of one statement.
    """
    body = list(statements(program.body))
    groups: dict[str, list[int]] = {}
    for n, s in enumerate(body):
        groups.setdefault(s.target.tensor, []).append(n)
    dropped: set[int] = set()
    changed: dict[int, Statement] = {}
    for name, places in groups.items():
        first, *later = (body[n] for n in places)
        if not later or name in program.results or not _is_fill(first) or any(not _is_pick(s) for s in later):
            continue
        indices = [i.name for i in first.target.subscripts if isinstance(i, Index)]
        value = first.value
        for s in later:
            value = Call("add", (value, _picked(s, indices)))
        changed[places[-1]] = replace(first, value=simplify_expr(value))
        dropped |= set(places[:-1])
    return replace(program, body=tuple(changed.get(n, s) for n, s in enumerate(body) if n not in dropped))


def _is_fill(s: Statement) -> bool:
    names = [i.name for i in s.target.subscripts if isinstance(i, Index)]
    return s.op == "=" and isinstance(s.value, Const) and len({*names}) == len(s.target.subscripts)


def _is_pick(s: Statement) -> bool:
    """Every loop index stands alone in one place, and some other place is computed."""
    plain = [i.name for i in s.target.subscripts if isinstance(i, Index)]
    computed = len(plain) < len(s.target.subscripts)
    return s.op == "+=" and computed and sorted(plain) == sorted(s.indices) and not any(isinstance(i, Clamp) for i in s.target.subscripts)


def _picked(s: Statement, indices: list[str]) -> Expr:
    """What `s` adds to the element at `indices`."""
    own = {i.name: Index(place) for i, place in zip(s.target.subscripts, indices, strict=True) if isinstance(i, Index)}
    moved: dict[str, Expr] = dict(own)
    hit: Expr | None = None
    for subscript, place in zip(s.target.subscripts, indices, strict=True):
        if isinstance(subscript, Index):
            continue
        inner = subscript.value if isinstance(subscript, Pad) else subscript
        same = Call("eq", (Index(place), substitute(inner, moved)))
        hit = same if hit is None else Call("and", (hit, same))
    for r in s.ranges:  # the statement's loops may be shorter than the dimension
        inside = Call("lt", (own[r.index], r.hi if r.hi is not None else Const(0)))
        hit = inside if hit is None else Call("and", (hit, inside))
    assert hit is not None
    return Call("where", (hit, substitute(s.value, moved), Const(0)))
