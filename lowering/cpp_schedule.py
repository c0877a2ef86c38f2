"""How a kernel is cut for C++ on a CPU: which axis is vector code, what one program does, which kernels stay matrix products.

The last axis of the schedule is the vector one: the axis along which most of what is read lies side by side. Grid axes
other than that are walked one by one in parallel; inner axes are held whole, in the first- and second-level caches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from lowering.addresses import axis_step
from lowering.contraction import accesses, contraction
from lowering.normalize import cost
from lowering.plan import KernelPlan
from lowering.products import is_library
from lowering.schedule import Schedule
from lowering.split import Split
from lowering.statement import power_of_two
from tdsl.ir import Access, Expr, Index, Statement, children, expressions, free_indices, reads, walk
from tdsl.ops import DTYPES
from tdsl.traced import estimates

Axis = tuple[str, ...]  # the indices of one, outermost first

# Elements per vector of float32 of 512 bits.
VECTOR = 16
# Elements of a tile of a pointwise kernel: 32 KiB of float32, a first-level cache.
POINTWISE = 8192
# Elements of local arrays that one program may hold: half of a second-level cache of 512 KiB in float32.
RESIDENT = 1 << 16
# Elements along a streamed axis up to which rows are held whole, in the second-level cache.
ROW = 1 << 14
STREAM = 2048
# Programs that keep the cores of a server busy.
PROGRAMS = 16
# Sums along another axis than the contiguous one: how many of them side by side, 16 KiB of float32: long rows are read as they lie.
WIDTH = 4096
# Long sums are split into a fixed number of parts, so that results do not depend on the number of threads.
CPU_SPLIT = Split(PROGRAMS, times=2, terms=16, last=64, width=512, work=1 << 17, part=1 << 16, products=False)
# Points of a statement from which threads are worth waking: some 5 us.
PARALLEL = 1 << 15
# Rows of a tile of products, and elements of the tile: 256 KiB of float32, a quarter of a second-level cache.
ROWS, TILE = 128, 1 << 16
# A transposition's tile both ways: eight cache lines of each row, which is what a page wants to be opened for.
ACROSS = 128


def takes_cpp(kernel: KernelPlan, dtypes: Mapping[str, str]) -> bool:
    """Whether a kernel is better as C++ than as matrix products of a library with torch code around them."""
    return all(is_library(s, dtypes, len(kernel.statements) == 1) is None for s in kernel.statements)


def only_sums(statements: Sequence[Statement]) -> bool:
    """Whether some reductions do not wait for each other: one loop serves all of them."""
    made = {s.target.tensor for s in statements}
    return all(s.reduced and not any(a.tensor in made for a in reads(s)) for s in statements)


def cpp_schedule(kernel: KernelPlan, strides: Mapping[str, tuple[int, ...]]) -> Schedule:
    """The tiles of a kernel's axes, the vector axis last. strides: of every tensor in memory, in elements."""
    size = kernel.extents
    axes = _axes(kernel, strides)
    length = {axis: math.prod(size[i] for i in axis) for axis in axes}
    lane = min(axes, key=lambda axis: _traffic(kernel, axis, length[axis], strides)) if axes else ()
    grid = [axis for axis in axes if axis is not lane and axis[0] in kernel.grid]
    inner = [axis for axis in axes if axis is not lane and axis[0] not in kernel.grid]
    tiles = {axis: max(1, length[axis]) for axis in axes}
    for axis in grid:
        tiles[axis] = 1
    streamed = [axis for axis in axes if axis[0] in kernel.stream]
    for axis in streamed:
        if axis is not lane:
            tiles[axis] = 1
        elif length[axis] > ROW:
            tiles[axis] = STREAM
    if lane and lane[0] in kernel.grid:
        product = contraction(kernel.statements[0]) if len(kernel.statements) == 1 else None
        if product is not None:  # multiplied out: its sum is walked one by one
            tiles.update({axis: 1 for axis in inner if axis[0] in product.k})
        tiles[lane] = _lane_tile(kernel, inner, grid, lane, length, tiles)
        for axis in grid:
            if not inner and _near(kernel, axis, lane, strides):
                tiles[axis] = min(ACROSS, length[axis])
                tiles[lane] = min(tiles[lane], ACROSS)
    order = [*grid, *[a for a in inner if a in streamed], *[a for a in inner if a not in streamed], *([lane] if lane else [])]
    return Schedule(tuple((axis, tiles[axis]) for axis in order))


