"""Which sums can be carried relative to a running maximum without losing anything on the way.

    m max= t[j];  l += exp(t[j] - m + b[j]) / x      a term is at most exp(b[j]), whatever m is so far
    m max= y[j];  l += exp(t[j] - m)                 none: exp(t[0] - y[0]) may be infinite where t[0] - m is small

The algebra alone, H(r') / H(r), would take both. An exponent is steady if it falls with r as it rises with what r is the maximum
(or minimum) of: with that in the place of r it no longer depends on it. What else it has that does not vary along the pass, the
logarithm of a running sum say, is a factor of the finished sum.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from tdsl.ir import Access, Call, Const, Expr, free_indices, rebuild, walk
from tdsl.ops import DTYPES, OPS
from tdsl.printer import print_expr
from tdsl.simplify import factors, product

# A sum of products: for each product of atoms, sorted by their text, its coefficient.
_Poly = Mapping[tuple[Expr, ...], float]
# Products beyond which an expression is taken as one atom.
_MOST = 64


@dataclass(frozen=True, slots=True)
class Pass:
    """What is known of a pass. terms: of its running maxima and minima, what they are taken of. running: all running values that
    are read. along: the indices that it walks."""

    terms: Mapping[str, Expr]
    running: frozenset[str]
    along: frozenset[str]

    def varies(self, e: Expr) -> bool:
        """Whether an expression changes along the pass."""
        return bool(self.along & set(free_indices(e)))

    def reads(self, e: Expr) -> bool:
        """Whether it reads a running value."""
        return any(isinstance(a, Access) and a.tensor in self.running for a in walk(e))


def steady(term: Expr, here: Pass) -> tuple[Expr, tuple[Expr, ...]] | None:
    """`term` as it can be summed relative to running values, and the factors that are applied when those are finished; None where it
    cannot be."""
    kept: list[Expr] = []
    late: list[Expr] = []
    for f in factors(term):
        found = _factor(f, here) if here.reads(f) else (f, ())
        if found is None:
            return None
        kept.append(found[0])
        late += found[1]
    return product(kept), tuple(late)


def _factor(f: Expr, here: Pass) -> tuple[Expr, tuple[Expr, ...]] | None:
    match f:
        case Call(op="stop_gradient" | "neg", args=(x,)):
            found = steady(x, here)
        case Call(op=name, args=(x,)) if name in DTYPES and DTYPES[name].kind == "float":
            found = steady(x, here)
        case Call(op="where", args=(condition, x, Const(value=0))) if not here.reads(condition):
            found = steady(x, here)
            return None if found is None else (Call("where", (condition, found[0], Const(0))), found[1])
        case Call(op=name, args=(x,)) if OPS[name].homomorphism == ("add", "mul"):
            split = _exponent(x, here)
            if split is None:
                return None
            inside, late = split
            return Call(name, (inside,)), (Call(name, (late,)),) if late is not None else ()
        case Call(op="div", args=(Const(value=1) as one, x)):
            found = steady(x, here)
            return None if found is None else (Call("div", (one, found[0])), tuple(Call("div", (one, e)) for e in found[1]))
        case Call(op=name, args=(x,)) if OPS[name].homomorphism == ("mul", "mul"):
            found = steady(x, here)
            return None if found is None else (Call(name, (found[0],)), tuple(Call(name, (e,)) for e in found[1]))
        case _:
            return None
    return None if found is None else (rebuild(f, lambda _: found[0]), found[1])


def _exponent(e: Expr, here: Pass) -> tuple[Expr, Expr | None] | None:
    """The part of an exponent that is steady, and the rest, which does not vary along the pass."""
    poly = _poly(e, here)
    inside: dict[tuple[Expr, ...], float] = {}
    rest: dict[tuple[Expr, ...], float] = {}
    for atoms, c in poly.items():
        about = [a for a in atoms if here.reads(a)]
        if any(here.varies(a) for a in about):
            return None  # a function of both cannot be rescaled
        linear = len(about) == 1 and isinstance(about[0], Access) and about[0].tensor in here.terms
        if about and not (linear and not any(here.varies(a) for a in atoms)):
            if any(here.varies(a) for a in atoms):
                return None
            rest[atoms] = c
        else:
            inside[atoms] = c
    left = _at_the_extremum(inside, here)
    if left is None:
        left = _at_the_extremum(_poly(_bound(e), here, skip=frozenset(rest)), here)
    if left is None or (rest and any(here.varies(a) for atoms in left for a in atoms)):
        return None
    if not rest:
        return e, None
    return _expr(inside), _expr(rest)


def _at_the_extremum(poly: _Poly, here: Pass) -> _Poly | None:
    """An exponent where each running value is what it is taken of; None if that still depends on it."""
    result: Counter[tuple[Expr, ...]] = Counter()
    taken: set[Expr] = set()
    for atoms, c in poly.items():
        r = next((a for a in atoms if isinstance(a, Access) and a.tensor in here.terms), None)
        if r is None:
            result[atoms] += c  # type: ignore[assignment]
            continue
        term = _poly(here.terms[r.tensor], here)
        taken |= {a for more in term for a in more if here.varies(a)}
        others = [a for a in atoms if a is not r]
        for more, d in term.items():
            result[_sorted([*others, *more])] += c * d  # type: ignore[assignment]
    left = {atoms: c for atoms, c in result.items() if abs(c) > 1e-12}
    return None if any(a in taken for atoms in left for a in atoms) else left


def _bound(e: Expr) -> Expr:
    """`where(c, x, -inf)` is at most x."""
    e = rebuild(e, _bound)
    if isinstance(e, Call) and e.op == "where" and _lowest(e.args[2]):
        return e.args[1]
    return e


def _lowest(e: Expr) -> bool:
    if isinstance(e, Call) and e.op == "neg":
        return isinstance(e.args[0], Const) and e.args[0].value == math.inf
    return isinstance(e, Const) and e.value == -math.inf


def _poly(e: Expr, here: Pass, skip: frozenset[tuple[Expr, ...]] = frozenset()) -> _Poly:
    """An expression multiplied out."""
    found = _expand(e, here)
    return {atoms: c for atoms, c in found.items() if c and atoms not in skip}


def _expand(e: Expr, here: Pass) -> _Poly:
    match e:
        case Const(value=bool()):
            return {(e,): 1.0}
        case Const(value=value) if math.isfinite(value):
            return {(): float(value)}
        case Call(op="stop_gradient", args=(x,)):
            return _expand(x, here)
        case Call(op="neg", args=(x,)):
            return {atoms: -c for atoms, c in _expand(x, here).items()}
        case Call(op="add" | "sub", args=(a, b)):
            total = Counter(_expand(a, here))
            for atoms, c in _expand(b, here).items():
                total[atoms] += c if e.op == "add" else -c  # type: ignore[assignment]
            return total
        case Call(op="mul", args=(a, b)):
            left, right = _expand(a, here), _expand(b, here)
            if len(left) * len(right) <= _MOST:
                result: Counter[tuple[Expr, ...]] = Counter()
                for mine, c in left.items():
                    for theirs, d in right.items():
                        result[_sorted([*mine, *theirs])] += c * d  # type: ignore[assignment]
                return result
        case Call(op="div", args=(a, Const(value=value))) if value and not isinstance(value, bool):
            return {atoms: c / value for atoms, c in _expand(a, here).items()}
        case Call(op="div", args=(a, b)) if not here.varies(b) and not here.reads(b):
            return {_sorted([*atoms, Call("div", (Const(1), b))]): c for atoms, c in _expand(a, here).items()}
        case Call(op="where", args=(Call(op="eq", args=(Call(op="abs", args=(x,)), Const(value=math.inf))), Const(value=0), y)) if x == y:
            return _expand(x, here)  # a running value that is not finite counts as 0 anyway
    return {(e,): 1.0}


def _sorted(atoms: list[Expr]) -> tuple[Expr, ...]:
    return tuple(sorted(atoms, key=print_expr))


def _expr(poly: _Poly) -> Expr:
    """The expression of a polynomial."""
    total: Expr | None = None
    for atoms, c in poly.items():
        term = product([*atoms]) if abs(c) == 1 and atoms else product([Const(abs(c)), *atoms])
        if total is None:
            total = Call("neg", (term,)) if c < 0 else term
        else:
            total = Call("sub" if c < 0 else "add", (total, term))
    return total if total is not None else Const(0)
