"""Products of matrices that share a kernel with what reads them, against the same as kernels of their own, by the cost model.

    Z[n,o] += X[n,i] * W[o,i];  s[o] += f(Z[n,o])     one kernel walks n and makes Z tile by tile: programs for o alone, operands read
                                                      again for each, and Z twice if it is stored too
    -->  Z[n,o] += X[n,i] * W[o,i]  |  s[o] += f(Z[n,o])     or a product with all rows and columns on its grid, then a pass over memory
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from lowering.kernel_shape import walked_products
from lowering.plan import Plan
from lowering.recompute import Choice
from lowering.statement import tensor_bytes
from tdsl.ir import Statement

# What taking them apart must win, as a share of the time together: predictions are not exact, and what is not stored takes no memory.
WIN = 0.9
# How many times as much arithmetic a plan may have that is weighed.
MORE = 1.25


Work = tuple[tuple[Statement, ...], tuple[str, ...]]  # the statements of a kernel and what it stores


def weighed(planned: Callable[[frozenset[str]], Plan], seconds: Callable[[Plan], Mapping[Work, float]]) -> Plan:
    """The plan that is predicted to take the least time. planned: the plan in which some products share no kernel that walks them or makes
    another one; they may still have an epilogue. seconds: what each kernel of a plan is predicted to take."""
    alone: frozenset[str] = frozenset()
    best = planned(alone)
    choices: list[Choice] = []
    seen: set[str] = set()
    most = _outside(best)
    known: Mapping[Work, float] | None = None  # what the best takes, once something is compared with it
    while (name := next((t for t in _shared(best) if t not in seen), None)) is not None:
        seen.add(name)
        other = planned(alone | {name})
        if sum(other.memory.values()) - sum(best.memory.values()) > most or _flops(other) > MORE * _flops(best):
            continue  # memory is not the price of time, and what makes more products again is not worth a look
        known = seconds(best) if known is None else known
        found = seconds(other)
        together, by_itself = apart(known, found)
        if by_itself < WIN * together:
            best, alone, known = other, alone | {name}, found
        chosen = "a kernel of its own" if name in alone else "with what shares its kernel"
        reason = "the faster" if (name in alone) == (by_itself < together) else "not much slower, and nothing between kernels"
        choices.append(Choice(name, chosen, (("together", together), ("by itself", by_itself)), reason))
    return replace(best, choices=(*best.choices, *choices))


def _flops(plan: Plan) -> int:
    return sum(k.flops for k in plan.kernels)


def _outside(plan: Plan) -> int:
    """Bytes of all inputs and outputs together."""
    return sum(tensor_bytes(plan.shapes[t], plan.dtypes[t]) for t in {*plan.program.inputs, *plan.program.results} if t in plan.shapes)


def apart(a: Mapping[Work, float], b: Mapping[Work, float]) -> tuple[float, float]:
    """The seconds of the kernels of either plan that the other one has not."""
    return sum(a[work] for work in a.keys() - b.keys()), sum(b[work] for work in b.keys() - a.keys())


def _shared(plan: Plan) -> list[str]:
    """Products that joined a kernel which walks their rows or columns, or has another product; not what kernels make again anyway."""
    found: list[str] = []
    for kernel in plan.kernels:
        own = [s.target.tensor for s in kernel.statements if s.target.tensor not in plan.recomputed]
        found += [t for t in walked_products(kernel.statements) if t in own and len(own) > 1]
    return found
