"""Ordered loops -> the program of one step, which is planned and tiled like any other.

    for ordered t:                                     for t in range(5):
        H.sum[t,b,i] += W[i,j] * H[b,pad(t-1),j]           H.t_minus_1 = H[:, t-1], or zeros;  H.t = H[:, t]
        H[b,t,i] = tanh(X[b,t,i] + H.sum[t,b,i])    -->    H.sum.t[b,i] += W[i,j] * H.t_minus_1[b,j]
                                                           H.t[b,i] = tanh(X.t[b,i] + H.sum.t[b,i])

A dimension whose subscripts are places of the step becomes a view that is taken on the host; what only one step needs
(`H.sum.t`) has no memory over the steps. Where the loop's index is used otherwise, it is an integer parameter. A tensor
that a step reads and then overwrites is written to another one, and copied back at the end of the step.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tdsl.affine import Affine, Bound, is_injective, linear
from tdsl.ir import (
    Access,
    Clamp,
    Const,
    Expr,
    Index,
    Output,
    Pad,
    Param,
    Program,
    Statement,
    fresh_name,
    reads,
    rebuild,
    rebuild_range,
    substitute,
)
from tdsl.meeting import never_meet, same_element
from tdsl.printer import print_expr
from tdsl.ssa import copy, versions
from tdsl.traced import whole

_ADDING = frozenset({"+=", "max=", "min="})  # what a store can do to what stands in memory
_WORDS = {"-": "_minus_", "+": "_plus_", "*": "_times_"}


@dataclass(frozen=True, slots=True)
class View:
    """`tensor` at one step: `at` per dimension is an integer expression of loop indices, or None for one that stays.

    Under Pad, a step outside of the tensor reads zeros and writes nothing; under Clamp it takes the nearest element.
    """

    name: str
    tensor: str
    at: tuple[Expr | None, ...]


@dataclass(frozen=True, slots=True)
class StepProgram:
    """What one step runs. views: the slices that it works on. placed: targets whose memory exists before the step. aliases: further
    names of the memory of a view. numbers: parameters that are loop indices (name -> index). memory: tensors that live over the
    steps. shapes: of versions that the step has of its own. back: the copies at the end of the step."""

    program: Program
    views: tuple[View, ...]
    placed: frozenset[str]
    aliases: Mapping[str, str]
    numbers: Mapping[str, str]
    memory: frozenset[str]
    shapes: Mapping[str, tuple[int, ...]]
    back: Program | None = None


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a step's program must know of the rest. steps: the indices of the loops around it, with all that they can be.

    existing: tensors in memory before the outermost of them. needed: tensors that something else reads. written: those that
    something else writes. numbers: a name for each loop index as a parameter.
    """

    steps: Mapping[str, tuple[int, int]]
    existing: frozenset[str]
    needed: frozenset[str]
    written: frozenset[str]
    numbers: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class _Event:
    """One read or write, in the order of the program. number: of its statement."""

    number: int
    statement: Statement
    access: Access
    write: bool


def step_program(name: str, body: Sequence[Statement], masked: Sequence[Sequence[Statement]], around: Surroundings) -> StepProgram:
    """The program of some statements of one step (or of a part between loops, where `around.steps` is empty).

    body: the statements; masked: for each, what runs in its place (with constant ranges).
    """
    return _Step(name, body, masked, around).run()


