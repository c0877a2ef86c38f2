"""What the numbers show to be needless: pads that are never outside, conditions that always hold. (And pads that a loop over nothing needs.)

    for u in 0:4, k in 0:2:  V[u] += where(u+k < 9, P[pad(2*u+k)], 0)      P[8]      -->      V[u] += P[2*u+k]

The swap rule pads wherever sizes could make it necessary; here they are known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tdsl.affine import Affine, Bound, Known, enclosure, known_values, linear
from tdsl.ir import Access, Call, Clamp, Const, Expr, Index, Pad, Size, Statement, rebuild
from tdsl.traced import whole

_INTEGER = frozenset({"add", "sub", "mul", "neg", "floordiv", "mod", "maximum", "minimum"})


def proved(s: Statement, shapes: Mapping[str, tuple[int, ...]], values: Mapping[str, int], steps: Mapping[str, tuple[int, int]]) -> Statement:
    """`s` (with constant ranges) without what always holds. values: of integer scalars; steps: ranges of ordered indices around it."""
    return _Proof(s, shapes, values, steps).run()


class _Proof:
    def __init__(self, s: Statement, shapes: Mapping[str, tuple[int, ...]], values: Mapping[str, int], steps: Mapping[str, tuple[int, int]]):
        self.s = s
        self.shapes = shapes
        self.known: Known = known_values(shapes, values)
        self.ranges: dict[str, tuple[Bound, Bound]] = dict(steps)
        for r in s.ranges:
            assert isinstance(r.lo, Const) and isinstance(r.hi, Const)
            self.ranges[r.index] = whole(r.lo.value), whole(r.hi.value)
        self.scalars = values

    def run(self) -> Statement:
        if not all(isinstance(lo, int) and isinstance(hi, int) for lo, hi in self.ranges.values()):
            return self.s
        empty = any(lo >= hi for lo, hi in self.ranges.values())  # type: ignore[operator]
        visit = self._guarded if empty else self._expr
        target = visit(self.s.target)
        assert isinstance(target, Access)
        return replace(self.s, target=target, value=visit(self.s.value))

    def _guarded(self, e: Expr) -> Expr:
        """What no point of a loop over nothing reaches need not lie inside its tensor, but code may look there: it gets a pad."""
        e = rebuild(e, self._guarded)
        if not isinstance(e, Access) or e.tensor not in self.shapes:
            return e
        subscripts = []
        for s, size in zip(e.subscripts, self.shapes[e.tensor], strict=True):
            least, most = (0, 0) if isinstance(s, Pad) else enclosure(linear(s, self.known), self.ranges, self.known)
            subscripts.append(s if isinstance(s, Pad) or (isinstance(s, Clamp) and size) or (least >= 0 and most < size) else Pad(s))
        return replace(e, subscripts=tuple(subscripts))

    def _expr(self, e: Expr) -> Expr:
        e = rebuild(e, self._expr)
        match e:
            case Access(tensor=tensor, subscripts=subscripts) if any(isinstance(s, Pad) for s in subscripts) and tensor in self.shapes:
                return replace(e, subscripts=tuple(self._subscript(s, n) for s, n in zip(subscripts, self.shapes[tensor], strict=True)))
            case Call(op="where", args=(condition, a, b)):
                kept = [c for c in conjuncts(condition) if not self._holds(c)]
                if not kept:
                    return a
                joined = kept[0]
                for c in kept[1:]:
                    joined = Call("and", (joined, c))
                return Call("where", (joined, a, b))
        return e

    def _subscript(self, s: Expr, size: int) -> Expr:
        if not isinstance(s, Pad):
            return s
        form = linear(s, self.known)
        least, most = enclosure(form, self.ranges, self.known)
        return form.expr() if least >= 0 and most < size else s

    def _holds(self, c: Expr) -> bool:
        """Whether a comparison of integers holds at every point of the loops."""
        if not (isinstance(c, Call) and c.op in ("lt", "le", "gt", "ge", "eq") and all(self._integral(a) for a in c.args)):
            return False
        a, b = (linear(x, self.known) for x in c.args)
        if c.op == "eq":
            return a == b
        margin: Affine = {"lt": (b - a).shift(-1), "le": b - a, "gt": (a - b).shift(-1), "ge": a - b}[c.op]
        return enclosure(margin, self.ranges, self.known)[0] >= 0

    def _integral(self, e: Expr) -> bool:
        if isinstance(e, Call):
            return e.op in _INTEGER and all(self._integral(a) for a in e.args)
        if isinstance(e, Access):
            return not e.subscripts and e.tensor in self.scalars
        return isinstance(e, Index | Size) or (isinstance(e, Const) and e.value.__class__ is int)


def conjuncts(e: Expr) -> list[Expr]:
    """a and b and c --> [a, b, c]."""
    return [c for arg in e.args for c in conjuncts(arg)] if isinstance(e, Call) and e.op == "and" else [e]
