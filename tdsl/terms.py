"""The terms of a maximum (or minimum) are a tensor of their own where two evaluations of them may differ in the last bit.

    m[i] max= tanh(x[i,j])      -->      m.in[i,j] = tanh(x[i,j]);  m[i] max= m.in[i,j]

The gradient goes to the terms that equal the maximum: none does if it is compared with what a library of functions rounds in another
way at another place of a vector. Sums, products and quotients are rounded in one way only. A maximum that is read under
stop_gradient alone, as softmax does, has no gradient.
"""

from __future__ import annotations

from dataclasses import replace

from tdsl.affine import Ranges
from tdsl.expand import witness
from tdsl.extents import Sizes, as_expr, loop_ranges, settled, symbolic_ranges, varies
from tdsl.ir import (
    Access,
    Call,
    Const,
    Expr,
    Index,
    Loop,
    Program,
    Range,
    Statement,
    children,
    expressions,
    fresh_name,
    statements,
    walk,
)
from tdsl.ops import DTYPES

# Functions whose results IEEE 754 settles, or that choose among their arguments.
_SETTLED = frozenset({"add", "sub", "mul", "div", "neg", "abs", "sign", "relu", "sqrt", "maximum", "minimum", "floor", "ceil", "round", "where"})
_SETTLED |= {"stop_gradient", "and", "or", "not", "isnan", "eq", "ne", "lt", "le", "gt", "ge", "floordiv", "mod", *DTYPES}


def named_terms(program: Program) -> Program:
    """`program` (flat, one name per version) with such terms named."""
    extremes = {s.target.tensor for s in statements(program.body) if s.op in ("max=", "min=") and s.reduced and not _settled(s.value)}
    extremes &= {*program.results, *(a for node in program.body for e in expressions(node) for a in _differentiated(e))}
    if not extremes:
        return program
    sizes = Sizes(program)
    taken = {*program.inputs, *(s.target.tensor for s in statements(program.body))}
    body: list[Statement | Loop] = []
    for node in program.body:
        body += _named(node, extremes, sizes, {}, taken)
        sizes.note(node)
    return replace(program, body=tuple(body))


def _named(node: Statement | Loop, extremes: set[str], sizes: Sizes, around: Ranges, taken: set[str]) -> list[Statement | Loop]:
    if isinstance(node, Loop):
        inside = {**around, **loop_ranges(node, sizes)}
        children_ = [new for child in node.body for new in _named(child, extremes, sizes, inside, taken)]
        return [replace(node, body=tuple(children_))]
    ranges = symbolic_ranges(node, sizes, around)
    if node.target.tensor not in extremes or node.op == "=" or not node.reduced or _settled(node.value) or {*node.indices, *around} - set(ranges):
        return [node]
    subscripts: list[Expr] = []
    shape: list[Expr] = []
    for i, (lo, hi) in ranges.items():
        first, last = as_expr(lo), as_expr(hi)
        if varies(first):
            return [node]
        size = witness(i, node.value) if varies(last) else Call("sub", (last, first))
        if size is None:
            return [node]
        subscripts.append(Index(i) if lo == 0 else Call("sub", (Index(i), first)))
        shape.append(size)
    name = fresh_name(f"{node.target.tensor}.in", taken)
    taken.add(name)
    term = Access(name, tuple(subscripts))
    made: list[Statement | Loop] = []
    if any(varies(as_expr(hi)) for _, hi in ranges.values()):  # rows of different lengths: nothing else tells the size
        indices = tuple(Index(f"n{d}") for d in range(len(shape)))
        whole = tuple(Range(i.name, Const(0), n) for i, n in zip(indices, shape, strict=True))
        made.append(Statement(whole, Access(name, indices), "=", Const(0)))
        sizes.note(made[0], around)
    made.append(settled(replace(node, target=term, op="="), ranges, sizes, around))
    sizes.note(made[-1], around)
    return [*made, settled(replace(node, value=term), ranges, sizes, around)]


def _settled(e: Expr) -> bool:
    """Whether two evaluations of an expression give the same bits."""
    return all(x.op in _SETTLED or _is_square(x) for x in walk(e) if isinstance(x, Call))


def _is_square(e: Call) -> bool:
    return e.op == "pow" and e.args[1] == Const(2)


def _differentiated(e: Expr) -> list[str]:
    """The tensors that are read, but for those under stop_gradient."""
    if isinstance(e, Call) and e.op == "stop_gradient":
        return []
    own = [e.tensor] if isinstance(e, Access) else []
    return own + [name for child in children(e) for name in _differentiated(child)]
