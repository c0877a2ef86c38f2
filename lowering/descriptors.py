"""Which loads and stores of a kernel can go through a tensor descriptor, and the kernel where they do.

    a = tl.load(A + i[:, None] * A_stride_0 + k[None, :], mask=..)   -->   a = A_tiles.load([i_start, k_start])

A descriptor is made once per program. One thread then moves a whole tile, zeros beyond the tensor's end included, so no address and no
mask is in registers: 90 of them where pointers take 108 (128 x 128 by 8 warps on H100, 154 for 184 at 128 x 256). What the hardware asks
for, by the CUDA driver's cuTensorMapEncodeTiled: a contiguous last dimension with at least 16 bytes of tile, all other strides and the
tensor itself at multiples of 16 bytes, at most 5 dimensions and 256 elements of a tile along each.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from lowering import tile_ir as ir
from tdsl.affine import linear
from tdsl.ir import Clamp, Expr, Index, Pad, free_indices
from tdsl.ops import DTYPES

# Bytes that the tensor, its rows and a row of a tile come in.
ALIGNED = 16
_MOST_SIDES, _LONGEST = 5, 256


def described(kernel: ir.Kernel, tensors: Iterable[str]) -> ir.Kernel:
    """The kernel with those of its loads and stores of some tensors through descriptors that can be."""
    wanted = {*tensors}
    found = (descriptor(op, kernel) for op in ir.operations(kernel.body) if isinstance(op, ir.Load | ir.Store))
    return replace(kernel, descriptors=tuple(dict.fromkeys(d for d in found if d is not None and d.buffer.tensor in wanted)))


def describable(kernel: ir.Kernel) -> tuple[str, ...]:
    """The tensors of which some load or store can go through a descriptor."""
    found = (descriptor(op, kernel) for op in ir.operations(kernel.body) if isinstance(op, ir.Load | ir.Store))
    return tuple(dict.fromkeys(d.buffer.tensor for d in found if d is not None))


def descriptor(op: ir.Load | ir.Store, kernel: ir.Kernel) -> ir.Descriptor | None:
    """The descriptor that moves what a load or store moves; None where none can."""
    buffer = op.buffer
    axes = op.dst.axes if isinstance(op, ir.Load) else op.axes
    if buffer.number or buffer.dtype == "bool" or kernel.wide or len(axes) != 2 or _both_ways(buffer, kernel):
        return None
    if isinstance(op, ir.Store) and (op.mode != "set" or op.src.axes != op.axes):
        return None
    together = walked_as_one(kernel, buffer, op.subscripts)
    sides = []
    for d, e in enumerate(op.subscripts):
        if d in together:
            axis, dims = together[d]
            if d == dims[-1]:
                sides.append(ir.Side("" if axis.scalar else axis.name, dims))
            continue
        place = _place(e, kernel, axes)
        if place is None:
            return None
        if buffer.shape[d] != 1 or place[0]:
            sides.append(ir.Side(place[0], (d,), place[1]))
    sides.sort(key=lambda side: -buffer.strides[side.dims[-1]])
    found = ir.Descriptor(buffer, tuple(sides))
    return found if sorted(found.axes) == sorted(axes) and _fits(found, kernel) else None


def walked_as_one(kernel: ir.Kernel, buffer: ir.Buffer, subscripts: tuple[Expr, ...]) -> dict[int, tuple[ir.Axis, tuple[int, ...]]]:
    """Dimensions that an axis of several indices walks as one, since their strides compose: dimension -> (axis, all of them)."""
    found: dict[int, tuple[ir.Axis, tuple[int, ...]]] = {}
    names = [e.name if isinstance(e, Index) else "" for e in subscripts]
    for axis in kernel.axes:
        indices = [i for i, _ in axis.indices]
        if len(indices) < 2 or any(names.count(i) != 1 for i in indices):
            continue
        if any(i in free_indices(e) for i in indices for e in subscripts if not isinstance(e, Index)):
            continue
        dims = tuple(names.index(i) for i in indices)
        if all(buffer.strides[a] == buffer.strides[b] * n for a, b, (_, n) in zip(dims, dims[1:], axis.indices[1:], strict=False)):
            found.update(dict.fromkeys(dims, (axis, dims)))
    return found


def _place(e: Expr, kernel: ir.Kernel, axes: tuple[str, ...]) -> tuple[str, bool] | None:
    """The axis whose tile a subscript walks, and whether that is shifted by a number; ("", False) where the subscript is one number for
    the whole tile, None for anything else."""
    if isinstance(e, Pad | Clamp):
        return None
    own = {i: a for a in kernel.axes for i, _ in a.indices}
    walked = [i for i in free_indices(e) if i in own and own[i].name in axes]
    numbers = {op.dst.name for op in ir.operations(kernel.body) if not isinstance(op, ir.For | ir.Store) and not op.dst.axes}
    if not all(i in walked or i in numbers or (i in own and own[i].scalar) for i in free_indices(e)):
        return None
    if not walked:
        return "", False
    axis = own[walked[0]]
    if len(walked) > 1 or len(axis.indices) > 1:
        return None
    if isinstance(e, Index):
        return axis.name, False
    rest = linear(e) - linear(Index(walked[0]))
    return None if axis.masked or walked[0] in free_indices(rest.expr()) else (axis.name, True)


def _fits(found: ir.Descriptor, kernel: ir.Kernel) -> bool:
    """Whether the hardware can move such tiles."""
    buffer, sides = found.buffer, found.sides
    item = DTYPES[buffer.dtype].bits // 8
    strides = [buffer.strides[side.dims[-1]] for side in sides]
    tiles = [kernel.axis(side.axis).tile if side.axis else 1 for side in sides]
    return (
        1 < len(sides) <= _MOST_SIDES
        and strides[-1] == 1
        and not sides[-1].shifted
        and tiles[-1] * item >= ALIGNED
        and max(tiles) <= _LONGEST
        and all(s > 0 and s * item % ALIGNED == 0 for s in strides[:-1])
    )


def _both_ways(buffer: ir.Buffer, kernel: ir.Kernel) -> bool:
    """Whether a kernel both reads and writes a tensor: what descriptors write, loads of the same program may not see."""
    kinds = {type(op) for op in ir.operations(kernel.body) if isinstance(op, ir.Load | ir.Store) and op.buffer == buffer}
    return len(kinds) > 1
