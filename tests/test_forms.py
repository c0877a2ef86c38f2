"""The forms in which tiles are moved and walked: tensor descriptors, programs that walk the grid, results stored in parts."""

from __future__ import annotations

import contextvars
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import tdsl
from lowering import aot, operands, tile_ir
from lowering.choice import best_fit, resident
from lowering.cost import predict
from lowering.descriptors import describable, described
from lowering.forms import PLAIN, dressed, schedule_of
from lowering.report import KernelReport, report, sass
from lowering.space import spaces
from lowering.state import Step
from lowering.targets import TARGETS
from lowering.triton_direct import provide_scratch, scratch
from lowering.triton_launch import Launch, on_launch
from lowering.triton_source import triton_source
from tdsl import errors
from tdsl.explain import schedule_text

MATMUL = "Y[i,j] += A[i,k] * B[k,j]"
LINEAR = """
    def linear(X[n,i], W[o,i], b[o], R[n,o]) -> Y[n,o]:
        Z[n,o] += X[n,i] * W[o,i]
        Y[n,o] = relu(Z[n,o] + b[o]) + R[n,o]
    """
ATTENTION = """
    def attention(Q[h,i,d], K[h,j,d], V[h,j,e], scale) -> O[h,i,e]:
        S[h,i,j] += Q[h,i,d] * K[h,j,d]
        P[h,i,j] = softmax[j](scale * S[h,i,j])
        O[h,i,e] += P[h,i,j] * V[h,j,e]
    """
FORMS: dict[str, dict[str, Any]] = {
    "descriptors": {"descriptors": True},
    "walked": {"programs": 3},
    "parts": {"parts": 2},
    "all": {"descriptors": True, "programs": 3, "parts": 2},
    "one tensor": {"descriptors": ["A"], "programs": 2},
    "the result": {"descriptors": ["Y"], "programs": 2, "parts": 2},
}
LARGE = ("bf16[4096,4096]", "bf16[4096,4096]")


