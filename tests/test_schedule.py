"""What the compiler decides about tiles, and what a user decides instead: configurations, pins, edited kernels."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import tdsl
from lowering.candidates import candidates, family
from lowering.registers import fits, pressure, shared_bytes
from lowering.schedule import Schedule
from lowering.space import spaces
from lowering.targets import TARGETS
from tdsl import errors
from tdsl.explain import report_of
from tdsl.lowered import lowered

ATTENTION = """
    def attention(Q[h,i,d], K[h,j,d], V[h,j,e], scale) -> O[h,i,e]:
        S[h,i,j] += Q[h,i,d] * K[h,j,d]
        P[h,i,j] = softmax[j](scale * S[h,i,j])
        O[h,i,e] += P[h,i,j] * V[h,j,e]
    """
LARGE = ["bf16[16,2048,64]", "bf16[16,2048,64]", "bf16[16,2048,64]", 0.125]
GPUS = [name for name in TARGETS if name != "cpu"]


def attention(backend: str = "triton") -> Any:
    return tdsl.function(ATTENTION, backend=backend)


def operands() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, n, 16, generator=generator, requires_grad=True) for n in (37, 41, 41)]


def assert_right(function: Any) -> None:
    """Output and gradients are torch's."""
    q, k, v = operands()
    expected = torch.softmax(0.3 * q @ k.mT, -1) @ v
    torch.testing.assert_close(function(q.detach(), k.detach(), v.detach(), 0.3), expected.detach())
    output = function(q, k, v, 0.3)
    for ours, theirs in zip(*(torch.autograd.grad((o * o).sum(), (q, k, v)) for o in (output, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def times(text: str, factor: float) -> str:
    """A source whose stores write so many times what they did."""
    edit = re.sub(r"^(\s*tl\.store\(.*), (\w+)((?:, mask=.*)?\))$", rf"\1, {factor} * \2\3", text, flags=re.MULTILINE)
    assert edit != text
    return edit


def plain() -> tuple[Any, ...]:
    return (*(t.detach() for t in operands()), 0.3)


# ---------------------------------------------------------------------------------------------------------------------
# Defaults


@pytest.mark.parametrize("target", GPUS)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_defaults_fit_what_a_chip_has(dtype: str, target: str) -> None:
    args = [a.replace("bf16", dtype) if isinstance(a, str) else a for a in LARGE]
    (step,) = attention().lower(*args, target=target).steps
    chip = TARGETS[target]
    assert fits(step.tile, chip)
    assert 0 < pressure(step.tile, chip).held < chip.registers_thread
    assert 0 < shared_bytes(step.tile, chip) <= chip.shared_block


def test_tiles_that_are_too_large_do_not_fit() -> None:
    f = attention()
    f.schedule({"attention_0": {"tiles": {"i": 256, "j": 256}, "num_warps": 4}})
    (step,) = f.lower(*LARGE, target="cuda:90").steps
    assert not fits(step.tile, TARGETS["cuda:90"])


def test_warp_groups_get_their_rows() -> None:
    state = attention().lower(*LARGE, target="cuda:90")
    assert state.plan is not None
    (kernel,) = state.plan.kernels
    dtypes = {**state.dtypes, **state.stored}
    assert family(kernel, dtypes, state.target) == "stream"
    rows = [dict(s.axes)["i",] for s in candidates(kernel, {}, dtypes, state.target)]
    assert min(rows) == 64
    assert max(rows) == 128


@pytest.mark.parametrize("target", GPUS)
def test_a_space_begins_with_the_default_and_has_nothing_twice(target: str) -> None:
    state = attention().lower(*LARGE, target=target)
    ((_, found),) = spaces(state)
    schedules = []
    for schedule, tiled in found:
        schedules.append(schedule)
        assert fits(tiled, state.target)
        assert len(schedules) > 1 or tiled == state.steps[0].tile
    assert len(schedules) == len({*schedules}) > 4


def test_sizes_that_are_no_multiple_of_16_are_said_to_be_of_less() -> None:
    def lines(n: int) -> list[str]:
        text = tdsl.function("Y[i,j] = softmax[j](X[i,j])").emit("triton", f"bf16[64,{n}]", target="cuda:90")
        return [line.split("#")[0].strip() for line in text.splitlines() if "a multiple of" in line]

    assert lines(1008) == []
    assert lines(1001) == []
    assert lines(1000) == [f"{name} = {name} // 8 * 8" for name in ("size_j", "X_stride_0", "Y_stride_0")]
    assert all("// 2 * 2" in line for line in lines(1002))


def test_few_steps_are_written_out() -> None:
    text = "D[i,j] += (x[i,d] - y[j,d]) ** 2; O[i,e] += exp(-D[i,j]) * b[j,e]"
    emitted = [tdsl.function(text).emit("triton", f"fp32[512,{d}]", f"fp32[512,{d}]", "fp32[512,16]", target="cuda:90") for d in (3, 9)]
    assert "for d in tl.static_range(STEPS_D):" in emitted[0]
    assert "for d in range(0, size_d):" in emitted[1]


def test_operands_are_loaded_as_they_are_multiplied() -> None:
    assert "tl.trans" not in tdsl.function("C[i,j] += A[i,k] * B[k,j]").emit("triton", "bf16[512,512]", "bf16[512,512]", target="cuda:80")


# ---------------------------------------------------------------------------------------------------------------------
# Rules


MATMUL = ("C[i,j] += A[i,k] * B[k,j]", "bf16[512,512]", "bf16[512,512]")


@pytest.mark.parametrize(
    ("program", "config", "fault"),
    [
        (MATMUL, {}, None),
        (MATMUL, {"tiles": {"i": 16, "j": 16}}, "the matrix product C runs on mma instructions, H100 has wgmma"),
        (MATMUL, {"num_stages": 1}, "a loop waits for A: it is not copied ahead of its use"),
        (MATMUL, {"tiles": {"k": 1}}, "of the matrix products C only 0 run as one"),
        (("Y[i,j] = softmax[j](X[i,j])", "bf16[512,1024]"), {}, None),
        (("Y[i,j] = softmax[j](X[i,j])", "bf16[512,1024]"), {"tiles": {"i": 2}, "num_warps": 32}, "X is read 4 bytes at a time"),
        (("Y[i,j] = softmax[j](X[i,j])", "bf16[512,1023]"), {"tiles": {"i": 2}, "num_warps": 32}, None),  # rows begin anywhere
    ],
)
def test_rules(program: tuple[str, ...], config: dict[str, Any], fault: str | None) -> None:
    pytest.importorskip("triton")
    text, *args = program
    f = tdsl.function(text)
    f.schedule({f"{f.program.name}_0": config})
    (kernel,) = f.check(*args, target="cuda:90").kernels
    assert kernel.faults == () if fault is None else any(fault in found for found in kernel.faults), kernel.faults


def test_long_offsets_are_counted_where_they_are() -> None:
    pytest.importorskip("triton")
    f = tdsl.function("y[i] += X[i,j]")
    counts = [
        report_of(state.steps[0], state).long_offsets for state in (f.lower(f"fp32[64,{n}]", target="cuda:90") for n in (4096, 1 << 27))
    ]
    assert counts[0] == 0 < counts[1]


# ---------------------------------------------------------------------------------------------------------------------
# Configurations by hand


@pytest.mark.parametrize(
    "config",
    [
        {"tiles": {"i": 16, "j": 32}},
        {"num_warps": 8, "num_stages": 3},
        Schedule(((("h",), 1), (("i",), 32), (("j",), 16), (("d",), 16), (("e",), 16)), 4, 2),
    ],
)
def test_a_configuration(config: Any) -> None:
    f = attention()
    before = f.lower(*plain()).steps[0].tile
    f.schedule({"attention_0": config, "attention_bwd_1": {"tiles": {"j": 16}}})
    after = f.lower(*plain()).steps[0].tile
    assert before != after
    if isinstance(config, dict):
        for index, tile in config.get("tiles", {}).items():
            assert after.axis_of(index).tile == tile
        assert (after.num_warps, after.num_stages) == (
            config.get("num_warps", before.num_warps),
            config.get("num_stages", before.num_stages),
        )
    assert_right(f)
    f.schedule({"attention_0": None})
    assert f.lower(*plain()).steps[0].tile == before


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"tiles": {"x": 16}}, "attention_0 has no index 'x' to tile\n.*its axes are h: 1, i: "),
        ({"tiles": {"i": 48}}, "the tile 48 of i in attention_0 is no power of two"),
        ({"tiles": {"i": "all"}}, "the tile 'all' of i"),
        ({"tiles": 16}, "tiles of attention_0 are 16"),
        ({"num_warps": 3}, "num_warps of attention_0 is 3"),
        ({"num_warps": 64}, "num_warps of attention_0 is 64"),
        ({"num_stages": 0}, "num_stages of attention_0 is 0"),
        (Schedule(((("h",), 1),)), "walks the indices h, the kernel has d, e, h, i, j"),
        (Schedule(((("h",), 1), (("i", "j"), 16), (("d",), 16), (("e",), 16))), "i, j of attention_0 cannot be one axis"),
    ],
)
def test_a_configuration_that_does_not_fit_the_kernel(config: Any, message: str) -> None:
    f = attention()
    f.schedule({"attention_0": config})
    with pytest.raises(errors.ArgumentError, match=message):
        f(*plain())


