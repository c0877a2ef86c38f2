"""Products of a tensor's windows with a kernel as calls of the library's convolution, which never writes the windows out.

    dot(X[n,c,pad(2*x+r-1)], W[o,c,r])  -> Y[n,o,x]      -->   torch.conv1d(X, W, stride=2, padding=1)
    dot(X[n,c,pad(2*x+r-1)], dY[n,o,x]) -> dW[o,c,r]     -->   torch.nn.grad.conv1d_weight(X, (O, C, R), dY, stride=2, padding=1)

Only where each index stands matters: a spatial dimension is read at a*x + b*r + const, and one of x and r is summed. Both forms are the
same sum; the one with fewer taps than places is the one that the library is made for.
The gradient of the input has the form of the first, once it is a gather.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from lowering import tile_ir as ir
from tdsl.affine import linear
from tdsl.ir import Clamp, Index, Pad


@dataclass(frozen=True, slots=True)
class Window:
    """A spatial dimension: place index along `dim` = stride * at + dilation * tap + first. at: an axis of the result or of its gradient."""

    dim: int
    at: str
    tap: str
    stride: int
    dilation: int
    first: int


@dataclass(frozen=True, slots=True)
class Convolution:
    """image: the load of what is convolved. other: the kernel, or the gradient of the result where `weight`. batch, channel, made: axes of
    the image's batch and channel and of the result's channel, each at most one. windows: 1 to 3. padding: as the library takes it, or None."""

    image: ir.Load
    other: ir.Value
    weight: bool
    batch: tuple[str, ...]
    channel: tuple[str, ...]
    made: tuple[str, ...]
    windows: tuple[Window, ...]
    padding: tuple[int, ...] | None

    def source(self, kernel: ir.Kernel) -> str:
        """The image as (batch, channel, places..), padded where the library does not pad as the program does."""
        b = self.image.buffer
        text, starts, sizes = b.name, [0] * len(b.shape), [*b.shape]
        if self.padding is None:
            zeros = [(0, 0)] * len(b.shape)
            for w in self.windows:
                left = max(0, -w.first)
                zeros[w.dim] = left, max(0, w.first + _reach(w, kernel) - b.shape[w.dim])
                starts[w.dim], sizes[w.dim] = w.first + left, b.shape[w.dim] + sum(zeros[w.dim])
            if any(any(z) for z in zeros):
                text = f"torch.nn.functional.pad({text}, ({', '.join(f'{a}, {z}' for a, z in reversed(zeros))}))"
        names = {e.name: d for d, e in enumerate(self.image.subscripts) if isinstance(e, Index)}
        lengths = {d: kernel.axis_of(i).extent for i, d in names.items()}
        if self.padding is None:
            lengths |= {w.dim: _reach(w, kernel) for w in self.windows}
        parts = [
            f"{first or ''}:{first + lengths[d]}" if d in lengths and (first or lengths[d] != size) else ":"
            for d, (first, size) in enumerate(zip(starts, sizes, strict=True))
        ]
        if any(part != ":" for part in parts):
            text = f"{text}[{', '.join(parts)}]"
        order = [*(names[i] for i in (*self.batch, *self.channel)), *(w.dim for w in self.windows)]
        return _arranged(text, order, [bool(self.batch), bool(self.channel)])

    def call(self, dot: ir.Dot, kernel: ir.Kernel) -> str:
        """The product's result, in the order of its axes."""
        n = len(self.windows)
        taps, at = [w.tap for w in self.windows], [w.at for w in self.windows]
        numbers = {
            "stride": tuple(w.stride for w in self.windows),
            "padding": self.padding or (0,) * n,
            "dilation": tuple(w.dilation for w in self.windows),
        }
        options = "".join(f", {key}={value}" for key, value in numbers.items() if value != ((0,) if key == "padding" else (1,)) * n)
        axes = [*self.batch, *self.made, *at] if self.weight else [*self.made, *self.channel, *taps]
        there = [bool(self.batch), bool(self.made)] if self.weight else [bool(self.made), bool(self.channel)]
        other = _arranged(self.other.name, [self.other.axes.index(a) for a in axes], there)
        if self.weight:
            shape = [kernel.axis(g[0]).extent if g else 1 for g in (self.made, self.channel)] + [kernel.axis(t).extent for t in taps]
            text = f"torch.nn.grad.conv{n}d_weight({self.image.dst.name}, {tuple(shape)}, {other}{options})"
            lead, made = (self.made, self.channel), [*self.made, *self.channel, *taps]
        else:
            text = f"torch.conv{n}d({self.image.dst.name}, {other}{options})"
            lead, made = (self.batch, self.made), [*self.batch, *self.made, *at]
        if not all(lead):
            text = f"{text}[{', '.join(':' if g else '0' for g in lead)}]"
        if made != list(dot.dst.axes):
            text = f"{text}.permute({', '.join(str(made.index(a)) for a in dot.dst.axes)})"
        return text


