"""`python -m benchmarks model`: what the cost model predicts beside what is measured, by a description of this machine.

    case            direction   predicted   measured   ratio   bound
    rank correlation over cases, and over the configurations of each kernel that has several

The machine is described by four measurements (matmul FLOP/s, copy bandwidth, exponentials/s, the time of a tiny operation); nothing is
fitted to the cases. Measured is the shortest of several calls, which other work on the machine disturbs least. Spearman's coefficient
says how well the model orders them, which is what planning and tuning need of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import tdsl
from benchmarks import timing
from benchmarks.cases import Case
from benchmarks.race import BOTH, FORWARD, gradients
from lowering.control import Control
from lowering.cost import predict
from lowering.schedule import Schedule
from lowering.space import spaces
from lowering.state import State
from lowering.targets import TARGETS, Target
from tdsl import errors
from tdsl.arguments import layout
from tdsl.devices import target_of
from tdsl.launching import torch_callable
from tdsl.lowered import lowered

# Configurations of a kernel that are measured, spread over its space.
_CONFIGS = 8
# Parts that a CPU's rows are cut into.
_CUTS = (1, 4, 16, 64, 256)


@dataclass(frozen=True, slots=True)
class Point:
    """A prediction and a measurement, in seconds. what: the case and direction, or the configuration."""

    what: str
    predicted: float
    measured: float
    bound: str


def calibrated(device: str, seconds: float = 0.5) -> Target:
    """The description of this machine, its rates measured."""
    name = "cpu" if device == "cpu" else target_of(torch.device(device))
    known = TARGETS[name]
    dtypes = [torch.float32, torch.float64] if device == "cpu" else [torch.float32, torch.bfloat16]
    best = timing.ceilings(device, dtypes, seconds)
    single = best.matmul["float32"]
    flops = {**known.flops, **best.matmul}
    if device == "cpu":  # narrower types are computed in float32 there
        flops = {name: best.matmul["float64"] if name == "float64" else single for name in known.flops}
    x = torch.zeros(1 << 20, device=device)
    tiny = torch.zeros(8, device=device)
    samples = timing.measure({"exp": lambda _: torch.exp(x), "tiny": lambda _: tiny + tiny}, device, seconds=seconds)
    passed = 2 * x.nbytes / best.copy
    exps = x.numel() / max(min(samples["exp"].times) - passed, 0.1 * min(samples["exp"].times))
    sms = torch.get_num_threads() if device == "cpu" else known.sms
    launch = min(samples["tiny"].times)
    return replace(known, sms=sms, flops=flops, bandwidth=best.copy, exps=exps, launch=launch, sustained_flops=1.0, sustained_bandwidth=1.0)


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation of two sequences of equal length, ties sharing their mean rank; nan where one does not vary.

    >>> spearman([1.0, 2.0, 3.0], [10.0, 20.0, 15.0])
    0.5
    """
    x, y = _ranks(a), _ranks(b)
    mean = (len(x) - 1) / 2
    both = sum((p - mean) * (q - mean) for p, q in zip(x, y, strict=True))
    own = [math.sqrt(sum((p - mean) ** 2 for p in ranks)) for ranks in (x, y)]
    return both / (own[0] * own[1]) if all(own) else math.nan


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(values)
    return [(order.index(v) + len(order) - 1 - order[::-1].index(v)) / 2 for v in values]


def points(case: Case, device: str, dtype: torch.dtype, machine: Target, seconds: float) -> Iterator[Point]:
    """The forward, and forward and backward together, of one case."""
    function = tdsl.function(case.text)
    inputs = case.make(device, dtype)
    parts = lowered(function, inputs, machine.name, gradient=True)
    fixed = [x.detach() for x in inputs]
    output = function(*inputs)
    cotangent = torch.randn_like(output)
    runs: dict[str, Callable[[int], Any]] = {
        FORWARD: lambda _: function(*fixed),
        BOTH: lambda _: gradients(function(*inputs), inputs, cotangent),
    }
    samples = timing.measure(runs, device, seconds=seconds)
    training = parts if len(parts) == 2 else parts[1:]
    for direction, states in ((FORWARD, parts[:1]), (BOTH, training)):
        found = [p for part in states for p in _predictions(part.state, machine)]
        worst = max(found, key=lambda p: p[0])[1] if found else "launch"
        yield Point(f"{case.name} ({direction})", sum(s for s, _ in found), min(samples[direction].times), worst)


def _predictions(state: State, machine: Target) -> list[tuple[float, str]]:
    assert state.plan is not None
    gpu = machine.backend != "cpu"
    found = [predict(k, s.tile, machine, compiled=gpu or s.cpp is not None) for k, s in zip(state.plan.kernels, state.steps, strict=True)]
    return [(p.seconds, p.bound) for p in found]


