"""How many registers the tiles of a kernel take: what is alive at once, per thread, counted on the tile IR.

Between two points where threads wait for each other (dots, reductions, the end of a loop's step) an elementwise chain is computed
element by element and takes few registers; across such a point every tile that is made before it and used after it is held whole.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

from lowering import tile_ir as ir
from lowering.descriptors import descriptor
from lowering.schedule import FEW_LANES, WGMMA
from lowering.targets import Target
from tdsl.ir import Index, Pad
from tdsl.ops import DTYPES

# An operand that is computed is in registers once more, in the layout that it is multiplied in: half of the operands, half as much again.
_COMPUTED = 0.5
# Registers per element that is loaded by itself: its address, in 64 bits, and whether it is there; for each dimension that it may lie
# outside of, its place and whether that is within.
_ADDRESS, _PLACE = 3, 3
# What is folded in three dimensions is there as its operands too, which are spread out to all of them: 245 registers at 32 for the tile.
_SPREAD = 3
_WIDE = 16  # bytes that one instruction loads


@dataclass(frozen=True, slots=True)
class Pressure:
    """Registers of 32 bits per thread. held: the most that is alive where threads wait. peak: the most that is alive anywhere.
    operands: the most that the operands of one dot take that runs on the vector units, which read them from registers."""

    held: float
    peak: float
    operands: float


def pressure(kernel: ir.Kernel, target: Target) -> Pressure:
    """What the tiles of a kernel take of the registers."""
    threads = kernel.num_warps * target.warp
    tiles = {a.name: a.tile for a in kernel.axes}
    if _along_lanes(kernel):
        return _of_lanes(kernel, target)
    groups = target.name in WGMMA
    shared = _in_shared(kernel, target) if groups else frozenset()
    feeding = _feeding(kernel)
    loaded = {name for name, loads in feeding.items() if loads == {name}}
    held = peak = operands = 0.0
    parts = _in_parts(kernel)
    for op, alive in _points(kernel.body, frozenset()):
        here = {v: _registers(v, tiles, threads) / parts.get(v.name, 1) for v in alive if v.name not in shared}
        peak = max(peak, sum(here.values()))
        if isinstance(op, ir.Load) and not lies_together(op, kernel):
            each = _ADDRESS + _PLACE * sum(isinstance(e, Pad) for e in op.subscripts)
            held = max(held, sum(here.values()) + each * math.prod(tiles[a] for a in op.dst.axes) / threads)
        if not isinstance(op, ir.Dot | ir.Fold):
            continue
        if isinstance(op, ir.Dot) and not vector_dot(op, kernel, target):
            here.update(_fragments(op, kernel, here, feeding, groups, target))
            if target.name == "cuda:90" and DTYPES[op.lhs.dtype].bits == 8:  # a few steps of the sum are added up apart
                here[op.dst] = 2 * _registers(op.dst, tiles, threads)
        spread = _SPREAD * _registers(op.src, tiles, threads) if isinstance(op, ir.Fold) and len(op.src.axes) > 2 else 0.0
        held = max(held, sum(here.values()) + spread)
        if isinstance(op, ir.Dot) and vector_dot(op, kernel, target):
            operands = max(operands, _operands(op, tiles, threads) * (1 + _COMPUTED * sum(v.name not in loaded for v in (op.lhs, op.rhs))))
    return Pressure(held, peak, operands)


def _along_lanes(kernel: ir.Kernel) -> bool:
    """Whether a loop walks the innermost axis by what a warp has of lanes, each of which carries values of its own, for rows of the grid."""
    if len(kernel.axes) < 2:
        return False
    *_, rows, lanes = kernel.axes
    loops = [op for op in kernel.body if isinstance(op, ir.For) and op.axis is lanes and lanes.tile <= FEW_LANES]
    carried = any(isinstance(op, ir.Assign) and lanes.name in op.dst.axes for loop in loops for op in loop.body)
    dots = any(isinstance(op, ir.Dot) for op in ir.operations(kernel.body))
    return carried and not dots and rows.role == "grid"


def _of_lanes(kernel: ir.Kernel, target: Target) -> Pressure:
    """The same for a kernel whose innermost axis lies along the threads of a warp, and the one before it along warps: each thread has all of
    what does not vary along its warp. What is read again is held for all rows; what goes from one operation to the next is made row by
    row. Loads that no step changes are made before the loop, those of steps that are written out too."""
    tiles = {a.name: a.tile for a in kernel.axes}
    *_, rows, lanes = kernel.axes
    shares = {rows.name: min(rows.tile, kernel.num_warps), lanes.name: min(lanes.tile, target.warp)}

    def size(v: ir.Value) -> float:
        return _registers(v, tiles, math.prod(shares.get(a, 1) for a in v.axes))

    def fixed(body: tuple[ir.Operation, ...]) -> float:
        own = sum(size(op.dst) for op in body if isinstance(op, ir.Load) and lanes.name not in op.dst.axes)
        return own + sum(fixed(op.body) * (op.axis.extent if op.unrolled else 1) for op in body if isinstance(op, ir.For))

    carried = {op.dst for op in ir.operations(kernel.body) if isinstance(op, ir.Assign)}
    steps = max(fixed(op.body) for op in kernel.body if isinstance(op, ir.For))
    passing = set(_passing(kernel.body)) - carried
    held = peak = 0.0
    for _, alive in _points(kernel.body, frozenset()):
        peak = max(peak, steps + sum(size(v) for v in alive - passing))
        held = max(held, steps + sum(size(v) for v in alive if v in carried or lanes.name not in v.axes))
    return Pressure(held, peak, 0.0)


def _passing(body: tuple[ir.Operation, ...]) -> Iterator[ir.Value]:
    """Values that only the operation behind theirs reads."""
    reads = Counter(v for op in body for v in set(_all_uses((op,))))
    for op, after in pairwise(body):
        if (made := _made(op)) is not None and reads[made] == 1 and made in _all_uses((after,)):
            yield made
    for op in body:
        if isinstance(op, ir.For):
            yield from _passing(op.body)


def _in_parts(kernel: ir.Kernel) -> dict[str, int]:
    """The values that are made for one part of a tile at a time, and how many parts there are."""
    if kernel.parts is None:
        return {}
    end = (op.dst for op in kernel.body[kernel.parts.start :] if not isinstance(op, ir.For | ir.Store))
    return {v.name: kernel.parts.count for v in end if kernel.parts.axis in v.axes}


def lies_together(op: ir.Load, kernel: ir.Kernel) -> bool:
    """Whether a loaded tile has two or more dimensions, and rows of multiples of 16 bytes that begin at such multiples."""
    buffer, item = op.buffer, DTYPES[op.buffer.dtype].bits // 8
    if len(op.dst.axes) < 2 or 1 not in buffer.strides:
        return False
    d = buffer.strides.index(1)
    at = op.subscripts[d]
    if not isinstance(at, Index) or not any(at.name == i for a in kernel.axes for i, _ in a.indices):
        return False
    axis = kernel.axis_of(at.name)
    index, extent = axis.indices[-1]
    if index != at.name or axis.name not in op.dst.axes or axis.tile * item < _WIDE:
        return False
    others = [s for n, s in enumerate(buffer.strides) if n != d and buffer.shape[n] > 1]
    return extent * item % _WIDE == 0 and all(s * item % _WIDE == 0 for s in others)


def _in_shared(kernel: ir.Kernel, target: Target) -> frozenset[str]:
    """Loaded values that only tensor cores read, which take them from shared memory."""
    loaded = {op.dst.name for op in ir.operations(kernel.body) if isinstance(op, ir.Load)}
    other = {
        v.name for op in ir.operations(kernel.body) if not isinstance(op, ir.Dot) or vector_dot(op, kernel, target) for v in ir.uses(op)
    }
    return frozenset(loaded - other)


def _fragments(
    op: ir.Dot, kernel: ir.Kernel, here: Mapping[ir.Value, float], feeding: Mapping[str, frozenset[str]], groups: bool, target: Target
) -> Iterator[tuple[ir.Value, float]]:
    """What the operands of a dot on tensor cores take, where that is more than a share of the tile for each thread."""
    tiles = {a.name: a.tile for a in kernel.axes}
    left = _left(op)
    right = op.rhs if left is op.lhs else op.lhs
    if groups:
        if left in here:  # groups of four warps that share rows have them each
            yield left, _registers(left, tiles, min(kernel.num_warps * target.warp, 2 * tiles[left.axes[0]]))
    elif all(kernel.axis(a).role == "grid" for a in op.dst.axes):
        for v in (left, right):  # two warps share the rows, and two the columns; what is computed is computed in that place, in 32 bits
            parts = feeding.get(v.name, frozenset())
            wide = 1 if parts == {v.name} else (1 + len(parts)) * 32 / DTYPES[v.dtype].bits / 2
            yield v, 2 * wide * _registers(v, tiles, kernel.num_warps * target.warp)
    elif feeding.get(right.name, frozenset()) != {right.name}:  # each warp has all columns
        yield right, _registers(right, tiles, target.warp)


def _feeding(kernel: ir.Kernel) -> dict[str, frozenset[str]]:
    """The loaded tiles that each value is computed of, elementwise; those of a loaded one are itself."""
    found: dict[str, frozenset[str]] = {}
    for op in ir.operations(kernel.body):
        if isinstance(op, ir.Load):
            found[op.dst.name] = frozenset({op.dst.name})
        elif isinstance(op, ir.Elementwise | ir.Mask):
            found[op.dst.name] = frozenset().union(*(found.get(v.name, frozenset()) for v in ir.uses(op) if len(v.axes) > 1))
    return found


def _left(op: ir.Dot) -> ir.Value:
    """The operand that has the rows of the result."""
    return op.lhs if op.dst.axes[0] in op.lhs.axes else op.rhs


def vector_dot(op: ir.Dot, kernel: ir.Kernel, target: Target) -> bool:
    """Whether a dot runs on the vector units: on NVIDIA's chips what is wider than 16 bits, and no float32 that may be rounded."""
    return (
        target.backend == "cuda" and DTYPES[op.lhs.dtype].bits > 16 and not (op.lhs.dtype == "float32" and kernel.input_precision != "ieee")
    )


