"""Which products of tiles are products of matrices, and which operands are matrices where they lie."""

from __future__ import annotations

import math

from lowering import tile_ir as ir
from lowering.addresses import axis_step
from tdsl.ir import Clamp, Pad
from tdsl.ops import DTYPES

# The least rows, columns and terms of a product of matrices; smaller ones are multiplied out.
MATRIX = 16


def matrices(op: ir.Dot, kernel: ir.Kernel) -> bool:
    """Whether a product is one of two matrices that are large enough for panels and micro-kernels."""
    values = (op.lhs, op.rhs, op.dst)
    if any(len(sides(v, kernel)) != 2 for v in values) or len({v.dtype for v in values}) > 1 or op.dst.dtype not in ("float32", "float64"):
        return False
    axes = [kernel.axis(a) for v in values for a in sides(v, kernel)]
    contracted = [a for a in op.contract if kernel.axis(a).extent != 1]
    return len(contracted) == 1 and len({*axes}) == 3 and all((a.extent if a.role == "whole" else a.tile) >= MATRIX for a in axes)


def large_product(op: ir.Dot, kernel: ir.Kernel) -> bool:
    """Whether a float product has many rows, columns and terms."""
    groups = ([a for a in op.lhs.axes if a in op.dst.axes and a not in op.batch], [a for a in op.rhs.axes if a in op.dst.axes and a not in op.batch])
    sizes = [math.prod(kernel.axis(a).extent for a in group) for group in (*groups, op.contract)]
    return DTYPES[op.dst.dtype].kind == "float" and min(sizes) >= MATRIX


def sides(v: ir.Value, kernel: ir.Kernel) -> tuple[str, ...]:
    """The axes of a value along which it has more than one element."""
    return tuple(a for a in v.axes if kernel.axis(a).extent != 1)


def in_memory(op: ir.Load, kernel: ir.Kernel) -> bool:
    """Whether a tile is a matrix in memory as `gemm` reads one: neighbours along one of its axes, no conversion, nothing beyond edges."""
    if op.buffer.number or op.buffer.dtype != op.dst.dtype or any(isinstance(e, Pad | Clamp) for e in op.subscripts):
        return False
    steps = [axis_step(op.subscripts, op.buffer.strides, kernel.axis(a).indices) for a in sides(op.dst, kernel)]
    return 1 in steps and all(x is not None and x >= 1 for x in steps)
