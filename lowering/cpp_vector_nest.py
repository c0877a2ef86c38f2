"""A nest whose last axis is walked in vectors: what it computes along it are Floats and Masks of cpp_vectors.py.

    for c: e[c] = exp(x[c] - m); s += e[c]
    -->
    vectors<PARTS>(0, size_c, [&](i64 c, auto at) {
        const Float e = exp(at.load(&x[c]) - m);
        s_part[at.part] = s_part[at.part] + at.only(e, 0.0f);
    });

That takes float32 (or half of it in memory) and masks alone, which lie side by side wherever they are read or written along that axis, and indices that 32 bits
hold; other nests are loops that the compiler makes vector code of where it can.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from lowering import tile_ir as ir
from lowering.addresses import axis_step
from lowering.cpp_axes import SMALL
from lowering.cpp_nest import NestPrinter, identity_of, reduced, reduction_of
from lowering.cpp_prelude import HALVES
from lowering.cpp_values import Values
from lowering.nests import Nest
from tdsl.affine import linear
from tdsl.ir import Call, Clamp, Expr, Index, Pad, free_indices, walk
from tdsl.ops import DTYPES, OPS, template

# Functions of single numbers in cpp_functions.py: of double, or of the C library's.
_SINGLE = frozenset({"sin", "cos", "pow", "mod", "floordiv", "mix", "rand"})
_COMPARED = frozenset({"eq", "ne", "lt", "le", "gt", "ge"})
_LOGICAL = frozenset({"and", "or", "not", "eq", "ne"})


def nest_printer(printer: Values, nest: Nest) -> NestPrinter:
    """How a nest is printed. Vectors count on a product and a sum being one operation, which some kernels must not have."""
    plain = NestPrinter(printer, nest)
    return VectorNest(printer, nest) if printer.kernel.fused and _takes_vectors(plain) else plain


def _takes_vectors(n: NestPrinter) -> bool:
    p, lane = n.p, n.lane
    axis = p.kernel.axis(lane)
    if n.crossed or n.serial or axis.scalar or (axis.role == "whole" and axis.extent <= SMALL) or any(p.decode(axis)):
        return False
    return all(_fits(p, op, lane) for op in n.nest.body)


def _fits(p: Values, op: ir.Operation, lane: str) -> bool:
    """Whether an operation is one on vectors, if it varies along the last axis at all."""
    if isinstance(op, ir.For):
        return False
    match op:
        case ir.Fold(src=src):
            values = [op.dst, src]
        case ir.Dot(lhs=lhs, rhs=rhs):
            values = [op.dst, lhs, rhs]
        case ir.Elementwise(args=args):
            values = [op.dst, *(a for a in args if isinstance(a, ir.Value))]
        case ir.Store(src=src) | ir.Assign(src=src) | ir.Mask(src=src):
            values = [src, *([] if isinstance(op, ir.Store) else [op.dst])]
        case _:
            values = [op.dst]
    along = [v for v in values if lane in v.axes]
    if not along and not (isinstance(op, ir.Store) and lane in op.axes):
        return True
    if not all(v.dtype in ("float32", "bool", "int64", *HALVES) and _side_by_side(p, v, lane) for v in along):
        return False
    if any(v.dtype == "int64" for v in along):
        return _counts(p, op, lane)
    match op:
        case ir.Elementwise():
            return _computes(op, values, lane)
        case ir.Load(dst=value, buffer=b, subscripts=subscripts) | ir.Store(src=value, buffer=b, subscripts=subscripts):
            axis = p.kernel.axis(lane)
            moved = {i for e in subscripts if isinstance(e, Pad | Clamp) for i in free_indices(e)} & {i for i, _ in axis.indices}
            if moved or b.number or b.dtype != value.dtype or axis_step(subscripts, b.strides, axis.indices, p.values) != 1:
                return False
            return b.dtype == "float32" or isinstance(op, ir.Load) or (op.mode == "set" and lane in value.axes)
        case ir.Assign() | ir.Mask() | ir.Full():
            return not any(v.dtype in HALVES for v in along)
        case ir.Fold() | ir.Dot():
            return op.dst.dtype == "float32" and all(v.dtype == "float32" for v in along)
    return False


def _computes(op: ir.Elementwise, values: list[ir.Value], lane: str) -> bool:
    """Whether arithmetic is on floats and masks. values: the result, and what it is made of."""
    result, *args = (v.dtype for v in values)
    if op.op in DTYPES:
        return all(lane in v.axes for v in values) and ("float32" in (result, *args) or {result, *args} == {"bool"})
    if op.op == "where":
        return result == "float32" and {*args} <= {"float32", "bool"}
    if result == "bool":
        return (op.op in (*_COMPARED, "isnan") and {*args} == {"float32"}) or (op.op in _LOGICAL and {*args} == {"bool"})
    return {result, *args} == {"float32"} and not _single(op.op)


# -- loop indices as values: 32 bits hold them


def _counts(p: Values, op: ir.Operation, lane: str) -> bool:
    """Whether an operation on integers is one on small numbers: it makes them of indices, compares them, or makes floats of them."""
    if isinstance(op, ir.IndexOf):
        return _size(p, op.dst.name) is not None
    if not isinstance(op, ir.Elementwise):
        return False
    if op.op in _COMPARED:
        whole = all(DTYPES[a.dtype].kind == "int" if isinstance(a, ir.Value) else isinstance(a, int) for a in op.args)
        return whole and all(not isinstance(a, ir.Value) or lane not in a.axes or _size(p, a.name) is not None for a in op.args)
    if op.dst.dtype == "int64":
        return _size(p, op.dst.name) is not None
    return op.op == "float32"


def _size(p: Values, name: str) -> int | None:
    """The most that an integer made of indices and numbers may be, either way; None where that is not known to be less than 2^30."""
    op = p.makers.get(name)
    if isinstance(op, ir.IndexOf):
        found = _reach(p, op.expr)
    elif isinstance(op, ir.Elementwise) and op.op in ("add", "sub", "mul", "neg"):
        sizes = [_size(p, a.name) if isinstance(a, ir.Value) else abs(a) if isinstance(a, int) else None for a in op.args]
        known = [n for n in sizes if n is not None]
        found = None if len(known) < len(sizes) else math.prod(known) if op.op == "mul" else sum(known)
    else:
        found = None
    return found if found is not None and found < 1 << 30 else None


def _reach(p: Values, e: Expr) -> int | None:
    """The same of an affine expression of loop indices."""
    extents = {i: n for a in p.kernel.axes for i, n in a.indices}
    form = linear(e)
    if any(not isinstance(atom, Index) or atom.name not in extents for atom, _ in form.terms):
        return None
    return abs(form.const) + sum(abs(c) * extents[atom.name] for atom, c in form.terms if isinstance(atom, Index))


def _side_by_side(p: Values, v: ir.Value, lane: str) -> bool:
    """Whether a value's array, if it has one, holds floats or masks as they are, neighbours along the axis."""
    if v.name not in p.arrays:
        return True
    return v.axes[-1] == lane and v.dtype in ("float32", "bool") and not p.stored_types.get(v.name)


