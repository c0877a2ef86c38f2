"""Ranges that depend on other indices or on tensor values -> constant ranges and masks.

    for b, j in 0:len[b]:        Y[b] += X[off[b]+j]     -->   for b, j in 0:8:  Y[b] += where(j < len[b], X[pad(off[b]+j)], 0)
    for b, j in off[b]:off[b+1]: Y[b] += X[j]            -->   for b, j in 0:8:  Y[b] += where(j < off[b+1]-off[b], X[pad(j+off[b])], 0)
    for i, j in 0:i+1:           Y[i] += A[i,j] * x[j]   -->   for i, j in 0:5:  Y[i] += where(j < i+1, A[i,j], 0) * where(j < i+1, x[j], 0)

The constant extent is the greatest value of the range: by interval arithmetic, by the size of a tensor that the index
subscripts (every access lies inside), or as the caller found it in the tensors. Terms beyond the range are the identity of
their reduction; every factor is masked by itself, so that a product of two tensors stays a contraction.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from lowering.contraction import contraction
from tdsl.affine import Affine, Bound, enclosure, linear
from tdsl.dtypes import dtype_of
from tdsl.errors import Unsupported
from tdsl.ir import (
    REDUCTION_OF,
    Access,
    Call,
    Clamp,
    Const,
    Expr,
    Index,
    Pad,
    Range,
    Statement,
    free_indices,
    fresh_name,
    reads,
    rebuild,
    substitute,
)
from tdsl.ops import DTYPES, REDUCTIONS
from tdsl.simplify import factors, product
from tdsl.traced import whole

Limits = Mapping[Expr, int]  # hi - lo of a range, in canonical form -> the most that it is


def extent_of(r: Range) -> Expr:
    """hi - lo in canonical form: the key of a range in Limits."""
    assert r.lo is not None and r.hi is not None
    return (linear(r.hi) - linear(r.lo)).expr()


def constant(s: Statement) -> bool:
    """Whether all ranges are numbers."""
    return all(isinstance(r.lo, Const) and isinstance(r.hi, Const) for r in s.ranges)


def masked(
    s: Statement,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, str],
    *,
    steps: Mapping[str, tuple[int, int]],
    limits: Limits,
    alone: bool,
    taken: set[str],
) -> list[Statement]:
    """Statements with constant ranges that do what `s` does.

    steps: the ranges of ordered indices around it. limits: what the values of tensors are known to allow. alone: whether no other
    statement writes the target. Raises Unsupported for a range that nothing bounds.
    """
    return [s] if constant(s) else _Masker(s, shapes, dtypes, steps, limits, alone, taken).run()


class _Masker:
    def __init__(
        self,
        s: Statement,
        shapes: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, str],
        steps: Mapping[str, tuple[int, int]],
        limits: Limits,
        alone: bool,
        taken: set[str],
    ):
        self.s = s
        self.shapes = shapes
        self.dtypes = dtypes
        self.limits = limits
        self.alone = alone
        self.taken = taken
        self.known: dict[str, tuple[Bound, Bound]] = dict(steps)
        self.moved: dict[str, Expr] = {}  # index -> what stands in its place
        self.conditions: list[tuple[str, Expr]] = []  # (the index that it bounds, the condition)

    def run(self) -> list[Statement]:
        ranges = tuple(self._range(r) for r in self.s.ranges)
        target = substitute(self.s.target, self.moved)
        assert isinstance(target, Access)
        s = replace(self.s, ranges=ranges, target=target, value=substitute(self.s.value, self.moved))
        reduced = set(self.s.reduced)
        inner = [c for _, c in self.conditions if reduced & set(free_indices(c))]
        outer = [c for _, c in self.conditions if not reduced & set(free_indices(c))]
        loose = {i for i, _ in self.conditions}
        target = replace(target, subscripts=tuple(self._safe(e, loose) for e in target.subscripts))
        s = replace(s, target=target, value=self._safe(s.value, loose))
        if inner:
            places = tuple(self._inside(s.target.tensor, d, e, loose) for d, e in enumerate(s.target.subscripts))
            s = replace(s, target=replace(s.target, subscripts=places), value=self._terms(s, inner))
        return self._written(s, outer, loose) if outer else [s]

    # -- ranges -------------------------------------------------------------------------------------------------------

    def _range(self, r: Range) -> Range:
        assert r.lo is not None and r.hi is not None
        lo, hi = (linear(substitute(e, self.moved)) for e in (r.lo, r.hi))
        least, most = enclosure(lo, self.known)[0], enclosure(hi, self.known)[1]
        itself = Affine(0, ((Index(r.index), 1),))
        count = self._count(r)
        if math.isinf(least):  # the start is read from a tensor: count from there
            most = self._finite(r, min(enclosure(hi - lo, self.known)[1], count))
            self.moved[r.index] = (itself + lo).expr()
            self.conditions.append((r.index, Call("lt", (Index(r.index), (hi - lo).expr()))))
            least = 0
        else:
            most = self._finite(r, min(most, least + count))
            if lo.terms:
                self.conditions.append((r.index, Call("ge", (Index(r.index), lo.expr()))))
            if hi.terms:
                self.conditions.append((r.index, Call("lt", (Index(r.index), hi.expr()))))
        first, last = whole(least), max(whole(least), whole(most))
        self.known[r.index] = first, last
        return replace(r, lo=Const(first), hi=Const(last))

    def _finite(self, r: Range, most: float) -> float:
        if math.isinf(most):
            raise Unsupported(
                f"the range of {r.index} depends on the values of a tensor, and no size bounds it (lowering)",
                span=r.span or self.s.span,
                help="subscript a tensor by it, or run it with the tensors themselves",
            )
        return most

    def _count(self, r: Range) -> float:
        """The most values that an index can take, by the sizes of what it subscripts and by what the caller knows."""
        most: float = self.limits.get(extent_of(r), math.inf)
        for access in (*reads(self.s), self.s.target):
            for d, e in enumerate(access.subscripts):
                form = None if isinstance(e, Pad | Clamp) else linear(e)
                if form is not None and form.coefficient(r.index) and r.index not in form.opaque:
                    most = min(most, self.shapes[access.tensor][d])
        return most

    # -- terms --------------------------------------------------------------------------------------------------------

    def _terms(self, s: Statement, conditions: Sequence[Expr]) -> Expr:
        """The value, with the identity of the reduction where a condition fails.

        In a contraction the condition goes to the factors that vary along all of its indices: as one `where` it would hide the product.
        """
        condition = _all(conditions)
        along = set(free_indices(condition))
        parts = [[f] for f in factors(s.value) if along <= set(free_indices(f))]
        if contraction(s) is None or not parts:
            return Call("where", (condition, s.value, Const(0) if s.op == "+=" else self._identity(s)))
        rest: list[Expr] = []
        for f in (f for f in factors(s.value) if not along <= set(free_indices(f))):
            home = next((p for p in parts if set(free_indices(f)) <= set(free_indices(p[0]))), None)
            (rest if home is None else home).append(f)  # one that may be infinite, where the sum has no terms
        return product([*(Call("where", (condition, product(p), Const(0))) for p in parts), *rest])

    def _identity(self, s: Statement) -> Const:
        ranks = {name: len(shape) for name, shape in self.shapes.items()}
        dtype = dtype_of(s.value, self.dtypes, ranks)[0]
        value = REDUCTIONS[REDUCTION_OF[s.op]].identity
        if DTYPES[dtype].kind == "float":
            return Const(value)
        if math.isinf(value):
            bits = DTYPES[dtype].bits
            low, high = (0, 2**bits - 1) if dtype.startswith("u") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            return Const(value > 0) if dtype == "bool" else Const(high if value > 0 else low)
        return Const(whole(value))

    def _safe(self, e: Expr, loose: Collection[str]) -> Expr:
        """`e` with reads that may lie outside, beyond the range of a loose index, padded."""
        if isinstance(e, Access):
            return replace(e, subscripts=tuple(self._inside(e.tensor, d, self._safe(s, loose), loose) for d, s in enumerate(e.subscripts)))
        return rebuild(e, lambda x: self._safe(x, loose))

    def _inside(self, tensor: str, d: int, e: Expr, loose: Collection[str]) -> Expr:
        if isinstance(e, Pad | Clamp) or not set(free_indices(e)) & set(loose):
            return e
        least, most = enclosure(linear(e), self.known)
        return e if least >= 0 and most < self.shapes[tensor][d] else Pad(e)

    # -- targets ------------------------------------------------------------------------------------------------------

    def _written(self, s: Statement, conditions: Sequence[Expr], loose: Collection[str]) -> list[Statement]:
        """The statement whose target is subscripted by loose indices."""
        condition = _all(conditions)
        names = [e.name for e in s.target.subscripts if isinstance(e, Index)]
        plain = len({*names}) == len(s.target.subscripts)
        if s.op == "=" and not (self.alone and plain):  # what is beyond the range keeps its older value
            d = next(n for n, e in enumerate(s.target.subscripts) if set(free_indices(e)) & set(loose))
            e = s.target.subscripts[d]
            dropped = Pad(Call("where", (condition, e.value if isinstance(e, Pad | Clamp) else e, Const(-1))))
            subscripts = (*s.target.subscripts[:d], dropped, *s.target.subscripts[d + 1 :])
            return [replace(s, target=replace(s.target, subscripts=subscripts))]
        identity = Const(0) if s.op == "=" else self._identity(s)
        subscripts = tuple(self._inside(s.target.tensor, d, e, loose) for d, e in enumerate(s.target.subscripts))
        target = replace(s.target, subscripts=subscripts)
        if not s.reduced or not plain:
            return [replace(s, target=target, value=Call("where", (condition, s.value, identity)))]
        name = fresh_name(f"{s.target.tensor}.all", self.taken)
        self.taken.add(name)
        whole = replace(s.target, tensor=name)
        left = tuple(r for r in s.ranges if r.index not in s.reduced)
        value = Call("where", (condition, whole, identity))
        return [replace(s, target=whole), replace(s, ranges=left, target=target, value=value)]


def _all(conditions: Sequence[Expr]) -> Expr:
    result = conditions[0]
    for c in conditions[1:]:
        result = Call("and", (result, c))
    return result


