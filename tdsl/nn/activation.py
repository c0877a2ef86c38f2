"""Activations by name: every function of one argument in the table of ops.py that has a derivative."""

from __future__ import annotations

from tdsl.errors import UnknownFunction
from tdsl.ops import DTYPES, OPS

ACTIVATIONS = tuple(
    op.name
    for op in OPS.values()
    if op.arity == 1 and op.grad[0] is not None and "float" in op.takes and op.kind in ("float", "same") and op.name not in DTYPES
)


def applied(activation: str | None, value: str) -> str:
    """`activation(value)` in the notation; the value where there is none. Raises UnknownFunction."""
    if activation is None:
        return value
    if activation not in ACTIVATIONS:
        raise UnknownFunction(f"{activation!r} is no activation", help=f"the activations are {', '.join(ACTIVATIONS)}")
    return f"{activation}({value})"
