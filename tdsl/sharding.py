"""Calls on DTensors: each device runs the same program on its part, where the text says that the parts do not meet.

    Z[n,o] += X[n,i] * W[o,i]      X sharded along n, W whole  -->  Z sharded along n
                                   W sharded along o           -->  Z sharded along o
                                   X and W sharded along i     -->  Z is a sum over the devices (Partial)

An index is cut between devices if every access has it as a subscript of its own, over all of its range, and nothing but a `+=` of an
output reduces over it. What is whole and meets it is cut as well. A gradient follows: of what is whole it is a sum over the devices.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from tdsl.arguments import form
from tdsl.errors import Unsupported
from tdsl.ir import (
    Access,
    Const,
    Expr,
    Index,
    Loop,
    Program,
    Range,
    Size,
    Statement,
    children,
    expressions,
    free_indices,
    reads,
    statements,
    walk,
)

SUM = -1  # in the place of a dimension: every device has a part of each sum


def has_dtensors(args: Sequence[Any]) -> bool:
    """Whether an argument is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(isinstance(a, module.DTensor) for a in args)


def sharded_call(function: Any, args: Sequence[Any]) -> list[Any]:
    """The outputs, as DTensors. Raises Unsupported for a program whose parts meet, and names the statement."""
    import torch
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    program: Program = function.program
    given = dict(zip(program.inputs, args, strict=True))
    meshes = [a.device_mesh for a in args if isinstance(a, DTensor)]
    mesh = meshes[0]
    mixed = [n for n, a in given.items() if isinstance(a, torch.Tensor) and not isinstance(a, DTensor) and a.dim()]
    if mixed or any(other != mesh for other in meshes):
        what = f"{mixed[0]} is an ordinary tensor among DTensors" if mixed else "the DTensors have different meshes"
        raise Unsupported(f"{what} (sharding)", help="distribute_tensor(x, mesh, [Replicate()]) makes one that every device has whole")
    plans = []
    for axis in range(mesh.ndim):
        dims = {}
        for name, a in given.items():
            placement = a.placements[axis] if isinstance(a, DTensor) else Replicate()
            if isinstance(placement, Shard):
                if type(placement) is not Shard:
                    raise Unsupported(f"{name} is placed by {placement} (sharding)", help="redistribute it to Shard(d) or Replicate()")
                dims[name] = placement.dim
        plans.append(shards(function.executor.flat, dims) if dims else {})

    def placements(name: str, whole: Any) -> list[Any]:
        return [Partial() if plan.get(name) == SUM else Shard(plan[name]) if name in plan else whole(plan) for plan in plans]

    local = []
    for name, a in given.items():
        if isinstance(a, DTensor):
            a = a.redistribute(mesh, placements(name, lambda _: Replicate()))
            a = a.to_local(grad_placements=placements(name, lambda plan: Partial() if plan else Replicate()))
        local.append(a)
    found = function(*local)
    found = found if isinstance(found, tuple) else (found,)
    shapes = function.executor.outputs_for([form(a) for a in args])
    outputs = []
    for name, result, (shape, _) in zip(function.executor.flat.results, found, shapes, strict=True):
        stride = torch.empty(shape, device="meta").stride()
        where = placements(name, lambda _: Replicate())
        outputs.append(DTensor.from_local(result.contiguous(), mesh, where, run_check=False, shape=torch.Size(shape), stride=stride))
    return outputs


def shards(flat: Program, given: Mapping[str, int]) -> dict[str, int]:
    """The dimension along which each tensor is cut, or SUM, where some inputs are cut along given ones; whole tensors are not in it.

    Raises Unsupported, with the statement, where devices would need each other's parts.
    """
    known = dict(given)
    before = -1
    while before < len(known):
        before = len(known)
        for node in flat.body:
            for s in statements((node,)):
                _spread(s, node.ranges if isinstance(node, Loop) else (), known, flat)
    for s in statements(flat.body):
        for a in reads(s):
            if known.get(a.tensor) == SUM:
                raise _meets(s, f"reads {a.tensor}, which is a sum over the devices")
        for top in expressions(s):
            for e in walk(top):
                if isinstance(e, Size) and known.get(e.tensor) == e.dim and not any(top in (r.lo, r.hi) for r in s.ranges):
                    raise _meets(s, f"needs the whole size of {e.tensor}")
    whole = [name for name in flat.results if name not in known]
    if whole:
        raise Unsupported(f"{whole[0]} would be the same on every device, and other outputs are not (sharding)", help=_HELP)
    return known


_HELP = "redistribute the arguments to [Replicate()], or call it on x.to_local()"


def _meets(s: Statement, why: str) -> Unsupported:
    return Unsupported(f"no rule says how to cut this between devices: the statement {why} (sharding)", span=s.span, help=_HELP)


def _spread(s: Statement, loops: Sequence[Range], known: dict[str, int], flat: Program) -> None:
    """What a statement says of the tensors that meet the cut index."""
    accesses = [s.target, *reads(s)]
    cut = {a.subscripts[known[a.tensor]] for a in accesses if known.get(a.tensor, SUM) != SUM}
    if not cut:
        return
    index = next(iter(cut))
    if len(cut) > 1 or not isinstance(index, Index) or index.name in {r.index for r in loops}:
        raise _meets(s, "reads elements of several parts")
    name = index.name
    for r in (*s.ranges, *loops):
        own = (
            r.index == name
            and r.lo is not None
            and not (r.lo == Const(0) and isinstance(r.hi, Size) and known.get(r.hi.tensor) == r.hi.dim)
        )
        if own or (r.index != name and any(b is not None and name in free_indices(b) for b in (r.lo, r.hi))):
            raise _meets(s, f"has bounds that depend on where a part of {name} lies")
    if name in _computed(s.value):
        raise _meets(s, f"uses {name} as a number, and parts of it begin elsewhere")
    for a in accesses:
        at = [d for d, e in enumerate(a.subscripts) if name in _computed(e)]  # a place that a tensor gives is the same on every device
        if not at:
            continue
        if len(at) > 1 or a.subscripts[at[0]] != index or known.get(a.tensor, at[0]) != at[0]:
            raise _meets(s, f"reads or writes {a.tensor} at other places than {name}")
        known[a.tensor] = at[0]
    if not any(name in _computed(e) for e in s.target.subscripts):
        alone = sum(t.target.tensor == s.target.tensor for t in statements(flat.body)) == 1
        if s.op != "+=" or s.target.tensor not in flat.results or not alone:
            raise _meets(s, f"reduces over {name}")
        known[s.target.tensor] = SUM


def _computed(top: Expr) -> set[str]:
    """The indices that an expression computes with, outside of the subscripts of what it reads."""
    found: set[str] = set()
    pending = [top]
    while pending:
        e = pending.pop()
        if isinstance(e, Index):
            found.add(e.name)
        if not isinstance(e, Access):
            pending += children(e)
    return found
