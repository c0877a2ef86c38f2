"""A kernel's configuration by hand, on top of the one that the compiler would take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace

from lowering import tile_ir as ir
from lowering.control import Config
from lowering.forms import FORM, PLAIN, schedule_of
from lowering.plan import KernelPlan
from lowering.schedule import Schedule
from tdsl.errors import ArgumentError

# What a configuration may say by name, beside `tiles`; what it leaves out is as it would be without it.
FIELDS = tuple(f.name for f in fields(Schedule) if f.name != "axes")


def configured(kernel: KernelPlan, default: ir.Kernel, given: Config, *, exact: bool = False) -> Schedule:
    """The tiles, warps, stages and groups that `given` asks for, on top of the default where it says only some fields; the form in which
    they are walked goes by these tiles, so that is for `choice.by_hand`. Raises ArgumentError.

    exact: tiles need not be powers of two, as on a CPU.
    """
    standard = replace(schedule_of(default), **PLAIN)
    made = given if isinstance(given, Schedule) else _changed(kernel, standard, given)
    walked = sorted(i for axis, _ in made.axes for i in axis)
    if walked != sorted(kernel.extents):
        what = f"the schedule of {kernel.name} walks the indices {', '.join(walked)}, the kernel has {', '.join(sorted(kernel.extents))}"
        raise ArgumentError(what, help=f"each index is in one axis: {_axes(standard)}")
    for axis, tile in made.axes:
        if not (type(tile) is int and tile > 0 if exact else _power_of_two(tile)):
            raise ArgumentError(f"the tile {tile!r} of {' '.join(axis)} in {kernel.name} is no power of two", help="1, 2, 4, .., 128, ..")
        if len({i in kernel.grid for i in axis}) > 1:
            raise ArgumentError(f"{', '.join(axis)} of {kernel.name} cannot be one axis: some run in parallel and some inside")
    if not _power_of_two(made.num_warps) or made.num_warps > 32:
        raise ArgumentError(f"num_warps of {kernel.name} is {made.num_warps!r}", help="1, 2, 4, 8, 16 or 32")
    for name in ("num_stages", "group"):
        if type(getattr(made, name)) is not int or getattr(made, name) < 1:
            raise ArgumentError(f"{name} of {kernel.name} is {getattr(made, name)!r}", help="an integer from 1 on")
    return replace(made, **PLAIN)


def _changed(kernel: KernelPlan, standard: Schedule, given: Mapping[str, object]) -> Schedule:
    """Some fields changed by name."""
    tiles = given.get("tiles", {})
    if not isinstance(tiles, Mapping):
        raise ArgumentError(f"tiles of {kernel.name} are {tiles!r}", help=f"a tile by index: {{{_axes(standard)}}}")
    axis_of = {i: n for n, (axis, _) in enumerate(standard.axes) for i in axis}
    axes = list(standard.axes)
    for name, tile in tiles.items():
        if name not in axis_of:
            raise ArgumentError(f"{kernel.name} has no index {name!r} to tile", help=f"its axes are {_axes(standard)}")
        axes[axis_of[name]] = (axes[axis_of[name]][0], tile)
    known = {name: value for name, value in given.items() if name not in ("tiles", *FORM)}
    return replace(standard, axes=tuple(axes), **known)  # type: ignore[arg-type]


def _axes(schedule: Schedule) -> str:
    return ", ".join(f"{' '.join(axis)}: {tile}" for axis, tile in schedule.axes)


def _power_of_two(n: object) -> bool:
    return type(n) is int and n > 0 and n & (n - 1) == 0
