"""Every stage of a function for some arguments, on one page: notation, gradient, plan, tiles, source, and what the machine code takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowering.compiler import State, Step
from lowering.cost import Prediction, predict
from lowering.report import KernelReport, hints_of, report
from tdsl import errors
from tdsl.ir import Program
from tdsl.lowered import Lowered, Runnable, lowered
from tdsl.page import Page, Section, Table, quantity
from tdsl.swap import gradient

_CHOICE_HEAD = ("tensor or kernel", "chosen", "one way", "another", "why")
_PLAN_HEAD = ("kernel", "reads", "writes", "recomputes", "FLOPs", "bytes", "compulsory", "predicted", "bound")
_MACHINE_HEAD = ("kernel", "registers", "spills", "stack", "shared", "tensor core", "blocks per SM", "faults")


@dataclass(frozen=True, slots=True)
class Part:
    """One program that runs. predictions: one per kernel. reports: the same, and empty on a CPU or where `missing` says why not."""

    lowered: Lowered
    predictions: tuple[Prediction, ...]
    reports: tuple[KernelReport, ...]
    missing: str = ""


@dataclass(frozen=True, slots=True, repr=False)
class Explanation(Page):
    """What `explain` returns: it shows itself where it is printed, at the prompt and in a notebook.

    gradient: the program that the swap rule gives, or None. parts: forward and backward, lowered. problem: why there is no backward.
    """

    program: Program
    gradient: Program | None
    target: str
    parts: tuple[Part, ...]
    problem: str = ""

    def sections(self) -> tuple[Section, ...]:
        """The page."""
        found = [Section("the notation", str(self.program), "python", 1)]
        if self.gradient is not None:
            found.append(Section("its gradient, by swapping names", str(self.gradient), "python", 1))
        for part in self.parts:
            found += _part_sections(part, self.target)
        if self.problem:
            found.append(Section("no backward", self.problem, "text", 1))
        return tuple(found)

    def as_json(self) -> dict[str, Any]:
        """Programs as text; per part its kernels with what is predicted of them and what memory they share."""
        return {
            "program": str(self.program),
            "gradient": None if self.gradient is None else str(self.gradient),
            "target": self.target,
            "problem": self.problem,
            "parts": [_part_json(part) for part in self.parts],
        }


def explain(function: Runnable, args: Sequence[Any], target: str | None = None) -> Explanation:
    """Every stage of `function` for arguments (tensors, meta tensors, numbers, or strings such as "bf16[8,64]") on a target.

    The page has, for the forward and for both halves of training (the forward that saves, and the backward): the flat program; the plan as
    a table of kernels; per kernel the schedule, the tile IR and the source; on a GPU target registers, spills and shared memory of the
    machine code, compiled without a GPU; and how long each stage took. Raises what lowering the forward raises; a gradient that cannot be
    taken or lowered is reported on the page.
    """
    swapped: Program | None = None
    problem = ""
    parts = lowered(function, args, target)
    try:
        swapped = gradient(function.program)
        parts = lowered(function, args, target, gradient=True)
    except (errors.Unsupported, errors.ArgumentError) as error:
        problem = str(error)
    explained = tuple(_explained(part) for part in parts)
    return Explanation(function.program, swapped, parts[0].state.target.name, explained, problem)


def _explained(part: Lowered) -> Part:
    state = part.state
    reports: tuple[KernelReport, ...] = ()
    missing = ""
    if state.target.backend != "cpu":
        try:
            reports = tuple(report_of(step, state) for step in state.steps)
        except (errors.MissingPackage, errors.CompileError) as error:
            missing = str(error)
    return Part(part, predictions(state), reports, missing)


def predictions(state: State) -> tuple[Prediction, ...]:
    """The roofline's word on each kernel of a lowered program."""
    assert state.plan is not None
    gpu = state.target.backend != "cpu"
    pairs = zip(state.plan.kernels, state.steps, strict=True)
    return tuple(predict(kernel, step.tile, state.target, compiled=gpu or step.cpp is not None) for kernel, step in pairs)


def report_of(step: Step, state: State) -> KernelReport:
    """The machine code of one kernel of a program lowered for a GPU."""
    assert step.source is not None
    return report(step.source, state.target.name, hints_of(step))


# ---------------------------------------------------------------------------------------------------------------------
# The page


