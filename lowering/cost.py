"""How long a kernel takes at best: the roofline of its plan and tiles on a chip.

    seconds = max(tensor cores, operands, shared memory, arithmetic, exponentials, cache, memory) + launch

Each term is work over the rate that large problems sustain (`Target.sustained_flops`, `sustained_bandwidth`), as in Williams, Waterman
and Patterson, "Roofline", CACM 2009.

- Work is what the tile IR executes: padded lanes and what is computed again per tile count. A `Dot` of 16-bit, int8 or tf32 operands runs
  on tensor cores; other dots and everything elementwise on the vector units, where `Op.cost` counts instructions that take the place of
  two FLOPs. Exponentials, logarithms, roots and divisions take one result each of the special-function units.
  Products of 16-bit tiles below the rows of a warp group run at _MMA_SHARE of the tensor cores' rate where there are warp groups.
- Operands: where rows and columns of a product are on the grid, the tensor cores wait for what makes an operand in their own loop: all
  warps of a program make it, and then multiply it.
- Shared memory: what the tensor cores read of it, 128 bytes per clock and SM. A warp group reads its rows and all columns; warps that
  run by themselves share rows and columns by two. Products on the vector units issue a load for every four values of their operands.
- Wave quantization: programs run in waves of one per SM, and the last wave is as long as a full one: the compute terms are divided by
  `share` = programs / (waves * SMs).
- Cache: every tile that a program loads comes out of the last-level cache.
- Loads are as fast as there are bytes on their way (Little's law): those of one step of a loop, once per stage ahead, in as many
  programs as SMs hold. A kernel whose bytes are few takes the latency of memory. No program waits for what it stores.
- A loop with limits (of causal attention, say) takes the mean of its steps over the grid.
- Memory: `compulsory_bytes` is every element that is touched, once. Programs that run together read a tile once, and what a wave reads
  twice comes from the last-level cache if all that the wave reads fits there; what a later wave reads again counts again, unless all
  inputs fit. That is `bytes`.
- On a CPU every operation of the tile IR is one call of a torch operator, and intermediates larger than the cache pass through memory.
"""

from __future__ import annotations

import math
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from statistics import fmean

from lowering import tile_ir as ir
from lowering.plan import KernelPlan
from lowering.schedule import WGMMA, WGMMA_ROWS
from lowering.targets import Target
from tdsl.ir import Call, Const, Expr, Index, free_indices
from tdsl.ops import DTYPES, OPS, STORED_ONLY
from tdsl.traced import estimates, whole