def values(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def run(text: str, args: list[Any], config: dict[str, Any], kernel: str = "") -> tuple[torch.Tensor, Launch]:
    """The result and the launch of a program of one kernel with a configuration, through the interpreter."""
    f = tdsl.function(text, backend="triton")
    f.schedule({kernel or f"{f.program.name}_0": config})
    launches: list[Launch] = []
    with on_launch(launches.append):
        result = f(*args)
    (launch,) = launches
    return result, launch


def step(text: str, *args: Any, target: str = "cuda:90", config: dict[str, Any] | None = None) -> Step:
    """The only kernel of a program."""
    f = tdsl.function(text)
    if config is not None:
        f.schedule({f"{f.program.name}_0": config})
    (found,) = f.lower(*args, target=target).steps
    return found


def machine(kernel: tile_ir.Kernel, target: str) -> tuple[KernelReport, str]:
    """The report of a kernel's machine code, and its instructions."""
    source, integers = triton_source(kernel)
    hints = {name: 1 if value == 1 else 16 for name, value in integers.items() if value == 1 or value % 16 == 0}
    return report(source, target, hints), sass(aot.compile(source, target, hints))


# ---------------------------------------------------------------------------------------------------------------------
# What is computed: the same in every form


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_a_product_in_every_form(form: str, dtype: torch.dtype) -> None:
    """Odd numbers of tiles, rows, columns and terms, all of which end inside of a tile."""
    a, b = values((90, 72), (72, 104), dtype=dtype)
    config = {"tiles": {"i": 32, "j": 32, "k": 32}, **FORMS[form]}
    y, launch = run(MATMUL, [a, b], config)
    torch.testing.assert_close(y.double(), (a.double() @ b.double()), atol=1e-4 if dtype == torch.float32 else 0.1, rtol=1e-2)
    wanted = config.get("descriptors", [])
    moved = ["A", "B", "Y"] if wanted is True else wanted
    source = launch.kernel.source
    assert [f"make_tensor_descriptor({name}," in source for name in "ABY"] == [name in moved for name in "ABY"]
    assert config.get("programs", 12) == launch.grid
    assert ("tl.num_programs(0)" in source) == ("programs" in config)
    assert ("for part in tl.static_range(2)" in source) == ("parts" in config)


def test_an_epilogue_is_cut_too() -> None:
    x, w, b, r = values((70, 72), (52, 72), (52,), (70, 52))
    config = {"tiles": {"n": 32, "o": 32, "i": 16}, "descriptors": True, "programs": 3, "parts": 2}
    y, launch = run(LINEAR, [x, w, b, r], config)
    torch.testing.assert_close(y, torch.relu(x @ w.T + b) + r, rtol=1e-4, atol=1e-4)
    assert launch.kernel.source.count("[TILE_N, TILE_O // 2])") == 2  # the residual and the result


def test_batches_and_operands_that_lie_the_other_way() -> None:
    a, b = values((3, 72, 40), (3, 72, 52))
    config = {"tiles": {"i": 32, "j": 32, "k": 16}, "descriptors": True, "programs": 3, "parts": 2}
    y, launch = run("for h, i, j, k: Y[h,i,j] += A[h,k,i] * B[h,k,j]", [a, b], config)
    torch.testing.assert_close(y, a.mT @ b, rtol=1e-4, atol=1e-4)
    assert "tl.trans(A_tiles.load([h, k_start, tile_i * TILE_I]).reshape(TILE_K, TILE_I))" in launch.kernel.source


def test_indices_that_are_walked_as_one() -> None:
    x, w = values((3, 25, 72), (52, 72))
    y, launch = run("Y[b,t,o] += X[b,t,i] * W[o,i]", [x, w], {"tiles": {"t": 32, "o": 32, "i": 16}, "descriptors": True, "programs": 3})
    torch.testing.assert_close(y, x @ w.T, rtol=1e-4, atol=1e-4)
    assert "[size_b * size_t, size_i]" in launch.kernel.source


def test_a_part_of_a_tensor_begins_at_a_number() -> None:
    """Tiles that are shifted by a number that is not the axis' own; where the axis ends inside of a tile, only pointers know where."""
    (x, w) = values((96, 24), (24, 40))
    text = "for i in 0:{n}, j, k: Y[i,j] += X[i+{first},k] * W[k,j]"
    y, launch = run(text.format(n=64, first=16), [x, w], {"tiles": {"i": 32, "j": 32, "k": 16}, "descriptors": True})
    torch.testing.assert_close(y, x[16:80] @ w, rtol=1e-4, atol=1e-4)
    assert "X_tiles.load([16 + tile_i * TILE_I, k_start])" in launch.kernel.source
    y, launch = run(text.format(n=61, first=16), [x, w], {"tiles": {"i": 32, "j": 32, "k": 16}, "descriptors": True})
    torch.testing.assert_close(y, x[16:77] @ w, rtol=1e-4, atol=1e-4)
    assert "X_tiles" not in launch.kernel.source
    assert "W_tiles" in launch.kernel.source


def test_a_range_that_ends_before_its_tensor() -> None:
    x, w = values((96, 40), (40, 24))
    y, launch = run("for i, j in 0:19, k in 0:37: Y[i,j] += X[i,k] * W[k,j]", [x, w], {"descriptors": True, "parts": 2})
    torch.testing.assert_close(y, x[:, :37] @ w[:37, :19], rtol=1e-4, atol=1e-4)
    assert "X_tiles" in launch.kernel.source


def test_a_stream_by_descriptors() -> None:
    q, k, v = values((2, 37, 24), (2, 41, 24), (2, 41, 24))
    o, launch = run(ATTENTION, [q, k, v, 0.3], {"tiles": {"j": 16}, "descriptors": True})
    torch.testing.assert_close(o, torch.softmax(0.3 * q @ k.mT, -1) @ v, rtol=1e-4, atol=1e-5)
    assert [f"{name}_tiles" in launch.kernel.source for name in "QKVO"] == [True] * 4


def test_gradients_in_every_form() -> None:
    a, b = (t.requires_grad_() for t in values((50, 40), (40, 72)))
    f = tdsl.function(MATMUL, backend="triton")
    form = {"tiles": {"k": 32}, "descriptors": True, "programs": 2, "parts": 2}
    f.schedule({"Y_0": form, "Y_bwd_0": {**form, "tiles": {"j": 32}}, "Y_bwd_1": {**form, "tiles": {"i": 32}}})
    found = torch.autograd.grad((f(a, b) ** 2).sum(), (a, b))
    for ours, theirs in zip(found, torch.autograd.grad(((a @ b) ** 2).sum(), (a, b)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Where descriptors cannot be


@pytest.mark.parametrize("shift", [0, 1, 4])
def test_a_tensor_that_begins_anywhere_is_read_by_pointers(shift: int) -> None:
    """The layout is the same, so is the compiled callable: the launch looks."""
    f = tdsl.function(MATMUL, backend="triton")
    f.schedule({"Y_0": {"descriptors": True, "programs": 2}})
    aligned, b = values((40, 72), (72, 48))
    f(aligned, b)
    a = torch.cat([torch.zeros(shift), aligned.flatten()])[shift:].view(40, 72)
    launches: list[Launch] = []
    with on_launch(launches.append):
        y = f(a, b)
    torch.testing.assert_close(y, a @ b, rtol=1e-4, atol=1e-4)
    assert ("make_tensor_descriptor" in launches[0].kernel.source) == (a.data_ptr() % 16 == 0)
    assert launches[0].grid == 2


@pytest.mark.parametrize(
    ("text", "args", "can"),
    [
        (MATMUL, ("bf16[512,512]", "bf16[512,512]"), ("A", "B", "Y")),
        (MATMUL, ("bf16[512,500]", "bf16[500,512]"), ("B", "Y")),  # 1000 bytes are no multiple of 16
        (MATMUL, (torch.empty(512, 512, device="meta").T, torch.empty(512, 512, device="meta")), ("A", "B", "Y")),
        (MATMUL, (torch.empty(512, 1024, device="meta")[:, ::2], torch.empty(512, 512, device="meta")), ("B", "Y")),
        (MATMUL, (torch.empty(1, 512, device="meta").expand(512, 512), torch.empty(512, 512, device="meta")), ("B", "Y")),
        ("Y[b,j] += E[ids[b],k] * B[k,j]", ("bf16[512,512]", "i64[512]", "bf16[512,512]"), ("B", "Y")),  # rows anywhere
        ("Y[i,j] += A[i,k] * B[k,j]", ("bf16[70000,64]", "bf16[64,70000]"), ()),  # offsets of 64 bits
        ("y[i] = 2 * x[i]", ("fp32[5000]",), ()),
    ],
)
def test_what_descriptors_move(text: str, args: tuple[Any, ...], can: tuple[str, ...]) -> None:
    assert describable(replace(step(text, *args).tile, **UNDRESSED)) == can


UNDRESSED: dict[str, Any] = {"descriptors": (), "walkers": 0, "parts": None}


def test_what_is_read_and_written_is_not_moved_by_descriptors() -> None:
    kernel = step(MATMUL, "bf16[512,512]", "bf16[512,512]").tile
    load = next(op for op in tile_ir.operations(kernel.body) if isinstance(op, tile_ir.Load))
    store = next(op for op in kernel.body if isinstance(op, tile_ir.Store))
    assert load.buffer.tensor in describable(kernel)
    both = replace(kernel, body=(*kernel.body, replace(store, buffer=load.buffer)))
    assert load.buffer.tensor not in describable(both)


@pytest.mark.parametrize("target", ["cuda:80", "hip:gfx942"])
def test_chips_without_them_keep_pointers(target: str) -> None:
    found = step(MATMUL, *LARGE, target=target, config={"descriptors": True, "programs": 200})
    assert found.source is not None
    assert "make_tensor_descriptor" not in found.source.source
    assert "tl.num_programs(0)" in found.source.source
    assert found.source.otherwise is None


def test_scratch_is_torchs_unless_there_is_an_allocator() -> None:
    import triton
    from triton.runtime import _allocation

    def fresh() -> Any:
        provide_scratch(_allocation)
        return _allocation._allocator.get()

    def own() -> Any:
        triton.set_allocator(mine)
        return fresh()

    def mine(size: int, alignment: int, stream: int | None) -> None: ...

    assert contextvars.Context().run(fresh) is scratch
    assert contextvars.Context().run(own) is mine


# ---------------------------------------------------------------------------------------------------------------------
# Defaults


@pytest.mark.parametrize("target", ["cuda:90", "cuda:100"])
def test_many_tiles_are_walked(target: str) -> None:
    """The machine code of the default beside that of pointers: fewer registers, as many blocks on an SM, all of them resident."""
    kernel = step(MATMUL, *LARGE, target=target).tile
    assert schedule_of(kernel).descriptors == ("A", "B", "Y")
    assert schedule_of(kernel).parts == 2
    assert kernel.programs == resident(kernel, TARGETS[target]) * TARGETS[target].sms < kernel.grid_tiles
    (own, code), (pointers, plain) = (machine(k, target) for k in (kernel, replace(kernel, **UNDRESSED)))
    assert own.faults == pointers.faults == ()
    assert "UTMALDG" in code and "UTMASTG" in code
    assert "UTMALDG" not in plain
    assert own.registers < 0.9 * pointers.registers
    assert own.occupancy == pointers.occupancy == resident(kernel, TARGETS[target])
    whole = machine(replace(kernel, parts=None), target)[0]
    assert own.shared < whole.shared
    assert whole.occupancy < own.occupancy


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "cpu"])
@pytest.mark.parametrize("form", ["descriptors", "walked", "parts", "all"])
def test_every_form_compiles_for_every_chip(form: str, target: str) -> None:
    kernel = step(MATMUL, "bf16[1000,520]", "bf16[520,776]", target=target, config={**FORMS[form], "tiles": {"i": 64, "j": 64}}).tile
    own, code = machine(kernel, target)
    assert own.faults == ()
    moves = target in ("cuda:90", "cuda:100") and "descriptors" in FORMS[form]
    assert ("UTMALDG" in code) == ("UTMASTG" in code) == moves


@pytest.mark.parametrize("target", ["cuda:90", "cuda:100"])
def test_an_epilogue_in_parts_does_not_spill(target: str) -> None:
    """128 x 256 with a GELU behind it: whole tiles of its steps do not fit beside the sums."""
    text = "Z[n,o] += X[n,i] * W[o,i]; Y[n,o] = gelu(Z[n,o] + b[o])"
    kernel = step(text, "bf16[8192,1024]", "bf16[4096,1024]", "bf16[4096]", target=target).tile
    assert sorted(a.tile for a in kernel.axes) == [64, 128, 256]
    assert kernel.parts is not None
    assert machine(kernel, target)[0].faults == ()
    assert machine(replace(kernel, **UNDRESSED), target)[0].spills or not version("triton").startswith("3.7.")  # others' assemblers may not


def test_tf32_tiles_that_lie_the_other_way_are_moved_whole() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        kernel = step(MATMUL, "fp32[4096,4096]", "fp32[4096,4096]").tile
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    own, pointers = (machine(k, "cuda:90")[0] for k in (kernel, replace(kernel, **UNDRESSED)))
    assert own.faults == ()
    assert own.registers < 0.9 * pointers.registers
    assert (min(own.load_bytes)[0], min(pointers.load_bytes)[0]) == (16, 4)


@pytest.mark.parametrize(
    ("text", "args", "largest"),
    [
        (MATMUL, LARGE, 256),
        (MATMUL, ("bf16[2560,4096]", "bf16[4096,4096]"), 128),  # the third wave would be half empty
        (MATMUL, ("bf16[4096,256]", "bf16[256,4096]"), 128),  # too few terms to hide what is stored behind them
        (MATMUL, ("bf16[2048,4096]", "bf16[4096,2048]"), 128),  # too few tiles
        (MATMUL, ("fp32[4096,4096]", "fp32[4096,4096]"), 64),
        ("Y[i,j] += exp(A[i,k]) * B[k,j]", LARGE, 256),  # an operand that is computed, once for each 256 columns
        ("for h, i, j, k: Y[h,i,j] += A[h,i,k] * B[h,k,j]", ("bf16[64,1024,1024]", "bf16[64,1024,128]"), 128),  # 128 columns
        ("Y[n,o,y,x] += X[n,c,y,x] * W[o,c]", ("bf16[32,512,64,64]", "bf16[512,512]"), 128),  # by pointers: images are apart in memory
    ],
)
def test_how_large_tiles_are(text: str, args: tuple[str, ...], largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operands, "WIN", 0.0)  # none is stored
    assert max(a.tile for a in step(text, *args).tile.axes) == largest


@pytest.mark.parametrize(
    ("text", "args"),
    [
        (MATMUL, ("bf16[512,512]", "bf16[512,512]")),  # a program for each tile
        (MATMUL, ("fp32[4096,4096]", "fp32[4096,4096]")),  # no tensor cores
        ("Y[i,j] += exp(A[i,k]) * B[k,j]", LARGE),  # an operand that is computed
        (MATMUL, ("bf16[4096,4092]", "bf16[4092,4096]")),  # rows that begin anywhere
        (ATTENTION, ("bf16[16,2048,64]", "bf16[16,2048,64]", "bf16[16,2048,64]", 0.125)),
    ],
)
def test_what_keeps_pointers(text: str, args: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operands, "WIN", 0.0)  # none is stored
    kernel = step(text, *args).tile
    assert kernel.descriptors == ()
    assert kernel.programs == kernel.grid_tiles


def test_results_in_tensor_memory_leave_registers_to_addresses() -> None:
    args = ("bf16[16,2048,64]", "bf16[16,2048,64]", "bf16[16,2048,64]", 0.125)
    kernel = step(ATTENTION, *args, target="cuda:100").tile
    assert schedule_of(kernel).descriptors == ("Q", "K", "V")
    own, pointers = (machine(k, "cuda:100")[0] for k in (kernel, replace(kernel, **UNDRESSED)))
    assert own.faults == ()
    assert own.registers < 0.85 * pointers.registers


def test_rows_that_end_anywhere_are_not_read_by_elements() -> None:
    """A part of a wider tensor: its rows begin at multiples of 16 bytes, and the compiler cannot see that they end at none."""
    a, b = (torch.empty(512, 512, dtype=torch.bfloat16, device="meta")[:, :501] for _ in range(2))
    kernel = step("Y[i,j] += A[i,k] * B[j,k]", a, b).tile
    assert schedule_of(kernel).descriptors == ("A", "B")
    own, pointers = (machine(k, "cuda:90")[0] for k in (kernel, replace(kernel, **UNDRESSED)))
    assert {width for width, _ in own.load_bytes} == {16}
    assert {width for width, _ in pointers.load_bytes} == {2}


def test_tiles_that_are_too_small_to_be_copied_ahead() -> None:
    """A thread has 2 bytes of them: pointers would be read in the loop that waits for them."""
    text = "D[i,j] += (x[i,d] - y[j,d]) ** 2; G[i,j] += g[i,e] * b[j,e]; Z[i,d] += G[i,j] * exp(-D[i,j]) * (x[i,d] - y[j,d])"
    args = ("bf16[1024,3]", "bf16[256,3]", "bf16[1024,16]", "bf16[256,16]")
    kernel = step(text, *args).tile
    assert schedule_of(kernel).descriptors == ("b",)
    own, pointers = (machine(k, "cuda:90")[0] for k in (kernel, replace(kernel, **UNDRESSED)))
    assert own.async_copies > pointers.async_copies == 0


def test_a_space_has_every_form() -> None:
    moved = ("A", "B", "Y")
    walked = [(moved, True, 1), (moved, True, 2), (("A", "B"), True, 1)]
    for target, forms in (("cuda:90", [((), False, 1), (moved, False, 1), *walked]), ("cuda:80", [((), False, 1), ((), True, 1)])):
        ((_, found),) = spaces(tdsl.function(MATMUL).lower(*LARGE, target=target))
        schedules = [schedule for schedule, _ in found]
        assert {(s.descriptors, s.programs > 0, s.parts) for s in schedules} == {*forms}
        assert len({*schedules}) == len(schedules)


def test_forms_cost_the_same() -> None:
    """The roofline knows nothing of them: that a few programs walk the tiles does not make the work less."""
    f = tdsl.function(MATMUL)
    state = f.lower(*LARGE, target="cuda:90")
    assert state.plan is not None
    (plan,), kernel = state.plan.kernels, state.steps[0].tile
    assert predict(plan, kernel, state.target) == predict(plan, replace(kernel, **UNDRESSED), state.target)


# ---------------------------------------------------------------------------------------------------------------------
# By hand


def test_explain_shows_the_form() -> None:
    text = schedule_text(step(MATMUL, *LARGE))
    assert "132 programs, 8 warps" in text
    assert "they walk 512 tiles; descriptors move A, B, Y; j is stored in 2 parts" in text


def test_what_is_not_said_goes_by_the_tiles() -> None:
    def form(**config: Any) -> tuple[Any, ...]:
        found = schedule_of(step(MATMUL, *LARGE, config=config).tile)
        return found.descriptors, found.programs, found.parts

    assert form() == (("A", "B", "Y"), 132, 2)
    assert form(num_stages=3) == (("A", "B", "Y"), 132, 1)  # which fits whole
    assert form(tiles={"j": 128}, num_stages=3) == (("A", "B", "Y"), 264, 2)
    assert form(programs=0) == (("A", "B", "Y"), 0, 2)
    assert form(descriptors=False, programs=0, parts=1) == tuple(PLAIN.values())
    assert form(tiles={"i": 64, "j": 128}, num_stages=3) == tuple(PLAIN.values())  # three blocks of pointers, two of descriptors
    assert form(tiles={"k": 1}) == tuple(PLAIN.values())  # summed number by number


def test_a_form_comes_back_from_its_schedule() -> None:
    found = step(MATMUL, *LARGE)
    f = tdsl.function(MATMUL)
    f.schedule({"Y_0": schedule_of(found.tile)})
    assert f.lower(*LARGE, target="cuda:90").steps[0].source == found.source
    assert dressed(described(found.tile, ()), schedule_of(found.tile)) == found.tile


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"descriptors": ["X"]}, r"descriptors of linear_0 are \['X'\], and with these tiles they move W, R, Y"),
        ({"descriptors": "W"}, "descriptors of linear_0 are 'W'"),
        ({"programs": -1}, "programs of linear_0 is -1"),
        ({"programs": True}, "programs of linear_0 is True"),
        ({"parts": 3}, "parts of linear_0 is 3"),
        ({"parts": 2, "tiles": {"o": 4}}, "the tiles of linear_0 cannot be stored in parts"),
    ],
)
def test_a_form_that_a_kernel_cannot_have(config: dict[str, Any], message: str) -> None:
    x = torch.empty(64, 130, device="meta")[:, 1:129]
    with pytest.raises(errors.ArgumentError, match=message):
        step(LINEAR, x, torch.empty(64, 128, device="meta"), "fp32[64]", "fp32[64,64]", config=config)


