"""Text -> Program: the layout of lines, the tree of notation.lark as nodes, and syntax errors in words.

parse("for i, k:  Y[i] += A[i,k]")   -->   Program("Y", (A[i,k],), (Y,), (Statement(..),))
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

from tdsl.calls import call, check_name, negative, reduction
from tdsl.errors import ParseError
from tdsl.header import Header
from tdsl.ir import Access, Call, Const, Expr, Loop, Output, Param, Program, Range, Span, Statement
from tdsl.layout import Layout, LayoutError
from tdsl.ops import OPERATORS
from tdsl.resolve import resolve
from tdsl.signature import Body

if TYPE_CHECKING:
    from lark import Lark, Token, Tree

# What the terminals are called in errors, in the order that lists them. The starts of an expression and the operators are named together.
_STARTS = frozenset({"NAME", "NUMBER", "INF", "_LPAR"})
_OPERATOR_TERMS = frozenset({"OR", "AND", "COMPARE", "PLUS", "MINUS", "TIMES", "POWER"})
_WORDS = {
    "_END": "the end of the statement",
    "_INDENT": "an indented block",
    "_DEDENT": "the end of the block",
    "ASSIGN": "one of = += *= max= min=",
    "DEF": "`def`",
    "FOR": "`for`",
    "IN": "`in`",
    "ORDER": "`ordered`, `reversed`",
    "NAME": "a name",
    "NUMBER": "a number",
    "_LPAR": "`(`",
    "_RPAR": "`)`",
    "_LSQB": "`[`",
    "_RSQB": "`]`",
    "_COMMA": "`,`",
    "_COLON": "`:`",
    "_ARROW": "`->`",
    "NOT": "`not`",
    "$END": "the end of the text",
    "KEYWORD": "`init=`",
    "INF": "`inf`",
    "MINUS": "`-`",
}
_SYMBOLS = {symbol: op for op, (symbol, _) in OPERATORS.items() if op != "neg"}


def parse(source: str, name: str | None = None, origin: str = "", header: Header | None = None) -> Program:
    """The Program of a text.

    name: the program's name, before the one of its `def` line. origin: the file that the text comes from, for errors.
    header: the signature of a text that has no `def` line.
    Raises tdsl.errors.ParseError for syntax, and what `resolve` raises.
    """
    reader = _Reader(source, origin)
    written, body = reader.program(_tree(source, origin))
    if header is not None and written is not None:
        start = source.index("def")
        raise ParseError("a `def` line stands where only statements do", span=Span(source, start, start + 3, origin), help="leave it out")
    return resolve(body, header or written, name=name)


@cache
def _lark() -> Lark:
    from lark import Lark  # `import tdsl` must be quick

    return Lark.open(
        "notation.lark",
        rel_to=__file__,
        parser="lalr",
        lexer="contextual",
        postlex=Layout(),
        propagate_positions=True,
        maybe_placeholders=False,
    )


def _tree(source: str, origin: str) -> Tree[Token]:
    from lark.exceptions import UnexpectedCharacters, UnexpectedToken

    try:
        return _lark().parse(source)
    except UnexpectedToken as error:
        found = error.token
        start = len(source.rstrip()) if found.type == "$END" else found.start_pos or 0
        span = Span(source, start, start + max(1, len(found) if found.type not in _LAYOUT else 1), origin)
        accepts = error.accepts or error.expected
        raise ParseError(_expected(accepts, found), span=span, help=_mend(accepts, found, source)) from None
    except UnexpectedCharacters as error:
        at = error.pos_in_stream or 0
        help_ = _CHARACTERS.get(source[at], "see the grammar: names, numbers, brackets and the operators of Python's arithmetic")
        raise ParseError(f"`{source[at]}` is not in the notation", span=Span(source, at, at + 1, origin), help=help_) from None
    except LayoutError as error:
        raise ParseError(error.what, span=Span(source, error.start, error.end, origin), help=error.help) from None


_LAYOUT = frozenset({"_END", "_INDENT", "_DEDENT", "$END"})
_CHARACTERS = {
    "&": "write `and`, or `bitwise_and(a, b)`",
    "|": "write `or`, or `bitwise_or(a, b)`",
    "~": "write `not`",
    "^": "write `**`, or `bitwise_xor(a, b)`",
    "!": "write `not a`, or `a != b`",
    "@": "write the product out: `Y[i,j] += A[i,k] * B[k,j]`",
    "{": "write `(` or `[`",
    "}": "write `)` or `]`",
    "'": "there are no strings here",
    '"': "there are no strings here",
    ".": "write `0.5`; a name has letters on both sides of its dot",
}


def _expected(accepts: set[str], found: Token) -> str:
    rest = set(accepts)
    words = []
    if rest >= _STARTS:
        words.append("an expression")
        rest -= _STARTS | {"MINUS", "NOT", "KEYWORD"}
    elif len(rest & _OPERATOR_TERMS) > 2:
        words.append("an operator")
        rest -= _OPERATOR_TERMS
    words += [word for terminal, word in _WORDS.items() if terminal in rest]
    listed = words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]
    what = _WORDS[found.type] if found.type in _LAYOUT else f"`{str(found).strip()}`"
    return f"expected {listed}, found {what}"


def _mend(accepts: set[str], found: Token, source: str) -> str:
    """How to mend: the first row of what is known of such places, else what a statement looks like."""
    return next((help for fits, help in _mends(accepts, found, source) if fits), _STATEMENT)


_STATEMENT = "a statement is `for i, j:  Y[i] += A[i,j]`, and its `for` line may be left out"


def _mends(accepts: set[str], found: Token, source: str) -> Iterator[tuple[bool, str]]:
    text, kind = str(found), found.type
    before = source[: found.start_pos or 0].rstrip()
    line = before[before.rfind("\n") + 1 :].lstrip()
    ends = kind in ("_END", "$END")
    if "ASSIGN" in accepts:
        assignments = "the assignments are = += *= max= min="
        yield text == "==", "write `=` to assign"
        yield text == "-", f"{assignments}; write `Y[i] += -(..)` to subtract"
        yield text == "/", f"{assignments}; write `Y[i] *= 1 / (..)` to divide"
        yield text == "(", "what stands on the left is written: a name and its subscripts, `Y[i]`"
        yield ends, "a statement writes something: `Y[i] = ..`, `Y[i] += ..`"
        yield kind in ("NAME", "_COLON") or text == "%", assignments
    yield kind in ("DEF", "FOR", "IN", "ORDER", "OR", "AND", "NOT", "INF") and "NAME" in accepts, (
        f"`{text}` is a reserved word; write another name"
    )
    yield "_INDENT" in accepts, "indent the statements under the `for` line, or write one on the same line"
    yield kind == "_END" and "_COLON" in accepts, "a `for` line and a `def` line end with `:`"
    yield line.startswith("for ") and "_COLON" in accepts, "a range is `for i in lo:hi`, half open, and a `for` line ends with `:`"
    yield line.startswith("def ") and "_ARROW" in accepts, "a `def` line names its outputs: `def f(A[i]) -> Y[i]:`"
    yield kind == "_RPAR" and "_RSQB" in accepts, "write the matching `]` before it"
    yield kind == "_RSQB" and "_RPAR" in accepts, "write the matching `)` before it"
    yield text == "if" and "TIMES" in accepts, "write `where(condition, a, b)`"
    yield kind == "NAME" and "TIMES" in accepts, "a product needs its `*`"
    yield kind == "_LSQB" and before.endswith("]"), "the subscripts of an element stand in one pair of brackets: `A[i,j]`"
    yield kind == "ASSIGN" and "TIMES" in accepts, "a statement ends with its line, or with `;`"
    yield kind == "_COLON" and accepts >= _STARTS, "there are no slices: every dimension has an index, `A[j,i]`"
    yield text == "+" and before.endswith("="), "write `+=`, or leave the sign out"
    yield ends and accepts >= _STARTS, "a statement ends with its line; inside brackets it may go on in the next one"
    yield kind == "$END", "a program is statements: `Y[i,j] += A[i,k] * B[k,j]`"


# ---------------------------------------------------------------------------------------------------------------------
# Trees to nodes


class _Reader:
    """Statements as written, with spans, from the tree of one text."""

    def __init__(self, source: str, origin: str):
        self.source = source
        self.origin = origin

    def span(self, node: Tree[Token] | Token) -> Span:
        at: Any = node if _is_token(node) else node.meta  # type: ignore[union-attr]
        return Span(self.source, at.start_pos or 0, at.end_pos or 0, self.origin)

    def name(self, token: Token) -> str:
        return check_name(str(token), self.span(token))

    def program(self, tree: Tree[Token]) -> tuple[Header | None, Body]:
        children: list[Any] = list(tree.children)
        header = self.header(children.pop(0)) if children[0].data == "header" else None
        return header, tuple(self.item(c) for c in children)

    def header(self, tree: Tree[Token]) -> Header:
        _, name, *rest = tree.children
        params, outputs = [], []
        for part in rest:
            assert not isinstance(part, str)
            first, *dims = part.children
            if part.data == "param":
                params.append(Param(self.name(first), tuple(self.name(d) for d in dims), span=self.span(part)))  # type: ignore[arg-type]
            else:
                sizes = tuple(self.expr(d) for d in dims) if dims else None
                outputs.append(Output(self.name(first), sizes, span=self.span(part)))  # type: ignore[arg-type]
        return Header(str(name), tuple(params), tuple(outputs))

    def item(self, tree: Tree[Token]) -> Statement | Loop:
        children: list[Any] = list(tree.children)
        ranges: tuple[Range, ...] = ()
        start = self.span(children[0]).start
        if _is_token(children[0]):
            ranges = tuple(self.range(r) for r in children[1].children)
            children = children[2:]
        if tree.data == "block":
            end = self.span(children[-1]).end
            return Loop(ranges, tuple(self.item(c) for c in children), span=Span(self.source, start, end, self.origin))
        target, op, value = children[0].children
        end = self.span(children[0]).end
        return Statement(ranges, self.target(target), str(op), self.expr(value), span=Span(self.source, start, end, self.origin))

    def target(self, tree: Tree[Token]) -> Access:
        name, *bracket = tree.children
        return Access(self.name(name), self.bracket(bracket[0]) if bracket else (), span=self.span(tree))  # type: ignore[arg-type]

    def bracket(self, tree: Any) -> tuple[Expr, ...]:
        for c in tree.children:
            if not _is_token(c) and c.data == "range":
                raise ParseError(
                    "a range stands where a subscript is needed",
                    span=self.span(c),
                    help="ranges are for the `for` line, and for reductions: `sum[j in 0:n](..)`",
                )
        return tuple(self.expr(c) for c in tree.children)

    def range(self, node: Any) -> Range:
        span = self.span(node)
        if _is_token(node):
            if node.type != "NAME":
                raise self.no_range(span)
            return Range(self.name(node), span=span)
        if node.data != "range":
            raise self.no_range(span)
        order = str(node.children[0]) if node.children[0].type == "ORDER" else ""
        name, *limits = node.children[1:] if order else node.children
        lo, hi = (self.expr(limits[1]), self.expr(limits[2])) if limits else (None, None)
        return Range(self.name(name), lo, hi, order, span=span)

    @staticmethod
    def no_range(span: Span) -> ParseError:
        return ParseError(
            "a reduction goes over indices, and this is no index", span=span, help="write `sum[j](..)`, or `sum[j in 0:n](..)`"
        )

    def expr(self, node: Any) -> Expr:
        span = self.span(node)
        if _is_token(node):
            return self.leaf(node, span)
        parts = node.children
        match node.data:
            case "binary":
                a, symbol, b = parts
                return Call(_SYMBOLS[str(symbol)], (self.expr(a), self.expr(b)), span=span)
            case "compare":
                if len(parts) > 3:
                    a, b, c = (self.source[self.span(p).start : self.span(p).end] for p in parts[:5:2])
                    mend = f"write `{a} {parts[1]} {b} and {b} {parts[3]} {c}`"
                    raise ParseError("comparisons do not chain", span=span, help=mend)
                return Call(_SYMBOLS[str(parts[1])], (self.expr(parts[0]), self.expr(parts[2])), span=span)
            case "unary":
                sign, operand = parts
                if sign.type == "NOT":
                    return Call("not", (self.expr(operand),), span=span)
                x = self.expr(operand)
                literal = isinstance(x, Const) and "(" not in self.source[sign.end_pos : self.span(operand).end]
                return negative(x, literal, span)
            case "access":
                return Access(self.name(parts[0]), self.bracket(parts[1]), span=span)
            case "call":
                args, init = self.arguments(parts[1:])
                if init is not None:
                    raise ParseError("init= is for reductions", span=init.span, help=f"write `{parts[0]}(..)` without it")
                return call(str(parts[0]), args, span)
            case "reduction":
                args, init = self.arguments(parts[2:])
                return reduction(str(parts[0]), [self.range(r) for r in parts[1].children], args, init, span)
        raise AssertionError(node.data)

    def leaf(self, token: Token, span: Span) -> Expr:
        text = str(token)
        if token.type == "INF":
            return Const(math.inf, span=span)
        if token.type == "NUMBER":
            return Const(int(text) if text.isdigit() else float(text), span=span)
        if text in ("True", "False"):
            return Const(text == "True", span=span)
        return Access(self.name(token), span=span)

    def arguments(self, parts: list[Any]) -> tuple[list[Expr], Expr | None]:
        args: list[Expr] = []
        init: Expr | None = None
        for part in parts[0].children if parts else ():
            if not _is_token(part) and part.data == "keyword":
                word = str(part.children[0]).rstrip("= \t")
                if word != "init" or init is not None:
                    span = self.span(part.children[0])
                    raise ParseError(
                        f"`{word}=` is no argument here", span=span, help="the one argument with a name is `init=`, once, of a reduction"
                    )
                init = self.expr(part.children[1])
            else:
                args.append(self.expr(part))
        return args, init


def _is_token(node: object) -> bool:
    return isinstance(node, str)