@pytest.mark.parametrize(
    ("choices", "error", "message"),
    [
        ({"attention_0": {"tile": 3}}, errors.ArgumentError, "no field 'tile'\n.*tiles, num_warps, num_stages, group"),
        ({"attention_0": 3}, errors.ArgumentError, "attention_0 cannot be 3"),
        ({"attention_0": "none.py"}, errors.ArgumentError, "cannot be read from 'none.py'"),
        ({"attention": {"num_warps": 4}}, errors.NameError_, "no kernel 'attention'\n.*attention_0, .. of the forward and attention_bwd_0"),
        ({"scores_0": {"num_warps": 4}}, errors.NameError_, "no kernel 'scores_0'\n.*S, P.in, P.max"),
        ({"T": "store"}, errors.NameError_, "T is no intermediate of attention\n.*its intermediates are S, P.in, P.max"),
        ({"O": "recompute"}, errors.NameError_, "O is an output"),
        ({"attention_0": "def attention_0(:\n"}, errors.CompileError, "is not Python: .* in line 1: def attention_0"),
        ({"attention_0": "def other():\n    pass\n"}, errors.CompileError, "defines no function attention_0, but other"),
    ],
)
def test_choices_that_are_none(choices: Any, error: type[Exception], message: str) -> None:
    f = attention()
    with pytest.raises(error, match=message):
        f.schedule(choices)
    assert_right(f)


