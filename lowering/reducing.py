"""Reductions of one kernel in tile IR: accumulated lane by lane and folded once after their loop, or a product of matrices.

A sum of products whose operands have axes M, N and K becomes a `Dot`. Lanes beyond the end of an axis hold the identity.
"""

from __future__ import annotations

import math

from lowering import tile_ir as ir
from lowering.contraction import Contraction, contraction
from lowering.evaluate import Evaluator
from tdsl.dtypes import SCALAR, TENSOR, Typed, dtype_of, join
from tdsl.ir import REDUCTION_OF, Access, Expr, Statement
from tdsl.ops import DTYPES, REDUCTIONS, STORED_ONLY
from tdsl.simplify import product
from tdsl.traced import whole

_PRODUCT = "%product"  # the accumulated dot, under the name by which its epilogue reads it


def identity(reduction: str, dtype: str) -> float | int | bool:
    """The identity of a reduction in a dtype: for max and min of integers the least and greatest there are."""
    value = REDUCTIONS[reduction].identity
    d = DTYPES[dtype]
    if d.kind == "float":
        return value
    if math.isinf(value):
        low, high = (0, 2**d.bits - 1) if dtype.startswith("u") else (-(2 ** (d.bits - 1)), 2 ** (d.bits - 1) - 1)
        return value > 0 if d.kind == "bool" else high if value > 0 else low
    return bool(value) if d.kind == "bool" else whole(value)


