"""From a Program and the layout of its arguments to kernels: STAGES is the compiler's table of contents.

Each stage is a function from one frozen `State` to the next, and what it adds can be printed. An observer, where given,
sees (stage, state before, state after, seconds); `explain` is only an observer that prints.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from lowering.beside import beside
from lowering.choice import by_hand
from lowering.collapse import collapse
from lowering.configured import configured
from lowering.contraction import contraction
from lowering.control import RECOMPUTE, STORE, Control, saving_name
from lowering.cpp_schedule import CPU_SPLIT, takes_blocks, takes_cpp
from lowering.divide import divide, merged, on_parts, trimmed
from lowering.edited import edited
from lowering.fitting import fitted, in_cpp, memory_of, seconds, seen_by, tiles_of, walks_rows
from lowering.fold import fold_in
from lowering.indirect import places_of_products, wide_sums
from lowering.normalize import normalize
from lowering.operands import stored_operands
from lowering.plan import Plan
from lowering.plan import plan as make_plan
from lowering.products import split_products
from lowering.proofs import proved
from lowering.ragged import Limits, masked
from lowering.reducing import identity
from lowering.split import Split, split_reductions
from lowering.split_streams import split_streams
from lowering.state import Allocation, Part, Repeat, State, Step, contiguous
from lowering.statement import extents
from lowering.summed import summed_together
from lowering.targets import TARGETS, Pays
from lowering.together import together
from lowering.torch_module import torch_module
from lowering.triton_source import triton_source
from lowering.weighing import Work, weighed
from lowering.write_out import cover, write_out
from tdsl.dtypes import category, dtype_of, written
from tdsl.infer import Spec, infer, resolve
from tdsl.ir import REDUCTION_OF, Access, Call, Const, Index, Loop, Program, Statement, statements, walk
from tdsl.ops import DTYPES
from tdsl.ssa import covers, versions
from tdsl.traced import whole, with_symbols

__all__ = ["STAGES", "Allocation", "Observer", "Part", "Repeat", "State", "Step", "compile_program", "contiguous"]

Observer = Callable[[str, State, State, float], None]


def compile_program(
    program: Program,
    specs: Mapping[str, Spec],
    strides: Mapping[str, tuple[int, ...]],
    target: str,
    values: Mapping[str, int] | None = None,
    *,
    control: Control | None = None,
    input_precision: str = "ieee",
    stored: Mapping[str, str] | None = None,
    saved: frozenset[str] = frozenset(),
    results: Mapping[str, str] | None = None,
    limits: Limits | None = None,
    cpp_from: Pays | None = None,
    aliases: Mapping[str, str] | None = None,
    observer: Observer | None = None,
) -> State:
    """Runs STAGES on a flat program (after tdsl.expand and tdsl.ssa). target: a name of targets.TARGETS.

    saved: outputs that are residuals: like intermediates, they keep the dtype that they are computed in. stored: inputs
    whose dtype in memory is another than the one that promotion takes them for (residuals again). results: dtypes of outputs,
    where they are not those of their last version alone. limits: the most that ranges which depend on the values of tensors are,
    by `ragged.extent_of`; without them the sizes of tensors bound such ranges. cpp_from: when a CPU's kernels
    are C++ where they can be; None: never. control: what a user fixed. aliases: versions of inputs that are written into the
    memory of these; the caller has seen that nothing needs what stood there.

    Raises Unsupported for what the compiler cannot do yet, and whatever tdsl.infer raises.
    """
    alike = {version: strides[name] for version, name in (aliases or {}).items()}
    state = State(
        program,
        specs,
        {**strides, **alike},
        TARGETS[target],
        dict(values or {}),
        control or Control(),
        input_precision,
        saved,
        dict(results or {}),
        stored=dict(stored or {}),
        limits=dict(limits or {}),
        cpp_from=cpp_from,
        aliases=dict(aliases or {}),
        placed=frozenset(aliases or {}),
        shares=dict(aliases or {}),
    )
    for name, stage in STAGES:
        started = time.perf_counter()
        after = stage(state)
        if observer is not None:
            observer(name, state, after, time.perf_counter() - started)
        state = after
    return state


# ---------------------------------------------------------------------------------------------------------------------
# The stages


def resolve_ranges(state: State) -> State:
    """Every range gets numbers; shapes and dtypes of all tensors."""
    inferred = infer(state.program, state.specs, state.values, unseen=state.saved)
    dtypes = {**inferred.dtypes, **state.results}
    state = replace(state, inferred=inferred, program=resolve(state.program, inferred), shapes=inferred.shapes, dtypes=dtypes)
    if state.cpp_from is None or state.target.backend != "cpu":
        return state
    large = max((_points(node) for node in state.program.body), default=0) >= state.cpp_from.points
    several = state.cpp_from.operations is not None and _operations(state.program) >= state.cpp_from.operations
    return replace(state, cpp=large or several)


def _operations(program: Program) -> int:
    """Scalar functions and reductions, each of which is a call or more of torch code; products that are summed, of matrices mostly, as one."""
    body = list(statements(program.body))
    return sum(isinstance(e, Call) for s in body for e in walk(s.value)) + sum(bool(s.reduced) and contraction(s) is None for s in body)


def _points(node: Statement | Loop) -> int:
    """Points of the largest statement; a range that depends on tensors counts once."""
    own = math.prod(whole(r.hi.value) - whole(r.lo.value) for r in node.ranges if isinstance(r.lo, Const) and isinstance(r.hi, Const))
    return own * max((_points(inner) for inner in node.body), default=1) if isinstance(node, Loop) else own


def normalize_statements(state: State) -> State:
    """Constant ranges from zero, pairwise contractions, elementwise producers inlined; shapes and dtypes of what that introduced.

    A program with ordered loops is divided into parts, each of which is a program of its own from here on.
    """
    program, renamed, parts = versions(places_of_products(state.program, state.shapes), state.shapes)
    shapes = {**{new: state.shapes[old] for new, old in {**renamed, **parts}.items()}, **state.shapes}
    dtypes = {**{new: state.dtypes[old] for new, old in renamed.items()}, **state.dtypes}
    state = replace(state, program=program, shapes=shapes, dtypes=dtypes)
    if any(isinstance(node, Loop) for node in state.program.body):
        return divide(state, normalize_part)
    writes = Counter(s.target.tensor for s in statements(state.program.body))
    taken = {*state.shapes}
    body = []
    for s in statements(state.program.body):
        alone = writes[s.target.tensor] == 1 and s.target.tensor not in state.program.inputs
        made = masked(s, state.shapes, state.dtypes, steps={}, limits=state.limits, alone=alone, taken=taken)
        body += [proved(t, state.shapes, state.values, {}) for t in made if not _copies_into_itself(t, state.aliases)]
    state = replace(state, program=replace(state.program, body=tuple(body)))
    return normalize_part(_collapsed(state) if state.target.backend != "cpu" or state.cpp else state)


def _collapsed(state: State) -> State:
    """Indices that stand side by side as one; not where torch code multiplies matrices, which sees tensors as they are."""
    body = tuple(statements(state.program.body))
    if state.target.backend == "cpu" and any(contraction(s) is not None for s in body):
        return state
    found = collapse(body, state.shapes, state.strides, {*state.aliases, *state.aliases.values()})
    if found.body == body:
        return state
    program = replace(state.program, body=found.body)
    return replace(state, program=program, shapes=found.shapes, strides=found.strides, spread=state)


def _copies_into_itself(s: Statement, aliases: Mapping[str, str]) -> bool:
    """Whether a statement only gives a version of an input what that input holds, which is the same memory."""
    return isinstance(s.value, Access) and aliases.get(s.target.tensor) == s.value.tensor and s.value.subscripts == s.target.subscripts


def normalize_part(state: State) -> State:
    """The same for a program of statements with constant ranges, whose names are versions."""
    on_gpu = state.target.backend != "cpu"
    narrow = frozenset(t for t, dtype in state.dtypes.items() if DTYPES[dtype].kind == "float" and DTYPES[dtype].bits == 16)
    small = frozenset(t for t, dtype in state.dtypes.items() if on_gpu and DTYPES[dtype].bits < 32)
    program, sums = wide_sums(state.program, state.shapes, narrow, small)
    shapes = {**state.shapes, **{new: state.shapes[old] for new, old in sums.items()}}
    dtypes = {**state.dtypes, **{new: state.dtypes[old] for new, old in sums.items()}}
    program = normalize(program, dtypes, fuses=on_gpu or state.cpp, stored=state.control.pins(STORE))
    split = Split(2 * state.target.sms, passes=False) if on_gpu else CPU_SPLIT if state.cpp else None
    finished = partial(_finished, state, shapes=shapes, dtypes=dtypes, sums=sums, split=split)
    return stored_operands(program, finished, lambda s: _seconds(plan_kernels(s)), state.control) if on_gpu else finished(program)


def _finished(
    state: State, program: Program, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str], sums: Mapping[str, str], split: Split | None
) -> State:
    """A normalised program with its long reductions in parts, and the shapes and dtypes of what that introduced."""
    shapes, dtypes = dict(shapes), dict(dtypes)
    program, apart = split_reductions(program, split) if split else (program, frozenset())
    assert state.inferred is not None
    for s in statements(program.body):
        name = s.target.tensor
        if name in state.dtypes or name in sums:
            continue
        if name not in shapes:
            size = extents(s)
            shapes[name] = tuple(size[i.name] for i in s.target.subscripts if isinstance(i, Index))
        ranks = {t: -1 if t in state.inferred.weak else len(shape) for t, shape in shapes.items()}
        older = (dtypes[name], category(ranks[name])) if name in dtypes else None
        dtypes[name] = written(s.op, dtype_of(s.value, dtypes, ranks), older)
    return replace(
        state,
        program=program,
        shapes=shapes,
        dtypes=dtypes,
        apart=apart,
        stored={**state.stored, **_stored(program, dtypes, state.saved, apart), **{t: "int64" if dtypes[t] == "bool" else DTYPES[dtypes[t]].compute for t in sums}},
    )


def _stored(program: Program, dtypes: Mapping[str, str], saved: frozenset[str], apart: frozenset[str]) -> dict[str, str]:
    """Intermediate reductions that are no matrix products stay in the dtype that they are computed in: they are small, and a
    maximum is compared with what it was taken of."""
    outside = {*program.inputs, *program.results} - saved
    return {
        s.target.tensor: DTYPES[dtypes[s.target.tensor]].compute
        for s in statements(program.body)
        if s.target.tensor not in outside
        and s.reduced
        and (contraction(s) is None or s.target.tensor in apart)
        and DTYPES[dtypes[s.target.tensor]].kind == "float"
    }


def plan_kernels(state: State) -> State:
    """Statements into kernels."""
    if state.parts:
        return merged(on_parts(state, plan_kernels))
    target = replace(state.target, name="c++") if state.cpp else state.target  # C++ fuses as a GPU's kernels do
    apart = state.apart | (state.control.pins(STORE) & {s.target.tensor for s in statements(state.program.body)})
    given = (state.program, state.shapes, {**state.dtypes, **state.stored}, target, apart, state.control.pins(RECOMPUTE))
    if state.cpp:
        return _for_cpp(state, make_plan(*given))
    if state.target.backend == "cpu":
        return replace(state, plan=make_plan(*given))
    best = weighed(partial(make_plan, *given), lambda plan: _seconds(_in_parts(state, plan)))
    return _in_parts(state, replace(best, choices=(*state.choices, *best.choices)))


def _in_parts(state: State, plan: Plan) -> State:
    """A plan with its long sums in parts, where they leave a GPU idle or programs that walk rows can make them on the way, and with the
    short indices of pairs written out."""
    plan, shapes, parts = split_streams(plan, state.target, state.apart)
    plan, chunks, cut = fold_in(plan, [state.chunks is not None] * len(plan.kernels), state.target.sms)
    parts = {**parts, **cut}
    plan = summed_together(plan, state.apart | {*parts})
    shapes = {t: plan.shapes[t] for t in (*state.shapes, *parts)}
    dtypes = {t: state.dtypes[of] for t, of in parts.items()}
    plan, pieces, of = write_out(plan, state.target, {**state.dtypes, **state.stored, **dtypes}, state.input_precision)
    shapes, dtypes = {**shapes, **pieces}, {**dtypes, **{t: {**state.dtypes, **dtypes}[whole] for t, whole in of.items()}}
    stored = {t: DTYPES[dtype].compute for t, dtype in dtypes.items() if DTYPES[dtype].kind == "float"}
    return replace(state, plan=plan, shapes=shapes, dtypes={**state.dtypes, **dtypes}, stored={**state.stored, **stored}, chunks=chunks or state.chunks)


def _seconds(state: State) -> dict[Work, float]:
    """What each kernel of a plan is predicted to take."""
    assert state.plan is not None
    memory = memory_of(state)
    return {(kernel.statements, kernel.stores): seconds(kernel, state, seen_by(kernel, state, memory)) for kernel in state.plan.kernels}


def _for_cpp(state: State, plan: Plan) -> State:
    """Matrix products alone or in blocks, and what stands around them in as few kernels as walk the same elements."""
    assert state.inferred is not None
    plan = together(plan, state.dtypes) if state.blocks else plan
    fixed = {k.name for k in plan.kernels if state.blocks and takes_blocks(k, state.dtypes)}
    plan, shapes, dtypes = split_products(plan, {**state.dtypes}, state.inferred.weak, fixed)
    outside = {*state.program.inputs, *state.program.results} - state.saved
    inside = {s.target.tensor for k in plan.kernels for s in k.statements} - outside
    known = {**state.dtypes, **dtypes}
    stored = {t: DTYPES[known[t]].compute for t in inside if DTYPES[known[t]].kind == "float"}
    state = replace(state, shapes={**state.shapes, **shapes}, dtypes=known, stored={**state.stored, **stored})
    plan = beside(plan, [takes_cpp(k, state.dtypes) for k in plan.kernels])
    if state.chunks is None:
        return replace(state, plan=plan)
    plan, chunks, _ = fold_in(plan, [takes_cpp(k, state.dtypes) for k in plan.kernels])
    return replace(state, plan=plan, chunks=chunks)


def tile_kernels(state: State) -> State:
    """Each kernel gets its schedule and becomes tile IR; tensors are allocated before the kernel that writes them first."""
    if state.parts:
        return trimmed(merged(on_parts(state, tile_kernels)))
    assert state.plan is not None and state.inferred is not None
    exact = state.target.backend == "cpu"
    memory = memory_of(state)
    made = {*state.program.inputs, *state.aliases}
    steps = []
    for kernel in state.plan.kernels:
        # The first write of a tensor sets its elements; later ones go into what stands there.
        here = seen_by(kernel, state, replace(memory, updated=frozenset(t for t in memory.updated if t in made)))
        shapes = here.shapes
        tiled, cpp = in_cpp(kernel, state, here)
        if tiled is None and state.cpp and state.spread:  # torch code sees tensors as they are
            return tile_kernels(plan_kernels(normalize_part(state.spread)))
        if tiled is None and state.cpp and state.blocks and takes_blocks(kernel, state.dtypes):  # no C++ after all: products alone
            return tile_kernels(plan_kernels(replace(state, blocks=False)))
        if tiled is None and state.cpp and kernel.name in (state.chunks or {}):  # likewise: each kernel for itself
            return tile_kernels(plan_kernels(replace(state, chunks=None)))
        if tiled is None:
            tiled = fitted(kernel, state, here)
            if tiled.unfit and walks_rows(kernel, state):  # no room for the sums of a row: each kernel for itself
                return tile_kernels(plan_kernels(replace(state, chunks=None)))
            if kernel.name in state.control.schedules:
                given = state.control.schedules[kernel.name]
                tiles = tiles_of(kernel, here, state.input_precision, configured(kernel, tiled, given, exact=exact), exact=exact, walks=walks_rows(kernel, state))
                tiled = by_hand(tiles, given, state.target)
        allocate, direct = [], set()
        for s in kernel.statements:
            name = s.target.tensor
            if name not in kernel.stores or name in made:
                continue
            made.add(name)
            whole = covers(s, shapes[name]) or cover(kernel.statements, name, shapes[name])
            fill = None if whole else identity(REDUCTION_OF.get(s.op, "sum"), state.dtypes[name])
            if name in state.placed:
                continue
            if exact and cpp is None and whole and name not in memory.updated and all(a.role == "whole" for a in tiled.axes):
                direct.add(name)
            allocate.append(Allocation(name, state.shape_of(name), memory.storage(name), fill))
        steps.append(Step(tiled, tuple(allocate), frozenset(direct), cpp=cpp))
    return replace(state, steps=tuple(steps))


def print_kernels(state: State) -> State:
    """The kernels as source: Triton modules, or one torch module."""
    if state.target.backend == "cpu":
        with with_symbols():  # sizes may stand for others
            return replace(state, text=torch_module(state))
    if state.parts:
        state = merged(on_parts(state, print_kernels))
        return replace(state, text="\n\n".join(s.source.source for s in state.steps if s.source))
    steps = []
    for step in state.steps:
        source, integers = triton_source(step.tile)
        name = saving_name(source.name, tuple(o for o in state.program.results if o in state.saved))
        text = state.control.sources.get(name) or state.control.sources.get(source.name)
        own = None if text is None else edited(source, text, name)
        steps.append(replace(step, source=own or source, integers=integers, unedited=own and source))
    return replace(state, steps=tuple(steps), text="\n\n".join(s.source.source for s in steps if s.source))


STAGES: tuple[tuple[str, Callable[[State], State]], ...] = (
    ("infer", resolve_ranges),
    ("normalize", normalize_statements),
    ("plan", plan_kernels),
    ("tile", tile_kernels),
    ("source", print_kernels),
)
