"""The way past all look-ups for a call like one before: a test of the arguments, and what ran them.

torch tests a sequence of tensors in one step, as its compiled graphs do before they run: their types, dtypes, devices, sizes,
strides, whether they need a gradient, and which of torch's layers (autocast, torch.func, vmap, tracers, inference mode) are at work.
Where torch has no such test nothing is remembered, and calls are looked up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

try:
    _guards: Any = torch._C._dynamo.guards.TensorGuards
except AttributeError:  # a torch that has none
    _guards = None

# Whether a tensor is one of torch.func's, which may have outlived the transform that made it.
_wrapped: Callable[[Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor

# Layouts that are remembered, the last one first.
KEPT = 4

Test = Callable[..., bool]


def test_of(args: Sequence[Any]) -> Test | None:
    """Whether arguments are like these; None where nothing can say so. It raises TypeError for another number of tensors."""
    tensors = [n for n, a in enumerate(args) if isinstance(a, Tensor)]
    if _guards is None or not tensors or any(_wrapped(args[n]) for n in tensors):
        return None
    check: Test = _guards(*(args[n] for n in tensors), dynamic_dims_sizes=None, dynamic_dims_strides=None).check
    if len(tensors) == len(args):
        return check
    names = [f"a{n}" for n in range(len(args))]
    tests = [
        f"type({name}) is t{n}" + (f" and {name} == v{n}" if isinstance(a, int) else "")
        for n, (name, a) in enumerate(zip(names, args, strict=True))
        if not isinstance(a, Tensor)
    ]
    known = (
        {"check": check} | {f"t{n}": type(a) for n, a in enumerate(args)} | {f"v{n}": a for n, a in enumerate(args) if isinstance(a, int)}
    )
    return eval(f"lambda {', '.join(names)}: {' and '.join(tests)} and check({', '.join(names[n] for n in tensors)})", known)  # type: ignore[no-any-return]
