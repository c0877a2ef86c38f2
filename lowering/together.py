"""Kernels of matrix products over the same batch become one on a CPU: each intermediate is made once, and never reaches memory.

    for h, i, j:  S = ..; dP = ..;  for h, i:  dQ[h,i,d] += f(S, dP) * K;  for h, j:  dK[h,j,d] += f(S, dP) * Q;  dV[h,j,e] += ..
    -->
    for h:  for i in tiles:  S[i,:], dP[i,:] in a cache;  dQ[h,i,:] = ..;  dK[h,:,:] += ..;  dV[h,:,:] += ..

A GPU makes S and dP once per result, since programs add to one accumulator only through memory; a core of a CPU walks a whole batch
element by itself. It takes memory for one tile and for the results of one element.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from lowering.plan import KernelPlan, Plan
from lowering.products import is_library
from lowering.statement import extents, ordered, plain, tensor_bytes
from tdsl.ir import Access, Expr, Index, Statement, free_indices, reads, walk

# Batch elements from which the cores of a server have work.
BATCHES = 8


def together(plan: Plan, dtypes: Mapping[str, str]) -> Plan:
    """`plan` with kernels joined that make, or read, the same products as intermediates."""
    kernels = list(plan.kernels)
    for first in plan.kernels:
        group = _group(first, kernels, plan, dtypes)
        joined = _joined(group, kernels, plan, dtypes) if len(group) > 1 else None
        if joined is None or not _may_move(group, kernels):
            continue
        last = max(n for n, k in enumerate(kernels) if any(k is g for g in group))
        kernels[last] = joined
        kernels = [k for k in kernels if not any(k is g for g in group)]
    left = {t for k in kernels for t in k.writes}
    return replace(plan, kernels=tuple(kernels), memory={t: n for t, n in plan.memory.items() if t in left})


def _products(kernel: KernelPlan, plan: Plan, dtypes: Mapping[str, str]) -> set[str]:
    """The intermediates that a kernel makes and that are products."""
    results = plan.program.results
    return {s.target.tensor for s in kernel.statements if s.target.tensor not in results and is_library(s, dtypes, False) is not None}


def _group(first: KernelPlan, kernels: Sequence[KernelPlan], plan: Plan, dtypes: Mapping[str, str]) -> list[KernelPlan]:
    """The kernels that make or read the intermediate products that `first` makes or reads, those that they make or read, and so on."""
    every = {t for k in kernels for t in _products(k, plan, dtypes)}
    used = {id(k): _products(k, plan, dtypes) | ({*k.reads} & every) for k in kernels}
    group: list[KernelPlan] = []
    more = [k for k in kernels if k is first]
    while more:
        group += more
        shared = {t for k in group for t in used[id(k)]}
        more = [k for k in kernels if not any(k is g for g in group) and shared & used[id(k)]]
    return [k for k in kernels if any(k is g for g in group)]


def _may_move(group: Sequence[KernelPlan], kernels: Sequence[KernelPlan]) -> bool:
    """Whether all of a group can run where its last kernel does: nothing else between them waits for it."""
    places = [n for n, k in enumerate(kernels) if any(k is g for g in group)]
    writes = {t for g in group for t in g.writes}
    between = [k for n, k in enumerate(kernels) if places[0] < n < places[-1] and n not in places]
    return not any(writes & {*k.reads, *k.writes} for k in between)


def _joined(group: Sequence[KernelPlan], kernels: Sequence[KernelPlan], plan: Plan, dtypes: Mapping[str, str]) -> KernelPlan | None:
    """One kernel for a group, its grid the batch that all share; None where they do not fit on one set of index names."""
    made: dict[str, Statement] = {}
    for s in (s for k in group for s in k.statements):
        if made.setdefault(s.target.tensor, s) != s or not plain(s.target):
            return None
    body = ordered(list(made.values()))
    grid = tuple(i for i in group[0].grid if all(i in free_indices(s.target) for s in body))
    size = {i: n for s in body for i, n in extents(s).items()}
    if any(extents(s)[i] != size[i] for s in body for i in s.indices) or math.prod(size[i] for i in grid) < BATCHES:
        return None
    inside = set(made) - {t for k in group for t in k.writes if t in plan.program.results or _read_elsewhere(t, group, kernels)}
    accesses = [a for s in body for a in reads(s) if a.tensor in made]
    if any(a.subscripts != made[a.tensor].target.subscripts for a in accesses):
        return None
    stream = next((i for i in size if i not in grid and _streams(i, body, made)), None)
    if stream is None or any(not _indexed(a, grid) for a in _accesses(body)):
        return None
    stores = tuple(s.target.tensor for s in body if s.target.tensor not in inside)
    read = tuple(dict.fromkeys(a.tensor for s in body for a in reads(s) if a.tensor not in made))
    moved = sum(tensor_bytes(plan.shapes[t], dtypes[t]) for t in (*read, *stores))
    flops = sum(k.flops for k in group)
    whole = tuple(i for i in size if i not in grid and i != stream)
    return replace(
        group[-1], statements=tuple(body), grid=grid, stores=stores, reads=read, writes=stores, flops=flops, bytes=moved, extents=size,
        stream=(stream,), whole=whole, repeat=(),
    )  # fmt: skip


def _read_elsewhere(tensor: str, group: Sequence[KernelPlan], kernels: Sequence[KernelPlan]) -> bool:
    return any(tensor in k.reads for k in kernels if not any(k is g for g in group))


def _streams(index: str, body: Sequence[Statement], made: Mapping[str, Statement]) -> bool:
    """Whether all statements can be walked tile by tile of an index: nothing inside waits for a sum over it."""
    if not any(index in s.reduced for s in body):
        return False
    over = {s.target.tensor for s in body if index in s.reduced}
    if any(a.tensor in over for s in body for a in reads(s)):
        return False
    return all(s.op == "+=" and s.reduced == (index,) for s in body if index in s.reduced)


def _accesses(body: Sequence[Statement]) -> list[Access]:
    return [a for s in body for e in (s.value, s.target) for a in walk(e) if isinstance(a, Access)]


def _indexed(a: Access, grid: Sequence[str]) -> bool:
    """Whether the indices of the grid stand alone in an access."""
    plain_: list[Expr] = [e for e in a.subscripts if isinstance(e, Index)]
    return all(Index(i) in plain_ or i not in free_indices(a) for i in grid)
