"""Plan x schedule -> tile IR. Every decision about one kernel's code is made here; the printers only spell it.

Statements are evaluated tile by tile. Each value is made once per loop nest (value numbering) and at the outermost loop
that it depends on. A sum of products whose operands have axes M, N and K becomes a `Dot`; any other reduction is
accumulated lane by lane and folded once after its loop, which adds long sums pairwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from lowering import tile_ir as ir
from lowering.contraction import Contraction, contraction
from lowering.evaluate import Evaluator, Memory
from lowering.forms import dressed
from lowering.limits import absorbed, limits
from lowering.plan import KernelPlan
from lowering.scaled import scaled
from lowering.schedule import FEW_LANES, Schedule
from lowering.statement import plain
from lowering.stream import OLD, Reduction, passes
from tdsl.dtypes import SCALAR, TENSOR, Typed, dtype_of, join
from tdsl.errors import Unsupported
from tdsl.ir import REDUCTION_OF, Access, Call, Const, Expr, Statement, free_indices, rebuild
from tdsl.ops import DTYPES, REDUCTIONS, STORED_ONLY
from tdsl.simplify import product
from tdsl.traced import whole

_STORE_MODE = {"=": "set", "+=": "add", "max=": "max", "min=": "min"}
_MONOTONE = tuple(name for name, d in DTYPES.items() if d.kind == "float")  # rounding a product keeps the order of its factors
_PRODUCT = "%product"  # the accumulated dot, under the name by which its epilogue reads it


def tile(kernel: KernelPlan, schedule: Schedule, memory: Memory, *, exact: bool) -> ir.Kernel:
    """The tile IR of one kernel. exact: tiles end where axes end (no masks), and an axis in one tile is walked by no loop."""
    return _Tiler(kernel, schedule, memory, exact).run()


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


class _Tiler(Evaluator):
    def run(self) -> ir.Kernel:
        self._statements()
        wide = any(_span(b) >= 2**31 for b in self.buffers.values())
        order = [*self.plan.reads, *self.plan.writes]
        buffers = tuple(sorted(self.buffers.values(), key=lambda b: order.index(b.tensor)))
        plan, schedule = self.plan, self.schedule
        body = ir.without(tuple(self.scopes[0].ops), self.unmasked)
        launch = (schedule.num_warps, schedule.num_stages, schedule.group)
        return dressed(ir.Kernel(plan.name, plan.notation, self.axes, buffers, body, *launch, wide, fused=self.memory.fused), schedule)

    def _statements(self) -> None:
        """Reductions in order, those over a streamed axis pass by pass; then what is stored element by element."""
        streamed = [a for a in self.axes if a.role == "loop" and a.indices[0][0] in self.plan.stream]
        along = {i for a in streamed for i, _ in a.indices}
        pending = list(passes(self.plan.statements, tuple(along))) if along else []
        done: set[str] = set()
        for s in self.plan.statements:
            name = s.target.tensor
            if along & set(free_indices(s.target)):
                continue
            if along & set(s.reduced):
                while name not in done:
                    now = pending.pop(0)
                    self.stream(now, streamed)
                    done |= {r.statement.target.tensor for r in now}
                if name in self.plan.stores:
                    self.store(s, self.read(s.target))
            elif s.reduced and self._loops_of(s):
                if name in self.plan.stores:  # else what reads it makes it there, where its indices are walked
                    self._store_each(s, self._loops_of(s))
            elif s.reduced:
                value = self.read(s.target) if name in self.inside else self.reduce(s)
                if name in self.plan.stores:
                    self.store(s, value)
            elif name in self.plan.stores:
                self._store_each(s, self._loops_of(s))
        for s in self.plan.statements:
            if along & set(free_indices(s.target)) and s.target.tensor in self.plan.stores:
                self._store_each(s, self._loops_of(s))

    def _loops_of(self, s: Statement) -> list[ir.Axis]:
        free = set(free_indices(s.target))
        return [a for a in self.axes if a.role == "loop" and any(i in free for i, _ in a.indices)]

    def _store_each(self, s: Statement, loops: list[ir.Axis]) -> None:
        self.enter(loops)
        if s.target.tensor in self.inside:
            value = self.read(s.target)
        else:
            value = self.reduce(s) if s.reduced else self.as_value(self.eval(s.value))
        self.store(s, value)
        self.leave(loops)

    def store(self, s: Statement, value: ir.Value) -> None:
        """Writes a statement's value; into what stands there, where other writes of the target came before or may collide."""
        buffer = self.buffer(s.target.tensor)
        collides = s.target.tensor in self.memory.updated or not plain(s.target)
        mode = _STORE_MODE.get(s.op, "") if collides else "set"
        if not mode:
            what = f"`{s.op}` into an older version of {s.target.tensor} or at computed places cannot be compiled yet (tiling)"
            raise Unsupported(what, span=s.span, help="give the result a name of its own")
        subscripts = tuple(self.subscript(e) for e in s.target.subscripts)
        axes = self.sort(self.tile_axes(tuple(dict.fromkeys(i for e in subscripts for i in free_indices(e)))) | set(value.axes))
        self.scopes[-1].ops.append(ir.Store(buffer, subscripts, self.cast_to(value, buffer.dtype, self.typed[value.name]), axes, mode))

    # -- reductions ---------------------------------------------------------------------------------------------------

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

    # -- streams ------------------------------------------------------------------------------------------------------

    def stream(self, members: tuple[Reduction, ...], loops: list[ir.Axis]) -> None:
        """One pass: every member's running value, multiplied by its factor when those that it reads change.

        Each lane of a short streamed tile has a running value of its own; they meet after the loop.
        """
        carries = {}
        folded = tuple(a.name for a in loops if not a.scalar)
        apart = set(folded) if self._apart(members, loops) else set()
        for r in members:
            s = r.statement
            compute = self._accumulator(self.memory.dtypes[s.target.tensor])
            lanes = self.sort(self.tile_axes(free_indices(s.target)) | apart)
            carries[s.target.tensor] = self._carry(s.target.tensor, lanes, self._typed(s), compute, identity(REDUCTION_OF[s.op], compute))
        read = {name for r in members for name in r.running}
        about = {r.statement.target.tensor: self._means(r) for r in members if r.centred}
        self.enter(loops)
        for carry in carries.values():  # what reads it changes from step to step
            self.level[carry.name] = len(self.scopes) - 1
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
        single = len(loops) == 1 and len(loops[0].indices) == 1
        grid = [i for a in self.axes if a.role == "grid" and len(a.indices) == 1 for i, _ in a.indices]
        self.leave(loops, *(limits(members, loops[0].indices[0][0], grid) if single else (None, None)))
        for carry in carries.values():
            self.level[carry.name] = len(self.scopes) - 1
        finished = dict(carries)
        for r in members:
            name = r.statement.target.tensor
            value = carries[name]
            if r.factor is not None:  # from the guarded running values to the finished ones
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
        for r in members:
            if r.centred:
                name = r.statement.target.tensor
                self._shift(r, about[name])
                self.scopes[0].locals[name] = self._times(self.scopes[0].locals[name], r.outer, self._typed(r.statement))

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

    def _empty(self, s: Statement) -> bool:
        """Whether a statement sums nothing: then its factors, a quotient by another empty sum perhaps, count for nothing."""
        return any(self.plan.extents[i] == 0 for i in s.reduced)

    def _times(self, value: ir.Value, outer: tuple[Expr, ...], typed: Typed) -> ir.Value:
        """A finished sum times the factors that do not vary along it."""
        if not outer:
            return value
        self.scopes[-1].locals[_PRODUCT] = value
        result = self.as_value(self.cast(self.eval(product([Access(_PRODUCT), *outer])), value.dtype))
        del self.scopes[-1].locals[_PRODUCT]
        self.typed[result.name] = typed
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

    def _carry(self, base: str, axes: tuple[str, ...], typed: Typed, dtype: str, fill: float | int | bool) -> ir.Value:
        value = self._new(base, axes, dtype, typed)
        self.scopes[-1].ops.append(ir.Full(value, fill))
        return value

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


def _finite(r: Reduction) -> Reduction:
    """A reduction in a step of its pass, where the running values that it reads are finite: `where(abs(m) == inf, 0, m)` is m."""

    def guarded(e: Expr) -> Expr:
        match e:
            case Call(op="where", args=(Call(op="eq", args=(Call(op="abs", args=(m,)), Const(value=math.inf))), Const(value=0), value)):
                if m == value and isinstance(m, Access) and m.tensor.removesuffix(OLD) in r.running:
                    return m
        return rebuild(e, guarded)

    return replace(r, inner=guarded(r.inner), factor=None if r.factor is None else guarded(r.factor))


def _span(b: ir.Buffer) -> int:
    """The largest offset into a buffer, in elements."""
    return sum((n - 1) * abs(s) for n, s in zip(b.shape, b.strides, strict=True)) if all(b.shape) else 0
