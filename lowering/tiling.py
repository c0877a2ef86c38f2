"""Plan x schedule -> tile IR. Every decision about one kernel's code is made here; the printers only spell it.

Statements are evaluated tile by tile. Each value is made once per loop nest (value numbering) and at the outermost loop
that it depends on. A sum of products whose operands have axes M, N and K becomes a `Dot`; any other reduction is
accumulated lane by lane and folded once after its loop, which adds long sums pairwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from lowering import tile_ir as ir
from lowering.limits import limits
from lowering.plan import Contraction, KernelPlan, contraction, plain
from lowering.schedule import Schedule
from lowering.stream import OLD, Reduction, passes
from tdsl.dtypes import SCALAR, TENSOR, WEAK, Typed, dtype_of, join
from tdsl.errors import Unsupported
from tdsl.ir import REDUCTION_OF, Access, Call, Clamp, Const, Expr, Index, Pad, Statement, free_indices, rebuild, walk
from tdsl.ops import DTYPES, OPS, REDUCTIONS
from tdsl.simplify import product

_STORE_MODE = {"=": "set", "+=": "add", "max=": "max", "min=": "min"}
_PRODUCT = "%product"  # the accumulated dot, under the name by which its epilogue reads it


@dataclass(frozen=True, slots=True)
class Memory:
    """What a kernel must know of the tensors, by name: shape, strides in elements, dtype.

    numbers: those that are Python numbers; by_value: whether they are passed as such (as float32) or through memory.
    updated: those that more than one statement writes. stored: dtypes in memory, where they are not those that promotion uses.
    """

    shapes: Mapping[str, tuple[int, ...]]
    strides: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    numbers: frozenset[str] = frozenset()
    by_value: bool = True
    updated: frozenset[str] = frozenset()
    stored: Mapping[str, str] = field(default_factory=dict)

    def storage(self, tensor: str) -> str:
        """The dtype that a tensor has in memory."""
        return self.stored.get(tensor, self.dtypes[tensor])


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
        return value > 0 if d.kind == "bool" else (2**63 - 1 if value > 0 else -(2**63))
    return bool(value) if d.kind == "bool" else int(value)


class _Scope:
    """One loop body under construction; `axis` is None outside of all loops."""

    def __init__(self, axis: ir.Axis | None):
        self.axis = axis
        self.ops: list[ir.Operation] = []
        self.known: dict[object, ir.Value] = {}
        self.locals: dict[str, ir.Value] = {}  # tensors that this kernel has computed here


class _Tiler:
    def __init__(self, kernel: KernelPlan, schedule: Schedule, memory: Memory, exact: bool):
        self.plan = kernel
        self.schedule = schedule
        self.memory = memory
        self.exact = exact
        self.axes = tuple(self._axis(indices, tile) for indices, tile in schedule.axes)
        self.axis_of = {name: axis for axis in self.axes for name, _ in axis.indices}
        self.order = {axis.name: n for n, axis in enumerate(self.axes)}
        self.scopes = [_Scope(None)]
        self.level: dict[str, int] = {}
        self.typed: dict[str, Typed] = {}
        self.values: dict[str, ir.Value] = {}
        self.inside = {s.target.tensor: s for s in kernel.statements if s.reduced and plain(s.target) and s.target.tensor not in memory.updated}
        self.definitions = {s.target.tensor: s for s in kernel.statements if not s.reduced and plain(s.target) and s.target.tensor not in memory.updated}
        self.buffers: dict[str, ir.Buffer] = {}
        self.zero_filled: dict[str, frozenset[str]] = {}
        self.names: set[str] = {i for i in kernel.extents} | {a.name for a in self.axes}

    def _axis(self, indices: tuple[str, ...], tile: int) -> ir.Axis:
        sizes = tuple((i, self.plan.extents[i]) for i in indices)
        extent = math.prod(n for _, n in sizes)
        role = "grid" if indices[0] in self.plan.grid else "loop"
        if (self.exact or role == "loop") and tile >= extent:
            role, tile = "whole", (extent if self.exact else tile)
        return ir.Axis("_".join(indices), sizes, tile, role, not self.exact and (extent == 0 or extent % tile != 0))

    def run(self) -> ir.Kernel:
        self._statements()
        wide = any(_span(b) >= 2**31 for b in self.buffers.values())
        order = [*self.plan.reads, *self.plan.writes]
        buffers = tuple(sorted(self.buffers.values(), key=lambda b: order.index(b.tensor)))
        return ir.Kernel(
            self.plan.name, self.plan.notation, self.axes, buffers, tuple(self.scopes[0].ops), self.schedule.num_warps, self.schedule.num_stages, self.schedule.group, wide
        )  # fmt: skip

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
        self.store(s, self.read(s.target) if s.reduced and s.target.tensor in self.inside else self.as_value(self.eval(s.value)))
        self.leave(loops)

    # -- scopes and value numbering -----------------------------------------------------------------------------------

    def enter(self, loops: list[ir.Axis]) -> None:
        for axis in loops:
            self.scopes.append(_Scope(axis))

    def leave(self, loops: list[ir.Axis], lo: Expr | None = None, hi: Expr | None = None) -> None:
        for axis in reversed(loops):
            scope = self.scopes.pop()
            self.scopes[-1].ops.append(ir.For(axis, tuple(scope.ops), lo, hi))

    def level_of_index(self, name: str) -> int:
        """The depth of the loop that sets an index (or computed the value of that name)."""
        if name in self.values:
            return self.level[name]
        axis = self.axis_of[name]
        return next((n for n, scope in enumerate(self.scopes) if scope.axis is axis), 0)

    def make(self, key: object, base: str, axes: tuple[str, ...], typed: Typed, dtype: str, level: int) -> tuple[ir.Value, bool]:
        """The value known under `key` in an open scope, or a new one (and True)."""
        for scope in self.scopes[: level + 1]:
            if key in scope.known:
                return scope.known[key], False
        value = ir.Value(self.fresh(base), axes, dtype)
        self.typed[value.name] = typed
        self.level[value.name] = level
        self.values[value.name] = value
        self.scopes[level].known[key] = value
        return value, True

    def fresh(self, base: str) -> str:
        """A Python name that is not taken, after a tensor or an operation."""
        base = identifier(base).lower()
        name, number = base, 1
        while name in self.names or name in _RESERVED:
            name = f"{base}{number}"
            number += 1
        self.names.add(name)
        return name

    def sort(self, axes: set[str]) -> tuple[str, ...]:
        return tuple(sorted(axes, key=self.order.__getitem__))

    def tile_axes(self, indices: tuple[str, ...]) -> set[str]:
        """The tile axes along which something with these indices and integer values varies."""
        found: set[str] = set()
        for i in indices:
            if i in self.values:
                found |= set(self.values[i].axes)
            elif not self.axis_of[i].scalar:
                found.add(self.axis_of[i].name)
        return found

    # -- expressions --------------------------------------------------------------------------------------------------

    def eval(self, expr: Expr) -> ir.Operand:
        """The value of an expression, in the dtype that arithmetic on it runs in."""
        match expr:
            case Const(value=value):
                return value
            case Access():
                return self.cast(self.read(expr), None)
            case Index():
                axes = self.sort(self.tile_axes((expr.name,)))
                value, new = self.make(("index", expr), f"{expr.name}_value", axes, ("int64", WEAK), "int64", self.level_of_index(expr.name))
                if new:
                    self.emit(value, ir.IndexOf(value, expr))
                return value
            case Call(op="stop_gradient", args=(x,)):
                return self.eval(x)
            case Call(op="pow", args=(x, Const(value=int() as n))) if 0 < n <= 8 and type(n) is int:
                base = self.eval(x)
                return base if n == 1 else self.call("mul", [self.eval(Call("pow", (x, Const(n - 1)))), base])
            case Call(op="pow", args=(x, Const(value=power))) if power == 0.5:
                return self.call("sqrt", [self.eval(x)])
            case Call(op=op, args=args):
                return self.call(op, [self.eval(a) for a in args])
        raise Unsupported(f"{type(expr).__name__} cannot stand in a kernel (tiling)", span=expr.span)

    def type_of(self, v: ir.Operand) -> Typed:
        return self.typed[v.name] if isinstance(v, ir.Value) else dtype_of(Const(v), {}, {})

    def call(self, op: str, args: list[ir.Operand]) -> ir.Operand:
        """One scalar function on tiles: arguments cast to the dtype it runs in."""
        row = OPS[op]
        if not any(isinstance(a, ir.Value) for a in args):
            args = [self.full(args[0], dtype_of(Const(args[0]), {}, {})), *args[1:]]  # type: ignore[arg-type]
        types = [self.type_of(a) for a in args]
        operands = types[1:] if row.kind == "branch" else types
        common = operands[0]
        for t in operands[1:]:
            common = join(common, t)
        if row.kind == "float" and DTYPES[common[0]].kind != "float":
            common = ("float32", common[1])
        if op in DTYPES:
            return self.cast_to(self.as_value(args[0]), op, (op, common[1]))
        compute = "bool" if op in ("and", "or", "not") else DTYPES[common[0]].compute
        if compute == "bool" and op in ("add", "mul", "sub", "neg", "maximum", "minimum", "abs", "sign", "max", "min"):
            compute = "int64"
        cast = [self.cast(a, "bool" if row.kind == "branch" and n == 0 else compute) for n, a in enumerate(args)]
        if op == "div" and self._reciprocal(*cast):
            return self.call("mul", [args[0], self.call("div", [1.0, args[1]])])
        if op in ("floor", "ceil") and DTYPES[compute].kind != "float":
            return cast[0]
        result = "bool" if row.kind == "bool" else compute
        typed: Typed = ("bool", common[1]) if row.kind == "bool" else common
        if compute == "int64" and typed[0] == "bool" and row.kind != "bool":
            typed = ("int64", typed[1])
        axes = self.sort({axis for a in cast if isinstance(a, ir.Value) for axis in a.axes})
        level = max(self.level[a.name] for a in cast if isinstance(a, ir.Value))
        key = (op, tuple((a.name if isinstance(a, ir.Value) else (type(a), a)) for a in cast))
        value, new = self.make(key, _RESULT_NAMES.get(op, op), axes, typed, result, level)
        if new:
            self.emit(value, ir.Elementwise(value, op, tuple(cast)))
        return value

    def _reciprocal(self, a: ir.Operand, b: ir.Operand) -> bool:
        """Whether to divide once and multiply often: the divisor varies less than what it divides."""
        if self.exact or not (isinstance(a, ir.Value) and isinstance(b, ir.Value)):
            return False
        return len(b.axes) < len(a.axes) or self.level[b.name] < self.level[a.name]

    def cast(self, v: ir.Operand, compute: str | None) -> ir.Operand:
        """`v` in a compute dtype; None: in the one that its own dtype is computed in. Numbers are cast where they are used."""
        if not isinstance(v, ir.Value):
            if compute is not None and DTYPES[compute].kind == "float" and not isinstance(v, float):
                return float(v)
            return bool(v) if compute == "bool" else v
        wanted = compute or DTYPES[v.dtype].compute
        return v if v.dtype == wanted else self.cast_to(v, wanted, self.typed[v.name])

    def cast_to(self, v: ir.Value, dtype: str, typed: Typed) -> ir.Value:
        if v.dtype == dtype:
            return v
        value, new = self.make((dtype, v.name), v.name, v.axes, typed, dtype, self.level[v.name])
        if new:
            self.zero_filled[value.name] = self.zero_filled.get(v.name, frozenset())
            self.emit(value, ir.Elementwise(value, dtype, (v,)))
        return value

    def full(self, fill: float | int | bool, typed: Typed, axes: tuple[str, ...] = (), dtype: str | None = None) -> ir.Value:
        """A tile of one number."""
        dtype = dtype or DTYPES[typed[0]].compute
        value, new = self.make(("full", type(fill), str(fill), axes, dtype), "number", axes, typed, dtype, 0)
        if new:
            self.emit(value, ir.Full(value, fill))
        return value

    def as_value(self, v: ir.Operand) -> ir.Value:
        return v if isinstance(v, ir.Value) else self.full(v, dtype_of(Const(v), {}, {}))

    def emit(self, value: ir.Value, op: ir.Operation) -> None:
        self.scopes[self.level[value.name]].ops.append(op)

    # -- memory -------------------------------------------------------------------------------------------------------

    def read(self, access: Access) -> ir.Value:
        """A tensor's elements as they are stored, or the value of one that this kernel computes."""
        for scope in reversed(self.scopes):
            if access.tensor in scope.locals:
                return scope.locals[access.tensor]
        if access.tensor in self.definitions:
            return self.as_value(self.eval(self.definitions[access.tensor].value))
        if access.tensor in self.inside:
            value = self.reduce(self.inside[access.tensor])
            self.scopes[self.level[value.name]].locals[access.tensor] = value
            return value
        buffer = self.buffer(access.tensor)
        subscripts = tuple(self.subscript(e) for e in access.subscripts)
        names = tuple(dict.fromkeys(i for e in subscripts for i in free_indices(e)))
        level = max((self.level_of_index(i) for i in names), default=0)
        axes = self.sort(self.tile_axes(names))
        category = TENSOR if access.subscripts else WEAK if access.tensor in self.memory.numbers else SCALAR
        value, new = self.make(("load", buffer.name, subscripts), access.tensor, axes, (self.memory.dtypes[access.tensor], category), buffer.dtype, level)
        if new:
            self.zero_filled[value.name] = frozenset(axes)
            self.emit(value, ir.Load(value, buffer, subscripts))
        return value

    def subscript(self, expr: Expr) -> Expr:
        """An integer expression of loop indices; what is read from memory inside it becomes the name of a value."""
        if isinstance(expr, Access):
            return Index(self.as_value(self.cast(self.read(expr), "int64")).name)
        if isinstance(expr, Pad):
            return Pad(self.subscript(expr.value))
        if isinstance(expr, Clamp):
            return Clamp(self.subscript(expr.value))
        return rebuild(expr, self.subscript)

    def buffer(self, tensor: str) -> ir.Buffer:
        if tensor not in self.buffers:
            memory = self.memory
            name = self._buffer_name(tensor)
            self.buffers[tensor] = ir.Buffer(name, tensor, memory.shapes[tensor], memory.strides[tensor], memory.storage(tensor), memory.by_value and tensor in memory.numbers)
        return self.buffers[tensor]

    def _buffer_name(self, tensor: str) -> str:
        base = identifier(f"d{tensor[:-5]}" if tensor.endswith(".grad") else tensor)
        name, number = base, 1
        while name in self.names or name in _RESERVED:
            name = f"{base}_{number}"
            number += 1
        self.names.add(name)
        return name

    def store(self, s: Statement, value: ir.Value) -> None:
        """Writes a statement's value; into what stands there, where other writes of the target came before or may collide."""
        buffer = self.buffer(s.target.tensor)
        collides = s.target.tensor in self.memory.updated or not plain(s.target)
        mode = _STORE_MODE.get(s.op, "") if collides else "set"
        if not mode:
            raise Unsupported(f"`{s.op}` into an older version of {s.target.tensor} or at computed places cannot be compiled yet (tiling)", span=s.span, help="give the result a name of its own")
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
        fill = identity(reduction, compute)
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

    def _new(self, base: str, axes: tuple[str, ...], dtype: str, typed: Typed) -> ir.Value:
        """A value made in the innermost scope, outside of value numbering."""
        value = ir.Value(self.fresh(base), axes, dtype)
        self.typed[value.name] = typed
        self.level[value.name] = len(self.scopes) - 1
        self.values[value.name] = value
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

    # -- streams ------------------------------------------------------------------------------------------------------

    def stream(self, members: tuple[Reduction, ...], loops: list[ir.Axis]) -> None:
        """One pass: every member's running value, multiplied by its factor when those that it reads change."""
        carries = {}
        for r in members:
            s = r.statement
            compute = self._accumulator(self.memory.dtypes[s.target.tensor])
            lanes = self.sort(self.tile_axes(free_indices(s.target)))
            carries[s.target.tensor] = self._carry(s.target.tensor, lanes, self._typed(s), compute, identity(REDUCTION_OF[s.op], compute))
        read = {name for r in members for name in r.running}
        folded = tuple(a.name for a in loops if not a.scalar)
        self.enter(loops)
        for carry in carries.values():  # what reads it changes from step to step
            self.level[carry.name] = len(self.scopes) - 1
        later = []
        for r in members:
            name = r.statement.target.tensor
            carry = carries[name]
            old = carry if r.factor is None else self._as(self.call("mul", [carry, self.eval(r.factor)]), carry)
            new = self._step(r, carry, old, folded)
            if name in read:
                guarded = self._guarded(r, new, 0.0)
                self.scopes[-1].locals[name] = guarded
                self.scopes[-1].locals[name + OLD] = self._guarded(r, carry, guarded)
                later.append(ir.Assign(carry, new))
            else:
                self.scopes[-1].ops.append(ir.Assign(carry, new))
        self.scopes[-1].ops += later
        single = len(loops) == 1 and len(loops[0].indices) == 1
        grid = [i for a in self.axes if a.role == "grid" and len(a.indices) == 1 for i, _ in a.indices]
        self.leave(loops, *(limits(members, loops[0].indices[0][0], grid) if single else (None, None)))
        for carry in carries.values():
            self.level[carry.name] = len(self.scopes) - 1
        for r in members:
            name = r.statement.target.tensor
            value = carries[name]
            if r.factor is not None:  # from the guarded running values to the finished ones
                for other in r.running:
                    member = next(m for m in members if m.statement.target.tensor == other)
                    self.scopes[0].locals[other + OLD] = self._guarded(member, carries[other], 0.0)
                value = self._as(self.call("mul", [value, self.eval(r.factor)]), value)
            self.scopes[0].locals[name] = value
        for r in members:
            if r.outer:
                name = r.statement.target.tensor
                self.scopes[0].locals[name] = self._times(self.scopes[0].locals[name], r.outer, self._typed(r.statement))

    def _step(self, r: Reduction, carry: ir.Value, old: ir.Value, folded: tuple[str, ...]) -> ir.Value:
        """The running value after one tile."""
        s = replace(r.statement, value=r.inner)
        reduction = REDUCTION_OF[s.op]
        found = contraction(s)
        if found is not None and self._dot_axes(found):
            common = join(self._operand_type(found.lhs), self._operand_type(found.rhs))
            lhs, rhs = (self._masked(self.operand(e, common), folded, 0.0) for e in (found.lhs, found.rhs))
            new = self._new(s.target.tensor, carry.axes, carry.dtype, self.typed[carry.name])
            self.scopes[-1].ops.append(ir.Dot(new, lhs, rhs, old, self.sort(self.tile_axes(found.batch)), folded))
            return new
        term = self._term(s, r.inner, folded, carry.dtype, identity(reduction, carry.dtype))
        part = self.fold(s, term, folded, reduction, self.typed[carry.name])
        new = self._new(REDUCTIONS[reduction].combine, carry.axes, carry.dtype, self.typed[carry.name])
        self.scopes[-1].ops.append(ir.Elementwise(new, REDUCTIONS[reduction].combine, (old, part)))
        return new

    def _guarded(self, r: Reduction, value: ir.Value, instead: ir.Operand) -> ir.Value:
        """A running maximum or minimum that is still infinite gives way: nothing has been summed relative to it yet. The new
        value counts as 0 then, and the old one as the new one, so that what has been summed, zero, is multiplied by 1."""
        if not math.isinf(REDUCTIONS[REDUCTION_OF[r.statement.op]].identity):
            return value
        infinite = self.call("eq", [self.call("abs", [value]), math.inf])
        return self.as_value(self.call("where", [infinite, instead, value]))

    def _as(self, v: ir.Operand, like: ir.Value) -> ir.Value:
        """A value with the dtype that promotion takes `like` for."""
        value = self.as_value(self.cast(v, like.dtype))
        self.typed[value.name] = self.typed[like.name]
        return value

    def _times(self, value: ir.Value, outer: tuple[Expr, ...], typed: Typed) -> ir.Value:
        """A finished sum times the factors that do not vary along it."""
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
        result, new = self.make(("mask", value.name, outside, str(fill)), value.name, value.axes, self.typed[value.name], value.dtype, self.level[value.name])
        if new:
            self.emit(result, ir.Mask(result, value, outside, fill))
        return result

    def _carry(self, base: str, axes: tuple[str, ...], typed: Typed, dtype: str, fill: float | int | bool) -> ir.Value:
        value = self._new(base, axes, dtype, typed)
        self.scopes[-1].ops.append(ir.Full(value, fill))
        return value

    def _dot_axes(self, c: Contraction) -> bool:
        """Whether M, N and K are tile axes: one each, unless whole tensors are multiplied."""
        groups = [{self.axis_of[i].name for i in group} for group in (c.m, c.n, c.k)]
        whole = all(not self.axis_of[i].scalar for group in (c.m, c.n, c.k) for i in group)
        if self.exact:
            return whole
        sizes = all(self.axis_of[group[0]].tile >= 16 for group in (c.m, c.n, c.k))
        return whole and sizes and all(len(g) == 1 for g in groups) and len(set().union(*groups)) == 3 and all(self.axis_of[i].scalar for i in c.batch)

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
        lhs, rhs = (self._masked(self.operand(e, common), contract, 0.0) for e in (c.lhs, c.rhs))
        if carry is None:
            level = max(self.level[lhs.name], self.level[rhs.name])
            total, _ = self.make(("dot", lhs.name, rhs.name), s.target.tensor, lanes, common, compute, level)
            self.emit(total, ir.Dot(total, lhs, rhs, None, batch, contract))
        else:
            total = carry
            result = self._new(s.target.tensor, lanes, compute, common)
            self.scopes[-1].ops += [ir.Dot(result, lhs, rhs, carry, batch, contract), ir.Assign(carry, result)]
        self.leave(loops)
        typed = (dtype, TENSOR)
        if c.outer:
            return self._times(total, c.outer, typed)
        self.typed[total.name] = typed
        return total

    def _operand_type(self, terms: tuple[Expr, ...]) -> Typed:
        ranks = {t: len(shape) if t not in self.memory.numbers else -1 for t, shape in self.memory.shapes.items()}
        found = dtype_of(product(list(terms)), self.memory.dtypes, ranks)
        return found if DTYPES[found[0]].kind == "float" else ("float32", found[1])

    def operand(self, terms: tuple[Expr, ...], common: Typed) -> ir.Value:
        """One side of a dot: loaded as it is stored where it is a tensor, else computed and rounded to the operands' dtype."""
        expr = product(list(terms))
        value = self.read(expr) if isinstance(expr, Access) else self.as_value(self.eval(expr))
        storage = DTYPES[common[0]].compute if self.exact else common[0]
        return self.cast_to(value, storage, common)


# Names that generated code uses itself, or that Python keeps.
_RESERVED = frozenset(
    "tl triton torch pid False None True and as assert async await break class continue def del elif else except finally for from global if import in is lambda"
    " nonlocal not or pass raise return try while with yield int float bool min max abs range len print".split()
) | {row.name for row in OPS.values()}
_RESULT_NAMES = {op: f"{op}_" if op in ("and", "or", "not") else {"add": "total", "sub": "difference", "mul": "scaled", "div": "ratio", "neg": "negated"}.get(op, f"{op}_of") for op in OPS}


def identifier(name: str) -> str:
    """A tensor's name as a Python identifier."""
    return name.replace(".", "_")


def _span(b: ir.Buffer) -> int:
    """The largest offset into a buffer, in elements."""
    return sum((n - 1) * abs(s) for n, s in zip(b.shape, b.strides, strict=True)) if all(b.shape) else 0


