"""Which statements share a kernel, and which tensors live in memory.

A kernel runs one or more statements for each element of its grid indices; all its other indices are walked inside.
Statements join where one reads what the other computes for the same grid element:

    S[i,j] += A[i,k]*B[k,j];  Y[i,j] = relu(S[i,j] + b[j])     one kernel, S stays in registers (an epilogue)
    m[i] max= X[i,j];  l[i] += exp(X[i,j]-m[i]);  ...          one kernel, a row fits in registers
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from lowering.normalize import cost, extents, groups
from lowering.targets import Target
from tdsl.ir import Access, Expr, Index, Program, Range, Statement, expressions, free_indices, fresh_name, reads, statements, substitute, walk
from tdsl.ops import DTYPES
from tdsl.printer import print_statement
from tdsl.simplify import factors

# The longest row, in elements after padding to a power of two, that one program holds in registers.
RESIDENT_ROW = 16384
# Elements per row of the accumulators that a streaming kernel keeps whole: a 64 x 256 float32 tile is half of the registers of 8 warps.
WHOLE_TILE = 256
# How many times the time of moving an intermediate its repeated making may take, if it would dominate memory.
MEMORY_WORTH = 16
# How often a kernel may make its scores again because its accumulators are cut.
MOST_REPEATS = 16
# Bytes of an intermediate that whole-tensor execution would rather not hold.
CPU_MEMORY = 1 << 28
# How many contractions may share one kernel without streaming: each keeps an accumulator tile.
MAX_CONTRACTIONS = 2


@dataclass(frozen=True, slots=True)
class Contraction:
    """A sum of products in the form lhs[batch, m, k] * rhs[batch, n, k]; `outer` factors vary along no summed index."""

    batch: tuple[str, ...]
    m: tuple[str, ...]
    n: tuple[str, ...]
    k: tuple[str, ...]
    lhs: tuple[Expr, ...]
    rhs: tuple[Expr, ...]
    outer: tuple[Expr, ...]


def contraction(s: Statement) -> Contraction | None:
    """The contraction that a statement is, or None: another reduction, one operand, or indices that no matrix product has."""
    reduced = set(s.reduced)
    if s.op != "+=" or not reduced:
        return None
    terms = factors(s.value)
    outer = tuple(t for t in terms if not reduced & set(free_indices(t)))
    operands = groups([t for t in terms if reduced & set(free_indices(t))])
    if len(operands) != 2:
        return None
    (left, lhs), (right, rhs) = operands
    k = tuple(i for i in s.indices if i in left & right & reduced)
    m = tuple(i for i in s.indices if i in left - right and i not in reduced)
    n = tuple(i for i in s.indices if i in right - left and i not in reduced)
    batch = tuple(i for i in s.indices if i in left & right and i not in reduced)
    if not (k and m and n) or reduced - set(k):
        return None
    return Contraction(batch, m, n, k, tuple(lhs), tuple(rhs), outer)


@dataclass(frozen=True, slots=True)
class KernelPlan:
    """One kernel: its statements in order, on one set of index names.

    grid: indices that run in parallel, each element computed by one program. stream: inner indices that all reductions over
    them walk together; whole: inner indices held in one tile; repeat: grid indices whose tiles each compute the rest again. stores: the targets that go to memory.
    reads, writes: tensors in memory. flops: floating-point operations. bytes: each tensor read and written once.
    """

    name: str
    statements: tuple[Statement, ...]
    grid: tuple[str, ...]
    stores: tuple[str, ...]
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    flops: int = 0
    bytes: int = 0
    extents: Mapping[str, int] = field(default_factory=dict)
    stream: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    repeat: tuple[str, ...] = ()

    @property
    def notation(self) -> str:
        """The statements as text."""
        return "\n".join(print_statement(replace(s, ranges=tuple(Range(r.index) for r in s.ranges))) for s in self.statements)

    @property
    def inner(self) -> tuple[str, ...]:
        """The indices that each program walks itself."""
        return tuple(i for i in self.extents if i not in self.grid)


@dataclass(frozen=True, slots=True)
class Plan:
    """kernels: in launch order. memory: bytes of each intermediate that lives in memory. program: what the kernels run.
    recomputed: intermediates that kernels make again for themselves, by the cost model."""

    kernels: tuple[KernelPlan, ...]
    memory: Mapping[str, int]
    program: Program
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    recomputed: frozenset[str] = frozenset()

    def __str__(self) -> str:
        lines = []
        for k in self.kernels:
            lines.append(f"{k.name}: grid {', '.join(k.grid) or '1'}; inside {', '.join(k.inner) or '-'}; {k.flops:,} FLOPs, {k.bytes:,} bytes")
            lines.append(f"  reads {', '.join(k.reads) or '-'}; writes {', '.join(k.writes)}")
            lines += [f"    {line}" for line in k.notation.splitlines()]
        memory = ", ".join(f"{name} ({size:,} bytes)" for name, size in self.memory.items())
        return "\n".join([*lines, f"in memory between kernels: {memory or 'nothing'}"])


def plan(program: Program, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str], target: Target, apart: frozenset[str] = frozenset()) -> Plan:
    """Groups the statements of a normalised program into kernels. shapes and dtypes: of every tensor, by name.

    apart: partial results, which other programs wait for: their statements end a kernel.
    """
    body = list(statements(program.body))
    kept = _kept(program, body)
    recomputed = recompute(body, kept | apart, shapes, dtypes, target)
    while True:
        parts, failed = _form(body, recomputed)
        if failed is None:
            break
        recomputed = recomputed - {failed}
    while (merged := _merge_one(parts, kept, recomputed, apart)) is not None:
        parts = merged
    kernels = []
    for n, part in enumerate(parts):
        later = {a.tensor for other in parts[n + 1 :] for s in other for a in reads(s)}
        kernels.append(_finish(f"{_identifier(program.name)}_{n}", part, (kept | later) - recomputed, shapes, dtypes))
    outside = {*program.inputs, *program.results}
    memory = {t: math.prod(shapes[t]) * DTYPES[dtypes[t]].bits // 8 for k in kernels for t in k.writes if t not in outside}
    return Plan(tuple(kernels), memory, program, shapes, dtypes, recomputed)


# ---------------------------------------------------------------------------------------------------------------------
# What is recomputed


def recompute(
    body: Sequence[Statement], kept: set[str], shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str], target: Target
) -> frozenset[str]:
    """Intermediates that each consumer makes again rather than reads: larger than all that they are made of, and cheaper to
    make than to write and read. What is larger than everything that is in memory anyway may cost MEMORY_WORTH times more.

    On a CPU, where every operation of torch is a pass over memory anyway, only those that do not fit into CPU_MEMORY.
    """
    definitions = {s.target.tensor: s for s in body}
    outside = {a.tensor for s in body for a in reads(s) if a.tensor not in definitions} | kept
    compulsory = sum(math.prod(shapes[t]) * DTYPES[dtypes[t]].bits // 8 for t in outside)
    uses = {t: sum(any(a.tensor == t for a in reads(s)) for s in body) for t in definitions}
    found: set[str] = set()
    for s in body:
        name = s.target.tensor
        if name in kept or not plain(s.target) or not uses[name]:
            continue
        size = math.prod(shapes[name]) * DTYPES[dtypes[name]].bits // 8
        if target.backend == "cpu":
            if size > CPU_MEMORY:
                found.add(name)
            continue
        operands = _operands(s, definitions, found)
        if size <= sum(math.prod(shapes[t]) * DTYPES[dtypes[t]].bits // 8 for t in operands):
            continue
        kind = "float32"
        if contraction(s) is not None and all(DTYPES[dtypes[t]].bits == 16 for t in operands if DTYPES[dtypes[t]].kind == "float" and shapes[t]):
            kind = "float16"
        making = statement_flops(s) / (target.flops[kind] * target.sustained_flops)
        moving = size * (1 + uses[name]) / (target.bandwidth * target.sustained_bandwidth)
        if making * uses[name] < moving * (MEMORY_WORTH if size > compulsory else 1):
            found.add(name)
    return frozenset(found)


def _operands(s: Statement, definitions: Mapping[str, Statement], recomputed: set[str]) -> set[str]:
    """The tensors in memory that a statement is made of, through those that are recomputed."""
    found: set[str] = set()
    for a in reads(s):
        if a.tensor in recomputed:
            found |= _operands(definitions[a.tensor], definitions, recomputed)
        else:
            found.add(a.tensor)
    return found


def _form(body: Sequence[Statement], recomputed: frozenset[str]) -> tuple[list[list[Statement]], str | None]:
    """A part for each tensor in memory, with what it recomputes; or the tensor that some part cannot recompute."""
    definitions = {s.target.tensor: s for s in body if s.target.tensor in recomputed}
    parts = []
    for s in body:
        if s.target.tensor in recomputed:
            continue
        part = [s]
        for merge in (True, False):
            part, failed = _closure(s, definitions, merge)
            if failed is None and len(part) > 1 and kernel_shape(part) is None:
                failed = part[-2].target.tensor
            if failed is None:
                break
        if failed is not None:
            return [], failed
        parts.append(part)
    return parts, None


def _closure(s: Statement, definitions: Mapping[str, Statement], merge: bool) -> tuple[list[Statement], str | None]:
    """A statement after all that it recomputes; or what cannot be. merge: whether sums may share the names of other indices."""
    part = [s]
    while True:
        have = {t.target.tensor for t in part}
        missing = next((a.tensor for t in part for a in reads(t) if a.tensor in definitions and a.tensor not in have), None)
        if missing is None:
            return part, None
        to = _unify([definitions[missing]], part, {missing}, merge)
        if to is None:
            return part, missing
        part = [rename(definitions[missing], to), *part]


def _kept(program: Program, body: list[Statement]) -> set[str]:
    """Tensors that must be in memory: outputs, and what is updated in place or written at computed places."""
    names = [s.target.tensor for s in body]
    updated = {name for name in names if names.count(name) > 1}
    return {*program.results, *updated, *(s.target.tensor for s in body if not plain(s.target))}


def plain(access: Access) -> bool:
    """Whether every subscript is an index of its own."""
    names = [i.name for i in access.subscripts if isinstance(i, Index)]
    return len({*names}) == len(access.subscripts)


def _identifier(name: str) -> str:
    return name.replace(".", "_")


# ---------------------------------------------------------------------------------------------------------------------
# Joining


def _merge_one(parts: list[list[Statement]], kept: set[str], recomputed: frozenset[str], apart: frozenset[str]) -> list[list[Statement]] | None:
    """The parts after the first join that is legal and pays, or None: of a producer with its consumer, or of two that
    recompute the same."""
    writer = {s.target.tensor: n for n, part in enumerate(parts) for s in part if s.target.tensor not in recomputed}
    needs = [{writer[a.tensor] for s in part for a in reads(s) if a.tensor in writer} - {n} for n, part in enumerate(parts)]
    before = [_ancestors(n, needs) for n in range(len(parts))]
    for c, consumer in enumerate(parts):
        shares = {s.target.tensor for s in consumer} & recomputed
        beside = [n for n in range(c) if n not in before[c] and shares & {s.target.tensor for s in parts[n]}]
        for p in [*sorted(needs[c], reverse=True), *beside]:
            if any(p in before[x] for x in needs[c] if x != p):
                continue  # something between them waits for the producer
            if apart & {s.target.tensor for s in parts[p]} & {a.tensor for s in consumer for a in reads(s)}:
                continue
            joined = join(parts[p], consumer, kept, recomputed)
            if joined is not None:
                rest = [part for n, part in enumerate(parts) if n not in (p, c)]
                position = sum(1 for n in range(len(parts)) if n < c and n != p)
                return _sorted([*rest[:position], joined, *rest[position:]], recomputed)
    return None


def _ancestors(n: int, needs: Sequence[set[int]]) -> set[int]:
    found: set[int] = set()
    pending = [n]
    while pending:
        for m in needs[pending.pop()] - found:
            found.add(m)
            pending.append(m)
    return found


def _sorted(parts: list[list[Statement]], recomputed: frozenset[str]) -> list[list[Statement]]:
    """Parts in an order in which each comes after those that it reads, otherwise as they are."""
    writers: dict[str, list[int]] = {}
    for n, part in enumerate(parts):
        for s in part:
            if s.target.tensor not in recomputed:
                writers.setdefault(s.target.tensor, []).append(n)
    needs = [{m for s in part for a in (*reads(s), s.target) for m in writers.get(a.tensor, ()) if m != n} for n, part in enumerate(parts)]
    for n, part in enumerate(parts):  # several statements that update one tensor keep their order
        needs[n] -= {m for s in part for m in writers.get(s.target.tensor, ()) if m > n}
    order: list[int] = []
    while len(order) < len(parts):
        ready = next((n for n in range(len(parts)) if n not in order and needs[n] <= set(order)), None)
        assert ready is not None, "kernels wait for each other"
        order.append(ready)
    return [parts[n] for n in order]


def join(producer: list[Statement], consumer: list[Statement], kept: set[str], recomputed: frozenset[str]) -> list[Statement] | None:
    """The statements of both on one set of names, or None where they cannot share a kernel or should not."""
    written = {s.target.tensor for s in producer}
    if any(not plain(s.target) for s in producer) or any(s.target.tensor in kept and not plain(s.target) for s in consumer if s.reduced):
        return None
    shared = written & {s.target.tensor for s in consumer}
    if shared - recomputed:
        return None
    to = _unify(producer, consumer, written)
    if to is None:
        return None
    renamed = [rename(s, to) for s in producer]
    mine = {s.target.tensor: s for s in consumer}
    if any(t.target.tensor in shared and t.value != mine[t.target.tensor].value for t in renamed):
        return None
    first = [s for s in consumer if s.target.tensor in recomputed]
    joined = [*renamed, *(s for s in first if s.target.tensor not in shared), *(s for s in consumer if s.target.tensor not in recomputed)]
    grids = (set(grid_of(renamed)), set(grid_of(consumer)))
    if set(grid_of(joined)) not in grids:
        return None  # together they would have fewer programs than either
    return joined if kernel_shape(joined) is not None else None


def _unify(producer: list[Statement], consumer: list[Statement], written: set[str], merge: bool = True) -> dict[str, str] | None:
    """The producer's indices -> the consumer's, so that the elements handed over are the same."""
    targets = {s.target.tensor: s.target for s in producer}
    to: dict[str, str] = {}
    theirs_of = {s.target.tensor: s for s in consumer}
    for s in producer:  # what both recompute is one statement
        other = theirs_of.get(s.target.tensor)
        if other is not None:
            for a, b in zip((*free_indices(s.target), *s.reduced), (*free_indices(other.target), *other.reduced), strict=True):
                if to.setdefault(a, b) != b:
                    return None
    for s in consumer:
        for access in reads(s):
            if access.tensor not in written:
                continue
            if not plain(access):
                return None
            for mine, theirs in zip(targets[access.tensor].subscripts, access.subscripts, strict=True):
                assert isinstance(mine, Index) and isinstance(theirs, Index)
                if to.setdefault(mine.name, theirs.name) != theirs.name:
                    return None
    if len({*to.values()}) < len(to):
        return None
    theirs_size = {i: n for s in consumer for i, n in extents(s).items()}
    mine_size = {i: n for s in producer for i, n in extents(s).items()}
    if any(theirs_size[b] != mine_size[a] for a, b in to.items()):
        return None  # the consumer reads a part of it
    taken = {*theirs_size, *to.values()}
    for index in (i for i in mine_size if i not in to):
        same = _same_walk(index, mine_size[index], producer, consumer, to, theirs_size) if merge else None
        to[index] = same or fresh_name(index, taken)
        taken.add(to[index])
    return to


def _same_walk(index: str, size: int, producer: list[Statement], consumer: list[Statement], to: dict[str, str], sizes: Mapping[str, int]) -> str | None:
    """An index of the consumer under whose name an access of the producer is one of the consumer's: then the tile is loaded once."""
    theirs = {a for s in consumer for a in reads(s)}
    for other in (i for i, n in sizes.items() if n == size and i not in to.values()):
        renaming: dict[str, Expr] = {a: Index(b) for a, b in {**to, index: other}.items()}
        if any(index in free_indices(a) and substitute(a, renaming) in theirs for s in producer for a in reads(s)):
            return other
    return None


