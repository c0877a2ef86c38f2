"""The configurations of a kernel that come into question without tuning, the best first.

Of what fits the registers and the shared memory (`registers.fits`) the first that is predicted to take about as long as the fastest is
the default, in the form that lowering/choice.py gives it.
"""

from __future__ import annotations

from collections.abc import Iterator

from lowering.contraction import contraction
from lowering.pairs import of_pairs, pair_schedules
from lowering.plan import KernelPlan
from lowering.rows import rows_schedule
from lowering.schedule import Dtypes, Schedule, Strides, contraction_schedules, main_product, stream_schedules, whole_schedule
from lowering.targets import Target
from lowering.walking import walking_schedules
from tdsl.ir import free_indices


def candidates(kernel: KernelPlan, strides: Strides, dtypes: Dtypes, target: Target, precision: str = "ieee", walks: bool = False) -> Iterator[Schedule]:
    """Configurations in order of preference; the last one is as small as they get. strides: of every tensor in memory, in elements.
    precision: of float32 matrix products ("ieee" ones run on the vector units). walks: whether programs walk rows one by one (fold.py)."""
    kind = family(kernel, dtypes, target, precision)
    if walks:
        yield from walking_schedules(kernel, dtypes, target)
    elif kind == "whole":
        yield whole_schedule(kernel)
    elif kind == "stream":
        yield from stream_schedules(kernel, dtypes, target, precision)
    elif kind == "pairs":
        yield from pair_schedules(kernel, target)
    elif kind == "contraction":
        yield from contraction_schedules(kernel, strides, dtypes, target, precision)
    else:
        for scale in (1.0, 2.0, 4.0, 0.5, 0.25):
            yield rows_schedule(kernel, strides, dtypes, target, scale)


def family(kernel: KernelPlan, dtypes: Dtypes, target: Target, precision: str = "ieee") -> str:
    """How a kernel is walked: "whole" tensors, "pairs" of points, a "stream" of tiles, one "contraction", or "rows" of elementwise
    work and reductions."""
    if target.backend == "cpu":
        return "whole"
    if of_pairs(kernel, dtypes, target, precision):
        return "pairs"
    linked = any(set(kernel.stream) & set(free_indices(s.target)) for s in kernel.statements)
    if linked and any(contraction(s) for s in kernel.statements) and not _batched_stream(kernel):
        return "stream"
    return "rows" if main_product(kernel, dtypes) is None else "contraction"


def _batched_stream(kernel: KernelPlan) -> bool:
    """Whether the stream walks batches of contractions whose rows and columns are both on the grid: a matrix at a time."""
    along, grid = set(kernel.stream), set(kernel.grid)
    found = [c for c in (contraction(s) for s in kernel.statements) if c is not None]
    return all(along <= set(c.batch) and {*c.m, *c.n} <= grid for c in found)
