"""Symbolic values of the Python spelling: what indices, tensors and their elements are while a function is traced."""

from __future__ import annotations

import linecache
import math
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import lru_cache
from types import CodeType, FrameType
from typing import NoReturn, TypeAlias

from tdsl.calls import check_name
from tdsl.errors import ArgumentError
from tdsl.ir import Access, Call, Const, Expr, Index, Loop, Span, Statement

Number: TypeAlias = bool | int | float
Operand: TypeAlias = "Value | Number"


# ---------------------------------------------------------------------------------------------------------------------
# Where in the Python source


_OWN = frozenset({"tdsl.symbolic", "tdsl.embed", "contextlib"})  # modules whose frames are not the user's


def here() -> Span | None:
    """The expression of the user's function that is running, as a span of its source line."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and (frame.f_globals.get("__name__") in _OWN):
        frame = frame.f_back
    if frame is None:
        return None
    line, start, end = frame.f_lineno, None, None
    positions = _positions(frame.f_code)
    if positions:
        first, last, start, end = positions[frame.f_lasti // 2]
        line = first or line
        if first != last:
            start = end = None
    text = linecache.getline(frame.f_code.co_filename, line, frame.f_globals).rstrip("\n")
    if not text.strip():
        return None
    if start is None or end is None:
        start, end = len(text) - len(text.lstrip()), len(text.rstrip())
    else:  # columns count bytes
        start, end = (len(text.encode()[:column].decode(errors="ignore")) for column in (start, end))
    return Span(text, start, end, frame.f_code.co_filename, line)


@lru_cache(maxsize=64)
def _positions(code: CodeType) -> tuple[tuple[int | None, int | None, int | None, int | None], ...]:
    return tuple(getattr(code, "co_positions", tuple)())  # Python 3.11 and later; else errors show the line


def whole_line(span: Span | None) -> Span | None:
    """The whole line that a span stands in."""
    if span is None:
        return None
    return Span(span.text, len(span.text) - len(span.text.lstrip()), len(span.text.rstrip()), span.origin, span.line)


# ---------------------------------------------------------------------------------------------------------------------
# The statements so far


TRACE: ContextVar[list[list[Statement | Loop]] | None] = ContextVar("tdsl_trace", default=None)  # the open blocks, innermost last


def open_blocks() -> list[list[Statement | Loop]]:
    """The blocks of statements that are open, innermost last. Raises ArgumentError outside a traced function."""
    blocks = TRACE.get()
    if blocks is None:
        raise ArgumentError(
            "a statement stands outside a traced function", span=whole_line(here()), help="write it inside a function under @tdsl.function"
        )
    return blocks


def record(target: Expr, op: str, value: Expr) -> None:
    """Append a statement to the innermost block."""
    assert isinstance(target, Access)
    open_blocks()[-1].append(Statement((), target, op, value, span=whole_line(here())))


# ---------------------------------------------------------------------------------------------------------------------
# Values


def as_expr(x: object) -> Expr:
    """The expression of an operand; numbers become constants. Raises ArgumentError for anything else."""
    if isinstance(x, Value):
        return Index(x.expr.name, span=here()) if isinstance(x.expr, Index) else x.expr
    if isinstance(x, bool):
        return Const(x, span=here())
    if isinstance(x, int):
        return Const(int(x), span=here())
    if isinstance(x, float) and not math.isnan(x):
        return Const(float(x), span=here())
    kind = "nan" if isinstance(x, float) else f"a {type(x).__name__}"
    raise ArgumentError(
        f"{kind} stands where a number or an element of a tensor is needed",
        span=here(),
        help="pass tensors as parameters of the function, and index them",
    )


def _binary(op: str) -> Callable[[Value, object], Value]:
    def method(self: Value, other: object) -> Value:
        return Computed(Call(op, (as_expr(self), as_expr(other)), span=here()))

    return method


def _mirrored(op: str) -> Callable[[Value, object], Value]:
    def method(self: Value, other: object) -> Value:
        return Computed(Call(op, (as_expr(other), as_expr(self)), span=here()))

    return method


def _unary(op: str) -> Callable[[Value], Value]:
    def method(self: Value) -> Value:
        return Computed(Call(op, (as_expr(self),), span=here()))

    return method


class Value:
    """A symbolic scalar: an index, an element of a tensor, or what is made of them with operators and functions."""

    __slots__ = ("_node",)

    def __init__(self, expr: Expr):
        self._node = expr

    @property
    def expr(self) -> Expr:
        """The expression that it stands for."""
        return self._node

    __add__, __radd__ = _binary("add"), _mirrored("add")
    __sub__, __rsub__ = _binary("sub"), _mirrored("sub")
    __mul__, __rmul__ = _binary("mul"), _mirrored("mul")
    __truediv__, __rtruediv__ = _binary("div"), _mirrored("div")
    __floordiv__, __rfloordiv__ = _binary("floordiv"), _mirrored("floordiv")
    __mod__, __rmod__ = _binary("mod"), _mirrored("mod")
    __pow__, __rpow__ = _binary("pow"), _mirrored("pow")
    __and__, __rand__ = _binary("and"), _mirrored("and")
    __or__, __ror__ = _binary("or"), _mirrored("or")
    __lt__, __le__, __gt__, __ge__ = _binary("lt"), _binary("le"), _binary("gt"), _binary("ge")
    __eq__, __ne__ = _binary("eq"), _binary("ne")  # type: ignore[assignment]
    __neg__, __invert__, __abs__ = _unary("neg"), _unary("not"), _unary("abs")
    __hash__ = object.__hash__

    def __pos__(self) -> Value:
        return self

    def __bool__(self) -> bool:
        raise ArgumentError(
            "a symbolic value is neither true nor false while the function is traced",
            span=whole_line(here()),
            help="write `tdsl.where(c, a, b)` for `if`, `&` `|` `~` for and, or, not, and `(a < b) & (b < c)` for a chain",
        )

    def __iter__(self) -> Iterator[NoReturn]:
        raise ArgumentError(
            "a symbolic value cannot be iterated over", span=whole_line(here()), help="loops are indices: `S[i] += X[i, j]` goes over j"
        )

    def _no_number(self) -> NoReturn:
        raise ArgumentError(
            "a symbolic value has no number while the function is traced",
            span=whole_line(here()),
            help="write it into an expression; sizes are `tdsl.size(A, 0)`",
        )

    def __len__(self) -> int:
        self._no_number()

    def __int__(self) -> int:
        self._no_number()

    def __float__(self) -> float:
        self._no_number()

    def __index__(self) -> int:
        self._no_number()

    def __repr__(self) -> str:
        from tdsl.printer import print_expr

        return print_expr(self.expr)


# The kinds of values are siblings: Python asks the right operand of `a < b` first where its class derives from the left one's.


class Computed(Value):
    """An index, or what operators and functions give."""

    __slots__ = ()


class Element(Value):
    """`A[i, j]`: can be read, and updated in place as `A[i, j] += x`."""

    __slots__ = ()

    def _update(self, op: str, binary: str, other: object) -> Update:
        return Update(self, op, binary, as_expr(other))

    def __iadd__(self, other: object) -> Update:
        return self._update("+=", "add", other)

    def __imul__(self, other: object) -> Update:
        return self._update("*=", "mul", other)

    def _no_update(self, other: object) -> NoReturn:
        raise ArgumentError(
            "the assignments are = += *= and tdsl.accumulate(..)",
            span=whole_line(here()),
            help="write `S[i] += -x` to subtract, or `S[i] = S[i] / x`",
        )

    __isub__ = __itruediv__ = __ifloordiv__ = __imod__ = __ipow__ = __iand__ = __ior__ = _no_update


class Update(Value):
    """What `A[i] += x` hands to `A[i] = ..`. On a local name it is the sum itself, so `acc = A[i]; acc += x` means what it says."""

    __slots__ = ("element", "op", "value")

    def __init__(self, element: Element, op: str, binary: str, value: Expr):
        super().__init__(Call(binary, (element.expr, value), span=here()))
        self.element, self.op, self.value = element, op, value


class Tensor(Value):
    """A name: `A[i, j]` is an element, the name alone a scalar. Made by `tensors` and for each parameter of a traced function."""

    __slots__ = ("name", "sizes")

    def __init__(self, name: str, sizes: tuple[Expr, ...] | None = None):
        super().__init__(Access(check_name(name, here())))
        self.name = name
        self.sizes = sizes

    @property
    def expr(self) -> Expr:
        """The tensor read as a scalar."""
        return Access(self.name, span=here())

    def __getitem__(self, key: object) -> Element:
        subscripts = tuple(_subscript(k, self.name) for k in (key if isinstance(key, tuple) else (key,)))
        return Element(Access(self.name, subscripts, span=here()))

    def __setitem__(self, key: object, value: object) -> None:
        element = self[key]
        if isinstance(value, Update) and value.element.expr == element.expr:
            record(value.element.expr, value.op, value.value)
        else:
            record(element.expr, "=", as_expr(value))

    def __iter__(self) -> Iterator[NoReturn]:
        raise ArgumentError(
            f"the tensor {self.name} cannot be iterated over",
            span=whole_line(here()),
            help=f"loops are indices: `S[i] += {self.name}[i, j]` goes over j",
        )

    def __iadd__(self, other: object) -> NoReturn:
        raise ArgumentError(
            f"`{self.name} += ..` names no element", span=whole_line(here()), help=f"write `{self.name}[()] += ..` for a 0-d tensor"
        )

    __imul__ = __iadd__

    def __repr__(self) -> str:
        return self.name


def _subscript(key: object, name: str) -> Expr:
    if isinstance(key, slice) or key is None or key is Ellipsis:
        raise ArgumentError(
            f"a subscript of {name} is no slice", span=whole_line(here()), help="subscripts are indices and integers: `A[i, j+1]`"
        )
    return as_expr(key)