# One special-function result takes as long as this many instructions of the vector units (16 lanes beside 128).
_SPECIAL_COST = 8.0
_SPECIAL = re.compile(r"tl\.(?:exp2?|log2?|r?sqrt|sin|cos|sigmoid|erf)\(| / ")
# How many vector or tensor-core passes one dot takes, by its input precision.
_MMA_SHARE = 0.62  # of what wgmma reaches on H100, as measured for mma.sync
_LATENCY = 0.7e-6  # seconds from a load to its data
_SHARED_COST = 8.0  # bytes of shared memory per special-function result: 128 and 16 per clock and SM
_PASSES = {"tf32": 1, "tf32x3": 3, "bf16x3": 3, "bf16x6": 6}


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the roofline says of one kernel.

    seconds: of one launch. bound: the term that decides: "tensor cores", "operands", "shared memory", "arithmetic", "exponentials",
    "cache", "memory" or "launch".
    flops: of the plan, without recomputation and padding. bytes: moved from and to memory. compulsory_bytes: each touched element once.
    exps: results of the special-function units. share: of the chip, busy averaged over the waves. least: seconds that
    no tiles can undercut: tensor cores and exponentials with no SM idle, each byte once. terms: seconds by bound.
    """

    seconds: float
    bound: str
    flops: int
    bytes: int
    compulsory_bytes: int
    exps: int
    share: float
    least: float
    terms: Mapping[str, float] = field(hash=False)


@estimates()
def predict(plan: KernelPlan, kernel: ir.Kernel, target: Target, *, compiled: bool = True) -> Prediction:
    """The roofline of a planned kernel with its tiles. compiled: whether its operations are one piece of machine code; else each
    is a call of its own, whose result passes through memory where the cache does not hold it."""
    work = _Work(kernel, target, compiled)
    programs = kernel.grid_tiles
    share = 1.0 if target.backend == "cpu" or not programs else programs / (math.ceil(programs / target.sms) * target.sms)
    fills = 1.0 if target.backend == "cpu" else _fills(kernel, target, work)
    peak = {name: rate * target.sustained_flops for name, rate in target.flops.items()}
    multiplying = sum(work.tensor[name] / peak[name] for name in work.tensor) / share
    making = max(sum(work.beside[name] / peak[name] for name in work.beside), work.beside_exps / target.exps) / share
    terms = {
        "tensor cores": multiplying,
        "operands": multiplying + making if making else 0.0,
        "arithmetic": sum(work.vector[name] / peak[name] for name in work.vector) / share,
        "exponentials": work.exps / target.exps / share,
        "shared memory": work.shared / (_SHARED_COST * target.exps) / share,
        "cache": 0.0 if target.backend == "cpu" else work.fetched / target.cache_bandwidth,
        "memory": max(work.bytes, work.waited / fills) / (target.bandwidth * target.sustained_bandwidth),
        "launch": target.launch * work.launches,
    }
    bound = max(terms, key=terms.__getitem__)
    seconds = max(terms[name] for name in terms if name != "launch") + terms["launch"]
    once = work.compulsory / (target.bandwidth * target.sustained_bandwidth)
    least = max(share * terms["tensor cores"], share * terms["exponentials"], once) + terms["launch"]
    return Prediction(seconds, bound, plan.flops, work.bytes, work.compulsory, work.exps, share, least, terms)


def _fills(kernel: ir.Kernel, target: Target, work: _Work) -> float:
    """The share of memory's rate that the loads on their way make up."""
    threads = kernel.num_warps * target.warp
    resident = min(max(1, kernel.grid_tiles), target.sms * max(1, min(target.blocks, target.threads // (2 * threads))))
    needed = target.bandwidth * target.sustained_bandwidth * _LATENCY
    return min(1.0, max(1, resident * work.on_the_way) / needed)


def _feeding(kernel: ir.Kernel) -> set[str]:
    """What is made in loops of products of which rows and columns are on the grid."""
    loops = [op for op in ir.operations(kernel.body) if isinstance(op, ir.For)]
    found: set[str] = set()
    for loop in loops:
        dots = [op for op in loop.body if isinstance(op, ir.Dot)]
        if dots and all(kernel.axis(a).role == "grid" for dot in dots for a in dot.dst.axes):
            found |= {op.dst.name for op in loop.body if isinstance(op, ir.Elementwise)}
    return found


def special_results(op: str) -> int:
    """How many results of the special-function units one evaluation of a scalar function takes, read off its Triton spelling."""
    row = OPS[op]
    return len(_SPECIAL.findall(f"{row.triton}\n{row.triton_def}"))


class _Work:
    """What a kernel executes in all programs together.

    tensor, vector: FLOPs by class of `Target.flops`, an instruction of the vector units being two.
    """

    def __init__(self, kernel: ir.Kernel, target: Target, compiled: bool):
        self.kernel = kernel
        self.compiled = compiled
        self.target = target
        self.tiles = {a.name: a.tile for a in kernel.axes}
        self.counts = {a.name: -(-a.extent // max(1, a.tile)) for a in kernel.axes}
        self.along: dict[str, frozenset[str]] = {}
        self.tensor: Counter[str] = Counter()
        self.vector: Counter[str] = Counter()
        self.exps = 0
        self.beside: Counter[str] = Counter()
        self.beside_exps = 0
        self.feeding = _feeding(kernel)
        self.operations = 0
        self.passed = 0
        self.shared = 0
        self.loads: list[tuple[ir.Load, float]] = []
        self.stored: Counter[ir.Buffer] = Counter()
        for op, times in _executed(kernel, kernel.body, 1.0):
            self._count(op, times)
        written = sum(self.stored.values())
        self.compulsory = sum(self._read_once().values()) + written
        loaded = self._loaded()
        self.waited = loaded + self.passed
        self.bytes = self.waited + written
        self.fetched = sum(round(self._tile(op) * times * kernel.grid_tiles) for op, times in self.loads)
        self.on_the_way = max(self._on_the_way(kernel.body, 1), 1)
        self.launches = 1 if compiled else max(1, self.operations)

    # -- operations -----------------------------------------------------------------------------------------------------

    def _count(self, op: ir.Operation, times: float) -> None:
        """One operation that each program executes `times` times, on average."""
        total = round(times * self.kernel.grid_tiles)
        if isinstance(op, ir.Elementwise | ir.Dot | ir.Fold | ir.Mask):
            self.operations += total
            self._pass(op, total)
        match op:
            case ir.Load():
                self.along[op.dst.name] = self._depends(op.subscripts)
                self.loads.append((op, times))
            case ir.Store():
                passes = 1 if op.mode == "set" else 2
                self.stored[op.buffer] += passes * _real(self.kernel, self._depends(op.subscripts)) * _item(op.buffer.dtype)
            case ir.IndexOf():
                self.along[op.dst.name] = self._depends((op.expr,))
            case ir.Elementwise():
                self.along[op.dst.name] = frozenset().union(
                    *(self.along.get(a.name, frozenset()) for a in op.args if isinstance(a, ir.Value))
                )
                special = special_results(op.op)
                points = total * self._elements(op.dst)
                self.exps += special * points
                cost = OPS[op.op].cost
                work = int(2 * points * (max(1.0, cost - _SPECIAL_COST * special) if special else cost))
                self.vector[_class(op.dst.dtype)] += work
                if op.dst.name in self.feeding:
                    self.beside[_class(op.dst.dtype)] += work
                    self.beside_exps += special * points
            case ir.Fold():
                self.along[op.dst.name] = self.along.get(op.src.name, frozenset())
                self.vector[_class(op.src.dtype)] += 2 * total * self._elements(op.src)
            case ir.Mask():
                self.along[op.dst.name] = self.along.get(op.src.name, frozenset())
            case ir.Dot():
                self._dot(op, total)

    def _dot(self, op: ir.Dot, total: int) -> None:
        self.along[op.dst.name] = self.along.get(op.lhs.name, frozenset()) | self.along.get(op.rhs.name, frozenset())
        flops = 2 * total * self._elements(op.dst) * math.prod(self.tiles[a] for a in op.contract)
        dtype, precision = op.lhs.dtype, self.kernel.input_precision
        rows = max((self.tiles[a] for a in op.dst.axes), default=1)
        if dtype in ("float16", "bfloat16", "int8") or dtype in STORED_ONLY:
            self.tensor["int8" if dtype in STORED_ONLY else dtype] += round(flops / self._rate(rows))
        elif dtype == "float32" and precision in _PASSES and self.target.backend != "cpu":
            self.tensor["bfloat16" if precision.startswith("bf16") else "tf32"] += round(_PASSES[precision] * flops / self._rate(rows))
        else:
            elements = max(1, self._elements(op.dst) // (self.kernel.num_warps * self.target.warp))
            side = 4 if elements >= 16 else 2 if elements >= 4 else 1
            operands = 0.0 if self.target.backend == "cpu" else (side + max(side, elements // side)) / 4 / elements
            self.vector[_class(dtype)] += round(flops * (1 + operands))
            return
        self.shared += total * self._read_by(op) * _item(dtype)

    def _rate(self, rows: int) -> float:
        return _MMA_SHARE if self.target.name in WGMMA and rows < WGMMA_ROWS else 1.0

    def _read_by(self, op: ir.Dot) -> int:
        """Elements of shared memory that the tensor cores read for a dot."""
        first = op.dst.axes[0] if op.dst.axes else ""
        left, right = (op.lhs, op.rhs) if first in op.lhs.axes else (op.rhs, op.lhs)
        rows = self.tiles.get(first, 1)
        if self.target.name in WGMMA and rows >= WGMMA_ROWS:
            together = 2 * WGMMA_ROWS if self.target.name == "cuda:100" else WGMMA_ROWS  # tcgen05 multiplies 128 rows at once
            return self._elements(left) + max(1, rows // together) * self._elements(right)
        return 2 * (self._elements(left) + self._elements(right))

    def _tile(self, op: ir.Load) -> int:
        return self._elements(op.dst) * _item(op.buffer.dtype)

    def _on_the_way(self, body: tuple[ir.Operation, ...], ahead: int) -> int:
        """Bytes that a program has loads of under way: of one step of a loop, with its stages where dots are fed."""
        own = ahead * sum(self._tile(op) for op in body if isinstance(op, ir.Load))
        inner = [op for op in body if isinstance(op, ir.For)]
        stages = max(1, self.kernel.num_stages - 1)
        fed = [self._on_the_way(op.body, stages if any(isinstance(o, ir.Dot) for o in op.body) else 1) for op in inner]
        return max([own, *fed])

    def _pass(self, op: ir.Elementwise | ir.Dot | ir.Fold | ir.Mask, total: int) -> None:
        """On a CPU, what an operation writes to memory and reads of other operations' results."""
        if self.compiled:
            return
        loaded = {load.dst.name for load, _ in self.loads}
        operands = op.args if isinstance(op, ir.Elementwise) else (op.lhs, op.rhs) if isinstance(op, ir.Dot) else (op.src,)
        for value in (op.dst, *(v for v in operands if isinstance(v, ir.Value) and v.name not in loaded)):
            size = self._elements(value) * _item(value.dtype)
            self.passed += total * size if size > self.target.cache else 0

    def _elements(self, value: ir.Value) -> int:
        return math.prod(self.tiles[a] for a in value.axes)

    def _depends(self, subscripts: tuple[Expr, ...]) -> frozenset[str]:
        """The axes that an access varies along, those that integer values in its subscripts vary along included."""
        found: set[str] = set()
        for name in (i for e in subscripts for i in free_indices(e)):
            found |= self.along[name] if name in self.along else {self.kernel.axis_of(name).name}
        return frozenset(found)

    # -- memory ---------------------------------------------------------------------------------------------------------

    def _read_once(self) -> dict[ir.Buffer, int]:
        """Bytes of each tensor that are read at all: no more than it has, no more than its accesses have points."""
        read: Counter[ir.Buffer] = Counter()
        for buffer, subscripts in {(op.buffer, op.subscripts) for op, _ in self.loads}:
            read[buffer] += _real(self.kernel, self._depends(subscripts)) * _item(buffer.dtype)
        return {b: min(math.prod(b.shape) * _item(b.dtype), size) for b, size in read.items()}

    def _loaded(self) -> int:
        """Bytes that loads bring from memory: what each wave of programs reads, or everything once where that fits the cache."""
        once = sum(self._read_once().values())
        if once <= self.target.cache:
            return once
        together = 1 if self.target.backend == "cpu" else self.target.sms
        windows = _windows(self.kernel, self.counts, together)
        distinct: dict[tuple[ir.Buffer, tuple[Expr, ...]], int] = {}
        every = alone = 0.0
        for op, times in self.loads:
            along = self._depends(op.subscripts)
            tile = self._elements(op.dst) * _item(op.buffer.dtype)
            wave = tile * math.prod(windows[a] for a in along if a in windows)
            loops = math.prod(self.counts[a.name] for a in self.kernel.axes if a.role == "loop" and a.name in along)
            distinct[op.buffer, op.subscripts] = wave * loops
            every += wave * times
            alone += tile * times * self.kernel.grid_tiles
        per_wave = sum(distinct.values())
        waves = -(-self.kernel.grid_tiles // together)
        return max(once, round(min(alone, waves * (per_wave if per_wave <= self.target.cache else every))))


def _executed(kernel: ir.Kernel, body: tuple[ir.Operation, ...], times: float) -> Iterator[tuple[ir.Operation, float]]:
    """Every operation, and how often one program executes it on average."""
    for op in body:
        if isinstance(op, ir.For):
            yield from _executed(kernel, op.body, times * _steps(kernel, op))
        else:
            yield op, times


# Tiles of each grid axis that the mean over the grid is taken of.
_SAMPLES = 32
_EVALUATE: Mapping[str, Callable[..., int]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "floordiv": operator.floordiv, "mod": operator.mod,
    "neg": operator.neg, "minimum": min, "maximum": max,
}  # fmt: skip


def _steps(kernel: ir.Kernel, loop: ir.For) -> float:
    """The tiles that a loop walks, its limits averaged over the tiles of the grid that they depend on."""
    axis = loop.axis
    names = {name for bound in (loop.lo, loop.hi) if bound is not None for name in free_indices(bound)}
    axes = list({kernel.axis_of(_index(name)).name: kernel.axis_of(_index(name)) for name in names}.values())
    steps = []
    for at in product(*(_sampled(-(-a.extent // max(1, a.tile))) for a in axes)):
        place = {a.name: number for a, number in zip(axes, at, strict=True)}
        lo = 0 if loop.lo is None else max(0, _end(kernel, loop.lo, place)) // axis.tile
        hi = axis.extent if loop.hi is None else min(axis.extent, _end(kernel, loop.hi, place))
        steps.append(max(0, -(-hi // max(1, axis.tile)) - lo))
    return fmean(steps) if steps else 0.0


def _sampled(count: int) -> list[int]:
    """Numbers of tiles, spread evenly."""
    return list(range(count)) if count <= _SAMPLES else [(2 * n + 1) * count // (2 * _SAMPLES) for n in range(_SAMPLES)]


def _index(end: str) -> str:
    """`last(i)` --> `i`."""
    return end.partition("(")[2].rstrip(")")


def _end(kernel: ir.Kernel, e: Expr, place: Mapping[str, int]) -> int:
    """An integer expression of the ends of a program's tiles; `place`: the number of its tile along each axis."""
    match e:
        case Const(value=value):
            return whole(value)
        case Index(name=name):
            axis = kernel.axis_of(_index(name))
            first = place[axis.name] * axis.tile
            return first if name.startswith("first(") else first + axis.tile - 1
        case Call(op=op, args=args):
            return whole(_EVALUATE[op](*(_end(kernel, a, place) for a in args)))
    raise AssertionError(e)


def _windows(kernel: ir.Kernel, counts: Mapping[str, int], together: int) -> dict[str, int]:
    """How many tiles of each grid axis the programs of one wave cover; the last axis varies fastest, `group` tiles of the one before it
    walked together."""
    axes = [a for a in kernel.axes if a.role == "grid"]
    windows: dict[str, int] = {}
    left = together
    if kernel.group > 1 and len(axes) >= 2 and not axes[-1].scalar and not axes[-2].scalar:
        m, n = axes[-2:]
        rows = min(counts[m.name], max(min(kernel.group, left), -(-left // max(1, counts[n.name]))))
        windows = {m.name: rows, n.name: min(counts[n.name], -(-left // max(1, rows)))}
        left = -(-left // max(1, counts[m.name] * counts[n.name]))
        axes = axes[:-2]
    for axis in reversed(axes):
        windows[axis.name] = min(counts[axis.name], left)
        left = -(-left // max(1, counts[axis.name]))
    return windows


def _real(kernel: ir.Kernel, along: frozenset[str]) -> int:
    """The points of some axes, without padding."""
    return math.prod(a.extent for a in kernel.axes if a.name in along)


def _class(dtype: str) -> str:
    return "float64" if dtype == "float64" else "float32"


def _item(dtype: str) -> int:
    return DTYPES[dtype].bits // 8
