"""The rows of `race.py` as a table for the terminal, as JSON, and as Markdown."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.table import Table

from benchmarks.race import FORWARD, Row
from benchmarks.timing import Ceilings

COLUMNS = (
    *("case", "sizes", "dtype", "", "kernels"),
    *("tdsl µs", "eager µs", "compile µs", "tdsl/eager", "±"),
    *("TFLOP/s", "GB/s", "of ceiling", "error"),
)


def cells(row: Row) -> tuple[str, ...]:
    """A row as text, in the order of COLUMNS."""
    what = (row.case, row.sizes, row.dtype, "fwd" if row.direction == FORWARD else "fwd+bwd")
    if row.problem:
        return (*what, *[""] * (len(COLUMNS) - len(what) - 1), "failed" if row.failed else "unsupported")

    def number(value: float | None, form: str, scale: float = 1.0) -> str:
        return "" if value is None else format(value * scale, form)

    return (
        *what,
        str(row.kernels),
        number(row.tdsl, ".1f", 1e6),
        number(row.eager, ".1f", 1e6),
        number(row.compiled, ".1f", 1e6),
        number(row.ratio, ".2f"),
        number(row.spread, ".0%"),
        number(row.tflops, ".3g"),
        number(row.gbytes, ".4g"),
        number(row.ceiling, ".0%"),
        number(row.error, ".1e"),
    )


def rich_table(rows: Sequence[Row], title: str) -> Table:
    """For a terminal."""
    table = Table(title=title, title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in COLUMNS[:4] else "right", overflow="fold")
    group = ""
    for row in rows:
        if group and row.group != group:
            table.add_section()
        group = row.group
        style = "red" if row.failed else "dim" if row.problem else None
        table.add_row(*cells(row), style=style)
    return table


def machine(device: str) -> dict[str, object]:
    """What was measured on, and with."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "tdsl": _version("tdsl"),
        "date": time.strftime("%Y-%m-%d"),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a checkout that is not installed
        return ""


def write_json(path: Path, rows: Sequence[Row], ceilings: Ceilings, device: str, extra: Mapping[str, object]) -> None:
    """Everything, to full precision."""
    data = {
        "machine": machine(device),
        "ceilings": asdict(ceilings),
        "rows": [{**asdict(row), "ratio": row.ratio} for row in rows],
        **extra,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def write_markdown(path: Path, rows: Sequence[Row], ceilings: Ceilings, device: str) -> None:
    """The table for people."""
    about = machine(device)
    matmul = ", ".join(f"{name} {flops * 1e-12:.4g} TFLOP/s" for name, flops in ceilings.matmul.items())
    lines = [
        f"# {about['device']}",
        "",
        f"torch {about['torch']}, triton {about['triton']}, Python {about['python']}, {about['date']}."
        f" Measured ceilings: copy {ceilings.copy * 1e-9:.4g} GB/s, matmul {matmul}.",
        "Medians of calls that take turns in one run, over rotated buffers. `tdsl/eager` below 1: faster than eager torch."
        " `±`: distance between the quartiles. `of ceiling`: the larger share of the two ceilings."
        " `error`: largest deviation from float64, output and gradients, as a share of the values' size.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "|".join(" --- " if c in COLUMNS[:4] else " ---: " for c in COLUMNS) + "|",
        *("| " + " | ".join(cell.replace("|", "\\|") for cell in cells(row)) + " |" for row in rows),
        "",
        *(f"- {row.case} ({row.dtype}, {row.direction}): {row.problem.splitlines()[0]}" for row in rows if row.problem),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines).rstrip() + "\n")
