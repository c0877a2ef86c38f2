"""Integers that remember how they were made: compiling once with them serves every call whose sizes would have been compiled alike.

    n = trace.symbol("n", 24);  -(-n // 16)   -->   2, which is known to be -(-n // 16)
                                n % 16 == 0   -->   False, and the trace notes that it holds only while n % 16 != 0

A traced integer passes for an int. Arithmetic gives traced integers; each comparison becomes a condition of the trace; and whatever
needs the number itself (an index, a count of repetitions, a text, arithmetic with floats) ties the trace to it. What was made for some
sizes is right for others where the conditions hold: then `numbers` gives what the traced integers in it are there. Inside `estimates`
floats tie nothing: costs may be those of other sizes. Source of the method: torch's own SymInt and its guards.
"""

from __future__ import annotations

import math
import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

_printing, _estimating = threading.local(), threading.local()
# Longer expressions are taken for the number that they are.
_LONGEST, _MOST = 300, 12

Terms = tuple[tuple[str, int], ...]


class Trace:
    """What one compilation asked of the sizes that it was given. symbols: their names and numbers, in order. conditions: what must hold.
    fixed: expressions that must have the value that they had."""

    def __init__(self) -> None:
        self.symbols: dict[str, int] = {}
        self.conditions: dict[str, None] = {}
        self.fixed: dict[str, int] = {}
        self.open = True

    def symbol(self, value: int) -> Any:
        """A traced integer of that value."""
        name = f"__n{len(self.symbols)}"
        self.symbols[name] = value
        return Traced(self, ((name, 1),), 0, value)

    def note(self, condition: str) -> None:
        """What must hold for the result of the compilation to be right."""
        if self.open:
            self.conditions[condition] = None

    def holds(self) -> Callable[..., bool]:
        """Whether all conditions hold, as a function of the symbols' values in order."""
        tests = [f"{text} == {value}" for text, value in self.fixed.items()] + list(self.conditions)
        return eval(f"lambda {', '.join(self.symbols)}: {' and '.join(tests) or True}")  # type: ignore[no-any-return]

    def numbers(self, traced: Sequence[Any]) -> Callable[..., tuple[Any, ...]]:
        """What some integers, traced or plain, are: a function of the symbols' values in order."""
        texts = "".join(f"{n.text if type(n) is Traced else repr(n)}, " for n in traced)
        return eval(f"lambda {', '.join(self.symbols)}: ({texts})")  # type: ignore[no-any-return]


