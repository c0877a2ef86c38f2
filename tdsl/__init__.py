"""tdsl: tensor math in index notation, differentiated by the swap rule, compiled to Triton kernels that are PyTorch functions.

    scores = tdsl.function("for h, i, j, k:  Y[h,i,j] += A[h,i,k] * B[h,j,k]")
    Y = scores(A, B)

Names that need torch are loaded when they are first used, so that the language works, and imports quickly, without it.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
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


class _Package(ModuleType):
    """Keeps `tdsl.function` the function: importing the submodule of that name would put the module in its place."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _LAZY and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(import_module(_LAZY[name]), name)
    elif find_spec(f"{__name__}.{name}") is not None:  # `from tdsl import check`, before embed.py can be imported
        value = import_module(f"{__name__}.{name}")
    else:
        embed = import_module("tdsl.embed")
        try:
            value = getattr(embed, name)
        except AttributeError:
            raise AttributeError(f"module 'tdsl' has no attribute {name!r}") from None
    globals()[name] = value
    return value


__all__ = ["Error", "Function", "Program", "Variable", "config", "errors", "function", "parse"]
