"""A call under torch.func, or forward mode, as an autograd.Function that both know: its backward is the gradient program, its vmap the
program with one more index, its jvp the tangent program.

Under reverse mode alone a call saves what the backward of the same call outside of torch.func would read, and its backward is that
backward, another such call: nothing of the forward is computed again. Where something else meets them (a vmap, a tangent, the
derivative of the backward) they are the whole programs of the inputs again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tdsl.arguments import check_gradients, form
from tdsl.autograd import Halves
from tdsl.errors import Unsupported
from tdsl.operators import AUTOCAST, execute
from tdsl.runtime import Executor


@dataclass(frozen=True, slots=True)
class Short:
    """What runs in the place of a Function's own executor. halves: of a forward that saves; None: of such a backward, whose arguments
    are those of the gradient and then what was saved. stored: the dtypes that these stand for."""

    executor: Executor
    halves: Halves | None = None
    stored: tuple[tuple[str, str], ...] = ()


def transformed(function: Any, args: Sequence[Any]) -> list[Tensor]:
    """A call under torch.func, or one whose inputs carry tangents."""
    levels = torch._C._functorch.get_interpreter_stack() or ()
    kinds = [level.key() for level in levels]
    if sum(kind == torch._C._functorch.TransformType.Jvp for kind in kinds) > 1:
        raise Unsupported(
            "forward mode inside forward mode: torch would lose the inner tangents without a word (transformed)",
            help="take one of the derivatives in reverse mode: torch.func.hessian, or jacfwd(jacrev(f))",
        )
    short = None
    if kinds and all(kind == torch._C._functorch.TransformType.Grad for kind in kinds) and forward_ad._current_level < 0:
        short = _saving(function, args)
    results: Any = Transformed.apply(function, short, *args)  # type: ignore[no-untyped-call]
    return list(results[: len(function.program.outputs)])


def _saving(function: Any, args: Sequence[Any]) -> Short | None:
    """The forward that saves, where something is worth saving."""
    if not any(isinstance(a, Tensor) and a.requires_grad for a in args):
        return None
    trained = function.recorded_by(args)
    if trained is None:
        return None
    described = [form(a) for a in args]
    halves = trained.halves_for(described)
    if not (halves.parts.saved or halves.parts.kept):
        return None
    return Short(halves.forward, halves, tuple(halves.stored_for(described).items()))


class Transformed(torch.autograd.Function):
    """One call: of a Function, its arguments, and for a backward what was saved."""

    @staticmethod
    def forward(function: Any, short: Short | None, *args: Any) -> tuple[Tensor, ...]:
        """The outputs, and what is saved; contiguous, since torch wants a value and its tangent laid out alike."""
        with torch._C._ExcludeDispatchKeyGuard(AUTOCAST):  # the program has its casts
            return tuple(r.contiguous() for r in execute(short.executor if short else function.executor, args))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keeps the inputs, for both directions, and what a short backward reads."""
        function, short, *args = inputs
        count = len(function.program.outputs)
        args = args[: len(function.program.inputs)]
        tensors = [a for a in args if isinstance(a, Tensor)]
        halves = None if short is None else short.halves
        kept = [] if halves is None else [*(output[n] for n in halves.kept), *output[count:]]
        ctx.function = function
        ctx.short = None if halves is None else short
        ctx.results, ctx.given = len(output), len(inputs)
        ctx.numbers = [None if isinstance(a, Tensor) else a for a in args]
        ctx.save_for_backward(*tensors, *kept)
        ctx.save_for_forward(*tensors)
        ctx.mark_non_differentiable(*(o for o in output[:count] if not o.dtype.is_floating_point), *output[count:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the inputs that need one."""
        function = ctx.function
        args, kept = _arguments(ctx)
        asks = [isinstance(a, Tensor) and need for a, need in zip(args, ctx.needs_input_grad[2:], strict=False)]
        check_gradients(function.program, args, asks)
        wrt = _wrt(function, asks)
        nothing = (None,) * (ctx.given - 2 - len(args))
        if not wrt:
            return (None, None, *(None for _ in args), *nothing)
        cotangents = cotangents[: len(function.program.outputs)]
        found = None if ctx.short is None else _shortened(ctx.short, function, wrt, [*args, *cotangents], kept)
        if found is None:
            found = function.grad(wrt)(*args, *cotangents)
            found = dict(zip(wrt, found if isinstance(found, tuple) else (found,), strict=True))
        named = zip(function.program.inputs, args, asks, strict=True)
        grads: list[Tensor | None] = [found[name].to(a.dtype) if ask and name in found else None for name, a, ask in named]
        return (None, None, *grads, *nothing)

    @staticmethod
    def jvp(ctx: Any, _: None, __: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """The tangents of the outputs, by the tangent program."""
        function = ctx.function
        args, _kept = _arguments(ctx)
        wrt = _wrt(function, [t is not None for t in tangents[: len(args)]])
        if not wrt:
            return tuple(None for _ in range(ctx.results))
        given = dict(zip(function.program.inputs, tangents, strict=False))
        found = function.jvp(wrt)(*args, *(given[name] for name in wrt))
        made = [t.contiguous() for t in (found if isinstance(found, tuple) else (found,))]
        return (*made, *(None for _ in range(ctx.results - len(made))))

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], function: Any, short: Short | None, *args: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """The program with one more index, in front of the outputs' own; nothing is saved."""
        count = len(function.program.inputs)
        found = function.vmap(tuple(in_dims[2 : 2 + count]))(*args[:count])
        results = found if isinstance(found, tuple) else (found,)
        return results, (0,) * len(results)


def _shortened(short: Short, function: Any, wrt: Sequence[str], args: Sequence[Any], kept: Sequence[Tensor]) -> dict[str, Tensor] | None:
    """The gradients, by the backward of the cut that saved; None where that cannot give them."""
    assert short.halves is not None
    names = short.halves.owner.wrt
    backward = short.halves.backward(dict(short.stored), function.program.results)
    if not {*wrt} <= {*names} or len(backward.gradients) + len(backward.passed) != len(names):
        return None
    inputs = function.program.inputs
    passed = {inputs[n]: args[len(inputs) + m] for n, m in backward.passed}
    if backward.executor is None:
        return passed
    names = tuple(name for name in names if name not in passed)
    found: Any = Transformed.apply(function.grad(names), Short(backward.executor), *args, *kept)  # type: ignore[no-untyped-call]
    return {**dict(zip(names, found, strict=False)), **passed}


def _arguments(ctx: Any) -> tuple[list[Any], list[Tensor]]:
    """The arguments of a call, and what was saved besides them."""
    tensors = iter(ctx.saved_tensors)
    return [next(tensors) if number is None else number for number in ctx.numbers], list(tensors)


def _wrt(function: Any, wanted: Sequence[bool]) -> tuple[str, ...]:
    return tuple(name for name, want in zip(function.program.inputs, wanted, strict=True) if want and name in function.differentiable)
