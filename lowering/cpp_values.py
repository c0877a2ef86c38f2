"""One operation of the tile IR as C++ on numbers: arithmetic, casts, loads and stores with their addresses."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

from lowering import cpp_math
from lowering import tile_ir as ir
from lowering.cpp_axes import SMALL, Axes
from lowering.cpp_prelude import HALVES, REGISTER
from tdsl.affine import linear
from tdsl.errors import Unsupported
from tdsl.ir import Call, Clamp, Const, Expr, Index, Pad
from tdsl.ops import DTYPES, OPS, REDUCTIONS
from tdsl.traced import is_traced, whole

# Bytes of a tensor that a core's share of the caches does not keep until somebody reads it: it goes to memory past them, without
# being read first. Softmax's backward over 4096 x 1024 numbers on one core of a Zen 4: 2.3 ms with stores as usual, 1.7 ms with these.
STREAMED = 1 << 23


class Values(Axes):
    """The values of a kernel, each under its name or as the current element of its array. vector: the axis, if any, along which what is
    printed stands for several elements at once, at the place that `at` knows. divisors: what they are divided by often -> its Divisor."""

    vector = ""
    divisors: Mapping[str, str] = {}

    def ref(self, v: ir.Value) -> str:
        if v.name in self.arrays and v.name not in self.here:
            text = self.element(v)
            if self.vector in v.axes:
                return f"at.load(&{text})"
            if v.dtype == "bool":
                return f"({text} != 0)"
            return f"(float){text}" if self.stored_types.get(v.name) else text
        return self.local(v)

    def local(self, v: ir.Value) -> str:
        """The name of a number, which is not that of the array that keeps it."""
        return self.helper(f"{v.name}_now") if v.name in self.arrays else self.c(v.name)

    def operation(self, op: ir.Operation, kept: frozenset[str]) -> Iterator[str]:
        """The statements of one operation on numbers."""
        if isinstance(op, ir.Store):
            yield from self.store(op)
        elif isinstance(op, ir.Assign):
            yield self.assigned(self.element(op.dst) if op.dst.axes else self.c(op.dst.name), self.ref(op.src), op.dst.axes)
        elif not isinstance(op, ir.For):
            self.here.add(op.dst.name)
            yield f"const {self.register(op.dst)} {self.local(op.dst)} = {self.value(op)};"
            if op.dst.name in kept:
                yield self.assigned(self.element(op.dst), self.local(op.dst), op.dst.axes)

    def register(self, v: ir.Value) -> str:
        """The type of a value, or of several of its elements."""
        if self.vector in v.axes:
            return "Half" if v.dtype in HALVES else {"bool": "Mask", "int64": "Int"}.get(v.dtype, "Float")
        return REGISTER[v.dtype]

    def bytes_of(self, b: ir.Buffer) -> int:
        """The size of a tensor's elements together."""
        return math.prod(b.shape) * DTYPES[b.dtype].bits // 8

    def assigned(self, place: str, value: str, axes: tuple[str, ...], stores: str = "store") -> str:
        return f"at.{stores}(&{place}, {value});" if self.vector in axes else f"{place} = {value};"

    def value(self, op: ir.Operation) -> str:
        match op:
            case ir.Load():
                return self.load(op)
            case ir.IndexOf():
                return self.along(op) if self.vector in op.dst.axes else self.expression(op.expr)
            case ir.Elementwise():
                return self.elementwise(op)
            case ir.Full():
                return self.number(op.fill, op.dst.dtype)
            case ir.Mask():
                return self.ref(op.src)
        raise AssertionError(op)

    def along(self, op: ir.IndexOf) -> str:
        """An affine expression of indices, from its value at the vector's first element on."""
        ((index, _),) = self.kernel.axis(self.vector).indices
        return f"along({self.expression(op.expr)}, {linear(op.expr).coefficient(index)})"

    def elementwise(self, op: ir.Elementwise) -> str:
        row = OPS[op.op]
        if op.op in DTYPES:
            (source,) = op.args
            assert isinstance(source, ir.Value)
            if self.vector in source.axes and source.dtype in ("bool", "int64"):
                return f"choose({self.ref(source)}, 1.0f, 0.0f)" if source.dtype == "bool" else f"Float({self.ref(source)})"
            return self.cast(self.ref(source), source.dtype, op.dst.dtype)
        typed = [a.dtype for n, a in enumerate(op.args) if isinstance(a, ir.Value) and not (row.kind == "branch" and n == 0)]
        kind = typed[0] if typed and row.kind == "bool" else op.dst.dtype
        args = [self.ref(a) if isinstance(a, ir.Value) else self.number(a, kind) for a in op.args]
        if op.op == "div" and args[1] in self.divisors:
            args[1] = self.divisors[args[1]]
        if op.op == "where":
            return f"choose({', '.join(args)})" if self.vector in op.dst.axes else f"{args[0]} ? {args[1]} : {args[2]}"
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
        if source in HALVES:
            self.calls.add(f"from_{HALVES[source]}")
            text, source = f"from_{HALVES[source]}({text})", "float32"
        if to in HALVES:
            self.calls.add(f"to_{HALVES[to]}")
            return f"to_{HALVES[to]}({text if source == 'float32' else f'(float)({text})'})"
        if to == "bool":
            return f"{text} != 0"
        if to == "uint8" and DTYPES[source].kind == "float":
            return f"(u8)(i64)({text})"
        return text if source == to else f"({REGISTER[to]})({text})"

    def number(self, value: float | int | bool, dtype: str) -> str:
        if dtype in ("float16", "bfloat16"):
            return self.cast(self.number(value, "float32"), "float32", dtype)
        if is_traced(value) and DTYPES[dtype].kind == "float" and value > SMALL:  # an argument, as the sizes of axes are
            name = self.counts.setdefault(whole(value), f"count_{len(self.counts)}")
            return self.cast(self.integer(name, whole(value)), "int64", dtype)
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
        if self.vector in op.dst.axes:
            text = f"at.load(&{text})"
        elif op.dst.dtype == "bool":
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
            old = f"at.load(&{place})" if self.vector in op.axes else place
            old, new = self.cast(old, b.dtype, compute), self.cast(value, op.src.dtype, compute)
            value = self.cast(self.combined(op.mode, old, new), compute, b.dtype)
        inside = self.inside(b, op.subscripts)
        stores = "stream" if op.mode == "set" and b.dtype == "float32" and self.bytes_of(b) >= STREAMED else "store"
        yield f"{f'if ({inside}) ' if inside else ''}{self.assigned(place, value, op.axes, stores)}"

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