def _part_sections(part: Part, target: str) -> list[Section]:
    state, plan = part.lowered.state, part.lowered.state.plan
    assert plan is not None
    total = sum(p.seconds for p in part.predictions)
    count = _several(len(plan.kernels), "kernel")
    memory = ", ".join(f"{name} ({quantity(size, 'B')})" for name, size in plan.memory.items())
    summary = f"in memory between kernels: {memory or 'nothing'}"
    found = [
        Section(f"{part.lowered.title}: {count}, {quantity(total, 's')} predicted on {state.target.chip} ({target})", summary, "text", 1),
        Section("flat: what is compiled", str(part.lowered.flat), "python"),
        Section("plan", Table(_PLAN_HEAD, _plan_rows(part))),
    ]
    if plan.choices:
        weighed = tuple((c.subject, c.chosen, *(f"{what}: {quantity(cost, 's')}" for what, cost in c.costs), c.reason) for c in plan.choices)
        found.append(Section("what was weighed", Table(_CHOICE_HEAD, weighed)))
    if part.reports:
        found.append(Section("machine code", Table(_MACHINE_HEAD, tuple(_machine_row(r) for r in part.reports))))
    if part.missing:
        found.append(Section("no machine code", part.missing))
    for kernel, step in zip(plan.kernels, state.steps, strict=True):
        found.append(Section(f"{kernel.name}: schedule", f"{kernel.notation}\n{schedule_text(step)}"))
        found.append(Section(f"{kernel.name}: tile IR", str(step.tile)))
        if step.source is not None:
            found.append(Section(f"{kernel.name}: source", step.source.source, "python"))
    if state.target.backend == "cpu":
        found.append(Section("source", state.text, "python"))
    rows = tuple((stage, quantity(seconds, "s")) for stage, seconds in part.lowered.seconds)
    return [*found, Section("time of each stage", Table(("stage", "time"), rows))]


def _plan_rows(part: Part) -> tuple[tuple[str, ...], ...]:
    plan = part.lowered.state.plan
    assert plan is not None
    return tuple(
        (
            kernel.name,
            ", ".join(kernel.reads) or "-",
            ", ".join(kernel.writes),
            ", ".join(plan.made_again(kernel)) or "-",
            quantity(p.flops),
            quantity(p.bytes, "B"),
            quantity(p.compulsory_bytes, "B"),
            quantity(p.seconds, "s"),
            p.bound,
        )
        for kernel, p in zip(plan.kernels, part.predictions, strict=True)
    )


def _machine_row(r: KernelReport) -> tuple[str, ...]:
    numbers = (r.registers, r.spills, r.stack, r.shared)
    return (r.name, *map(str, numbers), r.tensor_core or "-", str(r.occupancy), "; ".join(r.faults) or "none")


def schedule_text(step: Step) -> str:
    """How a kernel is cut into tiles: each axis with its tile, warps, stages and grouping, and how tiles are moved."""
    tile = step.tile
    axes = "; ".join(f"{a.role} {' '.join(i for i, _ in a.indices)} in tiles of {a.tile} (of {a.extent})" for a in tile.axes)
    if step.source is None:
        return f"{axes or 'no axes'}\n{_several(tile.programs, 'block')}"
    launch = (
        _several(tile.programs, "program"),
        _several(tile.num_warps, "warp"),
        _several(tile.num_stages, "stage"),
        f"groups of {tile.group}",
    )
    form = []
    if tile.walkers:
        form.append(f"they walk {_several(tile.grid_tiles, 'tile')}")
    if tile.descriptors:
        form.append(f"descriptors move {', '.join(dict.fromkeys(d.buffer.tensor for d in tile.descriptors))}")
    if tile.parts:
        form.append(f"{tile.parts.axis} is stored in {tile.parts.count} parts")
    lines = [axes or "no axes", ", ".join(launch), "; ".join(form), tile.unfit]
    return "\n".join(line for line in lines if line)


def _several(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _part_json(part: Part) -> dict[str, Any]:
    plan = part.lowered.state.plan
    assert plan is not None
    kernels = []
    for n, (kernel, step, p) in enumerate(zip(plan.kernels, part.lowered.state.steps, part.predictions, strict=True)):
        kernels.append(
            {
                "name": kernel.name,
                "notation": kernel.notation,
                "reads": list(kernel.reads),
                "writes": list(kernel.writes),
                "recomputes": list(plan.made_again(kernel)),
                "flops": p.flops,
                "bytes": p.bytes,
                "compulsory_bytes": p.compulsory_bytes,
                "exps": p.exps,
                "predicted": p.seconds,
                "bound": p.bound,
                "share": p.share,
                "terms": dict(p.terms),
                "schedule": schedule_text(step),
                "source": None if step.source is None else step.source.source,
                "machine": part.reports[n].as_json() if part.reports else None,
            }
        )
    return {
        "title": part.lowered.title,
        "flat": str(part.lowered.flat),
        "memory": dict(plan.memory),
        "weighed": [{"subject": c.subject, "chosen": c.chosen, "seconds": dict(c.costs), "reason": c.reason} for c in plan.choices],
        "kernels": kernels,
        "seconds": dict(part.lowered.seconds),
        "text": part.lowered.state.text,
    }
