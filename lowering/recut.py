"""Other parts of a sum that is split already: as many as programs that walk rows would have.

    for p in 0:4, c, r in 0:2048:  g.part[p,c] += X[p*2048+r,c];  for c, p in 0:4:  g[c] += g.part[p,c]
    -->
    for p in 0:256, c, r in 0:32:  g.part[p,c] += X[p*32+r,c];    for c, p in 0:256:  g[c] += g.part[p,c]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lowering.contraction import accesses
from lowering.plan import KernelPlan, Plan, kernel_of
from lowering.statement import tensor_bytes
from tdsl.ir import Access, Call, Const, Expr, Index, Range, Statement, rebuild


def chunk(e: Expr) -> tuple[str, str, int] | None:
    """(p, r, C) of p*C+r."""
    match e:
        case Call(op="add", args=(Call(op="mul", args=(Index(name=p), Const(value=int() as length))), Index(name=r))):
            return p, r, length
    return None


def recut(plan: Plan, kernel: KernelPlan, parts: int) -> tuple[Plan, KernelPlan] | None:
    """`plan` with the sums of `kernel` in so many parts, and that kernel; None where its parts are not even or nothing else."""
    forms = {f for a in accesses(kernel.statements) for e in a.subscripts if (f := chunk(e)) is not None}
    if len(forms) != 1:
        return None
    p, r, length = next(iter(forms))
    rows = kernel.extents[p] * length
    if rows % parts or any(s.target.subscripts[:1] != (Index(p),) or s.reduced != (r,) for s in kernel.statements):
        return None
    made = {s.target.tensor for s in kernel.statements}
    cut = [_recut(s, p, r, (length, rows // parts), (parts, rows // parts)) for s in kernel.statements]
    if any(s is None for s in cut):
        return None
    shapes = {**plan.shapes, **{t: (parts, *plan.shapes[t][1:]) for t in made}}
    kernels = []
    mine = kernel
    for k in plan.kernels:
        body = [s for s in cut if s is not None] if k is kernel else _merged(k.statements, made, parts) if made & {*k.reads} else list(k.statements)
        if body is None:
            return None
        changed = k if body == list(k.statements) else kernel_of(k.name, body, {*k.stores}, shapes, plan.dtypes)
        kernels.append(changed)
        mine = changed if k is kernel else mine
    memory = {t: tensor_bytes(shapes[t], plan.dtypes[t]) if t in made else size for t, size in plan.memory.items()}
    return replace(plan, kernels=tuple(kernels), shapes=shapes, memory=memory), mine


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


def _merged(statements: Sequence[Statement], made: set[str], parts: int) -> list[Statement] | None:
    """What sums the parts up; None where something else is done with them."""
    found = []
    for s in statements:
        read = [a for a in accesses([s]) if a.tensor in made]
        along = {a.subscripts[0] for a in read}
        if not read:
            found.append(s)
            continue
        index = next(iter(along))
        if len(along) > 1 or not isinstance(index, Index) or s.reduced != (index.name,) or not isinstance(s.value, Access):
            return None
        ranges = tuple(Range(x.index, x.lo, Const(parts)) if x.index == index.name else x for x in s.ranges)
        found.append(replace(s, ranges=ranges))
    return found
