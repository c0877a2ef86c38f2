"""The algebra of cascaded reductions: which of them can share one pass over an index.

A pass walks index j and keeps a running value of each reduction. A later reduction whose terms depend on an earlier
one, `t += phi(a[j], r)`, can run in the same pass if `phi(a, r) = G(a) * H(r)`: whenever r changes to r', what was
summed so far is multiplied by `H(r') / H(r)`, which depends on r and r' alone.

    m max= s[j];  l += exp(s[j] - m);  o += exp(s[j] - m) * v[j] / l
    -->  one pass: when m becomes m', l and o are multiplied by exp(m - m'); o is divided by the finished l

A sum of products of differences, `t += (a[j] - r) * (b[j] - q)` with r and q functions of running sums, is no such product
of two, but a sum of three; multiplied out its moments cancel. It is carried about the running means instead, and shifted
to r and q at the end (Chan, Golub and LeVeque, Updating formulae, 1979): a variance needs one pass.

`rescale` finds the factor by walking the term: products split into their factors, sums into their terms, and a function
passes from one to the other if it is a homomorphism (a column of ops.py). The running values with their factors form a
monoid, so parts of the range can also be reduced apart and merged. Sources: Milakov and Gimelshein, arXiv:1805.02867;
Rabe and Staats, arXiv:2112.05682; the general condition is that of RedFuser and Neptune.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lowering.statement import inlined
from lowering.steady import Pass, steady
from tdsl.ir import Access, Call, Const, Expr, Statement, free_indices, rebuild, walk
from tdsl.ops import DTYPES, OPS
from tdsl.simplify import factors, product, simplify_expr

OLD = ".old"  # `r.old` is the running value of r before this step, `r` the one after it


@dataclass(frozen=True, slots=True)
class Reduction:
    """One reduction of a pass. inner: the term, without the factors `outer` that do not vary along the pass and are applied
    once at its end. running: reductions of the same pass that the term reads. factor: what a change of those multiplies
    the sum by, in terms of `r.old` and `r`; None where nothing is read. centred: (a, r) and (b, q) of a product of differences,
    given: where it counts; None: everywhere."""

    statement: Statement
    inner: Expr
    outer: tuple[Expr, ...]
    running: tuple[str, ...]
    factor: Expr | None
    centred: tuple[tuple[Expr, Expr], ...] = ()
    given: Expr | None = None


def passes(statements: Sequence[Statement], stream: Sequence[str]) -> tuple[tuple[Reduction, ...], ...]:
    """The reductions over `stream` among some statements, in as few passes as the algebra allows, in order."""
    along = set(stream)
    inside = {s.target.tensor: s for s in statements if not s.reduced and along & set(free_indices(s.target))}
    afterwards = {s.target.tensor: s for s in statements if not s.reduced and not along & set(free_indices(s.target))}
    over = [s for s in statements if along & set(s.reduced)]
    names = {s.target.tensor for s in over}
    place: dict[str, int] = {}
    extrema: dict[str, Expr] = {}  # running maxima and minima: what they are taken of
    outers: dict[str, tuple[Expr, ...]] = {}  # factors that are applied at the end of a pass, so not to running values that use them
    result: list[list[Reduction]] = []
    for s in over:
        value = inlined(s.value, {**inside, **afterwards})
        needs = {a.tensor for a in _reads(value, statements) if a.tensor in names}
        finished = _through_sums(value, statements, names)  # what a sum of its own was made of cannot be rescaled
        number = max((*(place[n] for n in needs), *(place[n] + 1 for n in finished)), default=0)
        beside = tuple(n for n in place if n in needs and place[n] == number)
        unfinished = any(a.tensor in place and place[a.tensor] == number for n in beside for t in outers[n] for a in walk(t) if isinstance(a, Access))
        found = None if unfinished else _reduction(s, value, beside, along, extrema)
        if found is None:
            number += 1
            found = _reduction(s, value, (), along, {})
            assert found is not None
        while len(result) <= number:
            result.append([])
        result[number].append(found)
        outers[s.target.tensor] = found.outer
        if s.op in ("max=", "min="):
            extrema[s.target.tensor] = value
        place[s.target.tensor] = number
    return tuple(tuple(p) for p in result)


def _reduction(s: Statement, value: Expr, running: tuple[str, ...], along: set[str], extrema: Mapping[str, Expr]) -> Reduction | None:
    """The reduction as a member of a pass in which `running` run too, or None where the algebra does not allow it."""
    if s.op != "+=":
        return None if running else Reduction(s, s.value, (), (), None)
    terms = factors(value)
    outer = tuple(t for t in terms if not along & set(free_indices(t)) and not set(s.reduced) & set(free_indices(t)))
    left = [t for t in terms if t not in outer]  # where nothing leaves, the order is kept: quotients that others read stay what they are
    inner = value if not outer else product(left) if left else Const(1)
    reads = {a.tensor for a in walk(inner) if isinstance(a, Access)}
    met = tuple(n for n in running if n in reads)
    if not met:
        return Reduction(s, inner, outer, (), None)
    terms_of = {n: extrema[n] for n in met if n in extrema}
    settled = steady(inner, Pass(terms_of, frozenset(met), frozenset(along)))
    if settled is not None:
        inner, late = settled
        met = tuple(n for n in met if any(isinstance(a, Access) and a.tensor == n for a in walk(inner)))
        factor = rescale(inner, frozenset(met), frozenset(along))
        if factor is not None:
            return Reduction(s, inner, (*outer, *late), met, simplify_expr(factor))
    given, rest = _given(inner, frozenset(met))
    pair = differences(rest, frozenset(met), frozenset(along))
    return None if pair is None else Reduction(s, inner, outer, (), None, pair, given)


def _given(term: Expr, running: frozenset[str]) -> tuple[Expr | None, Expr]:
    """`where(c, x, 0)` --> c and x, where no running value decides."""
    match term:
        case Call(op="where", args=(condition, x, Const(value=0))) if not _depends(condition, running):
            more, rest = _given(x, running)
            return (condition if more is None else Call("and", (condition, more))), rest
    return None, term


def differences(term: Expr, running: frozenset[str], along: frozenset[str]) -> tuple[tuple[Expr, Expr], ...] | None:
    """(a, r) and (b, q) of a term (a - r) * (b - q), where a and b vary along the pass and r and q depend on running values only."""
    if isinstance(term, Call) and term.op == "pow" and term.args[1] == Const(2):
        term = Call("mul", (term.args[0], term.args[0]))
    found = []
    for f in factors(term):
        if not (isinstance(f, Call) and f.op == "sub"):
            return None
        a, r = f.args
        if _depends(a, running) or not along & set(free_indices(a)) or along & set(free_indices(r)):
            return None
        found.append((a, r))
    return tuple(found) if len(found) == 2 else None


def _reads(value: Expr, statements: Sequence[Statement]) -> list[Access]:
    """The accesses of a value, and those of what the kernel computes for it at each step."""
    definitions = {s.target.tensor: s for s in statements}
    found: list[Access] = []
    pending = [value]
    seen: set[str] = set()
    while pending:
        for a in walk(pending.pop()):
            if isinstance(a, Access):
                found.append(a)
                if a.tensor in definitions and a.tensor not in seen:
                    seen.add(a.tensor)
                    if not definitions[a.tensor].reduced:
                        pending.append(definitions[a.tensor].value)
    return found


def _through_sums(value: Expr, statements: Sequence[Statement], names: set[str]) -> set[str]:
    """Those of some tensors that a value is made of by way of a sum over other indices."""
    definitions = {s.target.tensor: s for s in statements}
    found: set[str] = set()
    pending = [(value, False)]
    seen: set[tuple[str, bool]] = set()
    while pending:
        expr, summed = pending.pop()
        for a in walk(expr):
            if not isinstance(a, Access) or a.tensor not in definitions:
                continue
            if a.tensor in names:
                found |= {a.tensor} if summed else set()
            elif (a.tensor, summed or bool(definitions[a.tensor].reduced)) not in seen:
                seen.add((a.tensor, summed or bool(definitions[a.tensor].reduced)))
                pending.append((definitions[a.tensor].value, summed or bool(definitions[a.tensor].reduced)))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The factor

_NEUTRAL = {"mul": Const(1), "add": Const(0)}


def rescale(term: Expr, running: frozenset[str], along: frozenset[str]) -> Expr | None:
    """H(r')/H(r) for a term G(a) * H(r), with `r.old` for r and `r` for r'; None where the term is no such product."""
    return _change(term, "mul", running, along)


def _change(e: Expr, op: str, running: frozenset[str], along: frozenset[str]) -> Expr | None:
    """What `e` changes by, under `op` ("mul": a quotient, "add": a difference), when the running values change."""

    def change(x: Expr, under: str = op) -> Expr | None:
        return _change(x, under, running, along)

    if not _depends(e, running):
        return _NEUTRAL[op]
    if not along & set(free_indices(e)) and op == "add":
        return Call("sub", (e, _older(e, running)))
    match e:
        case Call(op="stop_gradient", args=(x,)):
            return change(x)
        case Call(op=name, args=(x,)) if name in DTYPES and DTYPES[name].kind == "float":
            return change(x)
        case Call(op="neg", args=(x,)):
            part = change(x)
            return part if op == "mul" or part is None else Call("neg", (part,))
        case Call(op="mul", args=(a, b)) if op == "mul":
            return _both("mul", change(a), change(b))
        case Call(op="div", args=(a, b)) if op == "mul":
            return _both("div", change(a), change(b))
        case Call(op="add" | "sub", args=(a, b)) if op == "add":
            return _both(e.op, change(a), change(b))
        case Call(op="mul", args=(a, b)) if op == "add":
            for fixed, moving in ((a, b), (b, a)):
                if not _depends(fixed, running) and not along & set(free_indices(fixed)):
                    return _both("mul", fixed, change(moving))
            return None
        case Call(op="div", args=(a, b)) if op == "add" and not _depends(b, running) and not along & set(free_indices(b)):
            return _both("div", change(a), b)
        case Call(op="where", args=(condition, a, b)) if not _depends(condition, running):
            for x, other in ((a, b), (b, a)):
                if _absorbs(x, op):
                    return change(other)
            left, right = change(a), change(b)
            return left if left == right else None
        case Call(op=name, args=(x,)) if OPS[name].homomorphism[1] == op:
            part = change(x, OPS[name].homomorphism[0])
            return None if part is None else Call(name, (part,))
    return None


def _both(op: str, a: Expr | None, b: Expr | None) -> Expr | None:
    return None if a is None or b is None else simplify_expr(Call(op, (a, b)))


def _absorbs(e: Expr, op: str) -> bool:
    """A constant that no change of the other operand alters: 0 in a product, an infinity in a sum."""
    if isinstance(e, Call) and e.op == "neg":
        return _absorbs(e.args[0], op)
    return isinstance(e, Const) and (e.value == 0 if op == "mul" else math.isinf(e.value))


def _depends(e: Expr, running: frozenset[str]) -> bool:
    return any(isinstance(a, Access) and a.tensor in running for a in walk(e))


def _older(e: Expr, running: frozenset[str]) -> Expr:
    e = rebuild(e, lambda x: _older(x, running))
    return Access(e.tensor + OLD, e.subscripts, e.span) if isinstance(e, Access) and e.tensor in running else e
