"""RMSNorm, LayerNorm, GroupNorm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tdsl.nn.linear import biases
from tdsl.nn.ranked import Ranked, by_options


def _several(name: str, count: int) -> str:
    return ",".join(f"{name}{i}" for i in range(count))


@by_options
def rms_norm(dims: int, weight: bool, shift: float = 0.0) -> Ranked:
    """The program over the last `dims` dimensions. shift: what is added to the weight; 1 where it is kept as a difference from 1."""
    d, e = _several("d", dims), _several("e", dims)
    factor = f" * ({shift} + g[{d}])" if shift else f" * g[{d}]"
    return Ranked(f"""
def rms_norm(X[*n,{d}], eps{f", g[{d}]" if weight else ""}) -> Y[*n,{d}]:
    r[*n]     = rsqrt(mean[{e}](X[*n,{e}] * X[*n,{e}]) + eps)
    Y[*n,{d}] = X[*n,{d}] * r[*n]{factor if weight else ""}
""")


@by_options
def layer_norm(dims: int, weight: bool, bias: bool) -> Ranked:
    """The program over the last `dims` dimensions."""
    d, e = _several("d", dims), _several("e", dims)
    affine = (f" * g[{d}]" if weight else "") + (f" + b[{d}]" if bias else "")
    return Ranked(f"""
def layer_norm(X[*n,{d}], eps{f", g[{d}]" if weight else ""}{f", b[{d}]" if bias else ""}) -> Y[*n,{d}]:
    m[*n]     = mean[{e}](X[*n,{e}])
    r[*n]     = rsqrt(var[{e}](X[*n,{e}]) + eps)
    Y[*n,{d}] = (X[*n,{d}] - m[*n]) * r[*n]{affine}
""")


@by_options
def group_norm(affine: bool) -> Ranked:
    """The program; g groups of c channels each, and any number of other dimensions."""
    return Ranked(f"""
def group_norm(X[n,g,c,*s], eps{", w[g,c], b[g,c]" if affine else ""}) -> Y[n,g,c,*s]:
    m[n,g]      = mean[d,*t](X[n,g,d,*t])
    r[n,g]      = rsqrt(var[d,*t](X[n,g,d,*t]) + eps)
    Y[n,g,c,*s] = (X[n,g,c,*s] - m[n,g]) * r[n,g]{" * w[g,c] + b[g,c]" if affine else ""}
""")


def _like(result: Tensor, input: Tensor) -> Tensor:
    return result if result.dtype is input.dtype else result.to(input.dtype)


class RMSNorm(nn.RMSNorm):
    """torch.nn.RMSNorm. Without eps it is the machine epsilon of the input's dtype, as in torch.

    shift: what is added to the weight; 1 in models that keep it as a difference from 1.
    """

    shift: float = 0.0

    def forward(self, x: Tensor) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * (shift + weight), over the dimensions of normalized_shape."""
        dims = len(self.normalized_shape)
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        result: Tensor = rms_norm(dims, self.weight is not None, self.shift)(x.dim() - dims, x, eps, *biases(self.weight))
        return result


class LayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm."""

    def forward(self, input: Tensor) -> Tensor:
        """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias, over the dimensions of normalized_shape."""
        dims = len(self.normalized_shape)
        program = layer_norm(dims, self.weight is not None, self.bias is not None)
        return _like(program(input.dim() - dims, input, self.eps, *biases(self.weight, self.bias)), input)


class GroupNorm(nn.GroupNorm):
    """torch.nn.GroupNorm: [batch, channels, ..]."""

    def forward(self, input: Tensor) -> Tensor:
        """Each group of channels with mean 0 and variance 1, times weight, plus bias."""
        shape = (self.num_groups, self.num_channels // self.num_groups)
        affine = [p.unflatten(0, shape) for p in biases(self.weight, self.bias)]
        result = group_norm(bool(affine))(input.dim() - 2, input.unflatten(1, shape), self.eps, *affine)
        return _like(result.flatten(1, 2), input)
