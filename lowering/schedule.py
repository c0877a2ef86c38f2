"""How a kernel is cut into tiles: the configuration space's data, and a default that needs no tuning.

Indices that always occur together are walked as one axis. Contractions get axes M, N and K; batch indices go on the grid
with tile 1, since a 3-D `tl.dot` never reaches the wide tensor-core instruction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lowering.contraction import Contraction, accesses, contraction
from lowering.kernel_shape import WHOLE_TILE
from lowering.plan import KernelPlan
from lowering.statement import power_of_two
from lowering.targets import Target
from tdsl.ir import Access, Expr, Index, free_indices, reads, walk
from tdsl.ops import DTYPES

# Elements of a pointwise or reduction tile: 16 a thread at 4 warps, enough bytes in flight to cover the latency of memory.
TILE = 2048
# tl.dot takes no smaller tiles; a contraction whose free extents are far below wastes its lanes and is multiplied out instead.
DOT_MIN = 16
# Targets whose tensor cores read operands from shared memory (wgmma, tcgen05).
_WGMMA = ("cuda:90", "cuda:100")
# Elements of the largest intermediate that whole-tensor execution may make before it walks blocks (16 MiB of float32).
CPU_BLOCK = 1 << 22


@dataclass(frozen=True, slots=True)
class Schedule:
    """axes: (indices, tile) from the outermost to the innermost; a tile is a power of two on a GPU. group: tiles of the
    first grid axis walked together, for reuse in the L2 cache."""

    axes: tuple[tuple[tuple[str, ...], int], ...]
    num_warps: int = 4
    num_stages: int = 2
    group: int = 1


def default_schedule(kernel: KernelPlan, strides: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str], target: Target) -> Schedule:
    """The configuration used where none was given or tuned. strides: of every tensor in memory, in elements."""
    if target.backend == "cpu":
        return _whole(kernel)
    linked = any(set(kernel.stream) & set(free_indices(s.target)) for s in kernel.statements)
    if linked and any(contraction(s) for s in kernel.statements) and not _batched_stream(kernel):
        return _streamed(kernel, dtypes, target)
    for s in kernel.statements:
        found = contraction(s)
        if found is not None and uses_dot(found, kernel, dtypes, s.target.tensor):
            return _contraction(kernel, found, strides, dtypes, target)
    return _general(kernel, strides, target)


def _batched_stream(kernel: KernelPlan) -> bool:
    """Whether the stream walks batches of contractions whose rows and columns are both on the grid: a matrix at a time."""
    along, grid = set(kernel.stream), set(kernel.grid)
    found = [c for c in (contraction(s) for s in kernel.statements) if c is not None]
    return all(along <= set(c.batch) and {*c.m, *c.n} <= grid for c in found)


def uses_dot(found: Contraction, kernel: KernelPlan, dtypes: Mapping[str, str], target: str) -> bool:
    """Whether a contraction pays on tensor cores: every group reaches DOT_MIN (below it half of the lanes would be padding)."""
    if DTYPES[dtypes[target]].kind != "float":
        return False
    return all(math.prod(kernel.extents[i] for i in group) >= DOT_MIN for group in (found.m, found.n, found.k))


# ---------------------------------------------------------------------------------------------------------------------
# Whole tensors (CPU)


def _whole(kernel: KernelPlan) -> Schedule:
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


def _contraction(
    kernel: KernelPlan, c: Contraction, strides: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str], target: Target
) -> Schedule:
    """128 x 128 accumulators where the shape has them, halved while the grid leaves a fifth of the chip idle (the formula of
    Helion's TritonH100MatmulHeuristic, BSD-3); 8 warps from 128 x 128 on, since elementwise prologues at 4 warps spill."""
    size = kernel.extents
    m, n, k = (math.prod(size[i] for i in group) for group in (c.m, c.n, c.k))
    bits = _widest(kernel, dtypes)
    outer = math.prod(size[i] for i in kernel.grid if i not in c.m and i not in c.n)
    widest = 128 if bits <= 16 else 64
    tile_m, tile_n = (min(widest, max(DOT_MIN, power_of_two(x))) for x in (m, n))
    if sum(contraction(s) is not None for s in kernel.statements) > 1 and tile_n > 64:
        tile_n = 64  # each contraction has an accumulator of its own
    while tile_m * tile_n > 64 * 64 and _waves(m, n, tile_m, tile_n, outer, target.sms) < 0.8:
        if tile_m >= tile_n and tile_m > 64:
            tile_m //= 2
        elif tile_n > 64:
            tile_n //= 2
        else:
            break
    tile_k = min(64 if bits <= 16 else 32 if bits <= 32 else 16, max(DOT_MIN, power_of_two(k)))
    found = [x for x in map(contraction, kernel.statements) if x is not None]

    warps = 8 if len(found) * tile_m * tile_n >= 128 * 128 else 4
    most = _WGMMA_VALUES if target.name in _WGMMA else _MMA_VALUES
    while _dot_values(found, tile_m, tile_n, tile_k) > most * 32 * warps:
        if tile_k > 32:
            tile_k //= 2
        elif max(tile_m, tile_n) > 32:
            tile_m, tile_n = (tile_m // 2, tile_n) if tile_m >= tile_n else (tile_m, tile_n // 2)
        else:
            break
    stages = 3 if bits <= 16 else 2
    contiguous = _contiguous(kernel, strides)
    batch = tuple(((i,), 1) for i in kernel.grid if i not in c.m and i not in c.n)
    groups = [(c.m, tile_m), (c.n, tile_n)]
    if contiguous in c.m:
        groups.reverse()
    inner = [(c.k, tile_k)]
    rest = {i for i in kernel.inner if i not in c.k}
    for s in kernel.statements:
        other = contraction(s)
        if other is not None and rest & set(other.k):
            extent = math.prod(size[i] for i in other.k)
            inner.append((other.k, min(tile_k, max(DOT_MIN, power_of_two(extent)))))
            rest -= set(other.k)
    walked = {i for x in found for i in x.batch}
    inner += [((i,), 1 if i in walked else min(16, power_of_two(size[i]))) for i in sorted(rest)]
    return Schedule((*batch, *groups, *inner), warps, stages, group=8)


# (rows, streamed, warps) in order of preference. The first are those of FlashAttention-2 and of FlexAttention on Hopper.
_STREAM_TILES = (
    (128, 128, 8), (128, 64, 8), (128, 64, 4), (64, 128, 8), (64, 64, 8), (64, 64, 4), (64, 32, 4), (32, 64, 4), (32, 32, 4), (16, 32, 4), (16, 16, 4),
)  # fmt: skip
# float32 values per thread that tiles may hold; 255 registers less addresses, operands of the tensor cores and temporaries.
_STREAM_REGISTERS = {"cuda:90": 144, "hip:gfx942": 80}
_STREAM_REGISTERS_ELSE = 120


def _streamed(kernel: KernelPlan, dtypes: Mapping[str, str], target: Target) -> Schedule:
    """The largest tiles whose accumulators and scores fit into the registers, halved in rows while the chip is not filled."""
    size = kernel.extents
    found = [c for c in (contraction(s) for s in kernel.statements) if c is not None]
    grid = tuple(i for i in kernel.grid if i not in kernel.repeat)
    rows = tuple(i for i in grid if any(i in c.m or i in c.n for c in found)) or grid[-1:]
    batch = tuple(i for i in grid if i not in rows)
    height, length = (math.prod(size[i] for i in group) for group in (rows, kernel.stream))
    programs = math.prod(size[i] for i in batch)
    bits = _widest(kernel, dtypes)
    whole = {i: power_of_two(size[i]) for i in kernel.whole}
    whole.update({i: min(WHOLE_TILE, power_of_two(size[i])) for i in kernel.repeat})
    along = set(kernel.stream)
    chosen = _STREAM_TILES[-1]
    most = _STREAM_REGISTERS.get(target.name, _STREAM_REGISTERS_ELSE) // (1 if bits <= 16 else 2)  # without tensor cores, operands are in registers too
    tiled = {*rows, *kernel.stream}
    width = sum(min(WHOLE_TILE, math.prod(size[i] for i in group)) for c in found for group in (c.m, c.n, c.k) if not tiled & set(group))
    for tile_m, tile_n, warps in _STREAM_TILES:
        if (tile_m > DOT_MIN and tile_m >= 2 * power_of_two(height)) or (tile_n > DOT_MIN and tile_n >= 2 * power_of_two(length)):
            continue
        if _stream_values(kernel, tile_m, tile_n, whole) / (32 * warps) > most:
            continue
        if tile_n * width * bits // 8 * 5 // 4 > target.shared_block:
            continue  # the streamed tiles, a quarter more for what is staged
        if tile_m > 64 and -(-height // tile_m) * programs < target.sms:
            continue
        chosen = (tile_m, tile_n, warps)
        break
    tile_m, tile_n, warps = chosen
    dots = {i for c in found if _dots(c, size) for i in (*c.m, *c.n, *c.k)}
    axes = [((i,), 1) for i in batch] + [(rows, tile_m), *(((i,), whole[i]) for i in kernel.repeat), (kernel.stream, tile_n)]
    axes += [((i,), max(DOT_MIN if i in dots else 1, whole[i])) for i in kernel.whole]
    # Contractions first: an index that one of them sums is a tile for all.
    for s in sorted(kernel.statements, key=lambda s: contraction(s) is None):
        rest = tuple(i for i in s.reduced if i not in along and not any(i in group for group, _ in axes))
        if not rest:
            continue
        extent = math.prod(size[i] for i in rest)
        c = contraction(s)
        if c is not None and _dots(c, size):
            axes.append((rest, max(DOT_MIN, power_of_two(extent)) if power_of_two(extent) <= 128 else 64))
        else:  # a short sum is walked number by number: a 3-D tile would not fit
            axes.append((rest, 1))
    return Schedule(tuple(axes), warps, 2)


def _dots(c: Contraction, size: Mapping[str, int]) -> bool:
    """Whether a contraction inside a stream is worth a dot: padding may at most double an extent."""
    return all(math.prod(size[i] for i in group) >= DOT_MIN // 2 for group in (c.m, c.n, c.k))


def _stream_values(kernel: KernelPlan, tile_m: int, tile_n: int, whole: Mapping[str, int]) -> float:
    """How many float32 values the tiles of a streaming kernel hold at once: accumulators and scores for long, products that
    are no dot for a moment (twice: operand and result), and each dot operand that is computed rather than loaded."""
    size, along = kernel.extents, set(kernel.stream)
    held = 0.0
    moment = 0.0
    for s in kernel.statements:
        left = set(free_indices(s.target))
        wide = math.prod(whole.get(i, 1) for i in left)
        c = contraction(s)
        if along & set(s.reduced):
            held += tile_m * wide
            held += tile_m * tile_n if c is not None else 0
        elif s.reduced and along & left:
            held += tile_m * tile_n * wide
        if along & set(s.indices) and s.reduced and not (c is not None and _dots(c, size)):
            extra = math.prod(whole.get(i, 1) for i in s.indices)
            moment = max(moment, 2.0 * tile_m * tile_n * extra if extra > 1 else 0.0)
    return held + moment


# float32 values per thread that a contraction may hold: tensor cores that read operands from shared memory leave more.
_WGMMA_VALUES, _MMA_VALUES = 192, 112


def _dot_values(found: Sequence[Contraction], tile_m: int, tile_n: int, tile_k: int) -> int:
    """Accumulators, and for each operand that is computed rather than loaded its parts and itself, at a time for one contraction."""
    moment = max(tile_m * tile_k * _live(c.lhs) + tile_n * tile_k * _live(c.rhs) for c in found)
    return len(found) * tile_m * tile_n + moment


def _live(terms: Sequence[Expr]) -> int:
    """How many tiles the computation of an operand holds; none for a tensor that is loaded as it is."""
    loaded = {a.tensor for t in terms for a in walk(t) if isinstance(a, Access) and a.subscripts}
    plain = len(terms) == 1 and isinstance(terms[0], Access)
    return 0 if plain else 1 + len(loaded)


def _widest(kernel: KernelPlan, dtypes: Mapping[str, str]) -> int:
    """Bits of the widest float operand that has dimensions to tile."""
    operands = {a.tensor for s in kernel.statements if contraction(s) for a in reads(s) if a.tensor in kernel.reads and len(a.subscripts) > 1}
    return max((DTYPES[dtypes[t]].bits for t in operands if DTYPES[dtypes[t]].kind == "float"), default=32)


def _waves(m: int, n: int, tile_m: int, tile_n: int, batch: int, sms: int) -> float:
    """The share of the chip that is busy, averaged over the waves of the grid."""
    tiles = -(-m // tile_m) * -(-n // tile_n) * max(1, batch)
    return tiles / (-(-tiles // sms) * sms)


def _contiguous(kernel: KernelPlan, strides: Mapping[str, tuple[int, ...]]) -> str | None:
    """The index along which the kernel's last output is contiguous."""
    target = kernel.statements[-1].target
    for subscript, stride in zip(target.subscripts, strides[target.tensor], strict=True):
        if stride == 1 and isinstance(subscript, Index):
            return subscript.name
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Pointwise operations and reductions (GPU)


def _general(kernel: KernelPlan, strides: Mapping[str, tuple[int, ...]], target: Target) -> Schedule:
    """Tiles of TILE elements, widest along what is contiguous in memory, so that a warp reads whole lines.

    Rows that fit are held whole when several statements walk them. Tiles of the grid are halved while the chip is not filled.
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
    budget = max(1, TILE // math.prod(tiles.values()))
    for axis in [*reversed(wide), *reversed(inner), *reversed(outer)]:
        if resident and axis in inner:
            continue
        others = [x for x in axes if x is not axis and size[x] > 1 and tiles[x] == 1]
        most = 32 if len(wide) > 1 and axis in wide and len(axes) > 1 else 128 if axis in outer and inner else TILE // 2 if others else TILE
        wanted = min(most, power_of_two(size[axis]), budget * tiles[axis])
        if wanted > tiles[axis]:
            budget = budget * tiles[axis] // wanted
            tiles[axis] = wanted
    while outer and math.prod(-(-size[a] // tiles[a]) for a in outer) < target.sms:
        axis = max(outer, key=lambda a: tiles[a])
        if tiles[axis] <= (32 if axis in wide else 1):
            break
        tiles[axis] //= 2
    return Schedule(tuple((axis, tiles[axis]) for axis in axes), _warps(math.prod(tiles.values())), 2)


def _warps(elements: int) -> int:
    """4 warps up to 2048 elements of a tile, then one more doubling for each doubling of 16 a thread (Helion's rule for reductions)."""
    return 4 if elements <= 2048 else 8 if elements <= 4096 else 16 if elements <= 16384 else 32


def _axes(kernel: KernelPlan, strides: Mapping[str, tuple[int, ...]]) -> list[tuple[str, ...]]:
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


def _leading(kernel: KernelPlan, strides: Mapping[str, tuple[int, ...]]) -> frozenset[str]:
    """The indices along which some tensor of two or more dimensions in memory is contiguous."""
    found = set()
    for a in accesses(kernel.statements):
        if a.tensor in strides and len(a.subscripts) > 1:
            for subscript, stride in zip(a.subscripts, strides[a.tensor], strict=True):
                if stride == 1:
                    found |= set(free_indices(subscript))
    return frozenset(i for i in found if kernel.extents.get(i, 1) > 1)
