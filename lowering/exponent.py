"""Exponentials as hardware has them: a GPU computes 2**x, so that exp(x) costs one multiplication by log2(e) more.

    exp(scale * s[i,j] - m[i])   -->   exp2(s[i,j] * (scale * log2(e)) - m[i] * log2(e))

The factor goes to what varies less than the exponent, where it is multiplied once for a row or once for all: a fused
multiply-add and the exponential are left. (FlashAttention-2, Dao, 2023, does this by hand.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lowering.scaled import scaled
from tdsl.ir import Access, Call, Const, Expr, Statement
from tdsl.ops import OPS
from tdsl.simplify import simplify_expr

Axes = Callable[[Expr], frozenset[str]]


def in_base_2(e: Call, axes: Axes, definitions: Mapping[str, Statement]) -> Expr | None:
    """`f(x)` as `g(c * x)`, where f has such a g (a column of ops.py); the factor spread over x where that saves operations.

    axes: of the tile that an expression is. definitions: elementwise statements whose values stand for the tensors.
    """
    base, factor = OPS[e.op].base
    if not base:
        return None
    whole = axes(e)
    if _spreads(e.args[0], axes, whole, definitions):
        return Call(base, (_spread(e.args[0], factor, axes, whole, definitions),))
    return Call(base, (_signed(e.args[0], factor, definitions),))


def _spreads(e: Expr, axes: Axes, whole: frozenset[str], definitions: Mapping[str, Statement]) -> bool:
    """Whether a factor of `e` meets something that varies less than `e` does."""
    match e:
        case Access(tensor=name) if name in definitions:
            return _spreads(definitions[name].value, axes, whole, definitions)
        case Call(op="neg" | "stop_gradient", args=(x,)):
            return _spreads(x, axes, whole, definitions)
        case Call(op="add" | "sub" | "mul", args=(a, b)):
            return axes(a) < whole or axes(b) < whole or (e.op != "mul" and any(_spreads(x, axes, whole, definitions) for x in (a, b)))
        case Call(op="div", args=(_, b)):
            return axes(b) < whole
        case Call(op="where"):
            return scaled(e, definitions) is not None
    return False


def _signed(e: Expr, factor: float, definitions: Mapping[str, Statement]) -> Expr:
    """`factor * e`, a sign of e being the factor's."""
    match e:
        case Access(tensor=name) if name in definitions and _negates(definitions[name].value):
            return _signed(definitions[name].value, factor, definitions)
        case Call(op="neg", args=(x,)):
            return _signed(x, -factor, definitions)
    return simplify_expr(Call("mul", (e, Const(factor))))


def _negates(e: Expr) -> bool:
    return isinstance(e, Call) and e.op == "neg"


def _spread(e: Expr, factor: float, axes: Axes, whole: frozenset[str], definitions: Mapping[str, Statement]) -> Expr:
    """`factor * e`."""

    def spread(x: Expr, by: float = factor) -> Expr:
        """What varies as much as the exponent and has nothing to gain is multiplied whole."""
        return (
            _spread(x, by, axes, whole, definitions)
            if axes(x) < whole or _spreads(x, axes, whole, definitions)
            else _signed(x, by, definitions)
        )

    match e:
        case Access(tensor=name) if name in definitions and axes(e) == whole:
            return spread(definitions[name].value)
        case Call(op="stop_gradient", args=(x,)):
            return spread(x)
        case Call(op="neg", args=(x,)):
            return spread(x, -factor)
        case Call(op="add" | "sub", args=(a, b)):
            return Call(e.op, (spread(a), spread(b)))
        case Call(op="mul", args=(a, b)) if axes(a) < whole or axes(b) < whole:
            low, high = (a, b) if len(axes(a)) <= len(axes(b)) else (b, a)
            return Call("mul", (high, spread(low)))
        case Call(op="div", args=(a, b)) if axes(b) < whole:
            return Call("mul", (a, simplify_expr(Call("div", (Const(factor), b)))))
        case Call(op="where") if (found := scaled(e, definitions)) is not None:
            return Call("mul", (found[1], Const(found[0] * factor)))
    return simplify_expr(Call("mul", (e, Const(factor))))
