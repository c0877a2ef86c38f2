"""Prints loop nests as C++ for a CPU: programs of the grid in parallel, the last axis of each nest as vector code.

Sizes and strides are arguments, so that one library serves many shapes; small ones stand in the code as numbers and let the
compiler unroll. A sum along the last axis is held in LANES partial sums, which keeps several vector units busy and adds
pairwise; a longer one is cut into blocks whose sums are added in double. Nothing is reassociated by the compiler.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lowering import cpp_math
from lowering import tile_ir as ir
from lowering.addresses import axis_step
from lowering.factor_out import factor_out
from lowering.merge import merge
from lowering.nests import Item, Nest, Nests, Walk, nests, operands
from lowering.tiling import identity
from tdsl.errors import Unsupported
from tdsl.ir import Call, Clamp, Const, Expr, Index, Pad, free_indices
from tdsl.ops import DTYPES, OPS, REDUCTIONS

# Partial sums side by side: four vectors of 512 bits of float32, which is what the latency of an addition asks for.
LANES = 64
# Terms that one partial sum takes before it is added to a sum in double.
BLOCK = 256
# Sizes and strides up to this stand in the code as numbers.
SMALL = 16
# Bytes of local arrays that one program may have; threads have stacks of a few MiB.
LOCAL = 1 << 19
# Tiles up to this many elements have a length that the compiler knows: the last tile moves back where it would end outside.
FIXED = 1024

STORAGE = {
    "bool": "u8",
    "uint8": "u8",
    "int8": "i8",
    "int16": "i16",
    "int32": "i32",
    "int64": "i64",
    "float16": "u16",
    "bfloat16": "u16",
    "float32": "float",
    "float64": "double",
}
REGISTER = {**STORAGE, "bool": "bool"}
_HALVES = {"float16": "f16", "bfloat16": "bf16"}
# What C++ and the text below keep for themselves.
_WORDS = """
    alignas alignof and asm auto bool break case catch char class const constexpr continue decltype default delete do double else enum
    explicit export extern false float for friend goto if inline int long mutable namespace new noexcept not nullptr operator or private
    protected public register return short signed sizeof static struct switch template this throw true try typedef typeid typename union
    unsigned using virtual void volatile while xor main
    u8 i8 u16 i16 u32 i32 u64 i64 integers threads pid lane lanes folded halve fill transposed exchange exchanges indices counted
    INLINE LANES
