"""Changes of variable: integer equations solved for an index.

    c*x + rest = u        -->   x = (u - rest) / c, where c divides it
    C*a + k + rest = u    -->   a = (u - rest) // C, k = (u - rest) % C              for k in 0:C
    e // c = u            -->   e = c*u + k with a new k in 0:c
    (i + rest) % N = u    -->   i = lo + (u - rest - lo) % N, and a turn of N more where the range of i is longer
"""

from __future__ import annotations

from dataclasses import dataclass

from tdsl.affine import Affine, Bound, enclosure, linear
from tdsl.conditions import as_expr_or_int, integral, shown
from tdsl.extents import Sizes, as_expr
from tdsl.ir import Access, Call, Const, Expr, Index, Range, Statement, bounds, expressions, free_indices, fresh_name, substitute, walk

# An index with a constant range this short is taken for a window's, and kept.
SHORT = 16
ZERO = Const(0)


@dataclass(frozen=True, slots=True)
class Step:
    """One index eliminated: `form = rhs` solved for it. value: what it is. num, by: value = num / by, for its bounds (num None: none)."""

    index: str
    form: Affine
    rhs: Affine
    coefficient: int
    value: Expr
    num: Affine | None
    by: int
    range: tuple[Bound, Bound]


class Inversion:
    """The indices of one statement, solved for in terms of new ones: one equation per subscript of its target."""

    def __init__(self, s: Statement, sizes: Sizes, ranges: dict[str, tuple[Bound, Bound]], taken: set[str], fixed: frozenset[str]):
        self.s = s
        self.sizes = sizes
        self.found = dict(ranges)  # of the old indices
        self.ranges = ranges  # of those in use now
        self.tensors = taken
        self.fixed = fixed
        self.kept: set[str] = set()  # those that stay subscripts
        self.names = {e.name for top in expressions(s) for e in walk(top) if isinstance(e, Index)} | {
            *s.indices,
            *fixed,
            *taken,
            *sizes.names,
        }
        self.steps: list[Step] = []
        self.equations: list[tuple[Affine, Affine]] = []  # of the target: form = u
        self.conditions: list[Expr] = []
        self.added: list[Range] = []
        self.place: dict[str, list[Range]] = {}  # eliminated index -> the ranges that stand where its range stood
        self.blocked = self._blocked()

    # -- what may be eliminated ---------------------------------------------------------------------------------------

    def _blocked(self) -> frozenset[str]:
        """Indices that other ranges depend on, and those in the subscripts of a subscript: what they read must stay valid."""
        found = {i for b in bounds(self.s.ranges) for i in free_indices(b)}
        for e in walk(self.s.value):
            if isinstance(e, Access):
                found |= {i for sub in e.subscripts for a in walk(sub) if isinstance(a, Access) for i in free_indices(a)}
        return frozenset(found)

    def _fresh(self, letters: str) -> str:
        name = next((c for c in letters if c not in self.names), None) or fresh_name(letters[0], self.names)
        self.names.add(name)
        return name

    def _candidates(self, form: Affine) -> list[str]:
        """The indices that an equation may be solved for, the best first: no short constant range, then the outermost."""
        gone = {step.index for step in self.steps}
        own = {*self.s.indices, *(r.index for r in self.added)} - gone - self.kept - self.blocked
        found = [i for i in form.linear_indices if i in own and i not in form.opaque]
        order = list(self.ranges)

        def rank(i: str) -> tuple[bool, int]:
            lo, hi = self.ranges[i]
            return isinstance(lo, int) and isinstance(hi, int) and hi - lo <= SHORT, order.index(i)

        return sorted(found, key=rank)

    # -- solving one equation -----------------------------------------------------------------------------------------

    def solve(self, form: Affine, rhs: Affine) -> bool:
        """Solves `form = rhs` for an index; False where nothing was done."""
        form = self._tidy(form)
        return self._radix(form, rhs) or self._quotient(form, rhs) or self._remainder(form, rhs) or self._bare(form, rhs)

    def _eliminate(self, index: str, form: Affine, rhs: Affine, coefficient: int, value: Expr, num: Affine | None, by: int = 1) -> None:
        self.steps.append(Step(index, form, rhs, coefficient, value, num, by, self.ranges.pop(index)))

    def _bare(self, form: Affine, rhs: Affine, *, whole: bool = False) -> bool:
        """c*x + rest = rhs  -->  x = (rhs - rest) / c, where c divides it. whole: only where c is 1 or -1."""
        found = [i for i in self._candidates(form) if not whole or abs(form.coefficient(i)) == 1]
        if not found:
            return False
        index = found[0]
        c = form.coefficient(index)
        num, by = (rhs - form.without(index)).scale(1 if c > 0 else -1), abs(c)
        if by > 1:
            self.conditions.append(Call("eq", (Call("mod", (num.expr(), Const(by))), ZERO)))
        value = num.expr() if by == 1 else Call("floordiv", (num.expr(), Const(by)))
        self._eliminate(index, form, rhs, c, value, num, by)
        return True

    def _radix(self, form: Affine, rhs: Affine) -> bool:
        """C*a + k + rest = rhs with k in 0:C  -->  a = (rhs - rest) // C, k = (rhs - rest) % C."""
        found = self._candidates(form)
        for k in found:
            lo, hi = self.ranges[k]
            if form.coefficient(k) != 1 or lo != 0:
                continue
            for a in found:
                if a != k and isinstance(hi, int) and hi > 1 and form.coefficient(a) == hi:
                    rest = rhs - form.without(k).without(a)
                    if rest.indices and not set(rest.indices) <= set(self.ranges) - {a, k}:
                        continue
                    self._eliminate(a, form, rhs, hi, Call("floordiv", (rest.expr(), Const(hi))), rest, hi)
                    one = Affine(0, ((Index(k), 1),))
                    self._eliminate(k, one, linear(Call("mod", (rest.expr(), Const(hi)))), 1, Call("mod", (rest.expr(), Const(hi))), None)
                    return True
        return False

    def _single(self, form: Affine, op: str) -> tuple[Call, int, Affine] | None:
        """The one quotient (or remainder) with indices in a form, if its coefficient is 1 or -1: (atom, sign, the rest)."""
        found = [(atom, c) for atom, c in form.terms if not isinstance(atom, Index) and free_indices(atom)]
        if len(found) != 1 or abs(found[0][1]) != 1:
            return None
        atom, sign = found[0]
        if not (isinstance(atom, Call) and atom.op == op) or free_indices(atom.args[1]):
            return None
        rest = form - Affine(0, ((atom, sign),))
        return None if rest.indices and not isinstance(atom.args[1], Const) else (atom, sign, rest)

    def _quotient(self, form: Affine, rhs: Affine) -> bool:
        """e // c = rhs  -->  e = c*rhs + k with a new k in 0:c."""
        found = self._single(form, "floordiv")
        if found is None:
            return False
        atom, sign, rest = found
        inner, by = linear(atom.args[0]), atom.args[1]
        if isinstance(by, Const):  # what stands beside the quotient goes into it
            inner, rest = inner + rest.scale(sign * int(by.value)), Affine(0)
        if not self._candidates(inner):
            return False
        k = self._fresh("k")
        self.ranges[k] = 0, as_expr_or_int(by)
        whole = linear(Call("mul", ((rhs - rest).scale(sign).expr(), by)))
        self.added.append(Range(k, Const(0), by))
        return self.solve(inner, whole + Affine(0, ((Index(k), 1),)))

    def _remainder(self, form: Affine, rhs: Affine) -> bool:
        """(i + rest) % N = rhs  -->  i = lo + (rhs - rest - lo) % N, and the same plus N, 2*N, .. where the range of i is longer."""
        found = self._single(form, "mod")
        if found is None:
            return False
        atom, sign, rest = found
        if rest.indices:
            return False
        inner, n = linear(atom.args[0]), self.sizes.linear(atom.args[1])
        candidates = [i for i in self._candidates(inner) if abs(inner.coefficient(i)) == 1]
        if not candidates:
            return False
        index = candidates[0]
        c = inner.coefficient(index)
        lo, hi = (linear(as_expr(b)) for b in self.ranges[index])
        wanted = (rhs - rest).scale(sign)
        turned = (wanted - inner.without(index)).scale(c) - lo
        value = lo + Affine(0, ((Call("mod", (turned.expr(), n.expr())), 1),))
        over = hi - lo - n  # by how much the range is longer than one turn
        if not self._nonnegative(over.scale(-1)):
            m = self._fresh("m")
            turns = Call("floordiv", ((hi - lo + n).shift(-1).expr(), n.expr()))
            self.added.append(Range(m, Const(0), turns))
            self.ranges[m] = 0, turns
            value = value + linear(Call("mul", (n.expr(), Index(m))))
        for condition in (self._at_least(wanted), self._below(wanted, n)):
            if condition is not None:
                self.conditions.append(condition)
        self._eliminate(index, form, rhs, 0, value.expr(), None if over == Affine(0) else value)
        return True

    def _tidy(self, form: Affine) -> Affine:
        """The form without remainders that change nothing: k % 2 --> k for k in 0:2."""
        result = form
        for atom, c in form.terms:
            if isinstance(atom, Call) and atom.op == "mod" and isinstance(atom.args[1], Const):
                inner = linear(atom.args[0])
                if self._nonnegative(inner) and self._nonnegative(Affine(int(atom.args[1].value) - 1) - inner):
                    result = result - Affine(0, ((atom, c),)) + inner.scale(c)
        return result

    # -- conditions ---------------------------------------------------------------------------------------------------

    def _nonnegative(self, form: Affine) -> bool:
        """Whether the form is provably 0 or more."""
        return enclosure(form, self.ranges)[0] >= 0

    def _at_least(self, form: Affine) -> Expr | None:
        """The condition `form >= 0`, None where it always holds."""
        if self._nonnegative(form):
            return None
        strict = form.const == -1
        form = form.shift(1) if strict else form
        left = Affine(max(0, form.const), tuple((a, c) for a, c in form.terms if c > 0))
        right = Affine(max(0, -form.const), tuple((a, -c) for a, c in form.terms if c < 0))
        return Call("gt" if strict else "ge", (left.expr(), right.expr()))

    def _below(self, form: Affine, limit: Affine) -> Expr | None:
        """The condition `form < limit`, None where it always holds."""
        return None if self._nonnegative((limit - form).shift(-1)) else Call("lt", (shown(form), shown(limit)))

    def _solved_guard(self, term: Expr) -> bool:
        if not (isinstance(term, Call) and term.op == "eq" and all(integral(a) for a in term.args)):
            return False
        form = self._tidy(self.rewritten(self.sizes.linear(term.args[0]) - self.sizes.linear(term.args[1])))
        return self._bare(form, Affine(0), whole=True)

    def rewritten(self, form: Affine) -> Affine:
        """An integer expression in the new variables."""
        for whole, rhs in self.equations:
            form = replaced(form, whole, rhs)
        for step in self.steps:
            if step.index not in form.indices:
                continue
            times, odd = divmod(form.coefficient(step.index), step.coefficient) if step.coefficient else (0, 1)
            if not odd and step.index not in form.opaque:
                form = form - step.form.scale(times) + step.rhs.scale(times)
            else:
                form = linear(substitute(form.expr(), {step.index: step.value}))
        return form


def replaced(form: Affine, whole: Affine, rhs: Affine) -> Affine:
    """`form` with a multiple of `whole`, where all its atoms stand in it, replaced by that multiple of `rhs`."""
    coefficients = dict(form.terms)
    own = [(atom, c) for atom, c in whole.terms if free_indices(atom)]
    if not own or any(atom not in coefficients for atom, _ in own):
        return form
    times, odd = divmod(coefficients[own[0][0]], own[0][1])
    if odd or any(coefficients[atom] != times * c for atom, c in own):
        return form
    return form - whole.scale(times) + rhs.scale(times)