class Reducer(Evaluator):
    """Evaluates statements that reduce."""

    def reduce(self, s: Statement) -> ir.Value:
        """The reduced value of a statement, with loops of its own where an axis that it reduces has several tiles."""
        dtype = self.memory.dtypes[s.target.tensor]
        found = contraction(s)
        if found is not None and DTYPES[dtype].kind == "float" and self._dot_axes(found):
            return self.dot(s, found)
        reduction = REDUCTION_OF[s.op]
        compute = self._accumulator(dtype)
        axes = [a for a in self.axes if any(i in s.reduced for i, _ in a.indices)]
        folded = tuple(a.name for a in axes if not a.scalar)
        loops = [a for a in axes if a.role == "loop"]
        fill = identity(reduction, dtype if DTYPES[dtype].kind == "int" else compute)
        typed = self._typed(s)
        if not loops:
            return self.fold(s, self._term(s, s.value, folded, compute, fill), folded, reduction, typed)
        target = self.tile_axes(tuple(i for i in s.indices if i not in s.reduced))
        carry = self._carry(s.target.tensor, self.sort(target | set(folded)), typed, compute, fill)
        self.enter(loops)
        term = self._term(s, s.value, folded, compute, fill)
        self._accumulate(carry, carry, term, REDUCTIONS[reduction].combine)
        self.leave(loops)
        return self.fold(s, carry, folded, reduction, typed)

    def _accumulator(self, dtype: str) -> str:
        return DTYPES[dtype].compute if dtype != "bool" else "int64"

    def _typed(self, s: Statement) -> Typed:
        return self.memory.dtypes[s.target.tensor], TENSOR if s.target.subscripts else SCALAR

    def _accumulate(self, carry: ir.Value, old: ir.Value, term: ir.Value, combine: str) -> None:
        """carry <- old combined with term."""
        total = self._new(combine, carry.axes, carry.dtype, self.typed[carry.name])
        self.scopes[-1].ops += [ir.Elementwise(total, combine, (old, term)), ir.Assign(carry, total)]

    def _carry(self, base: str, axes: tuple[str, ...], typed: Typed, dtype: str, fill: float | int | bool) -> ir.Value:
        value = self._new(base, axes, dtype, typed)
        self.scopes[-1].ops.append(ir.Full(value, fill))
        return value

    def fold(self, s: Statement, value: ir.Value, folded: tuple[str, ...], reduction: str, typed: Typed) -> ir.Value:
        """`value` reduced along some axes."""
        if not folded:
            self.typed[value.name] = typed
            return value
        axes = tuple(a for a in value.axes if a not in folded)
        result, new = self.make(("fold", reduction, value.name, folded), s.target.tensor, axes, typed, value.dtype, self.level[value.name])
        if new:
            self.emit(result, ir.Fold(result, value, reduction, folded))
        return result

    def _term(self, s: Statement, value: Expr, folded: tuple[str, ...], compute: str, fill: float | int | bool) -> ir.Value:
        """What is reduced, along every folded axis, with the identity in lanes beyond the end."""
        term = self.as_value(self.cast(self.eval(value), compute))
        missing = set(folded) - set(term.axes)
        if missing:
            zeros = self.full(identity("sum", compute), (compute, TENSOR), self.sort(set(folded)), compute)
            term = self.as_value(self.call("add", [zeros, term]) if compute != "bool" else term)
        return self._masked(term, folded, fill)

    def _masked(self, value: ir.Value, axes: tuple[str, ...], fill: float | int | bool) -> ir.Value:
        """`value` with `fill` beyond the end of the axes that are masked; nothing to do where a load left zeros there."""
        outside = tuple(a.name for a in self.axes if a.name in axes and a.masked)
        if not outside or (fill == 0 and set(outside) <= self.zero_filled.get(value.name, frozenset())):
            return value
        if fill == 0 and (factors := self._shared_factor(value, outside)) is not None:
            factor, zero = factors
            self.unmasked.add(value.name)
            return self.as_value(self.call("mul", [self._masked(factor, outside, 0), zero]))
        level = max(self.level[value.name], *(self.level_of_index(self.indices_of[a]) for a in outside))
        key = ("mask", value.name, outside, str(fill))
        result, new = self.make(key, f"{value.name}_inside", value.axes, self.typed[value.name], value.dtype, level)
        if new:
            self.emit(result, ir.Mask(result, value, outside, fill))
        return result

    def _shared_factor(self, value: ir.Value, outside: tuple[str, ...]) -> tuple[ir.Value, ir.Value] | None:
        """The factors of a product of which the second is zero outside: there it is enough that the first one is finite, and to mask that
        serves all products that have it."""
        factors = self.products.get(value.name, ())
        for factor, zero in zip(factors, reversed(factors), strict=True):
            if {*outside} <= {*factor.axes} and {*outside} <= self.zero_filled.get(zero.name, frozenset()):
                return factor, zero
        return None

    def _times(self, value: ir.Value, outer: tuple[Expr, ...], typed: Typed) -> ir.Value:
        """A finished sum times the factors that do not vary along it."""
        if not outer:
            return value
        self.scopes[-1].locals[_PRODUCT] = value
        result = self.as_value(self.cast(self.eval(product([Access(_PRODUCT), *outer])), value.dtype))
        del self.scopes[-1].locals[_PRODUCT]
        self.typed[result.name] = typed
        return result

    def _empty(self, s: Statement) -> bool:
        """Whether a statement sums nothing: then its factors, a quotient by another empty sum perhaps, count for nothing."""
        return any(self.plan.extents[i] == 0 for i in s.reduced)

    # -- products of matrices -----------------------------------------------------------------------------------------

    def _dot_axes(self, c: Contraction) -> bool:
        """Whether M, N and K are tile axes: one each, unless whole tensors are multiplied."""
        if self.exact:
            return all(not self.axis_of[i].scalar for group in (c.m, c.n, c.k) for i in group)
        # What is a number in this kernel, the part of a stream for one, is no axis of the operand that it belongs to.
        groups = [{self.axis_of[i] for i in group if not self.axis_of[i].scalar} for group in (c.m, c.n, c.k)]
        return (
            all(len(axes) == 1 and all(a.tile >= 16 for a in axes) for axes in groups)
            and len({a.name for axes in groups for a in axes}) == 3
            and all(self.axis_of[i].scalar for i in (*c.batch, *(i for i in c.k if self.axis_of[i].role == "grid")))
            and not any(self.axis_of[i].scalar for i in c.k)
        )

    def dot(self, s: Statement, c: Contraction) -> ir.Value:
        """The contraction as a `Dot`, its outer factors applied to the finished accumulator."""
        dtype = self.memory.dtypes[s.target.tensor]
        axes = [a for a in self.axes if any(i in c.k for i, _ in a.indices)]
        loops = [a for a in axes if a.role == "loop"]
        contract = tuple(a.name for a in axes)
        left, right = self._operand_type(c.lhs), self._operand_type(c.rhs)
        common = join(left, right)
        compute = DTYPES[common[0]].compute
        lanes = self.sort(self.tile_axes((*c.batch, *c.m, *c.n)))
        batch = self.sort(self.tile_axes(c.batch))
        carry = self._carry(s.target.tensor, lanes, common, compute, 0.0) if loops else None
        self.enter(loops)
        narrow = self._narrow(c, axes)
        lhs, rhs = (self._masked(self.operand(e, common, narrow), contract, 0.0) for e in (c.lhs, c.rhs))
        if carry is None:
            level = max(self.level[lhs.name], self.level[rhs.name])
            total, new = self.make(("dot", lhs.name, rhs.name), s.target.tensor, lanes, common, compute, level)
            if new:
                self.emit(total, ir.Dot(total, lhs, rhs, None, batch, contract))
        else:
            total = carry
            result = self._new(s.target.tensor, lanes, compute, common)
            self.scopes[-1].ops += [ir.Dot(result, lhs, rhs, carry, batch, contract), ir.Assign(carry, result)]
        self.leave(loops)
        typed = (dtype, TENSOR)
        if c.outer:
            return self._times(total, () if self._empty(s) else c.outer, typed)
        self.typed[total.name] = typed
        return total

    def _operand_type(self, terms: tuple[Expr, ...]) -> Typed:
        ranks = {t: len(shape) if t not in self.memory.numbers else -1 for t, shape in self.memory.shapes.items()}
        found = dtype_of(product(list(terms)), self.memory.dtypes, ranks)
        return found if DTYPES[found[0]].kind == "float" else ("float32", found[1])

    def _narrow(self, c: Contraction, axes: list[ir.Axis]) -> bool:
        """Whether both sides are tensors of 8 bits, which are multiplied as they are."""
        sides = [product(list(terms)) for terms in (c.lhs, c.rhs)]
        inside = {*self.definitions, *self.inside}
        return (
            self.memory.narrow
            and all(isinstance(e, Access) and e.tensor not in inside and self.memory.storage(e.tensor) in STORED_ONLY for e in sides)
            and math.prod(a.tile for a in axes) >= 32
        )

    def operand(self, terms: tuple[Expr, ...], common: Typed, narrow: bool = False) -> ir.Value:
        """One side of a dot: loaded as it is stored where it is a tensor, else computed and rounded to the operands' dtype."""
        expr = product(list(terms))
        value = self.read(expr) if isinstance(expr, Access) else self.as_value(self.eval(expr))
        if narrow:
            return value
        storage = DTYPES[common[0]].compute if self.exact else common[0]
        return self.cast_to(value, storage, common)
