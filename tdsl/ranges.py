"""The ranges of the loop indices of one statement, or of one ordered block, and the sizes of what it writes first.

    X[10], W[3]:   for x, r:  Y[x] += X[x+r] * W[r]   -->   r in 0:3 (plain), x in 0:8 (affine), Y[8] (largest subscript)

The order of the rules: an explicit range; else plain subscripts, which must agree; else affine subscripts, as soon as all
other indices in them have ranges; else the size that a signature gives to a name like the index's. Nothing else is guessed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from tdsl.affine import Affine, Bound, Extent, Known, Ranges, enclosure, is_exact, linear, solve
from tdsl.errors import BoundsError, Error, IndexError_, NameError_, RangeError, RankMismatch, SizeMismatch, counted
from tdsl.ir import Access, Clamp, Expr, Index, Loop, Pad, Range, Reduce, Softmax, Span, Statement, children, free_indices, substitute
from tdsl.printer import print_expr
from tdsl.traced import whole


@dataclass(slots=True, eq=False)
class Loops:
    """One loop index: its name, its key (unique in the node), and its range [lo, hi) once it is settled."""

    name: str
    key: str
    span: Span | None
    explicit: bool = False
    bounds: tuple[Bound, Bound] | None = None
    why: Use | None = None  # the plain use that settled it

    @property
    def empty(self) -> bool:
        """Whether it certainly never runs."""
        if self.bounds is None:
            return False
        lo, hi = self.bounds
        return isinstance(lo, int) and isinstance(hi, int) and lo >= hi


@dataclass(frozen=True, slots=True)
class Scope:
    """The loops around a place; `keys` renames the indices whose key is not their name."""

    loops: Mapping[str, Loops] = field(default_factory=dict)
    keys: Mapping[str, Expr] = field(default_factory=dict)

    def local(self, expr: Expr) -> Expr:
        """`expr` with keys in place of names."""
        return substitute(expr, self.keys) if self.keys else expr

    def inside(self, loop: Loops) -> Scope:
        """The scope inside one more loop."""
        keys = self.keys
        if loop.key != loop.name or loop.name in keys:
            keys = {**keys, loop.name: Index(loop.key)}
        return Scope({**self.loops, loop.name: loop}, keys)


@dataclass(frozen=True, slots=True, eq=False)
class Use:
    """A tensor's element at one place: read, or written. `access` has keys for index names; `source` is as it was written."""

    statement: int
    source: Access
    access: Access
    scope: Scope
    write: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Placed:
    """A statement with its number, the loops around it (`outer`: those of ordered blocks) and its target."""

    number: int
    statement: Statement
    outer: Scope
    scope: Scope
    target: Use


class Sizes:
    """The sizes that are known: of inputs and of what was written, and what the signature declares of outputs."""

    def __init__(
        self, shapes: dict[str, tuple[int, ...]], declared: Mapping[str, tuple[int | None, ...]], known: Known, names: Mapping[str, int]
    ):
        self.shapes = shapes
        self.declared = declared
        self.known = known
        self.names = names  # the sizes that the signature names

    def of(self, tensor: str, dim: int) -> int | None:
        """The size of one dimension, if it is known yet."""
        shape: tuple[int | None, ...] | None = self.shapes.get(tensor) or self.declared.get(tensor)
        return None if shape is None or dim >= len(shape) else shape[dim]


