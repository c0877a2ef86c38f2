"""The size that a signature gives to an output, kept where the output becomes an intermediate: a fill says it.

def f(x[n]) -> Y[2*n]: Y[i] += x[i]      -->      for n0 in 0:2*size(x, 0):  Y[n0] = 0
                                                  for i:  Y[i] += x[i]
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import copy

from tdsl.affine import Ranges
from tdsl.extents import Sizes, loop_ranges, symbolic_ranges
from tdsl.fills import covers_whole
from tdsl.ir import REDUCTION_OF, Access, Const, Expr, Index, Loop, Program, Range, Statement, free_indices, statements
from tdsl.ops import REDUCTIONS


def declared(flat: Program, sizes: Sizes) -> Iterator[Statement]:
    """A fill with the identity of its first write for each output whose declared size that write does not show.

    flat: with one name per version. sizes: of all its tensors that the text declares.
    """
    for output in flat.outputs:
        name = output.name
        if name in flat.inputs or name not in sizes.declared:
            continue
        first = next(node for node in flat.body if any(s.target.tensor == name for s in statements((node,))))
        s = next(s for s in statements((first,)) if s.target.tensor == name)
        around = loop_ranges(first, sizes) if isinstance(first, Loop) else {}
        if not (covers_whole(s, sizes, around) and _settled_without(name, s, sizes, around)):
            start = REDUCTIONS[REDUCTION_OF[s.op]].identity if s.op in REDUCTION_OF else 0
            yield fill(name, sizes.shapes[name], Const(int(start) if math.isfinite(start) else start))  # an int raises no dtype


def _settled_without(name: str, s: Statement, sizes: Sizes, around: Ranges) -> bool:
    """Whether the indices of a target have ranges where nothing declares its size."""
    bare = copy(sizes)
    bare.shapes = {tensor: shape for tensor, shape in sizes.shapes.items() if tensor != name}
    found = symbolic_ranges(s, bare, around)
    return all(i in found for e in s.target.subscripts for i in free_indices(e))


def fill(name: str, shape: tuple[Expr, ...], value: Const) -> Statement:
    """`name[n0,n1,..] = value` over a whole tensor of that shape."""
    indices = tuple(Index(f"n{d}") for d in range(len(shape)))
    ranges = tuple(Range(i.name, Const(0), size) for i, size in zip(indices, shape, strict=True))
    return Statement(ranges, Access(name, indices), "=", value)
