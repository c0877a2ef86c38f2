"""Kernels that sum up the parts of several sums become one: each would be over before the next has started.

    for c, p:  g[c] += g.part[p,c]     and     for k, q:  b[k] += b.part[q,k]
    -->
    for c, p:  g[c] += g.part[p,c];  b[c] += b.part[p,c]
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from lowering.join import rename
from lowering.plan import KernelPlan, Plan, kernel_of
from lowering.statement import plain
from tdsl.ir import Access, Index


def summed_together(plan: Plan, parts: Collection[str]) -> Plan:
    """`plan` with the kernels that only sum up some of `parts`, over as many for as many results, as one, where the first of them runs."""
    found: list[KernelPlan] = []
    for k in plan.kernels:
        sums = [n for n, other in enumerate(found) if only_parts(other, parts) and not any(map(k.waits_for, found[n:]))] if only_parts(k, parts) else []
        joins = ((n, _joined(found[n], k, plan)) for n in sums)
        n, joined = next(((n, j) for n, j in joins if j is not None), (len(found), k))
        found[n : n + 1] = [joined]
    return replace(plan, kernels=tuple(found))


def only_parts(kernel: KernelPlan, parts: Collection[str]) -> bool:
    """Whether a kernel only sums up parts."""
    return {*kernel.reads} <= {*parts} and all(plain(s.target) and isinstance(s.value, Access) and s.reduced for s in kernel.statements)


def _joined(a: KernelPlan, b: KernelPlan, plan: Plan) -> KernelPlan | None:
    """Both kernels on the index names of `a`; None where they walk other sizes, or one writes into what the other does."""
    theirs = a.statements[0]
    statements = []
    for mine in b.statements:
        x, y = mine.value, theirs.value
        assert isinstance(x, Access) and isinstance(y, Access)
        to = {i.name: j.name for i, j in zip(x.subscripts, y.subscripts, strict=False) if isinstance(i, Index) and isinstance(j, Index)}
        sizes = [(b.extents.get(i), a.extents.get(j)) for i, j in to.items()]
        if len(to) < max(len(x.subscripts), len(y.subscripts)) or any(m != n for m, n in sizes) or mine.op != theirs.op:
            return None
        statements.append(rename(mine, to))
    if {*a.writes} & {*b.writes} or any(s.target.subscripts != theirs.target.subscripts or s.reduced != theirs.reduced for s in statements):
        return None
    return kernel_of(a.name, [*a.statements, *statements], {*a.stores, *b.stores}, plan.shapes, plan.dtypes)
