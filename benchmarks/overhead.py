"""What tdsl costs the host: a cached call on tiny CPU tensors beside the same torch calls by hand, imports, and code generation.

    python -m benchmarks.overhead

Forward only: the inputs need no gradient. Then the calls that record one; forward and backward together, beside the same torch
calls in a torch.autograd.Function written by hand, and beside one that runs the very code that tdsl generates; both inside
torch.compile; a call whose sizes are new, in a class of sizes that was called before; and the launch of a kernel that is compiled,
beside Triton's own way to it, where both end at the driver: a launcher that does nothing stands in for it, no GPU is needed.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

import tdsl
from benchmarks.timing import compare

SIZE = 16
CALL_LIMIT = 25e-6  # seconds beyond the torch calls
IMPORT_LIMIT = 0.3
SOURCE_LIMIT = 0.050


class Fma(torch.autograd.Function):
    """x * a + b, in the older style, which costs the host least."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(x, a)
        return x * a + b

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, ...]:
        x, a = ctx.saved_tensors
        return g * a, g * x, g


class Matmul(torch.autograd.Function):
    """a @ b."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return a @ b

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, ...]:
        a, b = ctx.saved_tensors
        return g @ b.mT, a.mT @ g


class LinearRelu(torch.autograd.Function):
    """relu(x @ w.mT + b)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        y = F.linear(x, w, b).relu_()
        ctx.save_for_backward(x, w, y)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, ...]:
        x, w, y = ctx.saved_tensors
        z = torch.where(y > 0, g, 0)
        return z @ w, z.mT @ x, z.sum(0)


class Softmax(torch.autograd.Function):
    """softmax(x, -1)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.softmax(x, -1)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        p = g * y
        return p - y * p.sum(-1, keepdim=True)


class Same(torch.autograd.Function):
    """What tdsl runs for a call and its backward, in a Function as one writes it by hand: all that is left is what tdsl adds."""

    @staticmethod
    def forward(
        ctx: Any, run: Callable[..., tuple[Tensor, ...]], backward: Callable[..., tuple[Tensor, ...]], kept: bool, *args: Tensor
    ) -> Tensor:
        result, *saved = run(*args)
        ctx.save_for_backward(*args, *([result] if kept else ()), *saved)
        ctx.run, ctx.count = backward, len(args)
        return result

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        return (None, None, None, *ctx.run(g, *saved[: ctx.count], g, *saved[ctx.count :]))


def same(function: tdsl.Function, inputs: list[Tensor], g: Tensor) -> Callable[..., Tensor]:
    """`Same` for a function of one output."""
    trained = function.recorded_by(inputs)
    assert trained is not None
    call = trained.call_for(inputs)
    with torch.no_grad():
        result, *saved = call.forward(*inputs)
        kept = [result] if call.kept else []
        whole = call.whole
        assert whole.executor is not None
        run = whole.executor.ready([*inputs, g, *kept, *saved])
    if not whole.passed:
        return partial(Same.apply, call.forward, lambda _, *args: run(*args), bool(kept))

    def backward(g: Tensor, *args: Tensor) -> tuple[Tensor, ...]:  # whose last gradients are the cotangent itself
        return (*run(*args), *(g for _ in whole.passed))

    assert (*whole.gradients, *(n for n, _ in whole.passed)) == tuple(range(len(inputs)))
    return partial(Same.apply, call.forward, backward, bool(kept))


@dataclass(frozen=True, slots=True)
class Tiny:
    """A program on inputs of shapes `shapes`, the same in torch, and as a torch.autograd.Function. grows: how many of the inputs have a
    first size that may be any."""

    name: str
    text: str
    shapes: tuple[tuple[int, ...], ...]
    by_hand: Callable[..., Tensor]
    node: type[torch.autograd.Function]
    grows: int = 1


TINY = (
    Tiny("y[i] = x[i] * a[i] + b[i]", "y[i] = x[i] * a[i] + b[i]", ((SIZE,),) * 3, lambda x, a, b: x * a + b, Fma, 3),
    Tiny("matmul", "Y[i,j] += A[i,k] * B[k,j]", ((SIZE, SIZE),) * 2, lambda a, b: a @ b, Matmul),
    Tiny(
        "linear + bias + relu",
        "Z[n,o] += X[n,i] * W[o,i]\nY[n,o] = relu(Z[n,o] + b[o])",
        ((SIZE, SIZE), (SIZE, SIZE), (SIZE,)),
        lambda x, w, b: F.linear(x, w, b).relu(),
        LinearRelu,
    ),
    Tiny("softmax", "Y[n,c] = softmax[c](X[n,c])", ((SIZE, SIZE),), lambda x: torch.softmax(x, -1), Softmax),
)

ATTENTION = """
def {name}(Q[h,i,d], K[h,j,d], V[h,j,e], scale) -> O[h,i,e]:
    S[h,i,j] += Q[h,i,d] * K[h,j,d]
    P[h,i,j]  = softmax[j](scale * S[h,i,j])
    O[h,i,e] += P[h,i,j] * V[h,j,e]
