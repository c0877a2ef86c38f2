"""Kernels around matrix products of a library: the products alone, and what stands around them as kernels of their own.

    S[i,j] += A[i,k] * B[k,j];  Y[i,j] = gelu(S[i,j] + b[j])      -->  S by the library;  Y by one loop over S
    dX[n,i] += f(Z[n,o]) * W[o,i];  dW[o,i] += f(Z[n,o]) * X[n,i]  -->  T[n,o] = f(Z[n,o]) once;  two products of the library

On a CPU a library's product cannot take in what comes before or after it, and a pass over what lies in the last-level cache is
cheap. Intermediates that would not fit in memory comfortably stay where the planner put them: such kernels run in blocks.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from lowering.contraction import Contraction, contraction
from lowering.kernel_shape import grid_of, kernel_shape
from lowering.plan import KernelPlan, Plan, kernel_of
from lowering.statement import extents, plain, tensor_bytes
from tdsl.dtypes import dtype_of
from tdsl.ir import Access, Expr, Index, Range, Statement, free_indices, fresh_name, reads, substitute
from tdsl.ops import DTYPES
from tdsl.simplify import product

# Below this a matrix product wastes a library's blocking, and what its operands are made of costs more than it.
LIBRARY_MIN = 16
# Bytes of the largest intermediate that is made for this.
LARGEST = 1 << 27


def is_library(s: Statement, dtypes: Mapping[str, str], alone: bool) -> Contraction | None:
    """The contraction that a statement is, if a library's product is the way to run it. alone: in a kernel of its own."""
    found = contraction(s)
    if found is None or DTYPES[dtypes[s.target.tensor]].kind != "float":
        return None
    size = extents(s)
    sizes = [math.prod(size[i] for i in group) for group in (found.m, found.n, found.k)]
    accesses = alone and all(len(side) == 1 and isinstance(side[0], Access) for side in (found.lhs, found.rhs))
    return found if accesses or min(sizes) >= LIBRARY_MIN else None


@dataclass(slots=True)
class _Split:
    """parts: statements of each kernel so far. made: formulas in memory, by their text under neutral index names."""

    plan: Plan
    weak: frozenset[str]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    parts: list[list[Statement]] = field(default_factory=list)
    written: set[str] = field(default_factory=set)
    made: dict[tuple[Expr, tuple[int, ...]], str] = field(default_factory=dict)


def split_products(
    plan: Plan, dtypes: Mapping[str, str], weak: frozenset[str], fixed: Collection[str] = ()
) -> tuple[Plan, dict[str, tuple[int, ...]], dict[str, str]]:
    """`plan` with its products alone, and the shapes and dtypes of the tensors that this made. weak: inputs that are numbers.
    fixed: names of kernels that stay as they are."""
    split = _Split(plan, weak, dict(plan.shapes), dict(dtypes))
    left: dict[int, KernelPlan] = {}
    for kernel in plan.kernels:
        if kernel.name in fixed:
            left[len(split.parts)] = kernel
            split.parts.append(list(kernel.statements))
            split.written |= {*kernel.stores}
            continue
        before = len(split.parts)
        statements = _apart(kernel, split)
        split.parts += [list(kernel.statements)] if statements is None else _grouped(statements, split)
        split.written |= {s.target.tensor for part in split.parts[before:] for s in part}
    outside = {*plan.program.inputs, *plan.program.results}
    stored = {t for k in plan.kernels for t in k.stores}
    readers = [{a.tensor for s in part for a in reads(s)} for part in split.parts]
    kernels = []
    for n, part in enumerate(split.parts):
        later = {t for other in readers[n + 1 :] for t in other}
        if n in left:
            kernels.append(replace(left[n], name=f"{plan.kernels[0].name.rpartition('_')[0]}_{n}"))
            continue
        mine = {s.target.tensor for s in part}
        needed = {t for t in mine if t in later and not _again(t, split.parts[n + 1 :], readers[n + 1 :])} | (mine & stored)
        name = plan.kernels[0].name.rpartition("_")[0]
        kernels.append(kernel_of(f"{name}_{n}", part, needed, split.shapes, {**plan.dtypes, **split.dtypes}))
    new = {t for t in split.shapes if t not in plan.shapes}
    memory = {
        t: tensor_bytes(split.shapes[t], plan.dtypes.get(t, split.dtypes[t]))
        for k in kernels
        for t in k.writes
        if t not in outside
    }
    changed = replace(
        plan, kernels=tuple(kernels), memory=memory, shapes=split.shapes, dtypes={**plan.dtypes, **{t: split.dtypes[t] for t in new}}
    )
    return changed, {t: split.shapes[t] for t in new}, {t: split.dtypes[t] for t in new}


