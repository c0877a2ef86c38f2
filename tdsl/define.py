"""Reading a gradient that a user wrote: statements in the notation, checked against the gradient that they replace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from tdsl.errors import ArgumentError, NameError_, RankMismatch, SizeMismatch, counted
from tdsl.extents import Sizes
from tdsl.header import Header
from tdsl.ir import Access, Custom, Expr, Index, Loop, Param, Program, Range, Reduce, Statement, bounds, children, statements
from tdsl.printer import print_expr
from tdsl.signature import Sizes as Classes
from tdsl.signature import place_of, tensor_ranks
from tdsl.swap import backward, differentiable
from tdsl.text import parse


def define_grad(program: Program, tensor: str, text: str) -> Program:
    """`program` with the statements of `text` for the gradient of its input `tensor`.

    They write it under the name that the printed gradient has for it (`A.grad`), from the inputs, the cotangents of the outputs
    (`Y.grad`), what the forward pass computes and the cotangents of that, and tensors of their own.

    Raises ArgumentError for a tensor that has no gradient, ParseError and what else `parse` raises for the text, NameError_ for
    a name that is not there or not theirs to write, RankMismatch and SizeMismatch for subscripts that do not fit.
    """
    possible = differentiable(program)
    if tensor not in possible:
        what = "is used as a subscript, a bound or a size" if tensor in program.inputs else f"is no input of {program.name}"
        raise ArgumentError(
            f"{tensor} has no gradient: it {what}", span=place_of(program, tensor), help=f"inputs with one: {', '.join(possible) or 'none'}"
        )
    whole = backward(replace(program, custom=()), [tensor])
    name = whole.results[0]
    ranks = {**tensor_ranks(whole.body), **{p.name: len(p.dims) for p in whole.params}}
    body = _statements(text, name, ranks)
    for s in statements(body):
        _check_target(s, name, ranks)
    _check_sizes(whole, body)
    kept = tuple(c for c in program.custom if c.name != name)
    return replace(program, custom=(*kept, Custom(name, body)))


def _statements(text: str, name: str, ranks: Mapping[str, int]) -> tuple[Statement | Loop, ...]:
    """The statements of a text that can read what `ranks` lists, but for `name`."""
    known = [n for n in ranks if n != name]
    params = tuple(Param(n, tuple(f"{n}:{d}" for d in range(ranks[n]))) for n in known)
    header = Header(None, params, (), named=False)
    try:
        body = parse(text, name="define_grad", header=header).body
    except NameError_ as error:
        raise NameError_(error.what, span=error.span, help=f"these statements can read {', '.join(known)}") from None
    if not any(s.target.tensor == name for s in statements(body)):
        first = next(statements(body))
        raise NameError_(
            f"nothing here writes {name}", span=first.target.span, help=f"write `{name}[..] += ..`, as the printed gradient does"
        )
    return body


def _check_target(s: Statement, name: str, ranks: Mapping[str, int]) -> None:
    target = s.target
    if target.tensor != name and target.tensor in ranks:
        raise NameError_(
            f"{target.tensor} is not theirs to write: these statements are the gradient {name}",
            span=target.span,
            help=f"write {name}, or a tensor with a name of its own",
        )
    if target.tensor == name and len(target.subscripts) != ranks[name]:
        raise RankMismatch(
            f"{name} has {counted(ranks[name], 'dimension')}, and {counted(len(target.subscripts), 'subscript')} here",
            span=target.span,
            help="a gradient has the shape of its input",
        )


# ---------------------------------------------------------------------------------------------------------------------
# Sizes


class _Agreement:
    """Which sizes of a gradient program are the same, as its text shows: by the classes of its signature and by what they are."""

    def __init__(self, whole: Program):
        self.classes = Classes(whole.body, whole.inputs, whole.results)
        self.sizes = Sizes(whole)
        for node in whole.body:
            self.sizes.note(node)
        self.parent: dict[object, object] = {}
        for name, shape in self.sizes.shapes.items():
            for d, size in enumerate(shape):
                self._join(self.classes.find((name, d)), self.sizes.linear(size))

    def find(self, tensor: str, d: int) -> object:
        return self._find(self.classes.find((tensor, d)))

    def _find(self, node: object) -> object:
        while (parent := self.parent.get(node, node)) != node:
            node = parent
        return node

    def _join(self, a: object, b: object) -> None:
        a, b = self._find(a), self._find(b)
        if a != b:
            self.parent[b] = a


def _check_sizes(whole: Program, body: tuple[Statement | Loop, ...]) -> None:
    """All plain uses of an index without an explicit range have sizes that the program knows to be the same."""
    agreement = _Agreement(whole)
    for node in body:
        for uses in _plain_uses(node, {}):
            known = [(access, d) for access, d in uses if access.tensor in agreement.sizes.shapes]
            for access, d in known[1:]:
                first, place = known[0]
                if agreement.find(access.tensor, d) != agreement.find(first.tensor, place):
                    subscript = access.subscripts[d]
                    raise SizeMismatch(
                        f"index {print_expr(subscript)} has the size of dimension {d} in {access.tensor}, "
                        f"but that of dimension {place} in {first.tensor}",
                        span=access.span,
                        help="nothing in the program says that these are equal; if they are, give the index a range: "
                        f"`for {print_expr(subscript)} in 0:{print_expr(agreement.sizes.shapes[first.tensor][place])}`",
                    )


Uses = list[tuple[Access, int]]


def _plain_uses(node: Statement | Loop, scope: Mapping[str, Uses | None]) -> Iterator[Uses]:
    """For each index that no explicit range settles, the dimensions in which it stands alone."""
    inner, found = _bind(node.ranges, scope)
    for e in bounds(node.ranges):
        _visit(e, inner, found)
    if isinstance(node, Loop):
        for child in node.body:
            yield from _plain_uses(child, inner)
    else:
        _visit(node.target, inner, found)
        _visit(node.value, inner, found)
    yield from found


def _bind(ranges: tuple[Range, ...], scope: Mapping[str, Uses | None]) -> tuple[dict[str, Uses | None], list[Uses]]:
    own: dict[str, Uses | None] = {r.index: [] if r.lo is None else None for r in ranges}
    return {**scope, **own}, [uses for uses in own.values() if uses is not None]


def _visit(e: Expr, scope: Mapping[str, Uses | None], found: list[Uses]) -> None:
    if isinstance(e, Access):
        for d, s in enumerate(e.subscripts):
            uses = scope.get(s.name) if isinstance(s, Index) else None
            if uses is not None:
                uses.append((e, d))
    if isinstance(e, Reduce):
        scope, more = _bind(e.ranges, scope)
        found += more
    for child in children(e):
        _visit(child, scope, found)