def convolution(dot: ir.Dot, loads: Mapping[str, ir.Load], kernel: ir.Kernel, values: Collection[str]) -> Convolution | None:
    """What convolution a product is, if it is one that the library has. values: names in subscripts that are no loop indices."""
    if dot.acc is not None or dot.batch or dot.dst.dtype != "float32" or any(a.role != "whole" or len(a.indices) != 1 for a in kernel.axes):
        return None
    for image, other in ((dot.lhs, dot.rhs), (dot.rhs, dot.lhs)):
        load = loads.get(image.name)
        if (
            load is not None
            and load.buffer.dtype == other.dtype == "float32"
            and all(kernel.axis(a).extent for a in (*image.axes, *other.axes))
        ):
            found = _matched(dot, load, other, kernel, values)
            if found is not None:
                return found
    return None


def _matched(dot: ir.Dot, load: ir.Load, other: ir.Value, kernel: ir.Kernel, values: Collection[str]) -> Convolution | None:
    single: list[str] = []
    pairs: list[tuple[int, list[tuple[str, int]], int]] = []
    for d, e in enumerate(load.subscripts):
        form = linear(e.value if isinstance(e, Pad) else e)
        if isinstance(e, Clamp) or any(not isinstance(a, Index) or a.name in values for a, _ in form.terms):
            return None
        terms = [(a.name, c) for a, c in form.terms if isinstance(a, Index)]
        if isinstance(e, Index):
            single.append(e.name)
        elif len(terms) == 2 and all(c > 0 for _, c in terms):
            pairs.append((d, terms, form.const))
        else:
            return None
    inside = [*single, *(name for _, terms, _ in pairs for name, _ in terms)]
    if not 1 <= len(pairs) <= 3 or len({*inside}) < len(inside):
        return None
    apart = [_apart(terms, other, dot) for _, terms, _ in pairs]
    if not all(apart):
        return None
    size = {name: kernel.axis_of(name).extent for name in inside}
    weight = math.prod(size[b] for _, (b, _) in apart) > math.prod(size[a] for (a, _), _ in apart)  # few taps against many places
    found = tuple(
        Window(d, b, a, cb, ca, first) if weight else Window(d, a, b, ca, cb, first)
        for (d, _, first), ((a, ca), (b, cb)) in zip(pairs, apart, strict=True)
    )
    summed = tuple(i for i in single if i in dot.contract and i in other.axes)
    kept = tuple(i for i in single if i in dot.dst.axes and i not in other.axes)
    batch, channel = (summed, kept) if weight else (kept, summed)
    along = {w.at if weight else w.tap for w in found}
    made = tuple(a for a in other.axes if a not in along and a not in summed)
    if len(summed) + len(kept) < len(single) or max(len(batch), len(channel), len(made)) > 1 or any(a not in dot.dst.axes for a in made):
        return None
    return Convolution(load, other, weight, batch, channel, made, found, _padding(load, found, kernel))


def _apart(terms: list[tuple[str, int]], other: ir.Value, dot: ir.Dot) -> tuple[tuple[str, int], ...]:
    """The index of a dimension that is only in the result, and the one that is summed with the other operand; () where it is not so."""
    for a, b in (terms, terms[::-1]):
        if a[0] in dot.dst.axes and a[0] not in other.axes and b[0] in dot.contract and b[0] in other.axes:
            return a, b
    return ()


def _reach(w: Window, kernel: ir.Kernel) -> int:
    """How many places a window reads, from its first to its last."""
    return w.stride * (kernel.axis_of(w.at).extent - 1) + w.dilation * (kernel.axis_of(w.tap).extent - 1) + 1


def _padding(load: ir.Load, windows: tuple[Window, ...], kernel: ir.Kernel) -> tuple[int, ...] | None:
    """Zeros on both sides as the library adds them, where they give what the program reads."""
    found = []
    for w in windows:
        room = load.buffer.shape[w.dim] - 2 * w.first - w.dilation * (kernel.axis_of(w.tap).extent - 1) - 1
        if w.first > 0 or room < 0 or room // w.stride + 1 != kernel.axis_of(w.at).extent:
            return None
        found.append(-w.first)
    return tuple(found)


def _arranged(text: str, order: list[int], there: list[bool]) -> str:
    """A tensor with its dimensions in an order, and one of a single element where the library wants a batch or a channel."""
    if order != sorted(order):
        text = f"{text}.permute({', '.join(map(str, order))})"
    return text if all(there) else f"{text}[{', '.join(':' if t else 'None' for t in there)}]"
