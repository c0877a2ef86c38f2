"""Programs as torch operators, for whoever looks at a call from outside: torch.compile, torch.export, fake tensors, dispatch modes.

    tdsl::call(str recipe, str kinds, Tensor[] tensors, SymInt[] ints, float[] floats) -> Tensor[]   a Function: differentiable
    tdsl::run(str recipe, str kinds, Tensor[] tensors, SymInt[] ints, float[] floats) -> Tensor[]    what is left below autograd
    tdsl::update(str recipe, str kinds, Tensor(a!)[] written, Tensor[] tensors, SymInt[] ints, float[] floats) -> ()
                                                          a Function that writes into arguments; then come its other outputs
    tdsl::blank(str recipe, str kinds, Tensor[] tensors, SymInt[] ints, float[] floats) -> Tensor[]          memory for these

`kinds` has a letter per argument: t(ensor), d(onated), i(nt), f(loat), b(ool). recipes.py says what a recipe is; dispatch.py has the
operators' kernels. Results are contiguous and share no memory with arguments. Eager calls on plain tensors go past all of this: see
`plain`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from tdsl.arguments import layout
from tdsl.errors import ArgumentError
from tdsl.ir import Program
from tdsl.launching import Outputs
from tdsl.runtime import Executor

LIBRARY = torch.library.Library("tdsl", "FRAGMENT")
_REST = "Tensor[] tensors, SymInt[] ints, float[] floats) -> Tensor[]"
LIBRARY.define(f"call(str recipe, str kinds, {_REST}")
LIBRARY.define(f"run(str recipe, str kinds, {_REST}")
LIBRARY.define(f"blank(str recipe, str kinds, {_REST}")
LIBRARY.define("update(str recipe, str kinds, Tensor(a!)[] written, Tensor[] tensors, SymInt[] ints, float[] floats) -> ()")

Packed = tuple[str, list[Tensor], list[int], list[float]]

compiling: Callable[[], bool] = torch.compiler.is_compiling
modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
_tracing: Callable[[], Any] = torch._C._get_tracing_state  # of torch.jit.trace
_functorch: Callable[[], bool] = torch._C._are_functorch_transforms_active
_casts: Callable[[], bool] = torch._C._is_any_autocast_enabled
_included: Callable[[Any], bool] = torch._C._dispatch_tls_is_dispatch_key_included
AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)
VMAP: Any = torch._C._parse_dispatch_key("VmapMode")  # the older vmap, which torch's own batched gradients use


def transforms() -> bool:
    """Whether torch.func, or a vmap of torch's own, is at work."""
    return not compiling() and (_functorch() or _included(VMAP))


def looked_at() -> bool:
    """Whether a call on ordinary tensors may mean more than running it: modes, torch.func, forward mode, autocast, the older tracer."""
    return bool(modes() or transforms() or forward_ad._current_level >= 0 or _casts() or _tracing() is not None)


def plain(args: Sequence[Any]) -> bool:
    """Whether a call can go straight to the kernels: nothing traces, transforms or intercepts it, and its tensors are tensors."""
    if compiling() or modes() or _functorch() or _included(VMAP) or _tracing() is not None:
        return False
    for a in args:
        kind = type(a)
        if kind is not Tensor and kind is not Parameter and isinstance(a, Tensor):
            return False
    return True


def call(recipe: str, args: Sequence[Any]) -> list[Tensor]:
    """A call as the differentiable operator."""
    return torch.ops.tdsl.call(recipe, *pack(args))  # type: ignore[no-any-return]


def update(recipe: str, program: Program, donate: Sequence[str], args: Sequence[Any]) -> list[Tensor]:
    """A call that writes into arguments, as the operator: the outputs, these arguments among them."""
    given = dict(zip(program.inputs, args, strict=True))
    kinds, tensors, ints, floats = pack(args)
    others: list[Tensor] = []
    if len(donate) < len(program.results):
        others = torch.ops.tdsl.blank(recipe, kinds, tensors, ints, floats)
    kinds = "".join("d" if name in donate else kind for name, kind in zip(program.inputs, kinds, strict=True))
    rest = [a for name, a in given.items() if isinstance(a, Tensor) and name not in donate]
    torch.ops.tdsl.update(recipe, kinds, [*(given[name] for name in donate), *others], rest, ints, floats)
    made = iter(others)
    return [given[name] if name in donate else next(made) for name in program.results]


def execute(executor: Executor, args: Sequence[Any]) -> Outputs:
    """What an executor gives, as an operator where somebody looks."""
    return executor(args) if plain(args) else tuple(torch.ops.tdsl.run(executor.recipe, *pack(args)))


def pack(args: Sequence[Any]) -> Packed:
    """Arguments as the operators take them: kinds, tensors, ints, floats."""
    kinds = "".join(["t" if isinstance(a, Tensor) else "b" if isinstance(a, bool) else "i" if _whole(a) else "f" for a in args])
    return (
        kinds,
        [a for a in args if isinstance(a, Tensor)],
        [a for a in args if not isinstance(a, Tensor) and _whole(a)],
        [a for a in args if not isinstance(a, Tensor) and not _whole(a)],
    )


def _whole(a: Any) -> bool:
    return isinstance(a, int | torch.SymInt)


def unpack(
    kinds: str, tensors: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float], donated: Sequence[Tensor] = ()
) -> list[Any]:
    """The arguments in order."""
    if not ints and not floats and not donated:
        return list(tensors)
    sources: dict[str, Iterator[Any]] = {  # AOTInductor gives None for ()
        "t": iter(tensors),
        "d": iter(donated),
        "i": iter(ints or ()),
        "f": iter(floats or ()),
    }
    sources["b"] = map(bool, sources["i"])
    return [next(sources[kind]) for kind in kinds]


def checked(program: Program, args: Sequence[Any]) -> None:
    """Raises ArgumentError for a wrong number or kind of arguments, before torch complains about a schema."""
    if len(args) != len(program.inputs) or not all(isinstance(a, Tensor | int | float | torch.SymInt | torch.SymFloat) for a in args):
        layout(program, args)
        raise ArgumentError(f"{program.name} takes tensors and numbers")


def wants_gradient(tensors: Sequence[Tensor]) -> bool:
    """Whether autograd records what is done with these tensors."""
    return torch.is_grad_enabled() and any([t.requires_grad for t in tensors])  # noqa: C419  # a generator takes longer


def carries_tangents(args: Sequence[Any]) -> bool:
    """Whether forward mode is on and reaches one of the arguments."""
    if forward_ad._current_level < 0:
        return False
    return any(isinstance(a, Tensor) and forward_ad.unpack_dual(a).tangent is not None for a in args)
