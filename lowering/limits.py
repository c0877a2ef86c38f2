"""Which part of a streamed index matters: tiles in which a mask makes every term vanish need not be visited.

    P[i,j] = softmax[j](where(i >= j, S[i,j], -inf))   -->   for a tile of i, j runs to last(i) + 1

A comparison bounds the loop if, with it false, each reduction of the pass adds its identity: that is found by putting
False in its place and folding (exp(-inf) = 0, 0 * x = 0, -inf - x = -inf). What is folded away is taken to be finite, as
in every streamed attention kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lowering.stream import Reduction
from tdsl.affine import linear
from tdsl.ir import REDUCTION_OF, Access, Call, Const, Expr, Index, free_indices, rebuild, walk
from tdsl.ops import OPS, REDUCTIONS
from tdsl.simplify import simplify_expr

FIRST, LAST = "first(", "last("


def limits(members: Sequence[Reduction], stream: str, grid: Sequence[str]) -> tuple[Expr | None, Expr | None]:
    """(lo, hi) of the streamed index for one tile of the grid, in terms of `first(i)` and `last(i)`; None where unbounded."""
    lo: Expr | None = None
    hi: Expr | None = None
    for condition in _conditions(members):
        if not all(_vanishes(r, condition) for r in members):
            continue
        bound = _bound(condition, stream, grid)
        if bound is None:
            continue
        side, value = bound
        if side == "hi":
            hi = value if hi is None else Call("minimum", (hi, value))
        else:
            lo = value if lo is None else Call("maximum", (lo, value))
    return lo, hi


def _conditions(members: Sequence[Reduction]) -> list[Expr]:
    """The comparisons under which some term counts."""
    found: dict[Expr, None] = {}
    for r in members:
        for e in walk(r.inner):
            if isinstance(e, Call) and e.op == "where":
                found.update(dict.fromkeys(_conjuncts(e.args[0])))
    return list(found)


def _conjuncts(e: Expr) -> list[Expr]:
    if isinstance(e, Call) and e.op == "and":
        return [c for arg in e.args for c in _conjuncts(arg)]
    return [e] if isinstance(e, Call) and e.op in ("lt", "le", "gt", "ge") else []


def _vanishes(r: Reduction, condition: Expr) -> bool:
    """Whether the term of a reduction is its identity wherever the condition is false."""
    identity = REDUCTIONS[REDUCTION_OF[r.statement.op]].identity
    value = absorbed(_without(r.inner, condition))
    return isinstance(value, Const) and float(value.value) == identity


def _without(e: Expr, condition: Expr) -> Expr:
    if e == condition:
        return Const(False)
    return e if isinstance(e, Access) else rebuild(e, lambda x: _without(x, condition))


def absorbed(e: Expr) -> Expr:
    """The expression folded with zeros and infinities that absorb; what else is in it is taken to be finite."""
    if isinstance(e, Access | Index | Const):
        return e
    e = rebuild(e, absorbed)
    if not isinstance(e, Call):
        return e
    match e.op, e.args:
        case "and", args if Const(False) in args:
            return Const(False)
        case "where", (Const(value=c), a, b):
            return a if c else b
        case "mul", args if any(_zero(a) for a in args):
            return Const(0.0)
        case "div", (a, _) if _zero(a):
            return Const(0.0)
        case "add" | "sub", (a, b) if _infinite(a) and not _infinite(b):
            return a
        case "add", (a, b) if _infinite(b) and not _infinite(a):
            return b
        case "sub", (a, Const(value=value) as b) if _infinite(b) and not _infinite(a):
            return Const(-value)
        case "add", (a, b) if _zero(a) or _zero(b):
            return b if _zero(a) else a
        case "sub", (a, b) if _zero(b):
            return a
        case "neg", (Const(value=value),):
            return Const(-value)
        case "stop_gradient", (a,):
            return a
        case op, (Const(value=value),) if _infinite(e.args[0]) and value < 0 and OPS[op].homomorphism == ("add", "mul"):
            return Const(0.0)  # what turns sums into products turns the least sum into the absorbing factor
    return simplify_expr(e)


def _zero(e: Expr) -> bool:
    return isinstance(e, Const) and e.value == 0


def _infinite(e: Expr) -> bool:
    return isinstance(e, Const) and isinstance(e.value, float) and math.isinf(e.value)


def _bound(condition: Expr, stream: str, grid: Sequence[str]) -> tuple[str, Expr] | None:
    """("hi", exclusive end) or ("lo", first) of the streamed index, from a comparison that is affine in it and in grid indices."""
    assert isinstance(condition, Call)
    op, (a, b) = condition.op, condition.args
    if any(isinstance(e, Access) for e in (*walk(a), *walk(b))) or not {*free_indices(a), *free_indices(b)} <= {stream, *grid}:
        return None
    form = linear(Call("sub", (a, b)) if op in ("ge", "gt") else Call("sub", (b, a)))  # it says form >= 0, or form > 0
    if any(not isinstance(atom, Index) for atom, _ in form.terms):
        return None
    step = form.coefficient(stream)
    if step not in (1, -1):
        return None
    rest: Expr = Const(form.const - (1 if op in ("gt", "lt") else 0))
    for atom, c in form.terms:
        assert isinstance(atom, Index)
        if atom.name != stream:  # the largest value over the tile: the comparison must hold for one of its elements
            end = Index(f"{LAST if c > 0 else FIRST}{atom.name})")
            rest = simplify_expr(Call("add", (rest, simplify_expr(Call("mul", (Const(c), end))))))
    if step < 0:  # rest - j >= 0
        return "hi", simplify_expr(Call("add", (rest, Const(1))))
    return "lo", simplify_expr(Call("neg", (rest,)))
