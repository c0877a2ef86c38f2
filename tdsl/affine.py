"""Integer expressions: a canonical linear form, their bounds over loop ranges, and the range that a bounded subscript leaves an index.

    2*x + r - 1        -->  Affine(-1, ((r, 1), (x, 2)))
    (4*x + 2) // 2     -->  2*x + 1
    off[b] + j         -->  Affine(0, ((j, 1), (off[b], 1)))         off[b] is an atom: its value is not known here

An atom is an Index, a Size, an Access (a scalar, or a gather), a product of atoms, or any other Call.
Ranges are half open, as in the notation; `interval` alone speaks of closed ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from tdsl.ir import Access, Call, Clamp, Const, Expr, Index, Pad, Size, free_indices, rebuild, walk
from tdsl.traced import whole

Bound: TypeAlias = int | Expr
Ranges: TypeAlias = Mapping[str, tuple[Bound, Bound]]  # index -> [lo, hi), outermost first: a bound may use the indices before it
Known: TypeAlias = Callable[[Expr], "int | None"]  # the value of a Size or of a scalar, where it is known
Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
Extent: TypeAlias = tuple[float, float]  # closed; integers, or infinite where nothing is known

ANY: Extent = (-math.inf, math.inf)


@dataclass(frozen=True, slots=True)
class Affine:
    """const + sum of coefficient * atom; the atoms are distinct and sorted, no coefficient is 0."""

    const: int
    terms: tuple[tuple[Expr, int], ...] = ()

    def __add__(self, other: Affine) -> Affine:
        return combine(self.const + other.const, (*self.terms, *other.terms))

    def __sub__(self, other: Affine) -> Affine:
        return self + other.scale(-1)

    def scale(self, factor: int) -> Affine:
        """Every coefficient times `factor`."""
        if factor == 0:
            return Affine(0)
        return Affine(self.const * factor, tuple((atom, c * factor) for atom, c in self.terms))

    def shift(self, by: int) -> Affine:
        """The same plus a constant."""
        return Affine(self.const + by, self.terms)

    def coefficient(self, index: str) -> int:
        """The coefficient of the bare index (0 where it does not stand bare)."""
        return next((c for atom, c in self.terms if isinstance(atom, Index) and atom.name == index), 0)

    def without(self, index: str) -> Affine:
        """The same less the bare index."""
        return Affine(self.const, tuple((a, c) for a, c in self.terms if not (isinstance(a, Index) and a.name == index)))

    @property
    def indices(self) -> tuple[str, ...]:
        """Every index that occurs, inside atoms too."""
        return tuple(dict.fromkeys(name for atom, _ in self.terms for name in free_indices(atom)))

    @property
    def linear_indices(self) -> tuple[str, ...]:
        """The indices that stand bare."""
        return tuple(atom.name for atom, _ in self.terms if isinstance(atom, Index))

    @property
    def opaque(self) -> tuple[str, ...]:
        """The indices that occur inside other atoms."""
        return tuple(dict.fromkeys(name for atom, _ in self.terms if not isinstance(atom, Index) for name in free_indices(atom)))

    def expr(self) -> Expr:
        """The form as IR: positive terms first, the constant last (`N - x + 1`)."""
        result: Expr | None = None
        for atom, c in sorted(self.terms, key=lambda term: term[1] < 0):
            size: Expr = atom if abs(c) == 1 else Call("mul", (Const(abs(c)), atom))
            if result is None:
                result = size if c > 0 else Call("neg", (size,)) if c == -1 else Call("mul", (Const(c), atom))
            else:
                result = Call("add" if c > 0 else "sub", (result, size))
        if result is None:
            return Const(self.const)
        if self.const == 0:
            return result
        return Call("add" if self.const > 0 else "sub", (result, Const(abs(self.const))))


def combine(const: int, terms: Sequence[tuple[Expr, int]]) -> Affine:
    """The canonical form of a sum of terms whose atoms may repeat."""
    if len(terms) < 2:
        return Affine(const, tuple(t for t in terms if t[1]))
    total: dict[Expr, int] = {}
    for atom, c in terms:
        total[atom] = total.get(atom, 0) + c
    return Affine(const, tuple(sorted(((a, c) for a, c in total.items() if c), key=lambda term: _order(term[0]))))


def _order(atom: Expr) -> tuple[int, str]:
    return (0, atom.name) if isinstance(atom, Index) else (1, repr(atom))


# ---------------------------------------------------------------------------------------------------------------------
# Into linear form


def linear(expr: Expr, known: Known | None = None) -> Affine:
    """`expr` as an Affine. `known` gives the values of sizes and scalars that may be put in. Pad and Clamp lose their frame."""
    match expr:
        case Const(value=int() as value):
            return Affine(whole(value))
        case Index():
            return Affine(0, ((expr, 1),))
        case Call():
            return _CALLS.get(expr.op, _atom)(expr, known)
        case Pad() | Clamp():
            return linear(expr.value, known)
        case Size() | Access():
            number = None if known is None else known(expr)
            return _atom(expr, known) if number is None else Affine(number)
    return _atom(expr, known)


def canonical(expr: Expr, known: Known | None = None) -> Expr:
    """`linear(expr).expr()`: equal integer expressions become equal IR as far as linearity shows it."""
    return linear(expr, known).expr()


def _atom(expr: Expr, known: Known | None) -> Affine:
    def visit(e: Expr) -> Expr:
        if isinstance(e, Pad | Clamp):
            return rebuild(e, visit)
        return canonical(e, known) if isinstance(e, Const | Index | Size | Access | Call) else e

    return Affine(0, ((rebuild(expr, visit) if isinstance(expr, Access | Call) else expr, 1),))


def _add(call: Call, known: Known | None) -> Affine:
    return linear(call.args[0], known) + linear(call.args[1], known)


def _sub(call: Call, known: Known | None) -> Affine:
    return linear(call.args[0], known) - linear(call.args[1], known)


def _mul(call: Call, known: Known | None) -> Affine:
    a, b = (linear(arg, known) for arg in call.args)
    if not a.terms or not b.terms:
        return b.scale(a.const) if not a.terms else a.scale(b.const)
    one = Const(1)
    terms: list[tuple[Expr, int]] = []
    const = 0
    for x, m in (*a.terms, (one, a.const)):
        for y, n in (*b.terms, (one, b.const)):
            factors = sorted((f for e in (x, y) for f in _factors(e) if f != one), key=_order)
            if not factors:
                const += m * n
            else:
                product = factors[0]
                for f in factors[1:]:
                    product = Call("mul", (product, f))
                terms.append((product, m * n))
    return combine(const, terms)


def _factors(e: Expr) -> Iterator[Expr]:
    if isinstance(e, Call) and e.op == "mul":
        for arg in e.args:
            yield from _factors(arg)
    else:
        yield e


def _floordiv(call: Call, known: Known | None) -> Affine:
    a, b = (linear(arg, known) for arg in call.args)
    if b.terms or b.const == 0:
        return _atom(call, known)
    if b.const < 0:
        a, b = a.scale(-1), b.scale(-1)
    whole = Affine(a.const // b.const, tuple((atom, c // b.const) for atom, c in a.terms if c // b.const))
    rest = a - whole.scale(b.const)  # coefficients in [0, b)
    if not rest.terms:
        return whole
    common = math.gcd(b.const, *(c for _, c in rest.terms))  # (2*x + 1) // 4 is x // 2: the constant cannot carry
    rest = Affine(rest.const // common, tuple((atom, c // common) for atom, c in rest.terms))
    divisor = b.const // common
    if divisor == 1:
        return whole + rest
    return whole + Affine(0, ((Call("floordiv", (rest.expr(), Const(divisor))), 1),))


def _mod(call: Call, known: Known | None) -> Affine:
    a, b = (linear(arg, known) for arg in call.args)
    if b.terms or b.const <= 0:
        return _atom(call, known)
    rest = Affine(a.const % b.const, tuple((atom, c % b.const) for atom, c in a.terms if c % b.const))
    return Affine(0, ((Call("mod", (rest.expr(), Const(b.const))), 1),)) if rest.terms else rest


def _extremum(call: Call, known: Known | None) -> Affine:
    a, b = (linear(arg, known) for arg in call.args)
    difference = a - b
    if difference.terms:
        return Affine(0, ((Call(call.op, (a.expr(), b.expr())), 1),))
    return a if (difference.const >= 0) == (call.op == "maximum") else b


_CALLS: dict[str, Callable[[Call, Known | None], Affine]] = {
    "add": _add, "sub": _sub, "mul": _mul, "floordiv": _floordiv, "mod": _mod, "maximum": _extremum, "minimum": _extremum,
    "neg": lambda call, known: linear(call.args[0], known).scale(-1),
    "int64": lambda call, known: linear(call.args[0], known),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Values and bounds


def known_values(shapes: Shapes, values: Mapping[str, int] | None = None) -> Known:
    """Reads sizes from `shapes` and integer scalars from `values`."""

    def known(e: Expr) -> int | None:
        if isinstance(e, Size):
            shape = shapes.get(e.tensor)
            return None if shape is None or e.dim >= len(shape) else shape[e.dim]
        if isinstance(e, Access) and not e.subscripts and values:
            return values.get(e.tensor)
        return None

    return known


def evaluate(expr: Expr, env: Mapping[str, int], known: Known | None = None) -> int | None:
    """The value of an integer expression; `env` gives indices and scalars by name. None: it depends on a tensor, or divides by 0."""
    match expr:
        case Const(value=value):
            return whole(value) if isinstance(value, int) else None
        case Index(name=name):
            return env.get(name)
        case Access(subscripts=()) if expr.tensor in env:
            return env[expr.tensor]
        case Size() | Access():
            return None if known is None else known(expr)
        case Call(op="where", args=(c, a, b)):
            condition = evaluate(c, env, known)
            return None if condition is None else evaluate(a if condition else b, env, known)
        case Call(op=op) if op in _EVALUATE:
            args = [evaluate(arg, env, known) for arg in expr.args]
            if any(a is None for a in args) or (op in ("floordiv", "mod") and args[1] == 0):
                return None
            return _EVALUATE[op](*args)
    return None


_EVALUATE: dict[str, Callable[..., int]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "neg": lambda a: -a,
    "floordiv": lambda a, b: a // b, "mod": lambda a, b: a % b, "maximum": max, "minimum": min, "abs": abs, "int64": int,
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b, "and": lambda a, b: bool(a and b), "or": lambda a, b: bool(a or b),
    "not": lambda a: not a,
    "bitwise_and": lambda a, b: a & b, "bitwise_or": lambda a, b: a | b, "bitwise_xor": lambda a, b: a ^ b,
}  # fmt: skip


def interval(expr: Expr, ranges: Mapping[str, tuple[int, int]], sizes: Shapes | None = None) -> tuple[int, int] | None:
    """Closed bounds of `expr` with each index in its closed range; None where they are not known."""
    half_open: Ranges = {name: (lo, hi + 1) for name, (lo, hi) in ranges.items()}
    lo, hi = enclosure(linear(expr, known_values(sizes or {})), half_open)
    return None if math.isinf(lo) or math.isinf(hi) else (whole(lo), whole(hi))


def enclosure(form: Affine, ranges: Ranges, known: Known | None = None) -> Extent:
    """The closed interval that holds the values of `form`; exact where `is_exact` says so."""
    if not form.terms:
        return form.const, form.const
    return _least(form, ranges, known), -_least(form.scale(-1), ranges, known)


def _least(form: Affine, ranges: Ranges, known: Known | None) -> float:
    """The least value. An index whose bounds depend on outer ones is replaced by the bound that counts, the innermost first."""
    for name in reversed(tuple(ranges)):
        c = form.coefficient(name)
        if c == 0:
            continue
        lo, hi = ranges[name]
        bound = lo if c > 0 else hi
        if not isinstance(bound, int):
            form = form.without(name) + linear(bound, known).shift(0 if c > 0 else -1).scale(c)
    total: float = form.const
    for atom, c in form.terms:
        low, high = _extent(atom, ranges, known)
        total += c * (low if c > 0 else high)
    return total


def _extent(atom: Expr, ranges: Ranges, known: Known | None) -> Extent:
    match atom:
        case Index(name=name):
            if name not in ranges:
                return ANY
            lo, hi = ranges[name]
            low = lo if isinstance(lo, int) else enclosure(linear(lo, known), ranges, known)[0]
            high = hi - 1 if isinstance(hi, int) else enclosure(linear(hi, known), ranges, known)[1] - 1
            return low, high
        case Size():
            return 0, math.inf
        case Call(op=op) if op in _EXTENTS:
            return _EXTENTS[op](*(enclosure(linear(arg, known), ranges, known) for arg in atom.args))
        case Call(op="eq" | "ne" | "lt" | "le" | "gt" | "ge" | "and" | "or" | "not" | "isnan" | "bool"):
            return 0, 1
    return ANY


def _product(a: Extent, b: Extent) -> Extent:
    corners = [0.0 if x == 0 or y == 0 else x * y for x in a for y in b]
    return min(corners), max(corners)


def _quotient(a: Extent, b: Extent) -> Extent:
    if b[0] <= 0:
        return ANY
    corners = [x if math.isinf(x) else 0 if math.isinf(y) and x >= 0 else -1 if math.isinf(y) else x // y for x in a for y in b]
    return min(corners), max(corners)


def _remainder(a: Extent, b: Extent) -> Extent:
    if b[0] <= 0:
        return ANY
    if b[0] == b[1] and not math.isinf(a[0]) and not math.isinf(a[1]) and a[0] // b[0] == a[1] // b[0]:
        return a[0] % b[0], a[1] % b[0]
    return 0, b[1] - 1


_EXTENTS: dict[str, Callable[..., Extent]] = {
    "mul": _product, "floordiv": _quotient, "mod": _remainder,
    "maximum": lambda a, b: (max(a[0], b[0]), max(a[1], b[1])),
    "minimum": lambda a, b: (min(a[0], b[0]), min(a[1], b[1])),
    "where": lambda c, a, b: (min(a[0], b[0]), max(a[1], b[1])),
    "abs": lambda a: (max(0, a[0], -a[1]), max(abs(a[0]), abs(a[1]))),
    "int64": lambda a: a,
}  # fmt: skip


def is_exact(form: Affine, ranges: Ranges) -> bool:
    """Whether both ends of `enclosure` are attained: bare indices with constant ranges that are not empty."""
    for atom, _ in form.terms:
        if not isinstance(atom, Index) or atom.name not in ranges:
            return False
        lo, hi = ranges[atom.name]
        if not (isinstance(lo, int) and isinstance(hi, int) and lo < hi):
            return False
    return True


def depends_on_values(expr: Expr) -> bool:
    """Whether an integer expression reads a tensor."""
    return any(isinstance(e, Access) for e in walk(expr))


def solve(form: Affine, index: str, lo: int, hi: int, ranges: Ranges, known: Known | None = None) -> tuple[int, int] | None:
    """The largest range [a, b) of `index` for which lo <= form < hi whatever the other indices are in their ranges.

    The range may be empty (a == b). None where the index does not stand bare, stands inside another atom as well, or the rest has
    no bounds.
    """
    c = form.coefficient(index)
    rest = form.without(index)
    if c == 0 or index in rest.indices:
        return None
    least, most = enclosure(rest, ranges, known)
    if math.isinf(least) or math.isinf(most):
        return None
    low, high = lo - whole(least), hi - 1 - whole(most)  # low <= c * index <= high
    if c < 0:
        c, low, high = -c, -high, -low
    first, last = -(-low // c), high // c
    return first, max(first, last + 1)


def is_injective(forms: Sequence[Affine], ranges: Ranges, given: Sequence[str] = ()) -> bool:
    """Whether the values of `forms` tell apart all points of `ranges`, the indices in `given` being told apart already.

    Sufficient, not necessary: an index is settled by a form whose other atoms use settled indices only, or several are where
    the coefficients are the strides of a grid (each larger than all that the smaller ones can add up to).
    """
    extents = {name: hi - lo if isinstance(lo, int) and isinstance(hi, int) else math.inf for name, (lo, hi) in ranges.items()}
    settled = {*given, *(name for name, n in extents.items() if n <= 1)}
    progress = True
    while progress and not settled >= set(extents):
        progress = False
        for form in forms:
            new = sorted((abs(c), atom.name) for atom, c in form.terms if isinstance(atom, Index) and atom.name not in settled)
            if not new or not set(form.opaque) <= settled:
                continue
            reach: float = 0
            fits = True
            for stride, name in new:
                fits = fits and stride > reach
                reach += stride * (extents.get(name, math.inf) - 1)
            if fits:
                settled |= {name for _, name in new}
                progress = True
    return settled >= set(extents)


def rename(form: Affine, to: Mapping[str, str]) -> Affine:
    """The form with indices renamed, inside atoms too."""

    def visit(e: Expr) -> Expr:
        return replace(e, name=to.get(e.name, e.name)) if isinstance(e, Index) else rebuild(e, visit)

    return combine(form.const, [(visit(atom), c) for atom, c in form.terms])
