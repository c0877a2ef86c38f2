"""The page of explain and the report of check: what they show, in a terminal, in a notebook and as JSON."""

from __future__ import annotations

import io
import json
from dataclasses import fields

import pytest
import torch
from rich.console import Console

import tdsl
from tdsl import errors
from tdsl.autograd import Differentiable
from tdsl.check_report import KernelCheck
from tdsl.explain import Explanation
from tdsl.lowered import lowered
from tdsl.page import Section, Table, as_html, plain, quantity

LINEAR = """
def linear(X[n,i], W[o,i], b[o]) -> Y[n,o]:
    Z[n,o] += X[n,i] * W[o,i]
    Y[n,o]  = gelu(Z[n,o] + b[o])
"""
SHAPES = ("bf16[64,32]", "bf16[48,32]", "bf16[48]")
STAGES = ["flatten", "infer", "normalize", "plan", "tile", "source"]


@pytest.fixture(scope="module")
def on_cpu() -> Explanation:
    return tdsl.function(LINEAR).explain(*SHAPES, target="cpu")


def test_every_stage_is_on_the_page(on_cpu: Explanation) -> None:
    text = str(on_cpu)
    function = tdsl.function(LINEAR)
    for part in (str(function.program), str(function.grad().program), "def run(X, W, b):", "linear_bwd_0: tile IR"):
        assert part in text
    for part in on_cpu.parts:
        assert [stage for stage, _ in part.lowered.seconds] == STAGES
        assert len(part.predictions) == len(part.lowered.state.steps)


def test_the_parts_are_what_training_runs(on_cpu: Explanation) -> None:
    titles = [part.lowered.title for part in on_cpu.parts]
    assert titles[0] == "forward"
    assert titles[-1] == "backward"
    saved = on_cpu.parts[-1].lowered.flat.inputs[4:]
    assert titles[1:-1] == [f"forward that saves {', '.join(saved)}"]
    assert on_cpu.parts[-1].lowered.flat.results == ("X.grad", "W.grad", "b.grad")


def test_what_the_plan_makes_again_is_not_saved() -> None:
    function = tdsl.function(
        """
        def attention(Q[h,i,d], K[h,j,d], V[h,j,e]) -> O[h,i,e]:
            S[h,i,j] += Q[h,i,d] * K[h,j,d]
            P[h,i,j] = softmax[j](S[h,i,j])
            O[h,i,e] += P[h,i,j] * V[h,j,e]
        """
    )
    _, saving, backward = lowered(function, ["bf16[8,1024,64]"] * 3, "cuda:90", gradient=True)
    assert "S" not in saving.saves
    trained = Differentiable(tdsl.function(function.program, backend="triton").executor, ("Q", "K", "V"), lambda *_: (), fuses=True)
    args = [torch.empty(8, 1024, 64, dtype=torch.bfloat16) for _ in range(3)]
    halves = trained.halves(trained.base.recomputed_for(args))
    assert halves.parts.saved == saving.saves != ()
    assert halves.parts.backward.inputs == backward.flat.inputs


def test_residuals_keep_the_dtype_they_are_saved_in() -> None:
    saving, backward = tdsl.function("P[i,j] = softmax[j](X[i,j])").explain("bf16[64,32]", target="cuda:90").parts[-2:]
    state = backward.lowered.state
    for name in backward.lowered.flat.inputs[2:]:
        made = saving.lowered.state
        assert made.stored.get(name, made.dtypes[name]) == state.stored.get(name, state.dtypes[name])


def test_a_gpu_target_shows_kernels_and_machine_code() -> None:
    pytest.importorskip("triton")
    found = tdsl.function("Y[i,j] += A[i,k] * B[k,j]").explain("bf16[64,32]", "bf16[32,64]", target="cuda:90")
    text = str(found)
    for part in ("tl.dot", "registers", "spills", "shared", "blocks per SM", "wgmma", "predicted on H100"):
        assert part in text
    assert all(part.reports for part in found.parts)


def test_without_triton_the_page_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise errors.MissingPackage("no triton here", help="install it")

    monkeypatch.setattr("tdsl.explain.report_of", fail)
    text = str(tdsl.function("Y[i] = 2 * x[i]").explain("fp32[64]", target="cuda:90"))
    assert "no triton here" in text
    assert "tl.store" in text


def test_no_gradient_is_said_and_the_rest_is_shown() -> None:
    found = tdsl.function("def iota(n) -> Y[n]: for i in 0:n:  Y[i] = i").explain(5)
    assert found.gradient is None
    assert "no input" in found.problem
    assert [part.lowered.title for part in found.parts] == ["forward"]
    assert found.problem in str(found)


def test_real_tensors_are_explained_on_their_device() -> None:
    found = tdsl.function(LINEAR).explain(torch.randn(8, 4), torch.randn(6, 4), torch.randn(6))
    assert found.target == "cpu"


def test_a_wrong_argument_is_an_error() -> None:
    with pytest.raises(errors.SizeMismatch):
        tdsl.function(LINEAR).explain("bf16[64,32]", "bf16[48,31]", "bf16[48]")
    with pytest.raises(errors.ArgumentError, match="unknown target"):
        tdsl.function(LINEAR).explain(*SHAPES, target="cuda:1")


