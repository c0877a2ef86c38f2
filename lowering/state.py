"""What the compiler knows after each stage: one State, which grows; and the kernels and loops that an executor runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lowering import tile_ir
from lowering.control import Control
from lowering.targets import Pays, Target
from tdsl.affine import Bound
from tdsl.ir import Program

if TYPE_CHECKING:
    from lowering.cost import Prediction
    from lowering.cpp_source import CppKernel
    from lowering.fold import Chunks
    from lowering.kernel_source import KernelSource
    from lowering.plan import Plan
    from lowering.ragged import Limits
    from lowering.recompute import Choice
    from lowering.steps import View
    from tdsl.infer import Inferred, Spec


@dataclass(frozen=True, slots=True)
class Allocation:
    """A tensor that is made before a kernel runs. fill: None where the kernel writes every element."""

    tensor: str
    shape: tuple[int, ...]
    dtype: str
    fill: float | int | bool | None


@dataclass(frozen=True, slots=True)
class Step:
    """One kernel, ready to print. direct: tensors that torch code defines whole. integers: the Triton kernel's sizes and strides.

    cpp: the kernel as C++, where it is that. unedited: what was generated, where `source` is a user's edit of it.
    """

    tile: tile_ir.Kernel
    allocate: tuple[Allocation, ...]
    direct: frozenset[str]
    source: KernelSource | None = None
    integers: Mapping[str, int] = field(default_factory=dict)
    cpp: CppKernel | None = None
    unedited: KernelSource | None = None

    @property
    def writes(self) -> frozenset[str]:
        """The tensors that the kernel writes."""
        return frozenset(op.buffer.tensor for op in tile_ir.operations(self.tile.body) if isinstance(op, tile_ir.Store))


@dataclass(frozen=True, slots=True)
class Part:
    """Statements that are planned together: those of one step of an ordered loop, or those between loops.

    views: the slices that its kernels work on, taken before them. aliases: further names of memory. numbers: parameters that are loop
    indices, by name.
    """

    state: State
    views: tuple[View, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    numbers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Repeat:
    """An ordered loop on the host: its parts run in order for each value of `index` in [lo, hi), from the last where `reverse`.

    allocate: tensors that live over its steps, made before it. The kernels of its parts are planned and compiled once, and
    launched at every step.
    """

    index: str
    lo: Bound
    hi: Bound
    reverse: bool
    allocate: tuple[Allocation, ...]
    parts: tuple[Part | Repeat, ...]


@dataclass(frozen=True, slots=True)
class State:
    """What is known after each stage. strides: of the arguments, in elements. values: integer scalars that sizes depend on.

    parts: of a program with ordered loops, in the order in which they run; plan and steps hold the kernels of all of them, each
    once. placed: targets whose memory exists before the part; shares: the tensor that a name is
    some elements of. aliases: versions that are the memory of an input, which is written in place. limits: the most that ranges which depend on tensors are.
    cpp_from: when a CPU's kernels are C++, None: never; cpp: whether these are.
    control: what a user fixed. chunks: how some kernels see their tensors; None: none may. blocks: whether kernels of products
    may be C++ that multiplies tile by tile. spread: the same with all indices, where some that stand side by side are one here.
    choices: what was weighed before there was a plan. fits: the tiles of kernels that were looked for before, whatever plan they were
    of; states that come of each other share it, and it grows.
    """

    program: Program
    specs: Mapping[str, Spec]
    strides: Mapping[str, tuple[int, ...]]
    target: Target
    values: Mapping[str, int]
    control: Control = field(default_factory=Control)
    input_precision: str = "ieee"
    saved: frozenset[str] = frozenset()
    results: Mapping[str, str] = field(default_factory=dict)
    inferred: Inferred | None = None
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    dtypes: Mapping[str, str] = field(default_factory=dict)
    stored: Mapping[str, str] = field(default_factory=dict)
    apart: frozenset[str] = frozenset()
    plan: Plan | None = None
    steps: tuple[Step, ...] = ()
    text: str = ""
    parts: tuple[Part | Repeat, ...] = ()
    placed: frozenset[str] = frozenset()
    shares: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    limits: Limits = field(default_factory=dict)
    cpp_from: Pays | None = None
    cpp: bool = False
    chunks: Mapping[str, Chunks] | None = field(default_factory=dict)
    blocks: bool = True
    spread: State | None = None
    choices: tuple[Choice, ...] = ()
    fits: dict[object, tuple[tile_ir.Kernel, Prediction]] = field(default_factory=dict, compare=False, repr=False)

    def shape_of(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, as who calls the program sees it."""
        return (self.spread or self).shapes.get(name, self.shapes[name])


def leaves(parts: tuple[Part | Repeat, ...]) -> Iterator[Part]:
    """Every part, in order."""
    for part in parts:
        if isinstance(part, Repeat):
            yield from leaves(part.parts)
        else:
            yield part


def repeats(parts: tuple[Part | Repeat, ...]) -> Iterator[Repeat]:
    """Every loop, outer ones first."""
    for part in parts:
        if isinstance(part, Repeat):
            yield part
            yield from repeats(part.parts)


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a dense row-major tensor."""
    return tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))
