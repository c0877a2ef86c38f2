"""What a user fixes by hand: tiles of kernels, intermediates that are stored or made again, and edited sources."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

from lowering import tile_ir as ir
from lowering.forms import FORM, PLAIN, schedule_of
from lowering.kernel_source import KernelSource
from lowering.plan import KernelPlan
from lowering.schedule import Schedule
from tdsl.errors import ArgumentError, CompileError

STORE, RECOMPUTE = "store", "recompute"
# What a configuration may say by name, beside `tiles`; what it leaves out is as it would be without it.
FIELDS = tuple(f.name for f in fields(Schedule) if f.name != "axes")

Config = Schedule | Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Control:
    """schedules: by kernel, a Schedule or some of its fields ({"tiles": {"i": 64}, "num_warps": 8}). pinned: STORE or RECOMPUTE by
    intermediate. sources: Triton modules by kernel; that of a kernel which also saves something for the backward is named
    `attention_0 (saves P.sum, P.max)`, as `check` names it."""

    schedules: Mapping[str, Config] = field(default_factory=dict)
    pinned: Mapping[str, str] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)

    def pins(self, choice: str) -> frozenset[str]:
        """The intermediates for which that was chosen."""
        return frozenset(name for name, chosen in self.pinned.items() if chosen == choice)


def saving_name(kernel: str, saves: tuple[str, ...]) -> str:
    """The name of a kernel of a program that saves some tensors."""
    return f"{kernel} (saves {', '.join(saves)})" if saves else kernel


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


# ---------------------------------------------------------------------------------------------------------------------
# Edited kernels


def edited(kernel: KernelSource, text: str, name: str) -> KernelSource:
    """A kernel with another text in the place of its own. Raises CompileError where the text is not that of such a kernel."""
    given = parameters(kernel.name, text)
    names = tuple(a.name for a in kernel.args)
    if given != names:
        raise CompileError(
            f"the edited kernel takes ({', '.join(given)}), but {name} is called with ({', '.join(names)})",
            help=f"the parameters stay as they are; an edit of a kernel of training goes under its own name, {name!r} here",
        )
    return replace(kernel, source=text)


def parameters(kernel: str, text: str) -> tuple[str, ...]:
    """The parameters of the function of that name in a module. Raises CompileError if it is not there, or if the text is not Python."""
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        line = (error.text or "").rstrip()
        raise CompileError(f"the edited kernel {kernel} is not Python: {error.msg}, in line {error.lineno}: {line}") from error
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    if kernel not in functions:
        raise CompileError(
            f"the edited text defines no function {kernel}, but {', '.join(functions) or 'none'}",
            help="edit what emit('triton', ..) prints, imports and names included",
        )
    return tuple(a.arg for a in functions[kernel].args.args)
