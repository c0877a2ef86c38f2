"""The transformer of the examples: it learns, its kernels are right, and its page is true."""

from __future__ import annotations

import difflib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples import page, transformer
from tdsl.function import function
from tdsl.lowered import lowered

SCRIPT = Path(transformer.__file__)
LAYERS = {layer.function.program.name: layer for layer in page.LAYERS}


def test_it_learns() -> None:
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])}
    ran = subprocess.run([sys.executable, str(SCRIPT), "--quick"], capture_output=True, text=True, timeout=300, env=environment)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    for shown in ("the loss and 21 gradients agree with plain torch", "held-out loss", "tokens per second"):
        assert shown in ran.stdout


def tiny() -> tuple[transformer.Transformer, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    tokens = torch.randint(11, (2, 19))
    return transformer.Transformer(vocabulary=11, width=16, heads=2, depth=1), tokens, tokens.roll(-1, 1)


def test_its_check_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens, following = tiny()
    assert transformer.check(model, tokens, following) == 12
    off = function("def rms_norm(X[b,t,c], g[c]) -> Y[b,t,c]: Y[b,t,c] = X[b,t,c] * rsqrt(mean[c](X[b,t,c] ** 2) + 1e-3) * g[c]")
    monkeypatch.setattr(transformer, "rms_norm", off)
    with pytest.raises(AssertionError, match="is off by"):
        transformer.check(model, tokens, following)


def test_the_kernels_of_a_gpu_agree_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and every gradient of the whole model, through Triton's interpreter."""
    for name in LAYERS:
        monkeypatch.setattr(transformer, name, function(getattr(transformer, name).program, backend="triton"))
    assert transformer.check(*tiny()) == 12


def test_every_layer_is_a_handful_of_statements() -> None:
    for layer in page.LAYERS:
        assert len(layer.function.program.body) <= 4


def test_text_is_at_hand() -> None:
    text = transformer.library()
    assert len(text) > 500_000 and b"import" in text
    assert transformer.library("textwrap no_such_module sys") == transformer.library("textwrap")  # sys has no source
    pieces, following = next(transformer.batches(torch.arange(100, dtype=torch.uint8), 3, 10, seed=0))
    torch.testing.assert_close(following, pieces + 1)


def test_what_is_never_in_memory() -> None:
    """The scores and the logits, forward and backward: the page says so."""
    for name, hidden in (("attention", {"S", "P", "P.in", "P.exp"}), ("cross_entropy", {"Z", "loss.exp"})):
        layer = LAYERS[name]
        for part in lowered(layer.function, layer.args, page.TARGET, gradient=True):
            plan = part.state.plan
            assert plan is not None
            touched = {tensor for kernel in plan.kernels for tensor in (*kernel.reads, *kernel.writes)}
            assert set() == (touched | set(plan.memory)) & (hidden | {f"{tensor}.grad" for tensor in hidden})


def test_the_page_is_true() -> None:
    path = SCRIPT.with_name("transformer.md")
    diff = "\n".join(difflib.unified_diff(path.read_text().splitlines(), page.transformer_page().splitlines(), str(path), "now", lineterm=""))
    assert not diff, f"`python -m examples.page` writes it again:\n{diff}"


def test_the_command_checks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(page, "PAGES", {"errors.md": lambda: "another text"})
    assert page.main(["--check"]) == 1
    assert "not what would be written" in capsys.readouterr().out


@pytest.mark.gpu
def test_it_runs_unchanged_on_a_gpu() -> None:
    assert transformer.main(["--quick", "--device", "cuda"]) == 0
