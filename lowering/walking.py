"""Kernels of a GPU whose programs walk rows one by one and keep sums down the columns (fold.py)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from lowering import tile_ir as ir
from lowering.merge import merge
from lowering.plan import KernelPlan
from lowering.rows import tile_bytes, warps_of
from lowering.schedule import Dtypes, Schedule
from lowering.statement import power_of_two
from lowering.targets import Target


def walking_schedules(kernel: KernelPlan, dtypes: Dtypes, target: Target) -> Iterator[Schedule]:
    """Each row is one tile, by as many warps as a kernel of rows has, then by more, which leaves each thread more registers.

    3 stages: the next two rows are copied to shared memory while one is summed, since the reductions of a row wait for all of its
    threads; LayerNorm's backward takes 99 registers so, and 128 where its loop loads what it needs at once. Where rows are too long
    for the shared memory, 1.
    """
    walked = (*kernel.grid, *kernel.stream)
    tiles: dict[tuple[str, ...], int] = {(i,): 1 if i in walked else power_of_two(n) for i, n in kernel.extents.items()}
    order = [*((i,) for i in walked), *(axis for axis in tiles if axis[0] not in walked)]
    axes = tuple((axis, tiles[axis]) for axis in order)
    elements = math.prod(tiles.values())
    least = warps_of(elements, tile_bytes(kernel, tiles, dtypes), target)
    for stages in (3, 1):
        for warps in (w for w in (least, 2 * least, 4 * least, 8 * least) if w * target.warp <= 1024):
            yield Schedule(axes, warps, stages)


def walking(kernel: ir.Kernel) -> ir.Kernel:
    """`kernel` with its loops over rows as one, whose loads are made ahead."""
    merged = merge(kernel)
    body = tuple(replace(op, ahead=kernel.num_stages - 1) if isinstance(op, ir.For) else op for op in merged.body)
    return replace(merged, body=body)
