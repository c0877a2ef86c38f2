"""A kernel of a plan in its tiles: what it sees of its tensors, and the configuration that it gets by default, on a GPU or as C++."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from functools import partial

from lowering import tile_ir
from lowering.candidates import candidates
from lowering.choice import best_fit
from lowering.compared import compared_values, respelled, rounds_between
from lowering.cost import Prediction, predict
from lowering.cpp_schedule import PARALLEL, block_schedule, cpp_schedule, only_sums, takes_blocks, takes_cpp
from lowering.cpp_source import CppKernel, cpp_source
from lowering.evaluate import Memory
from lowering.plan import KernelPlan
from lowering.schedule import Schedule
from lowering.state import State, contiguous
from lowering.statement import extents
from lowering.tiling import tile
from lowering.walking import walking
from tdsl.dtypes import WEAK, dtype_of
from tdsl.errors import Unsupported
from tdsl.ir import statements
from tdsl.ops import DTYPES


def fitted(kernel: KernelPlan, state: State, memory: Memory) -> tile_ir.Kernel:
    """A kernel in the tiles that it gets by default."""
    return replace(_fit(kernel, state, memory)[0], name=kernel.name)


def seconds(kernel: KernelPlan, state: State, memory: Memory) -> float:
    """What a kernel is predicted to take in the tiles that it gets by default."""
    return _fit(kernel, state, memory)[1].seconds


def _fit(kernel: KernelPlan, state: State, memory: Memory) -> tuple[tile_ir.Kernel, Prediction]:
    """The tiles that a kernel gets by default, found once: plans that are weighed against each other share most of their kernels, and the
    last of them are tiled."""
    walks = walks_rows(kernel, state)
    key = (walks, _work(kernel), _view(kernel, memory))
    if key not in state.fits:
        tiles = partial(tiles_of, kernel, memory, state.input_precision, exact=state.target.backend == "cpu", walks=walks)
        schedules = candidates(kernel, memory.strides, {**state.dtypes, **state.stored}, state.target, state.input_precision, walks)
        made = best_fit(map(tiles, schedules), state.target, lambda tiled: predict(kernel, tiled, state.target))
        state.fits[key] = made, predict(kernel, made, state.target)
    return state.fits[key]


def _work(kernel: KernelPlan) -> tuple[object, ...]:
    """A kernel but for its name."""
    return kernel.statements, kernel.stores, kernel.grid, kernel.stream, kernel.whole, kernel.repeat


def _view(kernel: KernelPlan, memory: Memory) -> tuple[object, ...]:
    """What a kernel sees of its tensors, as a key."""
    names = dict.fromkeys([*kernel.reads, *kernel.writes, *(s.target.tensor for s in kernel.statements)])
    seen = [
        (t, memory.shapes.get(t), memory.strides.get(t), memory.dtypes.get(t), memory.stored.get(t), t in memory.numbers, t in memory.updated) for t in names
    ]
    return *seen, memory.by_value, memory.compares, memory.fused, memory.narrow


def walks_rows(kernel: KernelPlan, state: State) -> bool:
    """Whether programs of a GPU walk rows one by one in a kernel."""
    return state.target.backend != "cpu" and kernel.name in (state.chunks or {})


def seen_by(kernel: KernelPlan, state: State, memory: Memory) -> Memory:
    """What a kernel sees of its tensors."""
    chunks = (state.chunks or {}).get(kernel.name)
    if chunks is None:
        return memory
    shapes = {t: chunks.shape(t, shape) for t, shape in state.shapes.items()}
    return replace(memory, shapes=shapes, strides={t: chunks.strides(t, steps) for t, steps in memory.strides.items()})


def memory_of(state: State) -> Memory:
    """What the kernels of a planned program must know of its tensors."""
    assert state.inferred is not None
    strides = {name: state.strides.get(name) or contiguous(shape) for name, shape in state.shapes.items()}
    counts = Counter(s.target.tensor for s in statements(state.program.body))
    double = "float64" in state.dtypes.values()  # numbers keep all of their digits then
    compared = compared_values(state.program, state.saved)
    return Memory(
        state.shapes,
        strides,
        state.dtypes,
        state.inferred.weak,
        by_value=state.target.backend == "cpu" or not double,
        updated=frozenset(t for t, n in counts.items() if n > 1 or t in state.program.inputs or t in state.aliases),
        stored={**state.stored, **{n: "float64" for n in _of_numbers(state) if double and DTYPES[state.dtypes[n]].kind == "float"}},
        compares=any(respelled(e) for e in compared),
        fused=not any(rounds_between(e) for e in compared),
        narrow=state.target.float8,
    )


def _of_numbers(state: State) -> frozenset[str]:
    """Python numbers, and intermediates that are made of nothing else."""
    assert state.inferred is not None
    ranks = {t: -1 if t in state.inferred.weak else len(shape) for t, shape in state.shapes.items()}
    inside = {s.target.tensor: s for s in statements(state.program.body)}
    outside = {*state.program.inputs, *state.program.results} - state.saved
    made = {t for t, s in inside.items() if t not in outside and dtype_of(s.value, state.dtypes, ranks)[1] == WEAK}
    return state.inferred.weak | made


def tiles_of(kernel: KernelPlan, memory: Memory, precision: str, schedule: Schedule, *, exact: bool, walks: bool) -> tile_ir.Kernel:
    """A kernel in the tiles of a schedule. exact: tiles as long as what they walk, as a CPU has them."""
    made = tile(kernel, schedule, memory, exact=exact)
    return replace(walking(made) if walks else made, input_precision=precision)


def in_cpp(kernel: KernelPlan, state: State, memory: Memory) -> tuple[tile_ir.Kernel | None, CppKernel | None]:
    """A kernel as C++; None twice where it is better as torch code, or needs what only that has."""
    blocks = state.blocks and takes_blocks(kernel, state.dtypes)
    if not state.cpp or not (blocks or takes_cpp(kernel, state.dtypes)):
        return None, None
    if only_sums(kernel.statements):  # each is a loop of its own to the tiler; the printer makes them one
        kernel = replace(kernel, stream=())
    try:
        schedule = block_schedule(kernel) if blocks else cpp_schedule(kernel, memory.strides)
        tiled = tile(kernel, schedule, memory, exact=True)
        shared = {state.shares.get(t, t) for t in kernel.writes}
        names = [t for t in (*kernel.reads, *kernel.writes) if state.shares.get(t, t) in shared]
        overlap = frozenset(t for t in names if sum(state.shares.get(o, o) == state.shares.get(t, t) for o in names) > 1)
        cpp = cpp_source(tiled, overlap)
    except Unsupported:
        return None, None
    points = max(math.prod(extents(s).values()) for s in kernel.statements)
    return tiled, cpp if points >= PARALLEL and not overlap else replace(cpp, parallel=False)
