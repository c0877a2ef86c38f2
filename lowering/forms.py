"""The form in which a kernel's tiles are moved and walked: by pointers or descriptors, a program for each tile or a few that walk all of
them, a tile of the result stored whole or in parts. No form changes what is computed.

The choice is made by the registers and the shared memory of the machine code; the figures are those of a bf16 product by 8 warps and 3
stages on H100, 128 x 128 x 64 where nothing else is said.

Products of what is loaded as it is, contractions:
- Descriptors take 90 registers where pointers take 108 to 119, and no masks. But each program makes them first, and executes 680 to 720
  instructions instead of 480 to 540; and as many blocks are resident, two, which shared memory decides. So they are for programs that walk
  several tiles, and for rows that pointers would read element by element.
- In tf32 what does not lie along the sum pointers copy 4 bytes at a time; descriptors move it whole, 101 registers for 126.
- Programs that walk tiles keep pointers alive all along: 118 to 128 registers, for nothing that can be seen in the code. So they go
  with descriptors, which stay at 90.
- What descriptors store lies in shared memory first. A program with one tile reuses the memory of its operands; one that walks tiles
  has loads of the next tile there, and takes 131 KB for 98 KB, so that one block is resident. In two parts it takes 115 KB, and two are.
  At 128 x 256 and 4 stages 262 KB would not fit at all, in parts 229 KB do.
- Where results do not fit there, they are stored by pointers, which takes 180 registers at 128 x 256: no better than pointers for all.

Operands that are computed keep pointers: descriptors put what they are computed of in shared memory first, 148 KB for 115 KB (one block
resident instead of two), and save no registers (176 for 168). So do streams on H100, whose programs are long, but whose registers hold
results: 157 for 164 in attention, with as many blocks resident, and one less where a mask is (140 for 128). On B200 results are in
tensor memory and registers hold addresses above all: 82 for 124, 128 for 161, 124 for 177, so that another block is resident.

Tiles of which a thread has less than 4 bytes (16 x 16 in bf16 by 8 warps) pointers read 2 bytes at a time, and a loop waits for them;
descriptors copy them ahead. So it is with rows that end anywhere: 164 registers and 64 loads of 2 bytes, for 90 and 6 copies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from lowering import tile_ir as ir
from lowering.descriptors import describable, described
from lowering.schedule import Schedule
from tdsl.errors import ArgumentError
from tdsl.ops import DTYPES

# The fields of a Schedule that say the form.
FORM = ("descriptors", "programs", "parts")
# What they are where tiles are moved by pointers, each by a program of its own.
PLAIN: Mapping[str, Any] = MappingProxyType({name: Schedule.__dataclass_fields__[name].default for name in FORM})


def dressed(kernel: ir.Kernel, schedule: Schedule) -> ir.Kernel:
    """The kernel in the form that a schedule says; what cannot go through a descriptor or be cut stays as it is."""
    made = described(kernel, schedule.descriptors) if schedule.descriptors else replace(kernel, descriptors=())
    return replace(made, walkers=schedule.programs, parts=parts_of(made) if schedule.parts > 1 else None)


def schedule_of(kernel: ir.Kernel) -> Schedule:
    """The schedule that gives a kernel of a GPU."""
    axes = tuple((tuple(i for i, _ in a.indices), a.tile) for a in kernel.axes)
    tensors = tuple(dict.fromkeys(d.buffer.tensor for d in kernel.descriptors))
    parts = 1 if kernel.parts is None else kernel.parts.count
    return Schedule(axes, kernel.num_warps, kernel.num_stages, kernel.group, tensors, kernel.walkers, parts)


def asked(kernel: ir.Kernel, default: ir.Kernel, given: Mapping[str, object]) -> ir.Kernel:
    """`default`, with the fields of FORM that a user gave. Raises ArgumentError for what the kernel cannot have."""
    schedule = schedule_of(default)
    programs, parts = given.get("programs", schedule.programs), given.get("parts", schedule.parts)
    if type(programs) is not int or programs < 0:
        raise ArgumentError(f"programs of {kernel.name} is {programs!r}", help="an integer; 0: each tile has a program of its own")
    if parts not in (1, 2) or type(parts) is not int:
        raise ArgumentError(f"parts of {kernel.name} is {parts!r}", help="1 or 2")
    if given.get("parts") == 2 and parts_of(kernel) is None:
        what = f"the tiles of {kernel.name} cannot be stored in parts"
        raise ArgumentError(what, help="that is for sums whose result is only changed element by element, in tiles of two dimensions")
    names = given.get("descriptors", schedule.descriptors)
    return dressed(kernel, replace(schedule, descriptors=_moved(kernel, names), programs=programs, parts=parts))


def _moved(kernel: ir.Kernel, names: object) -> tuple[str, ...]:
    """The tensors that a user has moved by descriptors."""
    can = describable(kernel)
    if names is True or not names:
        return can if names else ()
    if not isinstance(names, tuple | list) or not all(name in can for name in names):
        raise ArgumentError(
            f"descriptors of {kernel.name} are {names!r}, and with these tiles they move {', '.join(can) or 'nothing'}",
            help="some of those tensors, or True for all: tiles of two dimensions, in tensors whose rows begin at multiples of 16 bytes",
        )
    return tuple(map(str, names))


def parts_of(kernel: ir.Kernel) -> ir.Parts | None:
    """How the end of a kernel can be cut along the columns of what it stores: all that follows its last loop must be elementwise along
    them, and half of a tile's row still has 16 bytes."""
    start = max((n + 1 for n, op in enumerate(kernel.body) if isinstance(op, ir.For)), default=0)
    end = kernel.body[start:]
    stores = [op for op in end if isinstance(op, ir.Store)]
    if not start or not stores or len(stores[-1].axes) != 2:
        return None
    axis = kernel.axis(stores[-1].axes[-1])
    if not all(isinstance(op, ir.Load | ir.Store | ir.IndexOf | ir.Elementwise | ir.Mask | ir.Full) for op in end):
        return None
    if any(axis.name not in op.axes or axis.tile * DTYPES[op.buffer.dtype].bits < 2 * 128 for op in stores):
        return None
    return ir.Parts(axis.name, 2, start) if axis.role == "grid" and axis.tile >= 2 * 16 else None


def fed(kernel: ir.Kernel) -> tuple[ir.Load, ...]:
    """What loops load for their products, which multiply it as it is."""
    loops = [op for op in ir.operations(kernel.body) if isinstance(op, ir.For)]
    read = [{v.name for op in loop.body if isinstance(op, ir.Dot) for v in (op.lhs, op.rhs)} for loop in loops]
    return tuple(op for loop, names in zip(loops, read, strict=True) for op in loop.body if isinstance(op, ir.Load) and op.dst.name in names)


def operands(kernel: ir.Kernel) -> tuple[ir.Load, ...]:
    """What the products of a kernel multiply, if all of it is loaded by its only loop and nothing of it is computed; else ()."""
    loops = [op for op in ir.operations(kernel.body) if isinstance(op, ir.For)]
    dots = [op for op in ir.operations(kernel.body) if isinstance(op, ir.Dot)]
    found = fed(kernel)
    return found if len(loops) == 1 and {op.dst.name for op in found} == {v.name for op in dots for v in (op.lhs, op.rhs)} else ()
