"""The example that `make demo` runs, in a few epochs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")

from examples import digits

SCRIPT = Path(digits.__file__)


def test_the_example_shows_every_stage_and_learns() -> None:
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])}
    ran = subprocess.run([sys.executable, str(SCRIPT), "--quick"], capture_output=True, text=True, timeout=300, env=environment)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    for shown in ("X.grad[n,i] +=", "W.grad[o,i] +=", "tl.dot", "held-out accuracy", "agree with plain torch"):
        assert shown in ran.stdout


def test_its_check_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    model = digits.Classifier(hidden=16)
    images, labels = torch.randn(8, 64), torch.arange(8)
    assert digits.check(model, images, labels) == []
    monkeypatch.setattr(digits, "linear", lambda x, w, b: x @ w.T + 1.001 * b)
    wrong = digits.check(model, images, labels)
    assert wrong and "last.bias" in " ".join(wrong)


@pytest.mark.gpu
def test_the_example_runs_unchanged_on_a_gpu() -> None:
    assert digits.main(["--quick", "--device", "cuda"]) == 0