class Node:
    """One statement, or one ordered block, on its way to ranges and sizes. `settle` does the work; the rest is to be read after it."""

    def __init__(self, node: Statement | Loop, number: int, sizes: Sizes):
        self.sizes = sizes
        self.loops: list[Loops] = []
        self.uses: list[Use] = []
        self.statements: list[Placed] = []
        self.reductions: list[tuple[Reduce, tuple[Loops, ...], Scope]] = []
        self.integers: list[tuple[Expr, Span | None]] = []  # expressions that must be integers
        self.sized_here: dict[str, Use] = {}
        self.ranges: Ranges = {}
        self._keys: set[str] = set()
        self._collect(node, Scope(), Scope(), number)

    # -- collecting ---------------------------------------------------------------------------------------------------

    def _collect(self, node: Statement | Loop, scope: Scope, outer: Scope, number: int) -> int:
        scope, _ = self._enter(node.ranges, scope, number)
        if isinstance(node, Loop):
            for child in node.body:
                number = self._collect(child, scope, scope, number)
            return number
        for s in node.target.subscripts:
            self._subscript(s, node.target.span, scope, number)
        local = scope.local(node.target)
        assert isinstance(local, Access)
        target = Use(number, node.target, local, scope, write=True)
        self.statements.append(Placed(number, node, outer, scope, target))
        self._reads(node.value, scope, number)
        self.uses.append(target)
        return number + 1

    def _enter(self, ranges: tuple[Range, ...], scope: Scope, number: int) -> tuple[Scope, tuple[Loops, ...]]:
        new = []
        for r in ranges:
            for bound in (r.lo, r.hi):
                if bound is not None:
                    self._subscript(bound, r.span, scope, number)
            key = r.index
            while key in self._keys:
                key += "'"
            self._keys.add(key)
            loop = Loops(r.index, key, r.span)
            if r.lo is not None or r.hi is not None:
                loop.explicit = True
                loop.bounds = (self._bound(r.lo, scope), self._bound(r.hi, scope))
                if loop.empty:
                    loop.bounds = (loop.bounds[0], loop.bounds[0])
            self.loops.append(loop)
            new.append(loop)
            scope = scope.inside(loop)
        return scope, tuple(new)

    def _bound(self, bound: Expr | None, scope: Scope) -> Bound:
        form = Affine(0) if bound is None else linear(scope.local(bound), self.sizes.known)
        return form.expr() if form.terms else form.const

    def _subscript(self, expr: Expr, span: Span | None, scope: Scope, number: int) -> None:
        if not isinstance(expr, Index):
            self.integers.append((expr, getattr(expr, "span", None) or span))
        self._reads(expr, scope, number)

    def _reads(self, expr: Expr, scope: Scope, number: int) -> None:
        match expr:
            case Access():
                local = scope.local(expr)
                assert isinstance(local, Access)
                self.uses.append(Use(number, expr, local, scope))
                for s in expr.subscripts:
                    self._subscript(s, expr.span, scope, number)
            case Index(name=name):
                if name not in scope.loops:
                    raise IndexError_(
                        f"index {name} is not in scope", span=expr.span, help=f"write it in the `for` line: `for {name} in lo:hi`"
                    )
            case Reduce():
                place = len(self.reductions)
                self.reductions.append((expr, (), scope))
                inner, new = self._enter(expr.ranges, scope, number)
                self.reductions[place] = (expr, new, scope)
                self._reads(expr.body, inner, number)
                if expr.init is not None:
                    self._reads(expr.init, scope, number)
            case _:
                if isinstance(expr, Softmax):
                    for name in expr.over:
                        self._reads(Index(name, expr.span), scope, number)
                for child in children(expr):
                    self._reads(child, scope, number)

    # -- settling -----------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Gives every index its range and every target its size. Raises RangeError, SizeMismatch, RankMismatch, NameError_."""
        written = {p.statement.target.tensor for p in self.statements}
        for use in self.uses:
            if use.access.tensor not in self.sizes.shapes and use.access.tensor not in written:
                raise NameError_(
                    f"{use.access.tensor} is read, but nothing defines it",
                    span=use.source.span,
                    help="add it to the parameters, or write it first",
                )
        for name in written - set(self.sizes.shapes):
            shape = self.sizes.declared.get(name)
            if shape is not None and None not in shape:
                self.sizes.shapes[name] = shape  # type: ignore[assignment]
        self._check_ranks()
        firsts = {p.statement.target.tensor: p for p in reversed(self.statements)}  # what is written first has the size
        while (
            self._plain()
            or self._size_targets(tuple(firsts.values()))
            or self._size_targets(self.statements)
            or self._affine()
            or self._by_name()
        ):
            pass
        for loop in self.loops:
            if loop.bounds is None:
                raise self._unsettled(loop)
        for placed in self.statements:
            if placed.statement.target.tensor not in self.sizes.shapes:
                self._size(placed.target, final=True)
        self._check_ranks()
        self._refresh()
        self._agree()

    def _refresh(self) -> None:
        self.ranges = {loop.key: loop.bounds for loop in self.loops if loop.bounds is not None}

    def _check_ranks(self) -> None:
        ranks: dict[str, int] = {}
        for use in self.uses:
            name, rank = use.access.tensor, len(use.access.subscripts)
            shape = self.sizes.shapes.get(name) if name in self.sizes.shapes else self.sizes.declared.get(name)
            expected = len(shape) if shape is not None else ranks.setdefault(name, rank)
            if rank != expected:
                raise RankMismatch(
                    f"{name} has {counted(expected, 'dimension')}, but {counted(rank, 'subscript')} here",
                    span=use.source.span,
                    help=f"every use of {name} takes the same number of subscripts",
                )

    def _plain(self) -> bool:
        """A plain subscript i at dimension d of A means size(A, d)."""
        progress = False
        for use, dim, loop in self._plain_uses():
            size = self.sizes.of(use.access.tensor, dim)
            if loop.bounds is None and size is not None:
                loop.bounds, loop.why = (0, size), use
                progress = True
        return progress

    def _plain_uses(self) -> Iterator[tuple[Use, int, Loops]]:
        for use in self.uses:
            for dim, s in enumerate(use.source.subscripts):
                if isinstance(s, Index):
                    yield use, dim, use.scope.loops[s.name]

    def _affine(self) -> bool:
        """The largest ranges that keep all affine subscripts inside, for the indices that have no unsettled companion."""
        self._refresh()
        found: dict[str, tuple[int, int]] = {}
        for form, (lo, hi) in self._bounding_uses():
            for name in form.linear_indices:
                if name in self.ranges or any(i != name and i not in self.ranges for i in form.indices):
                    continue
                limit = solve(form, name, lo, hi, self.ranges, self.sizes.known)
                if limit is not None:
                    a, b = found.get(name, limit)
                    found[name] = max(a, limit[0]), min(b, limit[1])
        for loop in self.loops:
            if loop.bounds is None and loop.key in found:
                first, last = found[loop.key]
                loop.bounds = (first, max(first, last))
        return bool(found)

    def _bounding_uses(self) -> Iterator[tuple[Affine, tuple[int, int]]]:
        for use in self.uses:
            for dim, s in enumerate(use.access.subscripts):
                size = None if isinstance(s, Index | Clamp) else self.sizes.of(use.access.tensor, dim)
                if size is None:
                    continue
                lo, hi = 0, size
                if isinstance(s, Pad):
                    if s.lo is None and s.hi is None:
                        continue
                    low, high = linear(s.lo or s.hi, self.sizes.known), linear(s.hi or s.lo, self.sizes.known)  # type: ignore[arg-type]
                    if low.terms or high.terms:
                        continue
                    lo, hi = -low.const, size + high.const
                yield linear(s, self.sizes.known), (lo, hi)

    def _by_name(self) -> bool:
        """An index that nothing else settles takes the size of its name in the signature."""
        progress = False
        for loop in self.loops:
            if loop.bounds is None and loop.name in self.sizes.names:
                loop.bounds = (0, self.sizes.names[loop.name])
                progress = True
        return progress

    # -- sizes --------------------------------------------------------------------------------------------------------

    def _size_targets(self, among: Sequence[Placed]) -> bool:
        self._refresh()
        progress = False
        for placed in among:
            if placed.statement.target.tensor not in self.sizes.shapes:
                progress = self._size(placed.target, final=False) or progress
        return progress

    def _size(self, target: Use, *, final: bool) -> bool:
        """Sizes a target by its largest subscripts. final: what is missing is an error."""
        self._refresh()
        name = target.access.tensor
        shape: list[int] = []
        for dim, s in enumerate(target.access.subscripts):
            given = self._declared(name, dim)
            if given is not None:
                shape.append(given)
                continue
            form = linear(s, self.sizes.known)
            if not final and any(i not in self.ranges for i in form.indices):
                return False
            least, most = enclosure(form, self.ranges, self.sizes.known)
            if most == math.inf:
                places = ",".join("N" if d == dim else text_of(e) for d, e in enumerate(target.source.subscripts))
                raise RangeError(
                    f"the size of dimension {dim} of {name} cannot be inferred: its subscript depends on the values of a tensor",
                    span=_place(target.source, dim),
                    help=f"give the size in a signature: `def name(.., N) -> {name}[{places}]:`",
                )
            if least < 0 and not isinstance(s, Pad | Clamp) and least <= most:
                raise BoundsError(
                    f"a subscript of {name} (dimension {dim}) goes down to {int(least)}",
                    span=_place(target.source, dim),
                    help="give the index a range that keeps it at 0 or above",
                )
            shape.append(max(0, whole(most) + 1))
        self.sizes.shapes[name] = tuple(shape)
        self.sized_here[name] = target
        return True

    def _agree(self) -> None:
        """All plain uses of an index that has no explicit range agree on its size."""
        for use, dim, loop in self._plain_uses():
            name = use.access.tensor
            here = self.sized_here.get(name) if self._declared(name, dim) is None else None
            if loop.explicit or (here is not None and (use is here or not isinstance(here.access.subscripts[dim], Index))):
                continue  # a size that comes from the very index says nothing about it
            size = self.sizes.of(name, dim)
            if loop.bounds == (0, size):
                continue
            if loop.why is not None:
                other = loop.why
                place = next(d for d, s in enumerate(other.source.subscripts) if isinstance(s, Index) and other.scope.loops[s.name] is loop)
                before = f"size {self.sizes.of(other.access.tensor, place)} in {other.access.tensor} (dimension {place})"
            else:
                assert loop.bounds is not None
                before = f"range {text_of(loop.bounds[0])}:{text_of(loop.bounds[1])}"
            raise SizeMismatch(
                f"index {loop.name} has {before} but size {size} in {name} (dimension {dim})",
                span=use.source.span,
                help=f"sizes never broadcast; to use a part, give the range: `for {loop.name} in lo:hi`",
            )

    def _declared(self, name: str, dim: int) -> int | None:
        declared = self.sizes.declared.get(name)
        return None if declared is None else declared[dim]

    def _unsettled(self, loop: Loops) -> Error:
        mend = f"`for {loop.name} in lo:hi`"
        partners: list[str] = []
        read = any(p.scope.loops.get(loop.name) is loop and loop.name in free_indices(p.statement.value) for p in self.statements)
        for use in self.uses:
            for s in use.access.subscripts:
                form = linear(s, self.sizes.known)
                if loop.key in form.indices:
                    read = read or not use.write
                    if not isinstance(s, Pad | Clamp) and loop.key in form.linear_indices and not use.write:
                        partners += [i for i in form.indices if i != loop.key and i not in self.ranges]
        span = loop.span or next(
            (_place(u.source, d) for u in self.uses for d, s in enumerate(u.access.subscripts) if loop.key in linear(s).indices), None
        )
        if partners:
            other = partners[0].rstrip("'")
            return RangeError(
                f"the range of index {loop.name} is ambiguous: subscripts bound it only together with {other}",
                span=span,
                help=f"give one of them: {mend} or `for {other} in lo:hi`",
            )
        if not read and any(loop.key in linear(s).indices for u in self.uses if u.write for s in u.access.subscripts):
            return IndexError_(
                f"index {loop.name} stands only on the left, where nothing gives it a range", span=span, help=f"give it one: {mend}"
            )
        padded = any(isinstance(s, Pad) and loop.key in linear(s).indices for u in self.uses for s in u.access.subscripts)
        why = "; `pad(..)` bounds nothing, since it reads zero outside" if padded else ""
        return RangeError(f"nothing gives index {loop.name} a range", span=span, help=f"give it one: {mend}{why}")

    # -- after settling -----------------------------------------------------------------------------------------------

    def extent(self, expr: Expr) -> tuple[Affine, Extent]:
        """The linear form of a localised subscript, and its bounds."""
        form = linear(expr, self.sizes.known)
        return form, enclosure(form, self.ranges, self.sizes.known)

    def exact(self, form: Affine) -> bool:
        """Whether the bounds of `form` are attained."""
        return is_exact(form, self.ranges)

    def named(self, loop: Loops, scope: Scope) -> tuple[Bound, Bound]:
        """A loop's range with the names that the program uses."""
        assert loop.bounds is not None
        names = {loop.key: Index(loop.name) for loop in scope.loops.values() if loop.key != loop.name}
        lo, hi = (b if isinstance(b, int) or not names else substitute(b, names) for b in loop.bounds)
        return lo, hi


def _place(access: Access, dim: int) -> Span | None:
    """Where a subscript stands, else its access."""
    return getattr(access.subscripts[dim], "span", None) or access.span


def text_of(e: Bound) -> str:
    """An integer expression in the notation."""
    return str(e) if isinstance(e, int) else print_expr(Access("", (e,)))[1:-1]
