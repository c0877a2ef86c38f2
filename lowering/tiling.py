"""Plan x schedule -> tile IR. Every decision about one kernel's code is made here; the printers only spell it.

Statements are evaluated tile by tile. Each value is made once per loop nest (value numbering) and at the outermost loop
that it depends on (lowering/evaluate.py). Reductions become products of matrices, or are accumulated lane by lane and folded once after
their loop, which adds long sums pairwise (lowering/reducing.py); those that depend on each other share a pass (lowering/streaming.py).
"""

from __future__ import annotations

from lowering import tile_ir as ir
from lowering.evaluate import Memory
from lowering.forms import dressed
from lowering.plan import KernelPlan
from lowering.schedule import Schedule
from lowering.statement import plain
from lowering.stream import passes
from lowering.streaming import Streamer
from tdsl.errors import Unsupported
from tdsl.ir import Statement, free_indices

_STORE_MODE = {"=": "set", "+=": "add", "max=": "max", "min=": "min"}


def tile(kernel: KernelPlan, schedule: Schedule, memory: Memory, *, exact: bool) -> ir.Kernel:
    """The tile IR of one kernel. exact: tiles end where axes end (no masks), and an axis in one tile is walked by no loop."""
    return _Tiler(kernel, schedule, memory, exact).run()


class _Tiler(Streamer):
    def run(self) -> ir.Kernel:
        self._statements()
        wide = any(_span(b) >= 2**31 for b in self.buffers.values())
        order = [*self.plan.reads, *self.plan.writes]
        buffers = tuple(sorted(self.buffers.values(), key=lambda b: order.index(b.tensor)))
        plan, schedule = self.plan, self.schedule
        body = ir.without(tuple(self.scopes[0].ops), self.unmasked)
        launch = (schedule.num_warps, schedule.num_stages, schedule.group)
        return dressed(ir.Kernel(plan.name, plan.notation, self.axes, buffers, body, *launch, wide, fused=self.memory.fused), schedule)

    def _statements(self) -> None:
        """Reductions in order, those over a streamed axis pass by pass; then what is stored element by element."""
        streamed = [a for a in self.axes if a.role == "loop" and a.indices[0][0] in self.plan.stream]
        along = {i for a in streamed for i, _ in a.indices}
        pending = list(passes(self.plan.statements, tuple(along))) if along else []
        done: set[str] = set()
        for s in self.plan.statements:
            name = s.target.tensor
            if along & set(free_indices(s.target)):
                continue
            if along & set(s.reduced):
                while name not in done:
                    now = pending.pop(0)
                    self.stream(now, streamed)
                    done |= {r.statement.target.tensor for r in now}
                if name in self.plan.stores:
                    self.store(s, self.read(s.target))
            elif s.reduced and self._loops_of(s):
                if name in self.plan.stores:  # else what reads it makes it there, where its indices are walked
                    self._store_each(s, self._loops_of(s))
            elif s.reduced:
                value = self.read(s.target) if name in self.inside else self.reduce(s)
                if name in self.plan.stores:
                    self.store(s, value)
            elif name in self.plan.stores:
                self._store_each(s, self._loops_of(s))
        for s in self.plan.statements:
            if along & set(free_indices(s.target)) and s.target.tensor in self.plan.stores:
                self._store_each(s, self._loops_of(s))

    def _loops_of(self, s: Statement) -> list[ir.Axis]:
        free = set(free_indices(s.target))
        return [a for a in self.axes if a.role == "loop" and any(i in free for i, _ in a.indices)]

    def _store_each(self, s: Statement, loops: list[ir.Axis]) -> None:
        self.enter(loops)
        if s.target.tensor in self.inside:
            value = self.read(s.target)
        else:
            value = self.reduce(s) if s.reduced else self.as_value(self.eval(s.value))
        self.store(s, value)
        self.leave(loops)

    def store(self, s: Statement, value: ir.Value) -> None:
        """Writes a statement's value; into what stands there, where other writes of the target came before or may collide."""
        buffer = self.buffer(s.target.tensor)
        collides = s.target.tensor in self.memory.updated or not plain(s.target)
        mode = _STORE_MODE.get(s.op, "") if collides else "set"
        if not mode:
            what = f"`{s.op}` into an older version of {s.target.tensor} or at computed places cannot be compiled yet (tiling)"
            raise Unsupported(what, span=s.span, help="give the result a name of its own")
        subscripts = tuple(self.subscript(e) for e in s.target.subscripts)
        axes = self.sort(self.tile_axes(tuple(dict.fromkeys(i for e in subscripts for i in free_indices(e)))) | set(value.axes))
        self.scopes[-1].ops.append(ir.Store(buffer, subscripts, self.cast_to(value, buffer.dtype, self.typed[value.name]), axes, mode))


def _span(b: ir.Buffer) -> int:
    """The largest offset into a buffer, in elements."""
    return sum((n - 1) * abs(s) for n, s in zip(b.shape, b.strides, strict=True)) if all(b.shape) else 0
