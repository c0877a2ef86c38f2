"""Which intermediates live in memory and which each kernel makes again for itself, by the time that either would take."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lowering.contraction import contraction, statement_flops
from lowering.statement import plain, tensor_bytes
from lowering.targets import Target
from tdsl.ir import Statement, reads
from tdsl.ops import DTYPES
from tdsl.traced import estimates

# How many times the time of moving an intermediate its repeated making may take, if it would dominate memory.
MEMORY_WORTH = 16
# Bytes of an intermediate that whole-tensor execution would rather not hold.
CPU_MEMORY = 1 << 28


@dataclass(frozen=True, slots=True)
class Choice:
    """What was weighed for an intermediate or a kernel. costs: each alternative with the seconds that it is predicted to take."""

    subject: str
    chosen: str
    costs: tuple[tuple[str, float], ...]
    reason: str

    def __str__(self) -> str:
        return f"{self.subject}: {self.chosen} ({self.reason}); {', '.join(f'{what} {seconds * 1e6:.1f} us' for what, seconds in self.costs)}"


@estimates()
def recompute(
    body: Sequence[Statement],
    kept: set[str],
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, str],
    target: Target,
    pinned: frozenset[str] = frozenset(),
) -> tuple[frozenset[str], tuple[Choice, ...]]:
    """Intermediates that each consumer makes again rather than reads: larger than all that they are made of, and cheaper to
    make than to write and read. What is larger than everything that is in memory anyway may cost MEMORY_WORTH times more.

    On a CPU, where every operation of torch is a pass over memory anyway, only those that do not fit into CPU_MEMORY.
    pinned: those that a user wants made again, whatever it costs.
    """
    definitions = {s.target.tensor: s for s in body}
    outside = {a.tensor for s in body for a in reads(s) if a.tensor not in definitions} | kept
    compulsory = sum(tensor_bytes(shapes[t], dtypes[t]) for t in outside)
    uses = {t: sum(any(a.tensor == t for a in reads(s)) for s in body) for t in definitions}
    found: set[str] = set()
    choices = []
    for s in body:
        name = s.target.tensor
        if name in kept or not plain(s.target) or not uses[name]:
            continue
        size = tensor_bytes(shapes[name], dtypes[name])
        operands = _operands(s, definitions, found)
        kind = flops_class(s, [t for t in operands if shapes[t]], dtypes)
        making = uses[name] * statement_flops(s) / (target.flops[kind] * target.sustained_flops)
        moving = size * (1 + uses[name]) / (target.bandwidth * target.sustained_bandwidth)
        if name in pinned:
            again, reason = True, "pinned"
        elif target.backend == "cpu":
            again, reason = (
                size > CPU_MEMORY,
                f"larger than {CPU_MEMORY >> 20} MiB" if size > CPU_MEMORY else "every operation passes over memory anyway",
            )
        elif size <= sum(tensor_bytes(shapes[t], dtypes[t]) for t in operands):
            again, reason = False, "not larger than what it is made of"
        elif size > compulsory:
            again, reason = making < moving * MEMORY_WORTH, "it would be larger than all inputs and outputs together"
        else:
            again, reason = making < moving, "the faster"
        if again:
            found.add(name)
        costs = (("making it again", making), ("through memory", moving))
        choices.append(Choice(name, "recompute" if again else "make once", costs, reason))
    return frozenset(found), tuple(choices)


def flops_class(s: Statement, operands: Iterable[str], dtypes: Mapping[str, str]) -> str:
    """The class of `Target.flops` that a statement over some tensors in memory runs in."""
    narrow = all(DTYPES[dtypes[t]].bits == 16 for t in operands if DTYPES[dtypes[t]].kind == "float")
    return "float16" if contraction(s) is not None and narrow else "float32"


def _operands(s: Statement, definitions: Mapping[str, Statement], recomputed: set[str]) -> set[str]:
    """The tensors in memory that a statement is made of, through those that are recomputed."""
    found: set[str] = set()
    for a in reads(s):
        if a.tensor in recomputed:
            found |= _operands(definitions[a.tensor], definitions, recomputed)
        else:
            found.add(a.tensor)
    return found
