"""`python -m benchmarks [group or case ..]`: the table of tdsl beside torch, forward and backward, and the host's overhead.

    python -m benchmarks                         every group on this machine's device
    python -m benchmarks contractions layers     some groups; a case's name works too
    python -m benchmarks model [group or case ..]   what the cost model predicts beside what is measured, and rank correlations
    python -m benchmarks overhead                host cost of a call, import time, time from text to kernel source
    python -m benchmarks memory [--points N]     peak memory of programs with an N x N intermediate, N = 16,384
    python -m benchmarks numerics                errors against float64 of tdsl and of torch, on the same inputs
    python -m benchmarks --compile               with a column for torch.compile (always there on a GPU)

Exit status 1: something was wrong, or did not run.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import memory, model, numerics, overhead, report, timing
from benchmarks.cases import CASES, GROUPS, Case
from benchmarks.race import Row, rows


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="tdsl beside torch, timed in turns in the same run")
    parser.add_argument(
        "names", nargs="*", metavar="GROUP|CASE", help=f"{', '.join((*GROUPS, 'overhead', 'model', 'memory', 'numerics'))}, or a case (default: everything)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", action="append", help="only this dtype; may be given more than once")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=None, help="a column for torch.compile (default: on a GPU)"
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="about how long to time each row")
    parser.add_argument("--budget", type=float, default=float("inf"), help="start no further case after this many seconds")
    parser.add_argument("--points", type=int, default=16384, help="N of `memory`")
    parser.add_argument("--json", type=Path, help="write everything here, after each case")
    parser.add_argument("--markdown", type=Path, help="write the table here, after each case")
    options = parser.parse_args(arguments)
    known = {*GROUPS, *(case.name for case in CASES), "overhead", "model", "memory", "numerics"}
    for name in options.names:
        if name not in known:
            parser.error(f"no group or case is called {name!r}; there are {', '.join(sorted(known))}")
    if options.compile is None:
        options.compile = options.device == "cuda"
    return options


def main(arguments: list[str] | None = None) -> int:
    """Runs what the command line asks for; the exit status."""
    options = parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 200)
    chosen = [c for c in CASES if not options.names or c.group in options.names or c.name in options.names]
    jobs = [(c, d) for c in chosen for d in c.dtypes[options.device] if not options.dtype or d in options.dtype]
    if "model" in options.names:
        return int(not model.run(console, chosen or CASES, options.device, options.seconds / 3))
    if "memory" in options.names:
        return int(not memory.run(console, options.points))
    if "numerics" in options.names:
        numerics.run(console, options.device)
        return 0
    started = time.monotonic()
    failed = False
    extra: dict[str, object] = {}
    if not options.names or "overhead" in options.names:
        result = overhead.run(console)
        extra["overhead"] = result
        failed |= not all(entry["ok"] for entry in result)
    if jobs:
        failed |= any(row.failed for row in _run(jobs, options, console, started, extra))
    return int(failed)


def _run(
    jobs: list[tuple[Case, str]], options: argparse.Namespace, console: Console, started: float, extra: dict[str, object]
) -> list[Row]:
    device = options.device
    best = timing.ceilings(device, [getattr(torch, d) for d in dict.fromkeys(d for _, d in jobs)])
    done: list[Row] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(jobs))
        for case, dtype in jobs:
            if time.monotonic() - started > options.budget:
                console.print(f"the budget of {options.budget:.0f} s is spent: {case.name} ({dtype}) and what follows were left out")
                break
            progress.update(task, description=f"{case.name} ({dtype})")
            for row in rows(case, device, getattr(torch, dtype), best, compile=options.compile, seconds=options.seconds):
                done.append(row)
            if options.json:
                report.write_json(options.json, done, best, device, extra)
            if options.markdown:
                report.write_markdown(options.markdown, done, best, device)
            if device == "cuda":
                torch.cuda.empty_cache()
            progress.advance(task)
    matmul = ", ".join(f"{name} {flops * 1e-12:.3g} TFLOP/s" for name, flops in best.matmul.items())
    about = report.machine(device)
    title = f"{about['device']}, torch {about['torch']}; measured ceilings: copy {best.copy * 1e-9:.4g} GB/s, matmul {matmul}"
    console.print(report.rich_table(done, title))
    for row in done:
        if row.problem:
            why = f"{row.case} ({row.dtype}, {row.direction}): {row.problem}"
            console.print(why, style="red" if row.failed else "dim", highlight=False, markup=False)
    return done


if __name__ == "__main__":
    sys.exit(main())
