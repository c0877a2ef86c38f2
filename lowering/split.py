"""Long reductions with few results: partial results over parts of an index, and a small sum of those.

    s += x[k]     -->   s.part[p] += x[p*C+c];  s += s.part[p]
    t += A[i,j]   -->   t.part[i] += A[i,j];  t += t.part[i]

Deterministic, without atomics (PyTorch's decompose_k and its split reductions do the same). What several reductions of one
pass make together is split after they have become a kernel, by split_streams.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from lowering.kernel_shape import RESIDENT_ROW
from lowering.normalize import names_of
from lowering.statement import extents, inlined, plain
from tdsl.ir import (
    Access,
    Call,
    Clamp,
    Const,
    Expr,
    Index,
    Pad,
    Program,
    Range,
    Statement,
    free_indices,
    fresh_name,
    rebuild,
    statements,
    substitute,
    walk,
)
from tdsl.pairwise import groups
from tdsl.simplify import factors


@dataclass(frozen=True, slots=True)
class Split:
    """When long reductions are split.

    programs: how many fill the chip; a sum that has fewer than half is split into about `times` as many. terms: of one index that
    a program should at least reduce; last: of the last of several. width: results that one program makes where the reduced index
    is not the contiguous one. work: elements below which nothing is split: they are done before another kernel would start. part:
    elements that a part should at least read. products: whether products of matrices are split too; a library does that itself.
    passes: whether reductions that may share a pass with others are split as well; else `split_streams` does that.
    """

    programs: int
    terms: int = 512
    last: int = 32
    width: int = 64
    work: int = 16384
    part: int = 1
    products: bool = True
    times: int = 1
    passes: bool = True


def split_reductions(program: Program, split: Split) -> tuple[Program, frozenset[str]]:
    """`program` with its long reductions in two steps, and the tensors of partial results, which must not be joined with what sums
    them up. A part beyond the end reads zeros through pad, and the identity of the reduction by a mask."""
    taken = names_of(tuple(statements(program.body)))
    body: list[Statement] = []
    apart: set[str] = set()
    pending = list(reversed(list(statements(program.body))))
    left = frozenset() if split.passes else _in_passes(list(statements(program.body)))
    while pending:
        s = pending.pop()
        parts = _parts(s, split)
        two = _kept_index(s, split, taken) if parts else None
        if two is None and parts > 1 and s.target.tensor not in left:
            two = split_statement(s, parts, taken)
        if two is None:
            body.append(s)
            continue
        first, second = two
        apart.add(first.target.tensor)
        body.append(first)
        pending.append(second)
    return replace(program, body=tuple(body)), frozenset(apart)


def _in_passes(body: list[Statement]) -> frozenset[str]:
    """Reductions that a kernel may make in one pass with others: those that read another one's result, those whose result is
    read so, and those of what another statement makes along the index that they reduce; and those of rows that a program holds
    whole for a statement that walks them again."""
    elementwise = {s.target.tensor: s for s in body if not s.reduced and plain(s.target)}
    reductions = {s.target.tensor: s for s in body if s.reduced}
    found: set[str] = set()
    for s in reductions.values():
        size = sorted(n for i, n in extents(s).items() if i in s.reduced)
        for a in (a for a in walk(inlined(s.value, elementwise)) if isinstance(a, Access) and a.tensor in reductions):
            other = reductions[a.tensor]
            if {*s.reduced} & {*free_indices(a)}:
                found.add(s.target.tensor)
            elif size == sorted(n for i, n in extents(other).items() if i in other.reduced):
                found |= {s.target.tensor, a.tensor}
    for s in (s for s in body if not s.reduced):
        for a in (a for a in walk(s.value) if isinstance(a, Access) and a.tensor in reductions):
            row = math.prod(n for i, n in extents(reductions[a.tensor]).items() if i in reductions[a.tensor].reduced)
            if row <= RESIDENT_ROW and row == math.prod(n for i, n in extents(s).items() if i not in free_indices(a)):
                found.add(a.tensor)
    return frozenset(found)


def _kept_index(s: Statement, split: Split, taken: set[str]) -> tuple[Statement, Statement] | None:
    """`t += f(i,j)` --> `t.part[i] += f(i,j);  t += t.part[i]`, where the last index alone is long enough to be summed."""
    size = extents(s)
    *kept, last = s.reduced
    if not kept or size[last] < split.last or math.prod(size[i] for i in kept) < 2:
        return None
    name = fresh_name(f"{s.target.tensor}.part", taken)
    taken.add(name)
    target = Access(name, (*(Index(i) for i in kept), *s.target.subscripts))
    return replace(s, target=target), replace(s, ranges=tuple(r for r in s.ranges if r.index != last), value=target)


def _parts(s: Statement, split: Split) -> int:
    """How many parts of its longest index keep the chip busy; 0 where the statement does so already or is short."""
    if not s.reduced or not all(isinstance(i, Index) for i in s.target.subscripts):
        return 0
    size = extents(s)
    if not split.products and len(groups([f for f in factors(s.value) if {*s.reduced} & {*free_indices(f)}])) > 1:
        return 0
    results = math.prod(size[i] for i in size if i not in s.reduced)
    index = max(s.reduced, key=lambda i: size[i])
    longest = size[index]
    last = {a.subscripts[-1] for e in (s.value,) for a in walk(e) if isinstance(a, Access) and len(a.subscripts) > 1}
    width = 1 if Index(index) in last else split.width
    busy = -(-results // width)
    read = min(results, width) * math.prod(size[i] for i in s.reduced)
    if results == 0 or busy * 2 > split.programs or read < split.work:
        return 0
    most = min(split.times * split.programs // busy, longest // split.terms, read // split.part)
    return max(1, next((n for n in range(most, most // 2, -1) if longest % n == 0), most))  # even parts need no masks


def split_statement(s: Statement, parts: int, taken: set[str]) -> tuple[Statement, Statement]:
    """The statement of the partial results and the one that reduces them."""
    size = extents(s)
    index = max(s.reduced, key=lambda i: size[i])
    cut = cut_of(index, size[index], parts, {*s.indices})
    value = at(s.value, cut)
    terms = factors(s.value)
    zero = s.op == "+=" and any(isinstance(f, Access) and index in free_indices(f) for f in terms)
    if not cut.even and not (zero and all(isinstance(f, Access | Const) for f in terms)):  # beyond the end 1 / x[k] is no number
        value = cut.inside(value, IDENTITY[s.op])
    name = fresh_name(f"{s.target.tensor}.part", taken)
    taken.add(name)
    target = Access(name, (Index(cut.p), *s.target.subscripts))
    kept = [r for r in s.ranges if r.index != index]
    over = [cut.parts_range, *kept, cut.chunk_range]
    left = [r for r in s.ranges if r.index not in s.reduced]
    first = replace(s, ranges=tuple(over), target=target, value=value)
    return first, replace(s, ranges=(*left, cut.parts_range), value=target)


# ---------------------------------------------------------------------------------------------------------------------
# Parts of an index

IDENTITY = {"+=": Const(0), "*=": Const(1), "max=": Const(-math.inf), "min=": Const(math.inf)}


@dataclass(frozen=True, slots=True)
class Cut:
    """An index in parts: its value is `p` * chunk + `c`. even: whether all parts are whole."""

    index: str
    extent: int
    chunk: int
    p: str
    c: str

    @property
    def parts(self) -> int:
        """How many parts there are."""
        return -(-self.extent // self.chunk)

    @property
    def even(self) -> bool:
        """Whether the last part is as long as the others."""
        return self.parts * self.chunk == self.extent

    @property
    def whole(self) -> Expr:
        """The value of the index."""
        return Call("add", (Call("mul", (Index(self.p), Const(self.chunk))), Index(self.c)))

    @property
    def parts_range(self) -> Range:
        """The loop over parts."""
        return Range(self.p, Const(0), Const(self.parts))

    @property
    def chunk_range(self) -> Range:
        """The loop inside of one."""
        return Range(self.c, Const(0), Const(self.chunk))

    def inside(self, value: Expr, instead: Expr) -> Expr:
        """`value` where the index exists, `instead` beyond its end."""
        return value if self.even else Call("where", (Call("lt", (self.whole, Const(self.extent))), value, instead))


def cut_of(index: str, extent: int, parts: int, taken: set[str], multiple: int = 1) -> Cut:
    """An index in about so many parts, under names that are not taken. multiple: of which the length of uneven parts is one."""
    chunk = -(-extent // parts)
    if extent % chunk:
        chunk = -(-chunk // multiple) * multiple
    return Cut(index, extent, chunk, fresh_name("p", taken), fresh_name(f"{index}_in", taken))


def at(e: Expr, cut: Cut) -> Expr:
    """`e` with an index in parts; subscripts that reach beyond the end read zero."""
    if isinstance(e, Access):
        subscripts = []
        for i in e.subscripts:
            moved = substitute(at(i, cut) if isinstance(i, Access) else i, {cut.index: cut.whole})
            beyond = cut.index in free_indices(i) and not cut.even and not isinstance(i, Pad | Clamp)
            subscripts.append(Pad(moved) if beyond else moved)
        return replace(e, subscripts=tuple(subscripts))
    if isinstance(e, Index):
        return cut.whole if e.name == cut.index else e
    return rebuild(e, lambda x: at(x, cut))
