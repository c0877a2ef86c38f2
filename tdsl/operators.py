"""Programs as torch operators, for whoever looks at a call from outside: torch.compile, torch.export, fake tensors, dispatch modes.

    tdsl::call(str recipe, str kinds, Tensor[] tensors, SymInt[] ints, float[] floats) -> Tensor[]   a Function: differentiable
    tdsl::run(str recipe, str kinds, Tensor[] tensors, SymInt[] ints, float[] floats) -> Tensor[]    what is left below autograd

`kinds` has a letter per argument: t(ensor), i(nt), f(loat), b(ool). The recipe is JSON that names the program by its text, so that an
exported graph runs in another process; there the program is compiled anew. Results are contiguous and share no memory with
arguments. Eager calls on plain tensors go past all of this: see `plain`.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from tdsl.arguments import form, layout
from tdsl.errors import ArgumentError, Unsupported
from tdsl.fake import SizeRules, agree
from tdsl.ir import Program
from tdsl.runtime import Executor, Outputs

# What the dispatcher includes and excludes where nothing is going on.
_OUTSIDE = (torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set())
LIBRARY = torch.library.Library("tdsl", "FRAGMENT")
_SCHEMA = "(str recipe, str kinds, Tensor[] tensors, SymInt[] ints, float[] floats) -> Tensor[]"
LIBRARY.define("call" + _SCHEMA)
LIBRARY.define("run" + _SCHEMA)

Packed = tuple[str, list[Tensor], list[int], list[float]]

_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
_tracing: Callable[[], Any] = torch._C._get_tracing_state  # of torch.jit.trace
_functorch: Callable[[], bool] = torch._C._are_functorch_transforms_active
_included: Callable[[Any], bool] = torch._C._dispatch_tls_is_dispatch_key_included
VMAP: Any = torch._C._parse_dispatch_key("VmapMode")  # the older vmap, which torch's own batched gradients use


def transforms() -> bool:
    """Whether torch.func, or a vmap of torch's own, is at work."""
    return not torch.compiler.is_compiling() and (_functorch() or _included(VMAP))


def plain(args: Sequence[Any]) -> bool:
    """Whether a call can go straight to the kernels: nothing traces, transforms or intercepts it, and its tensors are tensors."""
    if torch.compiler.is_compiling() or _modes() or _functorch() or _included(VMAP) or _tracing() is not None:
        return False
    for a in args:
        kind = type(a)
        if kind is not Tensor and kind is not Parameter and isinstance(a, Tensor):
            return False
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Recipes

_executors: WeakValueDictionary[str, Executor] = WeakValueDictionary()
_functions: WeakValueDictionary[str, Any] = WeakValueDictionary()
_rebuilt: dict[str, Any] = {}
_lock = threading.Lock()


def recipe_of(program: Program, backend: str, precision: str | None, instance: int) -> str:
    """The recipe of a Function. precision: what autocast made of it. instance: not 0 for one that was changed by hand here."""
    fields = {"program": str(program), "backend": backend, "precision": precision, "instance": instance}
    return json.dumps({name: value for name, value in fields.items() if value and value != "auto"})


def part_of(recipe: str, **part: Any) -> str:
    """The recipe of one side of the cut gradient of a Function."""
    return json.dumps({**json.loads(recipe), **part})


def remember(recipe: str, executor: Executor, function: Any = None) -> None:
    """Lets the operators find what a recipe names, as long as it lives; the first of equals serves for all of them."""
    executor.recipe = recipe
    with _lock:
        _executors.setdefault(recipe, executor)
        if function is not None:
            _functions.setdefault(recipe, function)


def function_of(recipe: str) -> Any:
    """The Function of a recipe; one that is not there, in another process say, is made from its text."""
    found = _functions.get(recipe)
    if found is None:
        found = _rebuilt[recipe] = _rebuild(json.loads(recipe))
    return found


def _rebuild(fields: dict[str, Any]) -> Any:
    from tdsl.function import Function
    from tdsl.text import parse

    if "instance" in fields:
        raise Unsupported(
            f"the Function that this graph was made of was changed by hand, and is gone (operators)\n{fields['program']}",
            help="keep it while the graph lives; a graph for other processes is exported before schedule() and define_grad()",
        )
    return Function(parse(fields["program"]), fields.get("backend", "auto"), precision=fields.get("precision"))


