"""Predicted beside measured: that the table is made, and that the rank correlation is what statistics says."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from benchmarks import model
from benchmarks.__main__ import main, parse
from benchmarks.cases import CASES, Case
from lowering.targets import TARGETS

NAMED = {case.name: case for case in CASES}


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 1.0),
        ([1, 2, 3, 4], [40, 30, 20, 10], -1.0),
        ([1, 2, 3], [10, 20, 15], 0.5),
        ([1.0, 5.0, 5.0, 9.0], [1.0, 2.0, 3.0, 4.0], 0.9486832980505138),  # ties share their mean rank: 1, 2.5, 2.5, 4
        ([56, 75, 45, 71, 62, 64, 58, 80, 76, 61], [66, 70, 40, 60, 65, 56, 59, 77, 67, 63], 0.6727272727272727),  # 1 - 6 * 54 / 990
    ],
)
def test_rank_correlation(a: list[float], b: list[float], expected: float) -> None:
    assert model.spearman(a, b) == pytest.approx(expected)
    assert model.spearman(b, a) == pytest.approx(expected)


def test_rank_correlation_of_what_does_not_vary() -> None:
    assert math.isnan(model.spearman([1, 1, 1], [1, 2, 3]))
    assert math.isnan(model.spearman([1], [1]))


def small(case: Case) -> Case:
    return replace(case, sizes={"cpu": {name: 64 if name == "d" else 40 + 8 * n for n, name in enumerate(case.sizes["cpu"])}})


def test_the_machine_is_measured() -> None:
    machine = model.calibrated("cpu", seconds=0.01)
    assert (machine.name, machine.sms) == ("cpu", torch.get_num_threads())
    assert machine.flops["float64"] < 2 * machine.flops["float32"]
    assert machine.flops["bfloat16"] == machine.flops["float32"]
    assert all(value > 0 for value in (machine.bandwidth, machine.exps, machine.launch))
    assert machine != TARGETS["cpu"]


def test_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "calibrated", lambda device: TARGETS["cpu"])
    console = Console(record=True, width=160)
    assert model.run(console, [small(NAMED["softmax"]), small(NAMED["matmul"])], "cpu", seconds=0.01)
    text = console.export_text()
    for what in ("softmax (forward)", "matmul (forward + backward)", "configurations of Y_0", "rank correlation over 4 cases"):
        assert what in text
    wrong = replace(small(NAMED["softmax"]), text="Y[n,c] = sofmax[c](X[n,c])")
    assert not model.run(console, [wrong], "cpu", seconds=0.01)


def test_configurations_are_blocks_of_rows() -> None:
    case = small(NAMED["softmax"])
    (name, found), *_ = model.configurations(case, "cpu", torch.float32, TARGETS["cpu"], 0.01)
    assert name == "Y_0"
    assert [p.what for p in found] == ["n 40, c 48", "n 10, c 48", "n 2, c 48", "n 1, c 48"]
    assert [p.predicted for p in found] == sorted(p.predicted for p in found)  # small blocks are launches


def test_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(model, "run", lambda console, cases, device, seconds: asked.append([c.name for c in cases]) or True)
    assert main(["model", "softmax", "--device", "cpu"]) == 0
    assert main(["model", "--device", "cpu"]) == 0
    assert asked == [["softmax"], [c.name for c in CASES]]
    with pytest.raises(SystemExit):
        parse(["mode"])