def _operands(op: ir.Dot, tiles: Mapping[str, int], threads: int) -> float:
    """Rows and columns that a thread multiplies, along the whole sum: Triton gives it blocks of 4 x 4 from 16 elements on, else 2 x 2."""
    elements = max(1, math.prod(tiles[a] for a in op.dst.axes) // threads)
    block = 4 if elements >= 16 else 2 if elements >= 4 else 1
    return math.prod(tiles[a] for a in op.contract) * (block + max(block, elements // block))


def _registers(v: ir.Value, tiles: Mapping[str, int], threads: int) -> float:
    bits = max(DTYPES[v.dtype].bits, 8) if v.dtype != "bool" else 8
    return math.prod(tiles[a] for a in v.axes) * bits / 32 / threads


Alive = frozenset[ir.Value]


def _points(body: tuple[ir.Operation, ...], after: Alive) -> Iterator[tuple[ir.Operation, Alive]]:
    """Each operation with the tiles that are alive across it. after: those that something behind `body` uses."""
    alive = set(after)
    points = []
    sums = {op.dst: op.acc for op in body if isinstance(op, ir.Dot)}
    for op in reversed(body):
        used, made = set(ir.uses(op)), _made(op)
        if isinstance(op, ir.For):
            inside = _all_uses(op.body) - {m for o in ir.operations(op.body) if (m := _made(o)) and not isinstance(o, ir.Assign)}
            points += list(_points(op.body, frozenset(alive | inside)))
            alive |= inside
            continue
        # The sum goes on where it is.
        carried = {op.acc} if isinstance(op, ir.Dot) and op.acc is not None else set()
        carried |= {op.dst} if isinstance(op, ir.Assign) and sums.get(op.src) == op.dst else set()
        points.append((op, frozenset((alive | used | ({made} if made else set())) - carried)))
        if made is not None and not isinstance(op, ir.Assign):
            alive.discard(made)
        alive |= used
    yield from reversed(points)


def _made(op: ir.Operation) -> ir.Value | None:
    return None if isinstance(op, ir.For | ir.Store) else op.dst


def _all_uses(body: tuple[ir.Operation, ...]) -> set[ir.Value]:
    return {v for op in ir.operations(body) for v in ir.uses(op)}


# ---------------------------------------------------------------------------------------------------------------------
# What fits


# Registers of 32 bits per thread that tiles may take where threads wait, and anywhere; the rest of the 255 (512 on HIP) that a thread may
# have are addresses, masks, and what the compiler has under way. Read off the reports of the streaming kernels of tests/fused.py at all
# tiles of schedule.STREAM_TILES, in 16 bits on H100: from 193 on they spill, at 137 they take 212, at 163 203 to 243.
# B200 at 161, where accumulators come back from tensor memory; A100 from 164 on, where most take 240; MI300X, of 512, from 193 on, and one at a peak of 177.
_HELD = {"cuda:80": 150, "cuda:90": 165, "cuda:100": 160}
_HELD_ELSE = 175
_PEAK, _PEAK_ELSE = {"hip:gfx942": 176}, 195
# The same with products on the vector units, whose operands are in registers beside it: blocks of 2 x 2 along 64, or of 4 x 4 along 48.
_HELD_VECTOR, _OPERANDS = 85, 384


# Programs that walk rows: 144 by 8 warps take 128 registers, so that two are resident, 152 spill 2; by more warps 0.63 of what there is takes
# all of it, 0.94 spills. On B200 128 spill 2.
_HELD_WALKING, _HELD_WALKING_ELSE, _WALKING = {"cuda:100": 120}, 144, 0.65


def fits(kernel: ir.Kernel, target: Target) -> bool:
    """Whether a kernel stays within the registers and the shared memory of a chip, by what its tiles take."""
    return not excess(kernel, target)


def excess(kernel: ir.Kernel, target: Target) -> str:
    """What a kernel's tiles take too much of, in words; "" where they fit."""
    found = pressure(kernel, target)
    most: float = _HELD_VECTOR if found.operands else _HELD.get(target.name, _HELD_ELSE)
    share = min(1.0, target.registers_sm / (kernel.num_warps * target.warp * target.registers_thread))
    if any(isinstance(op, ir.For) and op.ahead for op in kernel.body):
        most = min(_HELD_WALKING.get(target.name, _HELD_WALKING_ELSE) / share, _WALKING * target.registers_thread)
    for taken, there in ((found.held, most * share), (found.peak, _PEAK.get(target.name, _PEAK_ELSE) * share), (found.operands, _OPERANDS)):
        if taken > there:
            return f"its tiles take {taken:.0f} registers of a thread, and there are {there:.0f} for them on {target.chip}"
    if (shared := shared_bytes(kernel, target)) > target.shared_block:
        return f"its tiles take {shared} bytes of shared memory, and {target.chip} has {target.shared_block}"
    return ""


def _staged(kernel: ir.Kernel) -> int:
    """Bytes of what descriptors store, where they cannot lie where the operands were: the loads of the next tile are on their way there."""
    if not kernel.walkers:
        return 0
    tiles = {a.name: a.tile for a in kernel.axes}
    stores = [op for op in kernel.body if isinstance(op, ir.Store) and descriptor(op, kernel) in kernel.descriptors]
    parts = 1 if kernel.parts is None else kernel.parts.count
    return max((math.prod(tiles[a] for a in op.axes) * DTYPES[op.buffer.dtype].bits // 8 // parts for op in stores), default=0)


def shared_bytes(kernel: ir.Kernel, target: Target) -> int:
    """About how many bytes of shared memory a block takes: what loops with dots load, once per stage (once less where it passes through
    registers), what loops load ahead, what dots outside of them or before them load, and one operand that is computed."""
    tiles = {a.name: a.tile for a in kernel.axes}
    stages = kernel.num_stages if target.name in WGMMA else max(1, kernel.num_stages - 1)

    def size(v: ir.Value) -> int:
        return math.prod(tiles[a] for a in v.axes) * max(8, DTYPES[v.dtype].bits) // 8

    dots = [op for op in ir.operations(kernel.body) if isinstance(op, ir.Dot)]
    read = {v.name: v for op in dots for v in (op.lhs, op.rhs)}
    loads = {op.dst.name for op in ir.operations(kernel.body) if isinstance(op, ir.Load)}
    inside = [
        {op.dst.name: op.dst for op in loop.body if isinstance(op, ir.Load) and len(op.dst.axes) > 1}
        for loop in ir.operations(kernel.body)
        if isinstance(loop, ir.For) and any(isinstance(op, ir.Dot) for op in loop.body)
    ]
    walked = [op for op in kernel.body if isinstance(op, ir.For) and op.ahead]
    rows = sum((op.ahead + 1) * sum(size(x.dst) for x in op.body if isinstance(x, ir.Load) and x.dst.axes) for op in walked)
    streamed = max((sum(map(size, found.values())) for found in inside), default=0)
    before = sum(size(v) for name, v in read.items() if name in loads and not any(name in found for found in inside))
    before = 0 if target.backend == "hip" else before  # it stays in registers there
    return rows + streamed * stages + before + _staged(kernel) + max((size(v) for name, v in read.items() if name not in loads), default=0)
