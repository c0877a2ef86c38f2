"""The tangent of an expression, from the derivatives of ops.py and the tangents of what it reads.

a * sin(b)      -->      a.dot * sin(b) + a * (b.dot * cos(b))

A formula of the table is linear in the cotangent g of the result: with the tangent of the argument in the place of g it gives
the tangent of the result. `where` keeps its condition, so that no NaN passes from a branch that was not taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from tdsl.ir import Access, Call, Const, Expr
from tdsl.ops import DTYPES, OPS, cotangent
from tdsl.rule import multiplied, times
from tdsl.simplify import simplify_expr

ZERO = Const(0)  # an int raises no dtype


def differential(expr: Expr, dots: Mapping[str, str], y: Expr | None = None) -> Expr | None:
    """The tangent of `expr`, None where it is zero. dots: the tangents' names by tensor. y: an access that holds the value of `expr`."""
    match expr:
        case Access():
            return replace(expr, tensor=dots[expr.tensor]) if expr.tensor in dots else None
        case Call(op="where", args=(condition, a, b)):
            da, db = differential(a, dots), differential(b, dots)
            return None if da is None and db is None else Call("where", (condition, da or ZERO, db or ZERO))
        case Call(op="mul"):
            return _total(_product_rule(expr, dots))
        case Call(op=op, args=args) if op in OPS:
            terms = []
            for n, arg in enumerate(args):
                g = differential(arg, dots)
                if op in DTYPES and g is not None:  # the tangent is cast as the value is
                    g = Call(op, (g,))
                part = None if g is None else cotangent(expr, n, g, expr if y is None else y)
                terms += [] if part is None else [part]
            return _total(terms)
        case _:
            return None


def _product_rule(expr: Expr, dots: Mapping[str, str]) -> Iterator[Expr]:
    """One term per factor; equal factors give one term with their number in front."""
    factors = list(multiplied(expr))
    for n, factor in enumerate(factors):
        g = None if factor in factors[:n] else differential(factor, dots)
        if g is not None:
            equal = factors.count(factor)
            count: list[Expr] = [] if equal == 1 else [Const(equal)]
            yield times([*count, *factors[:n], g, *factors[n + 1 :]])


def _total(terms: Iterable[Expr]) -> Expr | None:
    total: Expr | None = None
    for term in terms:
        total = term if total is None else Call("add", (total, term))
    return None if total is None else simplify_expr(total)


def products(g: Expr) -> list[Expr]:
    """The terms of a sum of products, which are contractions each on its own; any other tangent is one term."""
    terms = list(_summands(g, negative=False))
    bare = [t.args[0] if isinstance(t, Call) and t.op == "neg" else t for t in terms]
    return terms if all(isinstance(t, Call) and t.op == "mul" for t in bare) else [g]


def _summands(e: Expr, *, negative: bool) -> Iterator[Expr]:
    if isinstance(e, Call) and e.op in ("add", "sub"):
        yield from _summands(e.args[0], negative=negative)
        yield from _summands(e.args[1], negative=negative != (e.op == "sub"))
    elif isinstance(e, Call) and e.op == "neg":
        yield from _summands(e.args[0], negative=not negative)
    else:
        yield simplify_expr(Call("neg", (e,))) if negative else e
