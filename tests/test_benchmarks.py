"""The benchmark programs at small sizes: that they are right, and that the comparison notices when they are not."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from benchmarks import race, report, timing
from benchmarks.cases import CASES, Case

NAMED = {case.name: case for case in CASES}


def small(case: Case, device: str) -> Case:
    """The same program at sizes that are all different and not multiples of anything."""
    primes = (5, 7, 11, 13, 3, 17)
    names = case.sizes[device]
    sizes = dict(zip(names, primes, strict=False))
    if case.name.startswith("attention"):
        sizes |= {"d": 64}  # its scale is 1 / sqrt(64)
    return replace(case, sizes={device: sizes})


@pytest.mark.parametrize("name", NAMED)
def test_programs_agree_with_torch(name: str) -> None:
    import tdsl

    case = small(NAMED[name], "cpu")
    race.verify(case, tdsl.function(case.text), case.make("cpu", torch.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMED)
def test_programs_agree_with_torch_on_a_gpu(name: str, dtype: str) -> None:
    import tdsl

    case = small(NAMED[name], "cuda")
    race.verify(case, tdsl.function(case.text), case.make("cuda", getattr(torch, dtype)))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda a, b: 1.001 * (a @ b),
        lambda a, b: (a.detach() @ b) + 0 * a.sum(),
        lambda a, b: (a @ b)[:-1],
        lambda a, b: (a @ b) * float("nan"),
    ],
    ids=["value", "gradient", "shape", "nan"],
)
def test_verify_notices(wrong: Callable[..., Tensor]) -> None:
    case = small(NAMED["matmul"], "cpu")
    with pytest.raises(AssertionError):
        race.verify(case, wrong, case.make("cpu", torch.float32))


def test_rows_and_reports(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    case = small(NAMED["matmul"], "cpu")
    monkeypatch.setattr(race.tdsl, "function", lambda _: _Matmul(), raising=False)
    best = timing.Ceilings(copy=1e9, matmul={"float32": 1e9})
    rows = list(race.rows(case, "cpu", torch.float32, best, compile=False, seconds=0.001))
    assert [row.direction for row in rows] == [race.FORWARD, race.BOTH]
    assert all(row.ratio and not row.problem for row in rows)
    report.write_json(tmp_path / "a" / "t.json", rows, best, "cpu", {"more": 1})
    assert json.loads((tmp_path / "a" / "t.json").read_text())["rows"][0]["case"] == "matmul"
    report.write_markdown(tmp_path / "t.md", rows, best, "cpu")
    assert "| matmul |" in (tmp_path / "t.md").read_text()


class _Matmul:
    """Stands for a tdsl function."""

    def plan(self, *args: Tensor) -> SimpleNamespace:
        return SimpleNamespace(kernels=(1,))

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b


def test_competitors_take_turns() -> None:
    order: list[str] = []
    runs: dict[str, timing.Run] = {"a": lambda _: order.append("a"), "b": lambda _: order.append("b")}
    samples = timing.measure(runs, "cpu", sets=3, rounds=(8, 8))
    assert {name: len(sample.times) for name, sample in samples.items()} == {"a": 8, "b": 8}
    assert sorted(zip(order[-4::2], order[-3::2], strict=True)) == [("a", "b"), ("b", "a")]


def test_buffers_exceed_the_caches() -> None:
    assert timing.buffer_sets(64 << 20, "cpu") == 2
    assert timing.buffer_sets(1, "cpu") == timing.MAX_SETS
    assert math.isnan(timing.Sample((1.0,)).spread)
