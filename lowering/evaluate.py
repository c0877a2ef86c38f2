"""Expressions on tiles: each value is made once per loop nest (value numbering), at the outermost loop that it depends on."""

from __future__ import annotations

import itertools
import keyword
import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from lowering import tile_ir as ir
from lowering.exponent import in_base_2
from lowering.plan import KernelPlan
from lowering.schedule import Schedule
from lowering.statement import identifier, plain
from tdsl.dtypes import SCALAR, TENSOR, WEAK, Typed, dtype_of, join
from tdsl.errors import Unsupported
from tdsl.ir import Access, Call, Clamp, Const, Expr, Index, Pad, Statement, free_indices, rebuild, walk
from tdsl.ops import DTYPES, OPS
from tdsl.traced import is_traced, whole

_INT32 = 2**31 - 1
# Integer operations that are monotonic in each operand (comparisons among them): their bounds are at the ends.
_INT32_OPS: dict[str, Callable[..., int]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "neg": operator.neg, "maximum": max, "minimum": min,
    **{op: lambda a, b: 1 for op in ("eq", "ne", "lt", "le", "gt", "ge")},
}  # fmt: skip
# Functions that are zero where all of their arguments are.
_ZERO_OF_ZEROS = frozenset({"add", "sub", "mul", "neg", "abs", "maximum", "minimum", "relu", "sign"})
# Names that generated code uses itself.
_RESERVED = (
    frozenset(keyword.kwlist)
    | {"tl", "triton", "torch", "pid", "int", "float", "bool", "min", "max", "abs", "range", "rest", "inside", "first", "rows", "part", "GROUP"}
    | {name for row in OPS.values() for name in re.findall(r"def (\w+)", row.triton_def)}
)
# What the result of an operation is called, if not after the operation.
_RESULT_NAMES = {
    "add": "total", "sub": "difference", "mul": "scaled", "div": "ratio", "neg": "negated", "abs": "magnitude", "where": "chosen",
    "eq": "equal", "ne": "unequal", "lt": "less", "le": "at_most", "gt": "greater", "ge": "at_least", "and": "both", "or": "either", "not": "otherwise",
    "maximum": "larger", "minimum": "smaller",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Memory:
    """What a kernel must know of the tensors, by name: shape, strides in elements, dtype.

    numbers: those that are Python numbers; by_value: whether they are passed as such (as float32) or through memory.
    updated: those that more than one statement writes. stored: dtypes in memory, where they are not those that promotion uses.
    compares: whether the program compares quotients or exponentials: then every kernel spells them the same way, so that equal ones
    are equal. fused: a multiplication and an addition may be one operation; where what they make is compared, they may not.
    narrow: products take operands of 8 bits as they are.
    """

    shapes: Mapping[str, tuple[int, ...]]
    strides: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    numbers: frozenset[str] = frozenset()
    by_value: bool = True
    updated: frozenset[str] = frozenset()
    stored: Mapping[str, str] = field(default_factory=dict)
    compares: bool = False
    fused: bool = True
    narrow: bool = False

    def storage(self, tensor: str) -> str:
        """The dtype that a tensor has in memory."""
        return self.stored.get(tensor, self.dtypes[tensor])


class Scope:
    """One loop body under construction; `axis` is None outside of all loops."""

    def __init__(self, axis: ir.Axis | None):
        self.axis = axis
        self.ops: list[ir.Operation] = []
        self.known: dict[object, ir.Value] = {}
        self.locals: dict[str, ir.Value] = {}  # tensors that this kernel has computed here


class Evaluator:
    """Evaluates the expressions of one kernel's statements into operations of open scopes; what a reduction is, subclasses say."""

    def __init__(self, kernel: KernelPlan, schedule: Schedule, memory: Memory, exact: bool):
        self.plan = kernel
        self.schedule = schedule
        self.memory = memory
        self.double = "float64" in memory.dtypes.values()
        self.exact = exact
        self.axes = tuple(self._axis(indices, tile) for indices, tile in schedule.axes)
        self.axis_of = {name: axis for axis in self.axes for name, _ in axis.indices}
        self.indices_of = {axis.name: axis.indices[0][0] for axis in self.axes}
        self.order = {axis.name: n for n, axis in enumerate(self.axes)}
        self.scopes = [Scope(None)]
        self.level: dict[str, int] = {}
        self.typed: dict[str, Typed] = {}
        self.values: dict[str, ir.Value] = {}
        self.inside = {
            s.target.tensor: s for s in kernel.statements if s.reduced and plain(s.target) and s.target.tensor not in memory.updated
        }
        self.definitions = {
            s.target.tensor: s for s in kernel.statements if not s.reduced and plain(s.target) and s.target.tensor not in memory.updated
        }
        self.buffers: dict[str, ir.Buffer] = {}
        self.zero_filled: dict[str, frozenset[str]] = {}  # the axes beyond whose ends a value is zero
        self.products: dict[str, tuple[ir.Value, ir.Value]] = {}
        self.unmasked: set[str] = set()  # products in whose place others were made, of which a factor is masked
        self.bounds: dict[str, tuple[int, int]] = {}  # of integer values that 32 bits hold
        self.names: set[str] = set(kernel.extents) | {a.name for a in self.axes}

    def _axis(self, indices: tuple[str, ...], tile: int) -> ir.Axis:
        sizes = tuple((i, self.plan.extents[i]) for i in indices)
        extent = math.prod(n for _, n in sizes)
        role = "grid" if indices[0] in self.plan.grid else "loop"
        walked = role == "loop" and tile == 1 and indices[0] in self.plan.stream  # number by number, even if there is only one
        if (self.exact or (role == "loop" and not walked)) and tile >= extent:
            role, tile = "whole", (extent if self.exact else tile)
        return ir.Axis("_".join(indices), sizes, tile, role, (not self.exact or role == "loop") and (extent == 0 or extent % tile != 0))

    # -- scopes and value numbering -----------------------------------------------------------------------------------

    def enter(self, loops: list[ir.Axis]) -> None:
        for axis in loops:
            self.scopes.append(Scope(axis))

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
                extent = self.plan.extents[expr.name]
                width = "int64" if self.exact or extent > _INT32 else "int32"
                index, new = self.make(("index", expr), f"{expr.name}_value", axes, ("int64", WEAK), width, self.level_of_index(expr.name))
                if width == "int32":
                    self.bounds[index.name] = (0, max(0, extent - 1))
                if new:
                    self.emit(index, ir.IndexOf(index, expr))
                return index
            case Call(op="stop_gradient", args=(x,)):
                return self.eval(x)
            case Call(op="pow", args=(x, Const(value=int() as n))) if 0 < n <= 8 and type(n) is int:
                base = self.eval(x)
                return base if n == 1 else self.call("mul", [self.eval(Call("pow", (x, Const(n - 1)))), base])
            case Call(op="pow", args=(x, Const(value=power))) if power == 0.5:
                return self.call("sqrt", [self.eval(x)])
            case Call(op=op, args=args):
                if not self.exact and not self.double and not self.memory.compares and (spread := in_base_2(expr, self._axes, self.definitions)) is not None:
                    return self.eval(spread)
                return self.call(op, [self.eval(a) for a in args])
        raise Unsupported(f"{type(expr).__name__} cannot stand in a kernel (tiling)", span=expr.span)

    def _axes(self, e: Expr) -> frozenset[str]:
        """The tile axes along which an expression varies, without making it: a running value has lanes that its tensor has not."""
        made = {a.tensor for a in walk(e) if isinstance(a, Access)}
        values = {name: v for scope in self.scopes for name, v in scope.locals.items() if name in made}
        return frozenset(self.tile_axes(free_indices(e)).union(*(v.axes for v in values.values())))

    def type_of(self, v: ir.Operand) -> Typed:
        return self.typed[v.name] if isinstance(v, ir.Value) else dtype_of(Const(v), {}, {})

    def compute(self, typed: Typed) -> str:
        """The dtype that arithmetic runs in; what is made of numbers and indices alone keeps its digits where float64 tensors need them."""
        return "float64" if self.double and typed == ("float32", WEAK) else DTYPES[typed[0]].compute

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
        compute = "bool" if op in ("and", "or", "not") else self.compute(common)
        settled = row.kind in DTYPES and row.kind != "bool"  # the function itself says what it gives
        if compute == "bool" and (settled or op in ("add", "mul", "sub", "neg", "maximum", "minimum", "abs", "sign", "max", "min")):
            compute = "int64"
        bounds = self._bounds(op, args) if compute == "int64" else None
        compute = "int32" if bounds else compute
        cast = [self.cast(a, "bool" if row.kind == "branch" and n == 0 else compute) for n, a in enumerate(args)]
        base, factor = row.base
        if base and compute == "float32" and not self.exact:
            return self.call(base, [self.call("mul", [cast[0], factor])])
        if op == "div" and self._reciprocal(*cast):
            return self.call("mul", [args[0], self.call("div", [1.0, args[1]])])
        if op in ("floor", "ceil", "round") and DTYPES[compute].kind != "float":
            return cast[0]
        result = "bool" if row.kind == "bool" else DTYPES[row.kind].compute if settled else compute
        typed: Typed = (row.kind, common[1]) if settled or row.kind == "bool" else common
        if compute == "int64" and typed[0] == "bool" and row.kind != "bool":
            typed = ("int64", typed[1])
        axes = self.sort({axis for a in cast if isinstance(a, ir.Value) for axis in a.axes})
        level = max(self.level[a.name] for a in cast if isinstance(a, ir.Value))
        key = (op, tuple((a.name if isinstance(a, ir.Value) else (type(a), a)) for a in cast))
        value, new = self.make(key, _RESULT_NAMES.get(op, op if op not in _RESERVED else f"{op}_of"), axes, typed, result, level)
        if new:
            self.emit(value, ir.Elementwise(value, op, tuple(cast)))
            self.zero_filled[value.name] = self._stays_zero(op, cast)
            if op == "mul" and isinstance(cast[0], ir.Value) and isinstance(cast[1], ir.Value):
                self.products[value.name] = (cast[0], cast[1])
        if bounds and result == "int32":
            self.bounds[value.name] = bounds
        return value

    def _stays_zero(self, op: str, args: list[ir.Operand]) -> frozenset[str]:
        """The axes beyond whose ends all operands are zero, and the result is then."""
        values = [a for a in args if isinstance(a, ir.Value)]
        scaled = op == "mul" and all(isinstance(a, ir.Value | int) or math.isfinite(a) for a in args)
        if op not in _ZERO_OF_ZEROS or not (scaled or len(values) == len(args)):
            return frozenset()
        return frozenset.intersection(*(self.zero_filled.get(v.name, frozenset()) for v in values))

    def _bounds(self, op: str, args: list[ir.Operand]) -> tuple[int, int] | None:
        """Bounds of an integer operation on index values, where 32 bits hold operands and result; None: compute in 64 bits."""
        known = [self.bounds.get(a.name) if isinstance(a, ir.Value) else (whole(a), whole(a)) for a in args]
        if op not in _INT32_OPS or any(b is None or max(map(abs, b)) > _INT32 for b in known):
            return None
        ends = [_INT32_OPS[op](*point) for point in itertools.product(*(b for b in known if b is not None))]
        lo, hi = whole(min(ends)), whole(max(ends))
        return (lo, hi) if lo >= -_INT32 and hi <= _INT32 else None

    def _reciprocal(self, a: ir.Operand, b: ir.Operand) -> bool:
        """Whether to divide once and multiply often: the divisor varies less than what it divides."""
        if self.exact or self.memory.compares or not (isinstance(a, ir.Value) and isinstance(b, ir.Value)):
            return False
        return len(b.axes) < len(a.axes) or self.level[b.name] < self.level[a.name]

    def cast(self, v: ir.Operand, compute: str | None) -> ir.Operand:
        """`v` in a compute dtype; None: in the one that its own dtype is computed in. Numbers are cast where they are used."""
        if not isinstance(v, ir.Value):
            if compute is not None and DTYPES[compute].kind == "float" and not isinstance(v, float):
                return v if is_traced(v) else float(v)  # a size that others may stand for is an argument
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
        dtype = dtype or self.compute(typed)
        value, new = self.make(("full", type(fill), fill if is_traced(fill) else str(fill), axes, dtype), "number", axes, typed, dtype, 0)
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
        value, new = self.make(
            ("load", buffer.name, subscripts), access.tensor, axes, (self.memory.dtypes[access.tensor], category), buffer.dtype, level
        )
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
            self.buffers[tensor] = ir.Buffer(
                name,
                tensor,
                memory.shapes[tensor],
                memory.strides[tensor],
                memory.storage(tensor),
                memory.by_value and tensor in memory.numbers,
            )
        return self.buffers[tensor]

    def _buffer_name(self, tensor: str) -> str:
        base = identifier(f"d{tensor[:-5]}" if tensor.endswith(".grad") else tensor)
        name, number = base, 1
        while name in self.names or name in _RESERVED:
            name = f"{base}_{number}"
            number += 1
        self.names.add(name)
        return name

    def _new(self, base: str, axes: tuple[str, ...], dtype: str, typed: Typed) -> ir.Value:
        """A value made in the innermost scope, outside of value numbering."""
        value = ir.Value(self.fresh(base), axes, dtype)
        self.typed[value.name] = typed
        self.level[value.name] = len(self.scopes) - 1
        self.values[value.name] = value
        return value

    def reduce(self, s: Statement) -> ir.Value:
        """The reduced value of a statement."""
        raise NotImplementedError