def test_a_kernel_that_is_not_there_for_these_arguments() -> None:
    f = attention()
    f.schedule({"attention_3": {"num_warps": 4}})
    with pytest.raises(errors.NameError_, match="no kernel 'attention_3' for these arguments\n.*its kernels are attention_0"):
        f(*plain())


def test_a_cpu_cuts_its_own_tiles() -> None:
    f = attention("torch")
    before = f.lower(*plain()).text
    f.schedule({"attention_0": {"tiles": {"i": 16}}})
    assert f.lower(*plain()).text == before
    assert_right(f)


# ---------------------------------------------------------------------------------------------------------------------
# Pins


@pytest.mark.parametrize(
    ("pins", "memory"),
    [
        ({}, set()),
        ({"S": "store"}, {"S"}),
        ({"P": "store"}, {"P"}),
        ({"P.sum": "store"}, {"P.sum"}),
        ({"S": "recompute"}, set()),
        ({"S": "store", "P": "store"}, {"S", "P"}),
    ],
)
def test_what_is_pinned_to_be_stored_is_in_memory(pins: dict[str, str], memory: set[str]) -> None:
    f = attention()
    f.schedule(pins)
    found = {*f.plan(*plain()).memory}
    assert memory <= found
    assert bool(memory) == bool(found)
    assert_right(f)


