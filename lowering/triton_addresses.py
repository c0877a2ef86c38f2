"""Names, sizes, addresses and masks of a Triton kernel, as text: what the printers of its statements and of its grid have in common."""

from __future__ import annotations

import math

from lowering import tile_ir as ir
from lowering.addresses import with_axes
from lowering.descriptors import walked_as_one
from tdsl.ir import Call, Clamp, Const, Expr, Index, Pad
from tdsl.ops import DTYPES, OPS
from tdsl.traced import is_traced, whole


class Addresses:
    """Spells one kernel's integers. What it has spelled, the kernel takes as arguments: `sizes`, `strides`, `tiles`.

    used: indices that occur in expressions. lanes: axes whose tile of indices occurs. pointed: what addresses and masks are made of.
    parted: the axis whose tile is cut while its parts are printed.
    """

    def __init__(self, kernel: ir.Kernel):
        self.kernel = kernel
        self.sizes: dict[str, int] = {}
        self.counts: dict[int, str] = {}  # names of sizes that the kernel counts with
        self.strides: dict[str, int] = {}
        self.tiles: dict[str, int] = {}
        self.used: set[str] = set()
        self.lanes: set[str] = set()
        self.pointed: set[str] = set()
        self.parted = ""
        self.values: dict[str, ir.Value] = {}
        self.preludes: dict[str, None] = {}
        self.alias: dict[str, str] = {}

    def size(self, index: str) -> str:
        extent = next(n for a in self.kernel.axes for i, n in a.indices if i == index)
        self.sizes[f"size_{index}"] = extent
        return f"size_{index}"

    def extent(self, axis: ir.Axis) -> str:
        return " * ".join(self.size(i) for i, _ in axis.indices)

    def tile(self, axis: ir.Axis) -> str:
        """The length of an axis' tile: a constant of the kernel, or a part of it."""
        name = f"TILE_{axis.name.upper()}"
        self.tiles[name] = axis.tile
        return f"{name} // {self.kernel.parts.count}" if self.kernel.parts and self.parted == axis.name else name

    # -- memory ---------------------------------------------------------------------------------------------------------

    def address(self, buffer: ir.Buffer, subscripts: tuple[Expr, ...], axes: tuple[str, ...]) -> str:
        terms = [buffer.name]
        together = walked_as_one(self.kernel, buffer, subscripts)
        for d, e in enumerate(subscripts):
            if d in together:
                axis, dims = together[d]
                if d == dims[-1]:
                    self.used.add(axis.name)
                    self.lanes.add(axis.name)
                    terms.append(self._times(with_axes(axis.name, (axis.name,) if not axis.scalar else (), axes), buffer, d))
            elif e != Const(0):
                terms.append(self._times(self.bounded(buffer, d, e, axes), buffer, d))
        return " + ".join(terms)

    def _times(self, text: str, buffer: ir.Buffer, d: int) -> str:
        if buffer.strides[d] == 1:
            return f"({text})" if compound(text) else text
        name = self.stride(buffer, d)
        self.pointed.add(name)
        return f"({text}) * {name}" if compound(text) else f"{text} * {name}"

    def stride(self, buffer: ir.Buffer, d: int) -> str:
        name = f"{buffer.name}_stride_{d}"
        self.strides[name] = buffer.strides[d]
        return name

    def bounded(self, buffer: ir.Buffer, d: int, e: Expr, axes: tuple[str, ...]) -> str:
        if isinstance(e, Clamp):
            return f"tl.minimum(tl.maximum({self.integer(e.value, axes)}, 0), {self.dimension(buffer, d)} - 1)"
        return self.integer(e.value if isinstance(e, Pad) else e, axes)

    def dimension(self, buffer: ir.Buffer, d: int) -> str:
        name = f"{buffer.name}_size_{d}"
        self.sizes[name] = buffer.shape[d]
        self.pointed.add(name)
        return name

    def mask(self, buffer: ir.Buffer, subscripts: tuple[Expr, ...], axes: tuple[str, ...]) -> str:
        terms = []
        inside = self.inside(axes, axes)
        if inside:
            terms.append(inside)
        for d, e in enumerate(subscripts):
            if isinstance(e, Pad):
                text = self.integer(e.value, axes)
                terms.append(f"({text} >= 0) & ({text} < {self.dimension(buffer, d)})")
        return " & ".join(terms)

    def inside(self, axes: tuple[str, ...], shape: tuple[str, ...]) -> str:
        """The lanes that are within the extents of the masked axes among `axes`."""
        found = [a for a in self.kernel.axes if a.name in axes and a.masked and not a.scalar]
        self.lanes |= {a.name for a in found}
        self.pointed |= {f"size_{i}" for a in found for i, _ in a.indices}
        return " & ".join(f"({with_axes(a.name, (a.name,), shape)} < {self.extent(a)})" for a in found)

    # -- names ----------------------------------------------------------------------------------------------------------

    def name(self, v: ir.Value, axes: tuple[str, ...]) -> str:
        return with_axes(self.alias.get(v.name, v.name), v.axes, axes)

    def integer(self, e: Expr, axes: tuple[str, ...]) -> str:
        """An integer expression of indices and values, broadcast to `axes`."""
        text = self._integer(e, axes)
        return text[1:-1] if enclosed(text) else text

    def _integer(self, e: Expr, axes: tuple[str, ...]) -> str:
        match e:
            case Const(value=value):
                return repr(int(value))
            case Index(name=name):
                if name in self.values:
                    return self.name(self.values[name], axes)
                self.used.add(name)
                axis = self.kernel.axis_of(name)
                self.lanes.add(axis.name)
                return with_axes(name, () if axis.scalar else (axis.name,), axes)
            case Call(op=op, args=args):
                if OPS[op].triton_def:
                    self.preludes.update(dict.fromkeys(definitions(OPS[op].triton_def)))
                return OPS[op].triton.format(*(self._integer(a, axes) for a in args))
        raise AssertionError(e)

    def number(self, value: float | int | bool) -> str:
        if isinstance(value, float) and (math.isinf(value) or math.isnan(value)):
            return f'float("{value}")'
        if is_traced(value):  # an argument, as the sizes of indices are
            name = self.counts.setdefault(whole(value), f"size_{len(self.counts)}")
            self.sizes[name] = whole(value)
            return name
        return repr(value)

    def dtype(self, name: str) -> str:
        return f"tl.{DTYPES[name].triton}"


def definitions(text: str) -> list[str]:
    """The helper functions of one row, each by itself, so that two rows that share one print it once."""
    return [f"\n@triton.jit\n{part.strip()}\n" for part in text.split("@triton.jit") if part.strip()]


def widened(text: str, wide: str) -> str:
    return f"({text}){wide}" if wide else text


def compound(text: str) -> bool:
    """Whether an operator stands outside of all brackets."""
    depth = 0
    for n, c in enumerate(text):
        depth += (c in "([") - (c in ")]")
        if depth == 0 and c == " " and text[n + 1 : n + 2] in "+-*/%&|<>=":
            return True
    return False


def enclosed(text: str) -> bool:
    """Whether the first parenthesis closes at the very end."""
    if not text.startswith("("):
        return False
    depth = 0
    for n, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0:
            return n == len(text) - 1
    return False
