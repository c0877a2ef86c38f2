"""What must hold of the accesses of a statement: proved here from its ranges, or left to one check per call, or an error.

    for i in 0:5:  Y[i] = X[i+1]                 X has 6 elements: proved; it has 5: BoundsError
    Y[dst[e],d] = m[e,d]                         dst is inside, and no two of its values are equal: a Check each
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from tdsl.affine import Bound, Extent, is_injective
from tdsl.errors import BoundsError, IndexError_, NotInjective, RangeError, SelfRead, counted
from tdsl.ir import REDUCTION_OF, Access, Clamp, Expr, Index, Pad, Reduce, free_indices, substitute
from tdsl.meeting import never_meet, same_element
from tdsl.ranges import Loops, Node, Placed, Scope, Use, text_of

Shapes = Mapping[str, tuple[int, ...]]


class Check(NamedTuple):
    """What must be checked once per call, for all points of `ranges` (index, lo, hi; outermost first).

    kind "bounds": 0 <= access.subscripts[dimension] < the size of that dimension. kind "injective": no two points give the same
    subscripts in one step of the ordered loops around the statement (those that a Pad drops do not count; dimension is -1).
    Indices have names of their own where one hides another.
    """

    statement: int
    access: Access
    dimension: int
    kind: str
    ranges: tuple[tuple[str, Bound, Bound], ...]


def in_bounds(node: Node, use: Use, shapes: Shapes, inputs: Collection[str]) -> Iterator[Check]:
    """What is left to check so that an access stays inside its tensor. Raises BoundsError where it surely does not.

    inputs: tensors whose sizes the caller gives.
    """
    if any(loop.empty for loop in use.scope.loops.values()):
        return
    for dim, s in enumerate(use.access.subscripts):
        size = shapes[use.access.tensor][dim]
        if isinstance(s, Index):
            loop = use.scope.loops[use.source.subscripts[dim].name]  # type: ignore[union-attr]
            if loop.bounds == (0, size):
                continue
        if isinstance(s, Pad) or (isinstance(s, Clamp) and size > 0):
            continue
        form, (least, most) = node.extent(s)
        if least >= 0 and most < size:
            continue
        if node.exact(form) or isinstance(s, Clamp):
            raise _outside(use, dim, size, (least, most), use.access.tensor in inputs)
        yield _check(node, use, dim, "bounds", free_indices(s))


def _outside(use: Use, dim: int, size: int, extent: Extent, given: bool) -> BoundsError:
    least, most = extent
    source = use.source.subscripts[dim]
    name, text = use.source.tensor, text_of(source)
    reach = f"is {int(least)}" if least == most else f"runs over {int(least)}:{int(most) + 1}"
    loops = [loop.name for loop in use.scope.loops.values() if loop.name in free_indices(source)]
    mend = f"write `pad({text})` to {'drop what lies' if use.write else 'read zeros'} there"
    if isinstance(source, Clamp):
        mend = "nothing is nearest in an empty tensor; give a range that is empty as well"
    elif loops:
        mend = f"give a smaller range, `for {loops[0]} in lo:hi`, or {mend}"
    if not given and most >= size:
        mend += f"; {name} is as large as its first write makes it, unless the signature gives its size"
    return BoundsError(
        f"subscript {text} of {name} {reach}, but dimension {dim} of {name} has size {size}",
        span=getattr(source, "span", None) or use.source.span,
        help=mend,
    )


def injective(node: Node, placed: Placed, shapes: Shapes) -> Iterator[Check]:
    """What is left to check so that `=` writes no element twice. Raises NotInjective where it surely does, IndexError_ where it reduces."""
    s = placed.statement
    if s.op != "=":
        return
    if s.reduced:
        span = next((r.span for r in s.ranges if r.index == s.reduced[0]), None) or s.span
        raise IndexError_(f"index {s.reduced[0]} is not on the left of `=`", span=span, help="write `+=` to sum over it")
    own = {placed.scope.loops[name].key: placed.scope.loops[name] for name in s.indices}
    if any(loop.empty for loop in placed.scope.loops.values()):
        return
    forms = []
    for dim, subscript in enumerate(placed.target.access.subscripts):
        form, (least, most) = node.extent(subscript)
        if not isinstance(subscript, Clamp) or (least >= 0 and most < shapes[s.target.tensor][dim]):
            forms.append(form)
    ranges = {key: loop.bounds for key, loop in own.items() if loop.bounds is not None}
    outer = [loop.key for loop in placed.outer.loops.values()]
    if is_injective(forms, ranges, outer):
        return
    points, room = 1, 1
    for lo, hi in ranges.values():
        points *= hi - lo if isinstance(lo, int) and isinstance(hi, int) else 0
    for size in shapes[s.target.tensor]:
        room *= size
    if points > room and not any(isinstance(e, Pad) for e in s.target.subscripts):
        raise NotInjective(
            f"`=` would write {points} values to the {counted(room, 'element')} of {s.target.tensor}",
            span=s.target.span,
            help="write `+=` to sum them",
        )
    every = tuple(loop.key for loop in placed.scope.loops.values())
    yield _check(node, placed.target, -1, "injective", every)


def not_of_nothing(placed: Placed) -> None:
    """Raises RangeError where a statement makes the maximum of nothing."""
    s = placed.statement
    if s.op in ("max=", "min="):
        loops = placed.scope.loops
        empty = [i for i in s.reduced if loops[i].empty]
        if empty and not any(loops[i].empty for i in loops if i not in empty):
            raise RangeError(
                f"`{s.op}` over index {empty[0]}, whose range is empty, has no value",
                span=s.span,
                help=f"give it one: `{s.target.tensor}[..] = {REDUCTION_OF[s.op]}[{empty[0]}](.., init=..)`",
            )


def _check(node: Node, use: Use, dim: int, kind: str, indices: tuple[str, ...]) -> Check:
    """A check over the loops that `indices` (keys) depend on; keys become names again where these are distinct."""
    needed = set(indices)
    loops: list[Loops] = []
    for loop in reversed(node.loops):
        if loop.key in needed and loop.bounds is not None:
            loops.insert(0, loop)
            needed |= {i for b in loop.bounds if not isinstance(b, int) for i in free_indices(b)}
    names: dict[str, Expr] = {loop.key: Index(loop.name) for loop in loops}
    if len({loop.name for loop in loops}) < len(loops):
        names = {}
    access = substitute(use.access, names)
    assert isinstance(access, Access)
    points = []
    for loop in loops:
        assert loop.bounds is not None
        lo, hi = (b if isinstance(b, int) else substitute(b, names) for b in loop.bounds)
        points.append((loop.name if names else loop.key, lo, hi))
    return Check(use.statement, access, dim, kind, tuple(points))


def nonempty(reduction: Reduce, loops: tuple[Loops, ...], scope: Scope) -> None:
    if reduction.op in ("sum", "prod", "logsumexp") or reduction.init is not None:
        return
    empty = [loop.name for loop in loops if loop.empty]
    if empty and not any(loop.empty for loop in scope.loops.values()):
        raise RangeError(
            f"{reduction.op} over index {empty[0]}, whose range is empty, has no value",
            span=reduction.span,
            help=f"give it one: `{reduction.op}[{empty[0]}](.., init=..)`" if reduction.op in ("max", "min") else "leave empty tensors out",
        )


def self_reads(node: Node, placed: Placed) -> None:
    """A statement may read its own target where it writes it, if it does not reduce, or at what other ordered steps write."""
    s = placed.statement
    for use in node.uses:
        if use.write or use.statement != placed.number or use.access.tensor != s.target.tensor:
            continue
        if (not s.reduced and _own(placed, use)) or _apart(node, placed, use):
            continue
        raise SelfRead(
            f"{s.target.tensor} is read while it is written, at other elements or several times per element",
            span=use.source.span or s.span,
            help="write `for ordered i:` for a recurrence over i, or give the result a name of its own",
        )


def _own(placed: Placed, use: Use) -> bool:
    """Whether all that is read of what a step writes is the very element that is written with it: `H[t,d] = .. H[parent[t],d] ..`."""
    pairs = list(zip(placed.target.access.subscripts, use.access.subscripts, strict=True))
    inside = {loop.key for loop in placed.scope.loops.values()} - {loop.key for loop in placed.outer.loops.values()}
    return all(w == r for w, r in pairs) or same_element(pairs, inside)


def _apart(node: Node, placed: Placed, use: Use) -> bool:
    """Whether within one step of the ordered loops no element that is read is written."""
    outer = {loop.key for loop in placed.outer.loops.values()}
    if not outer:
        return False
    other = {loop.key: f"{loop.key}~" for loop in placed.scope.loops.values() if loop.key not in outer}
    ranges = {**node.ranges, **{other[k]: b for k, b in node.ranges.items() if k in other}}
    pairs = zip(placed.target.access.subscripts, use.access.subscripts, strict=True)
    return never_meet(pairs, other, ranges, node.sizes.known)
