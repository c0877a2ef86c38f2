"""Putting the statements of two kernels into one, on one set of index names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from lowering.contraction import contraction
from lowering.kernel_shape import RESIDENT_ROW, grid_of, kernel_shape
from lowering.statement import extents, plain
from lowering.stream import passes
from tdsl.ir import Access, Expr, Index, Statement, free_indices, fresh_name, reads, substitute

# Programs below which a kernel with long rows leaves most of a chip idle.
FEW_PROGRAMS = 128
# Points of a row of matrix products that a program of a GPU has done in about the time that another launch takes (5 us): 16 rows of
# so many multiply-adds are 4 MFLOP.
LAUNCH_ROW = 1 << 17
# Elements of a stream that are worth a program of their own, and of a sum that is made at each of them.
PART, SHORT_SUM = 256, 256


def join(
    producer: list[Statement], consumer: list[Statement], kept: set[str], recomputed: frozenset[str], splits: bool
) -> list[Statement] | None:
    """The statements of both on one set of names, or None where they cannot share a kernel or should not. splits: whether a long
    stream of few programs gets parts of its own later."""
    written = {s.target.tensor for s in producer}
    if any(not plain(s.target) for s in producer) or any(s.target.tensor in kept and not plain(s.target) for s in consumer if s.reduced):
        return None
    shared = written & {s.target.tensor for s in consumer}
    if shared - recomputed:
        return None
    to = unify(producer, consumer, written)
    if to is None:
        return None
    renamed = [rename(s, to) for s in producer]
    mine = {s.target.tensor: s for s in consumer}
    if any(t.target.tensor in shared and t.value != mine[t.target.tensor].value for t in renamed):
        return None
    first = [s for s in consumer if s.target.tensor in recomputed]
    joined = [*renamed, *(s for s in first if s.target.tensor not in shared), *(s for s in consumer if s.target.tensor not in recomputed)]
    grids = (set(grid_of(renamed)), set(grid_of(consumer)))
    size = {i: n for s in joined for i, n in extents(s).items()}
    programs = [math.prod(size[i] for i in grid) for grid in (*grids, grid_of(joined))]
    rows = max(math.prod(n for i, n in extents(s).items() if i not in grid_of(joined)) for s in joined)
    if set(grid_of(joined)) not in grids:
        return None  # together they would have fewer programs than either
    short = LAUNCH_ROW if splits and any(contraction(s) for s in joined) else RESIDENT_ROW
    few = rows > short and programs[-1] < min(FEW_PROGRAMS, max(programs))
    if few and not (splits and programs[-1] * _parts(joined, kept) >= min(FEW_PROGRAMS, max(programs))):
        return None
    return joined if kernel_shape(joined) is not None else None


def _parts(joined: list[Statement], kept: set[str]) -> int:
    """Into how many parts the stream of a kernel can be split, which makes as many programs of one."""
    shape = kernel_shape(joined)
    stream = set(shape.stream) if shape else set()
    if not stream or any(s.target.tensor in kept and stream & set(free_indices(s.target)) for s in joined):
        return 1
    size = {i: n for s in joined for i, n in extents(s).items()}
    for s in joined:  # a long sum at each element of the stream is a kernel of its own
        if s.reduced and not stream & set(s.reduced) and contraction(s) is None and math.prod(size[i] for i in s.reduced) > SHORT_SUM:
            return 1
    return max(1, max(size[i] for i in stream) // PART) if len(passes(joined, tuple(stream))) == 1 else 1


def unify(producer: list[Statement], consumer: list[Statement], written: set[str], merge: bool = True) -> dict[str, str] | None:
    """The producer's indices -> the consumer's, so that the elements handed over are the same."""
    targets = {s.target.tensor: s.target for s in producer}
    to: dict[str, str] = {}
    theirs_of = {s.target.tensor: s for s in consumer}
    for s in producer:  # what both recompute is one statement
        other = theirs_of.get(s.target.tensor)
        if other is not None:
            for a, b in zip((*free_indices(s.target), *s.reduced), (*free_indices(other.target), *other.reduced), strict=True):
                if to.setdefault(a, b) != b:
                    return None
    for s in consumer:
        for access in reads(s):
            if access.tensor not in written:
                continue
            if not plain(access):
                return None
            for mine, theirs in zip(targets[access.tensor].subscripts, access.subscripts, strict=True):
                assert isinstance(mine, Index) and isinstance(theirs, Index)
                if to.setdefault(mine.name, theirs.name) != theirs.name:
                    return None
    if not to:
        to = _same_reads(producer, consumer)
    if len({*to.values()}) < len(to):
        return None
    theirs_size = {i: n for s in consumer for i, n in extents(s).items()}
    mine_size = {i: n for s in producer for i, n in extents(s).items()}
    if any(theirs_size[b] != mine_size[a] for a, b in to.items()):
        return None  # the consumer reads a part of it
    taken = {*theirs_size, *to.values()}
    for index in (i for i in mine_size if i not in to):
        same = _same_walk(index, mine_size[index], producer, consumer, to, theirs_size) if merge else None
        to[index] = same or fresh_name(index, taken)
        taken.add(to[index])
    return to


def _same_reads(producer: list[Statement], consumer: list[Statement]) -> dict[str, str]:
    """Names under which the first tensor that both read, at plain subscripts, is read at the same elements."""
    theirs = {a.tensor: a for s in reversed(consumer) for a in reads(s) if plain(a)}
    for s in producer:
        for a in sorted((a for a in reads(s) if plain(a)), key=lambda a: -len(a.subscripts)):
            if a.tensor in theirs and a.subscripts:
                pairs = zip(a.subscripts, theirs[a.tensor].subscripts, strict=True)
                return {x.name: y.name for x, y in pairs if isinstance(x, Index) and isinstance(y, Index)}
    return {}


def _same_walk(
    index: str, size: int, producer: list[Statement], consumer: list[Statement], to: dict[str, str], sizes: Mapping[str, int]
) -> str | None:
    """An index of the consumer under whose name an access of the producer is one of the consumer's: then the tile is loaded once."""
    theirs = {a for s in consumer for a in reads(s)}
    for other in (i for i, n in sizes.items() if n == size and i not in to.values()):
        renaming: dict[str, Expr] = {a: Index(b) for a, b in {**to, index: other}.items()}
        if any(index in free_indices(a) and substitute(a, renaming) in theirs for s in producer for a in reads(s)):
            return other
    return None


def rename(s: Statement, to: Mapping[str, str]) -> Statement:
    """A statement with its loop indices renamed."""
    names: dict[str, Expr] = {a: Index(b) for a, b in to.items()}
    target = substitute(s.target, names)
    assert isinstance(target, Access)
    return replace(
        s, ranges=tuple(replace(r, index=to.get(r.index, r.index)) for r in s.ranges), target=target, value=substitute(s.value, names)
    )
