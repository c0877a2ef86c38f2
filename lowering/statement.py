"""Small facts about statements and tensors that every stage asks for."""

from __future__ import annotations

import math

from tdsl.ir import Access, Const, Index, Statement
from tdsl.ops import DTYPES


def extents(s: Statement) -> dict[str, int]:
    """How many values each loop index takes, for a statement with constant ranges from zero."""
    return {r.index: int(r.hi.value) for r in s.ranges if isinstance(r.hi, Const)}


def plain(access: Access) -> bool:
    """Whether every subscript is an index of its own."""
    names = [i.name for i in access.subscripts if isinstance(i, Index)]
    return len({*names}) == len(access.subscripts)


def tensor_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """The bytes of a dense tensor."""
    return math.prod(shape) * DTYPES[dtype].bits // 8


def power_of_two(n: int) -> int:
    """The next power of two, at least 1."""
    return 1 << max(0, n - 1).bit_length()


def identifier(name: str) -> str:
    """A tensor's name as a Python identifier."""
    return name.replace(".", "_")
