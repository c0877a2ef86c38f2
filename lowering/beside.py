"""Kernels that walk the same elements for different results become one, where a core's cache is what they would share.

    g[c] += X[n,c] * Y[n,c]     and     b[c] += Y[n,c]     -->     one kernel that reads Y once

On a CPU a kernel has as many accumulators as it likes; on a GPU each costs registers, so there the planner's own joins stand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from lowering.contraction import accesses
from lowering.cpp_schedule import only_sums
from lowering.join import rename
from lowering.kernel_shape import kernel_shape
from lowering.plan import KernelPlan, Plan
from lowering.statement import plain, tensor_bytes
from tdsl.ir import Access, Expr, Index, Statement, children, fresh_name, reads

# Elements of a tensor from which reading it once rather than twice pays.
SHARED = 1 << 12


def beside(plan: Plan, allowed: Sequence[bool]) -> Plan:
    """`plan` with kernels joined that share what they read and do not wait for each other. allowed: per kernel, whether it may be."""
    kernels = list(plan.kernels)
    may = {id(k): a for k, a in zip(kernels, allowed, strict=True)}
    while (found := _pair(kernels, may, plan)) is not None:
        m, n, joined = found
        may[id(joined)] = True
        kernels[m] = joined
        del kernels[n]
        kernels = _in_order(kernels, joined)
    return replace(plan, kernels=tuple(kernels))


def _pair(kernels: Sequence[KernelPlan], may: Mapping[int, bool], plan: Plan) -> tuple[int, int, KernelPlan] | None:
    """The first two kernels that can be one, and that one."""
    before = _before(kernels)
    for n, kernel in enumerate(kernels):
        for m in range(n):
            if not (may[id(kernel)] and may[id(kernels[m])]) or m in before[n]:
                continue
            joined = _joined(kernels[m], kernel, plan.shapes, plan.dtypes)
            if joined is not None:
                return m, n, joined
    return None


def _before(kernels: Sequence[KernelPlan]) -> list[set[int]]:
    """For each kernel all that must run before it."""
    found: list[set[int]] = []
    for n, k in enumerate(kernels):
        mine: set[int] = set()
        for m in range(n):
            if k.waits_for(kernels[m]):
                mine |= {m} | found[m]
        found.append(mine)
    return found


def _in_order(kernels: Sequence[KernelPlan], joined: KernelPlan) -> list[KernelPlan]:
    """The kernels, after one of them has taken in a later one: those that this one waits for go before it."""
    place = next(n for n, k in enumerate(kernels) if k is joined)
    needed: list[KernelPlan] = []
    for k in reversed(kernels[place + 1 :]):
        if any({*k.writes} & {*x.reads} for x in (joined, *needed)):
            needed.insert(0, k)
    rest = [k for k in kernels[place + 1 :] if not any(k is x for x in needed)]
    return [*kernels[:place], *needed, joined, *rest]


def _joined(a: KernelPlan, b: KernelPlan, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str]) -> KernelPlan | None:
    """Both kernels in one, on the index names of `a`; None where they walk different elements or depend on each other."""
    if b.waits_for(a) or any(not plain(s.target) for s in (*a.statements, *b.statements)):
        return None
    if {s.target.tensor for s in a.statements} & {s.target.tensor for s in b.statements}:
        return None
    if not any(math.prod(shapes[t]) >= SHARED for t in {*a.reads} & {*b.reads}):
        return None
    to = _names(a, b, shapes)
    if to is None:
        return None
    statements = (*a.statements, *(rename(s, to) for s in b.statements))
    shape = kernel_shape(statements)
    if shape is None or {*shape.grid} != {*a.grid} or (shape.stream and not only_sums(statements)) or shape.repeat:
        return None
    read, writes = tuple(dict.fromkeys((*a.reads, *b.reads))), (*a.writes, *b.writes)
    moved = sum(tensor_bytes(shapes[t], dtypes[t]) for t in (*read, *writes))
    extents = {**a.extents, **{to[i]: n for i, n in b.extents.items()}}
    return replace(
        a,
        statements=statements,
        grid=shape.grid,
        stores=(*a.stores, *b.stores),
        reads=read,
        writes=writes,
        flops=a.flops + b.flops,
        bytes=moved,
        extents=extents,
        stream=shape.stream,
        whole=shape.whole,
    )


def _names(a: KernelPlan, b: KernelPlan, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str] | None:
    """The indices of `b` -> those of `a` under which both read a large tensor at the same places, with the same grid."""
    theirs = _large(a.statements, shapes)
    for mine in _large(b.statements, shapes):
        for other in theirs:
            to = _matched(mine, other)
            if to is None or any(a.extents[y] != b.extents[x] for x, y in to.items()) or {to.get(i) for i in b.grid} != {*a.grid}:
                continue
            taken = {*a.extents, *to.values()}
            for i in b.extents:
                if i not in to:
                    to[i] = fresh_name(i, taken)
                    taken.add(to[i])
            return to
    return None


def _large(statements: Sequence[Statement], shapes: Mapping[str, tuple[int, ...]]) -> list[Access]:
    read = {e for s in statements for e in reads(s)}
    return [e for e in dict.fromkeys(accesses(statements)) if e in read and math.prod(shapes.get(e.tensor, ())) >= SHARED]


def _matched(mine: Access, other: Access) -> dict[str, str] | None:
    """The renaming that makes one access the other."""
    if mine.tensor != other.tensor:
        return None
    to: dict[str, str] = {}

    def match(x: Expr, y: Expr) -> bool:
        if isinstance(x, Index) and isinstance(y, Index):
            return to.setdefault(x.name, y.name) == y.name
        if type(x) is not type(y):
            return False
        xs, ys = children(x), children(y)
        if len(xs) != len(ys) or (not xs and x != y) or getattr(x, "op", None) != getattr(y, "op", None):
            return False
        return getattr(x, "tensor", None) == getattr(y, "tensor", None) and all(match(p, q) for p, q in zip(xs, ys, strict=True))

    same = all(match(x, y) for x, y in zip(mine.subscripts, other.subscripts, strict=True))
    return to if same and len({*to.values()}) == len(to) else None
