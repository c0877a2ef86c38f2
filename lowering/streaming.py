"""Cascaded reductions in one pass over what they share: running values, rescaled when those that they depend on change.

lowering/stream.py has the algebra; here a pass becomes one loop of tile IR. What is summed about means is merged tile by tile.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from lowering import tile_ir as ir
from lowering.contraction import contraction
from lowering.limits import absorbed, limits
from lowering.reducing import Reducer, identity
from lowering.scaled import scaled
from lowering.schedule import FEW_LANES
from lowering.stream import OLD, Reduction
from tdsl.dtypes import join
from tdsl.ir import REDUCTION_OF, Access, Call, Const, Expr, free_indices, rebuild
from tdsl.ops import DTYPES, REDUCTIONS

_MONOTONE = tuple(name for name, d in DTYPES.items() if d.kind == "float")  # rounding a product keeps the order of its factors


class Streamer(Reducer):
    """Evaluates the reductions of one pass together."""

    def stream(self, members: tuple[Reduction, ...], loops: list[ir.Axis]) -> None:
        """One pass: every member's running value, multiplied by its factor when those that it reads change.

        Each lane of a short streamed tile has a running value of its own; they meet after the loop.
        """
        folded = tuple(a.name for a in loops if not a.scalar)
        apart = set(folded) if self._apart(members, loops) else set()
        carries = {r.statement.target.tensor: self._running(r, apart) for r in members}
        about = {r.statement.target.tensor: self._means(r) for r in members if r.centred}
        self.enter(loops)
        for carry in carries.values():  # what reads it changes from step to step
            self.level[carry.name] = len(self.scopes) - 1
        self._walk(members, carries, about, folded, apart)
        single = len(loops) == 1 and len(loops[0].indices) == 1
        grid = [i for a in self.axes if a.role == "grid" and len(a.indices) == 1 for i, _ in a.indices]
        self.leave(loops, *(limits(members, loops[0].indices[0][0], grid) if single else (None, None)))
        for carry in carries.values():
            self.level[carry.name] = len(self.scopes) - 1
        self._finish(members, carries, folded, apart)
        for r in members:
            if r.centred:
                name = r.statement.target.tensor
                self._shift(r, about[name])
                self.scopes[0].locals[name] = self._times(self.scopes[0].locals[name], r.outer, self._typed(r.statement))

    def _running(self, r: Reduction, apart: set[str]) -> ir.Value:
        """The carried value of a member."""
        s = r.statement
        compute = self._accumulator(self.memory.dtypes[s.target.tensor])
        lanes = self.sort(self.tile_axes(free_indices(s.target)) | apart)
        return self._carry(s.target.tensor, lanes, self._typed(s), compute, identity(REDUCTION_OF[s.op], compute))

    def _walk(
        self,
        members: Sequence[Reduction],
        carries: Mapping[str, ir.Value],
        about: Mapping[str, list[ir.Value]],
        folded: tuple[str, ...],
        apart: set[str],
    ) -> None:
        """One step of the loop. What members read of each other is the new value and the old one, so those are assigned last."""
        read = {name for r in members for name in r.running}
        later = []
        for r in members:
            name = r.statement.target.tensor
            carry = carries[name]
            if r.centred:
                self._merge(carry, about[name], r, folded)
                continue
            r = _finite(r)
            old = carry if r.factor is None else self._as(self.call("mul", [carry, self.eval(r.factor)]), carry)
            new = self._step(r, carry, old, folded, apart)
            if name in read:
                guarded = self._guarded(r, new, 0.0)
                older = self._guarded(r, carry, guarded) if self._guards(r, [*map(_finite, members)]) else carry
                self.scopes[-1].locals[name] = self._times(guarded, r.outer, self._typed(r.statement))
                self.scopes[-1].locals[name + OLD] = self._times(older, r.outer, self._typed(r.statement))
                later.append(ir.Assign(carry, new))
            else:
                self.scopes[-1].ops.append(ir.Assign(carry, new))
        self.scopes[-1].ops += later

    def _finish(self, members: Sequence[Reduction], carries: Mapping[str, ir.Value], folded: tuple[str, ...], apart: set[str]) -> None:
        """After the loop: from the guarded running values to the finished ones, and from lanes that were kept apart to one value."""
        finished = dict(carries)
        for r in members:
            name = r.statement.target.tensor
            value = carries[name]
            if r.factor is not None:
                for other in r.running:
                    member = next(m for m in members if m.statement.target.tensor == other)
                    # A lane in which nothing was summed counts as the finished value, as long as that is a number.
                    instead = self._guarded(member, finished[other], 0.0) if apart else 0.0
                    older = self._guarded(member, carries[other], instead) if self._guards(member, members) else carries[other]
                    self.scopes[0].locals[other + OLD] = self._times(older, member.outer, self._typed(member.statement))
                value = self._as(self.call("mul", [value, self.eval(r.factor)]), value)
            if apart:
                value = self.fold(r.statement, value, folded, REDUCTION_OF[r.statement.op], self._typed(r.statement))
                finished[name] = value
            late = () if r.centred or self._empty(r.statement) else r.outer
            self.scopes[0].locals[name] = self._times(value, late, self._typed(r.statement))

    def _apart(self, members: Sequence[Reduction], loops: Sequence[ir.Axis]) -> bool:
        """Whether the lanes of a streamed tile keep apart: to fold a few of them at each step would cost more than what they compute. Long
        tiles are folded within each thread for the most part; what is summed about means, and products, in tiles."""
        along = {i for a in loops for i, _ in a.indices}
        products = (c for s in self.plan.statements if along & set(s.indices) and (c := contraction(s)) is not None)
        short = math.prod(a.tile for a in loops) <= FEW_LANES
        return short and not any(r.centred for r in members) and not any(self._dot_axes(c) for c in products)

    def _means(self, r: Reduction) -> list[ir.Value]:
        """The carried count and means that a product of differences is summed about."""
        typed = self._typed(r.statement)
        compute = self._accumulator(typed[0])
        lanes = self.sort(self.tile_axes(free_indices(r.statement.target)))
        counts = () if r.given is None else lanes
        values = [self._carry("count", counts, typed, compute, 0.0), self._carry("mean", lanes, typed, compute, 0.0)]
        if r.centred[0][0] != r.centred[1][0]:
            values.append(self._carry("mean", lanes, typed, compute, 0.0))
        for v in values:
            self.level[v.name] += 1  # they change from step to step of the loop that is entered next
        return values

    def _merge(self, carry: ir.Value, about: list[ir.Value], r: Reduction, folded: tuple[str, ...]) -> None:
        """One tile: its own count, means and sum about them, merged with what is carried (Chan, Golub and LeVeque, 1979)."""
        s, dtype = r.statement, carry.dtype
        typed = self._typed(s)

        def counted(v: ir.Operand) -> ir.Value:
            """A tile that is zero where nothing is summed."""
            chosen = v if r.given is None else self.call("where", [self.eval(r.given), v, 0.0])
            return self._masked(self.as_value(chosen), folded, 0.0)

        def total_of(v: ir.Operand) -> ir.Value:
            return self.fold(s, counted(v), folded, "sum", typed)

        count: ir.Operand = total_of(self.full(1.0, typed, self.sort(set(folded)), dtype))
        divisor = count if r.given is None else self.call("maximum", [count, 1.0])
        values = [self.as_value(self.cast(self.eval(a), dtype)) for a, _ in r.centred]
        means = [self.call("div", [total_of(v), divisor]) for v in values]
        inside = total_of(self.call("mul", [self.call("sub", [v, m]) for v, m in zip(values, means, strict=True)]))
        seen, *before = about
        before = [before[0], before[-1]]
        total = self.call("add", [seen, count])
        share = self.call("div", [count, total if r.given is None else self.call("maximum", [total, 1.0])])
        apart = [self.call("sub", [m, b]) for m, b in zip(means, before, strict=True)]
        between = self.call("mul", [self.call("mul", [apart[0], apart[1]]), self.call("mul", [seen, share])])
        after = [self.call("add", [b, self.call("mul", [d, share])]) for b, d in zip(before, apart, strict=True)]
        updates = [(carry, self.call("add", [carry, self.call("add", [inside, between])])), (seen, total), *zip(about[1:], after, strict=False)]
        self.scopes[-1].ops += [ir.Assign(into, self._as(v, into)) for into, v in updates]

    def _shift(self, r: Reduction, about: list[ir.Value]) -> None:
        """From the sum about the means to the sum about what the statement says."""
        for v in about:
            self.level[v.name] = 0
        count, *means = about
        name = r.statement.target.tensor
        off = [self.call("sub", [m, self.eval(shift)]) for m, (_, shift) in zip([means[0], means[-1]], r.centred, strict=True)]
        moved = self.call("mul", [self.call("mul", [off[0], off[1]]), count])
        value = self.scopes[0].locals[name]
        self.scopes[0].locals[name] = self._as(self.call("add", [value, moved]), value)

    def _step(self, r: Reduction, carry: ir.Value, old: ir.Value, folded: tuple[str, ...], apart: set[str]) -> ir.Value:
        """The running value after one tile, of each lane along the axes that are kept apart."""
        s = replace(r.statement, value=r.inner)
        reduction = REDUCTION_OF[s.op]
        reduced = set(s.reduced)  # of which the loop may walk only some
        folded = (*folded, *(a.name for a in self.axes if not a.scalar and a.name not in folded and reduced & {i for i, _ in a.indices}))
        found = contraction(s)
        if found is not None and self._dot_axes(found):
            common = join(self._operand_type(found.lhs), self._operand_type(found.rhs))
            lhs, rhs = (self._masked(self.operand(e, common), folded, 0.0) for e in (found.lhs, found.rhs))
            new = self._new(s.target.tensor, carry.axes, carry.dtype, self.typed[carry.name])
            self.scopes[-1].ops.append(ir.Dot(new, lhs, rhs, old, self.sort(self.tile_axes(found.batch)), folded))
            return new
        value, factor = r.inner, 1.0
        if reduction in ("max", "min") and not apart and not self.exact and not self.memory.compares and self.typed[carry.name][0] in _MONOTONE:
            factor, value = scaled(r.inner, self.definitions) or (factor, value)  # the rows are fewer than what they are the maxima of
        term = self._term(s, value, folded, carry.dtype, identity(reduction, carry.dtype))
        part: ir.Operand = self.fold(s, term, tuple(a for a in folded if a not in apart), reduction, self.typed[carry.name])
        part = part if factor == 1 else self.call("mul", [part, factor])
        new = self._new(REDUCTIONS[reduction].combine, carry.axes, carry.dtype, self.typed[carry.name])
        self.scopes[-1].ops.append(ir.Elementwise(new, REDUCTIONS[reduction].combine, (old, self._as(part, carry))))
        return new

    def _guarded(self, r: Reduction, value: ir.Value, instead: ir.Operand) -> ir.Value:
        """A running maximum or minimum that is still infinite gives way: nothing has been summed relative to it yet. The new
        value counts as 0 then, and the old one as the new one, so that what has been summed, zero, is multiplied by 1."""
        if not math.isinf(REDUCTIONS[REDUCTION_OF[r.statement.op]].identity):
            return value
        infinite = self.call("eq", [self.call("abs", [value]), math.inf])
        return self.as_value(self.call("where", [infinite, instead, value]))

    def _guards(self, r: Reduction, members: Sequence[Reduction]) -> bool:
        """Whether an infinite older value has to give way: not where what is multiplied by its factor, zero, stays that: exp(-inf - m)."""
        name, least = r.statement.target.tensor, Const(REDUCTIONS[REDUCTION_OF[r.statement.op]].identity)

        def before(e: Expr) -> Expr:
            return least if isinstance(e, Access) and e.tensor == name + OLD else rebuild(e, before)

        factors = [m.factor for m in members if m.factor is not None and name in m.running]
        return any(absorbed(before(f)) != Const(0.0) for f in factors)

    def _as(self, v: ir.Operand, like: ir.Value) -> ir.Value:
        """A value with the dtype that promotion takes `like` for."""
        value = self.as_value(self.cast(v, like.dtype))
        self.typed[value.name] = self.typed[like.name]
        return value


def _finite(r: Reduction) -> Reduction:
    """A reduction in a step of its pass, where the running values that it reads are finite: `where(abs(m) == inf, 0, m)` is m."""

    def guarded(e: Expr) -> Expr:
        match e:
            case Call(op="where", args=(Call(op="eq", args=(Call(op="abs", args=(m,)), Const(value=math.inf))), Const(value=0), value)):
                if m == value and isinstance(m, Access) and m.tensor.removesuffix(OLD) in r.running:
                    return m
        return rebuild(e, guarded)

    return replace(r, inner=guarded(r.inner), factor=None if r.factor is None else guarded(r.factor))
