"""Where Functions come from: the notation as text, a Program, or a Python function that is traced.

This module stands on all that torch sees of a program; what makes Functions by itself (the operators' kernels) stands below it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tdsl import dispatch
from tdsl.embed import trace
from tdsl.errors import ArgumentError
from tdsl.ir import Program
from tdsl.text import parse
from tdsl.torch_function import Function

__all__ = ["Function", "function"]

dispatch.install()


def function(
    source: str | Program | Callable[..., Any] | None = None,
    *,
    name: str | None = None,
    backend: str | None = None,
    donate: str | Sequence[str] = (),
) -> Any:
    """Makes a Function from the notation as text, from a Program, or (as a decorator) from a Python function traced once.

    >>> scores = function("for h, i, j, k:  Y[h,i,j] += A[h,i,k] * B[h,j,k]")
    >>> print(scores.grad("A").program)
    def Y_grad(A[h,i,k], B[h,j,k], Y.grad[h,i,j]) -> A.grad[h,i,k]:
        for h, i, j, k:  A.grad[h,i,k] += Y.grad[h,i,j] * B[h,j,k]

    backend: "auto" (by the arguments' device), "torch", "triton" (the interpreter on CPU tensors) or "reference".
    donate: inputs that a call may write into, each of them an output too: a cache is updated in place, and returned.

    >>> append = function("def append(C[b,s,d], K[b,t,d], pos[b]) -> C:  C[b,pos[b]+t,d] = K[b,t,d]", donate="C")

    Raises ParseError and the other errors of the notation, with the place.
    """
    if source is None:
        return lambda f: function(f, name=name, backend=backend, donate=donate)
    if isinstance(source, str):
        return Function(parse(source, name=name), backend, donate=donate)
    if isinstance(source, Program):
        return Function(source, backend, donate=donate)
    if not callable(source):
        raise ArgumentError(
            f"{source!r} is no program", help='write the notation as text, "Y[i,j] += A[i,k] * B[k,j]", or decorate a Python function'
        )
    return Function(trace(source), backend, donate=donate)
