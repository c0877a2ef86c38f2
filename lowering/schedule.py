"""How a kernel is cut into tiles: the data, and the configurations of contractions and of streams, the best first.

Indices that always occur together are walked as one axis. Contractions get axes M, N and K; batch indices go on the grid
with tile 1, since a 3-D `tl.dot` never reaches the wide tensor-core instruction.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from lowering.contraction import Contraction, contraction
from lowering.kernel_shape import WHOLE_TILE
from lowering.plan import KernelPlan
from lowering.statement import power_of_two
from lowering.targets import Target
from tdsl.ir import Index, free_indices, reads
from tdsl.ops import DTYPES
from tdsl.traced import estimates

# tl.dot takes no smaller tiles; a contraction whose free extents are far below wastes its lanes and is multiplied out instead.
DOT_MIN = 16
# Targets whose tensor cores work for groups of four warps, on tiles of WGMMA_ROWS rows or more (wgmma, tcgen05).
WGMMA = ("cuda:90", "cuda:100")
WGMMA_ROWS = 64
# Targets whose products are summed in a memory of the tensor cores' own, not in registers.
TENSOR_MEMORY = ("cuda:100",)
# A streamed tile that is no longer than this is what a warp has of lanes (two numbers a thread on NVIDIA's chips), which carry values apart.
FEW_LANES = 64
# Elements of the largest intermediate that whole-tensor execution may make before it walks blocks (16 MiB of float32).
CPU_BLOCK = 1 << 22

Strides = Mapping[str, tuple[int, ...]]
Dtypes = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Schedule:
    """axes: (indices, tile) from the outermost to the innermost; a tile is a power of two on a GPU. group: tiles of the
    first grid axis walked together, for reuse in the L2 cache. descriptors: tensors that are moved tile by tile through tensor descriptors.
    programs: how many walk all tiles of the grid in turn; 0: each tile has a program of its own. parts: in how many a tile of the result
    is finished and stored, 1 or 2."""

    axes: tuple[tuple[tuple[str, ...], int], ...]
    num_warps: int = 4
    num_stages: int = 2
    group: int = 1
    descriptors: tuple[str, ...] = ()
    programs: int = 0
    parts: int = 1


def main_product(kernel: KernelPlan, dtypes: Dtypes) -> Contraction | None:
    """The first matrix product of a kernel that pays on tensor cores."""
    found = ((contraction(s), s.target.tensor) for s in kernel.statements)
    return next((c for c, tensor in found if c is not None and uses_dot(c, kernel, dtypes, tensor)), None)


def uses_dot(found: Contraction, kernel: KernelPlan, dtypes: Dtypes, target: str) -> bool:
    """Whether a contraction pays on tensor cores: every group reaches DOT_MIN (below it half of the lanes would be padding)."""
    if DTYPES[dtypes[target]].kind != "float":
        return False
    return all(math.prod(kernel.extents[i] for i in group) >= DOT_MIN for group in (found.m, found.n, found.k))


# ---------------------------------------------------------------------------------------------------------------------
# Whole tensors (CPU)


def whole_schedule(kernel: KernelPlan) -> Schedule:
    """Every index one tile, but for grid indices of a kernel whose intermediates would be far larger than what it reads."""
    tiles = {i: max(1, n) for i, n in kernel.extents.items()}
    for s in kernel.statements:
        if (contraction(s) is not None and len(kernel.statements) == 1) or not (s.reduced or len(kernel.statements) > 1):
            continue
        held = free_indices(s.target) if contraction(s) is not None else s.indices
        for i in sorted((i for i in kernel.grid if i in held), key=lambda i: -kernel.extents[i]):
            elements = math.prod(tiles[j] for j in held)
            if elements > CPU_BLOCK:
                tiles[i] = max(1, tiles[i] * CPU_BLOCK // elements)
    order = (*kernel.grid, *kernel.inner)
    return Schedule(tuple(((i,), tiles[i]) for i in order))


# ---------------------------------------------------------------------------------------------------------------------
# Contractions (GPU)


def contraction_schedules(kernel: KernelPlan, strides: Strides, dtypes: Dtypes, target: Target, precision: str) -> Iterator[Schedule]:
    """128 x 128 accumulators where the shape has them, halved while the grid leaves a fifth of the chip idle (the formula of
    Helion's TritonH100MatmulHeuristic, BSD-3), then smaller ones: first a shorter K, then 8 warps, then the larger side.

    Before them 128 x 256, where that formula begins, for 16-bit products on chips with warp groups: only where programs walk the tiles
    (lowering/choice.py), so that descriptors move them and results are stored in parts, and along eight tiles or more, since no second
    block hides what comes behind the sum. With 4 stages that takes 154 registers on H100 and 136 on B200 (pointers: 184);
    with a GELU and a residual behind it 245, where results stored whole spill 120 times. Tiles of 128 x 128 read a third more of the L2
    cache: at the rate of the tensor cores 64 bytes per clock and SM, which is all that it gives.

    8 warps from 128 x 128 on, since elementwise prologues at 4 warps spill (106 -> 128 registers at 8, 191 -> 255 at 4). 64 x 64 where
    products run on the vector units, at 16 elements a thread or less: Triton multiplies them in blocks of 4 x 4 along all of K. These may
    be halved to 32 x 32; what runs on tensor cores to 64 x 64, which fills their instructions.
    3 stages, 2 for wide types, whose tiles take twice the shared memory, and on AMD's chips, which have a quarter of it and prefetch to registers.
    """
    c = main_product(kernel, dtypes)
    assert c is not None
    size = kernel.extents
    m, n, k = (math.prod(size[i] for i in group) for group in (c.m, c.n, c.k))
    bits = _widest(kernel, dtypes)
    outer = math.prod(size[i] for i in kernel.grid if i not in c.m and i not in c.n)
    largest = 128 if on_tensor_cores(kernel, dtypes, target, precision) and bits <= 32 else 64
    tile_m, tile_n = (min(largest, max(DOT_MIN, power_of_two(x))) for x in (m, n))
    if sum(contraction(s) is not None for s in kernel.statements) > 1 and tile_n > 64:
        tile_n = 64  # each contraction has an accumulator of its own
    least = 64 if largest > 64 else 32
    while tile_m * tile_n > least * least and _waves(m, n, tile_m, tile_n, outer, target.sms) < 0.8:
        if tile_m >= tile_n and tile_m > least:
            tile_m //= 2
        elif tile_n > least:
            tile_n //= 2
        else:
            break
    tile_k = min(64 if bits <= 16 else 32 if bits <= 32 else 16, max(DOT_MIN, power_of_two(k)))
    stages = 3 if bits <= 16 and target.backend == "cuda" else 2
    wide = (256, 128) if _contiguous(kernel, strides) in c.m else (128, 256)
    if largest == tile_m == tile_n and k >= 8 * 64 and bits == 16 and target.name in WGMMA:
        fills = wide[0] <= power_of_two(m) and wide[1] <= power_of_two(n)
        if fills and _waves(m, n, *wide, outer, target.sms) >= 0.95 * _waves(m, n, tile_m, tile_n, outer, target.sms):
            yield replace(contraction_schedule(kernel, c, strides, target, (*wide, tile_k), 8, 4), programs=target.sms)
    for sides in dict.fromkeys([(tile_m, tile_n), *_other_sides(m, n, tile_m, tile_n, largest > 64, target)]):
        for depth in (d for d in (64, 32, 16) if d == tile_k or DOT_MIN <= d < tile_k):
            warps = 8 if math.prod(sides) >= 128 * 128 else 4
            yield contraction_schedule(kernel, c, strides, target, (*sides, depth), warps, stages)
            if warps == 4 and math.prod(sides) >= 32 * 64:
                yield contraction_schedule(kernel, c, strides, target, (*sides, depth), 8, stages)


def _other_sides(m: int, n: int, tile_m: int, tile_n: int, tensor_cores: bool, target: Target) -> Iterator[tuple[int, int]]:
    """Sides beside those of the formula: long ones, along which an operand that is computed is computed less often, and small ones, for
    kernels that need registers, or whose grid leaves the chip idle. One side stays WGMMA_ROWS where instructions need that."""
    group = tensor_cores and target.name in WGMMA and max(m, n) >= WGMMA_ROWS
    long = (
        ((32, 128), (128, 32), (16, 128), (128, 16))
        if not tensor_cores
        else ((64, 256), (256, 64), (64, 128), (128, 64), (32, 256), (256, 32), (32, 128), (128, 32), (16, 256), (256, 16), (16, 128), (128, 16))
    )
    yield from ((a, b) for a, b in long if a <= power_of_two(m) and b <= power_of_two(n))
    while max(tile_m, tile_n) > DOT_MIN:
        if group and max(tile_m, tile_n) == WGMMA_ROWS and min(tile_m, tile_n) > DOT_MIN:
            tile_m, tile_n = (tile_m, tile_n // 2) if tile_m >= WGMMA_ROWS else (tile_m // 2, tile_n)
        elif group and max(tile_m, tile_n) <= WGMMA_ROWS:
            return
        else:
            tile_m, tile_n = (tile_m // 2, tile_n) if tile_m >= tile_n else (tile_m, tile_n // 2)
        yield tile_m, tile_n


def contraction_schedule(
    kernel: KernelPlan,
    c: Contraction,
    strides: Strides,
    target: Target,
    tiles: tuple[int, int, int],
    warps: int,
    stages: int,
    group: int = 8,
) -> Schedule:
    """Tiles along M, N and K of the main product; what else the kernel walks follows. Columns lie along what is contiguous in the
    output, so that stores are wide, unless that leaves too few rows for the instructions of a warp group."""
    size = kernel.extents
    tile_m, tile_n, tile_k = tiles
    batch = tuple(((i,), 1) for i in kernel.grid if i not in c.m and i not in c.n)
    groups = [(c.m, tile_m), (c.n, tile_n)]
    if _contiguous(kernel, strides) in c.m:
        groups.reverse()
    if target.name in WGMMA and groups[0][1] < WGMMA_ROWS <= groups[1][1]:
        groups.reverse()
    inner = [(c.k, tile_k)]
    rest = {i for i in kernel.inner if i not in c.k}
    for s in kernel.statements:
        other = contraction(s)
        if other is not None and rest & set(other.k):
            extent = math.prod(size[i] for i in other.k)
            inner.append((other.k, min(tile_k, max(DOT_MIN, power_of_two(extent)))))
            rest -= set(other.k)
    walked = {i for x in map(contraction, kernel.statements) if x is not None for i in x.batch}
    inner += [((i,), 1 if i in walked else min(16, power_of_two(size[i]))) for i in sorted(rest)]
    return Schedule((*batch, *groups, *inner), warps, stages, group)


def _widest(kernel: KernelPlan, dtypes: Dtypes) -> int:
    """Bits of the widest float operand of the products: of the tensors in memory that vary along a sum and a side, not of a row's sums."""
    found = [(s, c) for s, c in ((s, contraction(s)) for s in kernel.statements) if c is not None]
    sides = [(a, set(free_indices(a)), {*c.m, *c.n}, set(c.k)) for s, c in found for a in reads(s) if a.tensor in kernel.reads]
    bits = [DTYPES[dtypes[a.tensor]] for a, free, side, summed in sides if free & side and free & summed]
    return max((d.bits for d in bits if d.kind == "float"), default=32)


@estimates()
def _waves(m: int, n: int, tile_m: int, tile_n: int, batch: int, sms: int) -> float:
    """The share of the chip that is busy, averaged over the waves of the grid."""
    tiles = -(-m // tile_m) * -(-n // tile_n) * max(1, batch)
    return tiles / (-(-tiles // sms) * sms)


def _contiguous(kernel: KernelPlan, strides: Strides) -> str | None:
    """The index along which the kernel's last output is contiguous."""
    target = kernel.statements[-1].target
    for subscript, stride in zip(target.subscripts, strides[target.tensor], strict=True):
        if stride == 1 and isinstance(subscript, Index):
            return subscript.name
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Streams (GPU)

# (rows, streamed, warps) in order of preference. The first are those of FlashAttention-2 and of FlexAttention on Hopper. None is
# 64 x 128: two groups of four warps then share 64 rows and each keep what they compute of them, 254 registers where 64 x 64 takes 154.
# 64 x 256 is for scores that are only summed: their rows are read again for each tile of the stream.
STREAM_TILES = (
    (128, 128, 8), (128, 64, 8), (128, 64, 4), (128, 32, 8), (64, 256, 8), (64, 64, 8), (64, 64, 4), (64, 64, 2), (64, 32, 4), (64, 32, 8), (64, 32, 2),
    (32, 64, 4), (32, 64, 2), (32, 32, 8), (32, 32, 4), (32, 32, 2), (16, 32, 4), (128, 16, 8), (64, 16, 8), (64, 16, 4), (16, 64, 8), (32, 16, 4),
)  # fmt: skip


def stream_schedules(kernel: KernelPlan, dtypes: Dtypes, target: Target, precision: str) -> Iterator[Schedule]:
    """Large tiles first: each streamed tile is read once per tile of rows. Small ones fill the chip where there are few rows."""
    size = kernel.extents
    rows, _ = stream_rows(kernel)
    height, length = (math.prod(size[i] for i in group) for group in (rows, kernel.stream))
    tensor_cores = on_tensor_cores(kernel, dtypes, target, precision)
    fitting = [t for t in STREAM_TILES if suits(*t, height, target, tensor_cores)]
    large = [t for t in fitting if t[0] * t[1] >= 2048]
    columns = max((power_of_two(size[i]) for i in (*kernel.whole, *kernel.repeat)), default=1)
    wide = (
        [(64, 64, 8), (64, 32, 8)] if tensor_cores and target.name not in WGMMA and columns > 128 else []
    )  # as many threads as accumulators need
    least = min(WGMMA_ROWS, max(DOT_MIN, power_of_two(height))) if tensor_cores and target.name in WGMMA else DOT_MIN
    chained = sum(contraction(s) is not None for s in kernel.statements) > 1
    for tile_m, tile_n, warps in [*large, *wide, *(t for t in fitting if t not in large), (least, DOT_MIN, 8 if least > DOT_MIN else 4)]:
        if (tile_m > DOT_MIN and tile_m >= 2 * power_of_two(height)) or (tile_n > DOT_MIN and tile_n >= 2 * power_of_two(length)):
            continue
        if not (chained and tile_n > 128):
            yield stream_schedule(kernel, tile_m, tile_n, warps)


def suits(tile_m: int, tile_n: int, warps: int, height: int, target: Target, tensor_cores: bool) -> bool:
    """Whether a tile is one for a chip's instructions.

    Groups of four warps take WGMMA_ROWS. Where a chain of products runs warp by warp, the warps lie along the rows, 16 for each on NVIDIA's
    chips and 32 on AMD's, and all hold the streamed tile: with fewer rows some compute the same (59 registers spilled at 64 x 64 by 8
    warps on A100 where 4 spill none), and 128 columns spill. Products on the vector units have no such tiles.
    """
    if not tensor_cores:
        return warps >= 4
    if target.name in WGMMA:
        return warps >= 4 and tile_m >= min(WGMMA_ROWS, power_of_two(height))
    least = 32 if target.backend == "hip" else 16
    return tile_n <= 64 and warps * least <= max(tile_m, 2 * least) and tile_m >= 2 * least


def on_tensor_cores(kernel: KernelPlan, dtypes: Dtypes, target: Target, precision: str) -> bool:
    """Whether the products of a kernel run on tensor cores: 16-bit operands, float32 ones that may be rounded, and on AMD's chips all."""
    return target.backend == "hip" or _widest(kernel, dtypes) <= 16 or (_widest(kernel, dtypes) == 32 and precision != "ieee")


def stream_rows(kernel: KernelPlan) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The grid indices that are rows of a stream's tiles, and the others, each element of which has programs of its own."""
    found = [c for c in map(contraction, kernel.statements) if c is not None]
    grid = tuple(i for i in kernel.grid if i not in kernel.repeat)
    groups = [{*group} for c in found for group in (c.m, c.n) if not {*group} & {*kernel.stream}]  # parts of the stream are no rows
    sides = tuple(i for i in grid if any(i in group for group in groups))
    # An index of the batch of one product and of a side of another has programs of its own: a 3-D product would not be one.
    rows = tuple(i for i in sides if not any(i in c.batch for c in found)) or sides or grid[-1:]
    return rows, tuple(i for i in grid if i not in rows)


def stream_schedule(kernel: KernelPlan, tile_m: int, tile_n: int, warps: int, stages: int = 2) -> Schedule:
    """Tiles of rows and along the stream; indices that the kernel holds whole, and the sums inside, follow.

    2 stages: the next tile of the stream is on its way while one is multiplied; a third would take as much shared memory again.
    """
    size = kernel.extents
    found = [c for c in map(contraction, kernel.statements) if c is not None]
    rows, batch = stream_rows(kernel)
    whole = {i: power_of_two(size[i]) for i in kernel.whole}
    repeat = {i: min(WHOLE_TILE, power_of_two(size[i])) for i in kernel.repeat}
    along = set(kernel.stream)
    dots = {i for c in found if _dots(c, size, rows) for i in (*c.m, *c.n, *c.k)}
    axes = [((i,), 1) for i in batch] + [(rows, tile_m), *(((i,), repeat[i]) for i in kernel.repeat), (kernel.stream, tile_n)]
    axes += [((i,), max(DOT_MIN if i in dots else 1, whole[i])) for i in kernel.whole]
    # Contractions first: an index that one of them sums is a tile for all.
    for s in sorted(kernel.statements, key=lambda s: contraction(s) is None):
        rest = tuple(i for i in s.reduced if i not in along and not any(i in group for group, _ in axes))
        if not rest:
            continue
        extent = math.prod(size[i] for i in rest)
        c = contraction(s)
        if c is not None and _dots(c, size, rows):
            axes.append((rest, max(DOT_MIN, power_of_two(extent)) if power_of_two(extent) <= 128 else 64))
        else:  # a short sum is walked number by number: a 3-D tile would not fit
            axes.append((rest, 1))
    return Schedule(tuple(axes), warps, stages)


def _dots(c: Contraction, size: Mapping[str, int], rows: Sequence[str]) -> bool:
    """Whether a contraction inside a stream is worth a dot: padding may at most double an extent, but for rows: a stream that few
    rows read is bound by memory, whatever the tensor cores do beside it."""
    return all(math.prod(size[i] for i in group) >= DOT_MIN // 2 or {*group} <= {*rows} for group in (c.m, c.n, c.k))
