"""What names a program in a traced graph, and where the operators find what it names.

A recipe is JSON: the program's text, the backend, what autocast made of it; for one side of a cut gradient also which. An exported
graph runs in another process, where the program is compiled anew.
"""

from __future__ import annotations

import json
import threading
from typing import Any
from weakref import WeakValueDictionary

from tdsl import __version__
from tdsl.ir import Program
from tdsl.runtime import Executor

PARTS = ("part", "wrt", "fuses", "recomputed", "orders", "crossing", "stored", "outputs")  # fields of one side of a cut

_executors: WeakValueDictionary[str, Executor] = WeakValueDictionary()
_functions: WeakValueDictionary[str, Any] = WeakValueDictionary()
_lock = threading.Lock()


def recipe_of(program: Program, backend: str, precision: str | None, instance: int, donate: tuple[str, ...] = ()) -> str:
    """The recipe of a Function. precision: what autocast made of it. instance: not 0 for one that was changed by hand here."""
    # torch keeps compiled graphs on disk under what they were traced from: another version of tdsl is not to meet them.
    fields = {
        "program": str(program),
        "backend": backend,
        "precision": precision,
        "instance": instance,
        "donate": donate,
        "tdsl": __version__,
    }
    return json.dumps({name: value for name, value in fields.items() if value and value != "auto"})


def part_of(recipe: str, **part: Any) -> str:
    """The recipe of one side of the cut gradient of a Function."""
    return json.dumps({**json.loads(recipe), **part})


def remember(recipe: str, executor: Executor, function: Any = None) -> None:
    """Lets the operators find what a recipe names, as long as it lives; the first of equals serves for all of them."""
    executor.recipe = recipe
    with _lock:
        _executors.setdefault(recipe, executor)
        if function is not None:
            _functions.setdefault(recipe, function)


def forget(recipe: str, function: Any) -> None:
    """Lets nobody find a Function that was changed by hand under what names its text alone: that is made of the text again."""
    with _lock:
        if recipe and "instance" not in json.loads(recipe) and _functions.get(recipe) is function:
            del _functions[recipe]


def known_executor(recipe: str) -> Executor | None:
    """The executor that a recipe names, where it lives."""
    return _executors.get(recipe)


def known_function(recipe: str) -> Any:
    """The Function that a recipe names, where it lives."""
    return _functions.get(recipe)
