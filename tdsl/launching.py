"""From the compiler's result to something to call: torch modules, loaded, and sequences of kernels.

What was compiled with traced sizes is made ready once, as a Template, and then called for the numbers of one layout after another.
"""

from __future__ import annotations

import ctypes
import linecache
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from lowering import tile_ir
from lowering.cpp_launch import functions
from lowering.state import Allocation, Part, Repeat, State, Step, leaves
from tdsl.affine import evaluate
from tdsl.arguments import TORCH_DTYPES
from tdsl.ir import Clamp, Expr, Pad
from tdsl.ops import DTYPES
from tdsl.traced import Trace

if TYPE_CHECKING:
    from lowering.kernel_source import KernelSource
    from lowering.steps import View

Outputs = tuple[torch.Tensor, ...]
Run = Callable[..., Outputs]  # of the arguments; what needs no gradient, or runs where none is recorded
MakeKernels = Callable[[Sequence[int]], Run]  # of the numbers behind the symbols of a trace
_CPU = torch.device("cpu")


def order_matters(state: State) -> bool:
    """Whether a kernel adds floats atomically, so that the order of its programs shows in the last digits."""
    steps = [step for part in leaves(state.parts or (Part(state),)) for step in part.state.steps]
    return any(
        isinstance(op, tile_ir.Store) and op.mode == "add" and DTYPES[op.buffer.dtype].kind == "float"
        for step in steps
        for op in tile_ir.operations(step.tile.body)
    )


# ---------------------------------------------------------------------------------------------------------------------
# torch code


def torch_callable(state: State, device: torch.device = _CPU) -> Run:
    """The torch module of a program, loaded; it is registered with linecache, so that a traceback shows its lines."""
    return torch_template(state, Trace(), device)(())


def torch_template(state: State, trace: Trace, device: torch.device = _CPU) -> MakeKernels:
    """The same of a program that was compiled with traced sizes: its text names their symbols."""
    name = f"<tdsl {state.program.name} torch {abs(hash(state.text)):x}>"
    linecache.cache[name] = (len(state.text), None, state.text.splitlines(keepends=True), name)
    kernels = [step.cpp for step in state.steps if step.cpp is not None]
    loaded: dict[str, Any] = functions(kernels) if kernels else {}
    numbers = trace.numbers([n for k in kernels for n in k.integers])
    symbols = tuple(trace.symbols)
    code = compile(state.text, name, "exec")

    def make(values: Sequence[int]) -> Run:
        namespace = {**loaded, **dict(zip(symbols, values, strict=True))}
        integers = iter(numbers(*values))
        for k in kernels:
            count = len(k.integers)
            namespace[f"{k.name}_integers"] = (ctypes.c_longlong * max(1, count))(*(next(integers) for _ in range(count)))
        exec(code, namespace)
        run: Run = namespace["run"]
        return run if device.type == "cpu" else elsewhere(run)

    def elsewhere(run: Run) -> Run:
        def call(*args: Any) -> Outputs:
            with device:
                return run(*args)

        return call

    return make


# ---------------------------------------------------------------------------------------------------------------------
# Kernels


@dataclass(frozen=True, slots=True)
class _Launch:
    """One launch. allocate: what is allocated before it, as name, dtype, fill and rank. integers: how many sizes and strides it takes."""

    step: Step
    source: KernelSource
    allocate: tuple[tuple[str, torch.dtype, Any, int], ...]
    integers: int


def triton_callable(state: State, device: torch.device) -> Run:
    """Allocates, launches and returns; the very same kernels on a GPU and through the interpreter. Ordered loops run on the host."""
    if not state.parts:
        return triton_template(state, Trace(), device)(())
    names, results = state.program.inputs, state.program.results
    launchers: dict[int, _Launcher] = {}

    def call(*args: Any) -> Outputs:
        memory: dict[str, Any] = dict(zip(names, args, strict=True))
        with torch.no_grad():
            for part in state.parts:
                _run_part(part, memory, {}, device, launchers)
            return tuple(memory[o].clone() if o in names or results.count(o) > 1 else memory[o] for o in results)

    return call


