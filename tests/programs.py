"""Running a program of the corpus on any executor, and comparing with the loops.

`arguments` makes the tensors of a Case in some dtype and memory layout, `expected` runs the reference in float64, `run` runs an
executor in memory that would show a read of what nothing wrote, or a write beside a tensor.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch

from tdsl import reference
from tdsl.arguments import layout
from tdsl.infer import infer
from tdsl.ir import Program
from tdsl.runtime import Executor
from tdsl.swap import differentiable, gradient
from tdsl.text import parse
from tests.corpus import CORPUS, Case

LAYOUTS = ("contiguous", "transposed", "expanded", "sliced", "flipped")
# Relative to the largest magnitude of an output. float32 leaves room for sums in another order; 16-bit values are rounded at each store.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 8e-3, torch.bfloat16: 6e-2}
GUARD = 64  # elements on both sides of every tensor


@cache
def parsed(text: str) -> Program:
    """The program of an indented text."""
    return parse(textwrap.dedent(text))


def program_of(name: str) -> Program:
    """The program of a corpus entry."""
    return parsed(CORPUS[name].text)


@cache
def gradient_of(name: str, order: int = 1) -> Program:
    """The gradient program of a corpus entry, or the gradient of its gradient."""
    return gradient(program_of(name) if order == 1 else gradient_of(name, order - 1))


# ---------------------------------------------------------------------------------------------------------------------
# Arguments


def arguments(program: Program, case: Case, dtype: torch.dtype = torch.float32, memory: str = "contiguous", seed: int = 0) -> list[Any]:
    """The arguments of a Case in the order of the parameters, laid out in `memory`; equal seeds give equal values in every dtype."""
    made: list[Any] = []
    for n, name in enumerate(program.inputs):
        if name in case.scalars:
            made.append(case.scalars[name])
        elif name in case.values:
            made.append(torch.tensor(case.values[name]))
        else:
            generator = torch.Generator().manual_seed(1000 * seed + n)
            shape = case.shapes.get(name, ())
            if name in case.ints:
                value = torch.randint(*case.ints[name], shape, generator=generator)
            else:
                value = torch.randn(shape, generator=generator, dtype=torch.float64)
                value = (value.abs() + 0.5 if name in case.positive else value).to(dtype)
            made.append(arranged(value, memory))
    return made


def cotangents(
    program: Program, args: Sequence[Any], results: Sequence[torch.Tensor], seed: int = 0, dtype: torch.dtype | None = None
) -> list[Any]:
    """The arguments of a gradient program: those of the program, then a random cotangent for each parameter that is left."""
    generator = torch.Generator().manual_seed(7000 + seed)
    floats = [a.dtype for a in args if isinstance(a, torch.Tensor) and a.dtype.is_floating_point]
    kind = dtype or (floats[0] if floats else torch.float32)
    left = len(program.inputs) - len(args)
    return [*args, *(torch.randn(r.shape, generator=generator, dtype=torch.float64).to(kind) for r in results[:left])]


def arranged(value: torch.Tensor, memory: str) -> torch.Tensor:
    """The values in another memory layout (of an expanded one, the first row stands for all), with poison around them."""
    if memory == "expanded" and value.dim() and value.shape[0]:
        return guarded(value[:1]).expand(value.shape)
    if memory == "transposed":
        order = tuple(reversed(range(value.dim())))
        return guarded(value.permute(order).contiguous()).permute(order)
    if memory == "sliced":
        wide = torch.full([2 * n + 1 for n in value.shape], poison(value.dtype), dtype=value.dtype)
        view = wide[tuple(slice(1, None, 2) for _ in value.shape)]
        view.copy_(value)
        return view
    if memory == "flipped":
        return guarded(value).flip(tuple(range(value.dim())))
    return guarded(value)


def poison(dtype: torch.dtype) -> Any:
    """A value that shows in every result that it reaches."""
    return float("nan") if dtype.is_floating_point else True if dtype == torch.bool else 101


def guarded(value: torch.Tensor) -> torch.Tensor:
    """A dense copy in the middle of a longer, poisoned storage."""
    storage = torch.full((value.numel() + 2 * GUARD,), poison(value.dtype), dtype=value.dtype)
    view = storage[GUARD : GUARD + value.numel()].view(value.shape)
    view.copy_(value)
    return view


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, torch.empty gives poisoned memory, and nothing may write beside what it, or torch.full, gave."""
    empty, full, storages = torch.empty, torch.full, []

    def poisoned_empty(*size: Any, **options: Any) -> torch.Tensor:
        made = empty(*size, **options)
        storage = full((made.numel() + 2 * GUARD,), poison(made.dtype), dtype=made.dtype)
        storages.append(storage)
        return storage[GUARD : GUARD + made.numel()].view(made.shape)

    torch.empty = poisoned_empty
    try:
        yield
    finally:
        torch.empty = empty
    for storage in storages:
        around = torch.cat([storage[:GUARD], storage[-GUARD:]])
        wrong = ~around.isnan() if storage.dtype.is_floating_point else around != poison(storage.dtype)
        assert not wrong.any(), f"a kernel wrote beside a tensor of {storage.numel() - 2 * GUARD} elements"


