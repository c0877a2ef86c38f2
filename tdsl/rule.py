"""The swap rule, for one expression: what each occurrence of an operand gets of the cotangent of the whole.

    A[h,i,k] * B[h,j,k], whose cotangent is g    -->    A[h,i,k] gets g * B[h,j,k],  B[h,j,k] gets A[h,i,k] * g
"""

from __future__ import annotations

from collections.abc import Iterator

from tdsl.ir import Access, Call, Const, Expr
from tdsl.ops import OPS, cotangent


def push(expr: Expr, g: Expr, guards: tuple[Expr, ...], y: Expr | None = None) -> Iterator[tuple[Access, Expr]]:
    """(operand, its cotangent) for every occurrence of an operand in `expr`, whose own cotangent is `g`.

    guards: the conditions under which the occurrence counts; they are applied outside of everything, so that a NaN
    of a branch that was not taken never reaches a sum. y: an access that holds the value of `expr`, if any.
    """
    match expr:
        case Access():
            for condition in reversed(guards):
                g = Call("where", (condition, g, Const(0)))
            yield expr, g
        case Call(op="where", args=(condition, a, b)):
            yield from push(a, g, (*guards, condition))
            yield from push(b, g, (*guards, Call("not", (condition,))))
        case Call(op="mul"):  # the swap itself: the factor's place is taken by the cotangent
            factors = list(multiplied(expr))
            for n, factor in enumerate(factors):
                yield from push(factor, times([*factors[:n], g, *factors[n + 1 :]]), guards)
        case Call(op=op) if op in OPS:
            for n, arg in enumerate(expr.args):
                part = cotangent(expr, n, g, expr if y is None else y)
                if part is not None:
                    yield from push(arg, part, guards)
        case _:
            return


def multiplied(expr: Expr) -> Iterator[Expr]:
    """What a product multiplies, quotients and signs as they stand."""
    if isinstance(expr, Call) and expr.op == "mul":
        for arg in expr.args:
            yield from multiplied(arg)
    else:
        yield expr


def times(factors: list[Expr]) -> Expr:
    """The product of one or more factors, from the left."""
    result = factors[0]
    for factor in factors[1:]:
        result = Call("mul", (result, factor))
    return result