# ---------------------------------------------------------------------------------------------------------------------
# Where nothing fits


def test_the_last_resort_says_so() -> None:
    """No configuration that is left fits: the last one is used, and explain says why."""
    f = tdsl.function(MATMUL)
    state = f.lower("bf16[512,512]", "bf16[512,512]", target="cuda:90")
    assert state.plan is not None
    kernel = state.steps[0].tile
    assert kernel.unfit == ""
    huge = [replace(kernel, axes=tuple(replace(a, tile=n) for a in kernel.axes)) for n in (1024, 512)]
    found = best_fit(huge, state.target, lambda k: predict(state.plan.kernels[0], k, state.target))
    assert found.axes == huge[-1].axes
    assert found.unfit.startswith("none of 2 configurations fits, this one least of all too large: its tiles take ")
    assert found.unfit in schedule_text(replace(state.steps[0], tile=found))


def test_machine_code_that_shows_it_is_told_why() -> None:
    f = tdsl.function(ATTENTION)
    f.schedule({"attention_0": {"tiles": {"i": 256, "j": 256}, "num_warps": 4}})
    args = ("bf16[4,512,64]", "bf16[4,512,64]", "bf16[4,512,64]", 0.125)
    (kernel,) = f.check(*args, target="cuda:90").kernels
    assert kernel.spills
    assert any(fault.startswith("this configuration does not fit: its tiles take ") for fault in kernel.faults)


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_forms_on_a_gpu(form: str, device: str) -> None:
    a, b = (t.to(device) for t in values((1000, 520), (520, 776), dtype=torch.bfloat16))
    f = tdsl.function(MATMUL)
    f.schedule({"Y_0": FORMS[form]})
    torch.testing.assert_close(f(a, b), a @ b, rtol=2e-2, atol=1e-1)
    shifted = torch.empty(1000 * 520 + 1, dtype=a.dtype, device=device)[1:].view(1000, 520).copy_(a)
    torch.testing.assert_close(f(shifted, b), a @ b, rtol=2e-2, atol=1e-1)


@pytest.mark.gpu
def test_many_tiles_on_a_gpu(device: str) -> None:
    a, b = (t.to(device) for t in values((4100, 1000), (1000, 4104), dtype=torch.bfloat16))
    torch.testing.assert_close(tdsl.function(MATMUL)(a, b), a @ b, rtol=2e-2, atol=2e-1)