# ---------------------------------------------------------------------------------------------------------------------
# Running


def to_numpy(a: Any) -> Any:
    """What the reference computes with: floats in float64, all else as it is."""
    if not isinstance(a, torch.Tensor):
        return a
    a = a.detach()
    return (a.double() if a.dtype.is_floating_point else a).numpy()


def expected(program: Program, args: Sequence[Any]) -> tuple[torch.Tensor, ...]:
    """What the loops compute, in float64."""
    results = reference.run(program, {name: to_numpy(a) for name, a in zip(program.inputs, args, strict=True)})
    return tuple(torch.as_tensor(np.asarray(results[name])) for name in program.results)


def run(program: Program, args: Sequence[Any], backend: str) -> tuple[torch.Tensor, ...]:
    """What an executor ("torch" or "triton", which is Triton's interpreter here) computes; the arguments must stay as they were."""
    before = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    with poisoned_memory():
        results = Executor(program, backend)(args)
    for name, old, new in zip(program.inputs, before, args, strict=True):
        same = not isinstance(old, torch.Tensor) or torch.equal(old.nan_to_num(), new.nan_to_num())
        assert same, f"{backend} changed its argument {name}"
    return results


def assert_close(actual: torch.Tensor, wanted: torch.Tensor, tolerance: float, what: str = "") -> None:
    """Equal shapes, NaN and inf at the same places, and elsewhere closer than the tolerance times the largest magnitude (at least 1)."""
    assert tuple(actual.shape) == tuple(wanted.shape), f"{what}: shape {list(actual.shape)}, expected {list(wanted.shape)}"
    a, w = actual.detach().double(), wanted.detach().double()
    same = (a == w) | (a.isnan() & w.isnan())
    error = torch.where(same, 0.0, (a - w).abs())
    finite = w[w.isfinite()]
    scale = max(1.0, float(finite.abs().max()) if finite.numel() else 0.0)
    worst = float(error.max()) if error.numel() else 0.0
    assert worst <= tolerance * scale, f"{what}: off by {worst:.3g} of {scale:.3g}\n{actual}\nexpected\n{wanted}"


def tolerance_of(args: Sequence[Any], scale: float = 1.0) -> float:
    """The tolerance of the least precise float tensor among the arguments."""
    dtypes = [a.dtype for a in args if isinstance(a, torch.Tensor) and a.dtype.is_floating_point]
    return scale * max((TOLERANCE[d] for d in dtypes), default=TOLERANCE[torch.float32])


def check(program: Program, args: Sequence[Any], backend: str, scale: float = 1.0, wanted: Sequence[torch.Tensor] | None = None) -> None:
    """An executor computes what the loops compute, in the dtypes that inference gives."""
    wanted = expected(program, args) if wanted is None else wanted
    found = run(program, args, backend)
    of = layout(program, args, frozenset(program.inputs) - frozenset(differentiable(program)))
    inferred = infer(program, of.specs, of.values)
    for name, actual, value in zip(program.results, found, wanted, strict=True):
        assert str(actual.dtype) == f"torch.{inferred.dtypes[name]}", f"{backend}: {name} is {actual.dtype}, not {inferred.dtypes[name]}"
        if not actual.dtype.is_floating_point:
            value = value.to(actual.dtype)  # the loops run in int64; narrower integers wrap
        tolerance = max(tolerance_of(args, scale), TOLERANCE.get(actual.dtype, 0.0))
        assert_close(actual, value, tolerance, f"{backend}: {name} of\n{program}\n")


def resized(case: Case, old: int, new: int) -> Case:
    """The Case with every size (and every bound of integer values, and scalar) that is `old` replaced by `new`."""
    return replace(
        case,
        shapes={name: tuple(new if n == old else n for n in shape) for name, shape in case.shapes.items()},
        ints={name: (lo, new if hi == old else hi) for name, (lo, hi) in case.ints.items()},
        scalars={name: new if isinstance(v, int) and v == old else v for name, v in case.scalars.items()},
    )
