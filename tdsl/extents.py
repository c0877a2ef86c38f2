"""The range of every index as expressions: the rules of ranges.py, before any size is known.

    for n, x, r:  X.grad[n,2*x+r-1] += Y.grad[n,x] * W[r]
    -->
    n in 0:size(X, 0), x in 0:size(Y.grad, 1), r in 0:size(W, 0)

The swap rule needs them where an operand that settled an index is gone, a change of variable where it moves one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from tdsl.affine import Affine, Bound, Ranges, linear
from tdsl.ir import (
    Access,
    Call,
    Clamp,
    Const,
    Expr,
    Index,
    Loop,
    Pad,
    Program,
    Size,
    Statement,
    free_indices,
    reads,
    rebuild,
    statements,
    walk,
)


class Sizes:
    """The sizes of tensors as expressions over those of the parameters, as far as the text shows; `note` adds what a node writes."""

    def __init__(self, program: Program):
        self.shapes: dict[str, tuple[Expr, ...]] = {}
        self.names: dict[str, Expr] = {}  # the sizes that the signature names
        for param in program.params:
            for d, dim in enumerate(param.dims):
                self.names.setdefault(dim, Size(param.name, d))
            self.shapes[param.name] = tuple(self.names[dim] for dim in param.dims)
        self.declared = frozenset(self.shapes)
        for output in program.outputs:
            if output.sizes is not None and output.name not in self.shapes and None not in output.sizes:
                self.shapes[output.name] = tuple(self.canonical(e) for e in output.sizes if e is not None)
        self.declared = frozenset(self.shapes)

    def canonical(self, e: Expr) -> Expr:
        """`e` with every size in its first spelling."""
        if isinstance(e, Size):
            shape = self.shapes.get(e.tensor)
            return e if shape is None or e.dim >= len(shape) else shape[e.dim]
        return rebuild(e, self.canonical)

    def linear(self, e: Expr) -> Affine:
        """The linear form of an integer expression, sizes being equal where the text shows it."""
        return linear(self.canonical(e))

    def note(self, node: Statement | Loop, outer: Ranges | None = None) -> None:
        """Records the sizes of what a node writes first: a plain subscript has the extent of its index, any other a size of its own."""
        if isinstance(node, Loop):
            inside = {**(outer or {}), **loop_ranges(node, self)}
            for child in node.body:
                self.note(child, inside)
            return
        name = node.target.tensor
        if name in self.shapes:
            return
        found = symbolic_ranges(node, self, outer)
        solved = {r.index for r in node.ranges if r.lo is None}
        shape: list[Expr] = []
        for d, s in enumerate(node.target.subscripts):
            hi = as_expr(found[s.name][1]) if isinstance(s, Index) and s.name in found else Size(name, d)
            compound = isinstance(hi, Call) and isinstance(s, Index) and s.name in solved
            shape.append(Size(name, d) if compound else hi)  # what was solved for is spelled as the size that it gave
        self.shapes[name] = tuple(shape)


def as_expr(bound: Bound) -> Expr:
    """A bound as IR."""
    return Const(bound) if isinstance(bound, int) else bound


def as_bound(form: Affine) -> Bound:
    """A linear form as a bound: a number where it is one."""
    return form.expr() if form.terms else form.const


def loop_ranges(loop: Loop, sizes: Sizes) -> dict[str, tuple[Bound, Bound]]:
    """The ranges of an ordered loop's own indices, as far as explicit bounds and plain uses tell."""
    found: dict[str, tuple[Bound, Bound]] = {}
    for r in loop.ranges:
        if r.lo is not None and r.hi is not None:
            found[r.index] = as_bound(sizes.linear(r.lo)), as_bound(sizes.linear(r.hi))
            continue
        for s in statements((loop,)):
            bounds = next(_plain(r.index, s, sizes), None)
            if bounds is not None:
                found[r.index] = bounds
                break
    return found


def symbolic_ranges(s: Statement, sizes: Sizes, outer: Ranges | None = None) -> dict[str, tuple[Bound, Bound]]:
    """[lo, hi) of each index of a statement, those of `outer` (ordered loops around it) first; what nothing settles is missing.

    The order of the rules is that of ranges.py: explicit; plain; affine, as soon as the other indices have ranges; by name.
    """
    found: dict[str, tuple[Bound, Bound]] = dict(outer or {})
    for r in s.ranges:
        if r.lo is not None and r.hi is not None:
            found[r.index] = as_bound(sizes.linear(r.lo)), as_bound(sizes.linear(r.hi))
        else:
            bounds = next(_plain(r.index, s, sizes), None)
            if bounds is not None:
                found[r.index] = bounds
    while new := _affine(s, sizes, found):
        found.update(new)
    for r in s.ranges:
        if r.index not in found and r.index in sizes.names:
            found[r.index] = 0, sizes.names[r.index]
    order = [*(outer or {}), *s.indices]
    return {i: found[i] for i in order if i in found}