def takes_blocks(kernel: KernelPlan, dtypes: Mapping[str, str]) -> bool:
    """Whether a kernel runs as C++ that multiplies matrices tile by tile: the products of a stream, which never reach memory.

    That pays where something stands between two products. Measured on one core of a Zen 4, attention over 8 x 512 x 512 scores forward: 8.5 ms
    with S and P in memory around two calls of the library, of which those take 5.4; 6.5 ms in tiles. Over 8 x 2048 x 2048, 300 and 98 ms.
    A product alone, or with arithmetic only before or after it, stays a call of the library on whole matrices, which packs them once and is
    made for the machine. So does what each tile of rows would make again.
    """
    if len(kernel.stream) != 1 or kernel.repeat or len(_rows(kernel)) > 1:
        return False
    products = [s for s in kernel.statements if is_library(s, dtypes, False)]
    types = {dtypes[t] for s in products for t in (s.target.tensor, *(a.tensor for a in reads(s))) if DTYPES[dtypes[t]].kind == "float"}
    return len(types) == 1 and types <= {"float32", "float64"} and all({*kernel.grid} <= {*s.indices} for s in products)


def _rows(kernel: KernelPlan) -> list[str]:
    """The grid indices that are rows or columns of some product, not batches of all."""
    found = [c for c in (contraction(s) for s in kernel.statements) if c is not None]
    return [i for i in kernel.grid if any(i in (*c.m, *c.n) for c in found)]


