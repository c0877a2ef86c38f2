"""Tile IR -> loop nests: which operations share a loop, what a loop leaves in a local array, what is made again instead.

    x[c] = load; m = max of x; e[c] = exp(x - m); s = sum of e; store Y[c] = e / s
    -->
    for c:  x = X[c]; m = max(m, x)
    for c:  x = X[c]; e[c] = exp(x - m); s += e[c]             x is read again: that costs less than an array
    for c:  Y[c] = e[c] / s                                    e is kept

A fold, a store and an assignment need a loop; every other operation goes where it is needed. Operations over the same axes
share the first loop that comes after all that they wait for. A product of two matrices is an item of its own: its operands are
in memory or in local arrays, and where it goes on from an accumulator it adds to that one's array.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from lowering import tile_ir as ir
from lowering.addresses import axis_step
from lowering.matrices import in_memory, large_product, matrices
from tdsl.errors import Unsupported
from tdsl.ir import Clamp, Expr, Pad, free_indices
from tdsl.ops import DTYPES, OPS

# What may be computed again in a second loop rather than kept, in multiply-adds: two loads and an operation or two.
AGAIN = 4.0
# The same where it would be again for each step of an outer loop: a load of neighbours.
AGAIN_OFTEN = 1.5
# A load that is not of neighbours, or only where some condition holds.
_SCATTERED = 6.0


@dataclass(frozen=True, slots=True)
class Nest:
    """One loop nest. axes: outermost first. body: operations in order. kept: those of its values that go to local arrays."""

    axes: tuple[str, ...]
    body: tuple[ir.Operation, ...]
    kept: frozenset[str]


@dataclass(frozen=True, slots=True)
class Walk:
    """The loop over the tiles of one axis."""

    loop: ir.For
    body: tuple[Item, ...]


@dataclass(frozen=True, slots=True)
class Product:
    """A product of matrices. memory: its operands that are read where they lie, by name. adds: whether the result's array already holds
    what it goes on from; else that is copied there first."""

    dot: ir.Dot
    memory: Mapping[str, ir.Load]
    adds: bool


Item: TypeAlias = Nest | Walk | Product | ir.Operation


@dataclass(frozen=True, slots=True)
class Nests:
    """items: in order; an operation that is no nest makes a number, or fills the array of a carried value.
    arrays: the values that have a local array. same: results that live in the array of another value."""

    items: tuple[Item, ...]
    arrays: tuple[ir.Value, ...]
    same: Mapping[str, str] = field(default_factory=dict)


def nests(kernel: ir.Kernel) -> Nests:
    """The loop nests of one program of a kernel. Raises Unsupported where a tensor is read and written in ways that could overtake each other."""
    return _Builder(kernel).run()


def operands(op: ir.Operation, values: Mapping[str, ir.Value]) -> list[ir.Value]:
    """The values that an operation reads, those inside subscripts too."""
    match op:
        case ir.Elementwise(args=args):
            return [a for a in args if isinstance(a, ir.Value)]
        case ir.Dot(lhs=lhs, rhs=rhs, acc=acc):
            return [lhs, rhs, *([acc] if acc else [])]
        case ir.Fold(src=src) | ir.Mask(src=src) | ir.Assign(src=src):
            return [src]
        case ir.Store(src=src, subscripts=subscripts):
            return [src, *_named(subscripts, values)]
        case ir.Load(subscripts=subscripts):
            return _named(subscripts, values)
        case ir.IndexOf(expr=expr):
            return _named((expr,), values)
    return []


def _named(exprs: tuple[Expr, ...], values: Mapping[str, ir.Value]) -> list[ir.Value]:
    return [values[i] for e in exprs for i in free_indices(e) if i in values]


@dataclass(eq=False)
class _Draft:
    """A nest in the making. own: it only exists to keep values."""

    axes: tuple[str, ...]
    scope: _Scope
    roots: list[ir.Operation] = field(default_factory=list)
    kept: set[str] = field(default_factory=set)
    own: bool = False


@dataclass(eq=False)
class _Step:
    """A loop in the making."""

    loop: ir.For
    inside: _Scope


@dataclass(eq=False)
class _Scope:
    """A loop body in the making. ready: the first item after which a value is there. floor: no operation goes before it."""

    parent: _Scope | None = None
    items: list[_Draft | _Step | Product | ir.Operation] = field(default_factory=list)
    ready: dict[str, int] = field(default_factory=dict)
    floor: int = 0


class _Builder:
    def __init__(self, kernel: ir.Kernel):
        self.kernel = kernel
        everything = list(ir.operations(kernel.body))
        self.order = {id(op): n for n, op in enumerate(everything)}
        self.values = {op.dst.name: op.dst for op in everything if not isinstance(op, ir.For | ir.Store | ir.Assign)}
        self.carried = {op.dst.name for op in everything if isinstance(op, ir.Assign)}
        self.definitions: dict[str, ir.Operation] = {}  # of values that are made where they are needed
        self.scope_of: dict[str, _Scope] = {}
        self.cost: dict[str, float] = {}
        self.arrays: dict[str, ir.Value] = {}
        self.need: dict[str, list[_Draft]] = {}
        self.home: dict[str, _Draft] = {}
        self.exact = self._compared(everything)
        self.loads = {op.dst.name: op for op in everything if isinstance(op, ir.Load)}
        self.forced: set[str] = set()  # operands of products, which need an array
        self.same: dict[str, str] = {}
        self.uses = Counter(v.name for op in everything for v in operands(op, self.values))
        _no_overtaking(everything)

    def run(self) -> Nests:
        top = _Scope()
        self.block(self.kernel.body, top)
        self.settle()
        items = tuple(self.finished(top))
        self.check(items, {})
        return Nests(items, tuple(self.arrays.values()), self.same)

    def _compared(self, everything: list[ir.Operation]) -> set[str]:
        """Values that end in a test for equality: made twice, they could be rounded in two ways."""
        found: set[str] = set()
        for op in reversed(everything):
            if isinstance(op, ir.For | ir.Store | ir.Assign):
                continue
            if (isinstance(op, ir.Elementwise) and op.op in ("eq", "ne")) or op.dst.name in found:
                found |= {v.name for v in operands(op, self.values)}
        return found

    # -- grouping ---------------------------------------------------------------------------------------------------------

    def block(self, body: tuple[ir.Operation, ...], scope: _Scope) -> None:
        for op in body:
            if isinstance(op, ir.For):
                inside = _Scope(scope)
                self.block(op.body, inside)
                scope.items.append(_Step(op, inside))
                scope.floor = len(scope.items)
                for name in _assigned(op.body):
                    scope.ready[name] = scope.floor
            elif isinstance(op, ir.Store):
                self.root(op, op.axes, scope)
            elif isinstance(op, ir.Assign):
                self.assign(op, scope)
            elif isinstance(op, ir.Dot) and matrices(op, self.kernel):
                self.product(op, scope)
            elif isinstance(op, ir.Fold | ir.Dot):
                if isinstance(op, ir.Dot):
                    if large_product(op, self.kernel):
                        raise Unsupported(f"{op.dst.name} is a large product that is none of two matrices: a library's, not a loop (nests)")
                    if op.acc is not None:
                        self.keep(op.acc, scope)
                axes = op.src.axes if isinstance(op, ir.Fold) else self.sort({*op.lhs.axes, *op.rhs.axes})
                scope.ready[op.dst.name] = self.root(op, axes, scope) + 1
                if op.dst.axes:
                    self.arrays[op.dst.name] = op.dst
            elif isinstance(op, ir.Full) and op.dst.name in self.carried:
                self.item(op, scope)
                if op.dst.axes:
                    self.arrays[op.dst.name] = op.dst
            elif not op.dst.axes:
                self.item(op, scope)
            else:
                self.definitions[op.dst.name] = op
                self.scope_of[op.dst.name] = scope
                scope.ready[op.dst.name] = self.earliest(op, scope)
                self.cost[op.dst.name] = self.price(op)

    def sort(self, axes: set[str]) -> tuple[str, ...]:
        return tuple(a.name for a in self.kernel.axes if a.name in axes)

    def earliest(self, op: ir.Operation, scope: _Scope) -> int:
        return max((scope.ready.get(v.name, 0) for v in operands(op, self.values)), default=0)

    def item(self, op: ir.Operation, scope: _Scope) -> int:
        """An operation on numbers: it goes last."""
        for v in operands(op, self.values):
            assert v.name not in self.definitions, "a number made of a tile"
        scope.items.append(op)
        if isinstance(op, ir.Assign | ir.Full | ir.Load | ir.Elementwise | ir.IndexOf | ir.Mask):
            scope.ready[op.dst.name] = len(scope.items)
        return len(scope.items) - 1

    def root(self, op: ir.Operation, axes: tuple[str, ...], scope: _Scope) -> int:
        """An operation that needs a loop; where it went."""
        if not axes:
            return self.item(op, scope)
        first = max(scope.floor, self.earliest(op, scope))
        for n in range(first, len(scope.items)):
            other = scope.items[n]
            if isinstance(other, _Draft) and other.axes == axes:
                return self.join(op, other, n)
        return self.join(op, None, len(scope.items), axes, scope)

    def join(self, op: ir.Operation, draft: _Draft | None, position: int, axes: tuple[str, ...] = (), scope: _Scope | None = None) -> int:
        if draft is None:
            assert scope is not None
            draft = _Draft(axes, scope)
            scope.items.append(draft)
        draft.roots.append(op)
        for v in operands(op, self.values):
            self.need.setdefault(v.name, []).append(draft)
        return position

    def product(self, op: ir.Dot, scope: _Scope) -> None:
        """A product of matrices, after the loops that keep its operands."""
        memory = {
            v.name: self.loads[v.name] for v in (op.lhs, op.rhs) if v.name in self.loads and in_memory(self.loads[v.name], self.kernel)
        }
        for v in (op.lhs, op.rhs, op.acc):
            if v is not None and v.name not in memory:
                self.keep(v, scope)
        adds = op.acc is not None and self.uses[op.acc.name] == (2 if op.acc.name in self.carried else 1)
        if op.acc is not None and adds:
            self.same[op.dst.name] = op.acc.name
        self.arrays[op.dst.name] = op.dst
        scope.items.append(Product(op, memory, adds))
        scope.ready[op.dst.name] = len(scope.items)

    def keep(self, v: ir.Value, scope: _Scope) -> None:
        """Gives a value an array before the next item."""
        if v.name not in self.definitions:  # it has one
            return
        home = self.scope_of[v.name]  # a loop that is being filled is not among its items yet
        draft = _Draft(v.axes, home, own=True)
        home.items.append(draft)
        self.need.setdefault(v.name, []).append(draft)
        self.forced.add(v.name)

    def assign(self, op: ir.Assign, scope: _Scope) -> None:
        """What reads the old value must have come before: only the last loop is joined."""
        if self.same.get(op.src.name) == op.dst.name:  # it is there already
            scope.ready[op.dst.name] = len(scope.items)
            return
        if not op.dst.axes:
            self.item(op, scope)
            return
        last = len(scope.items) - 1
        other = scope.items[last] if scope.items else None
        joins = isinstance(other, _Draft) and other.axes == op.dst.axes and last >= max(scope.floor, self.earliest(op, scope))
        if joins:
            assert isinstance(other, _Draft)
            self.join(op, other, last)
        else:
            self.join(op, None, 0, op.dst.axes, scope)
        scope.ready[op.dst.name] = len(scope.items)

    def price(self, op: ir.Operation) -> float:
        """Multiply-adds to make a value from memory, numbers and folds."""
        inputs = sum(self.cost.get(v.name, 0.0) for v in operands(op, self.values))
        if isinstance(op, ir.Load):
            lane = self.kernel.axes[-1]
            values = {v.name for v in _named(op.subscripts, self.values)}
            near = lane.name not in op.dst.axes or axis_step(op.subscripts, op.buffer.strides, lane.indices, values) in (0, 1)
            moved = any(isinstance(e, Pad | Clamp) for e in op.subscripts)
            return inputs + (1.0 if near and not moved else _SCATTERED)
        if isinstance(op, ir.Elementwise) and op.op not in DTYPES:
            return inputs + OPS[op.op].cost
        return inputs + (0.0 if isinstance(op, ir.Full | ir.Mask) else 0.5)

    # -- what is kept -----------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Users before what they use: each value either is made in every loop that needs it, or is kept by one of them."""
        for name in sorted(self.definitions, key=lambda n: -self.order[id(self.definitions[n])]):
            users = list(dict.fromkeys(self.need.get(name, ())))
            if not users:
                continue
            if self.keeps(name, users):
                home = self.home_of(name, users)
                self.home[name] = home
                home.kept.add(name)
                self.arrays[name] = self.values[name]
                self.need[name] = users = [home]
            for v in operands(self.definitions[name], self.values):
                self.need.setdefault(v.name, []).extend(users)

    def keeps(self, name: str, users: list[_Draft]) -> bool:
        v = self.values[name]
        if name in self.forced:
            return True
        if self.definitions[name].__class__ is ir.Full:
            return False
        often = any(not _fits(v, d) or d.scope is not self.scope_of[name] for d in users)
        if len(users) == 1 and not often:
            return False
        computed = isinstance(self.definitions[name], ir.Elementwise) and self.cost[name] > AGAIN_OFTEN
        return self.cost[name] > (AGAIN_OFTEN if often else AGAIN) or (name in self.exact and computed)

    def home_of(self, name: str, users: list[_Draft]) -> _Draft:
        """The first loop that needs a value, if its axes start with the value's; else one of its own before that."""
        v, scope = self.values[name], self.scope_of[name]
        places = {d: self.place(d, scope) for d in users}
        first = min(places.values())
        for d in users:
            if places[d] == first and d.scope is scope and _fits(v, d):
                return d
        before = scope.items[first - 1] if first else None
        if isinstance(before, _Draft) and before.own and before.axes == v.axes:
            return before
        draft = _Draft(v.axes, scope, own=True)
        scope.items.insert(first, draft)
        return draft

    def place(self, draft: _Draft, scope: _Scope) -> int:
        """The position in `scope` of the item that a nest is, or is inside of."""
        inner: _Draft | _Step = draft
        where = draft.scope
        while where is not scope:
            outer = where.parent
            assert outer is not None
            inner = next(s for s in outer.items if isinstance(s, _Step) and s.inside is where)
            where = outer
        return next(n for n, item in enumerate(scope.items) if item is inner)

    # -- the result -------------------------------------------------------------------------------------------------------

    def finished(self, scope: _Scope) -> Iterator[Item]:
        for item in scope.items:
            if isinstance(item, _Step):
                yield Walk(item.loop, tuple(self.finished(item.inside)))
            elif isinstance(item, _Draft):
                made = [
                    op for name, op in self.definitions.items() if item in self.need.get(name, ()) and self.home.get(name, item) is item
                ]
                body = sorted([*made, *item.roots], key=lambda op: self.order[id(op)])
                if not body:  # an earlier loop keeps what this one was for
                    continue
                yield Nest(item.axes, tuple(body), frozenset(item.kept))
            else:
                yield item

    def check(self, items: tuple[Item, ...], assigned: dict[str, int]) -> None:
        """No value of the old state of a carried one is made after that has changed."""
        for item in items:
            if isinstance(item, Walk):
                self.check(item.body, {})
                continue
            for op in item.body if isinstance(item, Nest) else (item.dot,) if isinstance(item, Product) else (item,):
                for v in operands(op, self.values):
                    if v.name in assigned and self.order[id(op)] < assigned[v.name]:
                        raise Unsupported(f"{v.name} is needed after it has changed (nests)")
                if isinstance(op, ir.Assign):
                    assigned[op.dst.name] = self.order[id(op)]


def _fits(v: ir.Value, draft: _Draft) -> bool:
    """Whether a value is made once per element where a nest makes it: no loop around it that it does not vary along."""
    return draft.axes[: len(v.axes)] == v.axes


def _assigned(body: tuple[ir.Operation, ...]) -> Iterator[str]:
    for op in ir.operations(body):
        if isinstance(op, ir.Assign):
            yield op.dst.name


def _no_overtaking(everything: list[ir.Operation]) -> None:
    loaded = {op.buffer.tensor for op in everything if isinstance(op, ir.Load)}
    stored = [op.buffer.tensor for op in everything if isinstance(op, ir.Store)]
    if loaded & {*stored} or len({*stored}) < len(stored):
        raise Unsupported("a kernel that reads what it also writes, or writes twice, keeps the order of whole-tensor code (nests)")
