"""The kernels of the operators: what torch's dispatcher does with a call. Autocast, torch.func, forward mode, autograd; the outermost first.

Under torch.func a call is an autograd.Function that torch.func knows (transformed.py). The kernel for torch.func stands at the dispatch
key in front of all others, so that a transformed call is the same in eager mode and in a traced graph.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tdsl.arguments import form
from tdsl.donate import check_recorded
from tdsl.errors import Unsupported
from tdsl.fake import SizeRules, agree
from tdsl.operators import AUTOCAST, LIBRARY, VMAP, call, carries_tangents, unpack, wants_gradient
from tdsl.recipes import PARTS, known_executor, known_function, remember
from tdsl.runtime import Executor
from tdsl.text import parse
from tdsl.torch_function import Function
from tdsl.transformed import transformed

# What the dispatcher includes and excludes where nothing is going on.
_OUTSIDE = (torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set())

# ---------------------------------------------------------------------------------------------------------------------
# What a recipe names

_rebuilt: dict[str, Function] = {}


def function_of(recipe: str) -> Function:
    """The Function of a recipe; one that is not there, in another process say, is made from its text."""
    found: Function | None = known_function(recipe)
    if found is None:
        found = _rebuilt[recipe] = _rebuild(json.loads(recipe))
    return found


def _rebuild(fields: dict[str, Any]) -> Function:
    if "instance" in fields:
        raise Unsupported(
            f"the Function that this graph was made of was changed by hand, and is gone (dispatch)\n{fields['program']}",
            help="keep it while the graph lives; a graph for other processes is exported before schedule() and define_grad()",
        )
    donate = tuple(fields.get("donate", ()))
    return Function(parse(fields["program"]), fields.get("backend", "auto"), precision=fields.get("precision"), donate=donate)


def executor_of(recipe: str) -> Executor:
    """The executor of a recipe: of a program, or of the forward or backward part of a gradient."""
    found = known_executor(recipe)
    if found is not None:
        return found
    fields = json.loads(recipe)
    part = {name: fields.pop(name) for name in PARTS if name in fields}
    function = function_of(json.dumps(fields))
    executor: Executor = function.part(**part) if part else function.executor
    _rebuilt[recipe] = function
    remember(recipe, executor)
    return executor


# ---------------------------------------------------------------------------------------------------------------------
# Kernels


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
    with torch._C._ExcludeDispatchKeyGuard(AUTOCAST):
        return call(function.recipe, args)


def _autograd(recipe: str, kinds: str, tensors: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float]) -> list[Tensor]:
    args = unpack(kinds, tensors, ints, floats)
    if carries_tangents(args):
        return transformed(function_of(recipe), args)
    results = function_of(recipe).recorded(args) if wants_gradient(tensors) else None
    return torch.ops.tdsl.run(recipe, kinds, tensors, ints, floats) if results is None else list(results)


def _launch(recipe: str, kinds: str, tensors: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float]) -> list[Tensor]:
    if forward_ad._current_level >= 0:
        with torch._C._ForceDispatchKeyGuard(*_OUTSIDE):  # below autograd torch refuses to look at tangents
            lost = carries_tangents(tensors)
        if lost:
            raise Unsupported(
                "forward mode from outside of a compiled graph: torch drops the tangents there (dispatch)",
                help="take the derivative inside of what is compiled: torch.func.jvp, torch.func.jacfwd",
            )
    if wants_gradient(tensors):  # a graph that was lowered below autograd, in a place where gradients are recorded
        return call(recipe, unpack(kinds, tensors, ints, floats))
    results = executor_of(recipe)(unpack(kinds, tensors, ints, floats))
    return [r if r.is_contiguous() else r.contiguous() for r in results]


def _fake(recipe: str, kinds: str, tensors: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float]) -> list[Tensor]:
    if wants_gradient(tensors):
        raise Unsupported(
            "a graph that was lowered for inference records no gradients when it is traced again (dispatch)",
            help="export it with torch.export.export and no run_decompositions, or trace it under torch.no_grad()",
        )
    return _shapes(executor_of(recipe), unpack(kinds, tensors, ints, floats))


def _shapes(executor: Executor, args: Sequence[Any]) -> list[Tensor]:
    """Tensors like the outputs, without values."""
    described = [form(a) for a in args]
    found = executor.outputs_for(described)
    shapes: list[tuple[Any, ...]] = [shape for shape, _ in found]
    if any(isinstance(n, torch.SymInt) for a in args for n in (a.shape if isinstance(a, Tensor) else (a,))):
        agree(executor.program, args)
        shapes = SizeRules(executor.flat).shapes_for(executor.flat.results, args, shapes)
    tensors = [a for a in args if isinstance(a, Tensor)]
    device = next((t.device for t in tensors if t.dim()), tensors[0].device if tensors else torch.device("cpu"))
    return [torch.empty(shape, dtype=dtype, device=device) for shape, (_, dtype) in zip(shapes, found, strict=True)]


def _update(
    recipe: str, kinds: str, written: Sequence[Tensor], tensors: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float]
) -> None:
    executor = executor_of(recipe)
    check_recorded(executor.program, [*written, *tensors])
    count = len(executor.donate)
    results = executor(unpack(kinds, tensors, ints, floats, written[:count]))
    made = [r for r, name in zip(results, executor.program.results, strict=True) if name not in executor.donate]
    for target, result in zip(written[count:], made, strict=True):
        target.copy_(result)


def _blank(recipe: str, kinds: str, tensors: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float]) -> list[Tensor]:
    executor = executor_of(recipe)
    made = _shapes(executor, unpack(kinds, tensors, ints, floats))
    return [t for t, name in zip(made, executor.program.results, strict=True) if name not in executor.donate]


def install() -> None:
    """Gives torch the kernels of the operators: once per process."""
    for name in ("call", "run"):
        LIBRARY.impl(name, _launch, "CompositeExplicitAutograd")
        torch.library.register_fake(f"tdsl::{name}", _fake, lib=LIBRARY)
    LIBRARY.impl("run", torch.library.fallthrough_kernel, "Autograd")
    LIBRARY.impl("call", _functorch, "FuncTorchDynamicLayerFrontMode")
    LIBRARY.impl("call", _batched, "Batched")
    LIBRARY.impl("call", _autocast, "AutocastCPU")
    LIBRARY.impl("call", _autocast, "AutocastCUDA")
    LIBRARY.impl("call", _autograd, "Autograd")
    LIBRARY.impl("update", _update, "CompositeExplicitAutograd")
    torch.library.register_fake("tdsl::update", lambda *_: None, lib=LIBRARY)
    LIBRARY.impl("blank", _blank, "CompositeExplicitAutograd")
    torch.library.register_fake("tdsl::blank", _blank, lib=LIBRARY)