def _uses(s: Statement, sizes: Sizes) -> Iterator[Access]:
    """The accesses that can settle an index: reads, and the target where its size is known before."""
    yield from reads(s)
    if s.target.tensor in sizes.shapes:
        yield s.target


def _plain(index: str, s: Statement, sizes: Sizes) -> Iterator[tuple[Bound, Bound]]:
    for access in _uses(s, sizes):
        for d, e in enumerate(access.subscripts):
            if isinstance(e, Index) and e.name == index and access.tensor in sizes.shapes:
                yield 0, as_bound(sizes.linear(Size(access.tensor, d)))


def _affine(s: Statement, sizes: Sizes, found: Mapping[str, tuple[Bound, Bound]]) -> dict[str, tuple[Bound, Bound]]:
    """The largest ranges that keep all affine subscripts inside, for the indices that have no unsettled companion."""
    limits: dict[str, tuple[Affine, Affine]] = {}
    own = set(s.indices)
    for access in _uses(s, sizes):
        for d, e in enumerate(access.subscripts):
            frame = None if isinstance(e, Index | Clamp) else _frame(access, d, e, sizes)
            if frame is None:
                continue
            form = sizes.linear(e.value if isinstance(e, Pad) else e)
            for index in form.linear_indices:
                if index in found or index not in own or any(i != index and i not in found for i in form.indices):
                    continue
                limit = solve_symbolic(form, index, *frame, found)
                if limit is not None:
                    lo, hi = limits.get(index, limit)
                    limits[index] = _extremum("maximum", lo, limit[0]), _extremum("minimum", hi, limit[1])
    return {i: (as_bound(lo), as_bound(hi)) for i, (lo, hi) in limits.items()}


def _frame(access: Access, d: int, e: Expr, sizes: Sizes) -> tuple[Affine, Affine] | None:
    """[lo, hi) of what a subscript may be, None where it bounds nothing."""
    if access.tensor not in sizes.shapes:
        return None
    size = sizes.linear(Size(access.tensor, d))
    if not isinstance(e, Pad):
        return Affine(0), size
    if e.lo is None and e.hi is None:
        return None
    low, high = sizes.linear(e.lo or e.hi or Const(0)), sizes.linear(e.hi or e.lo or Const(0))
    return low.scale(-1), size + high


def _extremum(op: str, a: Affine, b: Affine) -> Affine:
    return linear(Call(op, (a.expr(), b.expr())))


def solve_symbolic(form: Affine, index: str, lo: Affine, hi: Affine, ranges: Ranges) -> tuple[Affine, Affine] | None:
    """`affine.solve` with expressions: the largest [a, b) of `index` for which lo <= form < hi whatever the other indices are."""
    c = form.coefficient(index)
    rest = form.without(index)
    if c == 0 or index in rest.indices:
        return None
    least, most = extreme(rest, ranges, low=True), extreme(rest, ranges, low=False)
    if least is None or most is None:
        return None
    low, high = lo - least, hi.shift(-1) - most  # low <= c * index <= high
    if c < 0:
        c, low, high = -c, high.scale(-1), low.scale(-1)
    first = linear(Call("floordiv", (low.scale(-1).expr(), Const(c)))).scale(-1)
    last = linear(Call("floordiv", (high.expr(), Const(c))))
    return first, last.shift(1)


def extreme(form: Affine, ranges: Ranges, *, low: bool) -> Affine | None:
    """The least (or greatest) value of `form` as an expression without indices, the innermost index replaced first."""
    for name in reversed(tuple(ranges)):
        c = form.coefficient(name)
        if c:
            lo, hi = ranges[name]
            bound = linear(as_expr(lo)) if (c > 0) == low else linear(as_expr(hi)).shift(-1)
            form = form.without(name) + bound.scale(c)
    return None if form.indices else form


def settled(s: Statement, wanted: Ranges, sizes: Sizes, outer: Ranges | None = None) -> Statement:
    """`s` with explicit ranges where its text alone would not give an index the range that is wanted."""
    while True:
        found = symbolic_ranges(s, sizes, outer)
        wrong = next((r for r in s.ranges if r.lo is None and r.index in wanted and found.get(r.index) != wanted[r.index]), None)
        if wrong is None:
            return s
        lo, hi = wanted[wrong.index]
        fixed = replace(wrong, lo=as_expr(lo), hi=as_expr(hi))
        s = replace(s, ranges=tuple(fixed if r is wrong else r for r in s.ranges))  # which may settle others, or unsettle them


def varies(bound: Expr) -> bool:
    """Whether a bound depends on indices or on the elements of a tensor."""
    return bool(free_indices(bound)) or any(isinstance(e, Access) and e.subscripts for e in walk(bound))