def test_what_is_pinned_to_be_made_again_has_no_memory_and_is_not_saved() -> None:
    text = "S[i,j] += A[i,k] * B[k,j]; Y[i,e] += exp(S[i,j]) * V[j,e]; Z[j,e] += exp(S[i,j]) * U[i,e]"
    f = tdsl.function(text, backend="triton")
    args = [0.1 * torch.randn(n) for n in ((33, 90), (90, 35), (35, 18), (33, 18))]
    for a in args:
        a.requires_grad_()
    assert "S" in f.plan(*args).memory
    f.schedule({"S": "recompute"})
    assert "S" not in f.plan(*args).memory
    assert next(c for c in f.plan(*args).choices if c.subject == "S").reason == "pinned"
    parts = lowered(f, args, "cuda:90", gradient=True)
    assert not any("S" in part.saves for part in parts)
    e = torch.exp(args[0] @ args[1])
    expected = (e @ args[2], e.T @ args[3])
    for ours, theirs in zip(f(*args), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    found = [torch.autograd.grad((y.sum() + (z * z).sum()), args) for y, z in (f(*args), expected)]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_made_again_says_why() -> None:
    f = tdsl.function("M[i] max= X[i,j]; Y[i,j] = where(X[i,j] == M[i], 1.0, 0.0) * X[i,j]", backend="triton")
    f.schedule({"M": "recompute"})
    with pytest.raises(errors.ArgumentError, match="M cannot be made again in what reads it"):
        f(torch.randn(5, 7))


# ---------------------------------------------------------------------------------------------------------------------
# Edited kernels


def test_an_edited_kernel_runs_in_the_place_of_the_generated_one(tmp_path: Path) -> None:
    text = attention().emit("triton", *plain())
    edit = times(text, 1.0)
    (tmp_path / "kernel.py").write_text(edit)
    for given in (edit, tmp_path / "kernel.py", str(tmp_path / "kernel.py")):
        f = attention()
        f.schedule({"attention_0": given})
        assert f.emit("triton", *plain()) == edit
        torch.testing.assert_close(f(*plain()), attention()(*plain()))


def test_an_edit_that_computes_something_else_is_refused_once_and_for_all() -> None:
    text = attention().emit("triton", *plain())
    edit = times(text, 1.01)
    f = attention()
    f.schedule({"attention_0": edit})
    for _ in range(2):
        with pytest.raises(errors.ArgumentError, match=r"attention_0 gives another O: by up to [\d.]+, at \[\d+, \d+, \d+\], where it is"):
            f(*plain())
    f.schedule({"attention_0": None})
    assert_right(f)


def test_an_edit_is_compared_on_the_first_call_of_each_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    from tdsl import edited

    calls = []
    verify = edited.verify
    monkeypatch.setattr(edited, "verify", lambda *a, **k: calls.append(1) or verify(*a, **k))
    f = attention()
    f.schedule({"attention_0": f.emit("triton", *plain())})
    for args in (plain(), plain(), [t[:, :20] if isinstance(t, torch.Tensor) else t for t in plain()]):
        f(*args)
    assert len(calls) == 2


def test_an_edit_with_other_parameters() -> None:
    text = attention().emit("triton", *plain())
    f = attention()
    f.schedule({"attention_0": text.replace("size_i, ", "", 1)})
    with pytest.raises(errors.CompileError, match="the edited kernel takes"):
        f(*plain())


def test_an_edit_does_not_serve_a_kernel_that_also_saves() -> None:
    f = attention()
    f.schedule({"attention_0": f.emit("triton", *plain())})
    q, k, v = operands()
    with pytest.raises(errors.CompileError, match=r"'attention_0 \(saves P.sum, P.max\)' here"):
        f(q, k, v, 0.3)


def test_edits_of_training() -> None:
    f = attention()
    texts = f.emit("triton", *operands(), 0.3, gradient=True).split("# forward that saves P.sum, P.max\n")[1].split("# backward\n")
    assert all("def attention" in text for text in texts)
    changed = [times(text, 1.0) for text in texts]
    f.schedule({"attention_0 (saves P.sum, P.max)": changed[0], "attention_bwd_1": changed[1]})
    assert_right(f)
    f.schedule({"attention_bwd_1": times(texts[1], 1.5)})
    with pytest.raises(errors.ArgumentError, match="the edited kernel attention_bwd_1 gives another"):
        assert_right(f)


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_no_cpu_runs_an_edited_kernel(backend: str) -> None:
    f = attention(backend)
    f.schedule({"attention_0": attention().emit("triton", *plain())})
    with pytest.raises(errors.Unsupported, match="the edited kernel attention_0 runs on a GPU"):
        f(*plain())


def test_gradients_are_functions_with_kernels_of_their_own() -> None:
    g = tdsl.function("C[i,j] += A[i,k] * B[k,j]", backend="triton").grad("A")
    args = [torch.randn(*n) for n in ((33, 35), (35, 37), (33, 37))]
    (kernel,) = g.plan(*args).kernels
    g.schedule({kernel.name: {"tiles": {"j": 16}}})
    assert g.lower(*args).steps[0].tile.axis_of("j").tile == 16
    torch.testing.assert_close(g(*args), args[2] @ args[1].T, rtol=1e-4, atol=1e-4)


def test_choices_are_pickled_and_named_where_they_go() -> None:
    f = attention()
    f.schedule({"S": "store", "attention_0": {"num_warps": 8}})
    text = f.emit("triton", *plain()).split('"""')[0]
    f.schedule({"attention_1": f.lower(*plain()).steps[1].source.source})
    again = pickle.loads(pickle.dumps(f))
    assert again.lower(*plain()).control == f.lower(*plain()).control
    assert again.lower(*plain()).steps[0].tile.num_warps == 8
    assert "S" in again.plan(*plain()).memory
    assert text in again.emit("triton", *plain())
