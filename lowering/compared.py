"""What must come out the same, to the last bit, wherever a program makes it.

    m[i] max= x[i,j] * y[j] + z[j];  ties[i] += where(x[i,j] * y[j] + z[j] == m[i], 1, 0)

No term equals the maximum if one kernel rounds the product and the other adds to it before it is rounded, or if one divides
and the other multiplies by the reciprocal.
"""

from __future__ import annotations

from collections.abc import Iterator

from tdsl.ir import Access, Call, Const, Expr, Index, Program, children, statements, walk
from tdsl.ops import OPS

# What adds no rounding that a fused multiplication and addition would leave out.
_EXACT = frozenset(
    {"add", "sub", "neg", "abs", "sign", "maximum", "minimum", "where", "stop_gradient", "and", "or", "not", "eq", "ne", "lt", "le", "gt", "ge"}
)


def compared_values(program: Program, saved: frozenset[str]) -> list[Expr]:
    """The sides of equations; and the terms of maxima and minima, among which the gradient, another program perhaps, looks for ties.

    saved: outputs that no user sees. A maximum that is read under stop_gradient alone has no gradient: softmax subtracts one.
    """
    body = list(statements(program.body))
    sides = [arg for s in body for e in walk(s.value) if isinstance(e, Call) and e.op in ("eq", "ne") for arg in e.args]
    seen = {*program.results} - saved | {a.tensor for s in body for a in _differentiated(s.value)}
    return sides + [s.value for s in body if s.op in ("max=", "min=") and s.target.tensor in seen]


def _differentiated(e: Expr) -> Iterator[Access]:
    if isinstance(e, Access):
        yield e
    if not (isinstance(e, Call) and e.op == "stop_gradient"):
        for child in children(e):
            yield from _differentiated(child)


def respelled(e: Expr) -> bool:
    """Whether an expression has a quotient in it, or an exponential: kernels may turn them into products and powers of 2, each its own."""
    return any(isinstance(x, Call) and (x.op == "div" or OPS[x.op].base[0]) for x in walk(e))


def rounds_between(e: Expr) -> bool:
    """Whether an expression adds to what was rounded before."""
    sums = (x for x in walk(e) if isinstance(x, Call) and x.op in ("add", "sub"))
    return any(isinstance(y, Call) and y.op not in _EXACT and not _of_indices(y) for x in sums for arg in x.args for y in walk(arg))


def _of_indices(e: Expr) -> bool:
    """Whether an expression is integer arithmetic on loop indices and whole numbers, which rounds nothing."""
    match e:
        case Index() | Const(value=int()):
            return True
        case Call(op="add" | "sub" | "mul" | "neg" | "floordiv" | "mod", args=args):
            return all(_of_indices(a) for a in args)
    return False