"""
_KEYWORDS = frozenset(_WORDS.split()) | cpp_math.NAMES | OPS.keys()
HELPERS = f"""\
enum {{ LANES = {LANES} }};
// body(c, lane) for c in [first, last): LANES of them at a time.
template <class Body> INLINE void lanes(i64 first, i64 last, Body body) {{
    i64 c = first;
    for (; c + LANES <= last; c += LANES) {{
        #pragma omp simd
        for (int lane = 0; lane < LANES; ++lane) body(c + lane, lane);
    }}
    const int rest = (int)(last - c);
    #pragma omp simd
    for (int lane = 0; lane < rest; ++lane) body(c + lane, lane);
}}
template <class T, class V> INLINE void fill(T* partial, V value) {{
    for (int lane = 0; lane < LANES; ++lane) partial[lane] = value;
}}
template <int WIDTH, class T, class Combine> INLINE void halve(T* partial, Combine combine) {{
    #pragma omp simd
    for (int lane = 0; lane < WIDTH; ++lane) partial[lane] = combine(partial[lane], partial[lane + WIDTH]);
    if constexpr (WIDTH > 1) halve<WIDTH / 2>(partial, combine);
}}
template <class T, class Combine> INLINE T folded(T* partial, Combine combine) {{
    halve<LANES / 2>(partial, combine);
    return partial[0];
}}
"""


# A block is turned inside registers: each line of cache is read once, whole, so that rows a power of two apart do not push each other out.
TRANSPOSED = """\
template <int... I> struct indices {};
template <int N, int... I> struct counted : counted<N - 1, N - 1, I...> {};
template <int... I> struct counted<0, I...> { typedef indices<I...> type; };
template <int H, class V, int... I> INLINE void exchange(V& a, V& b, indices<I...>) {
    const V low = __builtin_shufflevector(a, b, ((I & H) ? 16 + I - H : I)...);
    b = __builtin_shufflevector(a, b, ((I & H) ? 16 + I : I + H)...);
    a = low;
}
template <int H, class V> INLINE void exchanges(V* rows) {
    for (int k = 0; k < 16; ++k)
        if (!(k & H)) exchange<H>(rows[k], rows[k + H], counted<16>::type());
    if constexpr (H > 1) exchanges<H / 2>(rows);
}
// to[r * width + c] = from[c * step + r] for r < rows, c < columns.
template <class T> static void transposed(const T* __restrict__ from, i64 step, i64 rows, i64 columns, T* __restrict__ to, i64 width) {
    typedef T V __attribute__((vector_size(16 * sizeof(T))));
    for (i64 c = 0; c < columns; c += 16)
        for (i64 r = 0; r < rows; r += 16) {
            if (c + 16 > columns || r + 16 > rows) {
                for (i64 x = r; x < rows && x < r + 16; ++x)
                    for (i64 y = c; y < columns && y < c + 16; ++y) to[x * width + y] = from[y * step + x];
                continue;
            }
            V block[16];
            for (int k = 0; k < 16; ++k) __builtin_memcpy(&block[k], from + (c + k) * step + r, sizeof(V));
            exchanges<8>(block);
            for (int k = 0; k < 16; ++k) __builtin_memcpy(to + (r + k) * width + c, &block[k], sizeof(V));
        }
}
"""


@dataclass(frozen=True, slots=True)
class CppKernel:
    """One function. buffers: its first arguments, pointers or numbers. integers: values of the sizes and strides that follow.

    calls: functions of cpp_math that it needs. parallel: whether several threads may run it. fused: as of its tile IR.
    """

    name: str
    source: str
    buffers: tuple[ir.Buffer, ...]
    integers: tuple[int, ...]
    calls: frozenset[str]
    parallel: bool
    fused: bool = True


def cpp_source(kernel: ir.Kernel, overlap: frozenset[str] = frozenset()) -> CppKernel:
    """`extern "C" void name(buffers.., const i64* integers, int threads)`. Raises Unsupported for what stays torch code.

    overlap: tensors that are the same memory, under several names.
    """
    return replace(_Printer(factor_out(merge(kernel)), overlap).run(), fused=kernel.fused)


def cpp_module(kernels: Sequence[CppKernel]) -> str:
    """One translation unit with all kernels of a program."""
    calls = frozenset().union(*(k.calls for k in kernels))
    turned = [TRANSPOSED] if "transposed" in calls else []
    return "\n".join([cpp_math.TYPES, cpp_math.prelude(calls - {"transposed"}), HELPERS, *turned, *(k.source for k in kernels)])


class _Printer:
    def __init__(self, kernel: ir.Kernel, overlap: frozenset[str]):
        self.kernel = kernel
        self.overlap = overlap
        self.plan: Nests = nests(kernel)
        self.integers: dict[str, int] = {}
        self.calls: set[str] = set()
        self.stored_types: dict[str, str] = {}  # of local arrays that are wider than their value
        self.arrays = {v.name: v for v in self.plan.arrays}
        self.here: set[str] = set()  # values that the nest being printed makes itself
        self.open: set[str] = set()  # axes of the loops around
        self.values = {op.dst.name: op.dst for op in ir.operations(kernel.body) if not isinstance(op, ir.For | ir.Store | ir.Assign)}
        self.used = (
            {b.name for b in kernel.buffers}
            | set(self.values)
            | {a.name for a in kernel.axes}
            | {i for a in kernel.axes for i, _ in a.indices}
        )
        self.names: dict[str, str] = {}
        self.colliding = frozenset(a.name for op in ir.operations(kernel.body) if isinstance(op, ir.Store) for a in self._unsafe(op))
        self.shifts = all(op.mode == "set" for op in ir.operations(kernel.body) if isinstance(op, ir.Store))

    # -- the function -----------------------------------------------------------------------------------------------------

    def run(self) -> CppKernel:
        grid = [a for a in self.kernel.axes if a.role == "grid"]
        parallel = [a for a in grid if a.name not in self.colliding]
        head, indent = self.head(parallel)
        inner: list[str] = []
        for axis in (a for a in grid if a.name in self.colliding):
            inner.append(
                f"{indent}for (i64 {self.tile_name(axis)} = 0; {self.tile_name(axis)} < {self.count(axis)}; ++{self.tile_name(axis)}) {{"
            )
            indent += "    "
            inner += [indent + line for line in self.place(axis)]
        body = list(self.items(self.plan.items, indent))
        local = [indent + line for line in self.declarations()]
        closing = [f"{'    ' * n}}}" for n in range(len(indent) // 4 - 1, 0, -1)] if grid else []
        arguments = ", ".join([*(self.parameter(b) for b in self.kernel.buffers), "const i64* integers", "int threads"])
        notation = [f"// {line}" for line in self.kernel.notation.splitlines()]
        sizes = [f"    const i64 {name} = integers[{n}];" for n, name in enumerate(self.integers)]
        unused = [] if parallel else ["    (void)threads;"]
        lines = [
            *notation,
            f'extern "C" void {self.kernel.name}({arguments}) {{',
            *sizes,
            *unused,
            *head,
            *inner,
            *local,
            *body,
            *closing,
            "}",
        ]
        return CppKernel(
            self.kernel.name,
            "\n".join(lines) + "\n",
            self.kernel.buffers,
            tuple(self.integers.values()),
            frozenset(self.calls),
            bool(parallel),
        )

    def parameter(self, b: ir.Buffer) -> str:
        name = self.c(b.name)
        if b.number:
            return f"{'double' if DTYPES[b.dtype].kind == 'float' else 'i64'} {name}"
        written = any(isinstance(op, ir.Store) and op.buffer.tensor == b.tensor for op in ir.operations(self.kernel.body))
        alone = "" if b.tensor in self.overlap else "__restrict__ "
        return f"{'' if written else 'const '}{STORAGE[b.dtype]}* {alone}{name}"

    def head(self, parallel: list[ir.Axis]) -> tuple[list[str], str]:
        """The parallel loop and which tile of each axis this program computes."""
        if not parallel:
            return [], "    "
        programs = " * ".join(self.count(a) for a in parallel)
        lines = [
            "    #pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)",
            f"    for (i64 pid = 0; pid < {programs}; ++pid) {{",
        ]
        rest = "pid"
        for n, axis in reversed(list(enumerate(parallel))):
            name = self.tile_name(axis)
            if n == 0:
                lines.append(f"        const i64 {name} = {rest};")
            else:
                count = self.count(axis) if self.count(axis).isalnum() else f"({self.count(axis)})"
                lines.append(f"        const i64 {name} = {rest} % {count};")
                rest = f"{rest} / {count}"
            lines += [f"        {line}" for line in self.place(axis)]
        return lines, "        "

    def tile_name(self, axis: ir.Axis) -> str:
        return self.c(axis.name) if axis.scalar else self.helper(f"{axis.name}_tile")

    def count(self, axis: ir.Axis) -> str:
        """How many tiles an axis has."""
        if axis.tile == 1:
            return self.extent(axis)
        return str(-(-axis.extent // axis.tile)) if axis.extent <= SMALL else f"(({self.extent(axis)} + {axis.tile - 1}) / {axis.tile})"

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

    def fixed(self, axis: ir.Axis) -> bool:
        """Whether every tile of a grid axis is full: the last one may then do some elements again."""
        return axis.role == "grid" and self.shifts and axis.tile <= FIXED

    def declarations(self) -> Iterator[str]:
        total = 0
        for name, v in self.arrays.items():
            kind = self.stored_types.get(name) or STORAGE[v.dtype]
            elements = math.prod(self.capacity(a) for a in v.axes)
            total += elements * (8 if kind in ("double", "i64") else DTYPES[v.dtype].bits // 8)
            yield f"alignas(64) {kind} {self.c(name)}[{elements}];"
        if total > LOCAL:
            raise Unsupported(f"{self.kernel.name} would keep {total} bytes of intermediates per thread (cpp)")

    # -- names and numbers --------------------------------------------------------------------------------------------------

    def c(self, name: str) -> str:
        """A name of the tile IR in C++."""
        return self.named(name, _KEYWORDS)

    def helper(self, name: str) -> str:
        """A name of this printer's own, apart from those of the tile IR."""
        return self.named(f"{name} ", self.used)

    def named(self, key: str, taken: frozenset[str] | set[str]) -> str:
        if key not in self.names:
            fresh = key.strip()
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
        """Elements that a local array has along an axis: of a whole axis the next power of two, so that few sizes differ."""
        axis = self.kernel.axis(axis_name)
        if axis.role != "whole":
            return axis.tile
        return max(1, axis.extent) if axis.extent <= SMALL else 1 << (axis.extent - 1).bit_length()

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

    def ref(self, v: ir.Value) -> str:
        if v.name in self.arrays and v.name not in self.here:
            text = self.element(v)
            if v.dtype == "bool":
                return f"({text} != 0)"
            return f"(float){text}" if self.stored_types.get(v.name) else text
        return self.local(v)

    def local(self, v: ir.Value) -> str:
        """The name of a number, which is not that of the array that keeps it."""
        return self.helper(f"{v.name}_now") if v.name in self.arrays else self.c(v.name)

    # -- items ----------------------------------------------------------------------------------------------------------------

    def items(self, items: Sequence[Item], indent: str) -> Iterator[str]:
        for item in items:
            if isinstance(item, Nest):
                yield from self.nest(item, indent)
            elif isinstance(item, Walk):
                yield from self.walk(item, indent)
            elif isinstance(item, ir.Full) and item.dst.axes:
                yield f"{indent}for ({self._whole_array(item.dst)}) {self.c(item.dst.name)}[lane] = {self.number(item.fill, item.dst.dtype)};"
            elif isinstance(item, ir.Full):  # a carried number
                constant = "" if self._carried(item.dst.name) else "const "
                yield f"{indent}{constant}{REGISTER[item.dst.dtype]} {self.c(item.dst.name)} = {self.number(item.fill, item.dst.dtype)};"
            else:
                yield from (indent + line for line in self.operation(item, frozenset()))

    def _whole_array(self, v: ir.Value) -> str:
        return f"int lane = 0; lane < {math.prod(self.capacity(a) for a in v.axes)}; ++lane"

    def _carried(self, name: str) -> bool:
        return any(isinstance(op, ir.Assign) and op.dst.name == name for op in ir.operations(self.kernel.body))

    def walk(self, item: Walk, indent: str) -> Iterator[str]:
        axis = item.loop.axis
        long = self.long_sums(item.loop)
        for v in long:
            size = math.prod(self.capacity(a) for a in v.axes)
            yield f"{indent}alignas(64) double {self.wide(v).split('[')[0]}[{size}];" if v.axes else f"{indent}double {self.wide(v)};"
            yield f"{indent}{self.each(v)} {self.wide(v)} = 0.0;"
        if axis.scalar:
            name = self.c(axis.name)
            yield f"{indent}for (i64 {name} = 0; {name} < {self.extent(axis)}; ++{name}) {{"
            yield from (f"{indent}    {line}" for line in self.decode(axis))
        else:
            start, stop = self.helper(f"{axis.name}_start"), self.helper(f"{axis.name}_stop")
            yield f"{indent}for (i64 {start} = 0; {start} < {self.extent(axis)}; {start} += {axis.tile}) {{"
            yield f"{indent}    const i64 {stop} = {start} + {axis.tile} < {self.extent(axis)} ? {start} + {axis.tile} : {self.extent(axis)};"
        self.open.add(axis.name)
        yield from self.items(item.body, indent + "    ")
        self.open.discard(axis.name)
        for v in long:
            yield f"{indent}    if ({self.c(axis.name)} % {BLOCK} == {BLOCK - 1}) {{ {self.moved(v)} }}"
        yield f"{indent}}}"
        for v in long:
            yield f"{indent}{self.each(v)} {self.at(v)} = (float)({self.wide(v)} + {self.at(v)});"

    # -- float32 sums that a loop adds to step by step: every BLOCK steps they move into a sum in double

    def long_sums(self, loop: ir.For) -> list[ir.Value]:
        """The carried values that a long loop only adds to."""
        if not loop.axis.scalar or loop.axis.extent <= 2 * BLOCK:
            return []
        found = []
        for op in loop.body:
            if not isinstance(op, ir.Assign) or op.dst.dtype != "float32":
                continue
            readers = [x for x in ir.operations(loop.body) if any(v.name == op.dst.name for v in operands(x, self.values))]
            (maker,) = (
                x for x in ir.operations(loop.body) if not isinstance(x, ir.For | ir.Store | ir.Assign) and x.dst.name == op.src.name
            )
            users = [x for x in ir.operations(loop.body) if any(v.name == op.src.name for v in operands(x, self.values))]
            if (
                readers == [maker]
                and users == [op]
                and isinstance(maker, ir.Elementwise)
                and maker.op == "add"
                and list(maker.args).count(op.dst) == 1
            ):
                found.append(op.dst)
        return found

    def wide(self, v: ir.Value) -> str:
        name = self.helper(f"{v.name}_wide")
        return f"{name}[lane]" if v.axes else name

    def at(self, v: ir.Value) -> str:
        return f"{self.c(v.name)}[lane]" if v.axes else self.c(v.name)

    def each(self, v: ir.Value) -> str:
        return f"for ({self._whole_array(v)})" if v.axes else ""

    def moved(self, v: ir.Value) -> str:
        """The sum of a block into the whole one."""
        both = f"{self.wide(v)} += {self.at(v)}; {self.at(v)} = 0.0f;"
        return f"{self.each(v)} {{ {both} }}" if v.axes else both

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

    # -- nests ----------------------------------------------------------------------------------------------------------------

    def nest(self, nest: Nest, indent: str) -> Iterator[str]:
        yield from _NestPrinter(self, nest).run(indent)

    def operation(self, op: ir.Operation, kept: frozenset[str]) -> Iterator[str]:
        """The statements of one operation on numbers."""
        if isinstance(op, ir.Store):
            yield from self.store(op)
        elif isinstance(op, ir.Assign):
            yield f"{self.element(op.dst) if op.dst.axes else self.c(op.dst.name)} = {self.ref(op.src)};"
        elif not isinstance(op, ir.For):
            self.here.add(op.dst.name)
            yield f"const {REGISTER[op.dst.dtype]} {self.local(op.dst)} = {self.value(op)};"
            if op.dst.name in kept:
                yield f"{self.element(op.dst)} = {self.local(op.dst)};"

    def value(self, op: ir.Operation) -> str:
        match op:
            case ir.Load():
                return self.load(op)
            case ir.IndexOf():
                return self.expression(op.expr)
            case ir.Elementwise():
                return self.elementwise(op)
            case ir.Full():
                return self.number(op.fill, op.dst.dtype)
            case ir.Mask():
                return self.ref(op.src)
        raise AssertionError(op)

    def elementwise(self, op: ir.Elementwise) -> str:
        row = OPS[op.op]
        if op.op in DTYPES:
            (source,) = op.args
            assert isinstance(source, ir.Value)
            return self.cast(self.ref(source), source.dtype, op.dst.dtype)
        typed = [a.dtype for n, a in enumerate(op.args) if isinstance(a, ir.Value) and not (row.kind == "branch" and n == 0)]
        kind = typed[0] if typed and row.kind == "bool" else op.dst.dtype
        args = [self.ref(a) if isinstance(a, ir.Value) else self.number(a, kind) for a in op.args]
        if op.op == "where":
            return f"{args[0]} ? {args[1]} : {args[2]}"
        infix = row.triton.format(*["" for _ in args])
        if not re.search(r"\w{2}", infix):
            text = row.triton.format(*args)
            return text[1:-1]
        if not cpp_math.known(op.op):
            raise Unsupported(f"{op.op} has no C++ spelling (cpp)")
        self.calls.add(op.op)
        return f"{op.op}({', '.join(args)})"

    def cast(self, text: str, source: str, to: str) -> str:
        if source == to:
            return text
        if source in _HALVES:
            self.calls.add(f"from_{_HALVES[source]}")
            text, source = f"from_{_HALVES[source]}({text})", "float32"
        if to in _HALVES:
            self.calls.add(f"to_{_HALVES[to]}")
            return f"to_{_HALVES[to]}({text if source == 'float32' else f'(float)({text})'})"
        if to == "bool":
            return f"{text} != 0"
        if to == "uint8" and DTYPES[source].kind == "float":
            return f"(u8)(i64)({text})"
        return text if source == to else f"({REGISTER[to]})({text})"

    def number(self, value: float | int | bool, dtype: str) -> str:
        if dtype in ("float16", "bfloat16"):
            return self.cast(self.number(value, "float32"), "float32", dtype)
        if DTYPES[dtype].kind == "float":
            value = float(value)
            end = "f" if dtype == "float32" else ""
            if math.isinf(value) or math.isnan(value):
                text = f"__builtin_inf{end}()" if math.isinf(value) else f'__builtin_nan{end}("")'
                return f"(-{text})" if value < 0 else text
            return f"({value!r}{end})" if value < 0 else f"{value!r}{end}"
        if dtype == "bool":
            return "true" if value else "false"
        value = int(value)
        if value == -(2**63):
            return "(-9223372036854775807LL - 1)"
        return f"({value}LL)" if value < 0 else f"{value}LL"

    # -- memory ---------------------------------------------------------------------------------------------------------------

    def load(self, op: ir.Load) -> str:
        b = op.buffer
        if b.number:
            return f"({REGISTER[op.dst.dtype]}){self.c(b.name)}" if op.dst.dtype != "bool" else f"{self.c(b.name)} != 0"
        if any(n == 0 for n in b.shape):
            return self.number(0, op.dst.dtype)
        text = f"{self.c(b.name)}[{self.offset(b, op.subscripts)}]"
        if op.dst.dtype == "bool":
            text = f"{text} != 0"
        inside = self.inside(b, op.subscripts)
        return f"{inside} ? {text} : {self.number(0, op.dst.dtype)}" if inside else text

    def inside(self, b: ir.Buffer, subscripts: tuple[Expr, ...]) -> str:
        """The condition that every padded subscript is inside."""
        terms = []
        for d, e in enumerate(subscripts):
            if isinstance(e, Pad):
                size = self.integer(f"{b.name}_size_{d}", b.shape[d])
                terms.append(f"((u64)({self.expression(e.value)}) < (u64){size})")
        return terms[0] if len(terms) == 1 else f"({' & '.join(terms)})" if terms else ""

    def offset(self, b: ir.Buffer, subscripts: tuple[Expr, ...]) -> str:
        """Elements from a buffer's start; several indices that are walked as one axis are one term."""
        merged: dict[int, str] = {}
        for axis in self.kernel.axes:
            if len(axis.indices) > 1 and self._walks(b, subscripts, axis):
                names = [i for i, _ in axis.indices]
                places = [d for d, e in enumerate(subscripts) if isinstance(e, Index) and e.name in names]
                merged.update(dict.fromkeys(places, ""))
                last = next((d for d in places if subscripts[d] == Index(names[-1])), None)
                if last is not None:
                    merged[last] = self.c(axis.name)
        terms = []
        for d, e in enumerate(subscripts):
            text = merged.get(d)
            if text == "" or b.strides[d] == 0:
                continue
            text = text or self.subscript(b, d, e)
            if text == "0":
                continue
            terms.append(text if b.strides[d] == 1 else f"{text if text.isidentifier() else f'({text})'} * {self.stride(b, d)}")
        return " + ".join(terms) or "0"

    def subscript(self, b: ir.Buffer, d: int, e: Expr) -> str:
        if isinstance(e, Clamp):
            text, last = self.expression(e.value), self.integer(f"{b.name}_last_{d}", b.shape[d] - 1)
            return f"(({text}) < 0 ? 0 : ({text}) > {last} ? {last} : ({text}))"
        return self.expression(e.value if isinstance(e, Pad) else e)

    def store(self, op: ir.Store) -> Iterator[str]:
        b = op.buffer
        place = f"{self.c(b.name)}[{self.offset(b, op.subscripts)}]"
        value = self.ref(op.src)
        if op.mode != "set":
            compute = DTYPES[b.dtype].compute if b.dtype != "bool" else "int64"
            old, new = self.cast(place, b.dtype, compute), self.cast(value, op.src.dtype, compute)
            value = self.cast(self.combined(op.mode, old, new), compute, b.dtype)
        inside = self.inside(b, op.subscripts)
        yield f"{f'if ({inside}) ' if inside else ''}{place} = {value};"

    def combined(self, mode: str, a: str, b: str) -> str:
        if mode in ("add", "sum"):
            return f"{a} + {b}"
        if mode == "prod":
            return f"{a} * {b}"
        function = REDUCTIONS[mode].combine
        self.calls.add(function)
        return f"{function}({a}, {b})"

    def expression(self, e: Expr) -> str:
        """An integer expression of indices and integer values."""
        match e:
            case Const(value=value):
                return str(int(value))
            case Index(name=name):
                return self.ref(self.values[name]) if name in self.values else self.c(name)
            case Call(op="floordiv" | "mod" as op, args=(a, Const(value=int() as n))) if n > 0 and _never_negative(a):
                return f"({self.expression(a)} {'/' if op == 'floordiv' else '%'} {n})"
            case Call(op=op, args=args):
                row = OPS[op]
                texts = [self.expression(a) for a in args]
                infix = row.triton.format(*["" for _ in args])
                if not re.search(r"\w{2}", infix):
                    return row.triton.format(*texts)
                if op == "where":
                    return f"({texts[0]} ? {texts[1]} : {texts[2]})"
                if not cpp_math.known(op):
                    raise Unsupported(f"{op} has no C++ spelling in a subscript (cpp)")
                self.calls.add(op)
                return f"{op}({', '.join(f'(i64)({t})' for t in texts)})"
        raise Unsupported(f"{type(e).__name__} cannot stand in a subscript (cpp)")

    def _unsafe(self, op: ir.Store) -> list[ir.Axis]:
        """The axes along which a store may hit one element twice, so that their order must be one after the other."""
        if op.mode == "set":
            return []
        alone = [e.name for e in op.subscripts if isinstance(e, Index) and e.name not in self.values]
        return [a for a in self.kernel.axes if a.name in op.axes or a.scalar if not all(i in alone for i, _ in a.indices)]


