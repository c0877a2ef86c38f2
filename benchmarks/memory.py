"""Peak memory of programs whose intermediate has N^2 elements, forward and backward, at sizes where that would not do.

Each runs in a process of its own, on the CPU. Growth is of the resident set, above that of the same pass over few points.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

FEW = 256


@dataclass(frozen=True, slots=True)
class Program:
    """text: the notation. widths: of each input beside the points. heads: batch elements; 0 where there is no such dimension."""

    name: str
    text: str
    widths: tuple[int, ...]
    heads: int

    def intermediate(self, points: int) -> float:
        """MiB of one N x N intermediate."""
        return max(1, self.heads) * points * points * 4 / (1 << 20)


ATTENTION = "S[h,i,j] += Q[h,i,d] * K[h,j,d]\nP[h,i,j] = softmax[j](0.125 * S[h,i,j])\nO[h,i,e] += P[h,i,j] * V[h,j,e]"
PROGRAMS = (
    Program("kernel sum", "S[i,j] += (x[i,d] - y[j,d]) ** 2\nO[i,e] += exp(-S[i,j]) * w[j,e]", (3, 3, 4), 0),
    Program("attention, one head", ATTENTION, (64, 64, 64), 1),
    Program("attention, eight heads", ATTENTION, (64, 64, 64), 8),
)
_SCRIPT = """
import resource, sys, time
import torch
import tdsl

text, widths, heads, points, few = sys.argv[1], [int(x) for x in sys.argv[2].split(",")], *map(int, sys.argv[3:6])
f = tdsl.function(text)

def run(n):
    args = [torch.randn(*([heads] if heads else []), n, w).requires_grad_() for w in widths]
    start = time.perf_counter()
    output = f(*args)
    middle = time.perf_counter()
    torch.autograd.grad(output, args, torch.ones_like(output))
    held = sum(x.nbytes for x in args) + output.nbytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, middle - start, time.perf_counter() - middle, held / (1 << 20)

run(few)
first = run(few)[0]
run(points // 2)
peak, forward, backward, held = run(points)
print(peak - first, forward, backward, held)
"""


def measure(program: Program, points: int) -> tuple[float, float, float, float]:
    """MiB by which the peak grows from FEW points, seconds forward and backward (with compiling), MiB of inputs and output."""
    given = [program.text, ",".join(map(str, program.widths)), str(program.heads), str(points), str(FEW)]
    done = subprocess.run([sys.executable, "-c", _SCRIPT, *given], capture_output=True, text=True, check=True)
    growth, forward, backward, held = map(float, done.stdout.split())
    return growth, forward, backward, held


def run(console: Console, points: int) -> bool:
    """Prints the table; whether every growth is far below one intermediate."""
    table = Table(title=f"peak memory at N = {points:,}, forward and backward, on the CPU", title_justify="left")
    for column in ("program", "inputs and output MiB", "growth of the peak MiB", "one N x N intermediate MiB", "forward s", "backward s"):
        table.add_column(column, justify="left" if column == "program" else "right")
    fine = True
    for program in PROGRAMS:
        growth, forward, backward, held = measure(program, points)
        whole = program.intermediate(points)
        fine &= growth < whole / 4
        table.add_row(program.name, f"{held:.1f}", f"{growth:.1f}", f"{whole:,.0f}", f"{forward:.2f}", f"{backward:.2f}")
    console.print(table)
    return fine
