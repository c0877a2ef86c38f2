"""Which parts of a program share a kernel: producers joined with their consumers, and parts that read or recompute the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from lowering.contraction import contraction
from lowering.join import join
from lowering.kernel_shape import walked_products
from lowering.statement import extents, plain
from tdsl.ir import Statement, reads


@dataclass(eq=False)
class _Part:
    """The statements of a kernel to be, and what the search asks of them again and again. Compared by identity."""

    statements: list[Statement]
    read: frozenset[str] = field(init=False)
    written: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        self.read = frozenset(a.tensor for s in self.statements for a in reads(s))
        self.written = frozenset(s.target.tensor for s in self.statements)

    @cached_property
    def walks(self) -> frozenset[tuple[str, tuple[int, ...]]]:
        """The large tensors that a part reduces, each with the sizes of the loops around it; none where it does more than reduce."""
        if any(contraction(s) is not None or not plain(s.target) for s in self.statements) or not any(s.reduced for s in self.statements):
            return frozenset()
        return frozenset((a.tensor, tuple(sorted(extents(s).values()))) for s in self.statements for a in reads(s) if len(a.subscripts) > 1)


def grouped(
    parts: Sequence[list[Statement]],
    kept: set[str],
    recomputed: frozenset[str],
    apart: frozenset[str],
    splits: bool,
    alone: frozenset[str] = frozenset(),
) -> list[list[Statement]]:
    """Parts in the order in which they run, with every join made that is legal and pays.

    kept: tensors that must be in memory. recomputed: those that every part makes for itself. apart: those that no other part of
    these may wait for. splits: whether a long stream of few programs gets parts of its own later. alone: products that share no kernel
    which walks their rows or columns or makes another one.
    """
    search = _Grouping(kept, recomputed, apart, splits, alone)
    found = [_Part(part) for part in parts]
    while (merged := search.step(found)) is not None:
        found = merged
    return [part.statements for part in found]


class _Grouping:
    def __init__(self, kept: set[str], recomputed: frozenset[str], apart: frozenset[str], splits: bool, alone: frozenset[str]):
        self.kept, self.recomputed, self.apart, self.splits, self.alone = kept, recomputed, apart, splits, alone
        # What was refused is refused again as long as neither part changes; the tuples keep the parts, and so their identities, alive.
        self.refused: set[tuple[_Part, _Part]] = set()

    def step(self, parts: list[_Part]) -> list[_Part] | None:
        """The parts after the first join, or None: of a producer with its consumer, or of two that read or recompute the same."""
        counts = Counter(s.target.tensor for part in parts for s in part.statements if s.target.tensor not in self.recomputed)
        updated = {t for t, n in counts.items() if n > 1}  # writes of one tensor keep their order
        needs = self._waits(parts)
        before = [_ancestors(n, needs) for n in range(len(parts))]
        for c, consumer in enumerate(parts):
            if updated & consumer.written:
                continue
            shares = consumer.written & self.recomputed
            beside = [n for n in range(c) if n not in before[c] and (shares & parts[n].written or _reads_same(parts[n], consumer))]
            for p in [*sorted(needs[c], reverse=True), *beside]:
                if any(p in before[x] for x in needs[c] if x != p):
                    continue  # something between them waits for the producer
                if updated & parts[p].written or self.apart & parts[p].written & consumer.read:
                    continue
                joined = self._join(parts[p], consumer)
                if joined is not None:
                    rest = [part for n, part in enumerate(parts) if n not in (p, c)]
                    position = sum(1 for n in range(len(parts)) if n < c and n != p)
                    return self._sorted([*rest[:position], joined, *rest[position:]])
        return None

    def _join(self, producer: _Part, consumer: _Part) -> _Part | None:
        if (producer, consumer) in self.refused:
            return None
        joined = join(producer.statements, consumer.statements, self.kept, self.recomputed, self.splits)
        if joined is None or self.alone & {*walked_products(joined)}:
            self.refused.add((producer, consumer))
            return None
        return _Part(joined)

    def _waits(self, parts: Sequence[_Part]) -> list[set[int]]:
        """For each part those that it comes after: which write what it reads, or wrote before it what it updates."""
        writers: dict[str, list[int]] = {}
        for n, part in enumerate(parts):
            for name in part.written - self.recomputed:
                writers.setdefault(name, []).append(n)
        return [
            {m for name in part.read for m in writers.get(name, ()) if m != n}
            | {m for name in part.written for m in writers.get(name, ()) if m < n}
            for n, part in enumerate(parts)
        ]

    def _sorted(self, parts: list[_Part]) -> list[_Part]:
        """Parts in an order in which each comes after those that it reads, otherwise as they are."""
        needs = self._waits(parts)
        order: list[int] = []
        while len(order) < len(parts):
            ready = next((n for n in range(len(parts)) if n not in order and needs[n] <= set(order)), None)
            assert ready is not None, "kernels wait for each other"
            order.append(ready)
        return [parts[n] for n in order]


def _reads_same(a: _Part, b: _Part) -> bool:
    """Whether two parts reduce the same large tensor over the same elements: together they read it once."""
    names = [{name for name, _ in part.walks} for part in (a, b)]
    sizes = [{size for _, size in part.walks} for part in (a, b)]
    return bool(names[0] & names[1]) and sizes[0] == sizes[1]


def _ancestors(n: int, needs: Sequence[set[int]]) -> set[int]:
    found: set[int] = set()
    pending = [n]
    while pending:
        for m in needs[pending.pop()] - found:
            found.add(m)
            pending.append(m)
    return found
