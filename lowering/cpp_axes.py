"""Names, sizes and places: how C++ calls what the tile IR names, where a tile starts and ends, where its elements lie in local arrays."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lowering import tile_ir as ir
from lowering.addresses import axis_step
from lowering.cpp_prelude import KEYWORDS
from lowering.matrices import matrices
from lowering.nests import Nests, nests
from lowering.reuse import reuse
from tdsl.ir import Expr, Index, free_indices

# Sizes and strides up to this stand in the code as numbers.
SMALL = 16
# Tiles up to this many elements have a length that the compiler knows: the last tile moves back where it would end outside.
FIXED = 1024


class Axes:
    """A kernel's names and numbers. integers: the sizes and strides that are arguments, by name."""

    def __init__(self, kernel: ir.Kernel, overlap: frozenset[str]):
        self.kernel = kernel
        self.overlap = overlap
        self.plan: Nests = nests(kernel)
        self.same = dict(self.plan.same)  # values that live in another one's array
        self.integers: dict[str, int] = {}
        self.counts: dict[int, str] = {}  # sizes that the kernel counts with, by value
        self.calls: set[str] = set()
        self.stored_types: dict[str, str] = {}  # of local arrays that are wider than their value
        self.arrays = {v.name: v for v in self.plan.arrays}
        self.here: set[str] = set()  # values that the nest being printed makes itself
        self.open: set[str] = set()  # axes of the loops around
        self.makers = {op.dst.name: op for op in ir.operations(kernel.body) if not isinstance(op, ir.For | ir.Store | ir.Assign)}
        self.values = {name: op.dst for name, op in self.makers.items()}
        self.multiplies = any(isinstance(op, ir.Dot) and matrices(op, kernel) for op in ir.operations(kernel.body))
        if self.multiplies:
            self.same |= reuse(self.plan, self.values)
        self.used = (
            {b.name for b in kernel.buffers}
            | set(self.values)
            | {a.name for a in kernel.axes}
            | {i for a in kernel.axes for i, _ in a.indices}
        )
        self.names: dict[str, str] = {}
        self.colliding = frozenset(a.name for op in ir.operations(kernel.body) if isinstance(op, ir.Store) for a in self.unsafe(op))
        self.shifts = all(op.mode == "set" for op in ir.operations(kernel.body) if isinstance(op, ir.Store))

    def c(self, name: str) -> str:
        """A name of the tile IR in C++; of a value that lives in another one's array that one's."""
        while name in self.same:
            name = self.same[name]
        return self.named(name, KEYWORDS)

    def helper(self, name: str) -> str:
        """A name of this printer's own, apart from those of the tile IR."""
        return self.named(f"{name} ", self.used)

    def once(self, name: str) -> str:
        """A name of this printer's own that no other call gets."""
        number = sum(key.startswith(f"{name} #") for key in self.names)
        return self.named(f"{name} #{number}", self.used)

    def named(self, key: str, taken: frozenset[str] | set[str]) -> str:
        if key not in self.names:
            fresh = key.split(" ")[0]
            while fresh in taken or fresh in self.names.values():
                fresh += "_"
            self.names[key] = fresh
        return self.names[key]

    def integer(self, name: str, value: int) -> str:
        if 0 <= value <= SMALL:
            return str(value)
        name = self.helper(name)
        self.integers[name] = value
        return name

    def extent(self, axis: ir.Axis) -> str:
        return self.integer(f"size_{axis.name}", axis.extent)

    def stride(self, b: ir.Buffer, d: int) -> str:
        return self.integer(f"{b.name}_stride_{d}", b.strides[d])

    def capacity(self, axis_name: str) -> int:
        """Elements that a local array has along an axis: of a whole axis the next power of two, so that few sizes differ. A matrix has
        a line of cache more, so that neighbours of a column do not push each other out."""
        axis = self.kernel.axis(axis_name)
        if axis.role != "whole":
            room = axis.tile
        else:
            room = max(1, axis.extent) if axis.extent <= SMALL else 1 << (axis.extent - 1).bit_length()
        return room + SMALL if self.multiplies and room > SMALL else room

    def span(self, axis_name: str) -> tuple[str, str]:
        """The first element of an axis in this program and the one after its last."""
        axis = self.kernel.axis(axis_name)
        if axis.role == "whole":
            return "0", self.extent(axis)
        if axis.role == "loop" and axis.name not in self.open:
            return "0", str(axis.tile)  # the lanes of what was carried through the loop
        start = self.helper(f"{axis.name}_start")
        return start, f"{start} + {axis.tile}" if self.fixed(axis) else self.helper(f"{axis.name}_stop")

    def position(self, axis_name: str) -> str:
        """The place of the current element of an axis in local arrays."""
        start, _ = self.span(axis_name)
        return self.c(axis_name) if start == "0" else f"({self.c(axis_name)} - {start})"

    def element(self, v: ir.Value) -> str:
        """The current element of a local array."""
        parts = []
        for n, a in enumerate(v.axes):
            below = math.prod(self.capacity(b) for b in v.axes[n + 1 :])
            parts.append(self.position(a) if below == 1 else f"{self.position(a)} * {below}")
        return f"{self.c(v.name)}[{' + '.join(parts)}]"

    def whole_array(self, v: ir.Value) -> str:
        """The head of a loop over all elements of a local array."""
        return f"int lane = 0; lane < {math.prod(self.capacity(a) for a in v.axes)}; ++lane"

    def tile_name(self, axis: ir.Axis) -> str:
        return self.c(axis.name) if axis.scalar else self.helper(f"{axis.name}_tile")

    def count(self, axis: ir.Axis) -> str:
        """How many tiles an axis has."""
        if axis.tile == 1:
            return self.extent(axis)
        return str(-(-axis.extent // axis.tile)) if axis.extent <= SMALL else f"(({self.extent(axis)} + {axis.tile - 1}) / {axis.tile})"

    def fixed(self, axis: ir.Axis) -> bool:
        """Whether every tile of a grid axis is full: the last one may then do some elements again."""
        return axis.role == "grid" and self.shifts and axis.tile <= FIXED

    def place(self, axis: ir.Axis) -> Iterator[str]:
        """Where a grid axis' tile starts and ends, and the indices of an axis of tile 1."""
        if axis.scalar:
            yield from self.decode(axis)
            return
        start, stop, tile, extent = (
            self.helper(f"{axis.name}_start"),
            self.helper(f"{axis.name}_stop"),
            self.tile_name(axis),
            self.extent(axis),
        )
        if self.fixed(axis):
            yield f"const i64 {start} = {tile} * {axis.tile} < {extent} - {axis.tile} ? {tile} * {axis.tile} : {extent} - {axis.tile};"
            return
        yield f"const i64 {start} = {tile} * {axis.tile};"
        yield f"const i64 {stop} = {start} + {axis.tile} < {extent} ? {start} + {axis.tile} : {extent};"

    def decode(self, axis: ir.Axis) -> Iterator[str]:
        """The indices of an axis that stands for several, by division, where they are used by themselves."""
        if len(axis.indices) == 1:
            return
        below = ""
        for n, (index, size) in reversed(list(enumerate(axis.indices))):
            extent = self.integer(f"size_{index}", size)
            if index in self._alone():
                rest = f"{self.c(axis.name)} / ({below})" if below else self.c(axis.name)
                yield f"const i64 {self.c(index)} = {rest}" + (f" % {extent};" if n else ";")
            below = f"{extent} * {below}" if below else extent

    def _alone(self) -> set[str]:
        """The indices of axes of several that some operation needs by themselves."""
        found: set[str] = set()
        for op in ir.operations(self.kernel.body):
            if isinstance(op, ir.IndexOf):
                found |= set(free_indices(op.expr))
            elif isinstance(op, ir.Load | ir.Store):
                for axis in self.kernel.axes:
                    if len(axis.indices) > 1 and not self._walks(op.buffer, op.subscripts, axis):
                        found |= {i for e in op.subscripts for i in free_indices(e)}
        return found

    def _walks(self, buffer: ir.Buffer, subscripts: tuple[Expr, ...], axis: ir.Axis) -> bool:
        """Whether an access goes along a whole axis of several indices by one stride."""
        plain = [e.name for e in subscripts if isinstance(e, Index)]
        inside = [i for e in subscripts for i in free_indices(e)]
        if any(inside.count(i) != plain.count(i) or plain.count(i) > 1 for i, _ in axis.indices):
            return False
        return axis_step(subscripts, buffer.strides, axis.indices, self.values) is not None

    def unsafe(self, op: ir.Store) -> list[ir.Axis]:
        """The axes along which a store may hit one element twice, so that their order must be one after the other."""
        if op.mode == "set":
            return []
        alone = [e.name for e in op.subscripts if isinstance(e, Index) and e.name not in self.values]
        return [a for a in self.kernel.axes if a.name in op.axes or a.scalar if not all(i in alone for i, _ in a.indices)]
