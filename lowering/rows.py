"""Tiles of pointwise operations and reductions."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lowering.contraction import accesses
from lowering.plan import KernelPlan
from lowering.schedule import Dtypes, Schedule, Strides
from lowering.statement import power_of_two
from lowering.targets import Target
from tdsl.affine import linear
from tdsl.ir import free_indices, reads
from tdsl.ops import DTYPES

# Elements of a pointwise or reduction tile: 16 a thread at 4 warps, enough bytes in flight to cover the latency of memory.
TILE = 2048
# Bytes that one thread moves with one instruction.
WIDE = 16


def rows_schedule(kernel: KernelPlan, strides: Strides, dtypes: Dtypes, target: Target, scale: float = 1.0) -> Schedule:
    """Tiles of TILE elements, widest along what is contiguous in memory, so that a warp reads whole lines.

    Rows that fit are held whole when several statements walk them. Tiles of the grid are halved while the chip is not filled, and what
    that leaves goes to the loops, so that as many bytes are on their way. Warps are as many as can load WIDE bytes a thread: at 4 warps
    512 elements of 16 bits are read 8 bytes at a time. scale: tiles of so many times TILE elements.
    """
    axes = _axes(kernel, strides)
    size = {axis: math.prod(kernel.extents[i] for i in axis) for axis in axes}
    inner = [axis for axis in axes if axis[0] not in kernel.grid]
    outer = [axis for axis in axes if axis[0] in kernel.grid]
    leading = _leading(kernel, strides)
    wide = [axis for axis in axes if any(i in leading for i in axis)] or axes[-1:]
    tiles = dict.fromkeys(axes, 1)
    sums = {s.target.tensor for s in kernel.statements if s.reduced}
    again = any(a.tensor in sums for s in kernel.statements if set(s.indices) - set(kernel.grid) for a in reads(s))
    resident = again and bool(inner) and not kernel.stream
    if resident:
        tiles.update({axis: power_of_two(size[axis]) for axis in inner})
    most = int(TILE * scale)
    budget = max(1, most // math.prod(tiles.values()))
    for axis in [*reversed(wide), *reversed(inner), *reversed(outer)]:
        if resident and axis in inner:
            continue
        others = [x for x in axes if x is not axis and size[x] > 1 and tiles[x] == 1]
        limit = (
            32 if len(wide) > 1 and axis in wide and len(axes) > 1 else 128 if axis in outer and inner else most // 2 if others else most
        )
        wanted = min(limit, power_of_two(size[axis]), budget * tiles[axis])
        if wanted > tiles[axis]:
            budget = budget * tiles[axis] // wanted
            tiles[axis] = wanted
    while outer and math.prod(-(-size[a] // tiles[a]) for a in outer) < target.sms:
        divisible = [a for a in outer if tiles[a] > (32 if a in wide and size[a] > 32 else 1)]
        if not divisible:
            break
        tiles[max(divisible, key=lambda a: tiles[a])] //= 2
    for axis in [] if resident else reversed(inner):
        tiles[axis] = max(tiles[axis], min(power_of_two(size[axis]), most // math.prod(t for a, t in tiles.items() if a != axis)))
    return Schedule(
        tuple((axis, tiles[axis]) for axis in axes), warps_of(math.prod(tiles.values()), tile_bytes(kernel, tiles, dtypes), target), 2
    )


def tile_bytes(kernel: KernelPlan, tiles: Mapping[tuple[str, ...], int], dtypes: Dtypes) -> int:
    """The bytes of the largest tile that a kernel reads along two dimensions or more, or of one in float32."""
    found = {a for a in accesses(kernel.statements) if a.tensor in kernel.reads and len(a.subscripts) > 1}
    sizes = [
        math.prod(t for axis, t in tiles.items() if set(axis) & set(free_indices(a))) * max(8, DTYPES[dtypes[a.tensor]].bits) // 8
        for a in found
    ]
    return max(sizes, default=4 * math.prod(tiles.values()))


def warps_of(elements: int, size: int, target: Target) -> int:
    """4 warps up to 2048 elements of a tile, then one more doubling for each doubling of 16 a thread (Helion's rule for reductions);
    fewer where a thread would have less than WIDE bytes of what is read."""
    most = 4 if elements <= 2048 else 8 if elements <= 4096 else 16 if elements <= 16384 else 32
    return max(1, min(most, size // (target.warp * WIDE)))


def _axes(kernel: KernelPlan, strides: Strides) -> list[tuple[str, ...]]:
    """Indices that occur in the same accesses and statements, grid ones first, outermost first.

    An index that is contiguous in one tensor while another one is in the next stays on an axis of its own: a transposition
    needs a tile that is wide both ways.
    """
    leading = _leading(kernel, strides)
    seen: dict[tuple[object, ...], list[str]] = {}
    last = kernel.statements[-1]
    order = [i for i in free_indices(last.target) if i in kernel.extents]
    order += [i for s in kernel.statements for i in s.indices if i not in order]
    for i in dict.fromkeys(order):
        found = frozenset(a.tensor for a in accesses(kernel.statements) if i in free_indices(a))
        shared = frozenset(n for n, s in enumerate(kernel.statements) if i in s.indices)
        reduced = frozenset(n for n, s in enumerate(kernel.statements) if i in s.reduced)
        alone = i if len(leading) > 1 and i in leading else ""
        seen.setdefault((i in kernel.grid, found, shared, reduced, alone), []).append(i)
    axes = [tuple(group) for group in seen.values()]
    return sorted(axes, key=lambda axis: (axis[0] not in kernel.grid, any(i in leading for i in axis)))


def _leading(kernel: KernelPlan, strides: Strides) -> frozenset[str]:
    """The indices along which some tensor of two or more dimensions in memory is contiguous."""
    found = set()
    for a in accesses(kernel.statements):
        if a.tensor in strides and len(a.subscripts) > 1:
            for subscript, stride in zip(a.subscripts, strides[a.tensor], strict=True):
                if stride == 1:
                    form = linear(subscript)
                    found |= {i for i in form.indices if form.coefficient(i) in (-1, 0, 1)}  # in steps of more, nothing is contiguous
    return frozenset(i for i in found if kernel.extents.get(i, 1) > 1)
