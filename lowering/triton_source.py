"""Prints the tile IR as Triton source that a person could paste into a project of their own. It decides nothing.

Names: a tensor keeps its own, its strides are `A_stride_0`, ..; an index is the tile of its values, its extent `size_i`,
the tile's length `TILE_I`. A stride that is 1 and a dimension of size 1 are left out of the address.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

from lowering import tile_ir as ir
from lowering.kernel_source import Arg, KernelSource
from tdsl.errors import Unsupported
from tdsl.ir import Call, Clamp, Const, Expr, Index, Pad, free_indices
from tdsl.ops import DTYPES, OPERATORS, OPS, REDUCTIONS

_HEADER = "import triton\nimport triton.language as tl\n"
_COMBINE = """
@triton.jit
def {name}(a, b):
    return {body}
"""
_INT32 = 2**31 - 1
# Bytes of the smallest asynchronous copy.
_COPY = 4


def triton_source(kernel: ir.Kernel) -> tuple[KernelSource, dict[str, int]]:
    """The Triton module of one kernel, with its arguments in call order, and the values of its integers (sizes and strides).

    Source of the conventions: the Triton tutorials 03 and 06.
    """
    printer = _Printer(kernel)
    return printer.run(), {**printer.sizes, **printer.strides}


class _Printer:
    def __init__(self, kernel: ir.Kernel):
        self.kernel = kernel
        self.sizes: dict[str, int] = {}
        self.strides: dict[str, int] = {}
        self.tiles: dict[str, int] = {}
        self.used: set[str] = set()
        self.values: dict[str, ir.Value] = {}
        self.preludes: dict[str, None] = {}
        self.alias: dict[str, str] = {}
        self.turned = _turned(kernel)

    def run(self) -> KernelSource:
        body = list(self.block(self.kernel.body, "    "))
        top = [*self.grid(), *(line for a in self.kernel.axes if a.role != "loop" for line in self.index_lines(a, "    "))]
        args = [self.pointer(b) for b in self.kernel.buffers]
        args += [Arg(name, "int", "int32" if value <= _INT32 else "int64") for name, value in (*self.sizes.items(), *self.strides.items())]
        args += [Arg(name, "constexpr", value=value) for name, value in self.tiles.items()]
        top = [*self.multiples(), *top]
        notation = "\n    ".join(self.kernel.notation.splitlines())
        quoted = f'    """{notation}"""' if "\n" not in notation else f'    """\n    {notation}\n    """'
        signature = ", ".join(self.parameter(a) for a in args)
        lines = ["@triton.jit", f"def {self.kernel.name}({signature}):", quoted, *top, *body]
        source = "\n\n\n".join([_HEADER.strip(), *(text.strip() for text in self.preludes), "\n".join(lines)]) + "\n"
        k = self.kernel
        return KernelSource(k.name, source, tuple(args), k.num_warps, k.num_stages, k.max_registers, k.fused)

    def multiples(self) -> Iterator[str]:
        """Tells the compiler what integers are multiples of: of 16 it sees by itself, and without any it loads element by element."""
        narrowest = min((DTYPES[b.dtype].bits // 8 for b in self.kernel.buffers if not b.number), default=8)
        for name, value in (*self.sizes.items(), *self.strides.items()):
            factor = math.gcd(value, 16)
            if 1 < factor < 16 and factor * narrowest >= _COPY:
                yield f"    {name} = {name} // {factor} * {factor}  # a multiple of {factor}: wide loads"

    def pointer(self, b: ir.Buffer) -> Arg:
        if not b.number:
            return Arg(b.name, "pointer", b.dtype)
        return Arg(b.name, "float", "float32") if DTYPES[b.dtype].kind == "float" else Arg(b.name, "int", "int64")

    def parameter(self, a: Arg) -> str:
        return (
            f"{a.name}: tl.constexpr"
            if a.kind == "constexpr"
            else f"{a.name}: tl.int64"
            if a.dtype == "int64" and a.kind == "int"
            else a.name
        )

    # -- the grid and the indices ---------------------------------------------------------------------------------------

    def size(self, index: str) -> str:
        extent = next(n for a in self.kernel.axes for i, n in a.indices if i == index)
        self.sizes[f"size_{index}"] = extent
        return f"size_{index}"

    def extent(self, axis: ir.Axis) -> str:
        return " * ".join(self.size(i) for i, _ in axis.indices)

    def tile(self, axis: ir.Axis) -> str:
        self.tiles[f"TILE_{axis.name.upper()}"] = axis.tile
        return f"TILE_{axis.name.upper()}"

    def grid(self) -> Iterator[str]:
        """Which tile of each grid axis this program computes; the last axis varies fastest."""
        axes = [a for a in self.kernel.axes if a.role == "grid"]
        if not axes:
            return
        yield "    pid = tl.program_id(0)"
        wide = ".to(tl.int64)" if self.kernel.wide else ""
        rest = "pid"
        if self.kernel.group > 1 and len(axes) >= 2 and not axes[-1].scalar and not axes[-2].scalar:
            m, n = axes[-2:]
            self.tiles["GROUP"] = self.kernel.group
            yield f"    tiles_{m.name} = tl.cdiv({self.extent(m)}, {self.tile(m)})"
            yield f"    tiles_{n.name} = tl.cdiv({self.extent(n)}, {self.tile(n)})"
            yield f"    # GROUP tiles along {m.name} share their tiles along {n.name} in the L2 cache."
            if len(axes) > 2:
                yield f"    inside = pid % (tiles_{m.name} * tiles_{n.name})"
                yield f"    rest = pid // (tiles_{m.name} * tiles_{n.name})"
            inside = "inside" if len(axes) > 2 else "pid"
            rest = "rest"
            yield f"    first = {inside} // (GROUP * tiles_{n.name}) * GROUP"
            yield f"    rows = tl.minimum(tiles_{m.name} - first, GROUP)"
            yield f"    tile_{m.name} = {_widened(f'first + {inside} % (GROUP * tiles_{n.name}) % rows', wide)}"
            yield f"    tile_{n.name} = {_widened(f'{inside} % (GROUP * tiles_{n.name}) // rows', wide)}"
            axes = axes[:-2]
        for position in range(len(axes) - 1, -1, -1):
            axis = axes[position]
            name = axis.name if axis.scalar and len(axis.indices) == 1 else f"tile_{axis.name}"
            if position == 0:
                yield f"    {name} = {rest}{wide}"
                continue
            count = self.extent(axis) if axis.tile == 1 else f"tl.cdiv({self.extent(axis)}, {self.tile(axis)})"
            count = count if count.isidentifier() or count.startswith("tl.") else f"({count})"
            yield f"    {name} = {_widened(f'{rest} % {count}', wide)}"
            yield f"    rest = {rest} // {count}"
            rest = "rest"

    def index_lines(self, axis: ir.Axis, indent: str, start: str | None = None) -> Iterator[str]:
        """The variables of one axis: its own, and its indices by division where it stands for several and they are used."""
        if start is None and axis.role == "grid":
            start = f"tile_{axis.name}" if axis.tile == 1 else f"tile_{axis.name} * {self.tile(axis)}"
        single = len(axis.indices) == 1
        if axis.scalar:
            if not single:
                yield f"{indent}{axis.name} = {start}"
        else:
            lanes = f"tl.arange(0, {self.tile(axis)})"
            yield f"{indent}{axis.name} = {lanes if start is None else f'{start} + {lanes}'}"
        if single:
            return
        below = ""
        for n, (index, _) in reversed(list(enumerate(axis.indices))):
            if index in self.used:
                rest = f"{axis.name} // ({below})" if below else axis.name
                yield f"{indent}{index} = {rest}" + (f" % {self.size(index)}" if n else "")
            below = f"{self.size(index)} * {below}" if below else self.size(index)

    # -- statements -----------------------------------------------------------------------------------------------------

    def block(self, body: tuple[ir.Operation, ...], indent: str) -> Iterator[str]:
        # A value that only feeds a carried one is printed under that name: `acc = tl.dot(a, b, acc)`.
        carried = {b.src.name: b.dst.name for a, b in pairwise(body) if isinstance(b, ir.Assign) and getattr(a, "dst", None) == b.src}
        for op in body:
            if isinstance(op, ir.Assign):
                if op.src.name not in carried:
                    yield f"{indent}{op.dst.name} = {self.name(op.src, op.src.axes)}"
                continue
            if isinstance(op, ir.For):
                axis = op.axis
                inner = list(self.block(op.body, indent + "    "))
                if axis.scalar:
                    name = axis.name if len(axis.indices) == 1 else f"{axis.name}_"
                    yield f"{indent}for {name} in {self.steps(op)}:"
                    yield from self.index_lines(axis, indent + "    ", name)
                else:
                    lo, hi = self.limits(op)
                    yield f"{indent}for {axis.name}_start in range({lo}, {hi}, {self.tile(axis)}):"
                    yield from self.index_lines(axis, indent + "    ", f"{axis.name}_start")
                yield from inner
                continue
            if isinstance(op, ir.Store):
                yield indent + self.store(op)
                continue
            self.values[op.dst.name] = op.dst
            if op.dst.name in carried:
                self.alias[op.dst.name] = carried[op.dst.name]
            yield f"{indent}{self.alias.get(op.dst.name, op.dst.name)} = {self.value(op)}"

    def steps(self, op: ir.For) -> str:
        if not op.unrolled:
            return f"range(0, {self.extent(op.axis)})"
        self.tiles[f"STEPS_{op.axis.name.upper()}"] = op.axis.extent
        return f"tl.static_range(STEPS_{op.axis.name.upper()})"

    def limits(self, op: ir.For) -> tuple[str, str]:
        """The first tile's start, a multiple of the tile, and the end of the loop."""
        lo, hi = "0", self.extent(op.axis)
        if op.lo is not None:
            tile = self.tile(op.axis)
            lo = f"tl.maximum({self.end(op.lo)}, 0) // {tile} * {tile}"
        if op.hi is not None:
            hi = f"tl.minimum({self.end(op.hi)}, {hi})"
        return lo, hi

    def end(self, e: Expr) -> str:
        """An integer expression of the ends of this program's tiles."""
        match e:
            case Const(value=value):
                return repr(int(value))
            case Index(name=name):
                word, index = name.rstrip(")").split("(")
                axis = self.kernel.axis_of(index)
                if axis.scalar:
                    self.used.add(index)
                    return index
                start = f"tile_{axis.name} * {self.tile(axis)}"
                return start if word == "first" else f"({start} + {self.tile(axis)} - 1)"
            case Call(op=op, args=args):
                name = {"minimum": "tl.minimum({0}, {1})", "maximum": "tl.maximum({0}, {1})"}.get(op, OPS[op].triton)
                return name.format(*(self.end(a) for a in args))
        raise AssertionError(e)

    def value(self, op: ir.Operation) -> str:
        match op:
            case ir.Load():
                return self.load(op)
            case ir.IndexOf():
                return self.integer(op.expr, op.dst.axes) + (".to(tl.int64)" if op.dst.dtype == "int64" else "")
            case ir.Elementwise():
                return self.elementwise(op)
            case ir.Full():
                shape = ", ".join(self.tile(self.kernel.axis(a)) for a in op.dst.axes)
                return f"tl.full(({shape}{',' if len(op.dst.axes) == 1 else ''}), {self.number(op.fill)}, {self.dtype(op.dst.dtype)})"
            case ir.Mask():
                inside = self.inside(op.axes, op.src.axes)
                return f"tl.where({inside}, {self.name(op.src, op.src.axes)}, {self.number(op.fill)})"
            case ir.Fold():
                return self.fold(op)
            case ir.Dot():
                return self.dot(op)
        raise AssertionError(op)

    def elementwise(self, op: ir.Elementwise) -> str:
        row = OPS[op.op]
        if row.triton_def:
            self.preludes.update(dict.fromkeys(_definitions(row.triton_def)))
        infix = op.op in OPERATORS
        double = not infix and any(isinstance(a, ir.Value) and a.dtype == "float64" for a in op.args)
        args = []
        for a in op.args:
            text = self.name(a, op.dst.axes) if isinstance(a, ir.Value) else self.number(a)
            args.append(f"tl.full((), {text}, tl.float64)" if double and isinstance(a, float) else text)
        text = row.triton.format(*args)
        return text[1:-1] if infix and _enclosed(text) else text

    def fold(self, op: ir.Fold) -> str:
        text = self.name(op.src, op.src.axes)
        axes = list(op.src.axes)
        for axis in reversed(op.axes):
            position = axes.index(axis)
            axes.pop(position)
            if op.reduction == "sum":
                text = f"tl.sum({text}, axis={position})"
            else:
                self.preludes[
                    _COMBINE.format(name=f"{op.reduction}_of", body=OPS[REDUCTIONS[op.reduction].combine].triton.format("a", "b"))
                ] = None
                text = f"tl.reduce({text}, {position}, {op.reduction}_of)"
        return text

    def dot(self, op: ir.Dot) -> str:
        """Rows first: the operand that has the result's first axis is the left one, transposed where its axes run the other way."""
        first = op.dst.axes[0]
        left, right = (op.lhs, op.rhs) if first in op.lhs.axes else (op.rhs, op.lhs)
        a = self.operand(left, left.axes[0] == first)
        b = self.operand(right, right.axes[0] in op.contract)
        acc = f", {self.name(op.acc, op.acc.axes)}" if op.acc else ""
        precision = f', input_precision="{self.kernel.input_precision}"' if left.dtype == "float32" else ""
        out = ", out_dtype=tl.float64" if op.dst.dtype == "float64" else ""
        return f"tl.dot({a}, {b}{acc}{precision}{out})"

    def operand(self, v: ir.Value, straight: bool) -> str:
        name = self.name(v, v.axes)
        return name if straight or v.name in self.turned else f"tl.trans({name})"

    # -- memory ---------------------------------------------------------------------------------------------------------

    def load(self, op: ir.Load) -> str:
        if op.buffer.number:
            return op.buffer.name
        axes = op.dst.axes[::-1] if op.dst.name in self.turned else op.dst.axes
        mask = self.mask(op.buffer, op.subscripts, axes)
        other = "" if not mask else ", other=0" if DTYPES[op.buffer.dtype].kind != "float" else ", other=0.0"
        return f"tl.load({self.address(op.buffer, op.subscripts, axes)}{mask and ', mask=' + mask}{other})"

    def store(self, op: ir.Store) -> str:
        mask = self.mask(op.buffer, op.subscripts, op.axes)
        address = self.address(op.buffer, op.subscripts, op.axes)
        value = self.name(op.src, op.axes)
        if op.mode != "set" and op.buffer.dtype == "bool":
            what = f"{op.buffer.tensor} collects booleans at computed places, and no GPU has atomics for them (triton source)"
            raise Unsupported(what, help="collect integers: int32(..)")
        call = "tl.store" if op.mode == "set" else f"tl.atomic_{op.mode}"
        if op.mode != "set" and op.axes != op.src.axes:
            value = f"tl.broadcast_to({value}, ({', '.join(self.tile(self.kernel.axis(a)) for a in op.axes)},))"
        relaxed = "" if op.mode == "set" else ', sem="relaxed"'
        return f"{call}({address}, {value}{mask and ', mask=' + mask}{relaxed})"

    def address(self, buffer: ir.Buffer, subscripts: tuple[Expr, ...], axes: tuple[str, ...]) -> str:
        terms = [buffer.name]
        together = self._together(buffer, subscripts)
        for d, e in enumerate(subscripts):
            if d in together:
                axis, last = together[d]
                if last:
                    self.used.add(axis.name)
                    terms.append(self._times(self._suffixed(axis.name, (axis.name,) if not axis.scalar else (), axes), buffer, d))
            elif buffer.shape[d] != 1 or free_indices(e) or e != Const(0):
                terms.append(self._times(self.bounded(buffer, d, e, axes), buffer, d))
        return " + ".join(terms)

    def _times(self, text: str, buffer: ir.Buffer, d: int) -> str:
        if buffer.strides[d] == 1:
            return f"({text})" if _compound(text) else text
        name = f"{buffer.name}_stride_{d}"
        self.strides[name] = buffer.strides[d]
        return f"({text}) * {name}" if _compound(text) else f"{text} * {name}"

    def _together(self, buffer: ir.Buffer, subscripts: tuple[Expr, ...]) -> dict[int, tuple[ir.Axis, bool]]:
        """Dimensions that an axis of several indices walks as one, since their strides compose: dimension -> (axis, whether last)."""
        found: dict[int, tuple[ir.Axis, bool]] = {}
        names = [e.name if isinstance(e, Index) else "" for e in subscripts]
        for axis in self.kernel.axes:
            indices = [i for i, _ in axis.indices]
            if len(indices) < 2 or any(names.count(i) != 1 for i in indices):
                continue
            if any(i in free_indices(e) for i in indices for e in subscripts if not isinstance(e, Index)):
                continue
            dims = [names.index(i) for i in indices]
            if all(buffer.strides[a] == buffer.strides[b] * n for a, b, (_, n) in zip(dims, dims[1:], axis.indices[1:], strict=False)):
                found.update({d: (axis, d == dims[-1]) for d in dims})
        return found

    def bounded(self, buffer: ir.Buffer, d: int, e: Expr, axes: tuple[str, ...]) -> str:
        if isinstance(e, Clamp):
            return f"tl.minimum(tl.maximum({self.integer(e.value, axes)}, 0), {self.dimension(buffer, d)} - 1)"
        return self.integer(e.value if isinstance(e, Pad) else e, axes)

    def dimension(self, buffer: ir.Buffer, d: int) -> str:
        name = f"{buffer.name}_size_{d}"
        self.sizes[name] = buffer.shape[d]
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
        return " & ".join(f"({self._suffixed(a.name, (a.name,), shape)} < {self.extent(a)})" for a in found)

    # -- names ----------------------------------------------------------------------------------------------------------

    def name(self, v: ir.Value, axes: tuple[str, ...]) -> str:
        return self._suffixed(self.alias.get(v.name, v.name), v.axes, axes)

    def _suffixed(self, text: str, have: tuple[str, ...], want: tuple[str, ...]) -> str:
        """A value with a new axis wherever `want` has one that it does not vary along."""
        if not have or have == want:
            return text
        return f"{text}[{', '.join(':' if a in have else 'None' for a in want)}]"

    def integer(self, e: Expr, axes: tuple[str, ...]) -> str:
        """An integer expression of indices and values, broadcast to `axes`."""
        text = self._integer(e, axes)
        return text[1:-1] if _enclosed(text) else text

    def _integer(self, e: Expr, axes: tuple[str, ...]) -> str:
        match e:
            case Const(value=value):
                return repr(int(value))
            case Index(name=name):
                if name in self.values:
                    return self.name(self.values[name], axes)
                self.used.add(name)
                axis = self.kernel.axis_of(name)
                return self._suffixed(name, () if axis.scalar else (axis.name,), axes)
            case Call(op=op, args=args):
                if OPS[op].triton_def:
                    self.preludes.update(dict.fromkeys(_definitions(OPS[op].triton_def)))
                return OPS[op].triton.format(*(self._integer(a, axes) for a in args))
        raise AssertionError(e)

    def number(self, value: float | int | bool) -> str:
        if isinstance(value, float) and (math.isinf(value) or math.isnan(value)):
            return f'float("{value}")'
        return repr(value)

    def dtype(self, name: str) -> str:
        return f"tl.{DTYPES[name].triton}"


