"""The intermediate representation: a Program is statements, a statement is a loop nest around one assignment.

    program   = name, params, outputs, body of (Statement | Loop)
    Statement = for ranges: target op value            op is one of  =  +=  *=  max=  min=
    Loop      = for ordered|reversed ranges: body      the only loop whose order can be seen
    expr      = Const | Index | Access | Size | Call | Reduce | Softmax
    subscript = expr | Pad(expr) | Clamp(expr)         integer expressions are ordinary expressions

Every node is frozen. `span` says where a node stood in the user's text; equality ignores it.
What can be computed is not stored: see `free_indices`, `Statement.reduced`, `reads`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import TypeAlias

# The reduction that each assignment operator performs over the indices that are not on its left.
REDUCTION_OF = {"+=": "sum", "*=": "prod", "max=": "max", "min=": "min"}
ASSIGNMENT_OF = {reduction: op for op, reduction in REDUCTION_OF.items()}


@dataclass(frozen=True, slots=True)
class Span:
    """Characters [start, end) of `text`; `origin` names the file, if any, and `line` its first line's number there."""

    text: str
    start: int
    end: int
    origin: str = ""
    line: int = 1


def _span() -> Span | None:
    return field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class Const:
    """A number. Unlike Python's, 1, 1.0 and True are three different constants: they promote differently."""

    value: bool | int | float
    span: Span | None = _span()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Const) and type(self.value) is type(other.value) and self.value == other.value

    def __hash__(self) -> int:
        return hash((type(self.value), self.value))


@dataclass(frozen=True, slots=True)
class Index:
    """The value of a loop index (an int64)."""

    name: str
    span: Span | None = _span()


@dataclass(frozen=True, slots=True)
class Size:
    """`size(A, d)`: the extent of dimension `dim` of tensor `tensor`."""

    tensor: str
    dim: int
    span: Span | None = _span()


@dataclass(frozen=True, slots=True)
class Pad:
    """Only as a subscript: reads zero outside; a write outside is dropped. With lo and hi, bounds `value` to [-lo, size+hi)."""

    value: Expr
    lo: Expr | None = None
    hi: Expr | None = None
    span: Span | None = _span()


@dataclass(frozen=True, slots=True)
class Clamp:
    """Only as a subscript: reads the nearest element."""

    value: Expr
    span: Span | None = _span()


@dataclass(frozen=True, slots=True)
class Access:
    """An element of a tensor, read or written; a scalar (0-d tensor or Python number) has no subscripts."""

    tensor: str
    subscripts: tuple[Expr, ...] = ()
    span: Span | None = _span()


@dataclass(frozen=True, slots=True)
class Call:
    """A scalar function or operator of the table in ops.py."""

    op: str
    args: tuple[Expr, ...]
    span: Span | None = _span()


@dataclass(frozen=True, slots=True)
class Range:
    """A loop index; lo and hi are None where the range is inferred. order: "", "ordered" or "reversed"."""

    index: str
    lo: Expr | None = None
    hi: Expr | None = None
    order: str = ""
    span: Span | None = _span()


@dataclass(frozen=True, slots=True)
class Reduce:
    """A reduction inside an expression, `op[ranges](body, init=init)`; it binds its own indices."""

    op: str
    ranges: tuple[Range, ...]
    body: Expr
    init: Expr | None = None
    span: Span | None = _span()


@dataclass(frozen=True, slots=True)
class Softmax:
    """`softmax[over](body)`: binds nothing, normalises over the indices `over` that are in scope."""

    over: tuple[str, ...]
    body: Expr
    span: Span | None = _span()


Expr: TypeAlias = Const | Index | Access | Size | Call | Reduce | Softmax | Pad | Clamp


@dataclass(frozen=True, slots=True)
class Statement:
    """`for ranges: target op value`. `ranges` is complete: every free index of the statement stands there, in loop order."""

    ranges: tuple[Range, ...]
    target: Access
    op: str
    value: Expr
    span: Span | None = _span()

    @property
    def indices(self) -> tuple[str, ...]:
        """The loop indices, outermost first."""
        return tuple(r.index for r in self.ranges)

    @property
    def reduced(self) -> tuple[str, ...]:
        """The loop indices that are not on the left."""
        left = set(free_indices(self.target))
        return tuple(i for i in self.indices if i not in left)


