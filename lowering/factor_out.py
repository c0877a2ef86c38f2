"""Factors that do not vary along a sum leave it: one multiplication after the loop in place of one per term.

t[c] = x[c] * r;  u[c] = -t[c];  s = sum of u along c      -->      s1 = sum of x along c;  s2 = s1 * r;  s = -s2
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from lowering import tile_ir as ir
from tdsl.ir import free_indices
from tdsl.ops import DTYPES


def factor_out(kernel: ir.Kernel) -> ir.Kernel:
    """`kernel` with such factors outside of its float sums. Sums of nothing stay as they are: 0 * inf is no 0."""
    return replace(kernel, body=_Outside(kernel).block(kernel.body))


class _Outside:
    def __init__(self, kernel: ir.Kernel):
        self.kernel = kernel
        everything = list(ir.operations(kernel.body))
        self.makers = {op.dst.name: op for op in everything if isinstance(op, ir.Elementwise)}
        self.changing = {op.dst.name for op in everything if isinstance(op, ir.Assign)}
        self.taken = {op.dst.name for op in everything if not isinstance(op, ir.For | ir.Store)} | {b.name for b in kernel.buffers}
        self.taken |= {i for a in kernel.axes for i, _ in a.indices} | {a.name for a in kernel.axes}
        self.uses: Counter[str] = Counter()
        for op in everything:
            self.uses.update(_names(op))
        self.gone: set[str] = set()

    def block(self, body: tuple[ir.Operation, ...]) -> tuple[ir.Operation, ...]:
        """One body; what only fed a sum is left out of it."""
        result: list[ir.Operation] = []
        for op in body:
            if isinstance(op, ir.For):
                result.append(replace(op, body=self.block(op.body)))
            elif isinstance(op, ir.Fold) and op.reduction == "sum" and DTYPES[op.dst.dtype].kind == "float":
                result += self.outside(op)
            else:
                result.append(op)
        return tuple(op for op in result if not (isinstance(op, ir.Elementwise) and op.dst.name in self.gone))

    def outside(self, op: ir.Fold) -> list[ir.Operation]:
        """A sum of what is left when all such factors are taken off, and then the factors."""
        if any(self.kernel.axis(a).extent == 0 for a in op.axes):
            return [op]
        after: list[tuple[ir.Elementwise, int]] = []
        src = op.src
        while (found := self.factor(src, op)) is not None:
            maker, position = found
            after.append(found)
            inner = maker.args[position]
            assert isinstance(inner, ir.Value)
            self.gone.add(src.name)
            src = inner
        if not after:
            return [op]
        value = replace(op.dst, name=self.fresh(op.dst.name))
        made: list[ir.Operation] = [replace(op, dst=value, src=src)]
        for n, (maker, position) in enumerate(reversed(after)):
            last = n + 1 == len(after)
            result = op.dst if last else replace(op.dst, name=self.fresh(op.dst.name))
            args = tuple(value if k == position else a for k, a in enumerate(maker.args))
            made.append(replace(maker, dst=result, args=args))
            value = result
        return made

    def factor(self, v: ir.Value, op: ir.Fold) -> tuple[ir.Elementwise, int] | None:
        """How a term that nothing else reads is made of one with the same axes and a factor without the summed ones."""
        maker = self.makers.get(v.name)
        if maker is None or self.uses[v.name] != 1 or maker.op not in ("mul", "div", "neg"):
            return None
        for position, a in enumerate(maker.args if maker.op == "mul" else maker.args[:1]):
            others = [x for n, x in enumerate(maker.args) if n != position]
            fits = isinstance(a, ir.Value) and a.axes == v.axes and a.dtype == v.dtype
            free = all(not isinstance(x, ir.Value) or (not {*x.axes} & {*op.axes} and x.name not in self.changing) for x in others)
            if fits and free:
                return maker, position
        return None

    def fresh(self, base: str) -> str:
        number = 1
        while f"{base}_{number}" in self.taken:
            number += 1
        self.taken.add(f"{base}_{number}")
        return f"{base}_{number}"


def _names(op: ir.Operation) -> list[str]:
    """The values that an operation reads, once for each time."""
    match op:
        case ir.Elementwise(args=args):
            return [a.name for a in args if isinstance(a, ir.Value)]
        case ir.Dot(lhs=lhs, rhs=rhs, acc=acc):
            return [v.name for v in (lhs, rhs, acc) if v is not None]
        case ir.Fold(src=src) | ir.Mask(src=src) | ir.Assign(src=src):
            return [src.name]
        case ir.Store(src=src, subscripts=subscripts):
            return [src.name, *(i for e in subscripts for i in free_indices(e))]
        case ir.Load(subscripts=subscripts):
            return [i for e in subscripts for i in free_indices(e)]
        case ir.IndexOf(expr=expr):
            return list(free_indices(expr))
    return []
