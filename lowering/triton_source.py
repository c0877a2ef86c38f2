"""Prints the tile IR as Triton source that a person could paste into a project of their own. It decides nothing.

Names: a tensor keeps its own, its strides are `A_stride_0`, ..; an index is the tile of its values, its extent `size_i`,
the tile's length `TILE_I`. A stride that is 1 and a dimension of size 1 are left out of the address.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

from lowering import tile_ir as ir
from lowering.kernel_source import Arg, KernelSource, Otherwise
from lowering.triton_addresses import definitions, enclosed
from lowering.triton_grid import Grid
from tdsl.errors import Unsupported
from tdsl.ir import Call, Const, Expr, Index, free_indices
from tdsl.ops import DTYPES, OPERATORS, OPS, REDUCTIONS, STORED_ONLY

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
    if not kernel.descriptors:
        return printer.run(), {**printer.sizes, **printer.strides}
    pointers = _Printer(replace(kernel, descriptors=()))
    plain = pointers.run()
    source = printer.run(pointers)
    names = [a.name for a in source.runtime_args]
    aligned = tuple(names.index(name) for name in dict.fromkeys(d.buffer.name for d in kernel.descriptors))
    source = replace(source, otherwise=Otherwise(plain, aligned, tuple(names.index(a.name) for a in plain.runtime_args)))
    return source, {**printer.sizes, **printer.strides}


class _Printer(Grid):
    def __init__(self, kernel: ir.Kernel):
        super().__init__(kernel)
        self.turned = _turned(kernel)

    def run(self, also: _Printer | None = None) -> KernelSource:
        """also: a form of the kernel whose integers this one takes too."""
        indent = self.indent
        start = None if self.kernel.parts is None else self.kernel.parts.start
        body = list(self.block(self.kernel.body[:start], indent))
        if start is not None:
            body += self.parts(self.kernel.body[start:], indent)
        grid = [*self.grid()]
        indices = [line for a in self.kernel.axes if a.role != "loop" for line in self.index_lines(a, indent)]
        top = [*self.descriptor_lines(), *grid, *indices]
        if also is not None:
            self.sizes, self.strides = {**self.sizes, **also.sizes}, {**self.strides, **also.strides}
        args = [self.pointer(b) for b in self.kernel.buffers]
        args += [Arg(name, "int", "int32" if value <= _INT32 else "int64") for name, value in (*self.sizes.items(), *self.strides.items())]
        args += [Arg(name, "constexpr", value=int(value)) for name, value in self.tiles.items()]
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
            if self.kernel.descriptors and name not in self.pointed:
                continue
            factor = next(f for f in (16, 8, 4, 2, 1) if value % f == 0)
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

    def parts(self, body: tuple[ir.Operation, ...], indent: str) -> Iterator[str]:
        """What is done for one part of a tile after the other; the values that it takes are split first."""
        assert self.kernel.parts is not None
        axis = self.kernel.axis(self.kernel.parts.axis)
        taken = [v for v in _read(body, self.values) if axis.name in v.axes]
        names = {v.name: self.alias.get(v.name, v.name) for v in taken}
        self.parted = axis.name
        for v in taken:
            place = v.axes.index(axis.name)
            shape = [self.tile(self.kernel.axis(a)) for a in v.axes]
            order = [n if n < place else n + 1 for n in range(len(shape))]
            shape.insert(place, "2")
            cut = f"tl.permute(tl.reshape({names[v.name]}, ({', '.join(shape)})), ({', '.join(map(str, [*order, place]))}))"
            yield f"{indent}{names[v.name]}_parts = tl.split({cut})  # along {axis.name}"
        before = self.lanes & {axis.name}
        self.lanes -= before
        inner = list(self.block(body, indent + "    "))
        yield f"{indent}for part in tl.static_range({self.kernel.parts.count}):"
        yield from (f"{indent}    {name} = {name}_parts[part]" for name in names.values())
        yield from self.index_lines(axis, indent + "    ") if axis.name in self.lanes else ()
        yield from inner
        self.lanes = self.lanes - {axis.name} | before
        self.parted = ""

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
            end = self.extent(op.axis)
            return f"tl.range(0, {end}, num_stages={op.ahead + 1})" if op.ahead else f"range(0, {end})"
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
            self.preludes.update(dict.fromkeys(definitions(row.triton_def)))
        infix = op.op in OPERATORS
        double = not infix and any(isinstance(a, ir.Value) and a.dtype == "float64" for a in op.args)
        args = []
        for a in op.args:
            text = self.name(a, op.dst.axes) if isinstance(a, ir.Value) else self.number(a)
            args.append(f"tl.full((), {text}, tl.float64)" if double and isinstance(a, float) else text)
        text = row.triton.format(*args)
        return text[1:-1] if infix and enclosed(text) else text

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
        # Hopper's tensor cores add 8-bit products in some 14 bits: the least that they can add up before float32 does (0 would be no fp8).
        whole = ", max_num_imprecise_acc=32" if left.dtype in STORED_ONLY else ""
        return f"tl.dot({a}, {b}{acc}{precision}{whole}{out})"

    def operand(self, v: ir.Value, straight: bool) -> str:
        name = self.name(v, v.axes)
        return name if straight or v.name in self.turned else f"tl.trans({name})"

    # -- memory ---------------------------------------------------------------------------------------------------------

    def load(self, op: ir.Load) -> str:
        if op.buffer.number:
            return op.buffer.name
        axes = op.dst.axes[::-1] if op.dst.name in self.turned else op.dst.axes
        if (found := self.of(op)) is not None:
            return self.described_load(op, found, axes)
        mask = self.mask(op.buffer, op.subscripts, axes)
        other = "" if not mask else ", other=0" if DTYPES[op.buffer.dtype].kind != "float" else ", other=0.0"
        return f"tl.load({self.address(op.buffer, op.subscripts, axes)}{mask and ', mask=' + mask}{other})"

    def store(self, op: ir.Store) -> str:
        if (found := self.of(op)) is not None:
            return self.described_store(op, found, self.name(op.src, op.axes))
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

def _read(body: tuple[ir.Operation, ...], known: dict[str, ir.Value]) -> list[ir.Value]:
    """The values made before that some operations read, in their subscripts too."""
    made = {op.dst.name for op in body if not isinstance(op, ir.For | ir.Store)}
    found: dict[str, ir.Value] = {}
    for op in body:
        names = [i for e in _subscripts(op) for i in free_indices(e) if i in known]
        found.update({v.name: v for v in (*ir.uses(op), *(known[i] for i in names)) if v.name not in made})
    return [*found.values()]


def _subscripts(op: ir.Operation) -> tuple[Expr, ...]:
    return op.subscripts if isinstance(op, ir.Load | ir.Store) else (op.expr,) if isinstance(op, ir.IndexOf) else ()


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


