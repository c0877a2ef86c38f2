"""What a statement is to the machine: a matrix product or not, how many operations, which accesses."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lowering.normalize import cost
from lowering.statement import extents
from tdsl.ir import Access, Expr, Statement, expressions, free_indices, walk
from tdsl.pairwise import groups
from tdsl.simplify import factors
from tdsl.traced import estimates


@dataclass(frozen=True, slots=True)
class Contraction:
    """A sum of products in the form lhs[batch, m, k] * rhs[batch, n, k]; `outer` factors vary along no summed index."""

    batch: tuple[str, ...]
    m: tuple[str, ...]
    n: tuple[str, ...]
    k: tuple[str, ...]
    lhs: tuple[Expr, ...]
    rhs: tuple[Expr, ...]
    outer: tuple[Expr, ...]


def contraction(s: Statement) -> Contraction | None:
    """The contraction that a statement is, or None: another reduction, one operand, or indices that no matrix product has."""
    reduced = set(s.reduced)
    if s.op != "+=" or not reduced:
        return None
    terms = factors(s.value)
    outer = tuple(t for t in terms if not reduced & set(free_indices(t)))
    operands = groups([t for t in terms if reduced & set(free_indices(t))])
    if len(operands) != 2:
        return None
    (left, lhs), (right, rhs) = operands
    k = tuple(i for i in s.indices if i in left & right & reduced)
    m = tuple(i for i in s.indices if i in left - right and i not in reduced)
    n = tuple(i for i in s.indices if i in right - left and i not in reduced)
    batch = tuple(i for i in s.indices if i in left & right and i not in reduced)
    if not (k and m and n) or reduced - set(k):
        return None
    return Contraction(batch, m, n, k, tuple(lhs), tuple(rhs), outer)


@estimates()
def statement_flops(s: Statement) -> int:
    """Floating-point operations of a statement, a multiply-add being two."""
    points = math.prod(extents(s).values())
    found = contraction(s)
    if found is not None:
        inner = sum(math.prod(extents(s)[i] for i in free_indices(e)) * cost(e) for e in (*found.lhs, *found.rhs))
        return int(2 * points + inner)
    return int(points * (cost(s.value) + bool(s.reduced)))


def accesses(part: Sequence[Statement]) -> Iterator[Access]:
    """Every access of some statements, targets included."""
    for s in part:
        for top in expressions(s):
            yield from (e for e in walk(top) if isinstance(e, Access))
