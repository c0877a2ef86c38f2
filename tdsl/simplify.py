"""Rewrites that keep a program's meaning: algebra on expressions, doubled statements, dead statements."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from tdsl.ir import (
    Access,
    Call,
    Const,
    Expr,
    Index,
    Loop,
    Program,
    Size,
    Statement,
    expressions,
    free_indices,
    reads,
    rebuild,
    rebuild_range,
    rename_tensors,
    statements,
    substitute,
    walk,
)

_Node = TypeVar("_Node", Statement, Loop)


def simplify(program: Program, *, keep_all: bool = False) -> Program:
    """Algebra on every expression, then `merge_doubles`, `merge_same` and `drop_dead` (unless keep_all)."""
    body = tuple(_on_expressions(node) for node in program.body)
    simpler = merge_same(replace(program, body=merge_doubles(body)))
    return simpler if keep_all else drop_dead(simpler)


def _on_expressions(node: Statement | Loop) -> Statement | Loop:
    ranges = tuple(rebuild_range(r, simplify_expr) for r in node.ranges)
    if isinstance(node, Loop):
        return _one_nest(replace(node, ranges=ranges, body=tuple(_on_expressions(child) for child in node.body)))
    return replace(node, ranges=ranges, target=rebuild(node.target, simplify_expr), value=simplify_expr(node.value))  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------------------
# Dead statements


def drop_dead(program: Program) -> Program:
    """A statement whose target nothing reads on the way to an output is dropped, the last first."""
    return replace(program, body=_live_nodes(program.body, set(program.results)))


def _live_nodes(body: tuple[Statement | Loop, ...], live: set[str]) -> tuple[Statement | Loop, ...]:
    """The nodes that `live` needs; what they read joins it."""
    kept: list[Statement | Loop] = []
    for node in reversed(body):
        if isinstance(node, Loop):
            node = _live_loop(node, live)
        if any(s.target.tensor in live for s in statements((node,))):
            kept.append(node)
            live |= {a.tensor for a in reads(node)}
            live |= {size.tensor for size in _sizes(node)}
    return tuple(reversed(kept))


def _live_loop(loop: Loop, live: set[str]) -> Loop:
    """A loop without its dead statements: what one step reads, an earlier one may have written."""
    around = set(live)
    while True:
        inside = set(around)
        body = _live_nodes(loop.body, inside)
        if inside == around:
            return _one_nest(replace(loop, body=body))
        around = inside


def _one_nest(loop: Loop) -> Loop:
    """`for ordered t: for ordered s: ..` --> `for ordered t, ordered s: ..`"""
    if len(loop.body) == 1 and isinstance(loop.body[0], Loop):
        return replace(loop, ranges=(*loop.ranges, *loop.body[0].ranges), body=loop.body[0].body)
    return loop


def _sizes(node: Statement | Loop) -> list[Size]:
    return [e for expr in expressions(node) for e in walk(expr) if isinstance(e, Size)]


# ---------------------------------------------------------------------------------------------------------------------
# Common subexpressions


def merge_same(program: Program) -> Program:
    """`a[i] += X[i,k]; b[j] += X[j,l]; .. b[j]`  -->  `a[i] += X[i,k]; .. a[j]`, for tensors that one statement each defines and
    that are no outputs, and whose operands are not written again. (One that is an input is added to what it holds.)"""
    counts = Counter(s.target.tensor for s in statements(program.body))
    known: dict[object, str] = {}
    names: dict[str, str] = {}
    body: list[Statement | Loop] = []
    for node in program.body:
        if isinstance(node, Loop):
            body.append(node)
            continue
        node = _renamed(node, names)
        name = node.target.tensor
        key = _definition(node)
        steady = all(counts[a.tensor] <= (a.tensor not in program.inputs) for a in reads(node))
        if key is not None and counts[name] == 1 and steady and name not in program.inputs:
            if key in known and name not in program.results:
                names[name] = known[key]
                continue
            known.setdefault(key, name)
        body.append(node)
    return replace(program, body=tuple(_renamed(node, names) if isinstance(node, Loop) else node for node in body))


def _definition(s: Statement) -> object | None:
    """What a statement computes, whatever its target and its indices are called; None where it does not define a whole tensor."""
    left = [i.name for i in s.target.subscripts if isinstance(i, Index)]
    bounds = {r.index: r for r in s.ranges}
    used = {i for e in (s.value, *(e for r in s.ranges for e in (r.lo, r.hi) if e is not None)) for i in free_indices(e)}
    if len({*left}) < len(s.target.subscripts) or any(r.lo is None and i not in used for i, r in bounds.items()):
        return None  # or an index whose range its own target settles
    order = [*left, *(i for i in s.indices if i not in left)]
    to: dict[str, Expr] = {i: Index(f"#{n}") for n, i in enumerate(order)}
    ranges = tuple(tuple(None if e is None else substitute(e, to) for e in (bounds[i].lo, bounds[i].hi)) for i in order)
    op = "=" if s.op == "+=" and len(order) == len(left) else s.op
    return op, len(left), ranges, substitute(s.value, to)


def _renamed(node: _Node, names: Mapping[str, str]) -> _Node:
    """A statement or loop that reads other names."""
    if not names:
        return node

    def visit(e: Expr) -> Expr:
        return rename_tensors(e, names)

    ranges = tuple(rebuild_range(r, visit) for r in node.ranges)
    if isinstance(node, Loop):
        return replace(node, ranges=ranges, body=tuple(_renamed(child, names) for child in node.body))  # type: ignore[type-var]
    target = replace(node.target, subscripts=tuple(visit(e) for e in node.target.subscripts))
    return replace(node, ranges=ranges, target=target, value=visit(node.value))


# ---------------------------------------------------------------------------------------------------------------------
# The same operand twice


def merge_doubles(body: tuple[Statement | Loop, ...]) -> tuple[Statement | Loop, ...]:
    """`x.grad[k] += g * x[k]` twice --> `x.grad[k] += 2 * g * x[k]`, whatever the order of factors and the names of loop indices,
    where nothing between the two reads the target, sets it, or writes an operand."""
    merged: list[Statement | Loop] = []
    times: list[int] = []
    for node in body:
        if isinstance(node, Loop):
            node = replace(node, body=merge_doubles(node.body))
        place = _double(merged, node) if isinstance(node, Statement) and node.op == "+=" else None
        if place is None:
            merged.append(node)
            times.append(1)
        else:
            times[place] += 1
    return tuple(
        node if n == 1 or isinstance(node, Loop) else replace(node, value=simplify_expr(_times(n, node.value)))
        for node, n in zip(merged, times, strict=True)
    )


def _double(before: Sequence[Statement | Loop], s: Statement) -> int | None:
    """The place of a statement that `s` repeats and may be counted with."""
    operands = {a.tensor for a in reads(s)}
    for place in reversed(range(len(before))):
        node = before[place]
        if not isinstance(node, Statement):
            return None
        if _alike(node, s):
            return place
        set_again = node.target.tensor == s.target.tensor and node.op != "+="
        if set_again or node.target.tensor in operands or any(a.tensor == s.target.tensor for a in reads(node)):
            return None
    return None


def _times(n: int, value: Expr) -> Expr:
    """n * value, with the number in front of the product and behind its sign."""
    if isinstance(value, Call) and value.op == "neg":
        return Call("neg", (_times(n, value.args[0]),))
    if isinstance(value, Call) and value.op == "mul":
        return Call("mul", (_times(n, value.args[0]), value.args[1]))
    return Call("mul", (Const(n), value))


def _alike(a: Statement, b: Statement) -> bool:
    if (
        a.op != b.op
        or a.target.tensor != b.target.tensor
        or len(a.ranges) != len(b.ranges)
        or a.target.tensor in {r.tensor for r in reads(b)}
    ):
        return False

    def key(s: Statement) -> tuple[object, ...]:
        to: dict[str, Expr] = {r.index: Index(f"#{n}") for n, r in enumerate(s.ranges)}
        ranges = tuple((r.lo, r.hi) for r in s.ranges)
        value = substitute(s.value, to)
        return substitute(s.target, to), frozenset(_product_terms(value)), len(_product_terms(value)), ranges

    return key(a) == key(b) and sorted(map(repr, _product_terms(a.value))) == sorted(map(repr, _product_terms(b.value)))


def _product_terms(e: Expr) -> list[Expr]:
    if isinstance(e, Call) and e.op == "mul":
        return [*_product_terms(e.args[0]), *_product_terms(e.args[1])]
    if isinstance(e, Call) and e.op == "neg":
        return [Const(-1), *_product_terms(e.args[0])]
    return [e]


# ---------------------------------------------------------------------------------------------------------------------
# Products


def factors(value: Expr) -> list[Expr]:
    """The factors of a product; the divisor of a quotient is a factor 1/b, and a sign is a factor -1."""
    if isinstance(value, Call) and value.op == "mul":
        return [f for arg in value.args for f in factors(arg)]
    if isinstance(value, Call) and value.op == "div":
        return [*factors(value.args[0]), Call("div", (Const(1), value.args[1]))]
    if isinstance(value, Call) and value.op == "neg":
        return [Const(-1), *factors(value.args[0])]
    return [value]


def product(terms: list[Expr]) -> Expr:
    """The product of some factors; 1/b divides."""
    result: Expr | None = None
    divisors: list[Expr] = []
    for term in terms:
        match term:
            case Call(op="div", args=(Const(value=1), b)):
                divisors.append(b)
            case _:
                result = term if result is None else Call("mul", (result, term))
    result = Const(1) if result is None else result
    for b in divisors:
        result = Call("div", (result, b))
    return simplify_expr(result)


# ---------------------------------------------------------------------------------------------------------------------
# Algebra

_FOLD: dict[str, Callable[..., bool | int | float]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "neg": operator.neg,
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
    "and": lambda a, b: bool(a and b), "or": lambda a, b: bool(a or b), "not": operator.not_,
}  # fmt: skip
ONE, ZERO = Const(1), Const(0)


def simplify_expr(expr: Expr) -> Expr:
    """Constants folded; x*1, x+0, x-0, x**1, -(-x), a + (-b), where(True, a, b) and where(c, a, a) reduced. Never x*0: x may be NaN."""
    expr = rebuild(expr, simplify_expr)
    if not isinstance(expr, Call):
        return expr
    args = expr.args
    if expr.op in _FOLD and all(isinstance(a, Const) for a in args):
        return Const(_FOLD[expr.op](*(a.value for a in args if isinstance(a, Const))))
    match expr.op, args:
        case "pow", (Const(value=a), Const(value=b)) if a > 0:
            return Const(a**b)
        case "mul", (a, b) if _is(b, 1):
            return a
        case "mul", (a, b) if _is(a, 1):
            return b
        case "mul", (a, b) if _is(a, -1):
            return simplify_expr(Call("neg", (b,)))
        case "mul", (Call(op="neg", args=(a,)), b):
            return simplify_expr(Call("neg", (Call("mul", (a, b)),)))
        case "mul", (a, Call(op="neg", args=(b,))):
            return simplify_expr(Call("neg", (Call("mul", (a, b)),)))
        case "div", (a, b) if _is(b, 1) and isinstance(a, Call) and a.op == "div":
            return a
        case "add" | "sub", (a, b) if _is(b, 0):
            return a
        case "add", (a, b) if _is(a, 0):
            return b
        case "sub", (a, b) if _is(a, 0):
            return simplify_expr(Call("neg", (b,)))
        case "add", (a, Call(op="neg", args=(b,))):
            return Call("sub", (a, b))
        case "sub", (a, Call(op="neg", args=(b,))):
            return Call("add", (a, b))
        case "neg", (Call(op="neg", args=(a,)),):
            return a
        case "pow", (a, b) if _is(b, 1):
            return a
        case "not", (Call(op="not", args=(a,)),) if _boolean(a):
            return a
        case "where", (Const(value=c), a, b):
            return a if c else b
        case "where", (_, a, b) if a == b and isinstance(a, Const | Access):
            return a
    return expr


def _is(e: Expr, value: int) -> bool:
    """An integer constant: a float one would promote, and so it stays."""
    return isinstance(e, Const) and e.value.__class__ is int and e.value == value


def _boolean(e: Expr) -> bool:
    return isinstance(e, Call) and e.op in ("eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not")
