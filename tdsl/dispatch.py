"""What torch's dispatcher does with `tdsl::call`: autocast, torch.func, forward mode, autograd; the outermost first.

Under torch.func a call is an autograd.Function that torch.func knows: its backward is the gradient program, its vmap the program
with one more index, its jvp the tangent program. The kernel for torch.func stands at the dispatch key in front of all others, so
that a transformed call is the same in eager mode and in a traced graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tdsl.errors import Unsupported
from tdsl.operators import LIBRARY, VMAP, call, carries_tangents, execute, function_of, transforms, unpack, wants_gradient


class Transformed(torch.autograd.Function):
    """A call that torch.func, or forward mode, transforms. Its backward runs the whole gradient program on the inputs."""

    @staticmethod
    def forward(function: Any, *args: Any) -> tuple[Tensor, ...]:
        """The outputs; contiguous, since torch wants a value and its tangent laid out alike."""
        return tuple(r.contiguous() for r in execute(function.executor, args))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keeps the inputs, for both directions."""
        function, *args = inputs
        tensors = [a for a in args if isinstance(a, Tensor)]
        ctx.function = function
        ctx.numbers = [None if isinstance(a, Tensor) else a for a in args]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.mark_non_differentiable(*(o for o in output if not o.dtype.is_floating_point))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the inputs that need one."""
        args = _arguments(ctx)
        wrt = _wrt(ctx.function, [isinstance(a, Tensor) and need for a, need in zip(args, ctx.needs_input_grad[1:], strict=True)])
        if not wrt:
            return (None, *(None for _ in args))
        found = ctx.function.grad(wrt)(*args, *cotangents)
        grads = dict(zip(wrt, found if isinstance(found, tuple) else (found,), strict=True))
        named = zip(ctx.function.program.inputs, args, strict=True)
        return (None, *(grads[name].to(a.dtype) if name in grads else None for name, a in named))

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """The tangents of the outputs, by the tangent program."""
        args = _arguments(ctx)
        wrt = _wrt(ctx.function, [t is not None for t in tangents])
        if not wrt:
            return tuple(None for _ in ctx.function.program.outputs)
        given = dict(zip(ctx.function.program.inputs, tangents, strict=True))
        found = ctx.function.jvp(wrt)(*args, *(given[name] for name in wrt))
        return tuple(t.contiguous() for t in (found if isinstance(found, tuple) else (found,)))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], function: Any, *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """The program with one more index, in front of the outputs' own."""
        found = function.vmap(tuple(in_dims[1:]))(*args)
        results = found if isinstance(found, tuple) else (found,)
        return results, (0,) * len(results)


def _arguments(ctx: Any) -> list[Any]:
    tensors = iter(ctx.saved_tensors)
    return [next(tensors) if number is None else number for number in ctx.numbers]


def _wrt(function: Any, wanted: Sequence[bool]) -> tuple[str, ...]:
    return tuple(name for name, want in zip(function.program.inputs, wanted, strict=True) if want and name in function.differentiable)


# ---------------------------------------------------------------------------------------------------------------------
# Kernels

_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)


_modes, _casts, _tracing = torch._C._len_torch_dispatch_stack, torch._C._is_any_autocast_enabled, torch._C._get_tracing_state


def looked_at() -> bool:
    """Whether a call on ordinary tensors may mean more than running it: modes, torch.func, forward mode, autocast."""
    return bool(_modes() or transforms() or forward_ad._current_level >= 0 or _casts() or _tracing() is not None)


def transformed(function: Any, args: Sequence[Any]) -> list[Tensor]:
    """A call under torch.func, or one whose inputs carry tangents."""
    levels = torch._C._functorch.get_interpreter_stack() or ()
    if sum(level.key() == torch._C._functorch.TransformType.Jvp for level in levels) > 1:
        raise Unsupported(
            "forward mode inside forward mode: torch would lose the inner tangents without a word (dispatch)",
            help="take one of the derivatives in reverse mode: torch.func.hessian, or jacfwd(jacrev(f))",
        )
    results: Any = Transformed.apply(function, *args)  # type: ignore[no-untyped-call]
    return list(results)


def _functorch(recipe: str, kinds: str, tensors: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float]) -> list[Tensor]:
    args = unpack(kinds, tensors, ints, floats)
    function = function_of(recipe)
    return transformed(function.under_autocast(args) or function, args)


def _batched(recipe: str, kinds: str, tensors: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float]) -> list[Tensor]:
    """A call under the older vmap, of torch.autograd.grad(is_grads_batched=True) and torch.autograd.functional.jacobian."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    if level > 1:
        raise Unsupported("batched gradients inside batched gradients (dispatch)", help="use torch.func.vmap, which nests")
    args = unpack(kinds, tensors, ints, floats)
    batched = [isinstance(a, Tensor) and torch._C._functorch.is_legacy_batchedtensor(a) for a in args]
    whole = [torch._remove_batch_dim(a, level, 1, 0) if is_batched else a for a, is_batched in zip(args, batched, strict=True)]
    found = function_of(recipe).vmap(tuple(0 if is_batched else None for is_batched in batched))
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(VMAP)):
        results = call(found.recipe, whole)
    return [torch._add_batch_dim(r, 0, level) for r in results]


def _autocast(recipe: str, kinds: str, tensors: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float]) -> list[Tensor]:
    args = unpack(kinds, tensors, ints, floats)
    function = function_of(recipe)
    function = function.under_autocast(args) or function  # before the guard, which is what turns autocast off
    with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
        return call(function.recipe, args)


def _autograd(recipe: str, kinds: str, tensors: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float]) -> list[Tensor]:
    args = unpack(kinds, tensors, ints, floats)
    if carries_tangents(args):
        return transformed(function_of(recipe), args)
    results = function_of(recipe).recorded(args) if wants_gradient(tensors) else None
    return torch.ops.tdsl.run(recipe, kinds, tensors, ints, floats) if results is None else list(results)


LIBRARY.impl("call", _functorch, "FuncTorchDynamicLayerFrontMode")
LIBRARY.impl("call", _batched, "Batched")
LIBRARY.impl("call", _autocast, "AutocastCPU")
LIBRARY.impl("call", _autocast, "AutocastCUDA")
LIBRARY.impl("call", _autograd, "Autograd")
