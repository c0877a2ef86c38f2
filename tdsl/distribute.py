"""What an ordered loop need not do step by step leaves it: one big contraction costs less than many small ones.

    for reversed t:                                               for reversed t, b, i, j:  H.grad[b,pad(t-1),j] += ..
        H.grad[b,pad(t-1),j] += W[i,j] * Z.grad[t,b,i]       -->
        W.grad[i,j] += Z.grad[t,b,i] * H[b,pad(t-1),j]            for t, b, i, j:  W.grad[i,j] += Z.grad[t,b,i] * H[b,pad(t-1),j]

A statement goes before the loop if no step writes what it reads, and after it if no step reads what it writes, the values
that it reads being there when the loop is over. (Loop distribution: Allen and Kennedy, "Automatic translation of FORTRAN
programs to vector form", 1987.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tdsl.extents import Sizes, loop_ranges, settled, symbolic_ranges
from tdsl.ir import Loop, Program, Statement, reads, statements
from tdsl.recurrence import Recurrence


def distribute(program: Program) -> Program:
    """`program` (flat, one name per version) with ordered loops that hold only what depends on the order of their steps."""
    if not any(isinstance(node, Loop) for node in program.body):
        return program
    sizes = Sizes(program)
    for node in program.body:
        sizes.note(node)
    body: list[Statement | Loop] = []
    for n, node in enumerate(program.body):
        body += _split(node, sizes, tuple(statements(program.body[:n]))) if isinstance(node, Loop) else [node]
    return replace(program, body=tuple(body))


def _split(loop: Loop, sizes: Sizes, earlier: Sequence[Statement]) -> list[Statement | Loop]:
    """What goes before the loop, the rest of it, and what goes after it."""
    before: list[Statement | Loop] = []
    after: list[Statement | Loop] = []
    known = {s.target.tensor for s in earlier}
    moved = True
    while moved and loop.body:
        moved = False
        recurrence = Recurrence(loop, sizes, earlier)
        for s in loop.body:
            if not isinstance(s, Statement):
                continue
            alone = _alone(s, loop, sizes)
            if alone is None:
                continue
            others = tuple(t for t in statements((loop,)) if t is not s)
            if _goes_before(s, others, recurrence, known):
                before.append(alone)
            elif _goes_after(s, others, recurrence):
                after.insert(0, alone)
            else:
                continue
            loop = replace(loop, body=tuple(child for child in loop.body if child is not s))
            moved = True
            break
    return [*before, *([loop] if loop.body else []), *after]


def _goes_before(s: Statement, others: Sequence[Statement], recurrence: Recurrence, earlier: set[str]) -> bool:
    """Whether nothing that a step does matters to `s`, and every reader in the loop comes after it."""
    name = s.target.tensor
    written = {t.target.tensor for t in others}
    if name in earlier or name in written or not recurrence.once(s) or any(a.tensor in written or a.tensor == name for a in reads(s)):
        return False
    return all(recurrence.keeps(a, t) for t in others for a in reads(t) if a.tensor == name)


def _goes_after(s: Statement, others: Sequence[Statement], recurrence: Recurrence) -> bool:
    """Whether nothing in the loop needs what `s` does, and what it reads is still there after the loop."""
    name = s.target.tensor
    if any(t.target.tensor == name or any(a.tensor == name for a in reads(t)) for t in others) or any(a.tensor == name for a in reads(s)):
        return False
    return (s.op != "=" or recurrence.once(s)) and all(recurrence.keeps(a, s) for a in reads(s))


def _alone(s: Statement, loop: Loop, sizes: Sizes) -> Statement | None:
    """`s` with the loop's indices as ranges of its own, settled as in the loop; None where their ranges are not known."""
    around = loop_ranges(loop, sizes)
    if any(r.index not in around for r in loop.ranges):
        return None
    inside = symbolic_ranges(s, sizes, around)
    ranges = tuple(replace(r, order="") for r in loop.ranges)
    new = replace(s, ranges=(*ranges, *s.ranges))
    if any(i not in inside for i in new.indices):
        return None
    unsized = replace(new, target=replace(new.target, tensor=""))  # the target's size may come from this very statement
    return replace(new, ranges=settled(unsized, inside, sizes).ranges)
