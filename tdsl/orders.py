"""In which order training makes the products of many factors: an order that costs least over forward and backward together.

    Y[i,l] += A[i,j] * B[j,k] * C[k,l]

The compiler chooses an order for each statement by itself, the forward's and those of the gradient. Where the forward's makes
`Y.c1[j,l] += B[j,k] * C[k,l]`, a gradient of these two statements has it saved, and one cotangent of it that both operands share
(reverse mode never takes more than twice the operations of the forward), where the gradient of the one statement makes it again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from lowering.normalize import CONTRACTED, cheapest, contraction_order, from_zero, private_sums, unused_range
from lowering.statement import extents
from tdsl.arguments import Layout
from tdsl.errors import Error
from tdsl.expand import expand
from tdsl.extents import Sizes, symbolic_ranges
from tdsl.infer import Inferred, Spec, infer, resolve
from tdsl.ir import Const, Loop, Program, Range, bounds, statements
from tdsl.pairwise import Orders, groups, in_order
from tdsl.residuals import Cut
from tdsl.simplify import drop_dead, factors, merge_same


def training_orders(program: Program, found: Layout, recomputed: frozenset[str], halves: Callable[[Orders], Cut]) -> Orders:
    """The orders of the statements of `program` that training makes pair by pair; () where their own gradient costs no more.

    recomputed: the intermediates that the plan rather makes again than holds in memory, such as those that would dominate it: a
    statement with one of these stays whole. halves: the cut of the gradient for some orders.
    """
    if program.custom or any(isinstance(node, Loop) for node in program.body):
        return ()
    flat = expand(program)
    several = [n for n, s in enumerate(statements(flat.body)) if s.op == "+=" and s.reduced and len(groups(factors(s.value))) > 2]
    if not several:
        return ()
    try:
        orders = _forward(flat, several, found, recomputed)
        return orders if orders and _work(halves(orders), program, found) < _work(halves(()), program, found) else ()
    except Error:  # what cannot be weighed is left as it is; a call says what is wrong
        return ()


def _forward(flat: Program, several: Sequence[int], found: Layout, recomputed: frozenset[str]) -> Orders:
    """The orders that the compiler takes for some statements of the program itself, expanded."""
    inferred = infer(flat, found.specs, found.values)
    resolved = tuple(statements(resolve(flat, inferred).body))
    sizes = Sizes(flat)
    orders = []
    for n, written in enumerate(statements(flat.body)):
        s = resolved[n]
        if n in several and all(_counted(r) for r in s.ranges) and {*symbolic_ranges(written, sizes)} >= {*s.indices}:
            large = math.prod(extents(s).values()) >= CONTRACTED and not private_sums(s, (s,))[0]
            path = cheapest(s, groups(factors(s.value))) if large else None
            if path is not None and not recomputed & (_targets(in_order(flat, ((n, path),))) - _targets(flat)):
                orders.append((n, path))
        sizes.note(written)
    return tuple(orders)


def _targets(program: Program) -> set[str]:
    return {s.target.tensor for s in statements(program.body)}


def _counted(r: Range) -> bool:
    return isinstance(r.lo, Const) and r.lo.value == 0 and isinstance(r.hi, Const)


def _work(parts: Cut, program: Program, found: Layout) -> int:
    """Points of the loop nests that a forward and a backward run, in the orders that the compiler takes for each statement."""
    forward = infer(parts.forward, found.specs, found.values, unseen=frozenset(parts.saved))
    made = {name: Spec(forward.shapes[name], forward.dtypes[name]) for name in parts.forward.results}
    cotangents = parts.backward.inputs[len(program.inputs) : len(program.inputs) + len(program.outputs)]
    specs = {**dict(zip(cotangents, made.values(), strict=False)), **made, **found.specs}
    backward = infer(parts.backward, {name: specs[name] for name in parts.backward.inputs}, found.values)
    return _points(parts.forward, forward) + _points(parts.backward, backward)


def _points(program: Program, inferred: Inferred) -> int:
    body = tuple(
        unused_range(from_zero(s))
        for s in statements(resolve(program, inferred).body)
        if all(isinstance(b, Const) for b in bounds(s.ranges))
    )
    parts = tuple(part for s in body for part in contraction_order(s, body))
    left = drop_dead(merge_same(Program(program.name, program.params, program.outputs, parts)))
    return sum(math.prod(extents(s).values()) for s in statements(left.body))
