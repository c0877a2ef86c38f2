"""What an ordered loop leaves in memory: whether a value that a step read is still there when the loop is over.

    for ordered t, i:  H[t,i] = tanh(H[pad(t-1),i] + X[t,i])      H[t-1,i] is: no later step writes it
    for ordered t, i:  s[i] += X[t,i] * s[i]                      s[i] is not: the next step overwrites it

A backward pass reads such values; it is the same loop the other way round, after the forward one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tdsl.affine import Affine, Bound, Ranges, enclosure, is_injective, rename
from tdsl.extents import Sizes, loop_ranges, symbolic_ranges
from tdsl.ir import Access, Clamp, Index, Loop, Pad, Range, Size, Statement, free_indices, reads, substitute

# An extent that is large enough for what is not known here.
_UNKNOWN = 2**31


@dataclass(frozen=True, slots=True)
class _Place:
    """A statement of the loop: its position in the body, the ordered ranges around it, and the ranges of all its indices."""

    number: float
    statement: Statement
    loops: tuple[Range, ...]
    ranges: Ranges


class Recurrence:
    """One outermost ordered loop. earlier: the statements before it, which may write the same tensors."""

    def __init__(self, loop: Loop, sizes: Sizes, earlier: Sequence[Statement] = ()):
        self.sizes = sizes
        self.places: list[_Place] = []
        self._collect(loop, (), {})
        self.written = frozenset(p.statement.target.tensor for p in self.places)
        self.before = [_Place(-1, s, (), symbolic_ranges(s, sizes)) for s in earlier if s.target.tensor in self.written]

    def _collect(self, loop: Loop, around: tuple[Range, ...], ranges: Ranges) -> None:
        around = (*around, *loop.ranges)
        ranges = {**ranges, **loop_ranges(loop, self.sizes)}
        for child in loop.body:
            if isinstance(child, Loop):
                self._collect(child, around, ranges)
            else:
                self.places.append(_Place(len(self.places), child, around, symbolic_ranges(child, self.sizes, ranges)))

    def _place(self, s: Statement) -> _Place:
        return next(p for p in self.places if p.statement is s)

    def once(self, s: Statement) -> bool:
        """Whether the steps of the loops around a statement write different elements."""
        p = self._place(s)
        names = {r.index for r in p.loops}
        forms = [form for form in self._forms(s.target) if form is not None and set(form.indices) <= names]
        return is_injective(forms, {r.index: (0, _UNKNOWN) for r in p.loops})

    def overwrites(self, s: Statement) -> bool:
        """Whether a statement may write elements that have a value already, from before the loop or from elsewhere in it."""
        mine = self._place(s)
        others = [p for p in (*self.before, *self.places) if p.statement.target.tensor == s.target.tensor and p is not mine]
        return not self.once(s) or any(not self._apart(mine, s.target, p, p.statement.target) for p in others)

    def gathered(self, tensor: str) -> bool:
        """Whether the loop reads a tensor at computed places: its cotangent is then added to at places that nothing shows to be apart."""
        found = (a for p in self.places for a in reads(p.statement) if a.tensor == tensor)
        forms = (form for a in found for form in self._forms(a) if form is not None)
        return any(not isinstance(atom, Index | Size) for form in forms for atom, _ in form.terms)

    def keeps(self, access: Access, s: Statement) -> bool:
        """Whether what statement `s` reads at `access` is still there after the loop; its own target counts as read after it is written."""
        if access.tensor not in self.written:
            return True
        mine = self._place(s)
        if access == s.target:
            if any(a == s.target for a in reads(s)):
                return False  # the older value, or the new one: they have one name
            mine = _Place(mine.number + 0.5, s, mine.loops, mine.ranges)
        writers = [p for p in self.places if p.statement.target.tensor == access.tensor]
        return all(self._apart(w, w.statement.target, mine, access) or self._earlier(w, mine, access) for w in writers)

    def _forms(self, access: Access) -> list[Affine | None]:
        return [None if isinstance(e, Clamp) else self.sizes.linear(e.value if isinstance(e, Pad) else e) for e in access.subscripts]

    def _differences(self, a: _Place, x: Access, b: _Place, y: Access) -> tuple[list[Affine], Ranges]:
        """Per dimension, the place of `x` less that of `y`, the indices of `a` under other names; and the ranges of all of them."""
        other = {i: f"{i}~" for i in a.ranges}
        names = {i: Index(name) for i, name in other.items()}

        def moved(bound: Bound) -> Bound:
            return bound if isinstance(bound, int) or not free_indices(bound) else substitute(bound, names)

        ranges = {**b.ranges, **{other[i]: (moved(lo), moved(hi)) for i, (lo, hi) in a.ranges.items()}}
        pairs = zip(self._forms(x), self._forms(y), strict=True)
        return [rename(left, other) - right for left, right in pairs if left is not None and right is not None], ranges

    def _apart(self, a: _Place, x: Access, b: _Place, y: Access) -> bool:
        """Whether two accesses never meet, at whatever steps."""
        differences, ranges = self._differences(a, x, b, y)
        return any(enclosure(d, ranges)[0] > 0 or enclosure(d.scale(-1), ranges)[0] > 0 for d in differences)

    def _earlier(self, w: _Place, reader: _Place, access: Access) -> bool:
        """Whether all that `w` writes at the place that is read was written before: by an earlier step, or earlier in the same one."""
        differences, ranges = self._differences(w, w.statement.target, reader, access)
        common = [a for a, b in zip(w.loops, reader.loops, strict=False) if a == b]
        for n, r in enumerate(common):
            # How many steps the write comes after the read. The places are the same, so a multiple of their difference adds nothing.
            delay = Affine(0, ((Index(f"{r.index}~"), 1),)) - Affine(0, ((Index(r.index), 1),))
            delay = delay.scale(-1 if r.order == "reversed" else 1)
            forms = [delay, *(delay + d.scale(sign) for d in differences for sign in (1, -1))]
            most = min(enclosure(form, ranges)[1] for form in forms)
            if most < 0:
                return True
            if most > 0 or (n < len(common) - 1 and not any(form == Affine(0) for form in forms)):
                return False
        return w.number < reader.number