def _again(tensor: str, parts: Sequence[Sequence[Statement]], readers: Sequence[set[str]]) -> bool:
    """Whether every later kernel that reads a tensor makes it itself."""
    return all(tensor not in read or any(s.target.tensor == tensor for s in part) for part, read in zip(parts, readers, strict=True))


def _apart(kernel: KernelPlan, split: _Split) -> list[Statement] | None:
    """The statements of a kernel with products of plain tensors; None where it stays as it is."""
    products = [is_library(s, split.dtypes, len(kernel.statements) == 1) for s in kernel.statements]
    if not any(products) or any(not plain(s.target) for s in kernel.statements):
        return None
    if len(products) == 1 and products[0] is not None and all(isinstance(e, Access) for e in (*products[0].lhs, *products[0].rhs)):
        return None
    mine = [s.target.tensor for s in kernel.statements]
    if len({*mine}) < len(mine) or any(_bytes(s, split) > LARGEST for s in kernel.statements if s.target.tensor not in kernel.stores):
        return None
    statements: list[Statement] = []
    for s, found in zip(kernel.statements, products, strict=True):
        if s.target.tensor in split.written and s.target.tensor not in kernel.stores:
            continue  # an earlier kernel has put it in memory
        if found is None:
            statements.append(s)
            continue
        changed = _of_tensors(s, found, split)
        if changed is None:
            return None
        statements += changed
    return statements


def _bytes(s: Statement, split: _Split) -> int:
    return math.prod(split.shapes[s.target.tensor]) * 4


def _of_tensors(s: Statement, found: Contraction, split: _Split) -> list[Statement] | None:
    """A product after the statements that make its operands."""
    before: list[Statement] = []
    outer = list(found.outer)
    sides = []
    for terms in (found.lhs, found.rhs):
        if len(terms) == 1 and isinstance(terms[0], Access):
            sides.append(terms[0])
            continue
        free = {i for e in terms for i in free_indices(e)}
        moved = [e for e in outer if {*free_indices(e)} <= free]
        outer = [e for e in outer if e not in moved]
        operand = _operand(s, product([*moved, *terms]), split, before)
        if operand is None:
            return None
        sides.append(operand)
    return [*before, replace(s, value=product([*outer, *sides]))]


def _operand(s: Statement, value: Expr, split: _Split, before: list[Statement]) -> Access | None:
    """One side of a product as a tensor: one that is there, or a new one."""
    size = extents(s)
    indices = tuple(i for i in s.indices if i in free_indices(value))
    shape = tuple(size[i] for i in indices)
    if math.prod(shape) * 4 > LARGEST:
        return None
    neutral: dict[str, Expr] = {i: Index(f"%{n}") for n, i in enumerate(indices)}
    key = (substitute(value, neutral), shape)
    access = Access(split.made.get(key, ""), tuple(Index(i) for i in indices))
    if key in split.made:
        return access
    name = fresh_name(f"{s.target.tensor}.operand", {*split.shapes})
    ranks = {t: -1 if t in split.weak else len(dims) for t, dims in split.shapes.items()}
    split.made[key] = name
    split.shapes[name] = shape
    split.dtypes[name] = dtype_of(value, split.dtypes, ranks)[0]
    access = replace(access, tensor=name)
    before.append(Statement(tuple(Range(r.index, r.lo, r.hi) for r in s.ranges if r.index in indices), access, "=", value, s.span))
    return access


def _grouped(statements: Sequence[Statement], split: _Split) -> list[list[Statement]]:
    """Products alone; of the others, neighbours in one kernel where they can share one."""
    parts: list[list[Statement]] = []
    closed = True
    for s in statements:
        if is_library(s, split.dtypes, False) is not None:
            parts.append([s])
            closed = True
        elif closed or kernel_shape([*parts[-1], s]) is None or {*grid_of([*parts[-1], s])} != {*grid_of(parts[-1])}:
            parts.append([s])
            closed = False
        else:
            parts[-1].append(s)
    return parts
