"""Linear layers: with an activation and a residual, transposed, gated, and with a low-rank adapter."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from tdsl.errors import ArgumentError
from tdsl.nn.activation import applied
from tdsl.nn.ranked import Ranked, by_options


@by_options
def linear(bias: bool, activation: str | None = None, residual: bool = False, weight: str = "W[m,k]") -> Ranked:
    """The program of a linear layer and of what stands behind it."""
    z = applied(activation, "Z[*n,m] + b[m]" if bias else "Z[*n,m]")
    return Ranked(f"""
def linear(X[*n,k], {weight}{", b[m]" if bias else ""}{", R[*n,m]" if residual else ""}) -> Y[*n,m]:
    Z[*n,m] += X[*n,k] * {weight}
    Y[*n,m]  = {z}{" + R[*n,m]" if residual else ""}
""")


@by_options
def elementwise(function: str) -> Ranked:
    """The program of an activation alone."""
    return Ranked(f"def {function}(X[*n]) -> Y[*n]: Y[*n] = {applied(function, 'X[*n]')}")


@by_options
def gated(bias: bool, activation: str | None = "silu") -> Ranked:
    """The program of two linear layers, one of which opens the other."""
    a, b = ("A[*n,m] + a[m]", "B[*n,m] + b[m]") if bias else ("A[*n,m]", "B[*n,m]")
    return Ranked(f"""
def gated(X[*n,k], W[m,k], U[m,k]{", a[m], b[m]" if bias else ""}) -> Y[*n,m]:
    A[*n,m] += X[*n,k] * W[m,k]
    B[*n,m] += X[*n,k] * U[m,k]
    Y[*n,m]  = {applied(activation, a)} * ({b})
""")


@by_options
def adapted(bias: bool) -> Ranked:
    """The program of a linear layer with a low-rank adapter."""
    return Ranked(f"""
def adapted(X[*n,k], W[m,k], A[r,k], B[m,r], scale{", b[m]" if bias else ""}) -> Y[*n,m]:
    L[*n,r] += X[*n,k] * A[r,k]
    D[*n,m] += L[*n,r] * B[m,r]
    Z[*n,m] += X[*n,k] * W[m,k]
    Y[*n,m]  = Z[*n,m] + scale * D[*n,m]{" + b[m]" if bias else ""}
""")


def biases(*given: Tensor | None) -> tuple[Tensor, ...]:
    """Those that are there."""
    return tuple(b for b in given if b is not None)


def direct(*layers: nn.Module) -> bool:
    """Whether layers do no more than multiply by their weights, so that a program may do it in their place: nobody has put others
    there, or watches them by hooks."""
    for layer in layers:
        kind = type(layer)
        if kind is not nn.Linear and kind is not TransposedLinear and not (kind is Linear and layer.activation is None):
            return False
        if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
            return False
    return True


class Linear(nn.Linear):
    """torch.nn.Linear, then an activation, then the sum with a residual: [.., in_features] -> [.., out_features].

    activation: a name out of tdsl.ops, "gelu" say. Raises UnknownFunction for another.
    """

    activation: str | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        applied(activation, "")
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """activation(input @ weight.T + bias) + residual."""
        program = linear(self.bias is not None, self.activation, residual is not None)
        result: Tensor = program(input.dim() - 1, input, self.weight, *biases(self.bias, residual))
        return result

    def extra_repr(self) -> str:
        """The arguments."""
        return super().extra_repr() + (f", activation={self.activation}" if self.activation else "")


class TransposedLinear(nn.Module):
    """A linear layer that keeps its weight as [in_features, out_features], as GPT-2 does."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device: Any = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_features, out_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        nn.init.normal_(self.weight, std=1 / math.sqrt(in_features))

    def forward(self, input: Tensor) -> Tensor:
        """input @ weight + bias."""
        program = linear(self.bias is not None, weight="W[k,m]")
        result: Tensor = program(input.dim() - 1, input, self.weight, *biases(self.bias))
        return result

    def extra_repr(self) -> str:
        """The sizes."""
        return f"in_features={self.weight.shape[0]}, out_features={self.weight.shape[1]}, bias={self.bias is not None}"


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)), with the names that Llama's has: [.., in_features] -> [.., in_features].

    The product of gate and up is one program; neither factor is in memory.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        activation: str | None = "silu",
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        applied(activation, "")
        self.activation = activation
        self.gate_proj = Linear(in_features, hidden_features, bias, device, dtype)
        self.up_proj = Linear(in_features, hidden_features, bias, device, dtype)
        self.down_proj = Linear(hidden_features, in_features, bias, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        """The gated layers, then the one back."""
        gate, up = self.gate_proj, self.up_proj
        if direct(gate, up):
            h = opened(input, gate, up, self.activation)
        else:
            h = gate(input)
            h = (h if self.activation is None else elementwise(self.activation)(h.dim(), h)) * up(input)
        result: Tensor = self.down_proj(h)
        return result

    def extra_repr(self) -> str:
        """The activation."""
        return f"activation={self.activation}"


def opened(input: Tensor, gate: nn.Linear, up: nn.Linear, activation: str | None) -> Tensor:
    """activation(gate(input)) * up(input), by the parameters of two linear layers."""
    program = gated(gate.bias is not None, activation)
    result: Tensor = program(input.dim() - 1, input, gate.weight, up.weight, *biases(gate.bias, up.bias))
    return result


class LoRA(nn.Linear):
    """A linear layer whose weight stays, with an adapter of low rank that learns: W x + alpha / rank * B A x (Hu et al. 2021).

    Its state dict is that of torch.nn.Linear and `lora_A` [rank, in_features], `lora_B` [out_features, rank]; B starts at zero.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: float | None = None,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        self._adapt(rank, alpha)

    def _adapt(self, rank: int, alpha: float | None) -> None:
        if rank < 1:
            raise ArgumentError(f"an adapter of rank {rank} adapts nothing", help="give a rank from 1 on")
        self.rank = rank
        self.alpha = float(rank if alpha is None else alpha)
        for kept in biases(self.weight, self.bias):
            kept.requires_grad_(False)
        self.lora_A = nn.Parameter(self.weight.new_empty(rank, self.in_features))
        self.lora_B = nn.Parameter(self.weight.new_zeros(self.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    @classmethod
    def around(cls, layer: nn.Linear, rank: int, alpha: float | None = None) -> LoRA:
        """An adapter around a layer, whose parameters it shares, and which no longer asks for their gradients."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.in_features, made.out_features = layer.in_features, layer.out_features
        made.weight, made.bias = layer.weight, layer.bias
        made._adapt(rank, alpha)
        made.train(layer.training)
        return made

    def forward(self, input: Tensor) -> Tensor:
        """The layer and its adapter, one program."""
        program = adapted(self.bias is not None)
        scale = self.alpha / self.rank
        result: Tensor = program(input.dim() - 1, input, self.weight, self.lora_A, self.lora_B, scale, *biases(self.bias))
        return result

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{super().extra_repr()}, rank={self.rank}, alpha={self.alpha:g}"
