"""What a module computes, found by trying it: small inputs in, values and gradients compared with those of candidates.

A layer that somebody wrote anew (there are dozens of RMSNorms) is known by what it does, whatever its class is called.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tdsl.nn.activation import ACTIVATIONS
from tdsl.nn.linear import Linear, TransposedLinear
from tdsl.nn.mlp import MLP, Activation, Roles
from tdsl.nn.norm import LayerNorm, RMSNorm

EPSILONS = ("eps", "variance_epsilon", "epsilon", "norm_eps", "layer_norm_eps", "layer_norm_epsilon")
_POINTS = (-30.0, -6.0, -2.5, -1.0, -0.3, -1e-3, 1e-3, 0.4, 1.0, 2.0, 5.0, 30.0)
Found = tuple[Tensor, ...]


def takes_one(module: nn.Module) -> bool:
    """Whether forward takes one argument and no more."""
    parameters = list(inspect.signature(module.forward).parameters.values())
    return len(parameters) == 1 and parameters[0].kind in (parameters[0].POSITIONAL_OR_KEYWORD, parameters[0].POSITIONAL_ONLY)


def random(seed: int, *shape: int) -> Tensor:
    """Normal numbers, the same every time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def outcome(function: Callable[..., Any], x: Tensor, state: Mapping[str, Tensor]) -> Found | None:
    """What a module gives for x with other parameters, and the gradients of x and of those; its own stay as they are.

    None where it raises, or gives anything but one tensor.
    """
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            x = x.clone().requires_grad_()
            state = {name: p.clone().requires_grad_() for name, p in state.items()}
            y = functional_call(function, state, (x,)) if isinstance(function, nn.Module) else function(x)
            if not isinstance(y, Tensor):
                return None
            seeds = random(1, *y.shape).to(y.dtype)
            return (y.detach(), *torch.autograd.grad(y, (x, *state.values()), seeds))
    except Exception:  # somebody else's code, on inputs that it was not written for
        return None


def same(found: Found | None, expected: Found | None, tolerance: float) -> bool:
    """Whether two outcomes agree, to a share of each tensor's largest value."""
    if found is None or expected is None or len(found) != len(expected):
        return False
    return all(
        a.shape == b.shape and a.dtype == b.dtype and bool((a - b).abs().max() <= tolerance * b.abs().max())
        for a, b in zip(found, expected, strict=True)
    )


# ---------------------------------------------------------------------------------------------------------------------
# Activations


def activation_of(function: Any) -> str | None:
    """The name in tdsl.ops of an elementwise function, or of a module without parameters; None where it is none of them."""
    if isinstance(function, nn.Module) and (function.state_dict() or [*function.buffers()] or not takes_one(function)):
        return None
    x = torch.tensor(_POINTS, dtype=torch.float64)
    found = outcome(function, x.view(2, -1), {})
    if found is None or not all(torch.isfinite(t).all() for t in found):
        return None
    for name in ACTIVATIONS:
        if same(found, _expected(name), 1e-8):
            return name
    return None


@cache
def _expected(name: str) -> Found | None:
    return outcome(Activation(name), torch.tensor(_POINTS, dtype=torch.float64).view(2, -1), {})


# ---------------------------------------------------------------------------------------------------------------------
# Norms, and linear layers with a transposed weight


def leaf_of(module: nn.Module) -> tuple[type[nn.Module], dict[str, Any]] | None:
    """The class of this package that computes what a module with a few parameters of its own does, and the attributes to give it.

    Such a module has no submodules and no buffers. Its parameters must have the names that the class gives them.
    """
    state = {name: random(2 + n, *p.shape) for n, (name, p) in enumerate(module.named_parameters())}
    alone = next(module.children(), None) is None and next(module.buffers(), None) is None
    if "weight" not in state or not alone or not takes_one(module):
        return None
    weight = state["weight"]
    if weight.dim() == 2 and set(state) <= {"weight", "bias"}:
        x = random(0, 2, 3, weight.shape[0])
        return (TransposedLinear, {}) if _is(module, TransposedLinear, {"bias": None}, state, (x,)) else None
    eps = next((e for e in (getattr(module, name, None) for name in EPSILONS) if isinstance(e, float)), None)
    if weight.dim() != 1 or eps is None:
        return None
    shape = {"normalized_shape": tuple(weight.shape), "eps": eps, "elementwise_affine": True}
    x = random(0, 2, 3, *weight.shape)
    tried = (x, x * eps**0.5 + 0.1 * eps**0.5)  # eps counts in the second
    if set(state) == {"weight"}:
        for shift in (0.0, 1.0):
            if _is(module, RMSNorm, {**shape, "shift": shift}, state, tried):
                return RMSNorm, {**shape, "shift": shift}
    if set(state) <= {"weight", "bias"} and _is(module, LayerNorm, {"bias": None, **shape}, state, tried):
        return LayerNorm, shape
    return None


