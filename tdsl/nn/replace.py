"""The layers of a model made tdsl's, in place.

A module keeps its identity, parameters, hooks and place; its class is another one, as torch's own parametrizations and FSDP do it.
So optimizers, tied weights and state dicts go on as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from tdsl.nn.attention import MultiheadAttention
from tdsl.nn.conv import Conv1d, Conv2d
from tdsl.nn.conv import unsupported as unsupported_conv
from tdsl.nn.embedding import Embedding
from tdsl.nn.encoder import TransformerEncoderLayer
from tdsl.nn.huggingface import switch
from tdsl.nn.linear import Linear
from tdsl.nn.loss import CrossEntropyLoss, LinearCrossEntropyLoss
from tdsl.nn.mlp import MLP, Activation, Sequential
from tdsl.nn.norm import GroupNorm, LayerNorm, RMSNorm
from tdsl.nn.probe import activation_of, as_class, leaf_of, roles_of
from tdsl.nn.report import Change, Report

Check = Callable[[Any], str | None]


def _always(_: nn.Module) -> None:
    return None


# What replaces a class of torch exactly, and what says why it cannot.
LAYERS: dict[type[nn.Module], tuple[type[nn.Module], Check]] = {
    nn.Linear: (Linear, _always),
    nn.RMSNorm: (RMSNorm, _always),
    nn.LayerNorm: (LayerNorm, _always),
    nn.GroupNorm: (GroupNorm, _always),
    nn.Embedding: (Embedding, Embedding.unsupported),
    nn.Conv1d: (Conv1d, unsupported_conv),
    nn.Conv2d: (Conv2d, unsupported_conv),
    nn.CrossEntropyLoss: (CrossEntropyLoss, _always),
    nn.MultiheadAttention: (MultiheadAttention, MultiheadAttention.unsupported),
    nn.TransformerEncoderLayer: (TransformerEncoderLayer, TransformerEncoderLayer.unsupported),
}
if hasattr(nn, "LinearCrossEntropyLoss"):  # from torch 2.13 on
    LAYERS[nn.LinearCrossEntropyLoss] = (LinearCrossEntropyLoss, LinearCrossEntropyLoss.unsupported)
_RANDOM: tuple[type[nn.Module], ...] = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_REASONS = dict.fromkeys(_RANDOM, "it draws random numbers")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def replace(model: nn.Module, *, skip: Callable[[str, nn.Module], bool] | None = None) -> Report:
    """Makes the layers of a model tdsl's, in place, and says what it did and what it left, with the reason.

    Classes of torch.nn are matched exactly. Other modules are tried: norms, activations, linear layers with a transposed weight and
    MLPs are known by their values and gradients. In models of `transformers` the attention is tdsl's too. skip: given the path of a
    module and the module, says whether to leave it.

    >>> print(tdsl.nn.replace(model))
    """
    replacing = _Replacing(model, skip)
    for name, module in replacing.modules:
        replacing.leaf(name, module)
    for name, module in replacing.modules:
        replacing.around(name, module)
    done, left = switch(replacing.modules)
    replacing.replaced += done
    replacing.left += left
    return Report(tuple(replacing.replaced), tuple(replacing.left))


class _Replacing:
    """One call of replace()."""

    def __init__(self, model: nn.Module, skip: Callable[[str, nn.Module], bool] | None):
        self.modules = [(name, module) for name, module in model.named_modules() if not (skip and skip(name, module))]
        self.allowed = {id(module) for _, module in self.modules}
        self.replaced: list[Change] = []
        self.left: list[Change] = []
        self.found: dict[object, tuple[type[nn.Module], dict[str, Any]] | None] = {}

    def leaf(self, name: str, module: nn.Module) -> None:
        """A class of torch that is in the table, or a module without submodules."""
        kind = type(module)
        if kind.__module__.startswith("tdsl.nn."):
            return
        if kind in LAYERS:
            cls, unsupported = LAYERS[kind]
            reason = _odd(module) or unsupported(module)
            if reason:
                self.left.append(Change(name, kind.__name__, reason=reason))
            else:
                self._become(name, module, cls, {})
        elif kind is nn.modules.linear.NonDynamicallyQuantizableLinear:
            return  # a part of torch.nn.MultiheadAttention, which reads its parameters
        elif isinstance(module, tuple(LAYERS)):
            parent = next(c.__name__ for c in LAYERS if isinstance(module, c))
            self.left.append(Change(name, kind.__name__, reason=f"a subclass of torch.nn.{parent}"))
        elif next(module.children(), None) is None:
            self._foreign(name, module)

    def _foreign(self, name: str, module: nn.Module) -> None:
        """A module without submodules that is in no table."""
        kind = type(module)
        reason = _odd(module)
        if kind.__module__.startswith("torch.nn.") and not reason:
            alone = activation_of(module) is not None
            reason = "alone it is one kernel in torch too" if alone else _REASONS.get(kind, "tdsl.nn has no layer for it")
        found = None if reason else self._tried(module)
        if found is not None:
            self._become(name, module, *found)
        else:
            self.left.append(Change(name, kind.__name__, reason=reason or "it computes none of the layers of tdsl.nn"))

    def _tried(self, module: nn.Module) -> tuple[type[nn.Module], dict[str, Any]] | None:
        """What a module computes; tried once for modules that are alike."""
        plain = {k: v for k, v in vars(module).items() if isinstance(v, int | float | str | tuple) and k != "training"}
        shapes = tuple((n, tuple(p.shape)) for n, p in module.named_parameters())
        key = (type(module), shapes, repr(plain))
        if key not in self.found:
            activation = None if shapes else activation_of(module)
            self.found[key] = (Activation, {"function": activation}) if activation else leaf_of(module)
        return self.found[key]

    def around(self, name: str, module: nn.Module) -> None:
        """A module with submodules: what stands side by side in it may be one program."""
        if type(module) is nn.Sequential:
            self._sequence(name, module)
        elif type(module) is nn.TransformerEncoder:
            module.use_nested_tensor = False  # its layers would be handed tensors that only torch's fused kernel takes
        elif not type(module).__module__.startswith(("torch.nn.", "tdsl.nn.")) and next(module.children(), None) is not None:
            if _odd(module) or any(_odd(child) or id(child) not in self.allowed for child in module.children()):
                return
            roles = roles_of(module)
            if roles is not None:
                self._drop([f"{name}.{roles.activation}".lstrip(".")])
                self._become(name, module, MLP, {"roles": roles})

    def _sequence(self, name: str, module: nn.Sequential) -> None:
        """A Sequential with an activation behind a linear layer."""
        children = list(module)
        known = []
        for layer, following in pairwise(children):
            function = activation_of(following) if type(layer) is Linear and id(following) in self.allowed else None
            if function is not None:
                known.append((following, function))
        if known and not _odd(module):
            inside = {id(following) for following, _ in known}
            self._drop(f"{name}.{n}".lstrip(".") for n, child in enumerate(children) if id(child) in inside)
            self._become(name, module, Sequential, {"known": tuple(known)})

    def _drop(self, names: Iterable[str]) -> None:
        """Modules that are parts of another program now."""
        parts = set(names)
        self.left = [c for c in self.left if c.name not in parts]

    def _become(self, name: str, module: nn.Module, cls: type[nn.Module], attributes: dict[str, Any]) -> None:
        self.replaced.append(Change(name, type(module).__name__, f"tdsl.nn.{cls.__name__}"))
        as_class(module, cls, attributes)
        if isinstance(module, TransformerEncoderLayer):
            module.settle()


def _odd(module: nn.Module) -> str | None:
    """Why a module is not what its class says."""
    if "forward" in vars(module):
        return "its forward was replaced by another"
    if type(module).__call__ is not nn.Module.__call__:
        return "its class is called in a way of its own"
    for p in module.parameters(recurse=False):
        if type(p) not in (nn.Parameter, Tensor):
            return f"its parameters are of class {type(p).__name__}"
        if p.dtype not in _FLOATS:
            return f"its parameters are {str(p.dtype).removeprefix('torch.')}"
    return None
