"""What the machine code of a function's kernels says, with no GPU in the machine: resources, faults in words, and the roofline beside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from lowering.compiler import Step
from lowering.cost import Prediction
from lowering.plan import KernelPlan
from lowering.report import KernelReport
from lowering.rules import broken
from tdsl.errors import ArgumentError
from tdsl.explain import predictions, report_of
from tdsl.lowered import Lowered, Runnable, lowered
from tdsl.page import Page, Section, Table, quantity

Widths = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class KernelCheck:
    """One kernel.

    registers: per thread. stack: bytes per thread. spills: instructions that touch spilled values (on HIP spilled registers). shared: bytes
    per block. tensor_core: the instructions' family, or None. load_bytes, store_bytes: (width in bytes, count), widest first.
    occupancy: blocks that fit on one SM. faults: in plain words. flops: of the plan. bytes: moved, as lowering.cost predicts.
    predicted: seconds. bound: what decides them.
    """

    name: str
    registers: int
    stack: int
    spills: int
    shared: int
    tensor_core: str | None
    load_bytes: Widths
    store_bytes: Widths
    occupancy: int
    faults: tuple[str, ...]
    flops: int
    bytes: int
    predicted: float
    bound: str

    def as_json(self) -> dict[str, Any]:
        """The fields as JSON knows them."""
        return {f.name: _json(getattr(self, f.name)) for f in fields(self)}


def _json(value: Any) -> Any:
    return [_json(v) for v in value] if isinstance(value, tuple) else value


@dataclass(frozen=True, slots=True, repr=False)
class Report(Page):
    """What `check` returns. ok: no kernel has a fault."""

    target: str
    kernels: tuple[KernelCheck, ...]

    @property
    def ok(self) -> bool:
        """Whether no kernel has a fault."""
        return not any(k.faults for k in self.kernels)

    def as_json(self) -> dict[str, Any]:
        """`{"target": .., "ok": .., "kernels": [{..}, ..]}`, the kernels with exactly the fields of KernelCheck."""
        return {"target": self.target, "ok": self.ok, "kernels": [k.as_json() for k in self.kernels]}

    def sections(self) -> tuple[Section, ...]:
        """A table, then the faults one to a line."""
        head = ("kernel", "registers", "spills", "stack", "shared", "tensor core", "loads", "stores", "blocks per SM", "predicted", "bound")
        rows = tuple(
            (
                k.name,
                str(k.registers),
                str(k.spills),
                str(k.stack),
                quantity(k.shared, "B"),
                k.tensor_core or "-",
                _widths(k.load_bytes),
                _widths(k.store_bytes),
                str(k.occupancy),
                quantity(k.predicted, "s"),
                k.bound,
            )
            for k in self.kernels
        )
        faults = "\n".join(f"{k.name}: {fault}" for k in self.kernels for fault in k.faults)
        return (Section(f"kernels for {self.target}", Table(head, rows), level=1), Section("faults", faults or "none", level=1))


def _widths(found: Widths) -> str:
    """`8x 16 B, 2x 4 B`."""
    return ", ".join(f"{count}x {width} B" for width, count in found) or "-"


def check(function: Runnable, args: Sequence[Any], target: str | None = None, gradient: bool = False) -> Report:
    """Compiles every kernel of `function` for a GPU target (default: the arguments' device, else "cuda:90") and reads its machine code.

    args: as `Function.lower` takes them. gradient: the kernels of training too: those of the forward that saves, called
    `<name>_0 (saves ..)`, and of the backward, `<name>_bwd_0`, .. Raises CompileError for a kernel that does not compile,
    ArgumentError for a target that has no machine code, MissingPackage without Triton.
    """
    if target is None:
        own = function.target_for(args)
        target = "cuda:90" if own == "cpu" else own
    elif target == "cpu":
        raise ArgumentError("a CPU runs torch code, which has no machine code to check", help='name a GPU: target="cuda:90", say')
    parts = lowered(function, args, target, gradient=gradient)
    found = [
        _kernel(plan, step, report_of(step, part.state), p, part)
        for part in parts
        for plan, step, p in zip(_plans(part), part.state.steps, predictions(part.state), strict=True)
    ]
    return Report(target, tuple(found))


def _plans(part: Lowered) -> tuple[KernelPlan, ...]:
    assert part.state.plan is not None
    return part.state.plan.kernels


def _kernel(plan: KernelPlan, step: Step, machine: KernelReport, p: Prediction, part: Lowered) -> KernelCheck:
    return KernelCheck(
        name=f"{machine.name} (saves {', '.join(part.saves)})" if part.saves else machine.name,
        registers=machine.registers,
        stack=machine.stack,
        spills=machine.spills,
        shared=machine.shared,
        tensor_core=machine.tensor_core,
        load_bytes=machine.load_bytes,
        store_bytes=machine.store_bytes,
        occupancy=machine.occupancy,
        faults=(*machine.faults, *broken(plan, step, machine, part.state.target)),
        flops=p.flops,
        bytes=p.bytes,
        predicted=p.seconds,
        bound=p.bound,
    )