def triton_template(state: State, trace: Trace, device: torch.device) -> MakeKernels:
    """The kernels of a program without ordered loops that was compiled with traced sizes."""
    names, results = state.program.inputs, state.program.results
    launches = []
    traced: list[Any] = []
    for step in state.steps:
        assert step.source is not None
        allocate = tuple((a.tensor, TORCH_DTYPES[a.dtype], a.fill, len(a.shape)) for a in step.allocate)
        launches.append(_Launch(step, step.source, allocate, len(step.integers)))
        traced += [n for a in step.allocate for n in a.shape]
        traced += [step.tile.programs, *step.integers.values()]
    numbers = trace.numbers(traced)
    # Tensors by their places: the arguments, then what is allocated, in order.
    places = {name: n for n, name in enumerate(names)}
    for one in launches:
        for name, *_ in one.allocate:
            places.setdefault(name, len(places))
    blank = (None,) * (len(places) - len(names))
    for version, name in state.aliases.items():
        places[version] = places[name]
    operands = {places[b.tensor]: TORCH_DTYPES[b.dtype] for one in launches for b in one.step.tile.buffers if not b.number}
    copied = tuple((places[o], o in names or results.count(o) > 1) for o in results)

    def make(values: Sequence[int]) -> Run:
        rest = iter(numbers(*values))
        plan: list[tuple[list[tuple[int, Callable[[], torch.Tensor]]], _Launcher, list[int]]] = []
        for one in launches:
            made = []
            for name, dtype, fill, rank in one.allocate:
                made.append((places[name], _maker(tuple(next(rest) for _ in range(rank)), dtype, fill, device)))
            grid = next(rest)
            run = _launcher(one.step, grid, tuple(next(rest) for _ in range(one.integers)), device)
            plan.append((made, run, [places[b.tensor] for b in one.step.tile.buffers]))
        moved: list[int] | None = None  # arguments that are not on the device, which a layout settles

        def call(*args: Any) -> Outputs:
            nonlocal moved
            if moved is None:
                moved = [n for n, a in enumerate(args) if n in operands and not (isinstance(a, torch.Tensor) and a.device == device)]
            memory: list[Any] = [*args, *blank]
            for n in moved:
                memory[n] = _operand(args[n], False, operands[n], device)
            for made, run, given in plan:
                for n, new in made:
                    memory[n] = new()
                run([memory[n] for n in given])
            return tuple([memory[n].clone() if copy else memory[n] for n, copy in copied])

        return call

    return make


_Launcher = Callable[[Sequence[Any]], None]


def _launcher(step: Step, grid: int, integers: Sequence[int], device: torch.device) -> _Launcher:
    """What launches the kernel of a step; one that was edited is compared with the generated one first."""
    from lowering.triton_launch import launcher

    assert step.source is not None
    interpret = device.type == "cpu"
    run = launcher(step.source, grid, integers, interpret=interpret)
    if step.unedited is None:
        return run
    from tdsl.edited import verify

    verified = False

    def verifying(values: Sequence[Any]) -> None:
        nonlocal verified
        if not verified:
            verify(step, [*values, *integers], interpret=interpret)
            verified = True
        run(values)

    return verifying


def _run_part(
    part: Part | Repeat, memory: dict[str, Any], steps: dict[str, int], device: torch.device, launchers: dict[int, _Launcher]
) -> None:
    """Runs the kernels of a part on the tensors of `memory`, or all steps of a loop. steps: where the loops around it are. launchers: those
    of kernels that ran before, by their steps of the plan."""
    if isinstance(part, Repeat):
        for a in part.allocate:
            memory[a.tensor] = _allocated(a, device)
        values = range(_bound(part.lo, steps), _bound(part.hi, steps))
        for value in reversed(values) if part.reverse else values:
            for inner in part.parts:
                _run_part(inner, memory, {**steps, part.index: value}, device, launchers)
        return
    for number, index in part.numbers.items():
        memory[number] = steps[index]
    for view in part.views:
        memory[view.name] = _slice(view, memory[view.tensor], steps)
    for alias, name in part.aliases.items():
        memory[alias] = memory[name]
    for step in part.state.steps:
        for a in step.allocate:
            memory[a.tensor] = _allocated(a, device)
        values_ = [_operand(memory[b.tensor], b.number, TORCH_DTYPES[b.dtype], device) for b in step.tile.buffers]
        if id(step) not in launchers:
            launchers[id(step)] = _launcher(step, step.tile.programs, tuple(step.integers.values()), device)
        launchers[id(step)](values_)


def _allocated(a: Allocation, device: torch.device) -> torch.Tensor:
    return _maker(a.shape, TORCH_DTYPES[a.dtype], a.fill, device)()


def _maker(shape: tuple[int, ...], dtype: torch.dtype, fill: Any, device: torch.device) -> Callable[[], torch.Tensor]:
    """What makes a contiguous tensor; given its strides, torch finds it sooner."""
    if fill is not None:
        return partial(torch.full, shape, fill, dtype=dtype, device=device)
    strides = tuple(math.prod(max(1, n) for n in shape[d + 1 :]) for d in range(len(shape)))
    return partial(torch.empty_strided, shape, strides, dtype=dtype, device=device)


def _bound(bound: int | Expr, steps: Mapping[str, int]) -> int:
    value = bound if isinstance(bound, int) else evaluate(bound, steps)
    assert value is not None
    return value


def _slice(view: View, tensor: torch.Tensor, steps: Mapping[str, int]) -> torch.Tensor:
    """A view at one step: zeros of its own where the step lies outside of a padded dimension."""
    places: list[int | slice] = []
    for size, at in zip(tensor.shape, view.at, strict=True):
        if at is None:
            places.append(slice(None))
            continue
        place = _bound(at.value if isinstance(at, Pad | Clamp) else at, steps)
        if isinstance(at, Clamp):
            place = min(max(place, 0), size - 1)
        elif isinstance(at, Pad) and not 0 <= place < size:
            left = [(n, step) for n, step, a in zip(tensor.shape, tensor.stride(), view.at, strict=True) if a is None]
            return tensor.new_empty_strided([n for n, _ in left], [step for _, step in left]).zero_()  # kernels are made for strides
        places.append(place)
    return tensor[tuple(places)]


def _operand(value: Any, number: bool, dtype: torch.dtype, device: torch.device) -> Any:
    if number:
        return value
    if not isinstance(value, torch.Tensor):
        return torch.tensor(value, dtype=dtype, device=device)
    return value.to(device) if value.device != device else value
