"""What tdsl costs the host: a cached call on tiny CPU tensors beside the same torch calls by hand, imports, and code generation.

    python -m benchmarks.overhead

Forward only: the inputs need no gradient. A second table shows the calls that record one.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class Tiny:
    """A program on inputs of shapes `shapes`, and the same in torch."""

    name: str
    text: str
    shapes: tuple[tuple[int, ...], ...]
    by_hand: Callable[..., Tensor]


TINY = (
    Tiny("y[i] = x[i] * a[i] + b[i]", "y[i] = x[i] * a[i] + b[i]", ((SIZE,),) * 3, lambda x, a, b: x * a + b),
    Tiny("matmul", "Y[i,j] += A[i,k] * B[k,j]", ((SIZE, SIZE),) * 2, lambda a, b: a @ b),
    Tiny(
        "linear + bias + relu",
        "Z[n,o] += X[n,i] * W[o,i]\nY[n,o] = relu(Z[n,o] + b[o])",
        ((SIZE, SIZE), (SIZE, SIZE), (SIZE,)),
        lambda x, w, b: F.linear(x, w, b).relu(),
    ),
    Tiny("softmax", "Y[n,c] = softmax[c](X[n,c])", ((SIZE, SIZE),), lambda x: torch.softmax(x, -1)),
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
        entries = [*calls(requires_grad=False), *calls(requires_grad=True)]
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
