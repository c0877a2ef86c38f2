"""From statements as written to a Program: which bare names are indices, complete ranges, ordered loops, and what both spellings reject.

Statements as written are ordinary IR in which a bare name is an Access without subscripts, a Statement has the ranges of its own
`for` line, and a Loop is any block with a heading. After:

    for i:  Y[i] += n * A[i,k]   -->   Statement((Range("i"), Range("k")), ..) with Index nodes in the subscripts and the scalar n
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from difflib import get_close_matches

from tdsl import check
from tdsl.calls import check_name
from tdsl.errors import IndexError_, NameError_, RangeError, RankMismatch, counted
from tdsl.header import Header, check_header, with_header
from tdsl.ir import (
    Access,
    Expr,
    Index,
    Loop,
    Param,
    Program,
    Range,
    Reduce,
    Size,
    Span,
    Statement,
    bounds,
    free_indices,
    rebuild,
    rebuild_range,
    statements,
    walk,
)
from tdsl.signature import Body, bare_in_subscripts, infer_signature


def resolve(body: Body, header: Header | None = None, *, name: str | None = None, explicit: bool = False) -> Program:
    """The Program of statements as written. explicit: indices are Index nodes already, and no bare name becomes one.

    Raises what section 6 of the language lists: NameError_, IndexError_, RankMismatch, RangeError, DtypeError, SelfRead, ParseError.
    """
    if header is not None:
        check_header(header)
    names = _Names(None if header is None else header.params, explicit)
    if header is not None and header.named and not explicit:
        for p in reversed(header.params):
            names.extents |= {dim: Size(p.name, d) for d, dim in reversed(list(enumerate(p.dims)))}
    resolved = names.body(body, (), ())
    names.finish()
    if header is None:
        return infer_signature(resolved, name)
    return with_header(resolved, header, name, names.written, names.ranks)


class _Names:
    """What each name has turned out to be so far, in the order of the statements."""

    def __init__(self, params: tuple[Param, ...] | None, explicit: bool):
        self.declared = params is not None
        self.explicit = explicit
        self.ranks: dict[str, int] = {}
        self.written: dict[str, Span | None] = {}
        self.known: set[str] = {p.name for p in params or ()}
        self.scalars: set[str] = {p.name for p in params or () if not p.dims}
        self.indices: dict[str, Span | None] = {}
        self.sizes: list[Size] = []
        self.extents: dict[str, Size] = {}  # what a name in the brackets of the signature is, where it is no index
        self.signature = frozenset() if explicit else frozenset(self.known)
        for p in params or ():
            self.ranks[p.name] = len(p.dims)

    # -- statements

    def body(self, nodes: Body, shared: tuple[Range, ...], loops: tuple[str, ...]) -> Body:
        """Resolved statements; `shared` are the plain ranges of the blocks around, as written."""
        out: list[Statement | Loop] = []
        for node in nodes:
            if isinstance(node, Statement) and any(r.order for r in node.ranges):
                node = Loop(node.ranges, (replace(node, ranges=()),), span=node.span)
            if isinstance(node, Statement):
                out.append(self.statement(node, shared, loops))
            else:
                out.extend(self.block(node, shared, loops))
        return tuple(out)

    def block(self, node: Loop, shared: tuple[Range, ...], loops: tuple[str, ...]) -> Body:
        plain = tuple(r for r in node.ranges if not r.order)
        ordered = tuple(r for r in node.ranges if r.order)
        if not ordered:
            return self.body(node.body, shared + plain, loops)
        self.check_bound_once((*shared, *node.ranges), loops)
        names = self.index_names(bounds(ordered), {*loops, *(r.index for r in (*shared, *node.ranges))})
        ranges = tuple(rebuild_range(r, lambda e: self.convert(e, names)) for r in ordered)
        within = list(loops)
        for r in ranges:
            for e in bounds((r,)):
                check.integer(e)
                self.note(e)
                outside = [i for i in free_indices(e) if i not in within]
                if outside:
                    if outside[0] not in names:
                        mend = f"bind {outside[0]} outside"
                    elif any(isinstance(x, Access) and x.subscripts for x in walk(e)):
                        mend = f"let {r.index} run over all steps, and mask: `for {r.order} {r.index} in 0:n, {outside[0]}:  .. = where({r.index} < .., .., 0)`"
                    else:
                        mend = f"write `for ordered {outside[0]}, {r.order} {r.index} in ..`"
                    raise RangeError(
                        f"the bound of the {r.order} index {r.index} uses {outside[0]}, which no ordered loop outside binds",
                        span=e.span,
                        help=mend,
                    )
            within.append(r.index)
        self.known |= {s.target.tensor for s in statements(node.body)}
        inner = self.body(node.body, shared + plain, tuple(within))
        if len(inner) == 1 and isinstance(inner[0], Loop):  # a loop in a loop and nothing else is one nest
            return (Loop(ranges + inner[0].ranges, inner[0].body, span=node.span),)
        return (Loop(ranges, inner, span=node.span),)

    def statement(self, raw: Statement, shared: tuple[Range, ...], loops: tuple[str, ...]) -> Statement:
        explicit = shared + raw.ranges
        self.check_bound_once(explicit, loops)
        exprs = (*bounds(explicit), raw.target, raw.value)
        names = self.index_names(exprs, {*loops, *(r.index for r in explicit)})
        ranges = [rebuild_range(r, lambda e: self.convert(e, names)) for r in explicit]
        target, value = self.convert(raw.target, names), self.convert(raw.value, names)
        assert isinstance(target, Access)
        s = Statement(_complete(ranges, target, value, loops), target, raw.op, value, span=raw.span)
        check.statement(s, loops, [r.index for r in explicit], self.extents)
        for e in (*bounds(s.ranges), *target.subscripts, value):
            self.note(e)
        self.rank(target)
        self.written.setdefault(target.tensor, target.span)
        self.known.add(target.tensor)
        if not target.subscripts:
            self.scalars.add(target.tensor)
        return s

    def check_bound_once(self, ranges: tuple[Range, ...], loops: tuple[str, ...]) -> None:
        seen = set(loops)
        for r in ranges:
            check_name(r.index, r.span)
            if r.index in seen:
                raise IndexError_(f"index {r.index} is bound twice", span=r.span, help="name each index of the loops once")
            self.check_no_scalar(r.index, r.span)
            seen.add(r.index)

    def check_no_scalar(self, name: str, span: Span | None) -> None:
        if name in self.scalars:
            raise NameError_(f"{name} is used as an index and as a scalar", span=span, help=f"give the index another name, `{name}_` say")

    # -- expressions

    def index_names(self, exprs: Iterable[Expr], bound: set[str]) -> frozenset[str]:
        """The bare names that are indices in one statement."""
        names = set(bound)
        for expr in exprs:
            for e in walk(expr):
                if isinstance(e, Reduce):
                    for r in e.ranges:
                        self.check_no_scalar(check_name(r.index, r.span), r.span)
                        names.add(r.index)
                elif isinstance(e, Index):
                    self.check_no_scalar(e.name, e.span)
                    names.add(e.name)
            if not self.explicit:
                names |= bare_in_subscripts(expr) - self.scalars
        for name in names & {t for t, rank in self.ranks.items() if rank}:
            span = next((e.span for x in exprs for e in walk(x) if _is_bare(e, name)), None)
            if span is not None:
                n = self.ranks[name]
                raise NameError_(
                    f"{name} is used as an index, and is a tensor with {counted(n, 'dimension')}",
                    span=span,
                    help=f"give it its subscripts, `{name}[..]`, or the index another name",
                )
        return frozenset(names)

    def convert(self, e: Expr, names: frozenset[str]) -> Expr:
        """`e` with the bare names that are indices as Index nodes."""
        if isinstance(e, Access) and not e.subscripts:
            if e.tensor in names and not self.explicit:
                return Index(e.tensor, span=e.span)
            known = e.tensor in self.known or e.tensor not in self.extents
            return e if known else replace(self.extents[e.tensor], span=e.span)
        return rebuild(e, lambda x: self.convert(x, names))

    def note(self, expr: Expr) -> None:
        """Check and record the tensors and indices that `expr` reads."""
        for e in walk(expr):
            if isinstance(e, Index):
                self.indices.setdefault(e.name, e.span)
            elif isinstance(e, Access | Size):
                if self.declared and e.tensor not in self.known:
                    raise self.unknown(e)
                if isinstance(e, Size):
                    self.sizes.append(e)
                else:
                    self.rank(e)

    def unknown(self, e: Access | Size) -> NameError_:
        close = get_close_matches(e.tensor, sorted(self.known), n=1, cutoff=0.6)
        mend = f"did you mean `{close[0]}`? " if close else ""
        return NameError_(
            f"{e.tensor} is neither a parameter nor written before", span=e.span, help=f"{mend}add it to the parameters, or write it first"
        )

    def rank(self, a: Access) -> None:
        check_name(a.tensor, a.span)
        known = self.ranks.setdefault(a.tensor, len(a.subscripts))
        if known != len(a.subscripts):
            where = "in the signature" if a.tensor in self.signature else "before"
            raise RankMismatch(
                f"{a.tensor} has {counted(known, 'dimension')} {where}, and {counted(len(a.subscripts), 'subscript')} here",
                span=a.span, help=f"every use of {a.tensor} takes the same number of subscripts",
            )  # fmt: skip

    def finish(self) -> None:
        """What only the whole body shows: names used in two ways, sizes of dimensions that are not there."""
        for name, span in self.indices.items():
            if name in self.ranks:
                as_what = "a tensor" if self.ranks[name] else "a scalar"
                raise NameError_(
                    f"{name} is used as an index and as {as_what}",
                    span=span,
                    help=f"give the index another name, or declare the scalar: `def f(.., {name}) -> ..:`",
                )
        for size in self.sizes:
            rank = self.ranks.get(size.tensor)
            if rank is not None and size.dim >= rank:
                raise RankMismatch(
                    f"{size.tensor} has {counted(rank, 'dimension')}, and no dimension {size.dim}",
                    span=size.span,
                    help="dimensions are numbered from 0",
                )


def _is_bare(e: Expr, name: str) -> bool:
    return isinstance(e, Index) and e.name == name or isinstance(e, Access) and e.tensor == name and not e.subscripts


def _complete(explicit: list[Range], target: Access, value: Expr, loops: tuple[str, ...]) -> tuple[Range, ...]:
    """The ranges as written, with the indices that are missing: before the bound that uses them, else at the end by first use."""
    done = dict.fromkeys(loops)
    ranges: list[Range] = []
    later = {r.index for r in explicit}
    for r in explicit:
        for e in bounds((r,)):
            check.integer(e)
            for name in free_indices(e):
                if name in done:
                    continue
                if name in later:
                    raise RangeError(
                        f"the bound of {r.index} uses {name}, which comes after it",
                        span=e.span,
                        help=f"put {name} before {r.index} in the `for` line",
                    )
                done[name] = None
                ranges.append(Range(name))
        ranges.append(r)
        done[r.index] = None
        later.discard(r.index)
    for e in (target, value):
        for name in free_indices(e):
            if name not in done:
                done[name] = None
                ranges.append(Range(name))
    return tuple(ranges)
