"""Inputs that a call writes into: a cache that grows, a state that is updated, where a copy would cost more than the work.

    def append(C[b,s,d], K[b,t,d], pos[b]) -> C:  C[b,pos[b]+t,d] = K[b,t,d]        with donate="C"

The program means what it means without: C as it is afterwards. Where nothing else reads what stood in C, kernels write right into it;
elsewhere the new C is made apart and then copied over.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowering.statement import plain
from tdsl.arguments import Layout
from tdsl.errors import ArgumentError
from tdsl.ir import Access, Program, Statement, reads, statements
from tdsl.launching import Outputs, Run
from tdsl.signature import place_of


def donated_names(program: Program, donate: str | Sequence[str]) -> tuple[str, ...]:
    """The names of `donate`, in the order of the parameters. Raises ArgumentError for what is no input that is also an output."""
    names: object = (donate,) if isinstance(donate, str) else donate
    if not isinstance(names, Collection) or not all(isinstance(name, str) for name in names):
        raise ArgumentError(f"donate= is {donate!r}", help='the name of a parameter, or several of them: donate="C", donate=("C", "D")')
    for name in names:
        if name not in program.inputs:
            raise ArgumentError(
                f"donate= names {name}, which is no parameter of {program.name}", help=f"its parameters: {', '.join(program.inputs)}"
            )
        if name not in program.results:
            raise ArgumentError(
                f"donate= names {name}, and no output of {program.name} is what {name} becomes",
                span=place_of(program, name),
                help=f"write a statement with {name} on the left, and `-> {name}` in the signature",
            )
    return tuple(n for n in program.inputs if n in names)


def written_in_place(flat: Program, program: Program, donate: Sequence[str]) -> dict[str, str]:
    """Versions of donated inputs (names of the flat program) that can be the memory of these: where nothing needs the older values
    any more once the new ones are written."""
    found: dict[str, str] = {}
    body = statements(flat.body)
    for name in donate:
        version = flat.results[program.results.index(name)]
        if all(isinstance(node, Statement) for node in flat.body) and _free(list(body), name, version):
            found[version] = name
    return found


def _free(body: list[Statement], name: str, version: str) -> bool:
    writes = [s for s in body if s.target.tensor == version]
    readers = [s for s in body if any(a.tensor == name for a in reads(s))]
    if not writes or any(a.tensor == version for s in writes for a in reads(s)):
        return False
    if readers == writes[:1] and _copies(writes[0], name):
        return True
    if readers and len(writes) == 1 and readers == writes:  # each element is made of the one that stood there
        own = all(a.subscripts == writes[0].target.subscripts for a in reads(writes[0]) if a.tensor == name)
        read_on = any(a.tensor == version for s in body for a in reads(s))
        return own and not writes[0].reduced and plain(writes[0].target) and not read_on
    return False


def _copies(s: Statement, name: str) -> bool:
    return s.op == "=" and s.value == Access(name, s.target.subscripts) and plain(s.target)


# ---------------------------------------------------------------------------------------------------------------------
# Calls


def into_donated(run: Run, program: Program, donate: Sequence[str], in_place: Collection[str]) -> Run:
    """`run`, whose results for donated inputs are these tensors themselves. in_place: those that it has written already."""
    places = [(program.inputs.index(name), program.results.index(name), name in in_place) for name in donate]

    def call(*args: Any) -> Outputs:
        check_memory(program, donate, args)
        results = list(run(*args))
        for source, place, done in places:
            given: Tensor = args[source]
            if not done:
                given.copy_(results[place])
            results[place] = given
        torch.autograd.graph.increment_version([args[source] for source, _, _ in places])
        return tuple(results)

    return call


def check_memory(program: Program, donate: Sequence[str], args: Sequence[Any]) -> None:
    """Raises ArgumentError for a donated tensor in which two elements are one, or which another argument shares."""
    for name in donate:
        given = args[program.inputs.index(name)]
        if any(step == 0 and n > 1 for n, step in zip(given.shape, given.stride(), strict=True)) or _folded(given):
            raise ArgumentError(
                f"{name} is donated, and some of its elements are the same memory",
                span=place_of(program, name),
                help=f"pass {name}.contiguous(), and use what the call returns",
            )
        low, high = _ends(given)
        for other, arg in zip(program.inputs, args, strict=True):
            if other == name or not isinstance(arg, Tensor) or not arg.numel() or arg.device != given.device:
                continue
            first, last = _ends(arg)
            if first < high and low < last:
                raise ArgumentError(
                    f"{name} is donated, and {other} is the same memory, or a part of it",
                    span=place_of(program, other),
                    help=f"pass {other}.clone()",
                )


def check_dtypes(program: Program, donate: Sequence[str], found: Layout, dtypes: Mapping[str, str]) -> None:
    """Raises ArgumentError for a donated argument that is no tensor, or of another dtype than what becomes of it."""
    for name in donate:
        if name not in found.strides:
            raise ArgumentError(f"{name} is donated, and a call writes into a tensor, not into a number", span=place_of(program, name))
        given = found.specs[name].dtype
        if given != dtypes[name]:
            raise ArgumentError(
                f"{name} is donated with dtype {given}, and becomes {dtypes[name]}",
                span=place_of(program, name),
                help=f"cast what is written: {given}(..)",
            )


def check_recorded(program: Program, args: Sequence[Any]) -> None:
    """Raises ArgumentError where a gradient is asked for: what stood in a donated input is gone when backward would read it."""
    if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
        raise ArgumentError(
            f"{program.name} writes into an argument and is not recorded, but one of the arguments requires a gradient",
            help="call it under torch.no_grad(), pass x.detach(), or make a function without donate=",
        )


def _folded(t: Tensor) -> bool:
    """Whether strides are so small that rows overlap: each must step over all that the smaller ones reach."""
    reach = 1
    for step, n in sorted((step, n) for n, step in zip(t.shape, t.stride(), strict=True) if n > 1):
        if step < reach:
            return True
        reach = step * n
    return False


def _ends(t: Tensor) -> tuple[int, int]:
    first = t.data_ptr()
    return first, first + (
        1 + sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
    ) * t.element_size() if t.numel() else first