class Traced:
    """An integer of a trace: `constant` and the sum of `terms`, each an expression of the symbols times a number."""

    __slots__ = ("constant", "terms", "trace", "value")

    def __init__(self, trace: Trace, terms: Terms, constant: int, value: int):
        self.trace = trace
        self.terms = terms
        self.constant = constant
        self.value = value

    @property
    def __class__(self) -> type:  # isinstance(n, int), and `case int()`
        return int

    @__class__.setter
    def __class__(self, _: type) -> None:
        raise TypeError("a traced integer stays one")

    @property
    def text(self) -> str:
        """A Python expression of the symbols."""
        parts = [atom if c == 1 else f"{c} * {atom}" for atom, c in self.terms]
        parts += [str(self.constant)] if self.constant else []
        return parts[0] if len(parts) == 1 and self.terms[0][1] == 1 else f"({' + '.join(parts)})"

    def fix(self) -> int:
        """The number, which the trace is tied to from here on."""
        if self.trace.open:
            self.trace.fixed[_terms_text(self.terms)] = self.value - self.constant
        return self.value

    def loose(self) -> int:
        """The number, for arithmetic with floats: the trace is tied to it, but for estimates."""
        return self.value if _for_estimates() else self.fix()

    # -- what needs the number ----------------------------------------------------------------------------------------

    __index__ = __int__ = __trunc__ = __floor__ = __ceil__ = fix

    def __round__(self, *_: int) -> int:
        return self.fix()

    def __float__(self) -> float:
        return float(self.loose())

    def __str__(self) -> str:
        return self.text if getattr(_printing, "symbols", False) else str(self.fix())

    __repr__ = __str__

    def __format__(self, spec: str) -> str:
        return self.text if not spec and getattr(_printing, "symbols", False) else format(self.fix(), spec)

    def __hash__(self) -> int:
        return hash(self.value)  # equality is what notes a condition

    def __reduce__(self) -> Any:
        return int, (self.fix(),)

    def __bool__(self) -> bool:
        return bool(self != 0)

    def bit_length(self) -> int:
        """How many bits it takes: the trace is tied to that."""
        bits = self.value.bit_length()
        least = 1 << (bits - 1) if bits else 0
        if self.value < 0:
            return self.fix().bit_length()
        assert self >= least and self < 1 << bits
        return bits

    # -- comparisons --------------------------------------------------------------------------------------------------

    def _compared(self, other: Any, symbol: str) -> Any:
        if not isinstance(other, int | float):
            return NotImplemented
        result = _COMPARE[symbol](self.value, _plain(other))
        trace = self.trace
        terms, constant = _linear(other, trace) if isinstance(other, int) else ((), other)  # of another trace, it is a number
        if trace.open and (isinstance(other, int) or (math.isfinite(other) and not _for_estimates())):
            terms, constant = _sum(self.terms, terms, -1), constant - self.constant
            if terms:
                sign = -1 if terms[0][1] < 0 else 1
                text = _terms_text(tuple((atom, sign * c) for atom, c in terms))
                held = symbol if result else _OPPOSITE[symbol]
                if text not in trace.fixed:
                    trace.note(f"{text} {held if sign > 0 else _TURNED[held]} {sign * constant}")
        return result

    def __eq__(self, other: object) -> Any:
        return self is other or self._compared(other, "==")

    def __ne__(self, other: object) -> Any:
        return self is not other and self._compared(other, "!=")

    def __lt__(self, other: Any) -> Any:
        return self._compared(other, "<")

    def __le__(self, other: Any) -> Any:
        return self._compared(other, "<=")

    def __gt__(self, other: Any) -> Any:
        return self._compared(other, ">")

    def __ge__(self, other: Any) -> Any:
        return self._compared(other, ">=")

    # -- arithmetic ---------------------------------------------------------------------------------------------------

    def _with(self, terms: Terms, constant: int, value: int) -> Any:
        if not terms or not self.trace.open:
            return value
        made = Traced(self.trace, terms, constant, value)
        return made if len(terms) <= _MOST and len(terms[-1][0]) <= _LONGEST else made.fix()

    def _atom(self, text: str, value: int) -> Any:
        return self._with(((text, 1),), 0, value)

    def __add__(self, other: Any) -> Any:
        if not isinstance(other, int):
            return self.loose() + other if isinstance(other, float) else NotImplemented
        terms, constant = _linear(other, self.trace)
        return self._with(_sum(self.terms, terms, 1), self.constant + constant, self.value + _plain(other))

    __radd__ = __add__

    def __neg__(self) -> Any:
        return self * -1

    def __sub__(self, other: Any) -> Any:
        if not isinstance(other, int):
            return self.loose() - other if isinstance(other, float) else NotImplemented
        terms, constant = _linear(other, self.trace)
        return self._with(_sum(self.terms, terms, -1), self.constant - constant, self.value - _plain(other))

    def __rsub__(self, other: Any) -> Any:
        return self * -1 + other

    def __mul__(self, other: Any) -> Any:
        if not isinstance(other, int):
            return self.loose() * other if isinstance(other, float) else NotImplemented
        terms, constant = _linear(other, self.trace)
        value = self.value * _plain(other)
        if not terms:
            scaled = tuple((atom, c * constant) for atom, c in self.terms) if constant else ()
            return self._with(scaled, self.constant * constant, value)
        factor: Any = other
        if self._known() or factor._known():  # one of them is a number by now
            scale, of = (self.value, factor) if self._known() else (factor.value, self)
            return of * scale
        return self._atom(f"({' * '.join(sorted((self.text, factor.text)))})", value)

    __rmul__ = __mul__

    def _known(self) -> bool:
        return _terms_text(self.terms) in self.trace.fixed

    def _of(self, symbol: str, left: Any, right: Any) -> Any:
        both: tuple[Any, Any] = left, right
        if not isinstance(left, int) or not isinstance(right, int):
            return (
                _ARITHMETIC[symbol](_loose(left), _loose(right))
                if isinstance(left, int | float) and isinstance(right, int | float)
                else NotImplemented
            )
        if any(type(n) is Traced and n.trace is not self.trace for n in both):
            return _ARITHMETIC[symbol](_fixed(left), _fixed(right))
        texts = [n.text if type(n) is Traced else str(int(n)) if n >= 0 else f"({int(n)})" for n in both]
        return self._atom(f"({texts[0]} {symbol} {texts[1]})", _ARITHMETIC[symbol](_plain(left), _plain(right)))

    def __floordiv__(self, other: Any) -> Any:
        return self if type(other) is int and other == 1 else self._of("//", self, other)

    def __rfloordiv__(self, other: Any) -> Any:
        return self._of("//", other, self)

    def __mod__(self, other: Any) -> Any:
        return 0 if type(other) is int and other == 1 else self._of("%", self, other)

    def __rmod__(self, other: Any) -> Any:
        return self._of("%", other, self)

    def __truediv__(self, other: Any) -> float:
        return self.loose() / _loose(other)  # type: ignore[no-any-return]

    def __rtruediv__(self, other: Any) -> float:
        return _loose(other) / self.loose()  # type: ignore[no-any-return]

    def __pos__(self) -> Any:
        return self

    def __abs__(self) -> Any:
        return self if self >= 0 else -self

    def __and__(self, other: Any) -> Any:
        return self._of("&", self, other)

    __rand__ = __and__

    def __divmod__(self, other: Any) -> tuple[Any, Any]:
        return self // other, self % other

    def __pow__(self, other: Any, _: None = None) -> Any:
        return self.fix() ** _fixed(other)

    def __rpow__(self, other: Any, _: None = None) -> Any:
        return other ** self.fix()

    def __lshift__(self, other: Any) -> Any:
        return self * (1 << _fixed(other))

    def __rlshift__(self, other: Any) -> Any:
        return other << self.fix()

    def __rshift__(self, other: Any) -> Any:
        return self // (1 << _fixed(other))

    def __rrshift__(self, other: Any) -> Any:
        return other >> self.fix()

    def __or__(self, other: Any) -> Any:
        return self.fix() | _fixed(other)

    def __ror__(self, other: Any) -> Any:
        return other | self.fix()

    def __xor__(self, other: Any) -> Any:
        return self.fix() ^ _fixed(other)

    def __rxor__(self, other: Any) -> Any:
        return other ^ self.fix()

    def __invert__(self) -> Any:
        return -1 - self