def executor_of(recipe: str) -> Executor:
    """The executor of a recipe: of a program, or of the forward or backward part of a gradient."""
    found = _executors.get(recipe)
    if found is not None:
        return found
    fields = json.loads(recipe)
    part = {name: fields.pop(name) for name in ("part", "wrt", "fuses", "recomputed", "stored", "outputs") if name in fields}
    function = function_of(json.dumps(fields))
    executor: Executor = function.part(**part) if part else function.executor
    _rebuilt[recipe] = function
    remember(recipe, executor)
    return executor


# ---------------------------------------------------------------------------------------------------------------------
# Calls


def call(recipe: str, args: Sequence[Any]) -> list[Tensor]:
    """A call as the differentiable operator."""
    return torch.ops.tdsl.call(recipe, *pack(args))  # type: ignore[no-any-return]


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


def unpack(kinds: str, tensors: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float]) -> list[Any]:
    """The arguments in order."""
    if not ints and not floats:
        return list(tensors)
    sources: dict[str, Iterator[Any]] = {
        "t": iter(tensors),
        "i": iter(ints or ()),
        "f": iter(floats or ()),
    }  # AOTInductor gives None for ()
    sources["b"] = map(bool, sources["i"])
    return [next(sources[kind]) for kind in kinds]


def checked(program: Program, args: Sequence[Any]) -> None:
    """Raises ArgumentError for a wrong number or kind of arguments, before torch complains about a schema."""
    if len(args) != len(program.inputs) or not all(isinstance(a, Tensor | int | float | torch.SymInt | torch.SymFloat) for a in args):
        layout(program, args)
        raise ArgumentError(f"{program.name} takes tensors and numbers")


def wants_gradient(tensors: Sequence[Tensor]) -> bool:
    """Whether autograd records what is done with these tensors."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def carries_tangents(args: Sequence[Any]) -> bool:
    """Whether forward mode is on and reaches one of the arguments."""
    if forward_ad._current_level < 0:
        return False
    return any(isinstance(a, Tensor) and forward_ad.unpack_dual(a).tangent is not None for a in args)


# ---------------------------------------------------------------------------------------------------------------------
# Kernels


def _launch(recipe: str, kinds: str, tensors: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float]) -> list[Tensor]:
    if forward_ad._current_level >= 0:
        with torch._C._ForceDispatchKeyGuard(*_OUTSIDE):  # below autograd torch refuses to look at tangents
            lost = carries_tangents(tensors)
        if lost:
            raise Unsupported(
                "forward mode from outside of a compiled graph: torch drops the tangents there (operators)",
                help="take the derivative inside of what is compiled: torch.func.jvp, torch.func.jacfwd",
            )
    if wants_gradient(tensors):  # a graph that was lowered below autograd, in a place where gradients are recorded
        return call(recipe, unpack(kinds, tensors, ints, floats))
    results = executor_of(recipe)(unpack(kinds, tensors, ints, floats))
    return [r.contiguous() for r in results]


def _fake(recipe: str, kinds: str, tensors: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float]) -> list[Tensor]:
    if wants_gradient(tensors):
        raise Unsupported(
            "a graph that was lowered for inference records no gradients when it is traced again (operators)",
            help="export it with torch.export.export and no run_decompositions, or trace it under torch.no_grad()",
        )
    executor = executor_of(recipe)
    args = unpack(kinds, tensors, ints, floats)
    described = [form(a) for a in args]
    found = executor.outputs_for(described)
    shapes: list[tuple[Any, ...]] = [shape for shape, _ in found]
    if any(isinstance(n, torch.SymInt) for a in args for n in (a.shape if isinstance(a, Tensor) else (a,))):
        agree(executor.program, args)
        shapes = SizeRules(executor.flat).shapes_for(executor.flat.results, args, shapes)
    device = next((t.device for t in tensors if t.dim()), tensors[0].device if tensors else torch.device("cpu"))
    return [torch.empty(shape, dtype=dtype, device=device) for shape, (_, dtype) in zip(shapes, found, strict=True)]


for _name in ("call", "run"):
    LIBRARY.impl(_name, _launch, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tdsl::{_name}", _fake, lib=LIBRARY)
LIBRARY.impl("run", torch.library.fallthrough_kernel, "Autograd")