"""
ATTENTION_ARGS = ("bf16[16,1024,64]", "bf16[16,1024,64]", "bf16[16,1024,64]", 0.125)


def calls(requires_grad: bool) -> list[dict[str, object]]:
    """Per program: seconds of a cached tdsl call and of torch by hand, their ratio and difference."""
    entries = []
    for tiny in TINY:
        function = tdsl.function(tiny.text)
        inputs = [torch.randn(shape, requires_grad=requires_grad) for shape in tiny.shapes]
        torch.testing.assert_close(function(*inputs), tiny.by_hand(*inputs))
        ours, torchs = compare(lambda f=function, x=inputs: f(*x), lambda f=tiny.by_hand, x=inputs: f(*x))  # type: ignore[misc]
        entries.append(
            {
                "what": f"{tiny.name}{', recording' if requires_grad else ''}",
                "tdsl": ours,
                "torch": torchs,
                "ratio": ours / torchs,
                "extra": ours - torchs,
                "limit": None if requires_grad else CALL_LIMIT,
                "ok": requires_grad or ours - torchs <= CALL_LIMIT,
            }
        )
    return entries


def trained(seconds: float = 1.0) -> list[dict[str, object]]:
    """Per program: seconds of forward and backward, by tdsl and by a Function written by hand."""
    entries = []
    for tiny in TINY:
        function = tdsl.function(tiny.text)
        inputs = [torch.randn(shape, requires_grad=True) for shape in tiny.shapes]
        cotangent = torch.randn_like(tiny.by_hand(*inputs))

        def step(f: Callable[..., Tensor], inputs: list[Tensor] = inputs, g: Tensor = cotangent) -> tuple[Tensor, ...]:
            return torch.autograd.grad(f(*inputs), inputs, g)

        others = {"a Function": tiny.node.apply, "one of the same work": same(function, inputs, cotangent)}
        for name, other in others.items():
            torch.testing.assert_close(step(function), step(other))
            ours, hand = compare(lambda f=function, s=step: s(f), lambda f=other, s=step: s(f), seconds)  # type: ignore[misc]
            what = f"{tiny.name}, forward and backward, beside {name}"
            entries.append(
                {"what": what, "tdsl": ours, "torch": hand, "ratio": ours / hand, "extra": ours - hand, "limit": None, "ok": True}
            )
    return entries


def resized(least: int = 33, most: int = 64) -> list[dict[str, object]]:
    """Per program: seconds of a call with a size that it has not seen, of a class that it has; of the first call; and of torch."""
    entries = []
    for tiny in TINY:
        function = tdsl.function(tiny.text)
        grown = [[(n, *shape[1:]) if p < tiny.grows else shape for p, shape in enumerate(tiny.shapes)] for n in range(least, most)]
        calls = [[torch.randn(shape) for shape in shapes] for shapes in grown]
        times = []
        for f in (function, tiny.by_hand):
            times.append([])
            for inputs in calls:
                start = time.perf_counter()
                f(*inputs)
                times[-1].append(time.perf_counter() - start)
        (first, *rest), torchs = times[0], statistics.median(times[1])
        ours = statistics.median(rest)
        what = f"{tiny.name}, sizes that are new (first call {first * 1e3:.1f} ms)"
        entries.append(
            {"what": what, "tdsl": ours, "torch": torchs, "ratio": ours / torchs, "extra": ours - torchs, "limit": None, "ok": True}
        )
    return entries


def compiled(seconds: float = 1.0) -> list[dict[str, object]]:
    """Per program: seconds of a call through torch.compile, of tdsl and of torch; nothing where no C++ compiler is found."""
    entries = []
    for tiny in TINY:
        function = tdsl.function(tiny.text)
        inputs = [torch.randn(shape) for shape in tiny.shapes]
        torch._dynamo.reset()
        try:
            pair = [torch.compile(f, fullgraph=True) for f in (function, tiny.by_hand)]
            torch.testing.assert_close(pair[0](*inputs), pair[1](*inputs))
        except torch._inductor.exc.InvalidCxxCompiler:
            return []
        ours, torchs = compare(lambda f=pair[0], x=inputs: f(*x), lambda f=pair[1], x=inputs: f(*x), seconds)  # type: ignore[misc]
        what = f"{tiny.name}, in torch.compile"
        entries.append(
            {"what": what, "tdsl": ours, "torch": torchs, "ratio": ours / torchs, "extra": ours - torchs, "limit": None, "ok": True}
        )
    return entries


def launched(seconds: float = 1.0) -> list[dict[str, object]]:
    """Per program: seconds of launching its kernel, and of doing so through Triton's own dispatch; nothing without Triton."""
    try:
        from benchmarks.no_device import no_device, on_device
    except ImportError:
        return []
    from lowering.triton_direct import jit_function
    from lowering.triton_launch import launcher

    entries = []
    for tiny in TINY:
        (step,) = tdsl.function(tiny.text).lower(*(torch.empty(shape, device="meta") for shape in tiny.shapes), target="cuda:90").steps
        kernel, integers = step.source, tuple(step.integers.values())
        assert kernel is not None
        tensors = [on_device(torch.zeros(SIZE, SIZE)) for _ in step.tile.buffers]
        arguments = [*tensors, *integers, *(a.value for a in kernel.args if a.kind == "constexpr")]
        with no_device(recording=False):
            run, theirs = launcher(kernel, 1, integers, interpret=False), jit_function(kernel)
            ours, tritons = compare(
                lambda f=run, x=tensors: f(x),  # type: ignore[misc]
                lambda f=theirs, x=arguments, o=kernel.options: f[(1,)](*x, **o),  # type: ignore[misc]
                seconds,
            )
        what = f"{tiny.name}, a launch beside Triton's own dispatch, the driver replaced"
        entries.append(
            {"what": what, "tdsl": ours, "torch": tritons, "ratio": ours / tritons, "extra": ours - tritons, "limit": None, "ok": True}
        )
    return entries