@dataclass(frozen=True, slots=True)
class Loop:
    """An ordered or reversed loop; its body runs whole at each step."""

    ranges: tuple[Range, ...]
    body: tuple[Statement | Loop, ...]
    span: Span | None = _span()


@dataclass(frozen=True, slots=True)
class Param:
    """An input. `dims` names its sizes, and equal names must agree; () is a scalar. Equality ignores the names."""

    name: str
    dims: tuple[str, ...] = field(default=(), compare=False)
    span: Span | None = _span()


@dataclass(frozen=True, slots=True)
class Output:
    """An output; `sizes`, where given, settle its shape (None in a place: inferred)."""

    name: str
    sizes: tuple[Expr | None, ...] | None = None
    span: Span | None = _span()


@dataclass(frozen=True, slots=True)
class Custom:
    """Statements that take the place of those of the swap rule for the gradient `name` of an input."""

    name: str
    body: tuple[Statement | Loop, ...]


@dataclass(frozen=True, slots=True)
class Program:
    """A function of tensors. `str(program)` is the notation and parses back to an equal Program, but for `custom`."""

    name: str
    params: tuple[Param, ...]
    outputs: tuple[Output, ...]
    body: tuple[Statement | Loop, ...]
    custom: tuple[Custom, ...] = ()

    def __str__(self) -> str:
        # The printer reads this module; only this convenience looks back, when it is called.
        return str(import_module("tdsl.printer").print_program(self))

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the parameters, in order."""
        return tuple(p.name for p in self.params)

    @property
    def results(self) -> tuple[str, ...]:
        """The names of the outputs, in order."""
        return tuple(o.name for o in self.outputs)


# ---------------------------------------------------------------------------------------------------------------------
# Walking and rebuilding


def children(expr: Expr) -> tuple[Expr, ...]:
    """The direct sub-expressions, subscripts and bounds included, in the order they are written."""
    match expr:
        case Access():
            return expr.subscripts
        case Call():
            return expr.args
        case Reduce():
            return (*bounds(expr.ranges), expr.body, *(() if expr.init is None else (expr.init,)))
        case Softmax() | Clamp():
            return (expr.body if isinstance(expr, Softmax) else expr.value,)
        case Pad():
            return tuple(e for e in (expr.value, expr.lo, expr.hi) if e is not None)
        case _:
            return ()


def bounds(ranges: tuple[Range, ...]) -> tuple[Expr, ...]:
    """The explicit bounds of some ranges."""
    return tuple(e for r in ranges for e in (r.lo, r.hi) if e is not None)


def rebuild(expr: Expr, visit: Callable[[Expr], Expr]) -> Expr:
    """`expr` with `visit` applied to each direct sub-expression; the same object where nothing changed."""
    match expr:
        case Access() if expr.subscripts:
            subscripts = tuple(visit(e) for e in expr.subscripts)
            return expr if _same(subscripts, expr.subscripts) else replace(expr, subscripts=subscripts)
        case Call():
            args = tuple(visit(e) for e in expr.args)
            return expr if _same(args, expr.args) else replace(expr, args=args)
        case Reduce():
            return replace(
                expr,
                ranges=tuple(rebuild_range(r, visit) for r in expr.ranges),
                body=visit(expr.body),
                init=None if expr.init is None else visit(expr.init),
            )
        case Softmax():
            return replace(expr, body=visit(expr.body))
        case Pad():
            lo, hi = (None if e is None else visit(e) for e in (expr.lo, expr.hi))
            return replace(expr, value=visit(expr.value), lo=lo, hi=hi)
        case Clamp():
            return replace(expr, value=visit(expr.value))
        case _:
            return expr


def _same(a: tuple[Expr, ...], b: tuple[Expr, ...]) -> bool:
    return all(x is y for x, y in zip(a, b, strict=True))


def rebuild_range(r: Range, visit: Callable[[Expr], Expr]) -> Range:
    """A range with `visit` applied to its bounds."""
    if r.lo is None and r.hi is None:
        return r
    return replace(r, lo=None if r.lo is None else visit(r.lo), hi=None if r.hi is None else visit(r.hi))


def walk(expr: Expr) -> Iterator[Expr]:
    """`expr` and every expression inside it, parents first, in the order they are written."""
    yield expr
    for child in children(expr):
        yield from walk(child)


def expressions(node: Statement | Loop) -> Iterator[Expr]:
    """Every top expression of a statement or of a loop's statements: bounds, target, value."""
    yield from bounds(node.ranges)
    if isinstance(node, Loop):
        for child in node.body:
            yield from expressions(child)
    else:
        yield node.target
        yield node.value


