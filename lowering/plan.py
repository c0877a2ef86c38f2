"""Which statements share a kernel, and which tensors live in memory.

A kernel runs one or more statements for each element of its grid indices; all its other indices are walked inside.
Statements join where one reads what the other computes for the same grid element:

    S[i,j] += A[i,k]*B[k,j];  Y[i,j] = relu(S[i,j] + b[j])     one kernel, S stays in registers (an epilogue)
    m[i] max= X[i,j];  l[i] += exp(X[i,j]-m[i]);  ...          one kernel, a row fits in registers
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from lowering.contraction import statement_flops
from lowering.grouping import grouped
from lowering.join import rename, unify
from lowering.kernel_shape import WHOLE_TILE, KernelShape, grid_of, kernel_shape
from lowering.normalize import compared
from lowering.recompute import Choice, recompute
from lowering.statement import extents, identifier, ordered, plain, tensor_bytes
from lowering.targets import Target
from tdsl.errors import ArgumentError
from tdsl.ir import Program, Range, Statement, reads, statements
from tdsl.printer import print_statement
from tdsl.traced import with_symbols


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

    def waits_for(self, earlier: KernelPlan) -> bool:
        """Whether this kernel must run after an earlier one: it reads what that one writes, or writes what that one reads or writes."""
        return bool({*earlier.writes} & {*self.reads, *self.writes} or {*earlier.reads} & {*self.writes})

    @property
    def notation(self) -> str:
        """The statements as text; a size that they count with by its name, where the kernel serves others too."""
        with with_symbols():
            return "\n".join(print_statement(replace(s, ranges=tuple(Range(r.index) for r in s.ranges))) for s in self.statements)

    @property
    def inner(self) -> tuple[str, ...]:
        """The indices that each program walks itself."""
        return tuple(i for i in self.extents if i not in self.grid)


@dataclass(frozen=True, slots=True)
class Plan:
    """kernels: in launch order. memory: bytes of each intermediate that lives in memory. program: what the kernels run.
    recomputed: intermediates that kernels make again for themselves, by the cost model; choices: what was weighed for each."""

    kernels: tuple[KernelPlan, ...]
    memory: Mapping[str, int]
    program: Program
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    recomputed: frozenset[str] = frozenset()
    choices: tuple[Choice, ...] = ()

    @property
    def updated(self) -> set[str]:
        """Tensors whose memory more than one statement writes, or that held something before."""
        written = [s.target.tensor for k in self.kernels for s in k.statements if s.target.tensor in k.stores]
        return {t for t in written if written.count(t) > 1 or t in self.program.inputs}

    def made_again(self, kernel: KernelPlan) -> tuple[str, ...]:
        """What a kernel makes for itself although others make it too, instead of one of them writing it to memory."""
        elsewhere = {s.target.tensor for k in self.kernels if k.name != kernel.name for s in k.statements}
        made = (s.target.tensor for s in kernel.statements)
        return tuple(dict.fromkeys(t for t in made if t not in kernel.stores and t in elsewhere | self.recomputed))

    def __str__(self) -> str:
        lines = []
        for k in self.kernels:
            lines.append(
                f"{k.name}: grid {', '.join(k.grid) or '1'}; inside {', '.join(k.inner) or '-'}; {k.flops:,} FLOPs, {k.bytes:,} bytes"
            )
            lines.append(f"  reads {', '.join(k.reads) or '-'}; writes {', '.join(k.writes)}")
            lines += [f"    {line}" for line in k.notation.splitlines()]
        memory = ", ".join(f"{name} ({size:,} bytes)" for name, size in self.memory.items())
        weighed = [f"  {choice}" for choice in self.choices]
        return "\n".join([*lines, f"in memory between kernels: {memory or 'nothing'}", *(["weighed:", *weighed] if weighed else [])])


def plan(
    program: Program,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, str],
    target: Target,
    apart: frozenset[str] = frozenset(),
    pinned: frozenset[str] = frozenset(),
    alone: frozenset[str] = frozenset(),
) -> Plan:
    """Groups the statements of a normalised program into kernels. shapes and dtypes: of every tensor, by name.

    apart: partial results, which other programs wait for: their statements end a kernel. pinned: intermediates that a user wants made
    again in whatever reads them; ArgumentError where one cannot be. alone: products that join no kernel which walks their rows or columns
    or makes another product.
    """
    body = list(statements(program.body))
    kept = _kept(program, body)
    recomputed, choices = recompute(body, kept | apart | compared(body), shapes, dtypes, target, pinned)
    while True:
        parts, failed = _form(body, recomputed)
        if failed is None:
            break
        recomputed = recomputed - {failed}
        reason = "no single kernel can make it again for what reads it"
        choices = tuple(replace(c, chosen="make once", reason=reason) if c.subject == failed else c for c in choices)
    for name in sorted(pinned & {s.target.tensor for s in body} - recomputed):
        why = next((c.reason for c in choices if c.subject == name), "it is compared for equality, or several statements write it")
        raise ArgumentError(f"{name} cannot be made again in what reads it: {why}", help=f'leave {name} out, or pin it to be stored: "store"')
    splits = target.backend in ("cuda", "hip")
    parts = grouped(parts, kept, recomputed, apart, splits, alone)
    kernels = []
    for n, part in enumerate(parts):
        later = {a.tensor for other in parts[n + 1 :] for s in other for a in reads(s)}
        kernels.append(kernel_of(f"{identifier(program.name)}_{n}", part, (kept | later) - recomputed, shapes, dtypes))
    outside = {*program.inputs, *program.results}
    memory = {t: tensor_bytes(shapes[t], dtypes[t]) for k in kernels for t in k.writes if t not in outside}
    return Plan(tuple(kernels), memory, program, shapes, dtypes, recomputed, choices)


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
        to = unify([definitions[missing]], part, {missing}, merge)
        if to is None:
            return part, missing
        part = [rename(definitions[missing], to), *part]


def _kept(program: Program, body: list[Statement]) -> set[str]:
    """Tensors that must be in memory: outputs, and what is updated in place or written at computed places."""
    names = [s.target.tensor for s in body]
    updated = {name for name in names if names.count(name) > 1}
    return {*program.results, *updated, *(s.target.tensor for s in body if not plain(s.target))}


def kernel_of(
    name: str, part: Sequence[Statement], needed: set[str], shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str]
) -> KernelPlan:
    """The kernel of some statements. needed: tensors that outlive it."""
    part = ordered(part)
    local = {s.target.tensor for s in part}
    stores = tuple(dict.fromkeys(s.target.tensor for s in part if s.target.tensor in needed))
    read = tuple(dict.fromkeys(a.tensor for s in part for a in reads(s) if a.tensor not in local))
    size = {i: n for s in part for i, n in extents(s).items()}
    shape = kernel_shape(part) or KernelShape(grid_of(part))
    times = math.prod(-(-size[i] // WHOLE_TILE) for i in shape.repeat)
    flops = sum(statement_flops(s) * (1 if set(shape.repeat) <= set(s.indices) else times) for s in part)
    moved = sum(tensor_bytes(shapes[t], dtypes[t]) for t in (*read, *stores))
    return KernelPlan(name, tuple(part), shape.grid, stores, read, stores, flops, moved, size, shape.stream, shape.whole, shape.repeat)
