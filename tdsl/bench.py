"""How long a program takes on the device at hand, beside what the roofline says of its kernels."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lowering.targets import TARGETS
from tdsl.arguments import TORCH_DTYPES, layout, parse_spec
from tdsl.explain import predictions
from tdsl.infer import Inferred, infer
from tdsl.ir import Access, Program, statements, walk
from tdsl.lowered import lowered
from tdsl.ops import DTYPES
from tdsl.page import Page, Section, Table, quantity

if TYPE_CHECKING:
    from tdsl.function import Function

_SECONDS = 0.5  # about how long to time
_ROUNDS = (5, 200)


@dataclass(frozen=True, slots=True, repr=False)
class Timing(Page):
    """seconds: the median of `rounds` calls. flops: of the plans. bytes: each tensor that a kernel touches, once. predicted: seconds."""

    name: str
    device: str
    target: str
    seconds: float
    rounds: int
    flops: int
    bytes: int
    predicted: float

    def sections(self) -> tuple[Section, ...]:
        """One table."""
        head = ("", "time", "FLOP/s", "bytes/s")
        row = [
            (name, quantity(t, "s"), quantity(self.flops / t, "FLOP/s"), quantity(self.bytes / t, "B/s"))
            for name, t in (
                (f"measured, median of {self.rounds}", self.seconds),
                (f"roofline of {_described(self.target)}", self.predicted),
            )
        ]
        title = f"{self.name} on {self.device}: {self.predicted / self.seconds:.0%} of the roofline"
        return (Section(title, Table(head, tuple(row)), level=1),)

    def as_json(self) -> dict[str, Any]:
        """The fields, and GFLOP/s and GB/s."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        return fields | {"gflops": self.flops / self.seconds * 1e-9, "gbytes": self.bytes / self.seconds * 1e-9}


def _described(target: str) -> str:
    chip = TARGETS[target]
    return f"a {chip.chip} of {chip.sms} cores" if chip.backend == "cpu" else f"{chip.chip} ({target})"


def bench(function: Function, args: Sequence[Any], *, gradient: bool = False) -> Timing:
    """Times `function` on random inputs of the given shapes (strings such as "bf16[8,64]"; numbers stay), on the GPU if there is one.

    gradient: the forward that saves and the backward, through torch's graph. Raises what calling the function raises.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = random_inputs(function.program, args, device)
    if gradient:
        for x in inputs:
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                x.requires_grad_()
    parts = lowered(function, inputs, None, gradient=gradient)
    parts = parts[-2:] if gradient else parts
    run = _training(function, inputs) if gradient else lambda: function(*inputs)
    times = _times(run, device)
    found = [p for part in parts for p in predictions(part.state)]
    return Timing(
        name=f"{function.program.name}{' and its gradient' if gradient else ''}",
        device=torch.cuda.get_device_name() if device == "cuda" else "cpu",
        target=parts[0].state.target.name,
        seconds=statistics.median(times),
        rounds=len(times),
        flops=sum(p.flops for p in found),
        bytes=sum(p.compulsory_bytes for p in found),
        predicted=sum(p.seconds for p in found),
    )


def _training(function: Function, inputs: Sequence[Any]) -> Callable[[], object]:
    wrt = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]

    def outputs() -> list[torch.Tensor]:
        results = function(*inputs)
        return [r for r in (results if isinstance(results, tuple) else (results,)) if r.requires_grad]

    cotangents = [torch.ones_like(r) for r in outputs()]
    return lambda: torch.autograd.grad(outputs(), wrt, cotangents, allow_unused=True)


# ---------------------------------------------------------------------------------------------------------------------
# Inputs


def random_inputs(program: Program, args: Sequence[Any], device: str) -> list[Any]:
    """Tensors for specs: floats from a normal distribution, booleans, and integers that stay inside what they index (seed 0)."""
    generator = torch.Generator().manual_seed(0)
    limits = _index_limits(program, args)
    made: list[Any] = []
    for name, arg in zip(program.inputs, args, strict=True):
        if not isinstance(arg, str):
            made.append(arg)
            continue
        spec = parse_spec(name, arg)
        if DTYPES[spec.dtype].kind == "float":
            values = torch.randn(spec.shape, generator=generator, dtype=torch.float32)
        else:
            high = 2 if spec.dtype == "bool" else max(1, limits.get(name, 8))
            values = torch.randint(high, spec.shape, generator=generator)
        made.append(values.to(device=device, dtype=TORCH_DTYPES[spec.dtype]))
    return made


def _index_limits(program: Program, args: Sequence[Any]) -> Mapping[str, int]:
    """Per integer tensor that subscripts use: the smallest size that it alone indexes, or 1 where it stands inside a formula."""
    found = layout(program, args)
    inferred: Inferred = infer(program, found.specs, found.values)
    limits: dict[str, int] = {}
    for s in statements(program.body):
        for access in (e for top in (s.target, s.value) for e in walk(top) if isinstance(e, Access)):
            for size, subscript in zip(inferred.shapes[access.tensor], access.subscripts, strict=True):
                for inner in (e for e in walk(subscript) if isinstance(e, Access)):
                    limit = size if inner is subscript else 1
                    limits[inner.tensor] = min(limit, limits.get(inner.tensor, limit))
    return limits


# ---------------------------------------------------------------------------------------------------------------------
# Time


def _times(run: Callable[[], object], device: str) -> list[float]:
    """Seconds per call, after two that compile and warm up; on CUDA between two events on the device."""
    for _ in range(2):
        run()
    once = _wall(run, device)
    least, most = _ROUNDS
    rounds = max(least, min(most, int(_SECONDS / max(once, 1e-7))))
    return [(_events if device == "cuda" else _wall)(run, device) for _ in range(rounds)]


def _wall(run: Callable[[], object], device: str) -> float:
    started = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _events(run: Callable[[], object], device: str) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) * 1e-3
