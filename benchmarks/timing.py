"""How long a call takes: the median of many, competitors in turns, buffers rotated so that no cache serves what memory should.

On a CPU with one thread the clock is that thread's: what other processes take of the core does not count. With more it is the wall's.
On CUDA the time is the device's own, between two events around the call. The device first sleeps for as long as the host needs to
enqueue the call, so that host overhead never stands between the events; `benchmarks/overhead.py` measures that overhead by itself.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch

Run = Callable[[int], object]  # a call on buffer set number i

# Together the rotated buffer sets exceed every last-level cache in use by far.
ROTATED_BYTES = {"cpu": 128 << 20, "cuda": 512 << 20}
MAX_SETS = 16


@dataclass(frozen=True, slots=True)
class Sample:
    """Times of one competitor, in seconds."""

    times: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median time."""
        return statistics.median(self.times)

    @property
    def spread(self) -> float:
        """The distance between the quartiles, as a share of the median."""
        if len(self.times) < 4:
            return float("nan")
        low, _, high = statistics.quantiles(self.times, n=4)
        return (high - low) / self.median


def buffer_sets(bytes_per_set: int, device: str) -> int:
    """How many sets of buffers to rotate."""
    return max(2, min(MAX_SETS, -(-ROTATED_BYTES[device] // max(1, bytes_per_set))))


def measure(
    runs: Mapping[str, Run], device: str, sets: int = 1, seconds: float = 1.0, rounds: tuple[int, int] = (7, 200)
) -> dict[str, Sample]:
    """Times each of `runs`, in turns: every round calls each of them once, on the same buffer set.

    seconds: about how long to go on. rounds: the least and the most. The first calls, which compile, are not counted.
    """
    for run in runs.values():
        for i in range(min(2, sets)):
            run(i)
    synchronize(device)
    warm = time.perf_counter()
    for run in runs.values():
        run(0)
    synchronize(device)
    once = time.perf_counter() - warm
    least, most = rounds
    count = max(least, min(most, int(seconds / max(once, 1e-7))))
    order = list(runs)
    collecting = gc.isenabled()
    gc.disable()
    try:
        timed = (_cuda_times if device == "cuda" else _cpu_times)(runs, order, sets, count)
    finally:
        if collecting:
            gc.enable()
    return {name: Sample(tuple(timed[name])) for name in runs}


def _cpu_times(runs: Mapping[str, Run], order: list[str], sets: int, count: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    for r in range(count):
        for name in order if r % 2 else reversed(order):  # whoever comes second finds warmer caches: take turns in that too
            run = runs[name]
            start = clock()
            run(r % sets)
            times[name].append(clock() - start)
    return times


def _cuda_times(runs: Mapping[str, Run], order: list[str], sets: int, count: int) -> dict[str, list[float]]:
    host = {name: _host_seconds(run) for name, run in runs.items()}
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in runs}
    for r in range(count):
        for name in order if r % 2 else reversed(order):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(int(1.5 * host[name] * _cycles_per_second()))
            start.record()
            runs[name](r % sets)
            end.record()
            events[name].append((start, end))
        torch.cuda.synchronize()
    return {name: [start.elapsed_time(end) * 1e-3 for start, end in pairs] for name, pairs in events.items()}


def _host_seconds(run: Run) -> float:
    """How long the host is busy with one call: the device is asleep meanwhile, so nothing waits for it."""
    times = []
    for _ in range(3):
        torch.cuda.synchronize()
        torch.cuda._sleep(int(0.002 * _cycles_per_second()))
        start = time.perf_counter()
        run(0)
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return min(max(times) + 2e-5, 2e-3)


@cache
def _cycles_per_second() -> float:
    cycles = 20_000_000
    torch.cuda._sleep(cycles)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    torch.cuda._sleep(cycles)
    end.record()
    torch.cuda.synchronize()
    return cycles / (1e-3 * float(start.elapsed_time(end)))


def synchronize(device: str) -> None:
    """Waits for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def compare(a: Callable[[], object], b: Callable[[], object], seconds: float = 1.0, batch: int = 50) -> tuple[float, float]:
    """The median times of two short calls on the CPU, in batches that take turns."""
    for _ in range(3 * batch):
        a()
        b()
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    turn = 0
    while time.perf_counter() < end or turn < 10:
        for which in (0, 1) if turn % 2 else (1, 0):
            call = (a, b)[which]
            start = time.perf_counter()
            for _ in range(batch):
                call()
            times[which].append((time.perf_counter() - start) / batch)
        turn += 1
    return statistics.median(times[0]), statistics.median(times[1])


# ---------------------------------------------------------------------------------------------------------------------
# What this machine can do at best


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Measured: bytes per second of a large copy (read + written), and FLOP/s of a large matmul, by dtype."""

    copy: float
    matmul: Mapping[str, float]


def ceilings(device: str, dtypes: Sequence[torch.dtype], seconds: float = 1.0) -> Ceilings:
    """Measures the ceilings that the tables compare with: the best of torch's own copy and matmul here, now."""
    count = (1 << 26) if device == "cpu" else (1 << 29)
    copy = 2 * count / min(measure({"copy": _copy(count, device)}, device, seconds=seconds)["copy"].times)
    matmul = {}
    n = 1024 if device == "cpu" else 8192
    for dtype in dtypes:
        times = measure({"matmul": _matmul(n, dtype, device)}, device, seconds=seconds)["matmul"].times
        matmul[name_of(dtype)] = 2 * n**3 / min(times)
    return Ceilings(copy, matmul)


def _copy(count: int, device: str) -> Run:
    source, target = (torch.ones(count // 4, device=device) for _ in range(2))  # zeros could be one page, mapped many times
    return lambda _: target.copy_(source)


def _matmul(n: int, dtype: torch.dtype, device: str) -> Run:
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return lambda _: a @ b


def name_of(dtype: torch.dtype) -> str:
    """`torch.bfloat16` -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")
