"""The layout of lines: newlines, `;` and indentation as tokens for the grammar.

for i:            -->   FOR NAME : _END
    Y[i] = A[i]         _INDENT .. _END _DEDENT
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lark import Token


class LayoutError(Exception):
    """A bracket that is never closed, or a line that is indented wrongly; [start, end) in the text."""

    def __init__(self, what: str, start: int, end: int, help: str):
        super().__init__(what)
        self.what, self.start, self.end, self.help = what, start, end, help


class Layout:
    """Newlines, `;` and indentation as tokens: _END after each statement or heading, _INDENT and _DEDENT around blocks."""

    # The lexer runs one token ahead of this class: after a heading it must already read the line that _INDENT will come before.
    always_accept = ("_NL", "_SEMI", "NAME", "FOR")

    def process(self, stream: Iterator[Token]) -> Iterator[Token]:
        """The tokens of the lexer with its newlines sorted; inside brackets they do not count."""
        from lark import Token

        def layout(kind: str, at: Token) -> Token:
            return Token(kind, "", at.end_pos, at.line, at.end_column, at.line, at.end_column, at.end_pos)

        opened: list[Token] = []
        levels: list[int] = []
        last: Token | None = None  # the last real token since the last _END
        heading = False  # the line before ended with a colon
        fresh = True  # the next token begins a line
        lines = 0
        for token in stream:
            if token.type in ("_NL", "_SEMI"):
                if opened and token.type == "_SEMI":
                    raise _unclosed(opened[-1])
                if opened:
                    continue
                if last is not None:
                    yield layout("_END", last)
                    heading, last = last.type == "_COLON", None
                fresh = fresh or token.type == "_NL"
                continue
            if fresh:
                yield from (layout(kind, token) for kind in _steps(levels, token, heading, lines))
                fresh = False
                lines += 1
            if token.type in ("_LPAR", "_LSQB"):
                opened.append(token)
            elif token.type in ("_RPAR", "_RSQB") and opened:
                opened.pop()
            last = token
            yield token
        if opened:
            raise _unclosed(opened[-1])
        if last is not None:
            yield layout("_END", last)
            for _ in levels[1:]:
                yield layout("_DEDENT", last)
        else:
            for _ in levels[1:]:
                yield Token("_DEDENT", "")


def _unclosed(token: Token) -> LayoutError:
    start = token.start_pos or 0
    return LayoutError(f"`{token}` is never closed", start, start + 1, f"write the matching `{']' if token == '[' else ')'}`")


def _steps(levels: list[int], token: Token, heading: bool, lines: int) -> Iterable[str]:
    """The indents and dedents before the first token of a line; `levels` follows."""
    column = token.column or 1
    if not levels:
        levels.append(column)
    elif column > levels[-1]:
        if heading:
            levels.append(column)
            return ["_INDENT"]
        if lines > 1 or len(levels) > 1:
            start = token.start_pos or 0
            raise LayoutError(
                "unexpected indentation", start, start + len(token), "only a block under a line that ends with `:` is indented"
            )
        levels[0] = column  # the first line of a text stands right after its quotes
    steps = []
    while column < levels[-1]:
        levels.pop()
        if not levels or column > levels[-1]:
            start = token.start_pos or 0
            raise LayoutError(
                "this line is indented like no line before it", start, start + len(token), "align it with the block that it belongs to"
            )
        steps.append("_DEDENT")
    return steps
