"""The meaning of a program: its loops, run literally in float64, int64 and bool. Every other executor agrees with this one.

    for i, k:  Y[i] += A[i,k] * x[k]      -->      Y = np.zeros((4,), dtype=np.float64)
                                                   for i in range(4):
                                                       for k in range(3):
                                                           Y[i] += A[i, k] * x[k]

`source` prints the loops as Python with one scalar at a time (no einsum, no vectors; loop_source.py); `run` executes that text.
"""

from __future__ import annotations

import itertools
import linecache
import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from tdsl.errors import BoundsError, DtypeError, NotInjective, RangeError
from tdsl.infer import Spec, infer
from tdsl.ir import (
    Access,
    Expr,
    Program,
)
from tdsl.loop_source import LoopPrinter
from tdsl.ops import DTYPES
from tdsl.printer import print_expr

Array: TypeAlias = npt.NDArray[Any]
Argument: TypeAlias = "Array | np.generic | bool | int | float"


def run(program: Program, inputs: Mapping[str, Argument]) -> dict[str, Array]:
    """The outputs of `program`, by name, as float64, int64 or bool arrays.

    inputs: per parameter a NumPy array of any shape and dtype, or a Python number; they are not changed.
    Raises what `infer` raises, and BoundsError, NotInjective and RangeError for what only the values show.
    """
    specs = {name: spec_of(value) for name, value in inputs.items()}
    values = {name: int(value) for name, value in inputs.items() if specs[name].shape == () and DTYPES[specs[name].dtype].kind == "int"}
    inferred = infer(program, specs, values)
    printer = LoopPrinter(program, inferred)
    function = _compile(printer.name, printer.text)
    arrays = [np.asarray(inputs[name], dtype=_array_dtype(specs[name].dtype)) for name in program.inputs]
    with np.errstate(all="ignore"):
        results = function(*arrays, **({"check": _Guards(printer.places)} if printer.places else {}))
    return {name: np.array(result) for name, result in zip(program.results, results, strict=True)}


def source(program: Program, specs: Mapping[str, Spec], values: Mapping[str, int] | None = None) -> str:
    """The loops as the Python text that `run` executes for arguments like `specs`."""
    return LoopPrinter(program, infer(program, specs, values)).text


def spec_of(value: Argument) -> Spec:
    """The Spec of an argument; Python numbers are weak."""
    if isinstance(value, bool | int | float) and not isinstance(value, np.generic):
        return Spec((), {bool: "bool", int: "int64", float: "float32"}[type(value)], weak=True)
    array = np.asarray(value)
    if array.dtype.name not in DTYPES:
        raise DtypeError(f"no array of dtype {array.dtype.name} can be an argument", help=f"convert it to one of {', '.join(DTYPES)}")
    return Spec(array.shape, array.dtype.name)


def _array_dtype(dtype: str) -> type[np.generic]:
    return {"float": np.float64, "int": np.int64, "bool": np.bool_}[DTYPES[dtype].kind]


@lru_cache(maxsize=256)
def _compile(name: str, text: str) -> Callable[..., tuple[Array, ...]]:
    """The function of a text, with its lines where a traceback finds them."""
    filename = f"<tdsl reference {name} {next(_numbers)}>"
    namespace: dict[str, Any] = {"np": np, "math": math}
    exec(compile(text, filename, "exec"), namespace)
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    function: Callable[..., tuple[Array, ...]] = namespace[name]
    return function


_numbers = itertools.count(1)


# ---------------------------------------------------------------------------------------------------------------------
# What the loops call where inference could not prove something


class _Guards:
    """The checks of one run; `places` says which expression a number in the text stands for."""

    def __init__(self, places: list[Access | Expr]):
        self.places = places

    def at(self, value: Any, size: int, place: int) -> int:
        """`value`, which must be a subscript of a dimension of that size."""
        if 0 <= value < size:
            return int(value)
        access = self.places[place]
        raise BoundsError(
            f"a subscript of {print_expr(access)} is {value}, outside of 0:{size}",
            span=access.span,
            help="indices count from 0; pad(..) reads zero outside, clamp(..) the nearest element",
        )

    def once(self, seen: set[Any], point: Any, place: int) -> None:
        """Records that `=` writes `point`."""
        if point in seen:
            access = self.places[place]
            raise NotInjective(
                f"`=` writes {print_expr(access)} twice at {list(point)}",
                span=access.span,
                help="write `+=` to sum, or make the subscripts distinct",
            )
        seen.add(point)

    def nothing(self, place: int) -> None:
        """A reduction without a value had no terms."""
        reduce = self.places[place]
        raise RangeError(
            f"{print_expr(reduce)} over an empty range has no value",
            span=reduce.span,
            help="max and min take `init=`; leave empty ranges out of the others",
        )
