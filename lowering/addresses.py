"""How far apart in memory the elements lie that neighbours along an axis read: what vector code of a CPU depends on."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from tdsl.affine import linear
from tdsl.ir import Clamp, Expr, Index, Pad, free_indices


def step(subscripts: Sequence[Expr], strides: Sequence[int], index: str, values: Collection[str] = ()) -> int | None:
    """Elements between neighbours along `index` (0 where the access does not vary along it), None where that is not one number.

    values: names among the subscripts' indices that are tensor values, not loop indices.
    """
    total = 0
    for e, stride in zip(subscripts, strides, strict=True):
        if isinstance(e, Clamp) and index in free_indices(e):
            return None
        form = linear(e.value if isinstance(e, Pad) else e)
        for atom, c in form.terms:
            if isinstance(atom, Index) and atom.name not in values:
                total += c * stride if atom.name == index else 0
            elif index in free_indices(atom):
                return None
    return total


def axis_step(
    subscripts: Sequence[Expr], strides: Sequence[int], indices: Sequence[tuple[str, int]], values: Collection[str] = ()
) -> int | None:
    """`step` along an axis that stands for several (index, extent), outermost first."""
    inner = step(subscripts, strides, indices[-1][0], values)
    below = 1
    for (index, _), (_, extent) in zip(reversed(indices[:-1]), reversed(indices[1:]), strict=True):
        below *= extent
        outer = step(subscripts, strides, index, values)
        if inner is None or outer != inner * below:
            return None
    return inner


def with_axes(text: str, have: Sequence[str], want: Sequence[str]) -> str:
    """The text of a value, in torch or Triton, with a new axis wherever `want` has one that it does not vary along."""
    if not have or tuple(have) == tuple(want):
        return text
    return f"{text}[{', '.join(':' if a in have else 'None' for a in want)}]"
