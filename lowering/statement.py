"""Small facts about statements and tensors that every stage asks for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tdsl.ir import Access, Const, Expr, Index, Statement, reads, rebuild, substitute
from tdsl.ops import DTYPES
from tdsl.traced import whole


def extents(s: Statement) -> dict[str, int]:
    """How many values each loop index takes, for a statement with constant ranges from zero."""
    return {r.index: whole(r.hi.value) for r in s.ranges if isinstance(r.hi, Const)}


def plain(access: Access) -> bool:
    """Whether every subscript is an index of its own."""
    names = [i.name for i in access.subscripts if isinstance(i, Index)]
    return len({*names}) == len(access.subscripts)


def inlined(expr: Expr, definitions: Mapping[str, Statement]) -> Expr:
    """`expr` with tensors replaced by the elementwise statements that define them."""
    expr = rebuild(expr, lambda e: inlined(e, definitions))
    if isinstance(expr, Access) and expr.tensor in definitions:
        s = definitions[expr.tensor]
        to = {i.name: e for i, e in zip(s.target.subscripts, expr.subscripts, strict=True) if isinstance(i, Index)}
        return inlined(substitute(s.value, to), definitions)
    return expr


def ordered(statements: Sequence[Statement]) -> list[Statement]:
    """Some statements, each after those that make what it reads, otherwise as they are."""
    pending = list(statements)
    found: list[Statement] = []
    while pending:
        left = {s.target.tensor for s in pending}
        ready = next(s for s in pending if not {a.tensor for a in reads(s)} & (left - {s.target.tensor}))
        pending.remove(ready)
        found.append(ready)
    return found


def tensor_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """The bytes of a dense tensor."""
    return math.prod(shape) * DTYPES[dtype].bits // 8


def power_of_two(n: int) -> int:
    """The next power of two, at least 1."""
    return 1 << max(0, n - 1).bit_length()


def identifier(name: str) -> str:
    """A tensor's name as a Python identifier."""
    return name.replace(".", "_")
