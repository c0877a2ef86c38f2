"""Every version of a tensor gets a name of its own.

    Y[i] = A[i]              -->   Y.v1[i] = A[i]
    Y[i] += B[i,k]                 Y.part[i] += B[i,k]
                                   Y[i] = Y.v1[i] + Y.part[i]

A later write that covers only a part of its target, as far as the text shows, updates the older version in place, or a
copy of it where something reads the older version: several statements that write one name, which nothing reads between.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from tdsl.errors import SelfRead
from tdsl.expand import witness
from tdsl.extents import Sizes, as_expr, symbolic_ranges
from tdsl.ir import (
    REDUCTION_OF,
    Access,
    Call,
    Const,
    Expr,
    Index,
    Loop,
    Program,
    Range,
    Size,
    Statement,
    fresh_name,
    reads,
    rebuild_range,
    rename_tensors,
    statements,
)
from tdsl.ops import REDUCTIONS

_COMBINE = {"+=": "add", "*=": "mul", "max=": "maximum", "min=": "minimum"}


def ssa(program: Program, shapes: Mapping[str, tuple[int, ...]] | None = None, *, differentiable: bool = False) -> Program:
    """`program` with one name per version. An input keeps its name; so does the last version of any other tensor.

    shapes: of all tensors, where ranges are numbers already; then they tell which writes cover their target. differentiable: a
    version is a sum of updates, or the greatest (least) of a start and updates; products get a tensor of their own:

        Y[p[i]] *= x[i]   -->   Y.part[n0] = 1;  Y.part[p[i]] *= x[i];  Y[n0] = Y.v1[n0] * Y.part[n0]
    """
    return _Renamer(program, shapes, differentiable).run()


def versions(program: Program, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Program, dict[str, str], dict[str, str]]:
    """`ssa`, which tensor each new name is a version of, and of which each part is. Of a step of an ordered loop: whether a statement
    may read its own target was settled with the loop around it."""
    renamer = _Renamer(program, shapes, within=True)
    return renamer.run(), renamer.made, renamer.parts


def covers(statement: Statement, shape: tuple[int, ...] | None = None) -> bool:
    """Whether a statement writes every element of a target that exists already; without its shape, as far as the text shows."""
    names = [s.name for s in statement.target.subscripts if isinstance(s, Index)]
    if shape is not None:
        full = {r.index: r.hi.value for r in statement.ranges if r.lo == Const(0) and isinstance(r.hi, Const)}
        return len(set(names)) == len(shape) and all(full.get(i) == n for i, n in zip(names, shape, strict=True))
    explicit = {r.index for r in statement.ranges if r.lo is not None}
    return len(set(names)) == len(statement.target.subscripts) and not explicit & set(names)


class _Renamer:
    def __init__(self, program: Program, shapes: Mapping[str, tuple[int, ...]] | None, differentiable: bool = False, within: bool = False):
        self.program = program
        self.within = within
        self.shapes = shapes
        self.differentiable = differentiable
        self.updates: dict[str, list[str]] = {}  # the operators that wrote the current version of a tensor
        self.made: dict[str, str] = {}  # version -> tensor
        self.parts: dict[str, str] = {}  # what is added to an older version -> tensor
        self.taken = {*program.inputs, *(s.target.tensor for s in statements(program.body))}
        self.current = {name: name for name in program.inputs}
        self.left = Counter(name for node in program.body for name in {s.target.tensor for s in statements((node,))})
        self.sizes = {o.name: o.sizes for o in program.outputs if o.sizes is not None}
        self.out: list[Statement | Loop] = []
        self.fills: dict[str, Statement] = {}
        self.extents = Sizes(program)

    def run(self) -> Program:
        for n, node in enumerate(self.program.body):
            if isinstance(node, Loop):
                self._loop(node, n)
            else:
                self._statement(node, n)
            self.extents.note(node)
        outputs = tuple(replace(o, name=self.current[o.name]) for o in self.program.outputs)
        return replace(self.program, body=tuple(self.out), outputs=outputs)

    def _version(self, name: str) -> str:
        """The name of the next version of `name`."""
        self.left[name] -= 1
        last = self.left[name] == 0 and name not in self.program.inputs
        fresh = name if last else fresh_name(f"{name}.v1", self.taken)
        number = 2
        while not last and fresh in self.taken:
            fresh = f"{name}.v{number}"
            number += 1
        self.taken.add(fresh)
        if fresh != name:
            self.made[fresh] = name
        self.updates[name] = []
        return fresh

    def _joins(self, name: str, op: str) -> bool:
        """Whether the derivative of a version stays one formula with one more update."""
        before = self.updates.get(name, [])
        if op in ("max=", "min="):
            return before[1:] == [op] * len(before[1:]) and before[:1] in (["="], [op])
        return op != "*=" and not {"*=", "max=", "min="} & set(before)

    def _updatable(self, name: str, position: int, op: str) -> bool:
        """Whether the current version of `name` may be updated in place: it is no input, and nothing reads it up to this statement."""
        if self.current[name] in self.program.inputs or (self.differentiable and not self._joins(name, op)):
            return False
        for node in reversed(self.program.body[: position + 1]):
            writes = any(t.target.tensor == name for t in statements((node,)))
            if isinstance(node, Loop) and writes and not self.differentiable:
                return True  # what it reads of its own target, it reads before; a gradient reads it again afterwards
            if any(a.tensor == name for a in reads(node)):
                return False
            if node is not self.program.body[position] and writes:
                return True
        return False

    def _statement(self, s: Statement, position: int) -> None:
        name = s.target.tensor
        old = self.current.get(name)
        whole = covers(s, None if self.shapes is None else self.shapes[name])
        if not self.within:
            check_self_read(s)
        value, ranges = self._renamed(s.value), tuple(rebuild_range(r, self._renamed) for r in s.ranges)
        target = replace(s.target, subscripts=tuple(self._renamed(e) for e in s.target.subscripts))
        if old is not None and not whole and self._updatable(name, position, s.op):
            self.left[name] -= 1
            self._rename_last(name, old)
            self.updates.setdefault(name, []).append(s.op)
            target = replace(target, tensor=self.current[name])
            self.out.append(replace(s, ranges=ranges, target=target, value=value))
            return
        new = self._version(name)
        target = replace(target, tensor=new)
        if new != name or old is not None:
            ranges = self._settled(s, ranges, value)
        if old is None or (s.op == "=" and whole):
            if new != name and not whole:
                self._fill(name, new, s.op)
            self.out.append(replace(s, ranges=ranges, target=target, value=value))
        elif whole:
            if s.reduced:
                part = fresh_name(f"{name}.part", self.taken)
                self.taken.add(part)
                self.parts[part] = name
                self.out.append(replace(s, ranges=ranges, target=replace(target, tensor=part), value=value))
                value = replace(target, tensor=part)
                ranges = tuple(r for r in ranges if r.index not in s.reduced)
            older = replace(target, tensor=old)
            self.out.append(replace(s, ranges=ranges, target=target, op="=", value=Call(_COMBINE[s.op], (older, value))))
        elif self.differentiable and s.op == "*=":
            self.out += self._product(replace(s, ranges=ranges, target=target, value=value), name, old)
        else:
            self.out.append(copy(old, new, len(target.subscripts), None if self.shapes is None else self.shapes[name]))
            self.out.append(replace(s, ranges=ranges, target=target, value=value))
        copied = old is not None and not whole
        self.updates[name] = ["=", *([s.op] if s.op != "*=" else [])] if copied else ["=" if old is not None else s.op]
        self.current[name] = new

    def _product(self, s: Statement, name: str, old: str) -> list[Statement]:
        """A product onto some elements of an older version: what they are multiplied by, and the product of the two."""
        part = fresh_name(f"{name}.part", self.taken)
        self.taken.add(part)
        indices = tuple(Index(f"n{d}") for d in range(len(s.target.subscripts)))
        ranges = tuple(Range(i.name, Const(0), Size(old, d)) for d, i in enumerate(indices))
        ones = Statement(ranges, Access(part, indices), "=", Const(1))
        value = Call("mul", (Access(old, indices), Access(part, indices)))
        plain = tuple(Range(i.name) for i in indices)
        return [ones, replace(s, target=replace(s.target, tensor=part)), Statement(plain, Access(s.target.tensor, indices), "=", value, s.span)]

    def _settled(self, s: Statement, ranges: tuple[Range, ...], value: Expr) -> tuple[Range, ...]:
        """Explicit bounds for an index that only the target settled, by its older version or the signature: a version has neither."""
        if self.shapes is not None or all(r.lo is not None or witness(r.index, value) is not None for r in ranges):
            return ranges
        found = symbolic_ranges(s, self.extents)
        settled = []
        for r in ranges:
            if r.lo is None and r.index in found and witness(r.index, value) is None:
                lo, hi = (self._renamed(as_expr(b)) for b in found[r.index])
                r = replace(r, lo=lo, hi=hi)
            settled.append(r)
        return tuple(settled)

    def _rename_last(self, name: str, old: str) -> None:
        """Gives the last version of `name` its own name, where it is updated in place after it got that of an earlier one."""
        if self.left[name] or name in self.program.inputs:
            return
        to = {old: name}
        fill = self.fills.get(old)  # the output itself has the signature's size without it
        self.out = [
            _rename_loop(node, to)
            if isinstance(node, Loop)
            else node
            if node.target.tensor != old
            else replace(node, target=rename_target(node.target, to))
            for node in self.out
            if node is not fill
        ]
        self.current[name] = name

    def _fill(self, name: str, new: str, op: str) -> None:
        """An older version of an output has the size that the signature gives it, whatever its first write covers."""
        sizes = self.sizes.get(name)
        if sizes is None or any(size is None for size in sizes):
            return
        indices = tuple(Index(f"n{d}") for d in range(len(sizes)))
        if self.shapes is not None:
            sizes = tuple(Const(n) for n in self.shapes[name])
        ranges = tuple(Range(i.name, Const(0), size) for i, size in zip(indices, sizes, strict=True))
        identity = REDUCTIONS[REDUCTION_OF[op]].identity if op in REDUCTION_OF else 0.0
        identity = int(identity) if math.isfinite(identity) else identity  # an int raises no dtype
        self.fills[new] = Statement(ranges, Access(new, indices), "=", Const(identity))
        self.out.append(self.fills[new])

    def _loop(self, node: Loop, position: int) -> None:
        """A loop reads and writes one buffer throughout: what was written before it is continued in place, or in a copy."""
        targets = {s.target.tensor: s for s in statements((node,))}
        for name, s in sorted(targets.items()):
            old = self.current.get(name)
            if old is not None and self._continues(name, position):
                self.left[name] -= 1
                self._rename_last(name, old)
                continue
            new = self._version(name)
            if old is not None:
                self.out.append(copy(old, new, len(s.target.subscripts), None if self.shapes is None else self.shapes[name]))
            elif new != name:
                self._fill(name, new, s.op)
            self.current[name] = new
        for s in statements((node,)):
            self.updates.setdefault(s.target.tensor, []).append(f"{s.op} in a loop")
        self.out.append(_rename_loop(node, self.current))

    def _continues(self, name: str, position: int) -> bool:
        """Whether a loop may go on with the current version of `name`: it is no input, and nothing but the loop reads it."""
        if self.current[name] in self.program.inputs or (self.differentiable and {"*=", "max=", "min="} & set(self.updates.get(name, []))):
            return False
        for node in reversed(self.program.body[:position]):
            if any(t.target.tensor == name for t in statements((node,))):
                return isinstance(node, Statement)
            if any(a.tensor == name for a in reads(node)):
                return False
        return False

    def _renamed(self, expr: Expr) -> Expr:
        return rename_tensors(expr, self.current)


def _rename_loop(node: Loop, to: dict[str, str]) -> Loop:
    def visit(e: Expr) -> Expr:
        return rename_tensors(e, to)

    def child(n: Statement | Loop) -> Statement | Loop:
        if isinstance(n, Loop):
            return _rename_loop(n, to)
        target = visit(n.target)
        assert isinstance(target, Access)
        return replace(n, ranges=tuple(rebuild_range(r, visit) for r in n.ranges), target=target, value=visit(n.value))

    ranges = tuple(rebuild_range(r, visit) for r in node.ranges)
    return replace(node, ranges=ranges, body=tuple(child(n) for n in node.body))


def rename_target(target: Access, to: dict[str, str]) -> Access:
    """A target under the name that `to` gives it."""
    return replace(target, tensor=to.get(target.tensor, target.tensor))


def copy(old: str, new: str, rank: int, shape: tuple[int, ...] | None) -> Statement:
    """`new[n0,n1,..] = old[n0,n1,..]` over the whole tensor."""
    indices = tuple(Index(f"n{d}") for d in range(rank))
    ranges = [Range(i.name) if shape is None else Range(i.name, Const(0), Const(shape[d])) for d, i in enumerate(indices)]
    return Statement(tuple(ranges), Access(new, indices), "=", Access(old, indices))


def check_self_read(s: Statement) -> None:
    """A statement outside an ordered loop may read its own target only where it writes it, and only without reducing."""
    for access in reads(s):
        if access.tensor == s.target.tensor and (access.subscripts != s.target.subscripts or s.reduced):
            raise SelfRead(
                f"{access.tensor} is read while it is written, at other elements or several times per element",
                span=access.span or s.span,
                help="write `for ordered i:` for a recurrence over i, or give the result a name of its own",
            )
