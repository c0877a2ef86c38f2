"""Short indices of kernels that walk pairs, written out: each of their values gets statements of its own.

    D[i,j] += (x[i,d] - y[j,d]) ** 2;  O[i,e] += exp(-D[i,j]) * b[j,e]
    -->  D[i,j] += (x[i,0] - y[j,0]) ** 2 + (x[i,1] - y[j,1]) ** 2;  O.e0[i] += exp(-D[i,j]) * b[j,0];  ..;  O[i,0] = O.e0[i];  ..

Tiles have powers of two of elements, which would be a quarter of nothing for three coordinates. And in two dimensions every value lies in
threads the same way: what three dimensions share with two, Triton computes twice, or moves through shared memory at each step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import product

from lowering.pairs import of_pairs
from lowering.plan import KernelPlan, Plan
from lowering.statement import extents, plain
from lowering.targets import Target
from tdsl.ir import REDUCTION_OF, Access, Call, Const, Expr, Index, Range, Statement, fresh_name, reads, rebuild, substitute
from tdsl.ops import DTYPES, REDUCTIONS
from tdsl.ssa import covers
from tdsl.traced import whole

# The longest index that is written out, and the most terms that a kernel may then have.
LONGEST, MOST = 16, 64


def write_out(
    plan: Plan, target: Target, dtypes: Mapping[str, str], precision: str
) -> tuple[Plan, dict[str, tuple[int, ...]], dict[str, str]]:
    """`plan` with the short indices of pairs written out; new tensors with their shapes, and with the tensor that each is a part of."""
    updated = plan.updated
    parts: dict[str, str] = {}
    shapes = dict(plan.shapes)
    kernels = []
    for kernel in plan.kernels:
        short = _short(kernel, dtypes) if not updated & {*kernel.stores} and of_pairs(kernel, dtypes, target, precision) else ()
        made = _Written(kernel, frozenset(short), {**shapes}).run() if short else None
        if made is not None:
            kernel = made.kernel
            shapes |= {new: made.shapes[new] for new in made.parts}
            parts |= made.parts
        kernels.append(kernel)
    dtypes = {**plan.dtypes, **{t: plan.dtypes[of] for t, of in parts.items()}}
    return replace(plan, kernels=tuple(kernels), shapes=shapes, dtypes=dtypes), {t: shapes[t] for t in parts}, parts


def cover(statements: Sequence[Statement], tensor: str, shape: tuple[int, ...]) -> bool:
    """Whether some statements write every element of a tensor, each perhaps for numbers of its own in some dimensions."""
    targets = [s for s in statements if s.target.tensor == tensor]
    fixed = [d for d, e in enumerate(targets[0].target.subscripts) if isinstance(e, Const)]
    numbers = {tuple(e.value for e in (s.target.subscripts[d] for d in fixed) if isinstance(e, Const)) for s in targets}

    def rest(s: Statement) -> bool:
        left = [d for d in range(len(shape)) if d not in fixed]
        target = replace(s.target, subscripts=tuple(s.target.subscripts[d] for d in left))
        return covers(replace(s, target=target), tuple(shape[d] for d in left))

    return numbers == {*product(*(range(shape[d]) for d in fixed))} and all(map(rest, targets))


def _short(kernel: KernelPlan, dtypes: Mapping[str, str]) -> tuple[str, ...]:
    """The inner indices to write out, shortest first; those that are held whole must be among them."""
    if any(DTYPES[dtypes[s.target.tensor]].kind != "float" or not plain(s.target) for s in kernel.statements):
        return ()
    found: tuple[str, ...] = ()
    for i in sorted((i for i in kernel.inner if i not in kernel.stream), key=lambda i: kernel.extents[i]):
        terms = sum(math.prod(n for j, n in extents(s).items() if j in (*found, i)) for s in kernel.statements)
        if 0 < kernel.extents[i] <= LONGEST and terms <= MOST:
            found = (*found, i)
    return found if {*kernel.whole} <= {*found} else ()


@dataclass(slots=True)
class _Written:
    """Rewrites one kernel. shapes: of all tensors; parts: what each new one is a part of. Both grow."""

    kernel: KernelPlan
    short: frozenset[str]
    shapes: dict[str, tuple[int, ...]]
    parts: dict[str, str] = field(default_factory=dict)
    names: dict[tuple[str, tuple[int, ...]], str] = field(default_factory=dict)
    fixed: dict[str, tuple[int, ...]] = field(default_factory=dict)  # the dimensions of tensors that are in parts

    def run(self) -> _Written | None:
        """The same with the new kernel; None where a part of a tensor is read at a computed place."""
        for s in self.kernel.statements:
            dims = tuple(d for d, e in enumerate(s.target.subscripts) if isinstance(e, Index) and e.name in self.short)
            if dims:
                self.fixed[s.target.tensor] = dims
        for a in (a for s in self.kernel.statements for a in reads(s) if a.tensor in self.fixed):
            if not all(isinstance(e := a.subscripts[d], Index) and e.name in self.short for d in self.fixed[a.tensor]):
                return None
        body = [t for s in self.kernel.statements for t in self._statements(s)]
        left = {i: n for i, n in self.kernel.extents.items() if i not in self.short}
        self.kernel = replace(self.kernel, statements=tuple(body), extents=left, whole=())
        return self

    def _statements(self, s: Statement) -> list[Statement]:
        size = extents(s)
        free = [i for i in s.indices if i in self.short and i not in s.reduced]
        summed = [i for i in s.indices if i in self.short and i in s.reduced]
        ranges = tuple(r for r in s.ranges if r.index not in self.short)
        found, copies = [], []
        for at in product(*(range(size[i]) for i in free)):
            place = dict(zip(free, at, strict=True))
            terms = [self._at(s.value, {**place, **dict(zip(summed, n, strict=True))}) for n in product(*(range(size[i]) for i in summed))]
            value = terms[0] if len(terms) == 1 else reduce(lambda a, b: Call(REDUCTIONS[REDUCTION_OF[s.op]].combine, (a, b)), terms)
            target = self._access(substitute(s.target, {i: Const(n) for i, n in place.items()}), s.target)
            found.append(replace(s, ranges=ranges, target=target, value=value))
            if free and s.target.tensor in self.kernel.stores:
                whole_place = substitute(s.target, {i: Const(n) for i, n in place.items()})
                assert isinstance(whole_place, Access)
                kept = tuple(Range(r.index, r.lo, r.hi) for r in ranges if r.index not in s.reduced)
                copies.append(Statement(kept, whole_place, "=", target, s.span))
        return [*found, *copies]

    def _at(self, value: Expr, place: Mapping[str, int]) -> Expr:
        """`value` for some numbers of the short indices."""
        return self._renamed(substitute(value, {i: Const(n) for i, n in place.items()}))

    def _renamed(self, e: Expr) -> Expr:
        e = rebuild(e, self._renamed)
        return self._access(e, e) if isinstance(e, Access) else e

    def _access(self, e: Expr, was: Access) -> Access:
        """An access to a part of a tensor, by the name of the part."""
        assert isinstance(e, Access)
        dims = self.fixed.get(e.tensor, ())
        if not dims:
            return e
        numbers = tuple(whole(n.value) for n in (e.subscripts[d] for d in dims) if isinstance(n, Const))
        if (e.tensor, numbers) not in self.names:
            target = next(s.target for s in self.kernel.statements if s.target.tensor == e.tensor)
            indices = [target.subscripts[d] for d in dims]
            label = "".join(f"{i.name}{n}" for i, n in zip(indices, numbers, strict=True) if isinstance(i, Index))
            name = fresh_name(f"{e.tensor}.{label}", {*self.shapes})
            self.names[e.tensor, numbers] = name
            self.shapes[name] = tuple(n for d, n in enumerate(self.shapes[e.tensor]) if d not in dims)
            self.parts[name] = e.tensor
        return Access(self.names[e.tensor, numbers], tuple(x for d, x in enumerate(e.subscripts) if d not in dims), was.span)
