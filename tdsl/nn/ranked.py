"""Programs for tensors of any rank: `*n` among subscripts stands for as many indices as a call says.

X[*n,k] * W[m,k]     -->     X[k] * W[m,k]            at rank 0
                             X[n0,n1,k] * W[m,k]      at rank 2
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, ParamSpec

import torch

from tdsl.function import Function, function
from tdsl.operators import call

P = ParamSpec("P")
_STAR = re.compile(r"(?<=[\[,])\s*\*(\w+)")
_LEFTOVERS = ((re.compile(r",(?=[,\]])"), ""), (re.compile(r"\[,"), "["), (re.compile(r"\[\]"), ""))


def expanded(text: str, rank: int) -> str:
    """The program with `rank` indices for every starred name: `*n` is `n0,n1`, or nothing.

    >>> expanded("Y[*n,k] = X[*n,k] + s[*n]", 0)
    'Y[k] = X[k] + s'
    """
    text = _STAR.sub(lambda star: ",".join(f"{star[1]}{i}" for i in range(rank)), text)
    for pattern, mended in _LEFTOVERS:
        text = pattern.sub(mended, text)
    return text


@cache
def _function(text: str, rank: int) -> Function:
    made: Function = function(expanded(text, rank))
    return made


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def _recipe(text: str, rank: int) -> tuple[str, bool]:
    """What names the Function in a traced graph, and whether it has one output: the text is parsed outside of the graph."""
    made = _function(text, rank)
    return made.recipe, len(made.program.outputs) == 1


class Ranked:
    """A program with starred indices, called with the number of dimensions that they stand for.

    >>> double = Ranked("Y[*n,k] = 2 * X[*n,k]")
    >>> double(x.dim() - 1, x)
    """

    __slots__ = ("_functions", "text")

    def __init__(self, text: str):
        self.text = text
        self._functions: dict[int, Function] = {}

    def at(self, rank: int) -> Function:
        """The Function of that rank. Raises what tdsl.function raises."""
        found = self._functions.get(rank)
        if found is None:
            found = self._functions[rank] = _function(self.text, rank)
        return found

    def __call__(self, rank: int, *args: Any) -> Any:
        """What the Function of that rank gives."""
        if torch.compiler.is_compiling():
            recipe, single = _recipe(self.text, rank)
            results = call(recipe, args)
            return results[0] if single else tuple(results)
        found = self._functions.get(rank)
        return (self.at(rank) if found is None else found)(*args)

    def __reduce__(self) -> Any:
        return Ranked, (self.text,)

    def __repr__(self) -> str:
        return f"Ranked({self.text!r})"


def by_options(make: Callable[P, Ranked]) -> Callable[P, Ranked]:
    """Keeps the program that a function makes for each choice of options.

    While a graph is traced it is made anew, being but a text there: torch warns of functools.cache, and guards what a dict holds.
    """
    made: dict[object, Ranked] = {}

    @wraps(make)
    def program(*args: P.args, **named: P.kwargs) -> Ranked:
        if torch.compiler.is_compiling():
            return make(*args, **named)
        key = (args, *named.items())
        found = made.get(key)
        if found is None:
            found = made[key] = make(*args, **named)
        return found

    return program
