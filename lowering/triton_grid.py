"""Which tiles each program of a Triton kernel computes, and the variables of its axes, as text."""

from __future__ import annotations

from collections.abc import Iterator

from lowering import tile_ir as ir
from lowering.triton_addresses import widened
from lowering.triton_descriptors import Descriptors


class Grid(Descriptors):
    """Spells the grid of one kernel. indent: of what is done for each tile."""

    @property
    def indent(self) -> str:
        return "        " if self.kernel.walkers else "    "

    def grid(self) -> Iterator[str]:
        """Which tile of each grid axis this program computes; the last axis varies fastest."""
        axes = [a for a in self.kernel.axes if a.role == "grid"]
        if not axes:
            return
        indent = self.indent
        wide = ".to(tl.int64)" if self.kernel.wide else ""
        rest = "pid"
        grouped = self.kernel.group > 1 and len(axes) >= 2 and not axes[-1].scalar and not axes[-2].scalar
        if grouped:
            self.tiles["GROUP"] = self.kernel.group
        if grouped or self.kernel.walkers:
            yield from self._pid([f"    tiles_{a.name} = tl.cdiv({self.extent(a)}, {self.tile(a)})" for a in axes[-2:] if grouped], axes)
        else:
            yield "    pid = tl.program_id(0)"
        if grouped:
            m, n = axes[-2:]
            yield f"{indent}# GROUP tiles along {m.name} share their tiles along {n.name} in the L2 cache."
            if len(axes) > 2:
                yield f"{indent}inside = pid % (tiles_{m.name} * tiles_{n.name})"
                yield f"{indent}rest = pid // (tiles_{m.name} * tiles_{n.name})"
            inside = "inside" if len(axes) > 2 else "pid"
            rest = "rest"
            yield f"{indent}first = {inside} // (GROUP * tiles_{n.name}) * GROUP"
            yield f"{indent}rows = tl.minimum(tiles_{m.name} - first, GROUP)"
            yield f"{indent}tile_{m.name} = {widened(f'first + {inside} % (GROUP * tiles_{n.name}) % rows', wide)}"
            yield f"{indent}tile_{n.name} = {widened(f'{inside} % (GROUP * tiles_{n.name}) // rows', wide)}"
            axes = axes[:-2]
        for position in range(len(axes) - 1, -1, -1):
            axis = axes[position]
            name = axis.name if axis.scalar and len(axis.indices) == 1 else f"tile_{axis.name}"
            if position == 0:
                yield f"{indent}{name} = {rest}{wide}"
                continue
            count = self._count(axis)
            yield f"{indent}{name} = {widened(f'{rest} % {count}', wide)}"
            yield f"{indent}rest = {rest} // {count}"
            rest = "rest"

    def _pid(self, counts: list[str], axes: list[ir.Axis]) -> Iterator[str]:
        """The number of this program's tile; where its programs walk the grid, of one tile after the other."""
        if not self.kernel.walkers:
            yield "    pid = tl.program_id(0)"
            yield from counts
            return
        yield from counts
        every = " * ".join(f"tiles_{a.name}" if counts and n >= len(axes) - 2 else self._count(a) for n, a in enumerate(axes))
        yield f"    for pid in tl.range(tl.program_id(0), {every}, tl.num_programs(0)):"

    def _count(self, axis: ir.Axis) -> str:
        """The number of tiles along a grid axis."""
        count = self.extent(axis) if axis.tile == 1 else f"tl.cdiv({self.extent(axis)}, {self.tile(axis)})"
        return count if count.isidentifier() or count.startswith("tl.") else f"({count})"

    def index_lines(self, axis: ir.Axis, indent: str, start: str | None = None) -> Iterator[str]:
        """The variables of one axis: its own, and its indices by division where it stands for several and they are used."""
        if self.kernel.descriptors and not axis.scalar and axis.name not in self.lanes:
            return
        if start is None and axis.role == "grid":
            start = f"tile_{axis.name}" if axis.tile == 1 else self.start(axis)
        single = len(axis.indices) == 1
        if axis.scalar:
            if not single:
                yield f"{indent}{axis.name} = {start}"
        else:
            lanes = f"tl.arange(0, {self.tile(axis)})"
            yield f"{indent}{axis.name} = {lanes if start is None else f'{start} + {lanes}'}"
        if single:
            return
        below = ""
        for n, (index, _) in reversed(list(enumerate(axis.indices))):
            if index in self.used:
                rest = f"{axis.name} // ({below})" if below else axis.name
                yield f"{indent}{index} = {rest}" + (f" % {self.size(index)}" if n else "")
            below = f"{self.size(index)} * {below}" if below else self.size(index)
