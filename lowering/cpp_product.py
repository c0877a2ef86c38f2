"""A matrix product of a tile as a call of `gemm`, on operands where they lie: in tensors, or in local arrays."""

from __future__ import annotations

from collections.abc import Iterator

from lowering import tile_ir as ir
from lowering.addresses import axis_step
from lowering.cpp_nest import less
from lowering.cpp_values import Values
from lowering.matrices import sides
from lowering.nests import Product


def product(p: Values, item: Product, indent: str) -> Iterator[str]:
    """dst = lhs * rhs, or dst += lhs * rhs where an accumulator lies in dst's array."""
    dot = item.dot
    rows, columns = sides(dot.dst, p.kernel)
    (terms,) = {*sides(dot.lhs, p.kernel)} & {*sides(dot.rhs, p.kernel)}
    left, right = (dot.lhs, dot.rhs) if rows in dot.lhs.axes else (dot.rhs, dot.lhs)
    if dot.acc is not None and not item.adds:
        yield f"{indent}for ({p.whole_array(dot.dst)}) {p.c(dot.dst.name)}[lane] = {p.c(dot.acc.name)}[lane];"
    p.calls.add("gemm")
    yield f"{indent}{{"
    starts = {axis: p.span(axis)[0] for axis in dict.fromkeys((*dot.dst.axes, *dot.lhs.axes, *dot.rhs.axes))}
    for axis, start in starts.items():
        yield f"{indent}    const i64 {p.c(axis)} = {start};"
        yield from (f"{indent}    {line}" for line in p.decode(p.kernel.axis(axis)))
    a, lda, turned_a = _matrix(p, item, left, rows, terms)
    b, ldb, turned_b = _matrix(p, item, right, terms, columns)
    sizes = ", ".join(less(stop, start) for start, stop in (p.span(axis) for axis in (rows, columns, terms)))
    at, bt, adds = ("true" if x else "false" for x in (turned_a, turned_b, dot.acc is not None))
    yield f"{indent}    gemm({at}, {bt}, {sizes}, {a}, {lda}, {b}, {ldb}, {adds}, {p.c(dot.dst.name)}, {p.capacity(columns)});"
    yield f"{indent}}}"


def _matrix(p: Values, item: Product, v: ir.Value, row: str, column: str) -> tuple[str, str | int, bool]:
    """Where an operand starts, the elements from one of its lines to the next, and whether its lines are columns."""
    load = item.memory.get(v.name)
    axes = sides(v, p.kernel)
    if load is None:
        return p.c(v.name), p.capacity(axes[1]), axes != (row, column)
    steps = {a: axis_step(load.subscripts, load.buffer.strides, p.kernel.axis(a).indices) for a in axes}
    across, turned = (row, False) if steps[column] == 1 else (column, True)
    step = steps[across]
    assert step is not None
    return f"&{p.c(load.buffer.name)}[{p.offset(load.buffer, load.subscripts)}]", p.integer(f"{load.buffer.name}_line", step), turned
