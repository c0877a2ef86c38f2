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
from dataclasses import replace

from tdsl.affine import Affine, Ranges, is_injective, linear
from tdsl.conditions import as_expr_or_int, conjunction, integral, shown, unguarded, vanishing
from tdsl.expand import witness
from tdsl.extents import Sizes, as_expr, loop_ranges, symbolic_ranges
from tdsl.fills import covers_whole, sized, without_fills
from tdsl.inversion import Inversion, Step, replaced
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
    free_indices,
    fresh_name,
    reads,
    rebuild,
    statements,
    walk,
)

_COMPARISONS = frozenset({"eq", "ne", "lt", "le", "gt", "ge"})
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
    return replace(program, body=without_fills(tuple(body), sizes))


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


class _Change(Inversion):
    """The change of variables of one statement."""

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

    def _guards(self) -> tuple[list[Expr], Expr]:
        """The conditions of the value, without the equations that were solved for a summed index; and the value under them."""
        terms, value = unguarded(self.s.value)
        return [term for term in terms if not self._solved_guard(term)], value

    def _simplified(self, condition: Expr) -> Expr | None:
        """A condition in the new variables; None where it always holds."""
        if not (isinstance(condition, Call) and condition.op in _COMPARISONS and all(integral(a) for a in condition.args)):
            return condition
        a, b = (self._tidy(linear(e)) for e in condition.args)
        margin = {"ge": a - b, "gt": (a - b).shift(-1), "le": b - a, "lt": (b - a).shift(-1)}.get(condition.op)
        holds = self._nonnegative(margin) if margin is not None else condition.op == "eq" and a == b
        return None if holds else condition

    # -- the new statement --------------------------------------------------------------------------------------------

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
        as_before = not isinstance(s, Pad) and all(self._stays(step) for step in moved)
        return new if inside or as_before else Pad(new)

    def _stays(self, step: Step) -> bool:
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

    def _in_range(self, step: Step, value: Expr) -> Iterator[Expr]:
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
                form = replaced(form, self.sizes.linear(e.value if isinstance(e, Pad) else e), linear(places[other]))
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
