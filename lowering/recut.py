"""Other parts of a sum that is split already: as many as programs that walk rows would have.

    for p in 0:4, c, r in 0:2048:  g.part[p,c] += X[p*2048+r,c];  for c, p in 0:4:  g[c] += g.part[p,c]
    -->
    for p in 0:256, c, r in 0:32:  g.part[p,c] += X[p*32+r,c];    for c, p in 0:256:  g[c] += g.part[p,c]

Sums that are in one part are cut as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lowering.contraction import accesses
from lowering.plan import KernelPlan, Plan, kernel_of
from lowering.split import split_statement
from lowering.statement import plain, tensor_bytes
from tdsl.ir import Call, Const, Expr, Index, Statement, rebuild
from tdsl.ops import DTYPES


def chunk(e: Expr) -> tuple[str, str, int] | None:
    """(p, r, C) of p*C+r."""
    match e:
        case Call(op="add", args=(Call(op="mul", args=(Index(name=p), Const(value=int() as length))), Index(name=r))):
            return p, r, length
    return None


@dataclass(frozen=True, slots=True)
class Recut:
    """plan: with the sums of one of its kernels cut anew; kernel: the one that makes the parts. parts: of new tensors, what each is a part of."""

    plan: Plan
    kernel: KernelPlan
    parts: Mapping[str, str]


def recut(plan: Plan, kernel: KernelPlan, parts: int) -> Recut | None:
    """`plan` with the sums of `kernel` in so many parts; None where these are not even, or nothing else than sums."""
    forms = {f for a in accesses(kernel.statements) for e in a.subscripts if (f := chunk(e)) is not None}
    if not forms:
        return _cut(plan, kernel, parts)
    if len(forms) != 1:
        return None
    p, r, length = next(iter(forms))
    rows = kernel.extents[p] * length
    if rows % parts or any(s.target.subscripts[:1] != (Index(p),) or s.reduced != (r,) for s in kernel.statements):
        return None
    made = {s.target.tensor for s in kernel.statements}
    cut = [_recut(s, p, r, (length, rows // parts), (parts, rows // parts)) for s in kernel.statements]
    shapes = {**plan.shapes, **{t: (parts, *plan.shapes[t][1:]) for t in made}}
    kernels = []
    for k in plan.kernels:
        body = cut if k is kernel else [_merged(s, made, parts) for s in k.statements]
        if None in body:
            return None
        kept = [s for s in body if s is not None]
        kernels.append(kernel_of(k.name, kept, {*k.stores}, shapes, plan.dtypes) if k is kernel or made & {*k.reads} else k)
    memory = {t: tensor_bytes(shapes[t], plan.dtypes[t]) if t in made else size for t, size in plan.memory.items()}
    mine = next(k for k in kernels if k.name == kernel.name)
    return Recut(replace(plan, kernels=tuple(kernels), shapes=shapes, memory=memory), mine, {})


def _cut(plan: Plan, kernel: KernelPlan, parts: int) -> Recut | None:
    """The same for sums that are in one part, by a kernel more that sums the parts up."""
    updated = plan.updated
    taken = {*plan.shapes}
    first: list[Statement] = []
    second: list[Statement] = []
    of: dict[str, str] = {}
    shapes = dict(plan.shapes)
    for s in kernel.statements:
        name = s.target.tensor
        along = s.reduced[0] if len(s.reduced) == 1 else ""
        if kernel.extents.get(along, 0) % parts or not along or not plain(s.target) or name in updated or name not in kernel.stores:
            return None
        made, merge = split_statement(s, parts, taken)
        first.append(made)
        second.append(merge)
        of[made.target.tensor] = name
        shapes[made.target.tensor] = (parts, *shapes[name])
    if len({s.reduced for s in kernel.statements}) != 1:
        return None
    dtypes = {**plan.dtypes, **{t: DTYPES[plan.dtypes[name]].compute for t, name in of.items()}}
    base = kernel.name.rpartition("_")[0]
    last = max(int(k.name.rpartition("_")[2]) for k in plan.kernels)
    mine = kernel_of(kernel.name, first, {*of}, shapes, dtypes)
    sums = kernel_of(f"{base}_{last + 1}", second, {*kernel.stores}, shapes, dtypes)
    kernels = [x for k in plan.kernels for x in ((mine, sums) if k is kernel else (k,))]
    memory = {**plan.memory, **{t: tensor_bytes(shapes[t], dtypes[t]) for t in of}}
    return Recut(replace(plan, kernels=tuple(kernels), shapes=shapes, dtypes=dtypes, memory=memory), mine, of)


def _recut(s: Statement, p: str, r: str, lengths: tuple[int, int], sizes: tuple[int, int]) -> Statement | None:
    """`s` with p*C+r for another C; None where p or r stand otherwise."""
    old, new = lengths
    failed = False

    def visit(e: Expr) -> Expr:
        nonlocal failed
        if chunk(e) == (p, r, old):
            return Call("add", (Call("mul", (Index(p), Const(new))), Index(r)))
        failed |= isinstance(e, Index) and e.name in (p, r)
        return rebuild(e, visit)

    value = visit(s.value)
    ranges = tuple(replace(x, hi=Const(sizes[x.index == r])) if x.index in (p, r) else x for x in s.ranges)
    return None if failed else replace(s, ranges=ranges, value=value)


def _merged(s: Statement, made: set[str], parts: int) -> Statement | None:
    """`s` where it sums parts up, of which there are so many now; None where something else is done with them."""
    read = [a for a in accesses([s]) if a.tensor in made]
    if not read:
        return s
    index = read[0].subscripts[0]
    if s.value != read[0] or not isinstance(index, Index) or s.reduced != (index.name,):
        return None
    return replace(s, ranges=tuple(replace(x, hi=Const(parts)) if x.index == index.name else x for x in s.ranges))
