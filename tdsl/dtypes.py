"""Which dtype an expression has: torch's promotion, over torch's three categories of operands."""

from __future__ import annotations

from collections.abc import Mapping

from tdsl.ir import Access, Call, Const, Expr, Index, Reduce, Size, Softmax
from tdsl.ops import DTYPES, OPS, promote

# The categories, the weakest first: Python numbers (constants, indices and sizes too), 0-d tensors, tensors with dimensions.
# An operand of a weaker category changes the dtype only where it has a higher kind (bool < int < float).
WEAK, SCALAR, TENSOR = 0, 1, 2
Typed = tuple[str, int]  # dtype, category

_KINDS = ("bool", "int", "float")
_WEAK_DTYPES = {bool: "bool", int: "int64", float: "float32"}


def category(rank: int) -> int:
    """The category of a tensor of that rank; rank -1 stands for a Python number."""
    return TENSOR if rank > 0 else SCALAR if rank == 0 else WEAK


def join(a: Typed, b: Typed) -> Typed:
    """torch's promotion of two operands. Source: torch.result_type, c10/core/ScalarType and ATen/native/TypeProperties.cpp."""
    if a[1] == b[1]:
        return promote(a[0], b[0]), a[1]
    strong, weak = (a, b) if a[1] > b[1] else (b, a)
    raised = _KINDS.index(DTYPES[weak[0]].kind) > _KINDS.index(DTYPES[strong[0]].kind)
    return (weak[0] if raised else strong[0]), strong[1]


def floating(dtype: str) -> str:
    """What a function of floats makes of a dtype: integers and bool become float32, torch's default."""
    return dtype if DTYPES[dtype].kind == "float" else "float32"


def dtype_of(expr: Expr, dtypes: Mapping[str, str], ranks: Mapping[str, int]) -> Typed:
    """The dtype and category (WEAK, SCALAR, TENSOR) of an expression.

    ranks: per tensor; -1 for a Python number. A tensor that is not in `dtypes` counts as the weakest operand there is.
    """
    match expr:
        case Access(tensor=name):
            return (dtypes[name], category(ranks[name])) if name in dtypes else ("bool", WEAK)
        case Const(value=value):
            return _WEAK_DTYPES[value.__class__], WEAK
        case Index() | Size():
            return "int64", WEAK
        case Call(op=op, args=args):
            return _result(OPS[op].kind, [dtype_of(arg, dtypes, ranks) for arg in args])
        case Softmax(body=body):
            dtype, strength = dtype_of(body, dtypes, ranks)
            return floating(dtype), strength
        case Reduce(op=op, body=body, init=init):
            dtype, strength = reduced(op, dtype_of(body, dtypes, ranks))
            return (dtype, strength) if init is None else join((dtype, strength), dtype_of(init, dtypes, ranks))
    return dtype_of(expr.value, dtypes, ranks)  # Pad and Clamp


def _result(kind: str, args: list[Typed]) -> Typed:
    total = args[0] if kind != "branch" else args[1]
    for arg in args[2 if kind == "branch" else 1 :]:
        total = join(total, arg)
    if kind == "float":
        return floating(total[0]), total[1]
    return total if kind in ("same", "branch") else (kind, total[1])


def reduced(op: str, operand: Typed) -> Typed:
    """The dtype of a reduction: sums and products of integers are int64, positions too; mean, var and logsumexp are floats."""
    dtype, strength = operand
    if op in ("sum", "prod") and DTYPES[dtype].kind != "float":
        return "int64", strength
    if op in ("argmax", "argmin"):
        return "int64", strength
    return (floating(dtype) if op in ("mean", "var", "logsumexp") else dtype), strength


def written(op: str, value: Typed, older: Typed | None) -> str:
    """The dtype of a target after `target op value`, given that of its older version."""
    total = value if older is None else join(older, value)
    return "int64" if op in ("+=", "*=") and DTYPES[total[0]].kind != "float" else total[0]
