"""Conditions on integers, and the terms that they leave: the forms that changes of variable read and make."""

from __future__ import annotations

from collections.abc import Sequence

from tdsl.affine import Affine, Bound, linear
from tdsl.ir import Access, Call, Const, Expr, Index, Pad, Size, walk

_INTEGER = frozenset({"add", "sub", "mul", "neg", "floordiv", "mod"})
# Functions that are finite at zero: a factor made of them leaves a product with a zero in it zero.
_FINITE = frozenset(
    {
        "add",
        "sub",
        "mul",
        "neg",
        "maximum",
        "minimum",
        "abs",
        "exp",
        "exp2",
        "expm1",
        "sin",
        "cos",
        "tanh",
        "sigmoid",
        "relu",
        "silu",
        "gelu",
        "erf",
    }
)


def shown(form: Affine) -> Expr:
    """A form as IR, with what stands beside a quotient inside it: (u+r+1)//2 - r --> (u-r+1)//2."""
    quotients = [
        (atom, c) for atom, c in form.terms if isinstance(atom, Call) and atom.op == "floordiv" and isinstance(atom.args[1], Const)
    ]
    if len(quotients) != 1 or quotients[0][1] != 1:
        return form.expr()
    atom = quotients[0][0]
    assert isinstance(atom, Call) and isinstance(atom.args[1], Const)
    rest = form - Affine(0, ((atom, 1),))
    return Call("floordiv", ((linear(atom.args[0]) + rest.scale(int(atom.args[1].value))).expr(), atom.args[1]))


def as_expr_or_int(e: Expr) -> Bound:
    """A bound as affine.py keeps it: a number where it is one."""
    return int(e.value) if isinstance(e, Const) else e


def integral(e: Expr) -> bool:
    """Whether an expression is integer arithmetic on indices, sizes and integer scalars only (a scalar alone may be a float)."""
    if isinstance(e, Call):
        return e.op in _INTEGER and all(integral(a) for a in e.args)
    return isinstance(e, Index | Size) or (isinstance(e, Const) and e.value.__class__ is int)


def unguarded(value: Expr) -> tuple[list[Expr], Expr]:
    """where(a and b, where(c, x, 0), 0) --> [a, b, c], x."""
    if isinstance(value, Call) and value.op == "where" and isinstance(value.args[2], Const) and value.args[2].value == 0:
        inner, body = unguarded(value.args[1])
        return [*_conjuncts(value.args[0]), *inner], body
    return [], value


def _conjuncts(e: Expr) -> list[Expr]:
    if isinstance(e, Call) and e.op == "and":
        return [*_conjuncts(e.args[0]), *_conjuncts(e.args[1])]
    return [e]


def conjunction(terms: Sequence[Expr]) -> Expr:
    """[a, b, c] --> a and b and c."""
    result = terms[0]
    for term in terms[1:]:
        result = Call("and", (result, term))
    return result


def vanishing(e: Expr) -> list[Access]:
    """The accesses whose zero makes `e` zero, whatever finite values the others have."""
    match e:
        case Access():
            return [e]
        case Call(op="mul", args=(a, b)):
            left, right = vanishing(a), vanishing(b)
            return [*(left if _finite(b) else []), *(right if _finite(a) else [])]
        case Call(op="div", args=(a, Const() | Size())):
            return vanishing(a)
        case Call(op="neg" | "stop_gradient" | "float16" | "bfloat16" | "float32" | "float64", args=(a,)):
            return vanishing(a)
        case Call(op="add" | "sub", args=(a, b)):
            right = vanishing(b)
            return [x for x in vanishing(a) if x in right]
        case Call(op="where", args=(_, a, Const(value=0))):
            return vanishing(a)
    return []


def _finite(e: Expr) -> bool:
    """Whether an expression is finite where the padded reads in it are zero."""
    if isinstance(e, Call):
        padded = any(isinstance(s, Pad) for a in walk(e) if isinstance(a, Access) for s in a.subscripts)
        allowed = (
            e.op in _FINITE
            or e.op in ("where", "float16", "bfloat16", "float32", "float64")
            or (e.op == "div" and isinstance(e.args[1], Const | Size))
        )
        power = e.op == "pow" and isinstance(e.args[1], Const) and e.args[1].value > 0
        return not padded or ((allowed or power) and all(_finite(a) for a in (e.args[1:] if e.op == "where" else e.args)))
    return True
