"""Linear layers and the activations next to them, as the modules of a model have them, under whatever names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tdsl.nn.activation import applied
from tdsl.nn.linear import Linear, TransposedLinear, biases, direct, elementwise, linear, opened


class Activation(nn.Module):
    """An elementwise function of the language, "gelu_tanh" say."""

    def __init__(self, function: str):
        super().__init__()
        applied(function, "")
        self.function = function

    def forward(self, input: Tensor) -> Tensor:
        """The function of each element."""
        result: Tensor = elementwise(self.function)(input.dim(), input)
        return result

    def extra_repr(self) -> str:
        """The function."""
        return self.function


def activated(x: Tensor, layer: Linear | TransposedLinear, function: str) -> Tensor:
    """function(layer(x)), one program."""
    weight = "W[k,m]" if isinstance(layer, TransposedLinear) else "W[m,k]"
    program = linear(layer.bias is not None, function, weight=weight)
    result: Tensor = program(x.dim() - 1, x, layer.weight, *biases(layer.bias))
    return result


@dataclass(frozen=True, slots=True)
class Roles:
    """What the submodules of an MLP do, by name. first: one linear layer, or two where the first opens the second.

    activation: the module of that name; function: what it is in the language. between, behind: dropouts. last: the linear layer back.
    """

    first: tuple[str, ...]
    activation: str
    function: str
    between: str | None = None
    last: str | None = None
    behind: str | None = None


class MLP(nn.Module):
    """A module whose linear layers and activation are one program: first, activation, dropout, last, dropout.

    Submodules that are watched by hooks, or are others than they were, are called one by one.
    """

    roles: Roles

    def forward(self, x: Tensor) -> Tensor:
        """The layers in that order."""
        roles = self.roles
        first: list[Any] = [getattr(self, name) for name in roles.first]
        h: Tensor
        if not direct(*first):
            h = getattr(self, roles.activation)(first[0](x))
            h = h * first[1](x) if len(first) == 2 else h
        elif len(first) == 2:
            h = opened(x, first[0], first[1], roles.function)
        else:
            h = activated(x, first[0], roles.function)
        for name in (roles.between, roles.last, roles.behind):
            if name is not None:
                h = getattr(self, name)(h)
        return h


class Sequential(nn.Sequential):
    """torch.nn.Sequential, where a linear layer and the activation behind it are one program.

    known: the activations among its modules, and what they are in the language.
    """

    known: tuple[tuple[nn.Module, str], ...] = ()

    def forward(self, input: Any) -> Any:
        """The modules in their order."""
        modules = list(self)
        functions = {id(module): function for module, function in self.known}
        skipped = False
        for layer, following in zip(modules, [*modules[1:], None], strict=True):
            if skipped:
                skipped = False
                continue
            function = functions.get(id(following))
            if function is not None and following is not None and type(layer) is Linear and direct(layer) and not following._forward_hooks:
                input = activated(input, layer, function)
                skipped = True
            else:
                input = layer(input)
        return input
