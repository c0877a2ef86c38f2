"""Reductions inside expressions become statements of their own.

    P[i,j] = softmax[j](s * S[i,j])   -->   P.in[i,j] = s * S[i,j]
                                            P.max[i] max= P.in[i,j]
                                            P.exp[i,j] = exp(P.in[i,j] - stop_gradient(P.max[i]))
                                            P.sum[i] += P.exp[i,j]
                                            P[i,j] = P.exp[i,j] / P.sum[i]

After this pass a statement's value holds scalar functions of accesses only, so the swap rule and the compiler see one
form. The maximum under softmax and logsumexp only stabilises: their values do not depend on it, hence stop_gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tdsl.affine import linear
from tdsl.errors import Unsupported
from tdsl.extents import Sizes, as_expr, symbolic_ranges
from tdsl.ir import (
    ASSIGNMENT_OF,
    REDUCTION_OF,
    Access,
    Call,
    Clamp,
    Const,
    Expr,
    Index,
    Loop,
    Pad,
    Program,
    Range,
    Reduce,
    Size,
    Softmax,
    Statement,
    bounds,
    free_indices,
    fresh_name,
    rebuild,
    rebuild_range,
    statements,
    substitute,
    walk,
)
from tdsl.ops import REDUCTIONS
from tdsl.simplify import factors, product

_LAST_INT64 = 2**63 - 1


def expand(program: Program) -> Program:
    """`program` without Reduce and Softmax nodes. Source of the stable forms: Milakov and Gimelshein, arXiv:1805.02867.

    Inside an ordered loop they become statements of its body, whose targets have the loop's indices as further subscripts:
    each step has temporaries of its own.
    """
    taken = {*program.inputs, *(s.target.tensor for s in statements(program.body))}
    return replace(program, body=_expanded(program.body, (), taken, Sizes(program)))


def _expanded(body: tuple[Statement | Loop, ...], outer: tuple[str, ...], taken: set[str], sizes: Sizes) -> tuple[Statement | Loop, ...]:
    result: list[Statement | Loop] = []
    for node in body:
        if isinstance(node, Loop):
            result.append(replace(node, body=_expanded(node.body, (*outer, *(r.index for r in node.ranges)), taken, sizes)))
        else:
            result += _Lifter(node, taken, outer, sizes).run()
        if not outer:
            sizes.note(node)
    return tuple(result)


def witness(index: str, *exprs: Expr) -> Size | None:
    """`size(A, d)` of the first access in which `index` stands alone at dimension d: what settles its range."""
    for expr in exprs:
        for e in walk(expr):
            if isinstance(e, Access):
                for d, s in enumerate(e.subscripts):
                    if isinstance(s, Index) and s.name == index:
                        return Size(e.tensor, d)
    return None


class _Lifter:
    """Lifts the reductions of one statement; `out` collects the statements that go before it. outer: the ordered loops around it."""

    def __init__(self, statement: Statement, taken: set[str], outer: tuple[str, ...], sizes: Sizes):
        self.sizes = sizes
        self.statement = statement
        self.outer = outer
        self.taken = taken
        self.ranges = {r.index: r for r in statement.ranges}
        self.sources: tuple[Expr, ...] = (statement.value, *statement.target.subscripts)
        self.out: list[Statement | Loop] = []

    def run(self) -> list[Statement | Loop]:
        ranges = tuple(rebuild_range(r, self.lift) for r in self.statement.ranges)
        target = rebuild(self.statement.target, self.lift)
        assert isinstance(target, Access)
        self.out.append(replace(self.statement, ranges=ranges, target=target, value=self.lift(self.statement.value)))
        return self.out

    def lift(self, expr: Expr) -> Expr:
        """`expr` with every reduction in it replaced by an access to a new tensor."""
        if isinstance(expr, Softmax):
            return self._softmax(expr.over, self.lift(expr.body))
        if isinstance(expr, Reduce):
            renamed = self._unshadow(expr)
            outer = dict(self.ranges)
            for r in renamed.ranges:
                self.ranges[r.index] = rebuild_range(r, self.lift)
            self.sources = (renamed.body, *self.sources)
            init = None if renamed.init is None else self.lift(renamed.init)
            indices = tuple(r.index for r in renamed.ranges)
            result = _REDUCE[renamed.op](self, renamed, indices, self.lift(renamed.body), init)
            self.ranges = outer
            return result
        return rebuild(expr, self.lift)

    def _unshadow(self, node: Reduce) -> Reduce:
        """A binder that hides an outer index of the same name gets a name of its own: one scope is enough from here on."""
        to: dict[str, Expr] = {}
        ranges = []
        for r in node.ranges:
            r = rebuild_range(r, lambda e: substitute(e, to))
            if r.index in self.ranges or r.index in self.outer:
                fresh = fresh_name(r.index, {*self.ranges, *self.outer, *free_indices(node.body)})
                to[r.index] = Index(fresh)
                r = replace(r, index=fresh)
            ranges.append(r)
        return replace(node, ranges=tuple(ranges), body=substitute(node.body, to), init=None if node.init is None else node.init)

    # -- pieces -------------------------------------------------------------------------------------------------------

    def free(self, *exprs: Expr) -> tuple[str, ...]:
        """The free indices of some expressions, and those that their ranges depend on, in the loop order of the statement."""
        used = {i for e in exprs for i in free_indices(e)}
        for r in reversed(tuple(self.ranges.values())):  # a range depends on indices before it
            used |= {i for bound in bounds((r,)) for i in free_indices(bound)} if r.index in used else set()
        return tuple(i for i in self.ranges if i in used)

    def define(self, suffix: str, left: tuple[str, ...], op: str, value: Expr, over: tuple[str, ...] = ()) -> Expr:
        """A new statement `T.suffix[left] op value`, reducing over `over`; returns the access that reads it.

        A tensor along an index whose range depends on the values of a tensor would have a size that does: an elementwise value is
        returned as it is, and a reduction spans the whole dimension that the index subscripts.
        """
        ragged = tuple(i for i in left if self._is_ragged(i))
        if ragged and op == "=":
            return value
        name = fresh_name(f"{self.statement.target.tensor}.{suffix}", self.taken)
        self.taken.add(name)
        target = Access(name, tuple(Index(i) for i in (*self.outer, *left)))
        spans = {i: Range(i, Const(0), self._size(i, value)) for i in ragged}
        ranges = tuple(spans[i] if i in spans else self._range(i, value) for i in (*left, *(i for i in over if i not in left)))
        self.out.append(Statement(ranges, target, op, self._masked(op, value, ragged) if ragged else value, self.statement.span))
        return target

    def _is_ragged(self, index: str) -> bool:
        return any(isinstance(a, Access) and a.subscripts for b in bounds((self.ranges[index],)) for a in walk(b))

    def _size(self, index: str, value: Expr) -> Expr:
        """The dimension that an index of a ragged range subscripts: alone, or else together with others."""
        target = self.statement.target
        found: Expr | None = witness(index, value, *self.sources)
        if found is None and target.tensor in self.sizes.shapes and Index(index) in target.subscripts:
            found = self.sizes.shapes[target.tensor][target.subscripts.index(Index(index))]
        r = self.ranges[index]
        for a in (a for expr in (value, *self.sources) for a in walk(expr) if isinstance(a, Access) and r.lo == Const(0)):
            found = found or next((size for d, e in enumerate(a.subscripts) if (size := _count(index, e, Size(a.tensor, d)))), None)
        alike = (i for i, other in self.ranges.items() if i != index and (other.lo, other.hi) == (r.lo, r.hi))
        found = found or next((size for i in alike if (size := witness(i, value, *self.sources))), None)
        if found is None:
            raise Unsupported(
                f"a reduction for every {index} needs a tensor along {index}, whose range no size bounds (expand)",
                span=r.span or self.statement.span,
                help=f"subscript a tensor by {index}, or write the inner reduction as a statement of its own",
            )
        return found

    def _masked(self, op: str, value: Expr, ragged: tuple[str, ...]) -> Expr:
        """`value` beyond the ranges of ragged indices: the identity of the reduction, each factor of a product by itself."""
        terms: list[Expr] = []
        for i in ragged:
            r = self.ranges[i]
            assert r.lo is not None and r.hi is not None
            terms += [] if r.lo == Const(0) else [Call("ge", (Index(i), r.lo))]
            terms.append(Call("lt", (Index(i), r.hi)))
        condition = terms[0]
        for term in terms[1:]:
            condition = Call("and", (condition, term))
        value = _padded(value, ragged)
        along = set(ragged)
        if op != "+=":
            return Call("where", (condition, value, Const(REDUCTIONS[REDUCTION_OF[op]].identity)))
        parts = [Call("where", (condition, f, Const(0))) if along & set(free_indices(f)) else f for f in factors(value)]
        return product(parts) if any(along & set(free_indices(f)) for f in factors(value)) else Call("where", (condition, value, Const(0)))

    def _range(self, index: str, value: Expr) -> Range:
        r = self.ranges[index]
        if r.lo is not None or witness(index, value) is not None:
            return r
        size = witness(index, *self.sources)
        if size is None:  # the target or another subscript settles it
            found = symbolic_ranges(self.statement, self.sizes)
            return replace(r, lo=as_expr(found[index][0]), hi=as_expr(found[index][1])) if index in found else r
        return replace(r, lo=Const(0), hi=size)

    def count(self, indices: tuple[str, ...], body: Expr) -> Expr:
        """How many terms a reduction over `indices` has."""
        total: Expr | None = None
        for i in indices:
            r = self.ranges[i]
            size: Expr | None = witness(i, body, *self.sources)
            if r.lo is not None and r.hi is not None:
                size = r.hi if r.lo == Const(0) else Call("sub", (r.hi, r.lo))
            if size is None:
                raise Unsupported(
                    f"the number of terms over index {i} is not known from a plain use of it",
                    span=r.span or self.statement.span,
                    help=f"give its range: [{i} in 0:n]",
                )
            total = size if total is None else Call("mul", (total, size))
        assert total is not None
        return total

    def plain(self, suffix: str, body: Expr) -> Expr:
        """`body`, as an access: a compound expression gets a name, so that what is built on it stays short."""
        if isinstance(body, Access) and not any(isinstance(s, Pad | Clamp) for s in body.subscripts):
            return body
        return self.define(suffix, self.free(body), "=", body)

    def _shifted(self, over: tuple[str, ...], body: Expr, guard: bool) -> tuple[Expr, Expr]:
        """exp(body - max) and the max over `over` (as 0 where it is infinite, if guard: an empty or masked-out row)."""
        body = self.plain("in", body)
        left = tuple(i for i in self.free(body) if i not in over)
        top = self.define("max", left, "max=", body, over)
        if guard:
            top = Call("where", (Call("eq", (Call("abs", (top,)), Const(float("inf")))), Const(0), top))
        top = Call("stop_gradient", (top,))
        return self.define("exp", self.free(body), "=", Call("exp", (Call("sub", (body, top)),))), top

    def _softmax(self, over: tuple[str, ...], body: Expr) -> Expr:
        if set(over) & set(self.outer):
            raise Unsupported(
                f"softmax over {', '.join(over)}, an ordered index: one step of the loop does not know the others (expand)",
                span=self.statement.span,
                help="write the softmax as a statement of its own, outside of the loop",
            )
        exp, _ = self._shifted(over, body, guard=False)
        total = self.define("sum", tuple(i for i in self.free(exp) if i not in over), "+=", exp, over)
        return Call("div", (exp, total))

    # -- one method per reduction -------------------------------------------------------------------------------------

    def _simple(self, node: Reduce, indices: tuple[str, ...], body: Expr, init: Expr | None) -> Expr:
        left = tuple(i for i in self.free(body) if i not in indices)
        result = self.define(node.op, left, ASSIGNMENT_OF[node.op], body, indices)
        if init is not None:
            combine = {"sum": "add", "prod": "mul", "max": "maximum", "min": "minimum"}[node.op]
            result = Call(combine, (result, init))
        return result

    def _mean(self, node: Reduce, indices: tuple[str, ...], body: Expr, init: Expr | None) -> Expr:
        count = self.count(indices, body)
        left = tuple(i for i in self.free(body) if i not in indices)
        total = self.define("total", left, "+=", body, indices)
        return self.define("mean", left, "=", Call("div", (total, count)))

    def _var(self, node: Reduce, indices: tuple[str, ...], body: Expr, init: Expr | None) -> Expr:
        body = self.plain("in", body)
        mean = self._mean(node, indices, body, None)
        difference = Call("sub", (body, mean))
        left = tuple(i for i in self.free(body) if i not in indices)
        total = self.define("squares", left, "+=", Call("mul", (difference, difference)), indices)
        return self.define("var", left, "=", Call("div", (total, self.count(indices, body))))

    def _logsumexp(self, node: Reduce, indices: tuple[str, ...], body: Expr, init: Expr | None) -> Expr:
        exp, top = self._shifted(indices, body, guard=True)
        total = self.define("sum", tuple(i for i in self.free(exp) if i not in indices), "+=", exp, indices)
        result: Expr = Call("add", (Call("log", (total,)), top))
        if init is not None:
            result = Call(
                "add",
                (
                    Call("maximum", (result, init)),
                    Call("log1p", (Call("exp", (Call("neg", (Call("abs", (Call("sub", (result, init)),)),)),)),)),
                ),
            )
        return result

    def _arg(self, node: Reduce, indices: tuple[str, ...], body: Expr, init: Expr | None) -> Expr:
        body = self.plain("in", body)
        left = tuple(i for i in self.free(body) if i not in indices)
        best = self.define(node.op[3:], left, ASSIGNMENT_OF[node.op[3:]], body, indices)
        flat: Expr = Index(indices[0])
        for i in indices[1:]:
            flat = Call("add", (Call("mul", (flat, self.count((i,), body))), Index(i)))
        hit = Call("or", (Call("eq", (body, best)), Call("isnan", (body,))))  # a NaN wins, as in torch
        where = Call("where", (hit, flat, Const(_LAST_INT64)))
        return self.define(node.op, left, "min=", where, indices)


def _count(index: str, e: Expr, size: Expr) -> Expr | None:
    """How many values an index can take at most, if `e`, which it moves, is a subscript of a dimension: `j//16` takes each 16 times."""
    if isinstance(e, Pad | Clamp):
        return None
    if linear(e).coefficient(index):
        return size
    if isinstance(e, Call) and e.op == "floordiv" and isinstance(e.args[1], Const) and linear(e.args[0]).coefficient(index):
        return Call("mul", (size, e.args[1]))
    return None


def _padded(e: Expr, ragged: tuple[str, ...]) -> Expr:
    """`e` with compound subscripts of ragged indices padded: beyond the range they may lie outside."""
    e = rebuild(e, lambda x: _padded(x, ragged))
    if not isinstance(e, Access):
        return e
    return replace(
        e, subscripts=tuple(s if isinstance(s, Index | Pad | Clamp) or not set(ragged) & set(free_indices(s)) else Pad(s) for s in e.subscripts)
    )


_REDUCE: dict[str, Callable[[_Lifter, Reduce, tuple[str, ...], Expr, Expr | None], Expr]] = {
    "sum": _Lifter._simple,
    "prod": _Lifter._simple,
    "max": _Lifter._simple,
    "min": _Lifter._simple,
    "mean": _Lifter._mean,
    "var": _Lifter._var,
    "logsumexp": _Lifter._logsumexp,
    "argmax": _Lifter._arg,
    "argmin": _Lifter._arg,
}