def _single(name: str) -> bool:
    """Whether a function is defined for single numbers alone."""
    if name in _SINGLE:
        return True
    return name in OPS and bool(OPS[name].definition) and any(isinstance(e, Call) and _single(e.op) for e in walk(template(OPS[name].definition)))


class VectorNest(NestPrinter):
    """One nest, its innermost loop in vectors."""

    def alone(self, indent: str) -> Iterator[str]:
        return self.vectors("1", *self.p.span(self.lane), indent)

    def parts(self, op: ir.Fold | ir.Dot) -> Iterator[str]:
        yield f"Parts {self.part(op)}({self.p.number(identity_of(op), op.dst.dtype)});"

    def lanes(self, start: str, stop: str, indent: str) -> Iterator[str]:
        return self.vectors("PARTS", start, stop, indent)

    def vectors(self, count: str, start: str, stop: str, indent: str) -> Iterator[str]:
        """The loop along the last axis, `count` vectors at a time."""
        p = self.p
        p.calls.add("vectors")
        p.vector = self.lane
        p.divisors = {}
        for text in dict.fromkeys(p.ref(by) for op in self.nest.body if (by := self._divisor(op)) is not None):
            p.divisors[text] = p.once(f"by_{text}" if text.isidentifier() else "by")
            yield f"{indent}const Divisor {p.divisors[text]}({text});"
        yield f"{indent}vectors<{count}>({start}, {stop}, [&](i64 {p.c(self.lane)}, auto at) __attribute__((always_inline)) {{"
        yield from self.body(indent + "    ")
        yield f"{indent}}});"
        p.vector, p.divisors = "", {}

    def _divisor(self, op: ir.Operation) -> ir.Value | None:
        """What does not vary along the last axis, and divides what does."""
        match op:
            case ir.Elementwise(op="div", args=(ir.Value() as x, ir.Value() as by)) if self.lane in x.axes and self.lane not in by.axes:
                return by
        return None

    def added(self, op: ir.Fold | ir.Dot, term: str) -> str:
        reduction, target = reduction_of(op), self.target(op)
        if self.lane in reduced(op):
            kept = f"at.only({term}, {self.p.number(identity_of(op), op.dst.dtype)})"
            return f"{target} = {self.p.combined(reduction, target, kept)};"
        return f"at.store(&{target}, {self.p.combined(reduction, f'at.load(&{target})', term)});"

    def target(self, op: ir.Fold | ir.Dot) -> str:
        return f"{self.part(op)}[at.part]" if self.lane in reduced(op) else super().target(op)
