"""A product of sums, summed in the other order, where the inner sum is known already.

    D[i,j] += G[i,e] * V[j,e];  O[i,e] += P[i,j] * V[j,e];  t[i] += D[i,j] * P[i,j]
    -->  t[i] += G[i,e] * O[i,e]

since sum_j P[i,j] (sum_e G[i,e] V[j,e]) = sum_e G[i,e] (sum_j P[i,j] V[j,e]). In the gradient of attention this is the row
dot that FlashAttention computes beforehand (Dao et al., arXiv:2205.14135, appendix B); nothing here knows of attention.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from tdsl.expand import witness
from tdsl.ir import Access, Const, Expr, Index, Program, Range, Statement, free_indices, fresh_name, statements, substitute
from tdsl.simplify import factors, product


def reassociate(program: Program) -> Program:
    """`program` with sums over products regrouped wherever the regrouped inner sum is an earlier statement's."""
    written = Counter(s.target.tensor for s in statements(program.body))
    sums: dict[str, Statement] = {}
    body = []
    for s in program.body:
        if isinstance(s, Statement):
            s = _regrouped(s, sums) or s
            if _is_sum(s) and written[s.target.tensor] == 1:
                sums[s.target.tensor] = s
        body.append(s)
    return replace(program, body=tuple(body))


def _is_sum(s: Statement) -> bool:
    names = [i.name for i in s.target.subscripts if isinstance(i, Index)]
    return s.op == "+=" and bool(s.reduced) and len({*names}) == len(s.target.subscripts) and len(factors(s.value)) > 1


def _regrouped(s: Statement, sums: Mapping[str, Statement]) -> Statement | None:
    """`s` with one factor opened and the rest of the sum recognised, or None."""
    if s.op != "+=" or not s.reduced:
        return None
    terms = factors(s.value)
    for n, factor in enumerate(terms):
        if not (isinstance(factor, Access) and factor.tensor in sums and all(isinstance(i, Index) for i in factor.subscripts)):
            continue
        opened, ranges = _open(factor, sums[factor.tensor], s)
        pool = [*terms[:n], *terms[n + 1 :], *opened]
        along = set(s.reduced)
        inner = [t for t in pool if along & set(free_indices(t))]
        outer = [t for t in pool if not along & set(free_indices(t))]
        fresh = {r.index for r in ranges}
        if not any(fresh & set(free_indices(t)) for t in outer):
            continue  # nothing moved
        for name, known in sums.items():
            if name == factor.tensor:
                continue
            found = _match(known, inner, along)
            if found is not None:
                kept = tuple(r for r in s.ranges if r.index not in along)
                return replace(s, ranges=(*kept, *ranges), value=product([*outer, found]))
    return None


def _open(access: Access, definition: Statement, s: Statement) -> tuple[list[Expr], tuple[Range, ...]]:
    """The factors of a sum's terms for the elements that `access` reads, and the ranges of its own indices under fresh names."""
    to: dict[str, Expr] = {i.name: e for i, e in zip(definition.target.subscripts, access.subscripts, strict=True) if isinstance(i, Index)}
    taken = {*s.indices, *definition.indices}
    ranges = []
    for r in definition.ranges:
        if r.index not in to:
            name = r.index if r.index not in s.indices else fresh_name(r.index, taken)
            taken.add(name)
            to[r.index] = Index(name)
            size = witness(r.index, definition.value)
            known = r.lo is not None or size is None
            ranges.append(replace(r, index=name) if known else Range(name, Const(0), size))
    return [substitute(f, to) for f in factors(definition.value)], tuple(ranges)


def _match(known: Statement, terms: Sequence[Expr], along: set[str]) -> Access | None:
    """The element of `known` that the sum of the product of `terms` over `along` is, or None."""
    wanted = factors(known.value)
    if len(wanted) != len(terms) or len(known.reduced) != len(along):
        return None
    for to in renamings(list(wanted), list(terms), {}):
        images = {to.get(i) for i in known.reduced}
        if images == along and all(i.name in to for i in known.target.subscripts if isinstance(i, Index)):
            return Access(known.target.tensor, tuple(Index(to[i.name]) for i in known.target.subscripts if isinstance(i, Index)))
    return None


def renamings(wanted: list[Expr], terms: list[Expr], to: dict[str, str]) -> list[dict[str, str]]:
    """The renamings of indices under which two lists of factors are the same, in any order."""
    if not wanted:
        return [to]
    found = []
    for n, term in enumerate(terms):
        more = _renaming(wanted[0], term, to)
        if more is not None:
            found += renamings(wanted[1:], [*terms[:n], *terms[n + 1 :]], more)
    return found


def _renaming(a: Expr, b: Expr, to: dict[str, str]) -> dict[str, str] | None:
    left, right = free_indices(a), free_indices(b)
    if len(left) != len(right):
        return None
    more = dict(to)
    for i, j in zip(left, right, strict=True):
        if more.setdefault(i, j) != j:
            return None
    if len({*more.values()}) < len(more):
        return None
    renamed = substitute(a, {i: Index(j) for i, j in more.items()})
    return more if renamed == b else None
