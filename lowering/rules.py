"""What good machine code of a kernel has, beside keeping its values in registers: each rule that it breaks, in words.

- A product of matrices that fills them runs on the tensor cores: `FILL` rows or columns on one side, DOT_MIN on the other and along the
  sum, 16-bit operands, or float32 ones under tf32. On chips whose tensor cores work for whole warp groups it runs on those.
- A tile of two or more dimensions is read 16 bytes at a time where what lies together in memory comes in multiples of 16 bytes and the
  tile has 16 bytes for each thread.
- What dots alone read in an innermost loop is copied to shared memory ahead of its use (CUDA).
- Offsets that fit 32 bits are computed in 32 bits.

Where registers are spilled or no block fits since no configuration was expected to fit, that is said too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

from lowering import tile_ir as ir
from lowering.contraction import contraction
from lowering.plan import KernelPlan
from lowering.registers import lies_together
from lowering.report import KernelReport
from lowering.schedule import DOT_MIN
from lowering.state import Step
from lowering.targets import Target
from tdsl.ir import free_indices
from tdsl.ops import DTYPES

# Rows from which a tile fills an instruction of a warp group (64 on Hopper and Blackwell).
FILL = 64
_WIDE = 16  # bytes
_GROUPS = {"cuda:90": "wgmma", "cuda:100": "tcgen05"}
_LOAD = re.compile(r"^\s*(\w+) = (?:tl\.trans\()?\w+\.load\(")


def broken(plan: KernelPlan, step: Step, machine: KernelReport, target: Target) -> tuple[str, ...]:
    """The rules that the machine code of a kernel breaks; empty is good."""
    assert step.source is not None
    kernel = step.tile
    found = [*_tensor_cores(plan, kernel, machine, target)]
    lines = {n: m.group(1) for n, line in enumerate(step.source.source.splitlines(), 1) if (m := _LOAD.match(line))}
    widths: dict[str, list[int]] = {}
    ahead: set[str] = set()
    for line, width, is_async in machine.loads:
        if line in lines:
            widths.setdefault(lines[line], []).append(width)
            ahead |= {lines[line]} if is_async else set()
    loads = {op.dst.name: op for op in ir.operations(kernel.body) if isinstance(op, ir.Load)}
    most = max((_size(op, kernel) for op in loads.values()), default=0)
    for name, op in loads.items():
        if name in widths and min(widths[name]) < _WIDE and lies_together(op, kernel) and _counts(op, kernel, target, most):
            found.append(f"{op.buffer.tensor} is read {min(widths[name])} bytes at a time, and lies in memory in multiples of {_WIDE}")
    if target.backend == "cuda":
        for name in dict.fromkeys(_in_dot_loops(kernel.body)):
            if name in widths and name not in ahead and lies_together(loads[name], kernel):
                found.append(f"a loop waits for {loads[name].buffer.tensor}: it is not copied ahead of its use")
    if machine.long_offsets and not kernel.wide and not _holds_long(kernel):
        found.append(f"{machine.long_offsets} operations on 64-bit offsets in a loop, where 32 bits do")
    if kernel.unfit and machine.faults:
        found.append(kernel.unfit)
    return tuple(dict.fromkeys(found))


def _tensor_cores(plan: KernelPlan, kernel: ir.Kernel, machine: KernelReport, target: Target) -> Iterator[str]:
    """The products that should be on the tensor cores of the chip and are not."""
    if kernel.grid_tiles == 0:
        return
    dots = [op for op in ir.operations(kernel.body) if isinstance(op, ir.Dot)]
    due = []
    for s in plan.statements:
        c = contraction(s)
        if c is None or not _fills(
            [math.prod(plan.extents[i] for i in group) for group in (c.m, c.n)], math.prod(plan.extents[i] for i in c.k)
        ):
            continue
        names = {n for e in (*c.lhs, *c.rhs) for n in free_indices(e)}
        operands = {b.dtype for b in kernel.buffers if len(b.shape) > 1 and DTYPES[b.dtype].kind == "float"}
        if names and _narrow(operands, kernel.input_precision):
            due.append(s.target.tensor)
    if len(dots) < len(due):
        yield f"of the matrix products {', '.join(due)} only {len(dots)} run as one: the others are summed number by number"
    elif due and machine.tensor_core is None:
        yield f"the matrix product {', '.join(due)} does not reach the tensor cores of {target.chip}"
    elif due and machine.tensor_core != _GROUPS.get(target.name, machine.tensor_core):
        yield f"the matrix product {', '.join(due)} runs on {machine.tensor_core} instructions, {target.chip} has {_GROUPS[target.name]}"


def _fills(sides: list[int], summed: int) -> bool:
    return max(sides) >= FILL and min(sides) >= DOT_MIN and summed >= DOT_MIN


def _narrow(operands: set[str], precision: str) -> bool:
    """Whether products of such operands are what tensor cores are for."""
    return bool(operands) and all(DTYPES[d].bits == 16 or (d == "float32" and precision == "tf32") for d in operands)


def _counts(op: ir.Load, kernel: ir.Kernel, target: Target, most: int) -> bool:
    """Whether a load moves a tenth of what the largest one does, and a tile of it has 16 bytes for each thread. Where nothing is
    multiplied, warps are as many as the latter needs, so one counts. What is multiplied on AMD's chips the compiler loads as the
    instructions take it, 4 or 8 bytes at a time, whatever the tile."""
    multiplies = any(isinstance(o, ir.Dot) for o in ir.operations(kernel.body))
    if multiplies and target.backend == "hip":
        return False
    tile = math.prod(kernel.axis(a).tile for a in op.dst.axes) * DTYPES[op.buffer.dtype].bits // 8
    return 10 * _size(op, kernel) >= most and tile >= _WIDE * target.warp * (kernel.num_warps if multiplies else 1)


def _size(op: ir.Load, kernel: ir.Kernel) -> int:
    """The bytes that a load reads, each element once."""
    return math.prod(kernel.axis(a).extent for a in op.dst.axes) * DTYPES[op.buffer.dtype].bits // 8


def _in_dot_loops(body: tuple[ir.Operation, ...], inside: bool = False) -> Iterator[str]:
    """The values that are loaded in an innermost loop and that only dots read there: loops around loops are not pipelined."""
    inside = inside and not any(isinstance(op, ir.For) and not op.unrolled for op in body)
    others = {v.name for op in body if not isinstance(op, ir.Dot) for v in ir.uses(op)}
    loaded = {op.dst.name for op in body if isinstance(op, ir.Load)} - others
    for op in body:
        if isinstance(op, ir.For):
            yield from _in_dot_loops(op.body, True)
        elif isinstance(op, ir.Dot) and inside:
            yield from (v.name for v in (op.lhs, op.rhs) if v.name in loaded)


def _holds_long(kernel: ir.Kernel) -> bool:
    """Whether the program itself computes with 64-bit integers."""
    values: Mapping[str, str] = {op.dst.name: op.dst.dtype for op in ir.operations(kernel.body) if hasattr(op, "dst")}
    return "int64" in values.values() or any(b.dtype == "int64" for b in kernel.buffers)
