"""tdsl beside torch on one case: first checked against torch in float64, then timed in turns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

import tdsl
from benchmarks.cases import Case
from benchmarks.timing import Ceilings, buffer_sets, measure, name_of
from tdsl import errors

FORWARD, BOTH = "forward", "forward + backward"
Call = Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. Times in seconds; error is the largest deviation from float64, as a share of the values' size.

    kernels: the number of kernels of the plan (forward). ceiling: the larger share of the measured ceilings that tdsl reaches.
    problem: why there are no times.
    """

    group: str
    case: str
    sizes: str
    dtype: str
    direction: str
    kernels: int | None = None
    tdsl: float | None = None
    eager: float | None = None
    compiled: float | None = None
    spread: float | None = None
    tflops: float | None = None
    gbytes: float | None = None
    ceiling: float | None = None
    error: float | None = None
    error_eager: float | None = None
    problem: str = ""

    @property
    def ratio(self) -> float | None:
        """Time of tdsl as a share of eager torch's: below 1 is faster."""
        return self.tdsl / self.eager if self.tdsl and self.eager else None

    @property
    def failed(self) -> bool:
        """Whether something is wrong, as opposed to not supported yet."""
        return bool(self.problem) and not self.problem.startswith("unsupported")


# ---------------------------------------------------------------------------------------------------------------------
# Being right, before being fast


def gradients(output: Tensor, inputs: Sequence[Tensor], cotangent: Tensor) -> tuple[Tensor, ...]:
    """The gradients of those inputs that are float."""
    return torch.autograd.grad(output, [x for x in inputs if x.requires_grad], cotangent)


def deviation(value: Tensor, exact: Tensor) -> float:
    """The largest difference, as a share of the root mean square of the exact values; nan if anything is."""
    size = exact.square().mean().sqrt().clamp_min(1e-30)
    return ((value.double() - exact).abs().max() / size).item()


def verify(case: Case, function: Call, inputs: Sequence[Tensor]) -> tuple[float, float]:
    """The deviations of `function` and of eager torch from float64, over the output and all gradients.

    Raises AssertionError where tdsl is further off than torch by more than a small factor and the dtype's own precision.
    """
    wide = [x.detach().double().requires_grad_() if x.requires_grad else x for x in inputs]
    exact = case.eager(*wide)
    cotangent = torch.randn(exact.shape, dtype=exact.dtype, device=exact.device, generator=torch.Generator(exact.device).manual_seed(1))
    exact_all = (exact.detach(), *gradients(exact, wide, cotangent))
    deviations = []
    for call in (function, case.eager):
        output = call(*inputs)
        if output.shape != exact.shape:
            raise AssertionError(f"shape {tuple(output.shape)}, expected {tuple(exact.shape)}")
        values = (output.detach(), *gradients(output, inputs, cotangent.to(output.dtype)))
        deviations.append([deviation(value, e) for value, e in zip(values, exact_all, strict=True)])
    floats = [x for x in inputs if x.requires_grad]
    precision = torch.finfo(floats[0].dtype).eps
    for ours, torchs in zip(*deviations, strict=True):
        if not ours <= 4 * torchs + 16 * precision:
            raise AssertionError(f"deviates by {ours:.2g} from float64, torch by {torchs:.2g}")
    return max(deviations[0]), max(deviations[1])


# ---------------------------------------------------------------------------------------------------------------------
# Timing


def rows(case: Case, device: str, dtype: torch.dtype, ceilings: Ceilings, *, compile: bool, seconds: float) -> Iterable[Row]:
    """The forward row and the forward + backward row of one case; a row with a `problem` where it cannot be run."""
    row = Row(case.group, case.name, case.shape(device), name_of(dtype), FORWARD)
    try:
        function = tdsl.function(case.text)
        inputs = case.make(device, dtype)
        kernels = len(function.plan(*inputs).kernels)
        error, error_eager = verify(case, function, inputs)
    except errors.Unsupported as problem:
        yield replace(row, problem=f"unsupported: {problem.what}")
        return
    except Exception as problem:
        yield replace(row, problem=f"{type(problem).__name__}: {problem}")
        return
    del inputs
    row = replace(row, kernels=kernels, error=error, error_eager=error_eager)
    calls: dict[str, Call] = {"tdsl": function, "eager": case.eager}
    if compile:
        torch._dynamo.reset()
        calls["compiled"] = torch.compile(case.eager, dynamic=False)
    for direction in (FORWARD, BOTH):
        try:
            yield _timed(case, device, dtype, calls, ceilings, seconds, replace(row, direction=direction))
        except Exception as problem:
            yield replace(row, direction=direction, problem=f"{type(problem).__name__}: {problem}")


def _timed(case: Case, device: str, dtype: torch.dtype, calls: Mapping[str, Call], ceilings: Ceilings, seconds: float, row: Row) -> Row:
    """`row` with its times."""
    forward = row.direction == FORWARD
    first = case.make(device, dtype)
    output = case.eager(*first)
    moved = _bytes(first, output, forward)
    cotangent = torch.randn_like(output)
    del output
    sets = [first, *(case.make(device, dtype, seed) for seed in range(1, buffer_sets(moved, device)))]
    if forward:
        sets = [tuple(x.detach() for x in inputs) for inputs in sets]

    def run(call: Call, i: int) -> object:
        output = call(*sets[i])
        return output if forward else gradients(output, sets[i], cotangent)

    samples = measure({name: partial(run, call) for name, call in calls.items()}, device, len(sets), seconds)
    median = samples["tdsl"].median
    flops = case.flops(case.sizes[device]) * (1.0 if forward else case.backward)
    return replace(
        row,
        tdsl=median,
        eager=samples["eager"].median,
        compiled=samples["compiled"].median if "compiled" in samples else None,
        spread=samples["tdsl"].spread,
        tflops=flops / median * 1e-12,
        gbytes=moved / median * 1e-9,
        ceiling=max(flops / median / ceilings.matmul[row.dtype], moved / median / ceilings.copy),
    )


def _bytes(inputs: Sequence[Tensor], output: Tensor, forward: bool) -> int:
    """What must move at least. Forward: inputs read, output written. Backward: inputs and cotangent read, gradients written."""
    read = sum(x.nbytes for x in inputs)
    if forward:
        return read + output.nbytes
    return 2 * read + 2 * output.nbytes + sum(x.nbytes for x in inputs if x.requires_grad)
