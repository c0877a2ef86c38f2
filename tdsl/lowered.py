"""The programs that a call runs, lowered but not launched: the forward, and with a gradient the two halves of its cut."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from lowering.targets import find_target
from tdsl.arguments import Layout, layout
from tdsl.errors import ArgumentError
from tdsl.infer import Spec
from tdsl.ir import Program
from tdsl.ops import DTYPES
from tdsl.orders import training_orders
from tdsl.pairwise import Orders, in_order
from tdsl.residuals import Cut, cut
from tdsl.runtime import Executor
from tdsl.swap import differentiable

if TYPE_CHECKING:
    from lowering.state import State


class Runnable(Protocol):
    """What is needed of a Function."""

    @property
    def program(self) -> Program:
        """The program."""
        ...

    @property
    def executor(self) -> Executor:
        """What runs it where no gradient is recorded."""
        ...

    def target_for(self, args: Sequence[Any]) -> str:
        """The target that arguments are compiled for where none is named."""
        ...

    def lower(self, *args: Any, target: str | None = None) -> State:
        """Everything that the compiler finds for arguments."""
        ...

    def grad(self, wrt: str | Sequence[str] | None = None) -> Runnable:
        """The gradient."""
        ...


@dataclass(frozen=True, slots=True)
class Lowered:
    """role: "forward" or "backward". saves: what a forward hands to the backward. flat: the program that is compiled. state: what the
    compiler finds. seconds: (stage, time) in order."""

    role: str
    saves: tuple[str, ...]
    flat: Program
    state: State
    seconds: tuple[tuple[str, float], ...]

    @property
    def title(self) -> str:
        """What it is."""
        return f"{self.role} that saves {', '.join(self.saves)}" if self.saves else self.role


def lowered(function: Runnable, args: Sequence[Any], target: str | None, *, gradient: bool = False) -> tuple[Lowered, ...]:
    """The forward of `function` for arguments as `Function.lower` takes them; with `gradient` the kernels of training too.

    Those are the forward that also saves what the backward reads (left out where nothing is saved) and the backward. Gradients are
    taken of the float tensors among the arguments; ArgumentError if there is none.
    """
    program, executor = function.program, function.executor
    found = layout(program, args, executor.integers)
    target = find_target(target or function.target_for(args)).name
    forward = _lower("forward", executor, found, target)
    if not gradient:
        return (forward,)
    possible = differentiable(program)
    wrt = tuple(n for n in program.inputs if n in possible and not found.specs[n].weak and DTYPES[found.specs[n].dtype].kind == "float")
    if not wrt:
        raise ArgumentError(f"{program.name} has no float tensor among its arguments, so it has no gradient")
    assert forward.state.plan is not None
    recomputed = forward.state.plan.recomputed

    def halves(orders: Orders) -> Cut:
        return cut(in_order(program, orders), wrt, fuses=target != "cpu" or executor.fuses(None), recomputed=recomputed)

    parts = halves(training_orders(program, found, recomputed, halves))
    saving = forward
    if parts.saved:
        trainer = Executor(program, executor.backend, flat=parts.forward, saved=frozenset(parts.saved), control=executor.control)
        saving = _lower("forward", trainer, found, target, parts.saved)
    if not parts.backward.outputs:
        return (forward, *((saving,) if saving is not forward else ()))
    specs, logical = backward_specs(saving.state, parts.forward, parts.backward, found, parts.saved)
    strides = {n: found.strides[n] for n in program.inputs if n in found.strides}
    backward = Executor(parts.backward, executor.backend, stored=logical, control=executor.control)
    last = _lower("backward", backward, Layout(specs, strides, found.values, found.device), target)
    return (forward, *((saving,) if saving is not forward else ()), last)


def _lower(role: str, executor: Executor, found: Layout, target: str, saves: tuple[str, ...] = ()) -> Lowered:
    seconds: list[tuple[str, float]] = []
    started = time.perf_counter()
    flat = executor.flat
    seconds.append(("flatten", time.perf_counter() - started))
    state = executor.lower(found, target, lambda stage, before, after, spent: seconds.append((stage, spent)))
    return Lowered(role, saves, flat, state, tuple(seconds))


def backward_specs(
    state: State, forward: Program, backward: Program, found: Layout, saved: Sequence[str]
) -> tuple[dict[str, Spec], dict[str, str]]:
    """The shapes and dtypes in memory of a backward's parameters, and the dtypes that promotion takes saved tensors for.

    state: of the lowered forward; `forward` and `backward`: the halves of the cut. A cotangent is like its output.
    """
    names = dict(zip(forward.results, state.program.results, strict=True))  # lowering may give the last version of an output another name
    made = {
        name: Spec(state.shape_of(last), state.stored.get(last, state.dtypes[last]) if name in saved else state.dtypes[last])
        for name, last in names.items()
    }
    specs = dict(found.specs)
    cotangents = [p for p in backward.inputs if p not in found.specs and p not in made]
    outputs = list(dict.fromkeys(name for name in forward.results if name not in saved))
    specs.update({p: made[name] for p, name in zip(cotangents, outputs, strict=True)})
    specs.update({p: made[p] for p in backward.inputs if p in made and p not in found.specs})
    return specs, {name: state.dtypes[names[name]] for name in saved}