def statements(body: tuple[Statement | Loop, ...]) -> Iterator[Statement]:
    """Every statement, those inside loops too, in order."""
    for node in body:
        if isinstance(node, Loop):
            yield from statements(node.body)
        else:
            yield node


def reads(node: Statement | Loop) -> Iterator[Access]:
    """Every access that a statement reads: in its value, its bounds, and the subscripts of its target."""
    if isinstance(node, Loop):
        for bound in bounds(node.ranges):
            yield from (e for e in walk(bound) if isinstance(e, Access))
        for child in node.body:
            yield from reads(child)
    else:
        for expr in (*bounds(node.ranges), *node.target.subscripts, node.value):
            yield from (e for e in walk(expr) if isinstance(e, Access))


def free_indices(expr: Expr) -> tuple[str, ...]:
    """The indices that `expr` uses and does not bind, in order of first use."""
    found: dict[str, None] = {}
    _collect(expr, frozenset(), found)
    return tuple(found)


def _collect(expr: Expr, bound: frozenset[str], found: dict[str, None]) -> None:
    if isinstance(expr, Index):
        if expr.name not in bound:
            found.setdefault(expr.name)
    elif isinstance(expr, Reduce):
        for r in expr.ranges:  # a bound may use the indices before it
            for e in bounds((r,)):
                _collect(e, bound, found)
            bound = bound | {r.index}
        _collect(expr.body, bound, found)
        if expr.init is not None:
            _collect(expr.init, bound, found)
    else:
        if isinstance(expr, Softmax):
            for name in expr.over:
                if name not in bound:
                    found.setdefault(name)
        for child in children(expr):
            _collect(child, bound, found)


def substitute(expr: Expr, to: Mapping[str, Expr]) -> Expr:
    """`expr` with free indices replaced; indices bound inside are renamed where a replacement would be captured."""
    if not to:
        return expr
    if isinstance(expr, Index):
        return to.get(expr.name, expr)
    if isinstance(expr, Reduce):
        inner = {name: e for name, e in to.items() if name not in {r.index for r in expr.ranges}}
        captured = {name for e in inner.values() for name in free_indices(e)}
        taken = captured | set(inner) | {e.name for e in walk(expr) if isinstance(e, Index)} | {r.index for r in expr.ranges}
        ranges = []
        for r in expr.ranges:
            r = rebuild_range(r, lambda e: substitute(e, inner))
            if r.index in captured:
                fresh = fresh_name(r.index, taken)
                taken.add(fresh)
                inner = {**inner, r.index: Index(fresh)}
                r = replace(r, index=fresh)
            ranges.append(r)
        init = None if expr.init is None else substitute(expr.init, inner)
        return replace(expr, ranges=tuple(ranges), body=substitute(expr.body, inner), init=init)
    if isinstance(expr, Softmax):
        names = {name: to[name] for name in expr.over if name in to}
        if any(not isinstance(e, Index) for e in names.values()):
            raise ValueError(f"softmax over {expr.over} cannot take {names} in place of its index")
        over = tuple(names[name].name if name in names else name for name in expr.over)  # type: ignore[union-attr]
        return replace(expr, over=over, body=substitute(expr.body, to))
    return rebuild(expr, lambda e: substitute(e, to))


def rename_tensors(expr: Expr, to: Mapping[str, str]) -> Expr:
    """`expr` with tensors renamed, in accesses and sizes."""
    if isinstance(expr, Size):
        return replace(expr, tensor=to.get(expr.tensor, expr.tensor))
    expr = rebuild(expr, lambda e: rename_tensors(e, to))
    return replace(expr, tensor=to[expr.tensor]) if isinstance(expr, Access) and expr.tensor in to else expr


def fresh_name(name: str, taken: set[str] | frozenset[str]) -> str:
    """`name`, or the first of name2, name3, .. that is not taken."""
    number = 2
    fresh = name
    while fresh in taken:
        fresh = f"{name}{number}"
        number += 1
    return fresh