def _is(
    module: nn.Module, cls: type[nn.Module], attributes: Mapping[str, Any], state: Mapping[str, Tensor], tried: tuple[Tensor, ...]
) -> bool:
    candidate = as_class(copy.copy(module), cls, attributes)
    return all(same(outcome(module, x, state), outcome(candidate, x, state), 1e-5) for x in tried)


def as_class(module: nn.Module, cls: type[nn.Module], attributes: Mapping[str, Any]) -> nn.Module:
    """The same module with another class, and attributes where it has none of that name."""
    module.__class__ = cls
    for name, value in attributes.items():
        if name != "bias" or not hasattr(module, "bias"):
            setattr(module, name, value)
    return module


# ---------------------------------------------------------------------------------------------------------------------
# MLPs


def roles_of(module: nn.Module) -> Roles | None:
    """What the submodules of an MLP do, found by trying the orders that they can stand in; None where it is no MLP.

    Linear layers (of this package by then), one activation, and dropouts are all that it has.
    """
    children = dict(module.named_children())
    linears = [name for name, child in children.items() if type(child) in (Linear, TransposedLinear)]
    dropouts = [name for name, child in children.items() if type(child) is nn.Dropout]
    others = [name for name in children if name not in linears + dropouts]
    if not 1 <= len(linears) <= 3 or len(others) != 1 or len(dropouts) > 2:
        return None
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    function = activation_of(children[others[0]])
    if own or function is None or not takes_one(module):
        return None
    for roles in _orders(linears, others[0], function, dropouts):
        if _plays(module, roles, {name: children[name] for name in linears}):
            return roles
    return None


def _orders(linears: list[str], activation: str, function: str, dropouts: list[str]) -> Iterator[Roles]:
    places = [*dropouts, None, None][: max(2, len(dropouts))]
    for order in permutations(linears):
        for between, behind in dict.fromkeys(permutations(places, 2)):
            if len(order) == 3 or (len(order) == 2 and between is None):
                first, last = order[:2], order[2] if len(order) == 3 else None
                yield Roles(first, activation, function, between, last, behind)
            if len(order) < 3:
                yield Roles(order[:1], activation, function, between, order[1] if len(order) == 2 else None, behind)


def _plays(module: nn.Module, roles: Roles, linears: Mapping[str, nn.Module]) -> bool:
    """Whether an MLP in these roles gives what the module gives, for small weights, in evaluation and in training."""
    state: dict[str, Tensor] = {}
    for number, (name, layer) in enumerate(linears.items()):
        sizes = (3, 5) if name == roles.last else (5, 3)
        transposed = isinstance(layer, TransposedLinear)
        state[f"{name}.weight"] = random(10 + number, *(sizes[::-1] if transposed else sizes))
        if layer.bias is not None:
            state[f"{name}.bias"] = random(20 + number, sizes[0])
    x = random(0, 2, 4, 3)
    for training in (False, True):
        with _dropping(module, training):
            candidate = as_class(copy.copy(module), MLP, {"roles": roles})
            if not same(outcome(module, x, state), outcome(candidate, x, state), 1e-5):
                return False
    return True


@contextmanager
def _dropping(module: nn.Module, training: bool) -> Iterator[None]:
    """The module with dropouts that drop, so that their places show."""
    modules = list(module.modules())
    before = [(m.training, getattr(m, "p", None)) for m in modules]
    for m in modules:
        m.training = training
        if type(m) is nn.Dropout:
            m.p = 0.5
    try:
        yield
    finally:
        for m, (was, p) in zip(modules, before, strict=True):
            m.training = was
            if type(m) is nn.Dropout:
                m.p = p  # type: ignore[assignment]
