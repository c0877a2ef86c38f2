"""A program with ordered loops is divided into parts: the statements between loops, and those of one step of a loop.

    Z[t,i] = ..                      Part            for t in range(5):  a Repeat
    for ordered t: H[t,i] = ..  -->  Repeat(t, Part)     its Part, whose kernels are launched at every step
    y[i] += H[t,i] ..                Part

Each part is a program that is normalised, planned and tiled by itself; the whole state holds the kernels of all of them, once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

from lowering.plan import Plan
from lowering.proofs import proved
from lowering.ragged import constant, masked
from lowering.reducing import identity
from lowering.state import Allocation, Part, Repeat, State, contiguous, leaves, repeats
from lowering.statement import extents, tensor_bytes
from lowering.steps import StepProgram, Surroundings, step_program
from tdsl.affine import Bound, enclosure, linear
from tdsl.dtypes import dtype_of, written
from tdsl.errors import Unsupported
from tdsl.ir import (
    REDUCTION_OF,
    Access,
    Const,
    Expr,
    Index,
    Loop,
    Program,
    Range,
    Statement,
    bounds,
    fresh_name,
    reads,
    statements,
    walk,
)
from tdsl.ops import DTYPES
from tdsl.traced import whole

Stage = Callable[[State], State]


def divide(state: State, normalize: Stage) -> State:
    """The parts of a program with ordered loops, each normalised by `normalize`.

    Raises Unsupported for a loop whose bounds depend on the values of a tensor.
    """
    outside = {*state.program.inputs, *state.program.results}
    looped = {s.target.tensor for node in state.program.body if isinstance(node, Loop) for s in statements((node,))}
    # What steps add to is kept in the dtype that they compute in.
    sums = {t: DTYPES[state.dtypes[t]].compute for t in looped - outside if DTYPES[state.dtypes[t]].kind == "float"}
    state = _typed(replace(state, stored={**state.stored, **sums}))
    parts, _ = _Division(state, normalize).parts(state.program.body, (), frozenset(state.program.inputs))
    return merged(replace(state, parts=tuple(parts)))


def _typed(state: State) -> State:
    """Shapes and dtypes of the versions that came after inference: copies, and sums that are added to an older version."""
    shapes, dtypes = dict(state.shapes), dict(state.dtypes)
    assert state.inferred is not None
    for s in (node for node in state.program.body if isinstance(node, Statement)):
        if s.target.tensor not in shapes and constant(s):
            size = extents(s)
            shapes[s.target.tensor] = tuple(size[e.name] for e in s.target.subscripts if isinstance(e, Index))
            ranks = {t: -1 if t in state.inferred.weak else len(shape) for t, shape in shapes.items()}
            dtypes[s.target.tensor] = written(s.op, dtype_of(s.value, dtypes, ranks), None)
    return replace(state, shapes=shapes, dtypes=dtypes)


class _Division:
    def __init__(self, state: State, normalize: Stage):
        self.state = state
        self.normalize = normalize
        self.nodes = state.program.body
        names = {*state.shapes, *(r.index for node in loops(self.nodes) for r in node.ranges)}
        self.numbers: dict[str, str] = {}
        for node in loops(self.nodes):
            for r in node.ranges:
                if r.index not in self.numbers:
                    self.numbers[r.index] = fresh_name(r.index, {*state.shapes}) if r.index in state.shapes else r.index
                    names.add(self.numbers[r.index])
        self.taken = names
        self.count = 0

    def parts(
        self, body: tuple[Statement | Loop, ...], around: tuple[Range, ...], existing: frozenset[str]
    ) -> tuple[list[Part | Repeat], frozenset[str]]:
        """The parts of a body within the ordered ranges `around`, and the tensors that live over their steps."""
        result: list[Part | Repeat] = []
        memory: frozenset[str] = frozenset()
        run: list[Statement] = []
        for node in (*body, None):
            if isinstance(node, Statement):
                run.append(node)
                continue
            if run:
                found, lives = self._part(tuple(run), around, existing)
                result += found
                memory |= lives
                existing |= frozenset() if around else frozenset(s.target.tensor for s in run)
                run = []
            if node is not None:
                inner, lives = self.parts(node.body, (*around, *node.ranges), existing)
                memory |= lives
                result.append(self._repeat(node, inner, () if around else self._allocations(node, lives - existing)))
                existing |= frozenset() if around else frozenset(s.target.tensor for s in statements((node,)))
        return result, memory

    def _repeat(self, node: Loop, parts: list[Part | Repeat], allocate: tuple[Allocation, ...]) -> Repeat:
        for n, r in reversed(list(enumerate(node.ranges))):
            assert r.lo is not None and r.hi is not None
            first = n == 0
            parts = [Repeat(r.index, _host(r.lo), _host(r.hi), r.order == "reversed", allocate if first else (), tuple(parts))]
        (repeat,) = parts
        assert isinstance(repeat, Repeat)
        return repeat

    def _allocations(self, node: Loop, names: frozenset[str]) -> tuple[Allocation, ...]:
        state = self.state
        found: list[Allocation] = []
        for s in statements((node,)):
            name = s.target.tensor
            if name in names and name not in {a.tensor for a in found}:
                dtype = state.stored.get(name, state.dtypes[name])
                found.append(Allocation(name, state.shapes[name], dtype, identity(REDUCTION_OF.get(s.op, "sum"), state.dtypes[name])))
        return tuple(found)

    def _steps(self, around: tuple[Range, ...]) -> dict[str, tuple[int, int]]:
        """The least and the greatest value of each ordered index, as a half-open range."""
        known: dict[str, tuple[int, int]] = {}
        for r in around:
            assert r.lo is not None and r.hi is not None
            least, most = enclosure(linear(r.lo), known)[0], enclosure(linear(r.hi), known)[1]
            if math.isinf(least) or math.isinf(most):
                what = f"the range of ordered index {r.index} depends on the values of a tensor, which cannot be compiled yet (lowering)"
                mend = f"let {r.index} run over all steps, and mask: where({r.index} < .., .., 0); or run it with backend=\"reference\""
                raise Unsupported(what, span=r.span, help=mend)
            known[r.index] = whole(least), max(whole(least), whole(most))
        return known

    def _part(self, body: tuple[Statement, ...], around: tuple[Range, ...], existing: frozenset[str]) -> tuple[list[Part | Repeat], frozenset[str]]:
        state, steps = self.state, self._steps(around)
        here = {id(s) for s in body}
        others = [s for s in statements(self.nodes) if id(s) not in here]
        needed = {*state.program.results, *(a.tensor for s in others for a in reads(s))}
        needed |= {a.tensor for node in loops(self.nodes) for bound in bounds(node.ranges) for a in walk(bound) if isinstance(a, Access)}
        writes = Counter(s.target.tensor for s in statements(self.nodes))
        groups = []
        for s in body:
            alone = not around and writes[s.target.tensor] == 1 and s.target.tensor not in state.program.inputs
            made_of = masked(s, state.shapes, state.dtypes, steps=steps, limits=state.limits, alone=alone, taken=self.taken)
            groups.append([proved(t, state.shapes, state.values, steps) for t in made_of])
        shapes = dict(state.shapes)
        for s in (s for group in groups for s in group):
            if s.target.tensor not in shapes:
                size = {i: most for i, (_, most) in steps.items()} | {r.index: whole(r.hi.value) for r in s.ranges if isinstance(r.hi, Const)}
                shapes[s.target.tensor] = tuple(size[e.name] for e in s.target.subscripts if isinstance(e, Index))
        written = frozenset(s.target.tensor for s in others)
        surroundings = Surroundings(steps, existing, frozenset(needed), written, self.numbers, shapes)
        made = step_program(f"{state.program.name}_{self.count}", body, groups, surroundings)
        self.count += 1
        shapes |= made.shapes
        first = self._state(made.program, made, replace(state, shapes=shapes))
        if made.back is None:
            return [first], made.memory
        return [first, self._state(made.back, made, first.state)], made.memory

    def _state(self, program: Program, made: StepProgram, state: State) -> Part:
        """A part with the shapes, strides and dtypes of its views."""
        sizes, strides, dtypes, stored = dict(state.shapes), dict(state.strides), dict(state.dtypes), dict(state.stored)
        source = {v.name: v for v in made.views} | {alias: next(v for v in made.views if v.name == name) for alias, name in made.aliases.items()}
        for name, view in source.items():
            if view.tensor not in state.shapes or name in state.shapes:
                continue
            left = [d for d, at in enumerate(view.at) if at is None]
            whole = state.strides.get(view.tensor) or contiguous(state.shapes[view.tensor])
            sizes[name] = tuple(state.shapes[view.tensor][d] for d in left)
            if view.tensor in made.memory:
                strides[name] = tuple(whole[d] for d in left)
            dtypes[name] = state.dtypes[view.tensor]
            if view.tensor in state.stored:
                stored[name] = state.stored[view.tensor]
        for number in made.numbers:
            sizes[number], dtypes[number] = (), "int64"
        assert state.inferred is not None
        inferred = replace(state.inferred, weak=state.inferred.weak | frozenset(made.numbers))
        part = replace(
            state, program=program, shapes=sizes, strides=strides, dtypes=dtypes, stored=stored, inferred=inferred, placed=made.placed, parts=()
        )
        part = replace(part, shares={name: view.tensor for name, view in source.items()})
        views = tuple(v for v in made.views if v.tensor in made.memory and v.name != v.tensor)
        return Part(self.normalize(part), views, made.aliases, made.numbers)


def _host(e: Expr) -> Bound:
    form = linear(e)
    return form.expr() if form.terms else form.const


def loops(body: tuple[Statement | Loop, ...]) -> Iterator[Loop]:
    """Every ordered loop, those inside others too."""
    for node in body:
        if isinstance(node, Loop):
            yield node
            yield from loops(node.body)


def _visited(parts: tuple[Part | Repeat, ...], visit: Callable[[Part], Part]) -> tuple[Part | Repeat, ...]:
    return tuple(replace(p, parts=_visited(p.parts, visit)) if isinstance(p, Repeat) else visit(p) for p in parts)


def on_parts(state: State, stage: Stage) -> State:
    """A stage applied to every part."""
    return replace(state, parts=_visited(state.parts, lambda part: replace(part, state=stage(part.state))))


def trimmed(state: State) -> State:
    """Tiled parts without the views that no kernel of theirs takes."""

    def visit(part: Part) -> Part:
        used = {b.tensor for step in part.state.steps for b in step.tile.buffers}
        aliases = {alias: name for alias, name in part.aliases.items() if alias in used}
        views = tuple(v for v in part.views if v.name in used | set(aliases.values()))
        return replace(part, views=views, aliases=aliases, numbers={n: i for n, i in part.numbers.items() if n in used})

    return replace(state, parts=_visited(state.parts, visit))


def merged(state: State) -> State:
    """A state whose plan and steps are those of its parts, in order."""
    found = [part.state for part in leaves(state.parts)]
    shapes, dtypes, stored = dict(state.shapes), dict(state.dtypes), dict(state.stored)
    for part in found:
        shapes, dtypes, stored = {**part.shapes, **shapes}, {**part.dtypes, **dtypes}, {**part.stored, **stored}
    plan = None
    if all(part.plan is not None for part in found):
        plans = [part.plan for part in found if part.plan is not None]
        memory = {t: n for p in plans for t, n in p.memory.items()}
        outside = {*state.program.inputs, *state.program.results}
        over = {a.tensor: a for r in repeats(state.parts) for a in r.allocate if a.tensor not in outside}
        memory = {**{t: tensor_bytes(a.shape, a.dtype) for t, a in over.items()}, **memory}
        kernels = tuple(k for p in plans for k in p.kernels)
        recomputed = frozenset(t for p in plans for t in p.recomputed if t in state.shapes)
        choices = tuple(c for p in plans for c in p.choices)
        plan = Plan(kernels, memory, state.program, shapes, dtypes, recomputed, choices)
    steps = tuple(step for part in found for step in part.steps)
    return replace(state, plan=plan, steps=steps, shapes=shapes, dtypes=dtypes, stored=stored)