def block_schedule(kernel: KernelPlan) -> Schedule:
    """Tiles of a kernel of products: ROWS of the grid or of the stream against as much of the other as a second-level cache holds."""
    size = kernel.extents
    rows = _rows(kernel)
    tiles = {i: max(1, n) for i, n in size.items()}
    tiles.update(dict.fromkeys(kernel.grid, 1))
    for i in rows:
        tiles[i] = min(ROWS, size[i])
    for i in kernel.stream:
        tiles[i] = min(TILE // ROWS if rows else ROWS, size[i])
    tiled = [*rows, *kernel.stream, *(i for i in size if i not in kernel.grid and i not in kernel.stream)]
    last = [s for s in kernel.statements if s.target.tensor in kernel.stores]  # what is stored says which axis is contiguous
    places = {i.name: n for s in (*kernel.statements, *last) for n, i in enumerate(s.target.subscripts) if isinstance(i, Index)}
    order = [*(i for i in kernel.grid if i not in rows), *sorted(tiled, key=lambda i: places.get(i, len(size)))]
    return Schedule(tuple(((i,), tiles[i]) for i in order))


def _lane_tile(
    kernel: KernelPlan, inner: list[Axis], grid: list[Axis], lane: Axis, length: Mapping[Axis, int], tiles: Mapping[Axis, int]
) -> int:
    """Elements of the vector axis per program, where it is on the grid: cache, then enough programs."""
    if not inner:
        wanted = POINTWISE
    elif all({*free_indices(s.target)} <= {*kernel.grid} for s in kernel.statements) and not any(tiles[a] == 1 for a in inner):
        wanted = WIDTH
    else:
        held = math.prod(tiles[a] for a in inner)
        wanted = 64 if any(tiles[a] == 1 for a in inner) else min(512, RESIDENT // max(1, held))
    others = math.prod(max(1, length[a]) for a in grid)
    while wanted > 64 and -(-length[lane] // wanted) * others < PROGRAMS // 2:
        wanted //= 2
    return max(VECTOR, min(wanted, power_of_two(length[lane])))


# ---------------------------------------------------------------------------------------------------------------------
# Axes


def _axes(kernel: KernelPlan, strides: Mapping[str, tuple[int, ...]]) -> list[Axis]:
    """The indices, grid ones first; neighbours that every access walks by one stride are one axis, and so is what is streamed."""
    axes: list[Axis] = [(i,) for i in (*kernel.grid, *kernel.inner) if i not in kernel.stream]
    axes += [kernel.stream] if kernel.stream else []
    merged = True
    while merged:
        merged = False
        for a in axes:
            for b in axes:
                if a is not b and _joins(kernel, a, b, strides):
                    axes = [a + b if x is a else x for x in axes if x is not b]
                    merged = True
                    break
            if merged:
                break
    return axes


def _joins(kernel: KernelPlan, a: tuple[str, ...], b: tuple[str, ...], strides: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether axis b continues axis a wherever either occurs."""
    if (a[0] in kernel.grid) != (b[0] in kernel.grid) or (a[0] in kernel.stream) != (b[0] in kernel.stream):
        return False
    both = (*a, *b)
    for s in kernel.statements:
        inside = [i in s.indices for i in both]
        reduced = [i in s.reduced for i in both]
        if len({*inside}) > 1 or len({*reduced}) > 1:
            return False
        if inside[0] and any(isinstance(e, Index) and e.name in both for e in _values(s)):
            return False
    sizes = [(i, kernel.extents[i]) for i in both]
    for access in accesses(kernel.statements):
        used = [i for i in both if i in free_indices(access)]
        if not used:
            continue
        plain = [e.name for e in access.subscripts if isinstance(e, Index)]
        if len(used) < len(both) or any(plain.count(i) != 1 or sum(i in free_indices(e) for e in access.subscripts) != 1 for i in both):
            return False
        if access.tensor in strides and axis_step(access.subscripts, strides[access.tensor], sizes) is None:
            return False
    return True


def _values(s: Statement) -> list[Expr]:
    """What stands in a statement as a value, subscripts left out."""
    found: list[Expr] = []

    def visit(e: Expr) -> None:
        found.append(e)
        if not isinstance(e, Access):
            for child in children(e):
                visit(child)

    visit(s.value)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The vector axis


@estimates()
def _traffic(kernel: KernelPlan, lane: tuple[str, ...], extent: int, strides: Mapping[str, tuple[int, ...]]) -> float:
    """Loads, stores and operations of a kernel if `lane` is its vector axis; a vector of neighbours counts as one."""
    size = kernel.extents
    own = [(i, size[i]) for i in lane]
    width = max(1, min(VECTOR, extent))
    total = 0.0
    local = {s.target.tensor for s in kernel.statements} - set(kernel.stores)
    for s in kernel.statements:
        total += math.prod(size[i] for i in s.indices) * (0.5 + cost(s.value)) / width
        found = [e for top in expressions(s) for e in walk(top) if isinstance(e, Access) and e.tensor in strides and e.tensor not in local]
        for access in found:
            free = {i for i in free_indices(access) if i in size}
            times = math.prod(size[i] for i in free) * math.prod(size[i] for i in kernel.grid if i not in free and i not in lane)
            along = axis_step(access.subscripts, strides[access.tensor], own)
            if lane[0] not in free:
                total += times * (max(1, extent // 64) if lane[0] in kernel.grid else 1)
            else:
                total += times / width if along == 1 else times * (1.5 if access is s.target else 1.0)
    return total * (1.05 if lane[0] not in kernel.grid else 1.0)


def _near(kernel: KernelPlan, axis: Axis, lane: Axis, strides: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether some tensor that varies along the vector axis is contiguous along another one."""
    own = [(i, kernel.extents[i]) for i in axis]
    found = [a for a in accesses(kernel.statements) if a.tensor in strides and axis[-1] in free_indices(a) and lane[-1] in free_indices(a)]
    return kernel.extents[axis[-1]] > 1 and any(axis_step(a.subscripts, strides[a.tensor], own) == 1 for a in found)
