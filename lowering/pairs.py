"""Tiles of kernels that compute something for every pair of two lists of points, and reduce it along one of them.

    D[i,j] += (x[i,d] - y[j,d]) ** 2;  O[i,e] += exp(-D[i,j]) * b[j,e]

What such a kernel reads is little beside what it computes. The threads of a warp lie along the streamed points and each has the same few
rows, so that a row's points and sums are in registers and one load serves all rows; every lane has a sum of its own, and lanes meet
after the loop. Reducing each tile instead takes five exchanges between lanes for each row and number: 91 instructions per pair of the
above on H100, where three coordinates and four columns take 13 this way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from lowering.contraction import accesses, contraction
from lowering.plan import KernelPlan
from lowering.schedule import DOT_MIN, Dtypes, Schedule, on_tensor_cores
from lowering.statement import power_of_two
from lowering.targets import Target
from tdsl.ir import free_indices

# Rows of a thread, in order of preference: as many as registers hold, fewer where that leaves the chip idle.
ROWS = (16, 8, 4, 2, 1)
WARPS = 4


def pair_rows(kernel: KernelPlan) -> tuple[str, ...]:
    """The grid indices that are one side of the pairs, the streamed ones being the other: they meet in no tensor that is read or stored."""
    along = set(kernel.stream)
    memory = {*kernel.reads, *kernel.writes}
    beside = {i for a in accesses(kernel.statements) if a.tensor in memory and along & set(free_indices(a)) for i in free_indices(a)}
    return tuple(i for i in kernel.grid if i not in beside and i not in kernel.repeat)


def of_pairs(kernel: KernelPlan, dtypes: Dtypes, target: Target, precision: str) -> bool:
    """Whether a kernel is walked by pairs: it has both sides, and no matrix products that are worth a dot."""
    rows = pair_rows(kernel)
    if not kernel.stream or not rows or kernel.repeat:
        return False
    size = kernel.extents
    least = DOT_MIN // 2 if on_tensor_cores(kernel, dtypes, target, precision) else DOT_MIN
    for c in (c for c in map(contraction, kernel.statements) if c is not None):
        if all(math.prod(size[i] for i in group) >= least for group in (c.m, c.n, c.k)):
            return False
    return sum(power_of_two(size[i]) for i in kernel.whole) <= 2 * DOT_MIN


def pair_schedules(kernel: KernelPlan, target: Target) -> Iterator[Schedule]:
    """Tiles of so many rows for each warp."""
    height = math.prod(kernel.extents[i] for i in pair_rows(kernel))
    for rows in ROWS:
        if rows == 1 or rows * WARPS < 2 * power_of_two(height):
            yield pair_schedule(kernel, target, rows, WARPS)


def pair_schedule(kernel: KernelPlan, target: Target, rows: int, warps: int) -> Schedule:
    """What is held whole comes first, then the sums that are walked number by number; rows lie along the warps, and what is streamed along
    their threads."""
    size, along = kernel.extents, kernel.stream
    side = pair_rows(kernel)
    batch = [((i,), 1) for i in kernel.grid if i not in side]
    whole = [((i,), power_of_two(size[i])) for i in kernel.whole]
    short = [((i,), 1) for i in kernel.inner if i not in along and i not in kernel.whole]
    length = math.prod(size[i] for i in along)
    return Schedule((*batch, *short, *whole, (side, rows * warps), (along, min(target.warp, power_of_two(length)))), warps, 2)