class _Step:
    def __init__(self, name: str, body: Sequence[Statement], masked: Sequence[Sequence[Statement]], around: Surroundings):
        self.name = name
        self.body = body
        self.masked = masked
        self.around = around
        self.events: dict[str, list[_Event]] = {}
        for n, s in enumerate(body):
            for access in reads(s):
                self.events.setdefault(access.tensor, []).append(_Event(n, s, access, False))
            self.events.setdefault(s.target.tensor, []).append(_Event(n, s, s.target, True))
        self.taken = {*around.shapes, *around.numbers.values(), *self.events}
        self.views: dict[tuple[str, tuple[Affine | None, ...]], View] = {}
        self.slices = {tensor: self._sliced(events) for tensor, events in self.events.items()}
        self.shapes = dict(around.shapes)

    def run(self) -> StepProgram:
        places: dict[str, list[_Event]] = {}
        for events in self.events.values():
            for e in events:
                places.setdefault(self.view(e.access).name, []).append(e)
        by_name = {v.name: v for v in self.views.values()}
        params: list[str] = []
        outputs: list[str] = []
        copied: list[str] = []
        memory: set[str] = set()
        into: dict[tuple[str, int], str] = {}  # (view, statement) -> the name under which it writes
        for name, events in places.items():
            view = by_name[name]
            kind = self._kind(view, events)
            elsewhere = view.tensor in self.around.needed or self._other_reads(view)
            if kind in ("read", "apart", "state"):
                params.append(name)
            if kind != "fresh":
                memory.add(view.tensor)
            if kind in ("in place", "apart"):
                writes = [e for e in events if e.write]
                for e in writes:
                    into[name, e.number] = name if kind == "in place" and len(writes) == 1 else self._fresh(f"{name}.next")
            if kind == "fresh" and elsewhere:
                outputs.append(name)
                memory.add(view.tensor)
            if kind == "state" and (elsewhere or not self._each_step(view)):
                copied.append(name)
        return self._finish(params, outputs, copied, into, frozenset(memory))

    def _finish(
        self, params: list[str], outputs: list[str], copied: list[str], into: Mapping[tuple[str, int], str], memory: frozenset[str]
    ) -> StepProgram:
        body = [self._rewritten(s, n, into) for n, group in enumerate(self.masked) for s in group]
        for (name, _), alias in into.items():
            self.shapes[alias] = self.shapes[name]
        used = {a.tensor for s in body for a in (*reads(s), s.target)}
        numbers = {self.around.numbers[i]: i for i in self.around.steps if self.around.numbers[i] in used}
        inputs = (*(self._param(p) for p in params), *(Param(n) for n in numbers))
        program, made, parts = versions(Program(self.name, inputs, tuple(Output(o) for o in (*outputs, *copied)), tuple(body)), self.shapes)
        shapes = {new: self.shapes[old] for new, old in {**made, **parts}.items()}
        last = dict(zip((*outputs, *copied), program.results, strict=True))
        # A name that is added to is read as well: it is a parameter, too.
        adding = dict.fromkeys(alias for (_, n), alias in into.items() if self.body[n].op in _ADDING)
        names = dict.fromkeys((*program.results, *into.values()))
        program = replace(program, params=(*inputs, *(self._param(a) for a in adding)), outputs=tuple(Output(o) for o in names))
        back = None
        if copied:
            moves = tuple(copy(last[c], c, len(self.shapes[c]), self.shapes[c]) for c in copied)
            olds = tuple(Param(last[c], self._param(c).dims) for c in copied)
            back = Program(f"{self.name}_back", olds, tuple(Output(c) for c in copied), moves)
        placed = {*into.values(), *copied, *(outputs if self.around.steps else ())}
        aliases = {alias: name for (name, _), alias in into.items() if alias != name}
        return StepProgram(program, tuple(self.views.values()), frozenset(placed), aliases, numbers, memory, shapes, back)

    def _param(self, name: str) -> Param:
        return Param(name, tuple(f"{name}_{d}" for d in range(len(self.shapes[name]))))

    def _fresh(self, name: str) -> str:
        name = fresh_name(name, self.taken)
        self.taken.add(name)
        return name

    # -- views --------------------------------------------------------------------------------------------------------

    def _place(self, e: Expr) -> Affine | None:
        """A subscript that the step settles, as a linear form of the loops' indices."""
        form = linear(e)
        return form if form.terms and all(isinstance(a, Index) and a.name in self.around.steps for a, _ in form.terms) else None

    def _sliced(self, events: Sequence[_Event]) -> frozenset[int]:
        """The dimensions along which every access to a tensor has a place of the step, no two of them ever meeting."""
        found = set()
        for d in range(len(events[0].access.subscripts)):
            subscripts = [e.access.subscripts[d] for e in events]
            forms = [self._place(s) for s in subscripts]
            first = forms[0]
            apart = first is not None and all(f is not None and not (f - first).terms for f in forms)
            if apart and not any(isinstance(s, Clamp) for s in subscripts):
                found.add(d)
        return frozenset(found)

    def view(self, access: Access) -> View:
        """The view that an access reads or writes: its tensor itself where no dimension is settled by the step."""
        tensor = access.tensor
        events = self.events.get(tensor, [])
        written = not events or any(e.write for e in events)
        places = [self._place(s) for s in access.subscripts]
        key = tuple(p if not written or d in self.slices.get(tensor, ()) else None for d, p in enumerate(places))
        found = self.views.get((tensor, key))
        at: list[Expr | None] = []
        for d, (form, s) in enumerate(zip(key, access.subscripts, strict=True)):
            before = None if found is None else found.at[d]
            frame = Clamp if isinstance(s, Clamp) else Pad if isinstance(s, Pad) or isinstance(before, Pad) else None
            at.append(None if form is None else form.expr() if frame is None else frame(form.expr()))
        if found is None:
            name = tensor if not any(key) else self._name(tensor, at)
            shape = self.shapes.get(tensor)
            if shape is not None:
                self.shapes[name] = tuple(n for n, a in zip(shape, at, strict=True) if a is None)
        found = View(name if found is None else found.name, tensor, tuple(at))
        self.views[tensor, key] = found
        return found

    def _name(self, tensor: str, at: Sequence[Expr | None]) -> str:
        text = "_".join(print_expr(a.value if isinstance(a, Pad | Clamp) else a) for a in at if a is not None).replace(" ", "")
        for symbol, word in _WORDS.items():
            text = text.replace(symbol, word)
        return self._fresh(f"{tensor}.{re.sub(r'[^0-9A-Za-z]+', '_', text).strip('_')}")

    # -- what happens to a view ---------------------------------------------------------------------------------------

    def _kind(self, view: View, events: Sequence[_Event]) -> str:
        """read: never written. fresh: it starts from nothing. in place: written and never read. apart: read at elements that are not
        written. state: its older value is read, and it is overwritten."""
        writes, read = [e for e in events if e.write], [e for e in events if not e.write]
        if not writes:
            return "read"
        first = events[0]
        owned = view.tensor not in self.around.existing and not (self.around.steps and view.tensor in self.around.written)
        if first.write and owned and self._each_step(view) and sum(v.tensor == view.tensor for v in self.views.values()) == 1:
            return "fresh"
        if first.write and first.statement.op == "=" and self._covers(first, view):
            return "fresh"
        alike = all(e.statement.op in _ADDING for e in writes)
        separate = all(e.statement.op == "=" and all(self._apart(e, other) for other in writes if other is not e) for e in writes)
        if (alike or separate) and all(self._apart(w, r) or self._own(w, r) for w in writes for r in read):
            return "apart" if read else "in place"
        return "state"

    def _other_reads(self, view: View) -> bool:
        """Whether the tensor is read at another place of the step: by another view of it."""
        return any(not e.write and self.view(e.access).name != view.name for e in self.events[view.tensor])

    def _each_step(self, view: View) -> bool:
        """Whether every step has elements of its own in a view."""
        forms = [linear(a.value if isinstance(a, Pad | Clamp) else a) for a in view.at if a is not None]
        return is_injective(forms, dict(self.around.steps))

    def _covers(self, e: _Event, view: View) -> bool:
        """Whether a statement writes all elements of a view."""
        ranges = {r.index: (r.lo, r.hi) for r in e.statement.ranges}
        rest = [(s, n) for s, n, a in zip(e.access.subscripts, self.around.shapes[view.tensor], view.at, strict=True) if a is None]
        names = [s.name for s, _ in rest if isinstance(s, Index)]
        return len({*names}) == len(rest) and all(isinstance(s, Index) and ranges.get(s.name) == (Const(0), Const(n)) for s, n in rest)

    def _apart(self, a: _Event, b: _Event) -> bool:
        """Whether two accesses to one tensor never meet within a step."""
        own = {i: f"{i}~" for i in a.statement.indices}
        names: dict[str, Expr] = {i: Index(other) for i, other in own.items()}
        ranges: dict[str, tuple[Bound, Bound]] = {**self.around.steps, **_ranges(b.statement)}
        for i, (lo, hi) in _ranges(a.statement).items():
            ranges[own[i]] = _moved(lo, names), _moved(hi, names)
        return never_meet(zip(a.access.subscripts, b.access.subscripts, strict=True), own, ranges)

    def _own(self, w: _Event, r: _Event) -> bool:
        """Whether all that a statement reads of what it writes in a step is, for each of its points, the element that the point writes."""
        if w.number != r.number or w.statement.reduced:
            return False
        return same_element(list(zip(w.access.subscripts, r.access.subscripts, strict=True)), set(w.statement.indices))

    # -- rewriting ----------------------------------------------------------------------------------------------------

    def _rewritten(self, s: Statement, number: int, into: Mapping[tuple[str, int], str]) -> Statement:
        target = self._access(s.target)
        target = replace(target, tensor=into.get((target.tensor, number), target.tensor))
        return replace(s, ranges=tuple(rebuild_range(r, self._expr) for r in s.ranges), target=target, value=self._expr(s.value))

    def _access(self, access: Access) -> Access:
        view = self.view(access)
        left = tuple(self._expr(s) for s, a in zip(access.subscripts, view.at, strict=True) if a is None)
        return replace(access, tensor=view.name, subscripts=left)

    def _expr(self, e: Expr) -> Expr:
        if isinstance(e, Access):
            return self._access(e)
        if isinstance(e, Index) and e.name in self.around.steps:
            return Access(self.around.numbers[e.name])
        return rebuild(e, self._expr)


def _ranges(s: Statement) -> dict[str, tuple[Bound, Bound]]:
    return {r.index: (_bound(r.lo), _bound(r.hi)) for r in s.ranges}


def _bound(e: Expr | None) -> Bound:
    assert e is not None
    return whole(e.value) if isinstance(e, Const) else e


def _moved(bound: Bound, names: Mapping[str, Expr]) -> Bound:
    return bound if isinstance(bound, int) else substitute(bound, names)