def _turned(kernel: ir.Kernel) -> frozenset[str]:
    """Loaded tiles that only dots read, all of them with the axes the other way round: they are loaded so, and need no transposition,
    which would keep Ampere's compiler from copying them to shared memory ahead of their use."""
    loaded = {op.dst.name for op in ir.operations(kernel.body) if isinstance(op, ir.Load)}
    turned: set[str] = set()
    for op in ir.operations(kernel.body):
        if not isinstance(op, ir.Dot):
            loaded -= {v.name for v in ir.uses(op)}
            continue
        first = op.dst.axes[0]
        left, right = (op.lhs, op.rhs) if first in op.lhs.axes else (op.rhs, op.lhs)
        for v, straight in ((left, left.axes[0] == first), (right, right.axes[0] in op.contract)):
            if straight:
                loaded.discard(v.name)
            else:
                turned.add(v.name)
    return frozenset(turned & loaded)


def _definitions(text: str) -> list[str]:
    """The helper functions of one row, each by itself, so that two rows that share one print it once."""
    return [f"\n@triton.jit\n{part.strip()}\n" for part in text.split("@triton.jit") if part.strip()]


def _widened(text: str, wide: str) -> str:
    return f"({text}){wide}" if wide else text


def _compound(text: str) -> bool:
    """Whether an operator stands outside of all brackets."""
    depth = 0
    for n, c in enumerate(text):
        depth += (c in "([") - (c in ")]")
        if depth == 0 and c == " " and text[n + 1 : n + 2] in "+-*/%&|<>=":
            return True
    return False


def _enclosed(text: str) -> bool:
    """Whether the first parenthesis closes at the very end."""
    if not text.startswith("("):
        return False
    depth = 0
    for n, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0:
            return n == len(text) - 1
    return False
