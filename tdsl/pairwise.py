"""A sum over a product of many factors as sums over products of two, in an order that somebody chose.

for i, j, k, l:  Y[i,l] += A[i,j] * B[j,k] * C[k,l]
-->
for j, k, l:  Y.c1[j,l] += B[j,k] * C[k,l]
for i, j, l:  Y[i,l] += A[i,j] * Y.c1[j,l]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias

from tdsl.expand import expand
from tdsl.extents import Sizes, settled, symbolic_ranges
from tdsl.ir import Access, Expr, Index, Loop, Program, Statement, free_indices, fresh_name, statements
from tdsl.simplify import factors, product

Operand: TypeAlias = tuple[frozenset[str], list[Expr]]  # the indices that some factors vary along, and these
Path: TypeAlias = tuple[
    tuple[int, ...], ...
]  # opt_einsum's: at each step the positions of what is taken out of the list; the result goes to its end
Orders: TypeAlias = tuple[tuple[int, Path], ...]  # by the position of a statement in the expanded program


def groups(terms: Sequence[Expr]) -> list[Operand]:
    """Factors by the indices they vary along; a group whose indices are among another's joins it (a prologue of that operand)."""
    by_set: dict[frozenset[str], list[Expr]] = {}
    for term in terms:
        by_set.setdefault(frozenset(free_indices(term)), []).append(term)
    maximal = [key for key in by_set if not any(key < other for other in by_set)]
    return [(key, [t for other, ts in by_set.items() if _home(other, maximal) == key for t in ts]) for key in maximal]


def _home(key: frozenset[str], maximal: list[frozenset[str]]) -> frozenset[str]:
    return min((m for m in maximal if key <= m), key=len)


def pairwise(s: Statement, operands: Sequence[Operand], path: Path, taken: set[str]) -> list[Statement]:
    """The statements of an order. operands: the groups of the factors of `s`. taken: names that intermediates may not have; theirs join."""
    output = frozenset(free_indices(s.target))
    pending = [(key, product(terms)) for key, terms in operands]
    out: list[Statement] = []
    for step, positions in enumerate(path):
        chosen = [pending.pop(p) for p in sorted(positions, reverse=True)]
        value = product([f for _, e in reversed(chosen) for f in factors(e)])
        if step == len(path) - 1:
            out.append(replace(s, value=value, ranges=tuple(r for r in s.ranges if r.index in {*output, *free_indices(value)})))
            break
        used = frozenset().union(*(key for key, _ in chosen))
        kept = tuple(i for i in s.indices if i in used and (i in output or any(i in key for key, _ in pending)))
        name = fresh_name(f"{s.target.tensor}.c1", taken)
        taken.add(name)
        target = Access(name, tuple(Index(i) for i in kept))
        op = "=" if set(kept) == used else "+="
        out.append(Statement(tuple(r for r in s.ranges if r.index in used), target, op, value, s.span))
        pending.append((frozenset(kept), target))
    return out


def in_order(program: Program, orders: Orders) -> Program:
    """`program`, expanded, with the products of some statements made pair by pair."""
    if not orders:
        return program
    program = expand(program)
    paths = dict(orders)
    sizes = Sizes(program)
    taken = {*program.inputs, *(s.target.tensor for s in statements(program.body))}
    body: list[Statement | Loop] = []
    for n, node in enumerate(program.body):
        if isinstance(node, Statement) and n in paths:
            ranges = symbolic_ranges(node, sizes)
            for part in pairwise(node, groups(factors(node.value)), paths[n], taken):
                body.append(settled(part, ranges, sizes))
                sizes.note(body[-1])
        else:
            body.append(node)
            sizes.note(node)
    return replace(program, body=tuple(body))