def rename(s: Statement, to: Mapping[str, str]) -> Statement:
    """A statement with its loop indices renamed."""
    names: dict[str, Expr] = {a: Index(b) for a, b in to.items()}
    target = substitute(s.target, names)
    assert isinstance(target, Access)
    return replace(s, ranges=tuple(replace(r, index=to.get(r.index, r.index)) for r in s.ranges), target=target, value=substitute(s.value, names))


def grid_of(part: Sequence[Statement]) -> tuple[str, ...]:
    """The indices that every statement has on its left: each program owns one element of them."""
    shared = set(free_indices(part[0].target))
    for s in part:
        shared &= set(free_indices(s.target))
    return tuple(i for i in free_indices(part[-1].target) if i in shared)


@dataclass(frozen=True, slots=True)
class KernelShape:
    """How a kernel walks its indices: `grid` in parallel, `stream` by a loop that all of its reductions over them share,
    `whole` in one tile. Other inner indices belong to single reductions. repeat: grid indices that not every statement has,
    so that each of their tiles computes the others again."""

    grid: tuple[str, ...]
    stream: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    repeat: tuple[str, ...] = ()


def kernel_shape(part: Sequence[Statement]) -> KernelShape | None:
    """How some statements can share a kernel, or None where they cannot or should not."""
    grid = grid_of(part)
    owned = set(grid)
    matrices = sum(contraction(s) is not None for s in part)
    if all(set(free_indices(s.target)) == owned for s in part):
        return KernelShape(grid) if matrices <= MAX_CONTRACTIONS else None
    if not grid:
        return None
    size = {i: n for s in part for i, n in extents(s).items()}
    rows = [math.prod(_padded(n) for i, n in extents(s).items() if i not in owned) for s in part]
    if not matrices and max(rows) <= RESIDENT_ROW:
        return KernelShape(grid, (), tuple(i for i in size if i not in owned))
    free = {i for s in part for i in free_indices(s.target)} - owned
    linking = {i for i in size if i in free and any(i in s.reduced for s in part)}
    candidates = {tuple(i for i in s.indices if i in s.reduced and i in linking) for s in part} - {()}
    for stream in sorted(candidates, key=lambda c: (-math.prod(size[i] for i in c), c)):
        if not _streams(part, set(stream)):
            continue
        whole = tuple(i for i in size if i in free and i not in stream)
        if _accumulators(part, stream, whole, size) <= WHOLE_TILE:
            return KernelShape(grid, stream, whole)
        # Accumulators that are too wide are cut; each cut makes the rest again.
        results = [s for s in part if not set(stream) & set(free_indices(s.target))]
        cut = tuple(i for i in whole if all(i in free_indices(s.target) for s in results) and not any(i in s.reduced for s in part))
        rest = tuple(i for i in whole if i not in cut)
        if len(cut) == 1 and -(-size[cut[0]] // WHOLE_TILE) <= MOST_REPEATS and _accumulators(part, stream, rest, size) <= WHOLE_TILE:
            return KernelShape((*grid, *cut), stream, rest, cut)
    return None


def _accumulators(part: Sequence[Statement], stream: tuple[str, ...], whole: tuple[str, ...], size: Mapping[str, int]) -> int:
    """Elements per row of what a streaming kernel keeps in registers."""
    held = [math.prod(_padded(size[i]) for i in whole if i in free_indices(s.target)) for s in part]
    return max(max(held), sum(n for n, s in zip(held, part, strict=True) if set(stream) & set(s.reduced)))


def _streams(part: Sequence[Statement], stream: set[str]) -> bool:
    """Whether every statement either has all streamed indices on its left, or reduces just them, or has none of them."""
    for s in part:
        left, over = stream & set(free_indices(s.target)), stream & set(s.reduced)
        if (left and left != stream) or (over and (left or set(s.reduced) != stream)):
            return False
    return True


def _padded(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


# ---------------------------------------------------------------------------------------------------------------------
# What a kernel reads, writes and costs


def _finish(name: str, part: list[Statement], needed: set[str], shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str]) -> KernelPlan:
    local = {s.target.tensor for s in part}
    updates = [s.target.tensor for s in part]
    stores = tuple(dict.fromkeys(t for t in updates if t in needed))
    read = tuple(dict.fromkeys(a.tensor for s in part for a in reads(s) if a.tensor not in local))
    size = {i: n for s in part for i, n in extents(s).items()}
    shape = kernel_shape(part) or KernelShape(grid_of(part))
    times = math.prod(-(-size[i] // WHOLE_TILE) for i in shape.repeat)
    flops = sum(statement_flops(s) * (1 if set(shape.repeat) <= set(s.indices) else times) for s in part)
    moved = sum(math.prod(shapes[t]) * DTYPES[dtypes[t]].bits // 8 for t in (*read, *stores))
    return KernelPlan(name, tuple(part), shape.grid, stores, read, stores, flops, moved, size, shape.stream, shape.whole, shape.repeat)


def statement_flops(s: Statement) -> int:
    """Floating-point operations of a statement, a multiply-add being two."""
    points = math.prod(extents(s).values())
    found = contraction(s)
    if found is not None:
        inner = sum(math.prod(extents(s)[i] for i in free_indices(e)) * cost(e) for e in (*found.lhs, *found.rhs))
        return int(2 * points + inner)
    return int(points * (cost(s.value) + bool(s.reduced)))


def accesses(part: Sequence[Statement]) -> Iterator[Access]:
    """Every access of some statements, targets included."""
    for s in part:
        for top in expressions(s):
            yield from (e for e in walk(top) if isinstance(e, Access))
