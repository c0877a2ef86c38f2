"""Convolutions."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tdsl.errors import Unsupported
from tdsl.nn.linear import biases
from tdsl.nn.ranked import Ranked, by_options

Sizes = tuple[int, ...]


def _place(x: str, r: str, stride: int, before: int, after: int, dilation: int) -> str:
    """The subscript of the input for output x and tap r; with zeros before and after."""
    at = f"{stride}*{x}+{dilation}*{r}"
    return at if before == after == 0 else f"pad({at}-{before}, {before}, {after})"


@by_options
def conv(stride: Sizes, padding: tuple[tuple[int, int], ...], dilation: Sizes, grouped: bool, bias: bool) -> Ranked:
    """The program of a convolution; one entry of each argument per dimension."""
    xs, rs = [f"x{i}" for i in range(len(stride))], [f"r{i}" for i in range(len(stride))]
    places = ",".join(_place(x, r, s, *p, d) for x, r, s, p, d in zip(xs, rs, stride, padding, dilation, strict=True))
    x, r, g = ",".join(xs), ",".join(rs), "g," if grouped else ""
    names = ",".join(f"u{i}" for i in range(len(stride)))
    given = f"X[*n,{g}c,{names}], W[{g}o,c,{r}]"
    if not bias:
        return Ranked(f"def conv({given}) -> Y[*n,{g}o,{x}]: Y[*n,{g}o,{x}] += X[*n,{g}c,{places}] * W[{g}o,c,{r}]")
    return Ranked(f"""
def conv({given}, b[{g}o]) -> Y[*n,{g}o,{x}]:
    Z[*n,{g}o,{x}] += X[*n,{g}c,{places}] * W[{g}o,c,{r}]
    Y[*n,{g}o,{x}]  = Z[*n,{g}o,{x}] + b[{g}o]
""")


def unsupported(layer: nn.Conv1d | nn.Conv2d) -> str | None:
    """What of a convolution of torch these do not do."""
    return None if layer.padding_mode == "zeros" else f"padding_mode={layer.padding_mode!r} is not written"


def _checked(layer: nn.Conv1d | nn.Conv2d) -> None:
    reason = unsupported(layer)
    if reason:
        raise Unsupported(
            f"tdsl.nn.{type(layer).__name__}: {reason}", help="pad the input by torch.nn.functional.pad, and convolve with padding=0"
        )


def _padding(layer: nn.Conv1d | nn.Conv2d) -> tuple[tuple[int, int], ...]:
    """Zeros before and after, per dimension."""
    if layer.padding == "valid":
        return tuple((0, 0) for _ in layer.kernel_size)
    if layer.padding == "same":
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((int(p), int(p)) for p in layer.padding)


def _forward(layer: nn.Conv1d | nn.Conv2d, input: Tensor) -> Tensor:
    grouped = layer.groups > 1
    program = conv(layer.stride, _padding(layer), layer.dilation, grouped, layer.bias is not None)
    batch = input.dim() - 1 - len(layer.stride)
    given = biases(layer.weight, layer.bias)
    if grouped:
        input = input.unflatten(batch, (layer.groups, -1))
        given = tuple(p.unflatten(0, (layer.groups, -1)) for p in given)
    result: Tensor = program(batch, input, *given)
    return result.flatten(batch, batch + 1) if grouped else result


class Conv1d(nn.Conv1d):
    """torch.nn.Conv1d: [batch, in_channels, length], or without a batch. Raises Unsupported for a padding_mode other than "zeros"."""

    def __init__(self, *args: Any, **named: Any):
        super().__init__(*args, **named)
        _checked(self)

    def forward(self, input: Tensor) -> Tensor:
        """The convolution."""
        return _forward(self, input)


class Conv2d(nn.Conv2d):
    """torch.nn.Conv2d: [batch, in_channels, height, width], or without a batch. Raises Unsupported for a padding_mode other than "zeros"."""

    def __init__(self, *args: Any, **named: Any):
        super().__init__(*args, **named)
        _checked(self)

    def forward(self, input: Tensor) -> Tensor:
        """The convolution."""
        return _forward(self, input)
