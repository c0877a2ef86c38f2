"""Tensor descriptors of a Triton kernel as text: they are made once, before the grid's tiles, and named `A_tiles`."""

from __future__ import annotations

from collections.abc import Iterator

from lowering import tile_ir as ir
from lowering.descriptors import descriptor, walked_as_one
from lowering.triton_addresses import Addresses, compound
from tdsl.affine import linear
from tdsl.ir import Expr, Index, free_indices


class Descriptors(Addresses):
    """Spells loads and stores that go through descriptors."""

    def __init__(self, kernel: ir.Kernel):
        super().__init__(kernel)
        self.made: dict[tuple[ir.Descriptor, str], str] = {}

    def of(self, op: ir.Load | ir.Store) -> ir.Descriptor | None:
        """The descriptor that an operation goes through, where it is decided that it does."""
        found = descriptor(op, self.kernel) if self.kernel.descriptors else None
        return found if found in self.kernel.descriptors else None

    def described_load(self, op: ir.Load, found: ir.Descriptor, axes: tuple[str, ...]) -> str:
        """axes: those of the loaded tile, in the order in which it is wanted."""
        text = f"{self._named(found)}.load([{self._starts(op.buffer, op.subscripts, found)}])"
        if len(found.axes) < len(found.sides):
            text += f".reshape({', '.join(self.tile(self.kernel.axis(name)) for name in found.axes)})"
        return text if found.axes == axes else f"tl.trans({text})"

    def described_store(self, op: ir.Store, found: ir.Descriptor, value: str) -> str:
        value = value if found.axes == op.axes else f"tl.trans({value})"
        if len(found.axes) < len(found.sides):
            value = f"({value})" if compound(value) else value
            value += f".reshape({self._block(found)})"
        return f"{self._named(found)}.store([{self._starts(op.buffer, op.subscripts, found)}], {value})"

    def descriptor_lines(self) -> Iterator[str]:
        """Their definitions, at the top of the kernel."""
        if self.made:
            yield "    # Descriptors: tensors and their rows begin at multiples of 16 bytes; triton.set_allocator gives what they need of memory."
        for (found, parted), name in self.made.items():
            self.parted = parted
            shape, strides = [], []
            for side in found.sides:
                walked = side.axis and not side.shifted
                along = self.extent(self.kernel.axis(side.axis)) if walked else " * ".join(self._size(found.buffer, d) for d in side.dims)
                shape.append(along)
                strides.append("1" if found.buffer.strides[side.dims[-1]] == 1 else self.stride(found.buffer, side.dims[-1]))
            block = f"[{self._block(found)}]"
            yield f"    {name} = tl.make_tensor_descriptor({found.buffer.name}, [{', '.join(shape)}], [{', '.join(strides)}], {block})"
        self.parted = ""

    def _named(self, found: ir.Descriptor) -> str:
        """The descriptor's variable; the tiles of a part are shorter, and need one of their own."""
        parted = self.parted if self.parted in found.axes else ""
        if (found, parted) not in self.made:
            base = f"{found.buffer.name}_{'parts' if parted else 'tiles'}"
            taken = {*self.made.values()}
            number = next(n for n in range(len(taken) + 1) if (f"{base}_{n}" if n else base) not in taken)
            self.made[found, parted] = f"{base}_{number}" if number else base
        return self.made[found, parted]

    def _block(self, found: ir.Descriptor) -> str:
        return ", ".join(self.tile(self.kernel.axis(side.axis)) if side.axis else "1" for side in found.sides)

    def _size(self, buffer: ir.Buffer, d: int) -> str:
        name = f"{buffer.name}_size_{d}"
        self.sizes[name] = buffer.shape[d]
        return name

    def _starts(self, buffer: ir.Buffer, subscripts: tuple[Expr, ...], found: ir.Descriptor) -> str:
        """Where the tile begins, along each side."""
        together = walked_as_one(self.kernel, buffer, subscripts)
        starts = []
        for side in found.sides:
            e = subscripts[side.dims[-1]]
            if side.shifted:
                (walked,) = (i for i, _ in self.kernel.axis(side.axis).indices)
                e = (linear(e) - linear(Index(walked))).expr()
            start = [] if side.axis and not side.shifted else [self._number(e, together.get(side.dims[-1]))]
            starts.append(" + ".join([*start, *([self.start(self.kernel.axis(side.axis))] if side.axis else [])]))
        return ", ".join(starts)

    def _number(self, e: Expr, together: tuple[ir.Axis, tuple[int, ...]] | None) -> str:
        """A subscript that is one number for the whole tile, in 32 bits."""
        if together is not None:
            self.used.add(together[0].name)
            return together[0].name
        text = self.integer(e, ())
        wide = any(self.values[i].dtype == "int64" for i in free_indices(e) if i in self.values)
        return f"({text}).to(tl.int32)" if wide else text

    def start(self, axis: ir.Axis) -> str:
        """The first index of this program's tile along an axis."""
        if axis.role == "whole":
            return "0"
        if axis.role == "loop":
            return f"{axis.name}_start"
        start = f"tile_{axis.name} * {self.tiles_name(axis)}"
        return f"{start} + part * ({self.tile(axis)})" if self.parted == axis.name else start

    def tiles_name(self, axis: ir.Axis) -> str:
        """The whole tile's length, while its parts are printed too."""
        self.tiles[f"TILE_{axis.name.upper()}"] = axis.tile
        return f"TILE_{axis.name.upper()}"