def import_time(runs: int = 5) -> dict[str, object]:
    """Seconds that `import tdsl` and `tdsl.function` take in a fresh process that has imported torch: the median of some."""
    code = "import torch, time; t = time.perf_counter(); import tdsl; tdsl.function; print(time.perf_counter() - t)"
    times = [float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout) for _ in range(runs)]
    median = statistics.median(times)
    return {"what": "import tdsl, beyond torch's own import", "tdsl": median, "limit": IMPORT_LIMIT, "ok": median <= IMPORT_LIMIT}


def source_time(runs: int = 9) -> dict[str, object]:
    """Seconds from the text of an attention program to its Triton source: the median over programs that no cache has seen."""
    times = []
    for run in range(runs + 1):
        text = ATTENTION.format(name=f"attention{run}")
        start = time.perf_counter()
        tdsl.function(text).emit("triton", *ATTENTION_ARGS, target="cuda:90")
        times.append(time.perf_counter() - start)
    median = statistics.median(times[1:])  # the first also loads modules and builds the grammar
    return {
        "what": "attention, text to Triton source",
        "tdsl": median,
        "first": times[0],
        "limit": SOURCE_LIMIT,
        "ok": median <= SOURCE_LIMIT,
    }


def run(console: Console) -> list[dict[str, object]]:
    """Measures all of it, prints it, and returns it; "ok" says whether an entry is within its limit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        entries = [*calls(requires_grad=False), *calls(requires_grad=True), *trained(), *compiled(), *resized(), *launched()]
    finally:
        torch.set_num_threads(threads)
    table = Table(title=f"a cached call on CPU tensors of size {SIZE}", title_justify="left")
    for column in ("program", "tdsl µs", "torch µs", "ratio", "extra µs", "limit µs"):
        table.add_column(column, justify="left" if column == "program" else "right")
    for e in entries:
        limit = "" if e["limit"] is None else f"{CALL_LIMIT * 1e6:.0f}"
        numbers = (f"{e['tdsl'] * 1e6:.1f}", f"{e['torch'] * 1e6:.1f}", f"{e['ratio']:.2f}", f"{e['extra'] * 1e6:.1f}")  # type: ignore[operator]
        table.add_row(escape(str(e["what"])), *numbers, limit, style=None if e["ok"] else "red")
    console.print(table)
    for e in (import_time(), source_time()):
        entries.append(e)
        first = f" (the first: {e['first'] * 1e3:.0f} ms)" if "first" in e else ""  # type: ignore[operator]
        line = f"{e['what']}: {e['tdsl'] * 1e3:.1f} ms{first}, limit {e['limit'] * 1e3:.0f} ms"  # type: ignore[operator]
        console.print(line, style=None if e["ok"] else "red", highlight=False, markup=False)
    return entries


if __name__ == "__main__":
    sys.exit(not all(entry["ok"] for entry in run(Console())))
