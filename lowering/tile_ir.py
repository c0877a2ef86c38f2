"""The tile IR: what one kernel does, as operations on tiles whose axes have names.

A kernel owns some axes. An axis stands for one loop index, or for several that are walked as one (their values are then
decoded by division). Every program of the grid takes one tile of each `grid` axis; a `loop` axis is walked by a `For`;
a `whole` axis is one tile. A value has the axes that it varies along, always in the order of `Kernel.axes`: broadcasting
is by name, so no operation says where a dimension goes.

All decisions (tiles, masks, orders, casts, where a product becomes a `Dot`) are made when a kernel is built, in
tiling.py; printers only spell. Tiles may reach beyond an axis' extent where the axis is `masked`: lanes beyond it hold
anything until a `Mask` gives them a value; stores leave them out. A printer whose tiles end exactly prints no masks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

from tdsl.ir import Expr

# The most steps of a loop that are written out.
UNROLL = 8


@dataclass(frozen=True, slots=True)
class Axis:
    """indices: (name, extent) of the loop indices, outermost first. tile: elements per step. role: "grid", "loop" or "whole"."""

    name: str
    indices: tuple[tuple[str, int], ...]
    tile: int
    role: str
    masked: bool

    @property
    def extent(self) -> int:
        """The number of elements along the axis."""
        total = 1
        for _, extent in self.indices:
            total *= extent
        return total

    @property
    def scalar(self) -> bool:
        """A grid or loop axis of tile 1: its index is a number, and no value has the axis."""
        return self.tile == 1 and self.role != "whole"


@dataclass(frozen=True, slots=True)
class Value:
    """The result of an operation. dtype: an element type of ops.DTYPES, the one it is computed in."""

    name: str
    axes: tuple[str, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Buffer:
    """A tensor in memory. name: in the kernel; tensor: in the program. number: a Python number passed by value."""

    name: str
    tensor: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    number: bool = False


Operand: TypeAlias = Value | bool | int | float


@dataclass(frozen=True, slots=True)
class IndexOf:
    """The value of a loop index, or of an integer expression of loop indices."""

    dst: Value
    expr: Expr


@dataclass(frozen=True, slots=True)
class Load:
    """subscripts: integer expressions whose names are loop indices and integer values; Pad and Clamp stand around whole ones."""

    dst: Value
    buffer: Buffer
    subscripts: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class Elementwise:
    """op: a row of ops.OPS, applied to operands that broadcast by name."""

    dst: Value
    op: str
    args: tuple[Operand, ...]


@dataclass(frozen=True, slots=True)
class Dot:
    """dst = sum over `contract` of lhs * rhs (+ acc), accumulated in dst's dtype; `batch` axes are in both operands."""

    dst: Value
    lhs: Value
    rhs: Value
    acc: Value | None
    batch: tuple[str, ...]
    contract: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Fold:
    """dst = reduction (of ops.REDUCTIONS) of src along `axes`."""

    dst: Value
    src: Value
    reduction: str
    axes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Mask:
    """src, with `fill` in the lanes beyond the extents of `axes`."""

    dst: Value
    src: Value
    axes: tuple[str, ...]
    fill: float | int | bool


@dataclass(frozen=True, slots=True)
class Full:
    """A tile of one number: where a carried value starts."""

    dst: Value
    fill: float | int | bool


@dataclass(frozen=True, slots=True)
class Assign:
    """The carried value `dst` takes the value `src` for the next step of the loop."""

    dst: Value
    src: Value


@dataclass(frozen=True, slots=True)
class For:
    """Walks a loop axis tile by tile.

    lo, hi: where given, only tiles that meet [lo, hi) matter, by integer expressions of `first(i)` and `last(i)`, the ends of
    this program's tile of a grid index i. A printer may visit more tiles than those. ahead: for how many steps to come a GPU is told
    to load what a loop without products reads; 0: nothing is said.
    """

    axis: Axis
    body: tuple[Operation, ...]
    lo: Expr | None = None
    hi: Expr | None = None
    ahead: int = 0

    @property
    def unrolled(self) -> bool:
        """Whether its few steps are written out. Only loops with no loop inside have their loads copied ahead: a sum over three
        coordinates would keep the loop around it from that."""
        return self.axis.scalar and self.axis.extent <= UNROLL and not self.ahead and not any(isinstance(op, For | Dot) for op in self.body)


@dataclass(frozen=True, slots=True)
class Store:
    """mode: "set", or "add", "max", "min" into what stands there, safe against other programs that do the same."""

    buffer: Buffer
    subscripts: tuple[Expr, ...]
    src: Value
    axes: tuple[str, ...]
    mode: str = "set"


@dataclass(frozen=True, slots=True)
class Side:
    """One dimension of a view of a tensor. axis: whose tile is taken along it; "": one element. dims: of the buffer, walked as one.
    shifted: the tile begins at some number beyond the axis' own place."""

    axis: str
    dims: tuple[int, ...]
    shifted: bool = False


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A view of a tensor whose tiles are moved whole, by hardware that knows where the tensor ends. sides: the contiguous one last."""

    buffer: Buffer
    sides: tuple[Side, ...]

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes of a tile, in the order in which it lies in memory."""
        return tuple(s.axis for s in self.sides if s.axis)


@dataclass(frozen=True, slots=True)
class Parts:
    """What follows `start` operations of a kernel's body is done for `count` parts of the tile along `axis`, one after the other."""

    axis: str
    count: int
    start: int


