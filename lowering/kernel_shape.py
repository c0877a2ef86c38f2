"""How statements can share a kernel: which indices run in parallel, which are streamed, which are held in one tile."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lowering.contraction import contraction
from lowering.statement import extents, power_of_two
from tdsl.ir import Statement, free_indices, reads

# The longest row, in elements after padding to a power of two, that one program holds in registers.
RESIDENT_ROW = 16384
# Elements per row of the accumulators that a streaming kernel keeps whole: a 64 x 256 float32 tile is half of the registers of 8 warps.
WHOLE_TILE = 256
# How often a kernel may make its scores again because its accumulators are cut.
MOST_REPEATS = 16
# How many contractions may share one kernel without streaming: each keeps an accumulator tile.
MAX_CONTRACTIONS = 2


def grid_of(part: Sequence[Statement]) -> tuple[str, ...]:
    """The indices that every statement has on its left: each program owns one element of them."""
    shared = set(free_indices(part[0].target))
    for s in part:
        shared &= set(free_indices(s.target))
    return tuple(i for i in free_indices(part[-1].target) if i in shared)


def walked_products(part: Sequence[Statement]) -> tuple[str, ...]:
    """The products of matrices whose rows and columns are not all on the grid of a part, or that share it with another product."""
    found = [s for s in part if contraction(s) is not None]
    grid = set(grid_of(part))
    return tuple(s.target.tensor for s in found if len(found) > 1 or not set(free_indices(s.target)) <= grid)


@dataclass(frozen=True, slots=True)
class KernelShape:
    """How a kernel walks its indices: `grid` in parallel, `stream` by a loop that all of its reductions over them share,
    `whole` in one tile. Other inner indices belong to single reductions. repeat: grid indices that not every statement has,
    so that each of their tiles computes the others again."""

    grid: tuple[str, ...]
    stream: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    repeat: tuple[str, ...] = ()


def kernel_shape(part: Sequence[Statement]) -> KernelShape | None:
    """How some statements can share a kernel, or None where they cannot or should not."""
    grid = grid_of(part)
    owned = set(grid)
    matrices = sum(contraction(s) is not None for s in part)
    size = {i: n for s in part for i, n in extents(s).items()}
    rows = [math.prod(power_of_two(n) for i, n in extents(s).items() if i not in owned) for s in part]
    if all(set(free_indices(s.target)) == owned for s in part):
        walks = {s.reduced for s in part if s.reduced}
        sums = {s.target.tensor for s in part if s.reduced}
        apart = not any(a.tensor in sums for s in part if s.reduced for a in reads(s))
        if len(walks) > 1 and not apart and max(rows) > RESIDENT_ROW:
            return None  # each walk again for what depends on its own sums: as kernels of their own they stream
        together = len(walks) == 1 and len(sums) > 1 and (matrices > 0 or max(rows) > RESIDENT_ROW or apart)
        return KernelShape(grid, *(walks if together else ())) if matrices <= MAX_CONTRACTIONS else None
    if not grid:
        return None
    if not matrices and max(rows) <= RESIDENT_ROW:
        return KernelShape(grid, (), tuple(i for i in size if i not in owned))
    free = {i for s in part for i in free_indices(s.target)} - owned
    linking = {i for i in size if i in free and any(i in s.reduced for s in part)}
    candidates = {tuple(i for i in s.indices if i in s.reduced and i in linking) for s in part} - {()}
    for stream in sorted(candidates, key=lambda c: (-math.prod(size[i] for i in c), c)):
        if not _streams(part, set(stream)):
            continue
        whole = tuple(i for i in size if i in free and i not in stream)
        if _accumulators(part, stream, whole, size) <= WHOLE_TILE:
            return KernelShape(grid, stream, whole)
        # Accumulators that are too wide are cut; each cut makes the rest again.
        results = [s for s in part if not set(stream) & set(free_indices(s.target))]
        cut = tuple(i for i in whole if all(i in free_indices(s.target) for s in results) and not any(i in s.reduced for s in part))
        rest = tuple(i for i in whole if i not in cut)
        if len(cut) == 1 and -(-size[cut[0]] // WHOLE_TILE) <= MOST_REPEATS and _accumulators(part, stream, rest, size) <= WHOLE_TILE:
            return KernelShape((*grid, *cut), stream, rest, cut)
    return None


def _accumulators(part: Sequence[Statement], stream: tuple[str, ...], whole: tuple[str, ...], size: Mapping[str, int]) -> int:
    """Elements per row of what a streaming kernel keeps in registers."""
    held = [math.prod(power_of_two(size[i]) for i in whole if i in free_indices(s.target)) for s in part]
    return max(max(held), sum(n for n, s in zip(held, part, strict=True) if set(stream) & set(s.reduced)))


def _streams(part: Sequence[Statement], stream: set[str]) -> bool:
    """Whether every statement either has all streamed indices on its left, or reduces just them, or has none of them."""
    for s in part:
        left, over = stream & set(free_indices(s.target)), stream & set(s.reduced)
        if (left and left != stream) or (over and (left or set(s.reduced) != stream)):
            return False
    return True
