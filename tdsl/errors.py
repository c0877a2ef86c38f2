"""What bad input gets: one class per kind of mistake. The message says what is wrong, shows where, and how to mend it.

    SizeMismatch: index k has size 4 in A (dimension 1) but 5 in B (dimension 0)
      --> model.py:12
       |
    12 | Y[i,j] += A[i,k] * B[k,j]
       |           ^^^^^^
       = help: ...
"""

from __future__ import annotations

from tdsl.ir import Span


class Error(Exception):
    """The base of every error that tdsl raises on bad input.

    what: one sentence, names and numbers included. span: where it stands in the user's text. help: how to mend it.
    """

    def __init__(self, what: str, *, span: Span | None = None, help: str | None = None):
        super().__init__(what)
        self.what = what
        self.span = span
        self.help = help

    def __str__(self) -> str:
        lines = [self.what]
        if self.span is not None:
            lines += frame(self.span)
        if self.help:
            lines.append(f"   = help: {self.help}")
        return "\n".join(lines)


def frame(span: Span) -> list[str]:
    """The line that the span starts in, with carets under it."""
    start = span.text.rfind("\n", 0, span.start) + 1
    end = span.text.find("\n", span.start)
    end = len(span.text) if end < 0 else end
    number = span.line + span.text.count("\n", 0, span.start)
    margin = " " * len(str(number))
    width = max(1, min(span.end, end) - span.start)
    where = [f"{margin} --> {span.origin}:{number}"] if span.origin else []
    caret = " " * (span.start - start) + "^" * width
    return [*where, f"{margin} |", f"{number} | {span.text[start:end]}", f"{margin} | {caret}"]


class ParseError(Error, ValueError):
    """The text is not in the grammar."""


class UnknownFunction(Error, ValueError):
    """A function that is not in the table of ops.py."""


class IndexError_(Error, ValueError):
    """An index stands where it cannot: only on the left, not in scope, bound twice."""


class SizeMismatch(Error, ValueError):
    """Two uses of one index, or of one size name, disagree."""


class RangeError(Error, ValueError):
    """The range of an index is ambiguous or cannot be inferred."""


class BoundsError(Error, ValueError):
    """A subscript reaches outside its tensor."""


class RankMismatch(Error, ValueError):
    """A tensor has another number of dimensions than its accesses."""


class DtypeError(Error, TypeError):
    """A dtype that cannot stand where it does: a float tensor as an index, say."""


class DeviceError(Error, ValueError):
    """Arguments on different devices, or on one that no executor serves."""


class ArgumentError(Error, TypeError):
    """A call with the wrong number or kind of arguments."""


class SelfRead(Error, ValueError):
    """A statement reads its own target in a way that needs an ordered index."""


class NotInjective(Error, ValueError):
    """`=` would write one element more than once."""


class NameError_(Error, ValueError):
    """A name is unknown, reserved, or used in two ways."""


class Unsupported(Error, NotImplementedError):
    """A construct that the language has and one stage cannot do; the message names both."""


class MissingPackage(Error, ImportError):
    """An optional package that this call needs is not installed; the help says how to get it."""


class CompileError(Error, RuntimeError):
    """A kernel that the GPU compiler rejects: a generated one is our bug, an edited one the editor's."""


def counted(n: int, noun: str) -> str:
    """`1 dimension`, `2 dimensions`."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
