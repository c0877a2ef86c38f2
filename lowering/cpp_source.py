"""Prints loop nests as C++ for a CPU: programs of the grid in parallel, the last axis of each nest as vector code.

Sizes and strides are arguments, so that one library serves many shapes; small ones stand in the code as numbers and let the
compiler unroll. A sum along the last axis is held in LANES partial sums, which keeps several vector units busy and adds
pairwise; a longer one is cut into blocks whose sums are added in double. Nothing is reassociated by the compiler.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lowering import cpp_math
from lowering import tile_ir as ir
from lowering.cpp_gemm import GEMM
from lowering.cpp_nest import BLOCK
from lowering.cpp_prelude import HELPERS, HUGE, REGISTER, STORAGE, TRANSPOSED
from lowering.cpp_product import product
from lowering.cpp_values import Values
from lowering.cpp_vector_nest import nest_printer
from lowering.cpp_vectors import BRAIN, HALF, VECTORS
from lowering.factor_out import factor_out
from lowering.merge import merge
from lowering.nests import Item, Nest, Product, Walk, operands
from lowering.once import once
from tdsl.errors import Unsupported
from tdsl.ops import DTYPES

# Bytes of local arrays that one program may have; threads have stacks of a few MiB.
LOCAL = 1 << 19
# The same for a program of matrix products, whose larger arrays lie in memory that the caller gives it.
SCRATCH = 1 << 27
LARGE, PAGE = 1 << 14, 1 << 12
# Bytes of a tensor from which large pages pay.
ADVISED = 1 << 22


@dataclass(frozen=True, slots=True)
class CppKernel:
    """One function. buffers: its first arguments, pointers or numbers. integers: values of the sizes and strides that follow.

    calls: functions of cpp_math that it needs. parallel: whether several threads may run it. fused: as of its tile IR.
    scratch: bytes of memory per thread that it needs as its last argument.
    """

    name: str
    source: str
    buffers: tuple[ir.Buffer, ...]
    integers: tuple[int, ...]
    calls: frozenset[str]
    parallel: bool
    fused: bool = True
    scratch: int = 0


def cpp_source(kernel: ir.Kernel, overlap: frozenset[str] = frozenset()) -> CppKernel:
    """`extern "C" void name(buffers.., const i64* integers, int threads)`. Raises Unsupported for what stays torch code.

    overlap: tensors that are the same memory, under several names.
    """
    return replace(_Printer(once(factor_out(merge(kernel))), overlap).run(), fused=kernel.fused)


def cpp_module(kernels: Sequence[CppKernel]) -> str:
    """One translation unit with all kernels of a program."""
    calls = frozenset().union(*(k.calls for k in kernels))
    texts = {"vectors": VECTORS, "transposed": TRANSPOSED, "huge": HUGE, "gemm": GEMM}
    if "vectors" in calls:
        texts["vectors"] += "".join(text for kind, text in (("bf16", BRAIN), ("f16", HALF)) if {f"from_{kind}", f"to_{kind}"} & calls)
    own = [text for name, text in texts.items() if name in calls or (name == "transposed" and "gemm" in calls)]
    fused = f"enum {{ FUSED = {int(all(k.fused for k in kernels))} }};  // whether a product and a sum are one operation\n"
    return "\n".join([cpp_math.TYPES, fused, cpp_math.prelude(calls - texts.keys()), HELPERS, *own, *(k.source for k in kernels)])


class _Printer(Values):
    """A kernel as one function."""

    scratch = 0

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
        if self.scratch:
            thread = f" + omp_get_thread_num() * (i64){self.scratch}" if parallel else ""
            local = [f"{indent}char* const scratch = memory{thread};", *local]
        closing = [f"{'    ' * n}}}" for n in range(len(indent) // 4 - 1, 0, -1)] if grid else []
        arguments = ", ".join(
            [
                *(self.parameter(b) for b in self.kernel.buffers),
                "const i64* integers",
                "int threads",
                *(["char* memory"] if self.scratch else []),
            ]
        )
        advised = list(self.advised())
        notation = [f"// {line}" for line in self.kernel.notation.splitlines()]
        sizes = [f"    const i64 {name} = integers[{n}];" for n, name in enumerate(self.integers)]
        unused = [] if parallel else ["    (void)threads;"]
        lines = [
            *notation,
            f'extern "C" void {self.kernel.name}({arguments}) {{',
            *sizes,
            *unused,
            *advised,
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
            scratch=self.scratch,
        )

    def parameter(self, b: ir.Buffer) -> str:
        name = self.c(b.name)
        if b.number:
            return f"{'double' if DTYPES[b.dtype].kind == 'float' else 'i64'} {name}"
        written = any(isinstance(op, ir.Store) and op.buffer.tensor == b.tensor for op in ir.operations(self.kernel.body))
        alone = "" if b.tensor in self.overlap else "__restrict__ "
        return f"{'' if written else 'const '}{STORAGE[b.dtype]}* {alone}{name}"

    def advised(self) -> Iterator[str]:
        """What the system should know of large tensors that the kernel writes, and of the memory that it is given."""
        stores = {op.buffer.name: op.buffer for op in ir.operations(self.kernel.body) if isinstance(op, ir.Store) and op.mode == "set"}
        for b in stores.values():
            size = self.bytes_of(b)
            if size >= ADVISED and all(n * step <= size for n, step in zip(b.shape, b.strides, strict=True)):
                self.calls.add("huge")
                yield f"    huge({self.c(b.name)}, {self.integer(f'{b.name}_bytes', size)});"
        if self.scratch >= ADVISED:
            self.calls.add("huge")
            yield f"    huge(memory, threads * (i64){self.scratch});"

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

    def declarations(self) -> Iterator[str]:
        """Local arrays: on the stack, or all large ones in memory that the caller gives where that has too little room."""
        sizes = {}
        for name, v in self.arrays.items():
            if name not in self.same:
                kind = self.stored_types.get(name) or STORAGE[v.dtype]
                sizes[name] = (
                    kind,
                    math.prod(self.capacity(a) for a in v.axes),
                    8 if kind in ("double", "i64") else DTYPES[v.dtype].bits // 8,
                )
        total = sum(elements * item for _, elements, item in sizes.values())
        given = total > LOCAL and "gemm" in self.calls
        if total > (SCRATCH if given else LOCAL):
            raise Unsupported(f"{self.kernel.name} would keep {total} bytes of intermediates per thread (cpp)")
        for name, (kind, elements, item) in sizes.items():
            if not given or elements * item < LARGE:
                yield f"alignas(64) {kind} {self.c(name)}[{elements}];"
                continue
            yield f"{kind}* __restrict__ const {self.c(name)} = ({kind}*)(scratch + {self.scratch});"
            self.scratch += -(-elements * item // PAGE) * PAGE

    # -- items ----------------------------------------------------------------------------------------------------------------

    def items(self, items: Sequence[Item], indent: str) -> Iterator[str]:
        for item in items:
            if isinstance(item, Nest):
                yield from nest_printer(self, item).run(indent)
            elif isinstance(item, Walk):
                yield from self.walk(item, indent)
            elif isinstance(item, Product):
                yield from product(self, item, indent)
            elif isinstance(item, ir.Full) and item.dst.axes:
                yield f"{indent}for ({self.whole_array(item.dst)}) {self.c(item.dst.name)}[lane] = {self.number(item.fill, item.dst.dtype)};"
            elif isinstance(item, ir.Full):  # a carried number
                constant = "" if self._carried(item.dst.name) else "const "
                yield f"{indent}{constant}{REGISTER[item.dst.dtype]} {self.c(item.dst.name)} = {self.number(item.fill, item.dst.dtype)};"
            else:
                yield from (indent + line for line in self.operation(item, frozenset()))

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
        return f"for ({self.whole_array(v)})" if v.axes else ""

    def moved(self, v: ir.Value) -> str:
        """The sum of a block into the whole one."""
        both = f"{self.wide(v)} += {self.at(v)}; {self.at(v)} = 0.0f;"
        return f"{self.each(v)} {{ {both} }}" if v.axes else both
