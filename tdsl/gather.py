"""Affine targets become gathers: a change of variable makes the subscripts of a target plain, so that no two terms collide.

    for n, x, r:  X.grad[n,2*x+r-1] += Y.grad[n,x] * W[r]
    -->
    for n, u, r:  X.grad[n,u] += where((u-r+1) % 2 == 0, Y.grad[n,pad((u-r+1)//2)] * W[r], 0)

Each subscript e gives an equation u = e, which is solved for one of the indices in it: the outermost that is no short
constant range, so that the loops of a kernel window remain. A solution must be whole (the divisibility), and inside
the range of its index: pad reads zero outside where that makes the whole term zero, a condition says it elsewhere. An
equation that holds no index to solve for (`A.grad[i,i]`, `A.grad[0,j]`) becomes a condition. Equations that stand as
conditions already are solved for summed indices: `for i, v: g[i] += where(v == i, A[i,v], 0)` --> `for i: g[i] += A[i,i]`.

Left alone are subscripts that read tensors (true scatters), clamp, and what none of these rules inverts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from tdsl.affine import Affine, Bound, Ranges, enclosure, is_injective, linear
from tdsl.expand import witness
from tdsl.extents import Sizes, as_expr, loop_ranges, symbolic_ranges
from tdsl.ir import (
    Access,
    Call,
    Clamp,
    Const,
    Expr,
    Index,
    Loop,
    Pad,
    Program,
    Range,
    Reduce,
    Size,
    Softmax,
    Statement,
    bounds,
    expressions,
    free_indices,
    fresh_name,
    reads,
    rebuild,
    statements,
    substitute,
    walk,
)

# An index with a constant range this short is taken for a window's, and kept.
SHORT = 16
_INTEGER = frozenset({"add", "sub", "mul", "neg", "floordiv", "mod"})
_COMPARISONS = frozenset({"eq", "ne", "lt", "le", "gt", "ge"})
# Functions that are finite at zero: a factor made of them leaves a product with a zero in it zero.
_FINITE = frozenset(
    {
        "add",
        "sub",
        "mul",
        "neg",
        "maximum",
        "minimum",
        "abs",
        "exp",
        "exp2",
        "expm1",
        "sin",
        "cos",
        "tanh",
        "sigmoid",
        "relu",
        "silu",
        "gelu",
        "erf",
    }
)
ZERO = Const(0)


def gather_form(program: Program, only: Collection[str] | None = None, *, colliding: bool = False) -> Program:
    """`program` with every `+=` onto affine subscripts of a tensor of known size rewritten so that its subscripts are plain.

    only: the targets whose statements may change (None: all). colliding: only statements that add several terms to one element,
    as far as the text shows.

    Source of the method: the change of variables of polyhedral compilers (Feautrier, "Some efficient solutions to the affine
    scheduling problem", 1992), with the divisibility condition of non-unimodular maps.
    """
    sizes = Sizes(program)
    taken = {*program.inputs, *(s.target.tensor for s in statements(program.body))}
    wanted = frozenset(taken if only is None else only)
    body: list[Statement | Loop] = []
    for node in program.body:
        if isinstance(node, Loop):
            sizes.note(node)
            body.append(_in_loop(node, sizes, {}, frozenset(), taken, wanted))
        else:
            collides = not colliding or not is_injective([sizes.linear(e) for e in node.target.subscripts], symbolic_ranges(node, sizes))
            body += gathered(node, sizes, taken) if node.target.tensor in wanted and collides else [node]
            sizes.note(node)
    return replace(program, body=_without_fills(tuple(body), sizes))


def _in_loop(loop: Loop, sizes: Sizes, outer: Ranges, fixed: frozenset[str], taken: set[str], wanted: frozenset[str]) -> Loop:
    inside = {**outer, **loop_ranges(loop, sizes)}
    fixed = fixed | {r.index for r in loop.ranges}
    body: list[Statement | Loop] = []
    for child in loop.body:
        if isinstance(child, Loop):
            body.append(_in_loop(child, sizes, inside, fixed, taken, wanted))
        else:
            body += gathered(child, sizes, taken, inside, fixed) if child.target.tensor in wanted else [child]
    return replace(loop, body=tuple(body))


def gathered(
    s: Statement, sizes: Sizes, taken: set[str], outer: Ranges | None = None, fixed: frozenset[str] = frozenset()
) -> list[Statement]:
    """The statements that do the work of `s` with plain subscripts, or `s` itself where no rule applies.

    fixed: indices of ordered loops around it. taken: names of tensors; those of new ones are added.
    """
    if s.op != "+=" or s.target.tensor not in sizes.shapes or any(isinstance(e, Reduce | Softmax) for e in walk(s.value)):
        return [s]
    if any(isinstance(a, Access) and a.subscripts for e in s.target.subscripts for a in walk(e)) or any(
        isinstance(e, Clamp) for e in s.target.subscripts
    ):
        return [s]
    if any(a.tensor == s.target.tensor for a in reads(s)):
        return [s]
    ranges = symbolic_ranges(s, sizes, outer)
    if any(i not in ranges for i in s.indices):
        return [s]
    change = _Change(s, sizes, ranges, taken, fixed)
    result = change.run()
    return [s] if result is None else result


@dataclass(frozen=True, slots=True)
class _Step:
    """One index eliminated: `form = rhs` solved for it. value: what it is. num, by: value = num / by, for its bounds (num None: none)."""

    index: str
    form: Affine
    rhs: Affine
    coefficient: int
    value: Expr
    num: Affine | None
    by: int
    range: tuple[Bound, Bound]


class _Change:
    """The change of variables of one statement."""

    def __init__(self, s: Statement, sizes: Sizes, ranges: dict[str, tuple[Bound, Bound]], taken: set[str], fixed: frozenset[str]):
        self.s = s
        self.sizes = sizes
        self.found = dict(ranges)  # of the old indices
        self.ranges = ranges  # of those in use now
        self.tensors = taken
        self.fixed = fixed
        self.names = {e.name for top in expressions(s) for e in walk(top) if isinstance(e, Index)} | {
            *s.indices,
            *fixed,
            *taken,
            *sizes.names,
        }
        self.steps: list[_Step] = []
        self.equations: list[tuple[Affine, Affine]] = []  # of the target: form = u
        self.conditions: list[Expr] = []
        self.added: list[Range] = []
        self.place: dict[str, list[Range]] = {}  # eliminated index -> the ranges that stand where its range stood
        self.blocked = self._blocked()

    def run(self) -> list[Statement] | None:
        s = self.s
        kept: dict[str, int] = {}
        for d, e in enumerate(s.target.subscripts):
            if isinstance(e, Index) and e.name not in self.fixed:
                kept.setdefault(e.name, d)
        self.kept = set(kept)
        target: list[Expr] = list(s.target.subscripts)
        masks: list[tuple[int, str, Affine]] = []
        for d, e in enumerate(s.target.subscripts):
            if isinstance(e, Index) and kept.get(e.name) == d:
                continue
            form = self.sizes.linear(e.value if isinstance(e, Pad) else e)
            if set(form.indices) & self.fixed:
                if set(form.indices) <= self.fixed:
                    continue  # a place that the step of the ordered loop settles
                return None
            name = self._fresh("uvw")
            target[d] = Index(name)
            rhs = Affine(0, ((Index(name), 1),))
            self.ranges = {name: (0, as_expr_or_int(self.sizes.shapes[s.target.tensor][d])), **self.ranges}
            known = len(self.steps)
            if self.solve(self.rewritten(form), rhs):
                self.place[self.steps[known].index] = [Range(name)]
                self.equations.append((form, rhs))
            else:
                masks.append((d, name, form))
        remaining = self._guards()
        if not self.steps and not masks:
            return None
        for _, name, form in masks:
            left = self.rewritten(form)
            if not set(left.indices) <= self.kept | set(self.ranges) - set(s.indices):
                return None
            self.conditions.append(Call("eq", (Index(name), shown(left))))
        gone = {step.index for step in self.steps}
        if masks and any(i not in self.kept | gone for i in s.indices):
            return self._reduced_first(masks)
        return [self._statement(tuple(target), remaining)]

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
        self.steps.append(_Step(index, form, rhs, coefficient, value, num, by, self.ranges.pop(index)))

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

    def _guards(self) -> tuple[list[Expr], Expr]:
        """The conditions of the value, without the equations that were solved for a summed index; and the value under them."""
        terms, value = unguarded(self.s.value)
        return [term for term in terms if not self._solved_guard(term)], value

    def _solved_guard(self, term: Expr) -> bool:
        if not (isinstance(term, Call) and term.op == "eq" and all(integral(a) for a in term.args)):
            return False
        form = self._tidy(self.rewritten(self.sizes.linear(term.args[0]) - self.sizes.linear(term.args[1])))
        return self._bare(form, Affine(0), whole=True)

    def _simplified(self, condition: Expr) -> Expr | None:
        """A condition in the new variables; None where it always holds."""
        if not (isinstance(condition, Call) and condition.op in _COMPARISONS and all(integral(a) for a in condition.args)):
            return condition
        a, b = (self._tidy(linear(e)) for e in condition.args)
        margin = {"ge": a - b, "gt": (a - b).shift(-1), "le": b - a, "lt": (b - a).shift(-1)}.get(condition.op)
        holds = self._nonnegative(margin) if margin is not None else condition.op == "eq" and a == b
        return None if holds else condition

    # -- the new statement --------------------------------------------------------------------------------------------

    def rewritten(self, form: Affine) -> Affine:
        """An integer expression in the new variables."""
        for whole, rhs in self.equations:
            form = _replaced(form, whole, rhs)
        for step in self.steps:
            if step.index not in form.indices:
                continue
            times, odd = divmod(form.coefficient(step.index), step.coefficient) if step.coefficient else (0, 1)
            if not odd and step.index not in form.opaque:
                form = form - step.form.scale(times) + step.rhs.scale(times)
            else:
                form = linear(substitute(form.expr(), {step.index: step.value}))
        return form

    def _value(self, e: Expr) -> Expr:
        """A value in the new variables; what it reads stays inside its tensors, or is padded."""
        gone = {step.index for step in self.steps}
        if not gone & set(free_indices(e)):
            return e
        if isinstance(e, Access):
            return replace(e, subscripts=tuple(self._subscript(e.tensor, d, s) for d, s in enumerate(e.subscripts)))
        if integral(e):
            return shown(self.rewritten(self.sizes.linear(e)))
        return rebuild(e, self._value)

    def _subscript(self, tensor: str, d: int, s: Expr) -> Expr:
        moved = [step for step in self.steps if step.index in free_indices(s)]
        if not moved:
            return s
        form = self._tidy(self.rewritten(self.sizes.linear(s.value if isinstance(s, Pad | Clamp) else s)))
        new = shown(form)
        if isinstance(s, Clamp):
            return Clamp(new)
        size = self.sizes.linear(Size(tensor, d))
        if isinstance(new, Index) and new.name in self.ranges:
            lo, hi = self.ranges[new.name]
            return new if lo == 0 and linear(as_expr(hi)) == size else Pad(new)
        inside = self._nonnegative(form) and self._nonnegative((size - form).shift(-1))
        return new if inside or all(self._stays(step) for step in moved) else Pad(new)

    def _stays(self, step: _Step) -> bool:
        """Whether an index provably stays in its range, so that what it reads is as much inside as before."""
        lo, hi = (self.rewritten(linear(as_expr(b))) for b in step.range)
        value = self.rewritten(linear(step.value))
        return self._nonnegative(value - lo) and self._nonnegative((hi - value).shift(-1))

    def _statement(self, target: tuple[Expr, ...], guarded: tuple[list[Expr], Expr]) -> Statement:
        guards, body = guarded
        value = self._value(body)
        terms = [*self.conditions, *(self._value(g) for g in guards)]
        conditions = [c for c in (self._simplified(self._value(t)) for t in terms) if c is not None]
        conditions += [c for step in self.steps for c in self._in_range(step, value)]
        if conditions:
            value = Call("where", (conjunction(conditions), value, ZERO))
        ranges = self._ranges(value, Access(self.s.target.tensor, target))
        return replace(self.s, ranges=ranges, target=replace(self.s.target, subscripts=target), value=value)

    def _in_range(self, step: _Step, value: Expr) -> Iterator[Expr]:
        """The conditions that an index stays in its range, where neither a proof nor a padded factor says so."""
        if step.num is None:
            return
        lo, hi = (self.rewritten(linear(as_expr(b))) for b in step.range)
        num, whole = self.rewritten(step.num), self.rewritten(linear(step.value))
        zero = [
            (linear(p.value), self.sizes.linear(Size(a.tensor, d)))
            for a in vanishing(value)
            for d, p in enumerate(a.subscripts)
            if isinstance(p, Pad)
        ]
        if not any(self._nonnegative(whole - lo - form) for form, _ in zero):  # below lo, the subscript is below 0
            condition = self._at_least(num - lo.scale(step.by))
            if condition is not None:
                yield condition
        if not any(self._nonnegative(form - size - whole + hi) for form, size in zero):
            condition = self._below(num, hi.scale(step.by))
            if condition is not None:
                yield condition

    def _ranges(self, value: Expr, target: Access) -> tuple[Range, ...]:
        """The loops: a new index where the one stood that it replaces, those of conditions after the target's, further ones last."""
        gone = {step.index for step in self.steps}
        result: list[Range] = []
        for r in self.s.ranges:
            if r.index in gone:
                result += self.place.get(r.index, [])
            elif r.lo is not None:
                result.append(r)
            else:
                size = witness(r.index, value, target)
                lo, hi = self.ranges[r.index]
                same = size is not None and lo == 0 and self.sizes.linear(size) == linear(as_expr(hi))
                result.append(r if same else replace(r, lo=as_expr(lo), hi=as_expr(hi)))
        last = max((n for n, r in enumerate(result) if r.index in free_indices(target)), default=-1)
        placed = {r.index for r in result} | self.fixed
        result[last + 1 : last + 1] = [Range(i) for i in free_indices(target) if i not in placed]
        return (*result, *(r for r in self.added if r.index not in gone))

    def _reduced_first(self, masks: Sequence[tuple[int, str, Affine]]) -> list[Statement] | None:
        """`for i, k: A[i,i] += f(i,k)` --> `for i, k: A.part[i] += f(i,k);  for i, v: A[i,v] += where(v == i, A.part[i], 0)`."""
        s = self.s
        if self.fixed:
            return None
        masked = {d: name for d, name, _ in masks}
        shape = self.sizes.shapes[s.target.tensor]
        left = [d for d in range(len(shape)) if d not in masked]
        name = fresh_name(f"{s.target.tensor}.part", self.tensors)
        self.tensors.add(name)
        self.sizes.shapes[name] = tuple(shape[d] for d in left)
        first = self._part(name, left)
        if not all(isinstance(e, Index) for e in first[-1].target.subscripts):
            return None
        places: dict[int, Expr] = {}
        for d in left:
            e = s.target.subscripts[d]
            places[d] = e if isinstance(e, Index) else Index(self._fresh("uvw"))
        terms = []
        for d, mask, form in masks:
            for other in left:
                e = s.target.subscripts[other]
                form = _replaced(form, self.sizes.linear(e.value if isinstance(e, Pad) else e), linear(places[other]))
            if not set(form.indices) <= {i for e in places.values() for i in free_indices(e)}:
                return None
            places[d] = Index(mask)
            terms.append(Call("eq", (Index(mask), form.expr())))
        target = replace(s.target, subscripts=tuple(places[d] for d in range(len(shape))))
        value = Call("where", (conjunction(terms), Access(name, tuple(places[d] for d in left)), ZERO))
        if not covers_whole(first[-1], self.sizes):
            indices = tuple(Index(f"n{d}") for d in range(len(left)))
            ranges = tuple(Range(i.name, ZERO, shape[d]) for i, d in zip(indices, left, strict=True))
            first = [Statement(ranges, Access(name, indices), "=", ZERO), *first]
        return [*first, Statement(tuple(Range(i) for i in free_indices(target)), target, "+=", value, s.span)]

    def _part(self, name: str, left: Sequence[int]) -> list[Statement]:
        """The reduction without the places that conditions settle, into a tensor of its own."""
        s = self.s
        ranges = []
        for r in s.ranges:
            lo, hi = self.found[r.index]
            ranges.append(r if r.lo is not None or witness(r.index, s.value) else replace(r, lo=as_expr(lo), hi=as_expr(hi)))
        part = replace(s, ranges=tuple(ranges), target=Access(name, tuple(s.target.subscripts[d] for d in left)))
        return [sized(t, self.sizes) if t.target.tensor == name else t for t in gathered(part, self.sizes, self.tensors)]


def _replaced(form: Affine, whole: Affine, rhs: Affine) -> Affine:
    """`form` with a multiple of `whole`, where all its atoms stand in it, replaced by that multiple of `rhs`."""
    coefficients = dict(form.terms)
    own = [(atom, c) for atom, c in whole.terms if free_indices(atom)]
    if not own or any(atom not in coefficients for atom, _ in own):
        return form
    times, odd = divmod(coefficients[own[0][0]], own[0][1])
    if odd or any(coefficients[atom] != times * c for atom, c in own):
        return form
    return form - whole.scale(times) + rhs.scale(times)


def shown(form: Affine) -> Expr:
    """A form as IR, with what stands beside a quotient inside it: (u+r+1)//2 - r --> (u-r+1)//2."""
    quotients = [
        (atom, c) for atom, c in form.terms if isinstance(atom, Call) and atom.op == "floordiv" and isinstance(atom.args[1], Const)
    ]
    if len(quotients) != 1 or quotients[0][1] != 1:
        return form.expr()
    atom = quotients[0][0]
    assert isinstance(atom, Call) and isinstance(atom.args[1], Const)
    rest = form - Affine(0, ((atom, 1),))
    return Call("floordiv", ((linear(atom.args[0]) + rest.scale(int(atom.args[1].value))).expr(), atom.args[1]))


def as_expr_or_int(e: Expr) -> Bound:
    """A bound as affine.py keeps it: a number where it is one."""
    return int(e.value) if isinstance(e, Const) else e


def integral(e: Expr) -> bool:
    """Whether an expression is integer arithmetic on indices, sizes and integer scalars only (a scalar alone may be a float)."""
    if isinstance(e, Call):
        return e.op in _INTEGER and all(integral(a) for a in e.args)
    return isinstance(e, Index | Size) or (isinstance(e, Const) and type(e.value) is int)


def unguarded(value: Expr) -> tuple[list[Expr], Expr]:
    """where(a and b, where(c, x, 0), 0) --> [a, b, c], x."""
    if isinstance(value, Call) and value.op == "where" and isinstance(value.args[2], Const) and value.args[2].value == 0:
        inner, body = unguarded(value.args[1])
        return [*_conjuncts(value.args[0]), *inner], body
    return [], value


def _conjuncts(e: Expr) -> list[Expr]:
    if isinstance(e, Call) and e.op == "and":
        return [*_conjuncts(e.args[0]), *_conjuncts(e.args[1])]
    return [e]


def conjunction(terms: Sequence[Expr]) -> Expr:
    """[a, b, c] --> a and b and c."""
    result = terms[0]
    for term in terms[1:]:
        result = Call("and", (result, term))
    return result


def vanishing(e: Expr) -> list[Access]:
    """The accesses whose zero makes `e` zero, whatever finite values the others have."""
    match e:
        case Access():
            return [e]
        case Call(op="mul", args=(a, b)):
            left, right = vanishing(a), vanishing(b)
            return [*(left if _finite(b) else []), *(right if _finite(a) else [])]
        case Call(op="div", args=(a, Const() | Size())):
            return vanishing(a)
        case Call(op="neg" | "stop_gradient" | "float16" | "bfloat16" | "float32" | "float64", args=(a,)):
            return vanishing(a)
        case Call(op="add" | "sub", args=(a, b)):
            right = vanishing(b)
            return [x for x in vanishing(a) if x in right]
        case Call(op="where", args=(_, a, Const(value=0))):
            return vanishing(a)
    return []


def _finite(e: Expr) -> bool:
    """Whether an expression is finite where the padded reads in it are zero."""
    if isinstance(e, Call):
        padded = any(isinstance(s, Pad) for a in walk(e) if isinstance(a, Access) for s in a.subscripts)
        allowed = (
            e.op in _FINITE
            or e.op in ("where", "float16", "bfloat16", "float32", "float64")
            or (e.op == "div" and isinstance(e.args[1], Const | Size))
        )
        power = e.op == "pow" and isinstance(e.args[1], Const) and e.args[1].value > 0
        return not padded or ((allowed or power) and all(_finite(a) for a in (e.args[1:] if e.op == "where" else e.args)))
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Fills that a whole write makes useless


def _without_fills(body: tuple[Statement | Loop, ...], sizes: Sizes) -> tuple[Statement | Loop, ...]:
    """`T[n0,n1] = 0.0;  for i, u: T[i,u] += ..` --> the second alone, where it writes every element: a sum starts from zero.

    The same where the second is the first to write T in an ordered loop, over all of its steps.
    """
    out = list(body)
    position = 0
    while position < len(out):
        node = out[position]
        following = None
        if isinstance(node, Statement) and is_fill(node):
            following = next((n for n in range(position + 1, len(out)) if touches(out[n], node.target.tensor)), None)
        started = None if following is None or not isinstance(node, Statement) else _started(out[following], node.target.tensor, sizes)
        if following is None or started is None:
            position += 1
            continue
        out[following] = started
        out.pop(position)
    return tuple(out)


def _started(node: Statement | Loop, name: str, sizes: Sizes) -> Statement | Loop | None:
    """`node` as the first one to write `name`; None where it does not write all of it, or reads it before."""
    if isinstance(node, Statement):
        whole = node.target.tensor == name and node.op == "+=" and covers_whole(node, sizes) and all(a.tensor != name for a in reads(node))
        return sized(node, sizes) if whole else None
    first = next((s for s in statements((node,)) if s.target.tensor == name), None)
    if first is None or first.op != "+=" or not any(first is child for child in node.body) or not covers_whole(first, sizes, loop_ranges(node, sizes)):
        return None
    return replace(node, body=tuple(sized(first, sizes) if child is first else child for child in node.body))


def is_fill(s: Statement) -> bool:
    """Whether a statement sets a tensor to zero."""
    return s.op == "=" and isinstance(s.value, Const) and s.value.value == 0 and bool(s.target.subscripts)


def touches(node: Statement | Loop, name: str) -> bool:
    """Whether a node reads, writes or measures a tensor."""
    return any(isinstance(e, Access | Size) and e.tensor == name for top in expressions(node) for e in walk(top))


def covers_whole(s: Statement, sizes: Sizes, outer: Ranges | None = None) -> bool:
    """Whether the text shows that a statement writes every element of its target (over all steps of the loops of `outer`)."""
    names = [e.name for e in s.target.subscripts if isinstance(e, Index)]
    if len({*names}) < len(s.target.subscripts):
        return False
    ranges = symbolic_ranges(s, sizes, outer)
    shape = sizes.shapes[s.target.tensor]
    return all(i in ranges and ranges[i][0] == 0 and linear(as_expr(ranges[i][1])) == linear(e) for i, e in zip(names, shape, strict=True))


def sized(s: Statement, sizes: Sizes) -> Statement:
    """`s` with explicit ranges where only the target's size settles an index: it is the first write now."""
    if s.target.tensor in sizes.declared:
        return s
    shape = dict(zip((e.name for e in s.target.subscripts if isinstance(e, Index)), sizes.shapes[s.target.tensor], strict=False))
    return replace(
        s,
        ranges=tuple(
            r if r.lo is not None or r.index not in shape or witness(r.index, s.value) else replace(r, lo=ZERO, hi=shape[r.index])
            for r in s.ranges
        ),
    )