def _never_negative(e: Expr) -> bool:
    """Whether an expression of indices is at least 0: sums, products and quotients of such."""
    match e:
        case Index():
            return True
        case Const(value=value):
            return value >= 0
        case Call(op="add" | "mul" | "floordiv" | "mod", args=args):
            return all(_never_negative(a) for a in args)
    return False


class _NestPrinter:
    """One nest: the loops, its values at the depth where they vary, and the partial results of its folds."""

    def __init__(self, printer: _Printer, nest: Nest):
        self.p = printer
        self.nest = nest
        self.lane = nest.axes[-1]
        self.outer = nest.axes[:-1]
        self.folds = [op for op in nest.body if isinstance(op, ir.Fold | ir.Dot)]
        kernel = printer.kernel
        self.serial = any(isinstance(op, ir.Store) and self.lane in {a.name for a in printer._unsafe(op)} for op in nest.body)
        short = kernel.axis(self.lane).role == "whole" and kernel.axis(self.lane).extent <= SMALL
        self.across = any(self.lane in _reduced(op) for op in self.folds)
        self.in_lanes = self.across and not short and not self.serial
        self.crossed = [op for op in nest.body if isinstance(op, ir.Load | ir.Store) and self._crosses(op)]
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
        outside, across, along = p.stride(op.buffer, d), _less(last, first), _less(stop, start)
        if isinstance(op, ir.Load):
            yield f"{indent}    transposed({place}, {outside}, {across}, {along}, {self.tile(op)}, {width});"
        else:
            yield f"{indent}    transposed({self.tile(op)}, {width}, {along}, {across}, {place}, {outside});"
        yield f"{indent}}}"

    def tile(self, op: ir.Load | ir.Store) -> str:
        return self.p.helper(f"{op.dst.name if isinstance(op, ir.Load) else op.buffer.name}_tile")

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
        terms = math.prod(self.length(a) for a in _reduced(op))
        return terms > BLOCK * (LANES if self.in_lanes and self.lane in _reduced(op) else 1)

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
        start = p.number(_identity(op), op.dst.dtype)
        if isinstance(op, ir.Dot) and op.acc is not None:
            raise Unsupported("a product that goes on from an accumulator stays torch code (cpp)")
        if op.dst.axes:
            if op.dst.name in self.blocked:
                p.stored_types[op.dst.name] = "double"
            yield f"{indent}for ({p._whole_array(op.dst)}) {p.c(op.dst.name)}[lane] = {start};"
            if op.dst.name in self.blocked and self.lane in op.dst.axes:
                size = math.prod(p.capacity(a) for a in op.dst.axes)
                yield f"{indent}alignas(64) float {self.part(op)}[{size}];"
                yield f"{indent}for ({p._whole_array(op.dst)}) {self.part(op)}[lane] = {start};"
        elif op.dst.name in self.blocked:
            yield f"{indent}double {self.total(op)} = {start};"
        else:
            yield f"{indent}{REGISTER[op.dst.dtype]} {p.c(op.dst.name)} = {start};"

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
                self.length(a) for op in self.folds if op.dst.name in self.blocked for a in self.outer[depth + 1 :] if a in _reduced(op)
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
            if any(op.dst.name in self.blocked and self.lane in op.dst.axes and axis in _reduced(op) for op in self.folds):
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
        p = self.p
        name, (start, stop) = p.c(self.lane), p.span(self.lane)
        decode = [f"    {line}" for line in p.decode(p.kernel.axis(self.lane))]
        if not self.in_lanes:
            if not self.serial and not (self.across and not self.in_lanes):
                yield f"{indent}#pragma omp simd"
            yield f"{indent}for (i64 {name} = {start}; {name} < {stop}; ++{name}) {{"
            yield from (indent + line for line in decode)
            yield from self.body(indent + "    ")
            yield f"{indent}}}"
            return
        across = [op for op in self.folds if self.lane in _reduced(op)]
        long = any(op.dst.name in self.blocked for op in across) and self.length(self.lane) > BLOCK * LANES
        if long:
            first = p.helper(f"{self.lane}_block")
            size = BLOCK * LANES
            yield f"{indent}for (i64 {first} = {start}; {first} < {stop}; {first} += {size}) {{"
            indent += "    "
            start, stop = first, f"({first} + {size} < {stop} ? {first} + {size} : {stop})"
        for op in across:
            yield f"{indent}alignas(64) {REGISTER[op.dst.dtype]} {self.part(op)}[LANES];"
            yield f"{indent}fill({self.part(op)}, {p.number(_identity(op), op.dst.dtype)});"
        yield f"{indent}lanes({start}, {stop}, [&](i64 {name}, int lane) __attribute__((always_inline)) {{"
        yield from (indent + line for line in decode)
        yield from self.body(indent + "    ")
        yield f"{indent}}});"
        for op in across:
            kind = REGISTER[op.dst.dtype]
            combine = f"[]({kind} a, {kind} b) {{ return {p.combined(_reduction(op), 'a', 'b')}; }}"
            yield f"{indent}{self.total(op)} = {p.combined(_reduction(op), self.total(op), f'folded({self.part(op)}, {combine})')};"
        if long:
            yield f"{indent[4:]}}}"

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
                yield f"{indent}{self.target(op)} = {p.combined(_reduction(op), self.target(op), term)};"
            elif isinstance(op, ir.Store) and op in self.crossed:
                yield f"{indent}{self.in_tile(op)} = {p.ref(op.src)};"
            elif isinstance(op, ir.Load) and op in self.crossed:
                p.here.add(op.dst.name)
                yield f"{indent}const {REGISTER[op.dst.dtype]} {p.local(op.dst)} = {self.in_tile(op)}{' != 0' if op.dst.dtype == 'bool' else ''};"
                if op.dst.name in self.nest.kept:
                    yield f"{indent}{p.element(op.dst)} = {p.local(op.dst)};"
            elif self._depth(op) == deepest:
                yield from (indent + line for line in p.operation(op, self.nest.kept))

    def target(self, op: ir.Fold | ir.Dot) -> str:
        """Where one term goes."""
        p = self.p
        if self.in_lanes and self.lane in _reduced(op):
            return f"{self.part(op)}[lane]"
        if op.dst.name in self.blocked and self.lane in op.dst.axes:
            return p.element(op.dst).replace(p.c(op.dst.name), self.part(op), 1)
        return self.total(op)


def _less(stop: str, start: str) -> str:
    """How many elements lie between, as text."""
    return stop if start == "0" else stop[len(start) + 3 :] if stop.startswith(f"{start} + ") else f"{stop} - {start}"


def _reduced(op: ir.Fold | ir.Dot) -> tuple[str, ...]:
    return op.axes if isinstance(op, ir.Fold) else op.contract


def _reduction(op: ir.Fold | ir.Dot) -> str:
    return op.reduction if isinstance(op, ir.Fold) else "sum"


def _identity(op: ir.Fold | ir.Dot) -> float | int | bool:
    return identity(_reduction(op), op.dst.dtype)
