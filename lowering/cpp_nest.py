"""One loop nest as C++: the loops, its values at the depth where they vary, and the partial results of its folds."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lowering import tile_ir as ir
from lowering.addresses import axis_step
from lowering.cpp_axes import SMALL
from lowering.cpp_prelude import LANES, REGISTER, STORAGE
from lowering.cpp_values import Values
from lowering.nests import Nest
from lowering.reducing import identity
from tdsl.ir import Index

# Elements of a tile that is transposed on its way from memory or there: 128 KiB of float32 on the stack.
TURNED = 1 << 15
# Terms that one partial sum takes before it is added to a sum in double.
BLOCK = 256


class NestPrinter:
    """One nest: the loops, its values at the depth where they vary, and the partial results of its folds."""

    def __init__(self, printer: Values, nest: Nest):
        self.p = printer
        self.nest = nest
        self.lane = nest.axes[-1]
        self.outer = nest.axes[:-1]
        self.folds = [op for op in nest.body if isinstance(op, ir.Fold | ir.Dot)]
        kernel = printer.kernel
        self.serial = any(isinstance(op, ir.Store) and self.lane in {a.name for a in printer.unsafe(op)} for op in nest.body)
        short = kernel.axis(self.lane).role == "whole" and kernel.axis(self.lane).extent <= SMALL
        self.across = any(self.lane in reduced(op) for op in self.folds)
        self.in_lanes = self.across and not short and not self.serial
        self.crossed = [op for op in nest.body if isinstance(op, ir.Load | ir.Store) and self._crosses(op)]
        self.tiles: dict[ir.Load | ir.Store, str] = {}
        self.blocked = {op.dst.name for op in self.folds if self._long(op)}

    def _crosses(self, op: ir.Operation) -> bool:
        """Whether a load or a store goes along the outer of two axes: a tile of it is transposed on the way."""
        if (
            not isinstance(op, ir.Load | ir.Store)
            or len(self.nest.axes) != 2
            or not all(isinstance(e, Index) and e.name not in self.p.values for e in op.subscripts)
        ):
            return False
        axes = op.dst.axes if isinstance(op, ir.Load) else op.axes if op.mode == "set" else ()
        if axes != self.nest.axes or min(self.length(a) for a in self.nest.axes) < SMALL:
            return False
        if math.prod(self.p.capacity(a) for a in axes) > TURNED:
            return False
        outer, lane = (axis_step(op.subscripts, op.buffer.strides, self.p.kernel.axis(a).indices, self.p.values) for a in self.nest.axes)
        return outer == 1 and lane not in (0, 1, None)

    def turn(self, op: ir.Load | ir.Store, indent: str) -> Iterator[str]:
        """A tile from memory, transposed into a local array, or from there to memory."""
        p = self.p
        p.calls.add("transposed")
        (outer, first, last), (lane, start, stop) = ((a, *p.span(a)) for a in self.nest.axes)
        width = p.capacity(lane)
        d = op.subscripts.index(Index(p.kernel.axis(lane).indices[-1][0]))
        yield f"{indent}{{"
        for axis, value in ((outer, first), (lane, start)):
            yield f"{indent}    const i64 {p.c(axis)} = {value};"
            yield from (f"{indent}    {line}" for line in p.decode(p.kernel.axis(axis)))
        place = f"&{p.c(op.buffer.name)}[{p.offset(op.buffer, op.subscripts)}]"
        outside, across, along = p.stride(op.buffer, d), less(last, first), less(stop, start)
        if isinstance(op, ir.Load):
            yield f"{indent}    transposed({place}, {outside}, {across}, {along}, {self.tile(op)}, {width});"
        else:
            yield f"{indent}    transposed({self.tile(op)}, {width}, {along}, {across}, {place}, {outside});"
        yield f"{indent}}}"

    def tile(self, op: ir.Load | ir.Store) -> str:
        """The local array of a tile; another nest that turns the same one has an array of its own."""
        if op not in self.tiles:
            self.tiles[op] = self.p.once(f"{op.dst.name if isinstance(op, ir.Load) else op.buffer.name}_tile")
        return self.tiles[op]

    def in_tile(self, op: ir.Load | ir.Store) -> str:
        """The current element of a transposed tile."""
        outer, lane = self.nest.axes
        return f"{self.tile(op)}[{self.p.position(outer)} * {self.p.capacity(lane)} + {self.p.position(lane)}]"

    def length(self, axis: str) -> int:
        a = self.p.kernel.axis(axis)
        return a.extent if a.role == "whole" else a.tile

    def _long(self, op: ir.Fold | ir.Dot) -> bool:
        """Whether a float32 sum has so many terms that its blocks are added in double."""
        if op.dst.dtype != "float32" or (isinstance(op, ir.Fold) and op.reduction != "sum"):
            return False
        terms = math.prod(self.length(a) for a in reduced(op))
        return terms > BLOCK * (LANES if self.in_lanes and self.lane in reduced(op) else 1)

    def run(self, indent: str) -> Iterator[str]:
        p = self.p
        before = set(p.here)
        for op in self.folds:
            yield from self.prepare(op, indent)
        for crossed in self.crossed:
            yield f"{indent}alignas(64) {STORAGE[crossed.buffer.dtype]} {self.tile(crossed)}[{math.prod(p.capacity(a) for a in self.nest.axes)}];"
            yield from self.turn(crossed, indent) if isinstance(crossed, ir.Load) else ()
        yield from self.level(0, indent)
        for crossed in self.crossed:
            yield from self.turn(crossed, indent) if isinstance(crossed, ir.Store) else ()
        for op in self.folds:
            if op.dst.name in self.blocked and not op.dst.axes:
                yield f"{indent}const float {p.c(op.dst.name)} = (float){self.total(op)};"
        p.here = before | {op.dst.name for op in self.folds if not op.dst.axes}

    # -- where results are gathered --------------------------------------------------------------------------------------------

    def total(self, op: ir.Fold | ir.Dot) -> str:
        """What is added to: a number or an element of an array; in double where the sum is long."""
        p = self.p
        if op.dst.axes:
            return p.element(op.dst)
        return p.helper(f"{op.dst.name}_total") if op.dst.name in self.blocked else p.c(op.dst.name)

    def part(self, op: ir.Fold | ir.Dot) -> str:
        return self.p.helper(f"{op.dst.name}_part")

    def prepare(self, op: ir.Fold | ir.Dot, indent: str) -> Iterator[str]:
        """The declaration of a number, or the identity into an array."""
        p = self.p
        start = p.number(identity_of(op), op.dst.dtype)
        first = start
        if isinstance(op, ir.Dot) and op.acc is not None:
            first = f"{p.c(op.acc.name)}[lane]" if op.dst.axes else p.ref(op.acc)
        if op.dst.axes:
            if op.dst.name in self.blocked:
                p.stored_types[op.dst.name] = "double"
            yield f"{indent}for ({p.whole_array(op.dst)}) {p.c(op.dst.name)}[lane] = {first};"
            if op.dst.name in self.blocked and self.lane in op.dst.axes:
                size = math.prod(p.capacity(a) for a in op.dst.axes)
                yield f"{indent}alignas(64) float {self.part(op)}[{size}];"
                yield f"{indent}for ({p.whole_array(op.dst)}) {self.part(op)}[lane] = {start};"
        elif op.dst.name in self.blocked:
            yield f"{indent}double {self.total(op)} = {first};"
        else:
            yield f"{indent}{REGISTER[op.dst.dtype]} {p.c(op.dst.name)} = {first};"

    # -- loops -----------------------------------------------------------------------------------------------------------------

    def level(self, depth: int, indent: str) -> Iterator[str]:
        """What is made at one depth, and the loop inside of it."""
        yield from self.made(depth, indent)
        if depth == len(self.outer):
            yield from self.innermost(indent)
            return
        p = self.p
        axis = self.nest.axes[depth]
        name, (start, stop) = p.c(axis), p.span(axis)
        cut = depth == self._cut()
        if cut:
            inner = math.prod(
                self.length(a) for op in self.folds if op.dst.name in self.blocked for a in self.outer[depth + 1 :] if a in reduced(op)
            )
            block = max(1, BLOCK // max(1, inner))
            first, end = p.helper(f"{axis}_block"), p.helper(f"{axis}_end")
            yield f"{indent}for (i64 {first} = {start}; {first} < {stop}; {first} += {block}) {{"
            yield f"{indent}    const i64 {end} = {first} + {block} < {stop} ? {first} + {block} : {stop};"
            start, stop, indent = first, end, indent + "    "
        yield f"{indent}for (i64 {name} = {start}; {name} < {stop}; ++{name}) {{"
        yield from (f"{indent}    {line}" for line in p.decode(p.kernel.axis(axis)))
        yield from self.level(depth + 1, indent + "    ")
        yield f"{indent}}}"
        if cut:
            yield from self.flush(depth, indent)
            yield f"{indent[4:]}}}"

    def _cut(self) -> int:
        """The depth of the loop that is cut into blocks for the folds that keep the last axis; -1 where none is."""
        for depth, axis in enumerate(self.outer):
            if any(op.dst.name in self.blocked and self.lane in op.dst.axes and axis in reduced(op) for op in self.folds):
                return depth
        return -1

    def flush(self, depth: int, indent: str) -> Iterator[str]:
        """Adds the sums of a block to the totals."""
        p = self.p
        for op in self.folds:
            if op.dst.name in self.blocked and self.lane in op.dst.axes:
                total = p.element(op.dst)
                part = total.replace(p.c(op.dst.name), self.part(op), 1)
                rest = [a for a in op.dst.axes if a in self.nest.axes[depth + 1 :]]
                inside = indent
                for a in rest:
                    start, stop = p.span(a)
                    yield f"{inside}for (i64 {p.c(a)} = {start}; {p.c(a)} < {stop}; ++{p.c(a)}) {'{' if a == rest[-1] else ''}".rstrip()
                    inside += "    "
                yield f"{inside}{total} += {part};"
                yield f"{inside}{part} = 0.0f;"
                yield f"{inside[4:]}}}"

    def made(self, depth: int, indent: str) -> Iterator[str]:
        """The operations whose value varies along the first `depth` axes and no more."""
        for op in self.nest.body:
            if not isinstance(op, ir.Fold | ir.Dot | ir.For) and self._depth(op) == depth:
                yield from (indent + line for line in self.p.operation(op, self.nest.kept))

    def _depth(self, op: ir.Operation) -> int:
        if isinstance(op, ir.Store | ir.Assign):
            return len(self.nest.axes)
        assert not isinstance(op, ir.For)
        return max((self.nest.axes.index(a) + 1 for a in op.dst.axes), default=0)

    def innermost(self, indent: str) -> Iterator[str]:
        if not self.in_lanes:
            yield from self.alone(indent)
            return
        p = self.p
        start, stop = p.span(self.lane)
        across = [op for op in self.folds if self.lane in reduced(op)]
        long = any(op.dst.name in self.blocked for op in across) and self.length(self.lane) > BLOCK * LANES
        if long:
            first = p.helper(f"{self.lane}_block")
            size = BLOCK * LANES
            yield f"{indent}for (i64 {first} = {start}; {first} < {stop}; {first} += {size}) {{"
            indent += "    "
            start, stop = first, f"({first} + {size} < {stop} ? {first} + {size} : {stop})"
        for op in across:
            yield from (indent + line for line in self.parts(op))
        yield from self.lanes(start, stop, indent)
        for op in across:
            combine = f"[](auto a, auto b) {{ return {p.combined(reduction_of(op), 'a', 'b')}; }}"
            yield f"{indent}{self.total(op)} = {p.combined(reduction_of(op), self.total(op), f'folded({self.part(op)}, {combine})')};"
        if long:
            yield f"{indent[4:]}}}"

    def alone(self, indent: str) -> Iterator[str]:
        """The loop along the last axis where no sum goes along it in parts."""
        name, (start, stop) = self.p.c(self.lane), self.p.span(self.lane)
        if not self.serial and not self.across:
            yield f"{indent}#pragma omp simd"
        yield f"{indent}for (i64 {name} = {start}; {name} < {stop}; ++{name}) {{"
        yield from (f"{indent}    {line}" for line in self.p.decode(self.p.kernel.axis(self.lane)))
        yield from self.body(indent + "    ")
        yield f"{indent}}}"

    def parts(self, op: ir.Fold | ir.Dot) -> Iterator[str]:
        """Partial results side by side, and their first value."""
        yield f"alignas(64) {REGISTER[op.dst.dtype]} {self.part(op)}[LANES];"
        yield f"fill({self.part(op)}, {self.p.number(identity_of(op), op.dst.dtype)});"

    def lanes(self, start: str, stop: str, indent: str) -> Iterator[str]:
        """The loop along the last axis, partial results side by side."""
        yield f"{indent}lanes({start}, {stop}, [&](i64 {self.p.c(self.lane)}, int lane) __attribute__((always_inline)) {{"
        yield from (f"{indent}    {line}" for line in self.p.decode(self.p.kernel.axis(self.lane)))
        yield from self.body(indent + "    ")
        yield f"{indent}}});"

    def body(self, indent: str) -> Iterator[str]:
        """What is done for each element: the values, then what becomes of them, in order."""
        p = self.p
        deepest = len(self.nest.axes)
        for op in self.nest.body:
            if isinstance(op, ir.Fold | ir.Dot):
                if isinstance(op, ir.Fold):
                    term = p.ref(op.src)
                else:
                    term = f"{p.ref(op.lhs)} * {p.ref(op.rhs)}"
                yield indent + self.added(op, term)
            elif isinstance(op, ir.Store) and op in self.crossed:
                yield f"{indent}{self.in_tile(op)} = {p.ref(op.src)};"
            elif isinstance(op, ir.Load) and op in self.crossed:
                p.here.add(op.dst.name)
                yield f"{indent}const {REGISTER[op.dst.dtype]} {p.local(op.dst)} = {self.in_tile(op)}{' != 0' if op.dst.dtype == 'bool' else ''};"
                if op.dst.name in self.nest.kept:
                    yield f"{indent}{p.element(op.dst)} = {p.local(op.dst)};"
            elif self._depth(op) == deepest:
                yield from (indent + line for line in p.operation(op, self.nest.kept))

    def added(self, op: ir.Fold | ir.Dot, term: str) -> str:
        """What becomes of one term."""
        return f"{self.target(op)} = {self.p.combined(reduction_of(op), self.target(op), term)};"

    def target(self, op: ir.Fold | ir.Dot) -> str:
        """Where one term goes."""
        p = self.p
        if self.in_lanes and self.lane in reduced(op):
            return f"{self.part(op)}[lane]"
        if op.dst.name in self.blocked and self.lane in op.dst.axes:
            return p.element(op.dst).replace(p.c(op.dst.name), self.part(op), 1)
        return self.total(op)


def less(stop: str, start: str) -> str:
    """How many elements lie between, as text."""
    return stop if start == "0" else stop[len(start) + 3 :] if stop.startswith(f"{start} + ") else f"{stop} - {start}"


def reduced(op: ir.Fold | ir.Dot) -> tuple[str, ...]:
    return op.axes if isinstance(op, ir.Fold) else op.contract


def reduction_of(op: ir.Fold | ir.Dot) -> str:
    return op.reduction if isinstance(op, ir.Fold) else "sum"


def identity_of(op: ir.Fold | ir.Dot) -> float | int | bool:
    return identity(reduction_of(op), op.dst.dtype)
