"""What explain, check and the command line show: sections of text and tables, printed plainly, by rich, or as HTML."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

_PREFIXES = ((1e-9, "n"), (1e-6, "µ"), (1e-3, "m"), (1.0, ""), (1e3, "k"), (1e6, "M"), (1e9, "G"), (1e12, "T"), (1e15, "P"))


def quantity(value: float, unit: str = "") -> str:
    """Three significant digits with an SI prefix: 0.0000123, "s" --> "12.3 µs"."""
    if value == 0:
        return f"0 {unit}".strip()
    scale, prefix = max((p for p in _PREFIXES if p[0] <= abs(value) * 1.0005), default=_PREFIXES[0])
    number = f"{value / scale:.3g}" if abs(value / scale) < 1000 else f"{value / scale:.0f}"
    return f"{number} {prefix}{unit}".strip()


@dataclass(frozen=True, slots=True)
class Table:
    """head: the names of the columns. rows: as many cells each; what starts with a digit is set to the right."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __str__(self) -> str:
        rows = [self.head, *self.rows]
        widths = [max(len(row[c]) for row in rows) for c in range(len(self.head))]
        right = self.right
        lines = [
            "  ".join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True)).rstrip() for row in rows
        ]
        return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])

    @property
    def right(self) -> tuple[bool, ...]:
        """Which columns hold numbers."""
        return tuple(bool(self.rows) and all(re.match(r"-?\d|-$", row[c]) for row in self.rows) for c in range(len(self.head)))


@dataclass(frozen=True, slots=True)
class Section:
    """title: one line. body: text or a table. lexer: the language of text, as Pygments names it. level: 1 for the chapters, 2 below."""

    title: str
    body: str | Table = ""
    lexer: str = "text"
    level: int = 2


def plain(sections: Sequence[Section]) -> str:
    """The sections as plain text, titles underlined."""
    parts = []
    for s in sections:
        line = ("=" if s.level == 1 else "-") * len(s.title)
        parts.append("\n".join(part for part in (s.title, line, str(s.body).strip("\n")) if part))
    return "\n\n".join(parts)


def rich(sections: Sequence[Section]) -> Iterator[RenderableType]:
    """The sections as rich shows them: chapters as rules, text in panels, tables as tables."""
    from rich.panel import Panel
    from rich.rule import Rule
    from rich.syntax import Syntax
    from rich.table import Table as RichTable
    from rich.text import Text

    for s in sections:
        if s.level == 1:
            yield Rule(Text(s.title, "bold"), align="left")
        if isinstance(s.body, Table):
            table = RichTable(title=None if s.level == 1 else Text(s.title), title_justify="left")
            for name, right in zip(s.body.head, s.body.right, strict=True):
                table.add_column(Text(name), justify="right" if right else "left")
            for row in s.body.rows:
                table.add_row(*(Text(cell) for cell in row))
            yield table
        elif s.body:
            text = Syntax(s.body.strip("\n"), s.lexer, theme="ansi_dark", background_color="default", word_wrap=True)
            yield text if s.level == 1 else Panel(text, title=Text(s.title), title_align="left")


def as_html(sections: Sequence[Section]) -> str:
    """The sections as HTML; text below the chapters folds away."""
    return "<div>" + "\n".join(_html(s) for s in sections) + "</div>"


def _html(s: Section) -> str:
    title = html.escape(s.title)
    if isinstance(s.body, Table):
        head = "".join(f"<th>{html.escape(c)}</th>" for c in s.body.head)
        rows = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in s.body.rows)
        body = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    else:
        body = f"<pre>{html.escape(s.body.strip(chr(10)))}</pre>" if s.body else ""
    if s.level == 1:
        return f"<h3>{title}</h3>{body}"
    return f"<details{' open' if isinstance(s.body, Table) else ''}><summary>{title}</summary>{body}</details>"


class Page:
    """An object that shows itself as its sections: in `print`, at the prompt, in rich, in a notebook."""

    __slots__ = ()

    def sections(self) -> tuple[Section, ...]:
        """What there is to show."""
        raise NotImplementedError

    def __str__(self) -> str:
        return plain(self.sections())

    def __repr__(self) -> str:
        import sys

        if not sys.stdout.isatty():
            return str(self)
        from rich.console import Console

        console = Console()
        with console.capture() as captured:
            console.print(self)
        return captured.get().rstrip("\n")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        yield from rich(self.sections())

    def _repr_html_(self) -> str:
        return as_html(self.sections())

    def as_json(self) -> dict[str, Any]:
        """The same as JSON knows it."""
        raise NotImplementedError