def configurations(case: Case, device: str, dtype: torch.dtype, machine: Target, seconds: float) -> Iterator[tuple[str, list[Point]]]:
    """Each kernel of a case's forward that has several configurations: on a GPU those of its space, on a CPU rows in blocks, as torch code."""
    function = tdsl.function(case.text)
    inputs = [x.detach() for x in case.make(device, dtype)]
    executor = function.executor
    state = executor.lower(layout(function.program, inputs, executor.integers), machine.name, cpp=None)
    for kernel, found in spaces(state):
        if machine.backend == "cpu":
            schedules = _blocks(next(schedule for schedule, _ in found), kernel.grid) if len(kernel.statements) > 1 else []
        else:
            every = [schedule for schedule, _ in found]
            schedules = every[:: max(1, len(every) // _CONFIGS)]
        if len(schedules) > 1:
            yield kernel.name, [_measured(case, kernel.name, s, inputs, device, machine, seconds) for s in schedules]


def _blocks(whole: Schedule, grid: Sequence[str]) -> list[Schedule]:
    """A CPU's schedule with the longest axis of the grid in more and more parts."""
    rows = max(((axis, tile) for axis, tile in whole.axes if axis[0] in grid), key=lambda a: a[1], default=None)
    if rows is None:
        return []
    tiles = dict.fromkeys(max(1, rows[1] // parts) for parts in _CUTS)
    return [replace(whole, axes=tuple((axis, tile if axis == rows[0] else old) for axis, old in whole.axes)) for tile in tiles]


def _measured(
    case: Case, kernel: str, schedule: Schedule, inputs: Sequence[torch.Tensor], device: str, machine: Target, seconds: float
) -> Point:
    function = tdsl.function(case.text)
    if machine.backend == "cpu":
        executor = function.executor
        found = layout(function.program, inputs, executor.integers)
        state = executor.lower(found, "cpu", cpp=None, control=Control({kernel: schedule}))
        run = partial(torch_callable(state), *inputs)
    else:
        function.schedule({kernel: schedule})
        state = function.lower(*inputs, target=machine.name)
        run = partial(function, *inputs)
    predicted = _predictions(state, machine)
    with torch.no_grad():
        time = min(timing.measure({kernel: lambda _: run()}, device, seconds=seconds)[kernel].times)
    tiles = ", ".join(f"{' '.join(axis)} {tile}" for axis, tile in schedule.axes)
    return Point(tiles, sum(s for s, _ in predicted), time, max(predicted)[1])


def run(console: Console, cases: Sequence[Case], device: str, seconds: float = 0.3) -> bool:
    """Prints the tables; whether everything ran."""
    machine = calibrated(device)
    rate = f"{machine.flops['float32'] * 1e-9:.4g} GFLOP/s, {machine.bandwidth * 1e-9:.4g} GB/s, {machine.exps * 1e-9:.3g} Gexp/s"
    console.print(f"this machine: {rate}, {machine.launch * 1e6:.2g} us per operation", highlight=False)
    every: list[Point] = []
    ranks = []
    fine = True
    for case in cases:
        dtype = getattr(torch, case.dtypes[device][0])
        try:
            every += points(case, device, dtype, machine, seconds)
            for kernel, found in configurations(case, device, dtype, machine, seconds / 3):
                ranks.append((case.name, kernel, found, spearman([p.predicted for p in found], [p.measured for p in found])))
        except errors.Unsupported as problem:
            console.print(f"{case.name}: unsupported: {problem.what}", style="dim", highlight=False, markup=False)
        except Exception as problem:
            fine = False
            console.print(f"{case.name}: {type(problem).__name__}: {problem}", style="red", highlight=False, markup=False)
    console.print(_table("predicted and measured", every))
    for name, kernel, found, rank in ranks:
        console.print(_table(f"{name}: configurations of {kernel}, rank correlation {rank:.2f}", found))
    if len(every) > 1:
        rank = spearman([p.predicted for p in every], [p.measured for p in every])
        console.print(f"rank correlation over {len(every)} cases: {rank:.2f}", highlight=False)
    known = [rank for *_, rank in ranks if not math.isnan(rank)]
    if known:
        console.print(
            f"mean rank correlation over the configurations of {len(known)} kernels: {sum(known) / len(known):.2f}", highlight=False
        )
    return fine


def _table(title: str, found: Sequence[Point]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("what", "predicted us", "measured us", "predicted / measured", "bound"):
        table.add_column(column, justify="left" if column in ("what", "bound") else "right")
    for p in found:
        table.add_row(p.what, f"{p.predicted * 1e6:.1f}", f"{p.measured * 1e6:.1f}", f"{p.predicted / p.measured:.2f}", p.bound)
    return table
