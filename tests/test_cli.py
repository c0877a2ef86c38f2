"""The command line: what it prints, where errors go, and the exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tdsl.bench import random_inputs
from tdsl.cli import arguments_for, main
from tdsl.errors import ArgumentError
from tdsl.text import parse

ROOT = Path(__file__).parent.parent
MATMUL = "Y[i,j] += A[i,k] * B[k,j]"
SIZES = ("A=fp32[32,16]", "B=fp32[16,48]")


def run(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> tuple[str, str]:
    """What a command prints: standard output and standard error."""
    assert main(arguments) == status
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_show_without_sizes_is_the_program_and_its_gradient(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = run(capsys, "show", MATMUL)
    assert out.startswith("for i, j, k:  Y[i,j] += A[i,k] * B[k,j]\n\ndef Y_grad(")
    assert "B.grad[k,j] += A[i,k] * Y.grad[i,j]" in out
    assert err == ""


def test_show_with_sizes_adds_plan_and_kernels_in_any_order_of_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run(capsys, "show", MATMUL, *reversed(SIZES))
    for part in ("A.grad", "Y_0: grid i, j", "@triton.jit"):
        assert part in out
    assert run(capsys, "show", MATMUL, SIZES[0], "--target", "cuda:80", SIZES[1])[0] != ""


def test_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run(capsys, "show", MATMUL, *SIZES, "--kind", "torch")
    assert "torch.matmul" in out
    assert "triton" not in out
    found = json.loads(run(capsys, "show", MATMUL, *SIZES, "--kind", "plan", "--kind", "program", "--json")[0])
    assert list(found) == ["plan", "program"]
    _, err = run(capsys, "show", MATMUL, *SIZES, "--kind", "fortran", status=2)
    assert "no stage is called 'fortran'" in err


def test_grad(capsys: pytest.CaptureFixture[str]) -> None:
    both, _ = run(capsys, "grad", MATMUL)
    assert both == run(capsys, "show", MATMUL, "--gradient", "--kind", "program")[0]
    one, _ = run(capsys, "grad", MATMUL, "--wrt", "A")
    assert "A.grad" in one
    assert "B.grad" not in one
    plan, _ = run(capsys, "grad", MATMUL, "--kind", "plan", *SIZES)
    assert "writes B.grad" in plan
    _, err = run(capsys, "grad", MATMUL, "--wrt", "Z", status=2)
    assert "no gradient with respect to Z" in err


def test_a_program_without_a_gradient_is_still_shown(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = run(capsys, "show", "def iota(n) -> Y[n]: for i in 0:n:  Y[i] = i")
    assert "Y[i] = i" in out
    assert err.startswith("no gradient:")
    run(capsys, "show", "def iota(n) -> Y[n]: for i in 0:n:  Y[i] = i", "--kind", "gradient", status=2)


def test_a_file_is_read_and_named_in_errors(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "p.tdsl"
    path.write_text("# a comment\nY[i] += A[i,k] * x[k]\n")
    assert "for i, k:  Y[i] += A[i,k] * x[k]" in run(capsys, "show", str(path))[0]
    path.write_text("\nY[i] = A[i,k]\n")
    _, err = run(capsys, "show", str(path), status=1)
    assert f"{path}:2" in err


def test_errors_show_carets_and_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    _, err = run(capsys, "show", "Y[i,j] += A[i,k * B[k,j]", status=1)
    assert err.startswith("ParseError: ")
    assert "^" in err
    assert "Traceback" not in err
    _, err = run(capsys, "show", MATMUL, "A=fp32[32,16]", "B=fp32[15,48]", status=1)
    assert "size k is 16 in A" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "missing.tdsl"), "neither a file nor a program"),
        (("show", MATMUL, "A=fp32[4,4]"), "B=bf16[128,128]"),
        (("explain", MATMUL), "A=bf16[128,128] B=bf16[128,128]"),
        (("check", "Y[b,d] = s * E[ids[b],d]"), "s=0.125 E=bf16[128,128] ids=i64[128]"),
        (("show", MATMUL, *SIZES, "C=fp32[4]"), "Y has no parameter C"),
        (("show", MATMUL, *SIZES, SIZES[0]), "A is given twice"),
        (("show", MATMUL, "A=what", SIZES[1]), "describes no tensor"),
        (("show", MATMUL, "A"), "NAME=SPEC"),
        (("show", MATMUL, "--kind", "ptx"), "lacks the arguments A, B"),
        (("check", MATMUL, *SIZES, "--target", "cuda:12"), "the targets are"),
        (("check", MATMUL, *SIZES, "--target", "cpu"), "no machine code"),
        (("tune", MATMUL, *SIZES), "tuning is not built yet"),
        (("show",), "FILE_OR_TEXT"),
        (("show", MATMUL, "--nonsense"), "--nonsense"),
        (("dance", MATMUL), "invalid choice"),
        ((), "COMMAND"),
    ],
)
def test_what_cannot_be_carried_out_has_status_2(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str) -> None:
    out, err = run(capsys, *arguments, status=2)
    assert message in err
    assert "Traceback" not in err
    assert out == ""


def test_arguments_are_numbers_booleans_or_specs() -> None:
    program = parse("def f(X[i], n, flag, scale) -> Y[i]: Y[i] = where(flag, scale * X[i], n * X[i])")
    given = {"scale": "1e-3", "n": "-4", "flag": "True", "X": "bf16[8]"}
    assert arguments_for(program, given) == ["bf16[8]", -4, True, 1e-3]
    with pytest.raises(ArgumentError, match=r"lacks the arguments n, flag"):
        arguments_for(program, {"X": "bf16[8]", "scale": "2"})


def test_explain(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run(capsys, "explain", MATMUL, *SIZES, "--target", "cpu")
    assert "its gradient, by swapping names" in out
    assert "backward: " in out
    found = json.loads(run(capsys, "explain", MATMUL, *SIZES, "--target", "cpu", "--json")[0])
    assert [part["title"] for part in found["parts"]] == ["forward", "backward"]


def test_check(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    out, _ = run(capsys, "check", MATMUL, *SIZES, "--no-gradient")
    assert "Y_0" in out and "Y_bwd_0" not in out
    found = json.loads(run(capsys, "check", MATMUL, *SIZES, "--json")[0])
    assert found["ok"] is True
    assert [k["name"] for k in found["kernels"]] == ["Y_0", "Y_bwd_0", "Y_bwd_1"]


def test_check_of_what_has_no_gradient(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    counts = ("check", "Y[i] += a[i,k]", "a=i32[64,64]")
    out, error = run(capsys, *counts)
    assert "Y_0" in out
    assert error.startswith("the gradient's kernels are not in this report: ")
    run(capsys, *counts, "--gradient", status=2)


def test_a_fault_has_status_1(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from tdsl import check_report

    class Bad(check_report.Report):
        ok = False

    monkeypatch.setattr(check_report, "check", lambda *args, **named: Bad("cuda:90", ()))
    run(capsys, "check", MATMUL, *SIZES, status=1)


@pytest.mark.parametrize("flags", [(), ("--gradient",)])
def test_bench(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]) -> None:
    monkeypatch.setattr("tdsl.bench._SECONDS", 0.001)
    out, _ = run(capsys, "bench", MATMUL, *SIZES, *flags)
    assert "measured, median of" in out
    assert "roofline of" in out
    found = json.loads(run(capsys, "bench", MATMUL, *SIZES, *flags, "--json")[0])
    products = 3 if flags else 1
    assert found["flops"] == products * 2 * 32 * 16 * 48
    assert found["seconds"] > 0
    assert found["gflops"] == pytest.approx(found["flops"] / found["seconds"] * 1e-9)


def test_random_indices_stay_inside_what_they_index() -> None:
    program = parse("Y[b,d] = E[ids[b],d] + F[ids[b]] + G[off[b]+0*b]")
    args = ["fp32[11,3]", "i64[100]", "fp32[7]", "fp32[5]", "i64[100]"]
    _, ids, _, _, off = random_inputs(program, args, "cpu")
    assert program.inputs == ("E", "ids", "F", "G", "off")
    assert ids.min() >= 0
    assert 1 < ids.max() < 7
    assert torch.equal(off, torch.zeros_like(off))


def test_as_a_module_in_a_process_of_its_own() -> None:
    def process(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(
            [sys.executable, "-m", "tdsl", *arguments], capture_output=True, text=True, cwd=ROOT, env=environment, check=False
        )

    done = process("show", MATMUL)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("for i, j, k:")
    wrong = process("show", "Y[i] = A[i")
    assert wrong.returncode == 1
    assert "Traceback" not in wrong.stderr


def test_showing_the_notation_needs_no_torch() -> None:
    code = f"import sys; from tdsl.cli import main; main(['show', {MATMUL!r}]); sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=False).returncode == 0


def test_the_language_can_be_imported_in_any_order() -> None:
    code = (
        "import tdsl.text; from tdsl.function import Function; import tdsl; assert callable(tdsl.function) and tdsl.function('Y[i] = x[i]')"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=False).returncode == 0
