"""Indices that always stand side by side become one, where some reduction walks both.

    for a, t, c:  w.grad[c] += X[a,t,c] * G[a,t,c]                -->   for a_t, c:  w.grad[c] += X[a_t,c] * G[a_t,c]
    for a, t, c:  Y[a,t,c] = X[a,t,c] * w[c]                            for a_t, c:  Y[a_t,c] = X[a_t,c] * w[c]

A tensor's dimensions become one where one step of the outer is all of the inner, in every statement at once; a sum over a batch and a
sequence is then one long sum, which can be split, walked and tiled as such. No element moves: kernels see the same memory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from lowering.contraction import accesses
from tdsl.ir import Access, Const, Expr, Index, Range, Statement, expressions, fresh_name, rebuild, walk
from tdsl.traced import whole

Shapes = Mapping[str, tuple[int, ...]]
# A tensor's dimension, the one after which goes into it.
Site = tuple[str, int]
Pair = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Collapsed:
    """Statements with fewer indices, and how they see their tensors; strides: of those that had some."""

    body: tuple[Statement, ...]
    shapes: Shapes
    strides: Shapes


def collapse(body: Sequence[Statement], shapes: Shapes, strides: Shapes, fixed: Collection[str] = ()) -> Collapsed:
    """`body` with indices collapsed. shapes: of all tensors; strides: of those that the caller has laid out, others are contiguous.
    fixed: tensors that stay as they are."""
    found = Collapsed(tuple(body), shapes, strides)
    while (sites := _useful(found, fixed)) is not None:
        found = _applied(found, sites)
    return found


def _useful(now: Collapsed, fixed: Collection[str]) -> frozenset[Site] | None:
    """The dimensions that can collapse together, of which some reduction walks both."""
    sites = {site for site in _sites(now) if site[0] not in fixed}
    while True:
        pairs = [(s, pair, found) for s in now.body for pair, found in _pairs(s).items()]
        bad = {site for s, pair, found in pairs if not (found <= sites and _clean(s, pair, found, now.shapes)) for site in found}
        if not bad & sites:
            break
        sites -= bad
    linked = [(found, pair[0] in s.reduced) for s, pair, found in pairs if found <= sites]
    for start, reduced in linked:
        group, size = {*start}, 0
        while reduced and len(group) > size:
            size = len(group)
            group |= {site for found, _ in linked if found & group for site in found}
        if reduced and len({name for name, _ in group}) == len(group):
            return frozenset(group)
    return None


def _sites(now: Collapsed) -> Iterator[Site]:
    """The dimensions that are one piece of memory with the next ones, and by two plain indices in every access."""
    every: dict[str, list[Access]] = {}
    for a in accesses(now.body):
        every.setdefault(a.tensor, []).append(a)
    for name, found in ((n, x) for n, x in every.items() if n in now.shapes):
        shape, steps = now.shapes[name], now.strides.get(name)
        for d in range(len(shape) - 1):
            plain = all(isinstance(a.subscripts[d], Index) and isinstance(a.subscripts[d + 1], Index) for a in found)
            if plain and shape[d] > 1 and shape[d + 1] > 1 and (not steps or steps[d] == steps[d + 1] * shape[d + 1]):
                yield name, d


def _pairs(s: Statement) -> dict[Pair, frozenset[Site]]:
    """Indices that stand side by side somewhere in a statement, and where."""
    found: dict[Pair, set[Site]] = {}
    for a in accesses([s]):
        for d, (x, y) in enumerate(zip(a.subscripts, a.subscripts[1:], strict=False)):
            if isinstance(x, Index) and isinstance(y, Index):
                found.setdefault((x.name, y.name), set()).add((a.tensor, d))
    return {pair: frozenset(sites) for pair, sites in found.items()}


def _clean(s: Statement, pair: Pair, sites: frozenset[Site], shapes: Shapes) -> bool:
    """Whether both indices walk whole dimensions, and stand nowhere else in the statement."""
    i, j = pair
    ranges = {r.index: r for r in s.ranges}
    if (i in s.reduced) != (j in s.reduced):
        return False
    for name, d in sites:
        for index, extent in zip(pair, shapes[name][d : d + 2], strict=True):
            r = ranges[index]
            if r.order or r.lo != Const(0) or not isinstance(r.hi, Const) or whole(r.hi.value) != extent:
                return False
    together = sum((x, y) == (Index(i), Index(j)) for a in accesses([s]) for x, y in zip(a.subscripts, a.subscripts[1:], strict=False))
    alone = [e.name for top in expressions(s) for e in walk(top) if isinstance(e, Index) and e.name in pair]
    return alone.count(i) == alone.count(j) == together


def _applied(now: Collapsed, sites: frozenset[Site]) -> Collapsed:
    """Every statement and tensor with these dimensions as one."""
    dims = dict(sites)
    shapes = {n: _merged(x, dims[n], x[dims[n]] * x[dims[n] + 1]) if n in dims else x for n, x in now.shapes.items()}
    strides = {n: _merged(x, dims[n], x[dims[n] + 1]) if n in dims and x else x for n, x in now.strides.items()}
    return Collapsed(tuple(_statement(s, dims) for s in now.body), shapes, strides)


def _merged(numbers: tuple[int, ...], d: int, n: int) -> tuple[int, ...]:
    return (*numbers[:d], n, *numbers[d + 2 :])


def _statement(s: Statement, dims: Mapping[str, int]) -> Statement:
    taken = {*s.indices}
    names: dict[Pair, str] = {}

    def visit(e: Expr) -> Expr:
        if not isinstance(e, Access) or e.tensor not in dims:
            return rebuild(e, visit)
        d = dims[e.tensor]
        x, y = e.subscripts[d : d + 2]
        assert isinstance(x, Index) and isinstance(y, Index)
        if (x.name, y.name) not in names:
            names[x.name, y.name] = fresh_name(f"{x.name}_{y.name}", taken)
            taken.add(names[x.name, y.name])
        before, after = (tuple(visit(x) for x in part) for part in (e.subscripts[:d], e.subscripts[d + 2 :]))
        return replace(e, subscripts=(*before, Index(names[x.name, y.name]), *after))

    target, value = visit(s.target), visit(s.value)
    assert isinstance(target, Access)
    size = {r.index: r.hi for r in s.ranges}
    inner = {j for _, j in names}
    outer = {i: (j, name) for (i, j), name in names.items()}
    ranges: list[Range] = []
    for r in s.ranges:
        if r.index in outer:
            j, name = outer[r.index]
            lengths = [e.value for e in (r.hi, size[j]) if isinstance(e, Const)]
            ranges.append(replace(r, index=name, hi=Const(whole(lengths[0]) * whole(lengths[1]))))
        elif r.index not in inner:
            ranges.append(r)
    return replace(s, ranges=tuple(ranges), target=target, value=value)