Operation: TypeAlias = IndexOf | Load | Elementwise | Dot | Fold | Mask | Full | Assign | For | Store


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel. notation: the statements it runs. group: grid tiles of the first axis that are walked together.

    wide: offsets need 64 bits. num_warps and num_stages are the launch configuration of a GPU. max_registers: per thread, where the
    assembler is told. fused: a multiplication and an addition may be one operation, which is rounded once. descriptors: what loads and
    stores go through that can. walkers: programs that walk all tiles of the grid in turn; 0: each tile has a program of its own.
    parts: how the end of the body is cut. unfit: why no configuration fits the chip, where this one is used all the same.
    """

    name: str
    notation: str
    axes: tuple[Axis, ...]
    buffers: tuple[Buffer, ...]
    body: tuple[Operation, ...]
    num_warps: int = 4
    num_stages: int = 2
    group: int = 1
    wide: bool = False
    input_precision: str = "ieee"
    max_registers: int | None = None
    fused: bool = True
    descriptors: tuple[Descriptor, ...] = ()
    walkers: int = 0
    parts: Parts | None = None
    unfit: str = ""

    def axis(self, name: str) -> Axis:
        """The axis of that name."""
        return next(a for a in self.axes if a.name == name)

    def axis_of(self, index: str) -> Axis:
        """The axis that an index belongs to."""
        return next(a for a in self.axes if any(name == index for name, _ in a.indices))

    @property
    def programs(self) -> int:
        """How many programs are launched."""
        return min(self.walkers, self.grid_tiles) if self.walkers else self.grid_tiles

    @property
    def grid_tiles(self) -> int:
        """How many tiles the grid has."""
        total = 1
        for axis in self.axes:
            if axis.role == "grid":
                total *= -(-axis.extent // axis.tile)
        return total

    def __str__(self) -> str:
        lines = [f"kernel {self.name}:"]
        for a in self.axes:
            indices = " ".join(f"{name}:{extent}" for name, extent in a.indices)
            lines.append(f"  {a.role} {a.name} tile {a.tile}{' masked' if a.masked else ''} ({indices})")
        if self.walkers:
            lines.append(f"  {self.programs} programs walk {self.grid_tiles} tiles")
        if self.descriptors:
            lines.append(f"  by descriptors: {', '.join(dict.fromkeys(d.buffer.name for d in self.descriptors))}")
        start = len(self.body) if self.parts is None else self.parts.start
        lines += _lines(self.body[:start], "  ")
        if self.parts is not None:
            lines += [f"  for {self.parts.count} parts of {self.parts.axis}:", *_lines(self.body[start:], "    ")]
        return "\n".join(lines)


def operations(body: tuple[Operation, ...]) -> Iterator[Operation]:
    """Every operation, those in loops too."""
    for op in body:
        yield op
        if isinstance(op, For):
            yield from operations(op.body)


def uses(op: Operation) -> Iterator[Value]:
    """The values that an operation reads, those in the body of a loop not among them."""
    match op:
        case Elementwise():
            yield from (a for a in op.args if isinstance(a, Value))
        case Dot():
            yield from (v for v in (op.lhs, op.rhs, op.acc) if v is not None)
        case Fold() | Mask() | Store():
            yield op.src
        case Assign():
            yield from (op.src, op.dst)


def without(body: tuple[Operation, ...], names: set[str]) -> tuple[Operation, ...]:
    """The operations but those that make values of some names which nothing reads."""
    read = {v.name for op in operations(body) for v in uses(op)}

    def kept(ops: tuple[Operation, ...]) -> tuple[Operation, ...]:
        left = (op for op in ops if not (isinstance(op, Elementwise) and op.dst.name in names - read))
        return tuple(replace(op, body=kept(op.body)) if isinstance(op, For) else op for op in left)

    return kept(body) if names else body


def _lines(body: tuple[Operation, ...], indent: str) -> Iterator[str]:
    from tdsl.printer import print_expr

    def name(v: Operand) -> str:
        return f"{v.name}[{','.join(v.axes)}]" if isinstance(v, Value) else repr(v)

    for op in body:
        match op:
            case For():
                limits = "".join(f" {word} {print_expr(e)}" for word, e in (("from", op.lo), ("to", op.hi)) if e is not None)
                yield f"{indent}for {op.axis.name}{limits}:"
                yield from _lines(op.body, indent + "  ")
            case Load():
                yield f"{indent}{name(op.dst)} = load {op.buffer.name}[{', '.join(map(print_expr, op.subscripts))}]"
            case Store():
                yield f"{indent}store {op.mode} {op.buffer.name}[{', '.join(map(print_expr, op.subscripts))}] = {name(op.src)}"
            case IndexOf():
                yield f"{indent}{name(op.dst)} = index {print_expr(op.expr)}"
            case Elementwise():
                yield f"{indent}{name(op.dst)} = {op.op}({', '.join(map(name, op.args))})"
            case Dot():
                plus = f" + {name(op.acc)}" if op.acc else ""
                yield f"{indent}{name(op.dst)} = dot({name(op.lhs)}, {name(op.rhs)}){plus}"
            case Fold():
                yield f"{indent}{name(op.dst)} = {op.reduction} of {name(op.src)} along {', '.join(op.axes)}"
            case Mask():
                yield f"{indent}{name(op.dst)} = mask {name(op.src)} along {', '.join(op.axes)} with {op.fill}"
            case Full():
                yield f"{indent}{name(op.dst)} = full {op.fill}"
            case Assign():
                yield f"{indent}{op.dst.name} <- {name(op.src)}"
