"""The configurations of a kernel that come into question without tuning, the best first.

Of what fits the registers and the shared memory (`registers.fits`) the first that is predicted to take about as long as the fastest is
the default, in the form that lowering/choice.py gives it.
"""

from __future__ import annotations

from collections.abc import Iterator

from lowering.plan import KernelPlan
from lowering.rows import rows_schedule
from lowering.schedule import Dtypes, Schedule, Strides, contraction_schedules, family, stream_schedules, whole_schedule
from lowering.targets import Target
from lowering.walking import walking_schedules


def candidates(kernel: KernelPlan, strides: Strides, dtypes: Dtypes, target: Target, precision: str = "ieee", walks: bool = False) -> Iterator[Schedule]:
    """Configurations in order of preference; the last one is as small as they get. strides: of every tensor in memory, in elements.
    precision: of float32 matrix products ("ieee" ones run on the vector units). walks: whether programs walk rows one by one (fold.py)."""
    kind = family(kernel, dtypes, target)
    if walks:
        yield from walking_schedules(kernel, dtypes, target)
    elif kind == "whole":
        yield whole_schedule(kernel)
    elif kind == "stream":
        yield from stream_schedules(kernel, dtypes, target, precision)
    elif kind == "contraction":
        yield from contraction_schedules(kernel, strides, dtypes, target, precision)
    else:
        for scale in (1.0, 2.0, 4.0, 0.5, 0.25):
            yield rows_schedule(kernel, strides, dtypes, target, scale)
