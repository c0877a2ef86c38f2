"""One compilation for all sizes of a class: what was made for some sizes is called for others where the compiler would decide alike.

    class       dtypes, ranks, devices, which sizes and strides are 0 or 1, the power of two that each size reaches, the switches
    conditions  what compiling asked of the sizes: which are equal, divisible, smaller than which (traced.py)

A class has a few templates, for one set of conditions each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tdsl.arguments import Form, Layout
from tdsl.devices import switches
from tdsl.launching import Run
from tdsl.traced import Trace

Make = Callable[[Sequence[int], Layout], Run]  # of the numbers behind the symbols of a trace, and the layout that has them

# Sets of conditions that a class is compiled for; further sizes are compiled for themselves.
TEMPLATES = 8


@dataclass(frozen=True, slots=True)
class Template:
    """holds: whether the numbers of a layout meet the conditions. make: what is called for such numbers."""

    holds: Callable[..., bool]
    make: Make


class SizeClasses:
    """The templates of one program."""

    def __init__(self, inputs: Sequence[str], integers: frozenset[str]):
        self.inputs = tuple(inputs)
        self.integers = integers
        self._templates: dict[object, list[Template]] = {}
        self.compiled = 0  # how many templates were made

    def find(self, args: Sequence[Any], build: Callable[[Layout, Trace], Make], found: Layout) -> Run | None:
        """What runs arguments of a layout, from a template of their class, or from a new one that `build` makes; None where the
        class has enough of them. Raises what `build` raises."""
        key, numbers = class_of(args, found)
        templates = self._templates.setdefault(key, [])
        for template in templates:
            if template.holds(*numbers):
                return template.make(numbers, found)
        if len(templates) >= TEMPLATES:
            return None
        trace = Trace()
        layout = traced(found, trace)
        assert tuple(trace.symbols.values()) == numbers
        made = build(layout, trace)
        trace.open = False
        self.compiled += 1
        templates.append(Template(trace.holds(), made))
        return made(numbers, found)


def class_of(args: Sequence[Any], found: Layout) -> tuple[object, tuple[int, ...]]:
    """The class of a layout, and its numbers: sizes, strides and integers, as `traced` makes symbols of them."""
    key: list[object] = [switches(), found.device]
    numbers: list[int] = []
    for arg, (name, spec) in zip(args, found.specs.items(), strict=True):
        key.append((spec.dtype, spec.stored, spec.weak, arg.device if isinstance(arg, torch.Tensor | Form) else None))
        for n in spec.shape:
            key.append(n if n < 2 else -(n - 1).bit_length())
            numbers += [n] if n > 1 else []
        for n in found.strides.get(name, ()):
            key.append(n if n < 2 else -1)
            numbers += [n] if n > 1 else []
        if name in found.values:
            n = found.values[name]
            key.append(n if n < 2 else -n.bit_length())
            numbers += [n] if n > 1 else []
    return tuple(key), tuple(numbers)


def traced(found: Layout, trace: Trace) -> Layout:
    """A layout whose numbers are symbols of a trace; 0 and 1 stay what they are."""
    specs, strides, values = {}, {}, {}
    for name, spec in found.specs.items():
        specs[name] = replace(spec, shape=tuple(_symbol(n, trace) for n in spec.shape))
        if name in found.strides:
            strides[name] = tuple(_symbol(n, trace) for n in found.strides[name])
        if name in found.values:
            values[name] = _symbol(found.values[name], trace)
    return Layout(specs, strides, values, found.device)


def _symbol(n: int, trace: Trace) -> int:
    return trace.symbol(n) if n > 1 else n