def _linear(n: Any, trace: Trace) -> tuple[Terms, int]:
    """Terms and constant of an integer as a trace sees it: one of another trace is a number."""
    if type(n) is not Traced:
        return (), int(n)
    return (n.terms, n.constant) if n.trace is trace else ((), n.fix())


def _sum(a: Terms, b: Terms, sign: int) -> Terms:
    if not b:
        return a
    total = dict(a)
    for atom, c in b:
        total[atom] = total.get(atom, 0) + sign * c
    return tuple(sorted((atom, c) for atom, c in total.items() if c))


def _terms_text(terms: Terms) -> str:
    return " + ".join(atom if c == 1 else f"{c} * {atom}" for atom, c in terms)


_COMPARE = {"==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_OPPOSITE = {"==": "!=", "!=": "==", "<": ">=", ">=": "<", ">": "<=", "<=": ">"}
_TURNED = {"==": "==", "!=": "!=", "<": ">", ">": "<", "<=": ">=", ">=": "<="}
_ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "//": operator.floordiv,
    "%": operator.mod,
    "&": operator.and_,
}


def _plain(n: Any) -> Any:
    return n.value if type(n) is Traced else n


def _loose(n: Any) -> Any:
    return n.loose() if type(n) is Traced else n


def _fixed(n: Any) -> Any:
    return n.fix() if type(n) is Traced else n


def whole(n: Any) -> int:
    """`n` as an integer: a traced one as it is, which int() would tie to its number."""
    return n if type(n) is Traced else int(n)  # type: ignore[return-value]


@contextmanager
def estimates() -> Iterator[None]:
    """What is computed with floats inside says what is faster, not what is right, and serves all sizes. A decorator too."""
    _estimating.depth = getattr(_estimating, "depth", 0) + 1
    try:
        yield
    finally:
        _estimating.depth -= 1


def _for_estimates() -> bool:
    return bool(getattr(_estimating, "depth", 0))


def is_traced(n: object) -> bool:
    """Whether a number is a traced integer."""
    return type(n) is Traced


@contextmanager
def with_symbols() -> Iterator[None]:
    """Texts printed inside name traced integers by their expressions; the reader of a text defines the symbols."""
    before = getattr(_printing, "symbols", False)
    _printing.symbols = True
    try:
        yield
    finally:
        _printing.symbols = before
