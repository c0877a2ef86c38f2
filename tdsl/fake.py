"""The sizes of a call's outputs where those of its arguments are symbols: what torch.compile and torch.export need of a call.

    def upsample(x[n]) -> Y[2*n]   on x of size s0   -->   Y of size 2*s0

Sizes as expressions come from the text (extents.py); inference on the numbers behind the symbols checks each of them. A size that
the text does not show becomes the number that it was, which ties what is traced to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from tdsl.affine import Bound
from tdsl.arguments import hint
from tdsl.extents import Sizes, as_expr, loop_ranges, symbolic_ranges
from tdsl.ir import Access, Call, Const, Expr, Index, Loop, Program, Size, Statement

Shape = tuple[Expr | None, ...]


class SizeRules:
    """The sizes of everything that a flat program writes, as expressions over the sizes and integers among its inputs."""

    def __init__(self, program: Program):
        self.inputs = program.inputs
        self.sizes = Sizes(program)
        self.shapes: dict[str, Shape] = {}
        for node in program.body:
            self._note(node, {})

    def _note(self, node: Statement | Loop, outer: Mapping[str, tuple[Bound, Bound]]) -> None:
        if isinstance(node, Loop):
            inside = {**outer, **loop_ranges(node, self.sizes)}
            for child in node.body:
                self._note(child, inside)
        elif node.target.tensor not in self.sizes.shapes:
            found = symbolic_ranges(node, self.sizes, outer)
            self.shapes[node.target.tensor] = tuple(
                as_expr(found[s.name][1]) if isinstance(s, Index) and s.name in found else None for s in node.target.subscripts
            )
            self.sizes.note(node, outer)

    def shape(self, name: str) -> Shape:
        """The sizes of a tensor; None in a place that the text does not show."""
        return self.shapes.get(name) or self.sizes.shapes.get(name, ())

    def shapes_for(self, names: Iterable[str], args: Sequence[Any], found: Sequence[tuple[int, ...]]) -> list[tuple[Any, ...]]:
        """The shapes of some outputs, with symbols. args: tensors with symbolic sizes, and numbers. found: the shapes of these
        outputs for the numbers behind the symbols."""
        given = dict(zip(self.inputs, args, strict=True))
        shapes = []
        for name, numbers in zip(names, found, strict=True):
            rule: Shape = self.shape(name)
            shapes.append(tuple(self._size(rule[d] if d < len(rule) else None, given, n) for d, n in enumerate(numbers)))
        return shapes

    def _size(self, rule: Expr | None, given: Mapping[str, Any], number: int) -> Any:
        size = None if rule is None else self._value(rule, given, 0)
        return number if size is None or hint(size) != number else size

    def _value(self, e: Expr, given: Mapping[str, Any], depth: int) -> Any:
        """The value of a size expression, a symbol where an argument's size is one; None where it is not known."""
        match e:
            case Const(value=value):
                return value
            case Access(tensor=name, subscripts=()):
                number = given.get(name)
                return number if isinstance(number, int | torch.SymInt) else None
            case Size(tensor=name, dim=dim):
                if name in given:
                    return given[name].shape[dim]
                rule = self.shape(name)
                inner = rule[dim] if dim < len(rule) and depth < 16 else None
                return None if inner is None else self._value(inner, given, depth + 1)
            case Call(op=op, args=operands) if op in _ARITHMETIC:
                values = [self._value(a, given, depth) for a in operands]
                return None if any(v is None for v in values) else _ARITHMETIC[op](*values)
        return None


_ARITHMETIC: dict[str, Any] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "neg": lambda a: -a,
    "floordiv": lambda a, b: a // b,
    "mod": lambda a, b: a % b,
    "maximum": lambda a, b: torch.sym_max(a, b),
    "minimum": lambda a, b: torch.sym_min(a, b),
}


def agree(program: Program, args: Sequence[Any]) -> None:
    """Ties symbols together that the signature gives one name; sizes that differ have been an error of inference before."""
    first: dict[str, Any] = {}
    for param, arg in zip(program.params, args, strict=True):
        for dim, name in enumerate(param.dims):
            size = arg.shape[dim]
            other = first.setdefault(name, size)
            if other is not size and (isinstance(other, torch.SymInt) or isinstance(size, torch.SymInt)):
                torch._check(size == other)
