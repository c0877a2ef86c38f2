"""What a forward pass saves for its backward: the gradient program is cut in two.

    forward:   inputs            -> outputs, saved
    backward:  inputs, cotangents, saved -> gradients

Saved are tensors that the backward reads and that cost a reduction to make; elementwise values are made again from those,
unless the executor pays for each operation by a pass over memory, as whole-tensor execution does. What an ordered loop wrote
is never made again: all that the backward reads of it is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from tdsl.distribute import distribute
from tdsl.gather import gather_form
from tdsl.ir import Access, Call, Index, Loop, Output, Param, Program, Size, Statement, children, expressions, reads, statements, walk
from tdsl.ops import OPS
from tdsl.simplify import drop_dead
from tdsl.swap import flattened, gradient

Rule = Callable[[Program, Sequence[str]], Program]

# An elementwise value of fewer multiply-adds is always made again.
_CHEAP = 3.0


@dataclass(frozen=True, slots=True)
class Cut:
    """forward: the flat program with the saved tensors as further outputs. backward: from inputs, cotangents and saved tensors
    to gradients. saved: the names of the saved tensors that are no outputs already. kept: those that are outputs. wrt: the inputs.
    passed: inputs whose gradient is a cotangent as it is -> the number of its output; the backward does not copy it."""

    forward: Program
    backward: Program
    saved: tuple[str, ...]
    kept: tuple[str, ...]
    wrt: tuple[str, ...] = ()
    passed: Mapping[str, int] = field(default_factory=dict)


def cut(program: Program, wrt: Sequence[str], *, fuses: bool, recomputed: frozenset[str] = frozenset(), rule: Rule = gradient) -> Cut:
    """Cuts the gradient of `program` with respect to `wrt`. fuses: whether elementwise work is nearly free (a GPU kernel).

    rule: the gradient, or what autocast makes of it. recomputed: tensors that the planner would rather make again than hold in memory; they are not saved.
    """
    flat = flattened(program, wrt)
    whole = rule(program, wrt)
    first = {s.target.tensor: s for s in statements(flat.body)}
    looped = {s.target.tensor for node in flat.body if isinstance(node, Loop) for s in statements((node,))}
    backward = [node for node in whole.body if not all(s.target.tensor in first for s in statements((node,)))]
    compared = _compared(whole)
    keep: dict[str, None] = {}
    again: set[str] = set()
    remade: dict[str, Statement] = {}
    pending = [a.tensor for node in backward for a in reads(node)]
    measured = (e for node in backward for top in expressions(node) for e in walk(top) if isinstance(e, Size))
    pending += [e.tensor for e in measured if e.tensor in looped]
    while pending:
        name = pending.pop(0)
        if name not in first or name in keep or name in again:
            continue
        rather = _worth_saving(first[name], fuses) and name not in recomputed
        if rather or (name in flat.results and name not in compared) or _partial(name, flat) or name in looped:
            keep[name] = None
        else:
            again.add(name)
            made = None if name in compared else _from_output(name, flat, first)
            if made is not None and recomputed & {a.tensor for a in reads(made)}:
                made = None
            if made is not None:
                remade[name] = made
            pending += [a.tensor for a in reads(made or first[name])]
    kept = tuple(name for name in keep if name in flat.results)
    saved = tuple(name for name in keep if name not in flat.results)
    left = (node for node in whole.body if not any(s.target.tensor in keep for s in statements((node,))))
    body = tuple(remade.get(node.target.tensor, node) if isinstance(node, Statement) else node for node in left)
    params = tuple(_param(name, first[name]) for name in (*kept, *saved))
    forward = replace(flat, outputs=(*flat.outputs, *(Output(name) for name in saved)))
    before = drop_dead(distribute(gather_form(forward, colliding=True)))
    after = drop_dead(replace(whole, name=f"{program.name}_bwd", params=(*whole.params, *params), body=body))
    after, passed = without_copies(after, program, wrt)
    return Cut(before, after, saved, kept, tuple(wrt), passed)


def uncut(program: Program, wrt: Sequence[str], rule: Rule = gradient) -> Cut:
    """Nothing is saved: the backward is the whole gradient program."""
    return Cut(program, rule(program, wrt), (), ())


def backward_of(program: Program, wrt: Sequence[str], outputs: Sequence[str], parts: Cut, rule: Rule = gradient) -> Program | None:
    """The backward of a cut where cotangents arrive for some outputs only; `wrt` are inputs that these depend on.

    None where the text of fewer outputs says less: where one that is left out, and that another is made of, declares its size.
    """
    live = _needed_by(program, outputs)
    if any(o.sizes is not None and o.name not in outputs and o.name in live for o in program.outputs):
        return None
    fewer = replace(program, outputs=tuple(o for o in program.outputs if o.name in outputs))
    flat = flattened(fewer, wrt)
    written = {s.target.tensor for s in statements(flat.body)}
    if not written >= {*parts.kept, *parts.saved}:
        return None
    if parts.saved and any(isinstance(node, Loop) for node in flat.body) and flat.body != flattened(program, parts.wrt).body:
        return None  # other values of its steps are kept
    whole = rule(fewer, wrt)
    given = {*parts.kept, *parts.saved}
    params = tuple(p for p in parts.backward.params if p.name in given)
    body = tuple(node for node in whole.body if not any(s.target.tensor in given for s in statements((node,))))
    return drop_dead(replace(whole, name=f"{program.name}_bwd", params=(*whole.params, *params), body=body))


def without_copies(backward: Program, program: Program, wrt: Sequence[str]) -> tuple[Program, dict[str, int]]:
    """A backward of `program` without the gradients that are cotangents as they are, and which these are: input -> number of the cotangent.

    for i, j:  R.grad[i,j] += Y.grad[i,j]
    """
    cotangents = {p.name: n for n, p in enumerate(backward.params[len(program.params) :])}
    writers: dict[str, list[Statement | Loop]] = {}
    for node in backward.body:
        for s in statements((node,)):
            writers.setdefault(s.target.tensor, []).append(node)
    passed: dict[str, int] = {}
    for name, output in zip(wrt, backward.results, strict=True):
        match writers.get(output):
            case [Statement(op="=" | "+=", target=target, value=Access(tensor=source) as value) as s] if source in cotangents.keys() - writers.keys():
                plain = all(isinstance(e, Index) for e in target.subscripts) and len({*target.subscripts}) == len(target.subscripts)
                if plain and value.subscripts == target.subscripts and not s.reduced and not any(r.lo or r.hi for r in s.ranges):
                    passed[name] = cotangents[source]
    kept = tuple(o for name, o in zip(wrt, backward.outputs, strict=True) if name not in passed)
    return (drop_dead(replace(backward, outputs=kept)), passed) if passed else (backward, passed)


def sources(program: Program, outputs: Sequence[str]) -> frozenset[str]:
    """The inputs that some outputs depend on, and not by sizes alone."""
    return _needed_by(program, outputs) & frozenset(program.inputs)


def _needed_by(program: Program, outputs: Sequence[str]) -> frozenset[str]:
    live = set(outputs)
    known = -1
    while known < len(live):
        known = len(live)
        for s in statements(program.body):
            if s.target.tensor in live:
                live |= {a.tensor for a in reads(s)}
    return frozenset(live)


def _from_output(name: str, flat: Program, first: Mapping[str, Statement]) -> Statement | None:
    """What costs more than a product, made of an output that is there anyway: `Y[i,j] = E[i,j] / s[i]` --> `E[i,j] = Y[i,j] * s[i]`."""
    made = first[name]
    if made.op != "=" or _cost(made) <= _CHEAP or _partial(name, flat):
        return None
    for output in flat.results:
        s = first.get(output)
        if s is None or s.op != "=" or _partial(output, flat) or s.target.subscripts != made.target.subscripts:
            continue
        match s.value:
            case Call(op="div", args=(Access() as part, Access() as by)) if part.tensor == name and part.subscripts == s.target.subscripts:
                if {r.index for r in s.ranges} == {r.index for r in made.ranges} and first.get(by.tensor, made).reduced:
                    return replace(made, value=Call("mul", (s.target, by)))
    return None


def _worth_saving(s: Statement, fuses: bool) -> bool:
    return bool(s.reduced) or (not fuses and _cost(s) > _CHEAP)


def _partial(name: str, flat: Program) -> bool:
    """Whether several statements build a tensor: it is saved whole rather than built again."""
    return sum(s.target.tensor == name for s in statements(flat.body)) > 1


def _compared(program: Program) -> set[str]:
    """Tensors under an equality: an output may be rounded, so it is not what the comparison needs."""
    return {
        a.tensor
        for s in statements(program.body)
        for e in walk(s.value)
        if isinstance(e, Call) and e.op in ("eq", "ne")
        for arg in e.args
        for a in walk(arg)
        if isinstance(a, Access)
    }


def _cost(s: Statement) -> float:
    pending = [s.value]
    total = 0.0
    while pending:
        e = pending.pop()
        if isinstance(e, Call):
            total += OPS[e.op].cost
        if not isinstance(e, Access):
            pending += children(e)
    return total


def _param(name: str, s: Statement) -> Param:
    return Param(name, tuple(f"{name.replace('.', '_')}_{d}" for d in range(len(s.target.subscripts))))
