"""Kernels with few programs and a long stream: parts of the stream in parallel, and a kernel that merges them.

The running values of a pass with their factors (stream.py) are a monoid: parts of the range are reduced apart, each relative
to its own running values, and a sum is multiplied by what its factor says of the change from those to the finished ones.

    m[i] max= s[i,j];  l[i] += exp(s[i,j] - m[i]);  y[i] = f(m[i], l[i])
    -->  m.part[p,i] max= s[i,p*C+c];   l.part[p,i] += exp(s[i,p*C+c] - m.part[p,i])
         m[i] max= m.part[p,i];         l[i] += l.part[p,i] * exp(m.part[p,i] - m[i]);   y[i] = f(m[i], l[i])

A product of differences is summed about the means of its part and shifted when the parts are merged. A maximum that is still
infinite counts as 0 in its part, and as the finished one in the merge: what was summed beside it is then neither lost nor NaN.
Everything is deterministic. For attention this is known as split-KV or flash decoding.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from lowering.contraction import accesses, contraction, statement_flops
from lowering.plan import KernelPlan, Plan, kernel_of
from lowering.recompute import Choice, flops_class
from lowering.schedule import DOT_MIN, stream_rows
from lowering.split import IDENTITY, Cut, at, cut_of
from lowering.statement import extents, plain, power_of_two, tensor_bytes
from lowering.stream import OLD, Reduction, passes
from lowering.targets import Target
from tdsl.ir import REDUCTION_OF, Access, Call, Const, Expr, Index, Statement, free_indices, fresh_name, reads, rebuild
from tdsl.ops import DTYPES, REDUCTIONS
from tdsl.simplify import factors, product, simplify_expr
from tdsl.traced import estimates

# Elements of the stream that a part must have, with and without matrix products: a few tiles, so that its loop is a pipeline.
PART_DOT, PART = 256, 2048
# What the length of uneven parts is a multiple of: a part starts where wide loads may start, and its tiles are whole.
ALIGNED = 128
# Sums down columns that a program makes side by side: a line of memory of each row.
COLUMNS = 64
# Rows of a program of a streaming kernel with matrix products, where the chip is not full.
ROWS = 64
# Programs per multiprocessor that have as many bytes on their way as memory has room for: a tile or two of 8 KiB each.
FILL = 2
# What the masks of uneven parts are taken to cost.
MASKS = 1.05
# What a split must win, as a share of the time without it.
WIN = 0.9


def split_streams(plan: Plan, target: Target, apart: Collection[str] = ()) -> tuple[Plan, dict[str, tuple[int, ...]], dict[str, str]]:
    """`plan` with its long streams in parts where that is predicted to be faster; new tensors with their shapes, and with the tensor
    of which each is a part. apart: what is a part already, and is not cut again, nor what sums it up."""
    updated = plan.updated
    shapes, parts = dict(plan.shapes), dict[str, str]()
    made: list[tuple[list[Statement], set[str]]] = []
    choices = []
    for kernel in plan.kernels:
        two = None
        members = _members(kernel)
        if members and not (updated | {*apart}) & {*kernel.stores} and not {*kernel.reads} <= {*apart}:
            cut, choice = _weigh(kernel, members, plan, target)
            choices += [choice] if choice else []
            two = _Parts(kernel, members, cut, shapes, parts).run() if cut else None
        made += two or [(list(kernel.statements), {*kernel.stores})]
    if len(made) == len(plan.kernels):
        return replace(plan, choices=(*plan.choices, *choices)), {}, {}
    dtypes = {**plan.dtypes, **{t: DTYPES[plan.dtypes[of]].compute for t, of in parts.items()}}
    base = plan.kernels[0].name.rpartition("_")[0]
    kernels = tuple(kernel_of(f"{base}_{n}", part, needed, shapes, dtypes) for n, (part, needed) in enumerate(made))
    outside = {*plan.program.inputs, *plan.program.results}
    memory = {t: tensor_bytes(shapes[t], dtypes[t]) for k in kernels for t in k.writes if t not in outside}
    changed = replace(plan, kernels=kernels, memory=memory, shapes=shapes, dtypes=dtypes, choices=(*plan.choices, *choices))
    return changed, {t: shapes[t] for t in parts}, parts


def _stream(kernel: KernelPlan) -> tuple[str, ...]:
    """The indices that all reductions which matter walk together."""
    walks = {s.reduced for s in kernel.statements if s.reduced}
    return kernel.stream or (next(iter(walks)) if len(walks) == 1 else ())


def _members(kernel: KernelPlan) -> tuple[Reduction, ...]:
    """The reductions of the only pass of a kernel; none where it has several, or where parts of it cannot be merged."""
    stream = {*_stream(kernel)}
    local = {s.target.tensor for s in kernel.statements}
    if not stream or len(local) < len(kernel.statements):
        return ()
    for s in kernel.statements:
        if not plain(s.target) or (stream & {*free_indices(s.target)} and s.target.tensor in kernel.stores):
            return ()
        if any(a.tensor in local and not plain(a) for a in reads(s)) or s.op == "*=":
            return ()
    found = passes(kernel.statements, tuple(stream))
    return found[0] if len(found) == 1 else ()


@estimates()
def _weigh(kernel: KernelPlan, members: Sequence[Reduction], plan: Plan, target: Target) -> tuple[Cut | None, Choice | None]:
    """In how many parts a stream is best: programs without work against the memory that parts pass through and one more launch."""
    size = kernel.extents
    found = [c for c in map(contraction, kernel.statements) if c is not None]
    rows, batch = stream_rows(kernel) if found else ((), kernel.grid)
    height = math.prod(size[i] for i in rows)
    width = 1 if found else _side_by_side(kernel, plan)
    programs = -(-math.prod(size[i] for i in batch) // width) * -(-height // min(ROWS, max(DOT_MIN, power_of_two(height))))
    stream = _stream(kernel)
    most = min(FILL * target.sms // max(1, programs), math.prod(size[i] for i in stream) // (PART_DOT if found else PART // width))
    if most < 2 or programs == 0:
        return None, None
    # An outer index is cut where it is long enough: what lies side by side in memory stays in one part.
    index = next((i for i in stream[:-1] if size[i] >= most), max(stream, key=lambda i: size[i]))
    most = min(most, size[index])
    operands = [t for t in kernel.reads if plan.shapes[t]]
    working = sum(statement_flops(s) / target.flops[flops_class(s, operands, plan.dtypes)] for s in kernel.statements) / target.sustained_flops
    moving = kernel.bytes / (target.bandwidth * target.sustained_bandwidth)
    state = sum(4 * math.prod(n for i, n in extents(r.statement).items() if i not in r.statement.reduced) for r in members)

    most_busy = FILL * target.sms

    def seconds(parts: int) -> float:
        busy = programs * parts
        share = busy / (math.ceil(busy / target.sms) * target.sms)
        merge = target.launch + 2 * parts * state / target.bandwidth if parts > 1 else 0.0
        return max(working / share, moving / min(1.0, busy / most_busy)) + target.launch + merge

    candidates = [n for n in range(2, most + 1) if n & (n - 1) == 0 or n == most or size[index] % n == 0]
    best = min(candidates, key=lambda n: (seconds(n) * (1.0 if size[index] % n == 0 else MASKS), n))
    costs = (("in one part", seconds(1)), (f"in {best} parts", seconds(best)))
    if seconds(best) > WIN * seconds(1):
        return None, Choice(kernel.name, f"{index} in one part", costs, "parts would not be faster")
    cut = cut_of(index, size[index], best, {*size}, ALIGNED)
    return cut, Choice(kernel.name, f"{index} in {cut.parts} parts", costs, f"{programs} programs do not fill {target.sms} multiprocessors")


def _side_by_side(kernel: KernelPlan, plan: Plan) -> int:
    """How many results a program makes side by side: COLUMNS where tensors lie along them, 1 where they lie along what is summed."""
    large = [a for a in accesses(kernel.statements) if a.tensor in kernel.reads and len(a.subscripts) > 1 and math.prod(plan.shapes[a.tensor]) > 1]
    last = {i for a in large for i in free_indices(a.subscripts[-1])}
    return COLUMNS if last & {*kernel.grid} and not last & {*_stream(kernel)} else 1


@dataclass(slots=True)
class _Parts:
    """Rewrites one kernel into the kernel of the parts and the one that merges them. shapes: of all tensors; parts: what each new
    one is a part of. Both grow."""

    kernel: KernelPlan
    members: tuple[Reduction, ...]
    cut: Cut
    shapes: dict[str, tuple[int, ...]]
    parts: dict[str, str]
    names: dict[str, str] = field(default_factory=dict)
    first: list[Statement] = field(default_factory=list)
    stored: set[str] = field(default_factory=set)
    made: dict[tuple[Expr, str, tuple[Expr, ...]], str] = field(default_factory=dict)

    def run(self) -> list[tuple[list[Statement], set[str]]]:
        """Statements and stored tensors of both kernels."""
        by_name = {r.statement.target.tensor: r for r in self.members}
        read = {n for r in self.members for n in r.running}
        stream = {*_stream(self.kernel)}
        second = []
        for s in self.kernel.statements:
            name = s.target.tensor
            if name in by_name:
                second.append(self._centred(by_name[name]) if by_name[name].centred else self._plain(by_name[name], name in read))
            elif not stream & {*free_indices(s.target)}:
                second.append(s)
        return [(self.first, self.stored), (_live(second, {*self.kernel.stores}), {*self.kernel.stores})]

    # -- the parts ----------------------------------------------------------------------------------------------------

    def _make(self, s: Statement, value: Expr, base: str, *, stored: bool) -> str:
        """Adds `s` with another value to the kernel of the parts, after what it reads; the name of the part's result."""
        value = self._here(value)
        key = (value, s.op, s.target.subscripts)
        if stored and key in self.made:
            return self.made[key]
        name = fresh_name(f"{base}.part", {*self.shapes})
        ranges = [self.cut.chunk_range if r.index == self.cut.index else r for r in s.ranges]
        subscripts = tuple(Index(self.cut.c) if i == Index(self.cut.index) else i for i in s.target.subscripts)
        made = replace(s, ranges=(self.cut.parts_range, *ranges), target=Access(name, (Index(self.cut.p), *subscripts)), value=value)
        size = extents(made)
        self.shapes[name] = tuple(size[i.name] for i in made.target.subscripts if isinstance(i, Index))
        self.parts[name] = s.target.tensor
        self.first.append(made)
        if stored:
            self.stored.add(name)
            self.made[key] = name
        return name

    def _here(self, e: Expr) -> Expr:
        """An expression of the kernel in one part: what the kernel makes, as the part makes it."""
        if isinstance(e, Access):
            definition = next((s for s in self.kernel.statements if s.target.tensor == e.tensor), None)
            if definition is None:
                return at(e, self.cut)
            if e.tensor not in self.names:
                self.names[e.tensor] = self._make(definition, self._inside(definition), e.tensor, stored=False)
            subscripts = (Index(self.cut.c) if i == Index(self.cut.index) else i for i in e.subscripts)
            part = Access(self.names[e.tensor], (Index(self.cut.p), *subscripts))
            return _finite(part, Const(0)) if self._unbounded(e.tensor) else part
        if isinstance(e, Index):
            return at(e, self.cut)
        return rebuild(e, self._here)

    def _inside(self, s: Statement, value: Expr | None = None) -> Expr:
        """A statement's value that is the identity of its reduction beyond the end of the index, and finite there."""
        value = s.value if value is None else value
        if self.cut.even or self.cut.index not in s.reduced:
            return value
        if s.op != "+=":
            return Call("where", (self._exists, value, IDENTITY[s.op]))
        terms = factors(value)
        local = {t.target.tensor for t in self.kernel.statements}
        loaded = [isinstance(f, Access) and f.tensor not in local for f in terms]  # zero beyond the end
        along = [self.cut.index in free_indices(f) for f in terms]
        if contraction(replace(s, value=value)) is None:
            return Call("where", (self._exists, value, Const(0)))
        return product([Call("where", (self._exists, f, Const(0))) if a and not zero else f for f, a, zero in zip(terms, along, loaded, strict=True)])

    @property
    def _exists(self) -> Expr:
        """Whether the index of the kernel exists in a part."""
        return Call("lt", (Index(self.cut.index), Const(self.cut.extent)))

    def _unbounded(self, name: str) -> bool:
        s = next(s for s in self.kernel.statements if s.target.tensor == name)
        return bool(s.reduced) and math.isinf(REDUCTIONS[REDUCTION_OF[s.op]].identity)

    # -- the merge ----------------------------------------------------------------------------------------------------

    def _merged(self, s: Statement, value: Expr) -> Statement:
        ranges = (*(r for r in s.ranges if r.index not in s.reduced), self.cut.parts_range)
        return replace(s, ranges=ranges, value=simplify_expr(value))

    def _part(self, s: Statement, name: str) -> Access:
        return Access(name, (Index(self.cut.p), *s.target.subscripts))

    def _plain(self, r: Reduction, read: bool) -> Statement:
        """One reduction and its merge. read: whether others are relative to it, with its factors then."""
        s = r.statement
        outer = () if read else r.outer
        name = self._make(s, self._inside(s, product([r.inner, *r.outer]) if read else r.inner), s.target.tensor, stored=True)
        self.names[s.target.tensor] = name
        change = () if r.factor is None else (self._changed(r.factor),)
        return self._merged(s, product([self._part(s, name), *change, *outer]))

    def _changed(self, e: Expr) -> Expr:
        """A factor from the running values of a part to the finished ones."""
        if isinstance(e, Access) and e.tensor.endswith(OLD):
            name = e.tensor.removesuffix(OLD)
            part = Access(self.names[name], (Index(self.cut.p), *e.subscripts))
            return _finite(part, Access(name, e.subscripts)) if self._unbounded(name) else part
        return rebuild(e, self._changed)

    def _centred(self, r: Reduction) -> Statement:
        """A sum of products of differences: about the means of the part, shifted to what the statement says in the merge."""
        s = r.statement

        def total(value: Expr, what: str) -> Access:
            """A sum over the part, where the differences count."""
            counted = value if r.given is None else Call("where", (r.given, value, Const(0.0)))
            return self._part(s, self._make(s, self._inside(s, counted), f"{s.target.tensor}{what}", stored=True))

        rest = Call("sub", (Const(self.cut.extent), Call("mul", (Index(self.cut.p), Const(self.cut.chunk)))))
        count: Expr = Const(self.cut.chunk) if self.cut.even else Call("minimum", (Const(self.cut.chunk), rest))
        divisor = count
        if r.given is not None:
            count = total(Const(1.0), ".count")
            divisor = Call("maximum", (count, Const(1)))
        mean = {a: Call("div", (total(a, ".total"), divisor)) for a in dict.fromkeys(a for a, _ in r.centred)}
        part = total(product([Call("sub", (a, mean[a])) for a, _ in r.centred]), "")
        shifts = [Call("sub", (mean[a], q)) for a, q in r.centred]
        return self._merged(s, product([Call("add", (part, product([count, *shifts]))), *r.outer]))


def _finite(value: Expr, instead: Expr) -> Expr:
    return Call("where", (Call("eq", (Call("abs", (value,)), Const(math.inf))), instead, value))


def _live(part: Sequence[Statement], needed: set[str]) -> list[Statement]:
    """Those of some statements that what is needed depends on."""
    needed = set(needed)
    kept: list[Statement] = []
    for s in reversed(part):
        if s.target.tensor in needed:
            needed |= {a.tensor for a in reads(s)}
            kept.append(s)
    return kept[::-1]
