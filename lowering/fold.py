"""Sums down the columns of what another kernel walks row by row are collected on the way.

    g.part[p,c] += X[p*C+r,c] * Y[p*C+r,c]        for p:  for r:  n = p*C+r:  g.part[p,c] += X[n,c] * Y[n,c]
    Z[n,c] = f(X[n,c], Y[n,c])              -->                              Z[n,c] = f(X[n,c], Y[n,c])

This is what backward passes of layers with parameters look like. Each program walks a chunk of rows; a tensor's dimension n is
seen as two dimensions p and r. On a GPU that are few programs, whose partial results are small beside the rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lowering.contraction import accesses, contraction
from lowering.cpp_schedule import only_sums
from lowering.plan import KernelPlan, Plan
from lowering.recut import Recut, chunk, recut
from lowering.statement import plain, tensor_bytes
from lowering.summed import summed_together
from tdsl.ir import Access, Call, Const, Expr, Index, Range, Statement, free_indices, fresh_name, rebuild, substitute

# Elements of a tensor from which reading it once rather than twice pays.
SHARED = 1 << 14
# Elements of a row that one program holds.
ROW = 1 << 13
# Of a GPU: programs of each multiprocessor that walk rows, the elements of which they hold more than one where rows are shorter,
# and rows that a program walks at least.
PROGRAMS, PROGRAM_ROW, LEAST = 2, 1 << 12, 8


@dataclass(frozen=True, slots=True)
class Chunks:
    """How a kernel sees some tensors: (tensor, dimension) that stand for two, the inner one of `length` elements."""

    dims: Mapping[str, int]
    length: int

    def shape(self, tensor: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """A tensor's shape with the dimension as two."""
        d = self.dims.get(tensor)
        return shape if d is None else (*shape[:d], shape[d] // self.length, self.length, *shape[d + 1 :])

    def strides(self, tensor: str, strides: tuple[int, ...]) -> tuple[int, ...]:
        """The same for its strides."""
        d = self.dims.get(tensor)
        return strides if d is None else (*strides[:d], strides[d] * self.length, strides[d], *strides[d + 1 :])


def fold_in(plan: Plan, allowed: Sequence[bool], sms: int = 0) -> tuple[Plan, dict[str, Chunks], dict[str, str]]:
    """`plan` with partial sums joined to a later kernel that reads the same rows, and how those kernels see their tensors.

    sms: of a GPU, whose sums are then cut anew: into as many parts as there are programs that walk the rows. Last: of tensors that this
    makes, what each is a part of.
    """
    may = {k.name: a for k, a in zip(plan.kernels, allowed, strict=True)}
    chunks: dict[str, Chunks] = {}
    parts: dict[str, str] = {}
    for a, b in itertools.permutations([k.name for k in plan.kernels if may[k.name]], 2):
        now = {k.name: k for k in plan.kernels}
        if a not in now or b not in now or {a, b} & {*chunks} or _linked(now[a], now[b], plan.kernels):
            continue
        cut = _for_programs(now[a], now[b], plan, sms) if sms else Recut(plan, now[a], {})
        found = _joined(cut.kernel, now[b], cut.plan) if cut else None
        if cut is None or found is None:
            continue
        parts |= cut.parts
        changed, (joined, chunks[a]) = cut.plan, found
        stored = {*joined.stores, *(t for k in changed.kernels if k.name not in (a, b) for t in k.stores)}
        changed = replace(changed, memory={t: size for t, size in changed.memory.items() if t in stored})
        first = next(k.name for k in changed.kernels if k.name in (a, b))
        kernels = [joined if k.name == first else k for k in changed.kernels if k.name == first or k.name not in (a, b)]
        plan = summed_together(replace(changed, kernels=tuple(kernels)), {*cut.kernel.writes})
    return plan, chunks, parts


def _for_programs(a: KernelPlan, b: KernelPlan, plan: Plan, sms: int) -> Recut | None:
    """`plan` with the sums `a` in as many parts as there are programs that walk the rows of `b`.

    PROGRAMS of a multiprocessor, more where rows are so short that a warp or two hold one: a row is on its way while others are summed.
    Their partial results are read and written once each, so that a program has LEAST rows, or they would outweigh what is saved.
    """
    grid = [b.extents[i] for i in b.grid]
    if len(grid) != 1 or contraction(b.statements[-1]) is not None:
        return None
    row = math.prod(n for i, n in b.extents.items() if i not in b.grid)
    most = min(sms * max(PROGRAMS, min(8 * PROGRAMS, PROGRAM_ROW // max(1, row))), grid[0] // LEAST)
    parts = next((n for n in range(most, max(most // 2, sms // 2), -1) if grid[0] % n == 0), 0)
    return recut(plan, a, parts) if parts else None


def _linked(a: KernelPlan, b: KernelPlan, kernels: Sequence[KernelPlan]) -> bool:
    """Whether rows `b` wait for sums `a`, or the later one for something between them. Sums may wait for what rows make: of each row
    it is made before that row is summed."""
    m, n = sorted(next(i for i, k in enumerate(kernels) if k is x) for x in (a, b))
    later = kernels[n]
    others = [k for k in kernels[m:n] if not (k is b and later is a)]
    return any(later.waits_for(k) for k in others)


def _joined(a: KernelPlan, b: KernelPlan, plan: Plan) -> tuple[KernelPlan, Chunks] | None:
    """`a`, partial sums, in the rows of `b`."""
    if not only_sums(a.statements) or b.stream or any(s.op != "+=" or len(s.reduced) != 1 or not plain(s.target) for s in a.statements):
        return None
    if any(not plain(s.target) or contraction(s) is not None for s in b.statements):
        return None
    for mine in dict.fromkeys(accesses(a.statements)):
        for other in dict.fromkeys(accesses(b.statements)):
            if mine.tensor != other.tensor or mine.tensor not in a.reads or math.prod(plan.shapes[mine.tensor]) < SHARED:
                continue
            found = _matched(mine, other, a, b)
            if found is not None and (result := _built(a, b, *found, plan)) is not None:
                return result
    return None


def _matched(mine: Access, other: Access, a: KernelPlan, b: KernelPlan) -> tuple[str, str, str, int, dict[str, str]] | None:
    """(p, r, n, C) for which one access is at p*C+r where the other is at n, and the names of b's other indices in a."""
    split: tuple[str, str, str, int] | None = None
    to: dict[str, str] = {}
    for x, y in zip(mine.subscripts, other.subscripts, strict=True):
        if isinstance(x, Index) and isinstance(y, Index):
            if to.setdefault(y.name, x.name) != x.name:
                return None
        elif isinstance(y, Index) and split is None and (form := chunk(x)) is not None:
            split = (form[0], form[1], y.name, form[2])
        else:
            return None
    if split is None or split[2] in to or len({*to.values()}) < len(to):
        return None
    p, r, n, length = split
    if p not in a.grid or r in a.grid or n not in b.grid or a.extents[r] != length or a.extents[p] * length != b.extents[n]:
        return None
    if any(a.extents[i] != b.extents[j] for j, i in to.items()) or any(s.reduced != (r,) for s in a.statements):
        return None
    return p, r, n, length, to


def _built(
    a: KernelPlan, b: KernelPlan, p: str, r: str, n: str, length: int, to: dict[str, str], plan: Plan
) -> tuple[KernelPlan, Chunks] | None:
    taken = {*a.extents, *to.values()}
    for i in b.extents:
        if i not in to and i != n:
            to[i] = fresh_name(i, taken)
            taken.add(to[i])
    row = math.prod(size for i, size in {**a.extents, **{to[i]: x for i, x in b.extents.items() if i != n}}.items() if i not in (p, r))
    if row > ROW:
        return None
    dims: dict[str, int] = {}
    statements = []
    whole = Call("add", (Call("mul", (Index(p), Const(length))), Index(r)))
    for s in (*b.statements, *a.statements):
        if s in b.statements:
            names: dict[str, Expr] = {**{i: Index(x) for i, x in to.items()}, n: whole}
            s = _renamed(s, names, n, (p, r), (a.extents[p], length))
        changed = _split(s, p, r, dims)
        if changed is None:
            return None
        statements.append(changed)
    local = {s.target.tensor for s in statements}
    for access in accesses(statements):  # one view for all accesses of a tensor
        rank = len(plan.shapes[access.tensor]) + (access.tensor in dims)
        if len(access.subscripts) != rank:
            return None
    if {*b.reads} & local:
        return None
    later = {t for k in plan.kernels if k is not a and k is not b for t in k.reads} | {*plan.program.results}
    read = tuple(t for t in dict.fromkeys((*a.reads, *b.reads)) if t not in local)
    writes = (*a.writes, *(t for t in b.writes if t in later))
    moved = sum(tensor_bytes(plan.shapes[t], plan.dtypes[t]) for t in (*read, *writes))
    extents = {**a.extents, **{to[i]: size for i, size in b.extents.items() if i != n}}
    rest = tuple(i for i in extents if i not in (p, r))
    joined = replace(
        a, statements=tuple(statements), grid=(p,), stores=writes, reads=read, writes=writes, flops=a.flops + b.flops, bytes=moved,
        extents=extents, stream=(r,), whole=rest,
    )  # fmt: skip
    return joined, Chunks(dims, length)


def _renamed(s: Statement, names: Mapping[str, Expr], n: str, parts: tuple[str, str], sizes: tuple[int, int]) -> Statement:
    ranges: list[Range] = []
    for x in s.ranges:
        if x.index == n:
            ranges += [Range(i, Const(0), Const(size)) for i, size in zip(parts, sizes, strict=True)]
        else:
            new = names[x.index]
            assert isinstance(new, Index)
            ranges.append(replace(x, index=new.name))
    target = substitute(s.target, names)
    assert isinstance(target, Access)
    # Every element is written once: what `+=` onto nothing means.
    return replace(s, ranges=tuple(ranges), target=target, value=substitute(s.value, names), op=s.op if s.reduced else "=")


def _split(s: Statement, p: str, r: str, dims: dict[str, int]) -> Statement | None:
    """`s` with every subscript p*C+r as two; None where p or r stand otherwise than so, or than in a target's first place."""
    failed = False

    def visit(e: Expr) -> Expr:
        nonlocal failed
        if isinstance(e, Index) and e.name in (p, r):
            failed = True
        if not isinstance(e, Access):
            return rebuild(e, visit)
        subscripts: list[Expr] = []
        for d, x in enumerate(e.subscripts):
            if chunk(x) is not None and chunk(x)[:2] == (p, r):  # type: ignore[index]
                failed |= dims.setdefault(e.tensor, d) != d
                subscripts += [Index(p), Index(r)]
            else:
                failed |= bool({p, r} & {*free_indices(x)}) and not (e is s.target and x == Index(p))
                subscripts.append(x)
        return replace(e, subscripts=tuple(subscripts))

    target = visit(s.target)
    value = visit(s.value)
    assert isinstance(target, Access)
    return None if failed else replace(s, target=target, value=value)
