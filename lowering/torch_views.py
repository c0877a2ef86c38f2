"""Affine reads as strided views: a window of a tensor, zeros around it where it reaches beyond the edge, takes no gather.

    X[n,c,pad(2*x+r-1)]   -->   (p := pad(X, (1, 1))).as_strided((N, C, X, R), (.., 2 * p.stride(2), p.stride(2)), ..)

The matrix product of such a view with the kernel is the convolution that libraries call im2col.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from lowering import tile_ir as ir
from tdsl.affine import linear
from tdsl.ir import Clamp, Index, Pad

# How many times larger the tensor with its zeros may be than the tensor: beyond it a gather takes less memory.
_GROWTH = 4


def strided(op: ir.Load, kernel: ir.Kernel, values: frozenset[str], length: Callable[[str], str]) -> tuple[str, bool] | None:
    """The text of a load as a view, and whether that is a tensor of its own; None where some subscript is not affine in loop
    indices, or an index runs both ways. values: names that are no loop indices. length: of a tile along an axis, as text."""
    forms = []
    pads = []
    for e, size in zip(op.subscripts, op.buffer.shape, strict=True):
        form = linear(e.value if isinstance(e, Pad) else e)
        if isinstance(e, Clamp) or any(not isinstance(atom, Index) or atom.name in values for atom, _ in form.terms):
            return None
        spans = [(c, kernel.axis_of(atom.name).extent - 1) for atom, c in form.terms if isinstance(atom, Index)]
        low = form.const + sum(min(0, c * n) for c, n in spans)
        high = form.const + sum(max(0, c * n) for c, n in spans)
        pads.append((max(0, -low), max(0, high - size + 1)) if isinstance(e, Pad) else (0, 0))
        forms.append(form)
    grown = math.prod(n + left + right for n, (left, right) in zip(op.buffer.shape, pads, strict=True))
    if grown > _GROWTH * math.prod(op.buffer.shape):
        return None
    base = op.buffer.name
    first = base
    if any(left or right for left, right in pads):
        zeros = ", ".join(f"{left}, {right}" for left, right in reversed(pads))
        base = f"{op.dst.name}_padded"
        first = f"({base} := torch.nn.functional.pad({op.buffer.name}, ({zeros})))"
    steps: dict[str, list[tuple[int, int]]] = {}
    offset = []
    for d, (form, (left, _)) in enumerate(zip(forms, pads, strict=True)):
        if form.const + left:
            offset.append(_times(form.const + left, f"{base}.stride({d})"))
        for atom, c in form.terms:
            assert isinstance(atom, Index)
            steps.setdefault(atom.name, []).append((c, d))
    backwards = set()
    for index, terms in steps.items():
        axis = kernel.axis_of(index)
        if any(c < 0 for c, _ in terms):
            if any(c > 0 for c, _ in terms):
                return None
            if not axis.scalar:
                backwards.add(axis.name)
        start = index if axis.scalar else _start(index, axis, reverse=axis.name in backwards)
        if start != "0":
            offset += [f"({start}) * {_times(c, f'{base}.stride({d})')}" for c, d in terms]
    sizes = "".join(length(a) + ", " for a in op.dst.axes)
    along = [" + ".join(_times(abs(c), f"{base}.stride({d})") for c, d in steps.get(a, ())) or "0" for a in op.dst.axes]
    strides = "".join(f"{s}, " for s in along)
    text = f"{first}.as_strided(({sizes}), ({strides}), {' + '.join([f'{base}.storage_offset()', *offset])})"
    if backwards:
        text = f"{text}.flip({', '.join(str(n) for n, a in enumerate(op.dst.axes) if a in backwards)})"
    return text, bool(backwards)


def _start(index: str, axis: ir.Axis, *, reverse: bool) -> str:
    """The value of an index at the first element of the view, before it is turned around."""
    if axis.role == "whole":
        return str(axis.extent - 1) if reverse else "0"
    return f"{index}_stop - 1" if reverse else f"{index}_start"


def _times(c: int, text: str) -> str:
    return text if c == 1 else f"{c} * {text}"
