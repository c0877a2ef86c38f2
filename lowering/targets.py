"""What each chip has: the numbers that the cost model, the resource limits and the reports read.

Sources. A100: NVIDIA A100 datasheet (SXM, 80 GB) and the table of compute capabilities in the CUDA programming guide.
H100: H100 datasheet (SXM5, without sparsity). B200: HGX B200 datasheet divided by eight, without sparsity.
MI300X: AMD CDNA 3 white paper and MI300X datasheet.
exps: special-function results per clock and SM x SMs x boost clock: 16 on NVIDIA; on a CDNA 3 compute unit a quarter of the vector
lanes, which is 16 too. cache: the same sources; B200's 126 MB are what published measurements (Chips and Cheese, 2025) report.
cache_bandwidth: 64 bytes per clock and SM on NVIDIA and AMD alike; B200's tensor cores would starve on that, so twice as much is assumed.
sustained: what large matmuls and copies reach of the datasheet; on H100 798 of 989 TFLOP/s and 3.0 of
3.35 TB/s have been measured, the others are taken to be alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from tdsl.errors import ArgumentError


@dataclass(frozen=True, slots=True)
class Target:
    """One chip.

    sms: multiprocessors (compute units, CPU cores). registers: 32-bit, per SM and the most one thread may have.
    shared_block, shared_sm: bytes of shared memory that one block may use and that an SM has. threads, blocks: residents per SM.
    flops: peak FLOP/s by class: "float64", "float32" (vector units), "tf32", "float16", "bfloat16", "int8" (tensor cores).
    bandwidth: bytes/s of memory. exps: exponentials/s. launch: seconds from one small kernel to the next.
    cache: bytes of the last-level cache that all SMs share; cache_bandwidth: bytes/s from it to the SMs. sustained_flops,
    sustained_bandwidth: the fractions of the peaks that large problems reach. descriptors: whether hardware moves tiles by descriptors.
    """

    name: str
    chip: str
    sms: int
    warp: int
    registers_sm: int
    registers_thread: int
    shared_block: int
    shared_sm: int
    threads: int
    blocks: int
    flops: Mapping[str, float] = field(hash=False)
    bandwidth: float
    exps: float
    launch: float
    cache: int
    cache_bandwidth: float
    sustained_flops: float = 0.8
    sustained_bandwidth: float = 0.9
    descriptors: bool = False

    @property
    def backend(self) -> str:
        """ "cuda", "hip" or "cpu"."""
        return self.name.partition(":")[0]

    @property
    def float8(self) -> bool:
        """Whether its kernels read tensors of 8-bit floats, and its tensor cores multiply them."""
        return self.name in ("cuda:90", "cuda:100")


def _flops(float64: float, float32: float, tf32: float, float16: float, int8: float) -> Mapping[str, float]:
    tera = {"float64": float64, "float32": float32, "tf32": tf32, "float16": float16, "bfloat16": float16, "int8": int8}
    return MappingProxyType({name: value * 1e12 for name, value in tera.items()})


@dataclass(frozen=True, slots=True)
class Pays:
    """When a CPU's kernels are worth compiling as C++: from so many points of a statement, or so many operations of a program at any size.
    operations: None where sizes alone decide."""

    points: int = 0
    operations: int | None = None


TARGETS: Mapping[str, Target] = {
    t.name: t
    for t in (
        Target("cuda:80", "A100", 108, 32, 65536, 255, 166912, 167936, 2048, 32,
               _flops(9.7, 19.5, 156, 312, 624), bandwidth=2.039e12, exps=108 * 16 * 1.41e9, launch=5e-6, cache=40 << 20, cache_bandwidth=108 * 64 * 1.41e9),
        Target("cuda:90", "H100", 132, 32, 65536, 255, 232448, 233472, 2048, 32,
               _flops(34, 67, 494.7, 989.4, 1979), bandwidth=3.35e12, exps=132 * 16 * 1.755e9, launch=5e-6, cache=50 << 20, cache_bandwidth=132 * 64 * 1.755e9,
               descriptors=True),
        Target("cuda:100", "B200", 148, 32, 65536, 255, 232448, 233472, 2048, 32,
               _flops(37, 75, 1125, 2250, 4500), bandwidth=7.7e12, exps=148 * 16 * 1.85e9, launch=5e-6, cache=126 << 20, cache_bandwidth=148 * 128 * 1.85e9,
               descriptors=True),
        # A CDNA 3 compute unit: four SIMDs with 512 vector registers of 64 lanes each, at most 8 waves per SIMD.
        Target("hip:gfx942", "MI300X", 304, 64, 131072, 512, 65536, 65536, 2048, 32,
               _flops(81.7, 163.4, 653.7, 1307.4, 2614.9), bandwidth=5.3e12, exps=304 * 16 * 2.1e9, launch=8e-6, cache=256 << 20, cache_bandwidth=304 * 64 * 2.1e9),
        # A server CPU of eight cores with 256-bit fused multiply-adds at 3 GHz.
        # shared: one core's second-level cache. launch: one torch operator.
        Target("cpu", "CPU", 8, 1, 16 * 8, 16 * 8, 1 << 20, 1 << 20, 1, 1,
               _flops(0.384, 0.768, 0.768, 0.768, 0.768), bandwidth=5e10, exps=8 * 1e9, launch=5e-6, cache=8 << 20, cache_bandwidth=5e11),
    )
}  # fmt: skip


def find_target(name: str) -> Target:
    """The description of `name`; ArgumentError, with the names that there are, if there is none."""
    if name not in TARGETS:
        raise ArgumentError(f"unknown target {name!r}", help="the targets are " + ", ".join(TARGETS))
    return TARGETS[name]
