"""What the rules of the language forbid in one statement. Both spellings call it; every message says how to mend."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from tdsl.affine import linear
from tdsl.errors import DtypeError, IndexError_, ParseError, SelfRead
from tdsl.ir import (
    Access,
    Call,
    Clamp,
    Const,
    Expr,
    Index,
    Pad,
    Range,
    Reduce,
    Size,
    Softmax,
    Statement,
    bounds,
    children,
    free_indices,
    walk,
)
from tdsl.ops import OPERATORS

INTEGER_OPS = frozenset({"add", "sub", "mul", "floordiv", "mod", "neg", "maximum", "minimum"})


def statement(s: Statement, loops: tuple[str, ...], explicit: Collection[str], extents: Mapping[str, Size]) -> None:
    """Check one resolved statement that stands in the ordered loops over `loops` and whose `for` line names `explicit`.

    extents: the sizes that the signature names, for the help of a message.
    Raises DtypeError, ParseError, IndexError_ or SelfRead.
    """
    for e in (*bounds(s.ranges), s.target, s.value):
        _forms(e)
    used = {name for e in (*bounds(s.ranges), s.target, s.value) for name in _free(e, frozenset())}  # a softmax alone brings no index
    _softmax_scopes(s.value, frozenset({*explicit, *loops, *used}))
    _softmax_ranges(s.value, _within({}, s.ranges))
    if s.op == "=":
        _all_on_the_left(s, extents)
    _self_reads(s, loops)


def integer(e: Expr) -> None:
    """Raise DtypeError unless `e` is an integer expression of the grammar."""
    match e:
        case Const(value=value) if type(value) is not int:
            raise DtypeError(
                f"{value!r} is no integer, and stands where an integer is needed",
                span=e.span,
                help="subscripts, bounds and sizes are integers",
            )
        case Call(op=op):
            if op not in INTEGER_OPS:
                symbol = OPERATORS[op][0] if op in OPERATORS else op
                mend = "write `//`" if op == "div" else "integers are made with + - * // %, maximum, minimum and accesses of integer tensors"
                raise DtypeError(f"`{symbol}` cannot stand in a subscript, a bound or a size", span=e.span, help=mend)
            for arg in e.args:
                integer(arg)
        case Reduce() | Softmax():
            raise DtypeError("a reduction cannot stand in a subscript, a bound or a size", span=e.span, help="write it to a tensor first")
        case Pad() | Clamp():
            raise _misplaced(e)
        case Access():
            _forms(e)
        case _:
            pass


def _forms(e: Expr) -> None:
    """Integers where integers belong; pad and clamp only as whole subscripts."""
    if isinstance(e, Pad | Clamp):
        raise _misplaced(e)
    if isinstance(e, Access):
        for s in e.subscripts:
            for part in children(s) if isinstance(s, Pad | Clamp) else (s,):
                integer(part)
        return
    if isinstance(e, Reduce):
        for bound in bounds(e.ranges):
            integer(bound)
    for child in children(e):
        _forms(child)


def _misplaced(e: Pad | Clamp) -> ParseError:
    name = "pad" if isinstance(e, Pad) else "clamp"
    return ParseError(f"`{name}(..)` stands only as a whole subscript", span=e.span, help=f"write `X[{name}(i-1)]`")


def _free(e: Expr, bound: frozenset[str]) -> set[str]:
    if isinstance(e, Index):
        return set() if e.name in bound else {e.name}
    if isinstance(e, Reduce):
        bound = bound | {r.index for r in e.ranges}
    return {name for child in children(e) for name in _free(child, bound)}


def _softmax_scopes(e: Expr, scope: frozenset[str]) -> None:
    if isinstance(e, Reduce):
        scope = scope | {r.index for r in e.ranges}
    if isinstance(e, Softmax):
        for name in e.over:
            if name not in scope:
                raise IndexError_(
                    f"softmax goes over {name}, which is no index here",
                    span=e.span,
                    help="softmax normalises over an index of its statement: name one of " + (", ".join(sorted(scope)) or "them"),
                )
    for child in children(e):
        _softmax_scopes(child, scope)


class _Scoped(NamedTuple):
    """An index in scope: the range that binds it, and the ranges that its bounds name."""

    range: Range
    depends: tuple[Range, ...]


def _softmax_ranges(e: Expr, scope: Mapping[str, _Scoped]) -> None:
    """What softmax goes over is the same for all of its rows. An inner index hides an outer one of its name."""
    if isinstance(e, Reduce):
        scope = _within(scope, e.ranges)
    if isinstance(e, Softmax):
        over = {i: scope[i].range for i in e.over if i in scope}
        for name in free_indices(e.body):
            moved = [i for i, r in over.items() if name in scope and any(r is d for d in scope[name].depends)]
            if moved:
                raise IndexError_(
                    f"softmax goes over {moved[0]}, and the range of {name} depends on it",
                    span=e.span,
                    help=f"give {name} a range of its own, and mask: softmax[{moved[0]}](where({name} < .., .., -inf))",
                )
    for child in children(e):
        _softmax_ranges(child, scope)


def _within(scope: Mapping[str, _Scoped], ranges: Iterable[Range]) -> dict[str, _Scoped]:
    inner = dict(scope)
    for r in ranges:
        names = dict.fromkeys(i for bound in bounds((r,)) for i in free_indices(bound))
        inner[r.index] = _Scoped(r, tuple(inner[i].range for i in names if i in inner))
    return inner


def _all_on_the_left(s: Statement, extents: Mapping[str, Size]) -> None:
    if s.reduced:
        name = s.reduced[0]
        span = next((e.span for e in walk(s.value) if isinstance(e, Index) and e.name == name), None)
        span = span or next((r.span for r in s.ranges if r.index == name), None) or s.span
        size = extents.get(name)
        raise IndexError_(
            f"index {name} is not on the left of `=`",
            span=span,
            help=f"write `+=` to sum over {name} (or `max=`, `min=`, `*=`), or put {name} on the left; "
            + (
                f"for the extent, write size({size.tensor}, {size.dim}): in a subscript, {name} is an index"
                if size
                else f"if it is a scalar, declare it: `def f(.., {name}) -> ..:`"
            ),
        )


def _self_reads(s: Statement, loops: tuple[str, ...]) -> None:
    target = s.target
    for e in (*bounds(s.ranges), *target.subscripts):
        _no_read(e, target.tensor)
    for e, hidden in _accesses(s.value, frozenset()):
        for subscript in e.subscripts:
            _no_read(subscript, target.tensor)
        if e.tensor != target.tensor:
            continue
        if e.subscripts == target.subscripts and not hidden & set(free_indices(e)):
            if s.reduced:
                raise SelfRead(
                    f"{target.tensor} is read where it is being reduced over {s.reduced[0]}", span=e.span, help="write to another tensor"
                )
        elif not any(
            (set(free_indices(a)) & set(loops) and a != b) or (loops and _apart(a, b, s.ranges))
            for a, b in zip(target.subscripts, e.subscripts, strict=False)
        ):
            raise SelfRead(
                f"{target.tensor} is read with other subscripts in the statement that writes it", span=e.span, help=_order_help(s, e)
            )


def _apart(a: Expr, b: Expr, ranges: Iterable[Range]) -> bool:
    """Whether an index and another subscript never meet, as its range tells: j+1:n lies beyond j."""
    r = next((r for r in ranges if a == Index(r.index)), None)
    if r is None or r.lo is None or r.hi is None:
        return False
    after, before = linear(r.lo) - linear(b), linear(b) - linear(r.hi)
    return (not after.terms and after.const > 0) or (not before.terms and before.const >= 0)


def _accesses(e: Expr, hidden: frozenset[str]) -> Iterator[tuple[Access, frozenset[str]]]:
    """Every access, with the indices that a reduction around it binds."""
    if isinstance(e, Access):
        yield e, hidden
    if isinstance(e, Reduce):
        hidden = hidden | {r.index for r in e.ranges}
    for child in children(e):
        yield from _accesses(child, hidden)


def _order_help(s: Statement, e: Access) -> str:
    moved = [i for a, b in zip(s.target.subscripts, e.subscripts, strict=False) if a != b for i in free_indices(a)]
    return (
        f"write `for ordered {moved[0]}, ..:` if it is a recurrence over {moved[0]}, else write to another tensor"
        if moved
        else "write to another tensor"
    )


def _no_read(e: Expr, tensor: str) -> None:
    for x in walk(e):
        if isinstance(x, Access) and x.tensor == tensor:
            raise SelfRead(
                f"{tensor} is the target of this statement and cannot be a subscript or a bound in it",
                span=x.span,
                help="copy it to another tensor first",
            )
