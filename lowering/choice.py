"""The configuration that a kernel gets where nobody tuned it: of those that fit the first that is about as fast as any, in the form that
its tiles are best walked in, with what the assembler is told."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from lowering import tile_ir as ir
from lowering.control import Config
from lowering.cost import Prediction
from lowering.descriptors import ALIGNED, describable, described, descriptor
from lowering.forms import FORM, asked, fed, operands, parts_of
from lowering.registers import excess, fits, pressure, shared_bytes, vector_dot
from lowering.schedule import TENSOR_MEMORY, Schedule
from lowering.targets import Target
from tdsl.ops import DTYPES

# How much longer than the fastest configuration a preferred one may be predicted to take.
_PREFERRED = 1.15
# Tiles for each program that is resident, from which programs walk them.
_WAVES = 2
# Registers that a thread takes beside its tiles where descriptors move them: 26 in products of 64 x 64 to 128 x 256, and what an epilogue takes.
_BESIDE = 40
COPY = 4  # bytes of the smallest copy from memory to shared memory that a thread makes ahead of its use
_RESERVED = 1024  # bytes of shared memory that the system has of each block


def best_fit(kernels: Iterable[ir.Kernel], target: Target, predicted: Callable[[ir.Kernel], Prediction]) -> ir.Kernel:
    """Of the kernels that fit the first that is predicted to take about as long as the fastest. The others are not made where the first
    is about as fast as any can be. Where none fits, the last one, which says so (`Kernel.unfit`). Those whose programs walk tiles are
    meant for that form alone."""
    fitting: list[tuple[ir.Kernel, float]] = []
    last = None
    count = 0
    for last in kernels:
        if target.backend == "cpu":
            return last
        walks, last = last.walkers > 0, formed(last, target)
        count += 1
        if fits(last, target) and (last.walkers or not walks):
            found = predicted(last)
            fitting.append((last, found.seconds))
            if len(fitting) == 1 and found.seconds <= _PREFERRED * found.least:
                break
    assert last is not None
    if not fitting:
        why = f"none of {count} configurations fits, this one least of all too large: {excess(last, target)}"
        return told(replace(last, unfit=why), target)
    fastest = min(seconds for _, seconds in fitting)
    return told(next(kernel for kernel, seconds in fitting if seconds <= _PREFERRED * fastest), target)


def by_hand(kernel: ir.Kernel, given: Config, target: Target) -> ir.Kernel:
    """A kernel with the tiles that a user asked for, in the form that they asked for, by default the best for these tiles. Descriptors are
    left out where a chip has none. Raises ArgumentError for a form that the kernel cannot have."""
    fields = {name: getattr(given, name) for name in FORM} if isinstance(given, Schedule) else given
    made = kernel if target.backend == "cpu" else asked(kernel, formed(kernel, target), fields)
    made = made if target.descriptors else replace(made, descriptors=())
    reason = "" if target.backend == "cpu" else excess(made, target)
    return told(replace(made, unfit=reason and f"this configuration does not fit: {reason}"), target)


def told(kernel: ir.Kernel, target: Target) -> ir.Kernel:
    """The kernel with what the assembler is told of registers: but for wgmma that a thread may have all. Left to itself it spills some,
    at 80 registers of 255, for the sake of a third block per SM; at 48 with tiles of three dimensions."""
    dots = [op for op in ir.operations(kernel.body) if isinstance(op, ir.Dot)]
    solid = not dots and any(len(op.dst.axes) > 2 for op in ir.operations(kernel.body) if isinstance(op, ir.Elementwise))
    if target.backend == "cuda" and (solid or any(vector_dot(op, kernel, target) or target.name != "cuda:90" for op in dots)):
        return replace(kernel, max_registers=min(target.registers_thread, target.registers_sm // (kernel.num_warps * target.warp)))
    return kernel


# ---------------------------------------------------------------------------------------------------------------------
# The form


def formed(kernel: ir.Kernel, target: Target) -> ir.Kernel:
    """The form in which the tiles of products on tensor cores are moved, by the figures of lowering/forms.py.

    Contractions of what is loaded as it is: programs walk the tiles where there are more than _WAVES for each that is resident, and then
    descriptors move them; what is stored too, in parts where that lets more blocks be resident, no fewer than with pointers. Streams go
    through descriptors where results are in tensor memory. In everything else only operands that pointers would read element by element do.
    """
    kernel = replace(kernel, descriptors=(), walkers=0, parts=None)
    dots = [op for op in ir.operations(kernel.body) if isinstance(op, ir.Dot)]
    if not target.descriptors or not dots or any(vector_dot(op, kernel, target) for op in dots):
        return kernel
    twice = _tiled_twice(kernel)
    if not twice and target.name in TENSOR_MEMORY:
        return described(kernel, _read(kernel))
    can, found = describable(kernel), operands(kernel)
    if twice and found and all(descriptor(op, kernel) is not None for op in found):
        stored = [form for form in _walking(described(kernel, can))[:-1] if fits(form, target)]
        best = max(stored, key=lambda f: resident(f, target), default=None)  # the first of several
        blocks = 0 if best is None else resident(best, target)
        if best is not None and blocks >= resident(kernel, target) and kernel.grid_tiles > _WAVES * blocks * target.sms:
            return replace(best, walkers=blocks * target.sms)
    return described(kernel, [op.buffer.tensor for op in fed(kernel) if _by_elements(op, kernel, target)])


def forms(kernel: ir.Kernel, target: Target) -> Iterator[ir.Kernel]:
    """The forms of a kernel with products beside the plain one, those that do not fit among them. Programs walk tiles in groups, or the
    order in which they come to them would be that of the launch."""
    if not any(isinstance(op, ir.Dot) for op in ir.operations(kernel.body)):
        return
    made = described(kernel, describable(kernel)) if target.descriptors else kernel
    if made.descriptors:
        yield made
    if _tiled_twice(kernel) and kernel.group > 1:
        for form in _walking(made) if made.descriptors else [replace(kernel, walkers=1)]:
            programs = resident(form, target) * target.sms
            if programs < kernel.grid_tiles:
                yield replace(form, walkers=programs)


def _walking(made: ir.Kernel) -> list[ir.Kernel]:
    """Forms in which programs walk tiles, in order of preference: everything by descriptors, stored in parts, loads alone."""
    whole, loads = replace(made, walkers=1), replace(described(made, _read(made)), walkers=1)
    cut = parts_of(made)
    return [whole, *([replace(whole, parts=cut)] if cut is not None else []), loads]


def _read(kernel: ir.Kernel) -> list[str]:
    return [op.buffer.tensor for op in ir.operations(kernel.body) if isinstance(op, ir.Load)]


def resident(kernel: ir.Kernel, target: Target) -> int:
    """About how many blocks of a kernel whose tiles descriptors move fit on one SM."""
    threads = kernel.num_warps * target.warp
    registers = threads * (pressure(kernel, target).held + _BESIDE)
    shared = shared_bytes(kernel, target) + _RESERVED
    return max(1, min(target.blocks, target.threads // threads, target.shared_sm // shared, int(target.registers_sm // registers)))


def _tiled_twice(kernel: ir.Kernel) -> bool:
    """Whether rows and columns of the products are on the grid."""
    dots = [op for op in ir.operations(kernel.body) if isinstance(op, ir.Dot)]
    return all(kernel.axis(a).role == "grid" for op in dots for a in op.dst.axes)


def _by_elements(op: ir.Load, kernel: ir.Kernel, target: Target) -> bool:
    """Whether pointers would read what a descriptor can move element by element, and a loop would wait for it: the compiler does not see
    where the rows end, or a thread has less of a tile than can be copied ahead."""
    found = descriptor(op, kernel)
    if found is None:
        return False
    axis, item = kernel.axis(found.sides[-1].axis), DTYPES[op.buffer.dtype].bits // 8
    tile = math.prod(kernel.axis(a).tile for a in op.dst.axes) * item
    return (axis.masked and axis.indices[-1][1] * item % ALIGNED != 0) or tile < COPY * kernel.num_warps * target.warp
