"""Sums of deviations from a mean are nothing, and what is made of nothing goes with them.

    T[n] += X[n,c];  M[n] = T[n] / size(X, 1);  D[n] += k[n] * (X[n,c] - M[n]);  G[n,c] += h[n] * (X[n,c] - M[n]);  G[n,c] += D[n]
    -->
    T[n] += X[n,c];  M[n] = T[n] / size(X, 1);  G[n,c] += h[n] * (X[n,c] - M[n])

The same where the deviations are one part of what several statements add up: the rest of it is summed alone.

    E[n,c] += f[n,c];  E[n,c] += k[n] * (X[n,c] - M[n]);  D[n] += E[n,c]      -->      .. D[n] += f[n,c]

In the gradient of a variance that is the cotangent of its mean. A NaN or an infinity of a row is in its deviations, which the
gradient has by themselves; so this is a rule for gradients, and no statement that a user wrote is dropped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace

from tdsl.affine import Affine
from tdsl.extents import Sizes, as_expr, settled, symbolic_ranges, varies
from tdsl.fills import covers_whole, sized
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
    Size,
    Statement,
    expressions,
    free_indices,
    fresh_name,
    reads,
    statements,
    substitute,
    walk,
)
from tdsl.reassociate import renamings
from tdsl.simplify import factors, product


def without_deviations(program: Program, cotangents: Collection[str]) -> Program:
    """`program`, a gradient that `simplify` has been over, without those writes of `cotangents` that add only zeros."""
    means = _Means(program)
    program = replace(program, body=tuple(part for n, node in enumerate(program.body) for part in means.opened(n, node, cotangents)))
    sums = [
        n for n, s in enumerate(program.body) if isinstance(s, Statement) and s.target.tensor in cotangents and means.sums_to_nothing(s)
    ]
    gone = _droppable(program, _nothing(program, sums, cotangents), means.sizes)
    if not gone:
        return program
    started = {s.target.tensor for n, s in enumerate(program.body) if n in gone and isinstance(s, Statement)}
    body = []
    for n, node in enumerate(program.body):
        if n in gone:
            continue
        if isinstance(node, Statement) and node.target.tensor in started:
            node = sized(node, means.sizes)
        body.append(node)
    return replace(program, body=tuple(body))


def _nothing(program: Program, empty: Sequence[int], cotangents: Collection[str]) -> set[int]:
    """The writes of `cotangents` that add only zeros: those given, and the multiples of tensors that only such statements write."""
    found = set(empty)
    writers: dict[str, list[int]] = {}
    for n, node in enumerate(program.body):
        for s in statements((node,)):
            writers.setdefault(s.target.tensor, []).append(n)
    known = -1
    while known < len(found):
        known = len(found)
        zero = {name for name, places in writers.items() if found >= {*places}}
        for n, node in enumerate(program.body):
            if isinstance(node, Statement) and node.op == "+=" and node.target.tensor in cotangents:
                found |= {n} if zero & {f.tensor for f in factors(node.value) if isinstance(f, Access)} else set()
    return found


def _droppable(program: Program, empty: set[int], sizes: Sizes) -> set[int]:
    """As many of some statements that add only zeros as can go: what another one reads or measures, or what an output is, stays."""
    gone = set(empty)
    while True:
        kept = [node for n, node in enumerate(program.body) if n not in gone]
        used = {e.tensor for node in kept for top in expressions(node) for e in walk(top) if isinstance(e, Size)}
        used |= {a.tensor for node in kept for a in reads(node)} | {*program.results}
        first = {}
        for node in reversed(kept):
            first.update({s.target.tensor: s for s in statements((node,))})
        whole = {name for name, s in first.items() if name in sizes.declared or (s in kept and covers_whole(s, sizes))}
        needed = {n for n in gone if (name := _written(program, n)) not in whole and (name in used or name in first)}
        if not needed:
            return gone
        gone -= needed


def _written(program: Program, n: int) -> str:
    node = program.body[n]
    assert isinstance(node, Statement)
    return node.target.tensor


class _Means:
    """What the statements of a program say about means."""

    def __init__(self, program: Program):
        self.sizes = Sizes(program)
        self.writers: dict[str, list[tuple[int, Statement | Loop]]] = {}
        for n, node in enumerate(program.body):
            self.sizes.note(node)
            for name in dict.fromkeys(s.target.tensor for s in statements((node,))):
                self.writers.setdefault(name, []).append((n, node))
        written = Counter(s.target.tensor for s in statements(program.body))
        self.changing = {name for name, n in written.items() if n > (name not in program.inputs)}
        self.single = {
            s.target.tensor: s
            for s in program.body
            if isinstance(s, Statement) and s.target.tensor not in self.changing and s.op in ("=", "+=")
        }
        self._defined: dict[str, bool] = {}

    def _definition(self, name: str) -> Statement | None:
        """The one statement that gives all of a tensor."""
        s = self.single.get(name)
        if s is not None and name not in self._defined:
            self._defined[name] = covers_whole(s, self.sizes) and self._steady(s.value)
        return s if self._defined.get(name) else None

    def _steady(self, e: Expr) -> bool:
        """Whether what an expression reads is the same throughout the program."""
        return not any(isinstance(a, Access) and a.tensor in self.changing for a in walk(e))

    def opened(self, position: int, node: Statement | Loop, cotangents: Collection[str]) -> list[Statement | Loop]:
        """A sum over what several statements before it add up as a sum for each of these, without those of deviations; the
        statement as it is where there are none."""
        if not isinstance(node, Statement) or node.op != "+=" or not node.reduced or node.target.tensor not in cotangents:
            return [node]
        terms = factors(node.value)
        for n, term in enumerate(terms):
            values = self._parts(term, position) if isinstance(term, Access) else []
            sums = [replace(node, value=product([*terms[:n], value, *terms[n + 1 :]])) for value in values]
            left = [s for s in sums if not self.sums_to_nothing(s)]
            if 0 < len(left) < len(sums):
                ranges = symbolic_ranges(node, self.sizes)
                return [settled(s, ranges, self.sizes) for s in left]
        return [node]

    def _parts(self, access: Access, position: int) -> list[Expr]:
        """What several elementwise statements before a position add up to an element."""
        writers = self.writers.get(access.tensor, [])
        values = []
        for n, s in writers if len(writers) > 1 else []:
            if not isinstance(s, Statement) or n > position or s.op != "+=" or s.reduced:
                return []
            if not covers_whole(s, self.sizes) or not self._steady(s.value) or any(isinstance(e, Pad | Clamp) for e in access.subscripts):
                return []
            values.append(_element(s, access))
        return values

    def sums_to_nothing(self, s: Statement) -> bool:
        """Whether a statement is a sum of deviations from the mean of what it sums over, times what does not vary there."""
        if s.op != "+=" or not s.reduced:
            return False
        terms = factors(s.value)
        for n, term in enumerate(terms):
            along = self._deviation(term, s)
            if along and not along & {i for f in (*terms[:n], *terms[n + 1 :]) for i in free_indices(f)}:
                return True
        return False

    def _deviation(self, e: Expr, s: Statement) -> frozenset[str]:
        """The reduced indices of `s` along which `e` sums to nothing; none where it is no deviation."""
        while isinstance(e, Access) and (inner := self._inside(e)) is not None:
            e = inner
        match e:
            case Call(op="sub", args=(a, b)) if self._steady(e):
                return self._around_mean(a, b, s) or self._around_mean(b, a, s)
            case Call(op="add", args=(Call(op="neg", args=(a,)), b)) if self._steady(e):
                return self._around_mean(a, b, s) or self._around_mean(b, a, s)
        return frozenset()

    def _inside(self, access: Access) -> Expr | None:
        """The expression that an element of an elementwise tensor is."""
        definition = self._definition(access.tensor)
        if definition is None or definition.reduced or any(isinstance(e, Pad | Clamp) for e in access.subscripts):
            return None
        return _element(definition, access)

    def _around_mean(self, term: Expr, mean: Expr, s: Statement) -> frozenset[str]:
        """The indices over whose range, the one that they have in `s`, `mean` is the mean of `term`."""
        scale = factors(mean)
        while True:
            sums = [f for f in scale if isinstance(f, Access)]
            if len(sums) != 1:
                return frozenset()
            inner = self._inside(sums[0])
            if inner is None:
                break
            scale = [g for f in scale for g in (factors(inner) if f is sums[0] else [f])]
        definition = self._definition(sums[0].tensor)
        if definition is None or any(isinstance(e, Pad | Clamp) for e in sums[0].subscripts):
            return frozenset()
        to: dict[str, Expr] = {
            i.name: e for i, e in zip(definition.target.subscripts, sums[0].subscripts, strict=True) if isinstance(i, Index)
        }
        fixed = {i for e in to.values() for i in free_indices(e)}
        own: dict[str, str] = {}
        for i in definition.reduced:
            own[i] = fresh_name(i, {*fixed, *s.indices, *own.values()})
            to[i] = Index(own[i])
        pool = [substitute(f, to) for f in factors(definition.value)] + [f for f in scale if f is not sums[0]]
        counts = [f.args[1] for f in pool if isinstance(f, Call) and _is_count(f)]
        summed = [f for f in pool if not _is_count(f) and not (isinstance(f, Const) and f.value == 1)]
        wanted = factors(term)
        for found in renamings(summed, wanted, {i: i for i in fixed}) if len(summed) == len(wanted) else ():
            along = {i: found[name] for i, name in own.items() if name in found}
            if len(along) == len(own) and {*along.values()} <= {*s.reduced} and self._same_range(definition, s, along, counts):
                return frozenset(along.values())
        return frozenset()

    def _same_range(self, definition: Statement, s: Statement, along: dict[str, str], counts: Sequence[Expr]) -> bool:
        """Whether some indices have one range in both statements, and the product of `counts` is how many elements it has."""
        before, after = symbolic_ranges(definition, self.sizes), symbolic_ranges(s, self.sizes)
        extents = []
        for i, j in along.items():
            if i not in before or j not in after:
                return False
            (lo, hi), (low, high) = (tuple(map(as_expr, bounds)) for bounds in (before[i], after[j]))
            if varies(lo) or varies(hi) or (lo, hi) != (low, high):
                return False
            extents.append((self.sizes.linear(hi) - self.sizes.linear(lo)).expr())
        return self._product(extents) == self._product(counts)

    def _product(self, sizes: Sequence[Expr]) -> Affine:
        total: Expr = Const(1)
        for size in sizes:
            total = Call("mul", (total, size))
        return self.sizes.linear(total)


def _element(s: Statement, access: Access) -> Expr:
    """What an elementwise statement says of the element of its target that an access reads."""
    return substitute(s.value, {i.name: e for i, e in zip(s.target.subscripts, access.subscripts, strict=True) if isinstance(i, Index)})


def _is_count(e: Expr) -> bool:
    """Whether a factor is 1/n with an n that no index and no element of a tensor is in."""
    match e:
        case Call(op="div", args=(Const(value=1), n)):
            return not free_indices(n) and not any(isinstance(a, Access) for a in walk(n))
    return False