def test_it_shows_itself_in_rich_a_notebook_and_json(on_cpu: Explanation) -> None:
    terminal = io.StringIO()
    Console(file=terminal, width=120).print(on_cpu)
    assert "the notation" in terminal.getvalue()
    assert "╭" in terminal.getvalue()
    page = on_cpu._repr_html_()
    assert page.count("<details") == page.count("</details>") > 5
    assert "-&gt; Y[n,o]" in page
    assert repr(on_cpu) == str(on_cpu)  # where standard output is no terminal
    data = json.loads(json.dumps(on_cpu.as_json()))
    assert data["parts"][0]["kernels"][0]["name"] == "linear_0"


def test_repr_is_coloured_in_a_terminal(on_cpu: Explanation, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdout", Terminal())
    assert "╭" in repr(on_cpu)


# ---------------------------------------------------------------------------------------------------------------------
# check


def test_check_reports_every_kernel_of_training() -> None:
    pytest.importorskip("triton")
    function = tdsl.function(LINEAR)
    forward, training = (function.check(*SHAPES, target="cuda:90", gradient=gradient) for gradient in (False, True))
    assert (forward.ok, training.ok, forward.target) == (True, True, "cuda:90")
    names = [k.name for k in training.kernels]
    assert len(names) == len(set(names))
    assert names[: len(forward.kernels)] == [k.name for k in forward.kernels]
    assert any(name.startswith("linear_bwd") for name in names)
    data = json.loads(json.dumps(training.as_json()))
    assert list(data) == ["target", "ok", "kernels"]
    keys = "name registers stack spills shared tensor_core load_bytes store_bytes occupancy faults flops bytes predicted bound"
    assert [" ".join(kernel) for kernel in data["kernels"]] == [keys] * len(names)
    assert keys == " ".join(f.name for f in fields(KernelCheck))
    assert forward.kernels[0].tensor_core == "wgmma"
    assert "wgmma" in str(forward)
    assert "<table>" in forward._repr_html_()


def test_a_fault_makes_the_report_not_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from dataclasses import replace

    import tdsl.check_report as module

    original = module.report_of
    monkeypatch.setattr(module, "report_of", lambda step, state: replace(original(step, state), tensor_core=None))
    found = tdsl.function("Y[i,j] += A[i,k] * B[k,j]").check("bf16[64,32]", "bf16[32,64]")
    assert not found.ok
    (fault,) = found.kernels[0].faults
    assert "tensor cores" in fault
    assert f"Y_0: {fault}" in str(found)


def test_a_cpu_has_no_machine_code() -> None:
    with pytest.raises(errors.ArgumentError, match="no machine code"):
        tdsl.function(LINEAR).check(*SHAPES, target="cpu")


@pytest.mark.parametrize(
    ("kind", "target", "found"),
    [
        ("ttir", "cuda:90", "tt.dot"),
        ("ttgir", "cuda:90", "ttg."),
        ("llir", "cuda:90", "define"),
        ("ptx", "cuda:90", ".visible .entry linear_0"),
        ("sass", "cuda:90", "HGMMA"),
        ("amdgcn", "hip:gfx942", "v_mfma"),
        ("sass", "hip:gfx942", "v_mfma"),
    ],
)
def test_machine_text(kind: str, target: str, found: str) -> None:
    pytest.importorskip("triton")
    shapes = ("bf16[64,64]", "bf16[128,64]", "bf16[128]")
    assert found in tdsl.function(LINEAR).emit(kind, *shapes, target=target)


def test_a_kind_that_a_target_lacks() -> None:
    pytest.importorskip("triton")
    with pytest.raises(errors.ArgumentError, match="has no 'ptx'"):
        tdsl.function(LINEAR).emit("ptx", *SHAPES, target="hip:gfx942")


def test_sizes_and_strides_are_hinted_as_a_launch_does() -> None:
    from lowering.report import hints_of

    (step,) = tdsl.function("Y[i,j] += A[i,k] * B[k,j]").lower("bf16[64,48]", "bf16[48,17]", target="cuda:90").steps
    hints = hints_of(step)
    for name, value in step.integers.items():
        assert hints.get(name) == (1 if value == 1 else 16 if value % 16 == 0 else None)
    assert 17 in step.integers.values()


# ---------------------------------------------------------------------------------------------------------------------
# Pages


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0000123, "s", "12.3 µs"),
        (1536, "B", "1.54 kB"),
        (0, "B", "0 B"),
        (999.9, "", "1 k"),
        (2.0e12, "FLOP/s", "2 TFLOP/s"),
        (5, "", "5"),
    ],
)
def test_quantities(value: float, unit: str, text: str) -> None:
    assert quantity(value, unit) == text


def test_tables_align_numbers_to_the_right() -> None:
    table = Table(("name", "count"), (("a", "1"), ("bc", "100")))
    assert str(table) == "name  count\n----  -----\na         1\nbc      100"
    assert str(Table(("name", "count"), ())) == "name  count\n----  -----"


def test_sections_are_escaped_in_html() -> None:
    sections = (Section("a < b", "x & y", level=1), Section("t", Table(("<h>",), (("<c>",),))))
    assert plain(sections).startswith("a < b\n=====\nx & y")
    page = as_html(sections)
    for text in ("a &lt; b", "x &amp; y", "&lt;h&gt;", "&lt;c&gt;"):
        assert text in page
