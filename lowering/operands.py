"""Computed operands of matrix products that are made once, stored, and then multiplied as they are.

    X.grad[n,i] += G[n,o] * f(Z[n,o]) * W[o,i];  W.grad[o,i] += X[n,i] * G[n,o] * f(Z[n,o]);  b.grad[o] += G[n,o] * f(Z[n,o])
    -->  T[n,o] = G[n,o] * f(Z[n,o]);  X.grad[n,i] += T[n,o] * W[o,i];  W.grad[o,i] += X[n,i] * T[n,o];  b.grad[o] += T[n,o]

A product makes such an operand again for every tile of its other side, between the instructions of the tensor cores, and loads all that
it is made of as often.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from lowering.contraction import contraction
from lowering.control import RECOMPUTE, Control
from lowering.normalize import cost
from lowering.recompute import Choice
from lowering.state import State
from lowering.statement import extents, plain, tensor_bytes
from lowering.weighing import Work, apart
from tdsl.ir import Access, Expr, Index, Program, Statement, free_indices, fresh_name, statements, substitute, walk
from tdsl.reassociate import renamings
from tdsl.simplify import factors, product
from tdsl.traced import estimates

# What storing one must win, as a share of the time of the kernels that it changes: it takes memory.
WIN = 0.97


def stored_operands(
    program: Program, finished: Callable[[Program], State], seconds: Callable[[State], Mapping[Work, float]], control: Control | None = None
) -> State:
    """The finished `program`, with the computed operands stored for which that is predicted to be faster. Never one that is larger than all
    inputs and outputs together, unless a user wants it. finished: what the rest of a stage makes of a program. seconds: what each kernel is
    predicted to take. control: what a user fixed, by names such as `X.grad.operand`."""
    control = control or Control()
    best = finished(program)
    known: Mapping[Work, float] | None = None  # what the best takes, once something is compared with it
    choices = []
    for target, terms, long in _computed(program, best):
        changed, name = _stored(program, terms, target)
        pinned = control.pinned.get(name)
        if pinned == RECOMPUTE or not (long or pinned):
            continue
        other = finished(changed)
        outside = sum(tensor_bytes(other.shapes[t], other.dtypes[t]) for t in (*program.inputs, *program.results))
        if tensor_bytes(other.shapes[name], other.dtypes[name]) > outside and not pinned:
            continue
        known = seconds(best) if known is None else known
        found = seconds(other)
        stored, made_again = apart(found, known)
        store = bool(pinned) or stored < WIN * made_again
        reason = "pinned" if pinned else "the faster" if store == (stored < made_again) else "not much slower, and not in memory"
        choices.append(Choice(name, "make once" if store else "recompute", (("making it again", made_again), ("through memory", stored)), reason))
        if store:
            best, program, known = other, changed, found
    return replace(best, choices=tuple(choices))


def _computed(program: Program, state: State) -> Iterator[tuple[str, list[Expr], bool]]:
    """What products of matrices compute as an operand: the target of such a product, the operand's factors, and whether the product takes
    longer than another launch."""
    body = list(statements(program.body))
    counts = Counter(s.target.tensor for s in body)
    seen: list[list[Expr]] = []
    for s in body:
        c = contraction(s)
        if c is None or state.dtypes[s.target.tensor] == "float64":
            continue
        size = extents(s)
        rate = state.target.flops["float16"] * state.target.sustained_flops
        with estimates():
            long = 2 * math.prod(size.values()) / rate >= state.target.launch
        for side in (c.lhs, c.rhs):
            terms = list(side)
            value = product(terms)
            along = {*free_indices(value)}
            accesses = [a for a in walk(value) if isinstance(a, Access)]
            full = [a for a in accesses if {*free_indices(a)} == along]
            steady = all(plain(a) and counts[a.tensor] <= (a.tensor not in program.inputs) for a in accesses)
            if isinstance(value, Access) or cost(value) < 1 or not full or not steady or not {*free_indices(value)} <= {*size}:
                continue
            if not any(len(terms) == len(other) and renamings(terms, other, {}) for other in seen):
                seen.append(terms)
                yield s.target.tensor, terms, long


def _stored(program: Program, terms: list[Expr], of: str) -> tuple[Program, str]:
    """`program` with a product of some factors, an operand of `of`, as a tensor in place of them wherever they stand; and its name."""
    name = fresh_name(f"{of}.operand", {t.target.tensor for t in statements(program.body)} | {*program.inputs})
    body: list[Statement] = []
    made = False
    indices = free_indices(product(terms))
    size: dict[str, int] = {}
    for s in statements(program.body):
        found = _without(s, terms)
        if found is not None and not made:
            made = True
            to, _ = found
            back = {new: old for old, new in to.items()}
            size = {back[i]: n for i, n in extents(s).items() if i in back}
            ranges = tuple(replace(r, index=back[r.index]) for r in s.ranges if r.index in back)
            body.append(Statement(ranges, Access(name, tuple(Index(i) for i in indices)), "=", product(terms), s.span))
        if found is not None:
            to, rest = found
            own = extents(s)
            if all(own[to[i]] == n for i, n in size.items()):
                s = replace(s, value=product([Access(name, tuple(Index(to[i]) for i in indices)), *rest]))
        body.append(s)
    return replace(program, body=tuple(body)), name


def _without(s: Statement, terms: list[Expr]) -> tuple[dict[str, str], list[Expr]] | None:
    """The names under which a statement has some factors, all of which vary along its own indices, and its other factors."""
    own = factors(s.value)
    for to in renamings(terms, own, {}):
        rest = list(own)
        for t in terms:
            rest.remove(substitute(t, {i: Index(j) for i, j in to.items()}))
        if {*to.values()} <= {*s.indices}:
            return to, rest
    return None
