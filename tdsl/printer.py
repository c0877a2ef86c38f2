"""Programs as text: the notation, canonical. A printed program parses back to an equal one, and is the same everywhere.

Statement((Range("i"), Range("k")), Y[i], "+=", A[i,k])  -->  for i, k:  Y[i] += A[i,k]
"""

from __future__ import annotations

import math

from tdsl.ir import (
    Access,
    Call,
    Clamp,
    Const,
    Expr,
    Index,
    Loop,
    Output,
    Pad,
    Program,
    Range,
    Reduce,
    Size,
    Softmax,
    Statement,
    fresh_name,
    statements,
)
from tdsl.ops import OPERATORS
from tdsl.signature import header_needed

_UNARY = OPERATORS["neg"][1]
_POWER = OPERATORS["pow"][1]
_ATOM = _POWER + 1
_COMPARISON = OPERATORS["eq"][1]
_INDENT = "    "


def print_program(p: Program) -> str:
    """The program in the notation; its header stands there only where inference from the body alone would give another signature."""
    lines = [line for node in p.body for line in _lines(node)]
    if not header_needed(p):
        return "\n".join(lines)
    return "\n".join([print_header(p), *(_INDENT + line for line in lines)])


def print_header(p: Program) -> str:
    """The `def` line: names, index names as sizes, outputs."""
    params = [x.name + (f"[{','.join(x.dims)}]" if x.dims else "") for x in p.params]
    return f"def {p.name}({', '.join(params)}) -> {', '.join(_output(o, p) for o in p.outputs)}:"


def print_statement(s: Statement | Loop) -> str:
    """One statement on its line, always with its `for` line; a loop of several statements as an indented block."""
    return "\n".join(_lines(s))


def print_expr(e: Expr) -> str:
    """An expression, with the fewest parentheses and spaces around its operators."""
    return _show(e, 0, False)


def _lines(node: Statement | Loop) -> list[str]:
    if isinstance(node, Statement):
        return [_line(node.ranges, node)]
    if len(node.body) == 1 and isinstance(node.body[0], Statement):
        return [_line(node.ranges + node.body[0].ranges, node.body[0])]
    return [f"for {_ranges(node.ranges)}:", *(_INDENT + line for child in node.body for line in _lines(child))]


def _line(ranges: tuple[Range, ...], s: Statement) -> str:
    loops = f"for {_ranges(ranges)}:  " if ranges else ""
    return f"{loops}{_show(s.target, 0, False)} {s.op} {print_expr(s.value)}"


def _ranges(ranges: tuple[Range, ...]) -> str:
    return ", ".join(_range(r) for r in ranges)


def _range(r: Range) -> str:
    order = f"{r.order} " if r.order else ""
    if r.lo is None or r.hi is None:
        return order + r.index
    return f"{order}{r.index} in {_show(r.lo, 0, True)}:{_show(r.hi, 0, True)}"


def _show(e: Expr, least: int, tight: bool) -> str:
    """`e`, in parentheses where it binds less than `least`; tight: no spaces, as inside subscripts."""
    match e:
        case Const(value=value):
            text, binds = _number(value)
        case Index(name=name):
            return name
        case Access(tensor=tensor, subscripts=subscripts):
            return tensor + (f"[{','.join(_show(s, 0, True) for s in subscripts)}]" if subscripts else "")
        case Size(tensor=tensor, dim=dim):
            return f"size({tensor}, {dim})"
        case Pad(value=value, lo=lo, hi=hi):
            parts = ", ".join(_show(x, 0, tight) for x in (value, lo, hi) if x is not None)
            return f"pad({parts})"
        case Clamp(value=value):
            return f"clamp({_show(value, 0, tight)})"
        case Reduce(op=op, ranges=ranges, body=body, init=init):
            rest = "" if init is None else f", init={_show(init, 0, tight)}"
            return f"{op}[{_ranges(ranges)}]({_show(body, 0, tight)}{rest})"
        case Softmax(over=over, body=body):
            return f"softmax[{', '.join(over)}]({_show(body, 0, tight)})"
        case Call(op=op, args=args) if op not in OPERATORS:
            parts = ", ".join(_show(a, 0, tight) for a in args)
            return f"{op}({parts})"
        case Call():
            text, binds = _operation(e, tight)
    return text if binds >= least else f"({text})"


def _operation(e: Call, tight: bool) -> tuple[str, int]:
    symbol, binds = OPERATORS[e.op]
    if e.op == "neg":  # -(1) is the negation of 1, -1 the number
        operand = e.args[0]
        return f"-({_show(operand, 0, tight)})" if isinstance(operand, Const) else f"-{_show(operand, _UNARY, tight)}", binds
    if e.op == "not":
        return f"not {_show(e.args[0], binds, tight)}", binds
    left, right = (binds, binds + 1)
    if e.op == "pow":
        left, right = _ATOM, _UNARY
    elif binds == _COMPARISON:
        left = binds + 1
    a, b = _show(e.args[0], left, tight), _show(e.args[1], right, tight)
    space = "" if tight and not symbol.isalpha() else " "
    return f"{a}{space}{symbol}{space}{b}", binds


def _number(value: bool | int | float) -> tuple[str, int]:
    text = repr(value)
    negative = not isinstance(value, bool) and (value < 0 or text.startswith("-"))
    if isinstance(value, float) and math.isinf(value):
        text = "-inf" if negative else "inf"
    return text, _UNARY if negative else _ATOM


def _output(o: Output, p: Program) -> str:
    if o.sizes is None:
        return o.name
    first: dict[str, Size] = {}  # the size that a bare name in the header means
    for param in p.params:
        for d, name in enumerate(param.dims):
            first.setdefault(name, Size(param.name, d))
    named = {size: name for name, size in first.items()}
    taken = {*first, *p.inputs}
    target = next(s.target for s in statements(p.body) if s.target.tensor == o.name)
    shown = []
    for size, subscript in zip(o.sizes, target.subscripts, strict=True):
        if size is None:  # any name that means nothing leaves the place to inference
            shown.append(fresh_name(subscript.name if isinstance(subscript, Index) else "n", taken))
        else:
            shown.append(_show(_by_name(size, named), 0, True))
    return f"{o.name}[{','.join(shown)}]"


def _by_name(size: Expr, named: dict[Size, str]) -> Expr:
    if isinstance(size, Size):
        return Index(named[size]) if size in named else size
    return Call(size.op, tuple(_by_name(a, named) for a in size.args)) if isinstance(size, Call) else size
