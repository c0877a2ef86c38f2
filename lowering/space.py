"""The configurations of a kernel that come into question: all that a search has to look at, the default among them.

    stream        rows x streamed tile x warps x stages
    pairs         rows of a thread x warps
    contraction   M x N x K tile x warps x stages x group
    rows          TILE times 1/4 to 4, with the warps that go with it
    products also x tiles moved by pointers or descriptors x a program for each tile or programs that walk them x results whole or in parts

What does not fit the registers or the shared memory of the chip is left out, and so is what wastes half of a tile on padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product

from lowering import tile_ir as ir
from lowering.candidates import candidates, family
from lowering.choice import best_fit, forms, told
from lowering.cost import predict
from lowering.fitting import memory_of, seen_by, tiles_of, walks_rows
from lowering.forms import dressed, schedule_of
from lowering.pairs import ROWS, pair_rows, pair_schedule
from lowering.plan import KernelPlan
from lowering.registers import fits
from lowering.rows import rows_schedule
from lowering.schedule import (
    DOT_MIN,
    WGMMA,
    WGMMA_ROWS,
    Dtypes,
    Schedule,
    Strides,
    contraction_schedule,
    main_product,
    on_tensor_cores,
    stream_rows,
    stream_schedule,
    suits,
)
from lowering.state import Part, State, leaves
from lowering.statement import power_of_two
from lowering.targets import Target
from lowering.walking import walking_schedules

_SIDES = (16, 32, 64, 128, 256)
_SUMS = (16, 32, 64, 128)
_SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)

Tile = Callable[[Schedule], ir.Kernel]


def space(
    kernel: KernelPlan, strides: Strides, dtypes: Dtypes, target: Target, make: Tile, precision: str = "ieee", walks: bool = False
) -> Iterator[tuple[Schedule, ir.Kernel]]:
    """Every legal configuration of a kernel with its tile IR, the default first, none twice. make: the tile IR of a schedule.

    The other arguments are those of `candidates.candidates`.
    """
    made: dict[object, ir.Kernel] = {}

    def tiled(schedule: Schedule) -> ir.Kernel:
        """What differs in launch and form alone is tiled once."""
        key = (schedule.axes, schedule.num_stages if walks else 0)
        if key not in made:
            made[key] = make(schedule)
        launch = {name: getattr(schedule, name) for name in ("num_warps", "num_stages", "group")}
        return dressed(replace(made[key], **launch), schedule)

    default = best_fit(map(tiled, candidates(kernel, strides, dtypes, target, precision, walks)), target, lambda k: predict(kernel, k, target))
    seen = {schedule_of(default)}
    yield schedule_of(default), default
    every = walking_schedules(kernel, dtypes, target) if walks else _schedules(kernel, strides, dtypes, target, precision)
    for schedule in every:
        plain = tiled(schedule)
        if target.backend != "cpu" and not fits(plain, target):
            continue
        for found in (plain, *forms(plain, target)):
            if schedule_of(found) not in seen and (found is plain or fits(found, target)):
                seen.add(schedule_of(found))
                yield schedule_of(found), told(found, target)


def spaces(state: State) -> Iterator[tuple[KernelPlan, Iterator[tuple[Schedule, ir.Kernel]]]]:
    """The space of each kernel of a program that is lowered as far as its plan, in order."""
    for part in leaves(state.parts or (Part(state),)):
        state = part.state
        assert state.plan is not None
        memory, made = memory_of(state), set(state.program.inputs)
        dtypes = {**state.dtypes, **state.stored}
        for kernel in state.plan.kernels:
            here = seen_by(kernel, state, replace(memory, updated=frozenset(t for t in memory.updated if t in made)))
            walks = walks_rows(kernel, state)
            make = partial(tiles_of, kernel, here, state.input_precision, exact=state.target.backend == "cpu", walks=walks)
            yield kernel, space(kernel, here.strides, dtypes, state.target, make, state.input_precision, walks)
            made |= set(kernel.stores)


def _schedules(kernel: KernelPlan, strides: Strides, dtypes: Dtypes, target: Target, precision: str) -> Iterator[Schedule]:
    kind = family(kernel, dtypes, target, precision)
    size = kernel.extents
    if kind == "stream":
        rows, _ = stream_rows(kernel)
        height, length = (math.prod(size[i] for i in group) for group in (rows, kernel.stream))
        tensor_cores = on_tensor_cores(kernel, dtypes, target, precision)
        for tile_m, tile_n, warps, stages in product(_upto(height), _upto(length), (2, 4, 8), (2, 3)):
            if suits(tile_m, tile_n, warps, height, target, tensor_cores):
                yield stream_schedule(kernel, tile_m, tile_n, warps, stages)
    elif kind == "pairs":
        height = math.prod(size[i] for i in pair_rows(kernel))
        for count, warps in product(ROWS, (1, 2, 4, 8)):
            if count * warps <= power_of_two(height):
                yield pair_schedule(kernel, target, count, warps)
    elif kind == "contraction":
        c = main_product(kernel, dtypes)
        assert c is not None
        m, n, k = (math.prod(size[i] for i in group) for group in (c.m, c.n, c.k))
        group = on_tensor_cores(kernel, dtypes, target, precision) and target.name in WGMMA and max(m, n) >= WGMMA_ROWS
        for tiles in product(_upto(m), _upto(n), (t for t in _SUMS if t <= max(DOT_MIN, power_of_two(k)))):
            if not group or max(tiles[:2]) >= WGMMA_ROWS:
                for warps, stages, together in product((4, 8), (2, 3, 4), (1, 8)):
                    yield contraction_schedule(kernel, c, strides, target, tiles, warps, stages, together)
    elif kind == "rows":
        for scale in _SCALES:
            yield rows_schedule(kernel, strides, dtypes, target, scale)


def _upto(extent: int) -> tuple[int, ...]:
    """Tiles of which at most half is padding."""
    return tuple(t for t in _SIDES if t <= max(DOT_MIN, power_of_two(extent)))
