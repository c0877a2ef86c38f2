"""tdsl: tensor math in index notation, differentiated by the swap rule, compiled to Triton kernels that are PyTorch functions.

    scores = tdsl.function("for h, i, j, k:  Y[h,i,j] += A[h,i,k] * B[h,j,k]")
    Y = scores(A, B)

Names that need torch are loaded when they are first used, so that the language works, and imports quickly, without it.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from tdsl import errors
from tdsl.config import config
from tdsl.errors import Error
from tdsl.ir import Program

__version__ = "0.1.0"

_LAZY = {
    "function": "tdsl.function",
    "Function": "tdsl.function",
    "Variable": "tdsl.variable",
    "parse": "tdsl.text",
    "Schedule": "lowering.schedule",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(import_module(_LAZY[name]), name)
    else:
        embed = import_module("tdsl.embed")
        try:
            value = getattr(embed, name)
        except AttributeError:
            raise AttributeError(f"module 'tdsl' has no attribute {name!r}") from None
    globals()[name] = value
    return value


__all__ = ["Error", "Function", "Program", "Variable", "config", "errors", "function", "parse"]  # noqa: F822
