"""The machine code of the corpus, with no GPU: forward, the forward that saves, and backward, at the schedules that nobody tuned.

`make test` compiles a sample for one chip; `make check-all` every program of the corpus at its small shapes, and a part of it and the whole
table of fusion at realistic ones in two dtypes, for every target. Reports are remembered on disk, so that only kernels whose source changed
are compiled again. The rules are those of lowering/rules.py; nor may a default buy them with tiny tiles: it is predicted to take at most
SLOWEST times as long as the best configuration of its space.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import tdsl
from lowering.cost import predict
from lowering.space import spaces
from lowering.targets import TARGETS
from tdsl.errors import ArgumentError, Unsupported
from tdsl.ir import Call, Program, statements, walk
from tdsl.lowered import lowered
from tdsl.swap import differentiable
from tdsl.text import parse
from tests.corpus import CORPUS
from tests.fused import FUSED, Fused
from tests.programs import arguments, program_of

GPUS = [name for name in TARGETS if TARGETS[name].backend in ("cuda", "hip")]

# Sizes of layers as they are used; `d` is the float type.
REALISTIC: dict[str, tuple[Any, ...]] = {
    "matmul": ("{d}[1024,512]", "{d}[512,768]"),
    "linear": ("{d}[512,1024]", "{d}[768,1024]", "{d}[768]"),
    "softmax": ("{d}[512,1000]",),
    "layernorm": ("{d}[512,1024]", "{d}[1024]", "{d}[1024]"),
    "rmsnorm": ("{d}[512,1024]", "{d}[1024]"),
    "attention_causal": ("{d}[8,512,64]", "{d}[8,512,64]", "{d}[8,512,64]", 0.125),
    "cross_entropy": ("{d}[512,256]", "{d}[4096,256]", "i64[512]"),
    "kernel_sum": ("{d}[512,3]", "{d}[768,3]", "{d}[768,16]"),
    "conv2d": ("{d}[4,32,34,33]", "{d}[64,32,3,2]"),
    "gather": ("{d}[5000,128]", "i64[8,64]"),
    "scatter": ("i64[4096]", "{d}[4096,64]", 1000),
    "residual": ("{d}[512,256]", "{d}[256,512]", "{d}[512]", "{d}[512,512]"),
}
# How much longer than the best configuration a default may be predicted to take.
SLOWEST = 1.3
SAMPLE = [
    ("matmul", "bf16"), ("softmax", "bf16"), ("layernorm", "bf16"), ("rmsnorm", "fp32"), ("attention_causal", "bf16"), ("kernel_sum", "fp32"),
    ("gather", "bf16"), ("scatter", "fp32"), ("matmul", "fp32"), ("conv2d", "bf16"),
]  # fmt: skip
FUSED_SAMPLE = [("causal", "fp32"), ("values_of_two", "bf16"), ("linear_cross_entropy", "bf16"), ("compact_sum", "bf16")]


def assert_no_faults(program: Program, args: list[Any], target: str, *, tensor_cores: bool) -> None:
    """No spills and no stack in any kernel; at realistic sizes no other fault either."""
    gradient = any(_is_float(a) for n, a in zip(program.inputs, args, strict=True) if n in differentiable(program))
    try:
        report = tdsl.function(program).check(*args, target=target, gradient=gradient)
    except Unsupported:
        return
    except ArgumentError as error:
        assert "gradient" in error.what  # nothing to differentiate
        report = tdsl.function(program).check(*args, target=target)
    assert report.kernels or not any(_is_float(a) for a in args)
    # The sine of CUDA's library keeps a table of 2 / pi on the stack, for arguments beyond 1e5.
    table = any(isinstance(e, Call) and e.op in ("sin", "cos") for s in statements(program.body) for e in walk(s.value))
    for kernel in report.kernels:
        assert table or (kernel.spills, kernel.stack) == (0, 0), f"{kernel.name} for {target}: {kernel.faults}"
        assert kernel.stack <= 64 * table, f"{kernel.name} for {target}: {kernel.faults}"
        assert kernel.occupancy >= 1
        if tensor_cores:
            assert kernel.faults == (), f"{kernel.name} for {target}: {kernel.faults}"


def _is_float(a: Any) -> bool:
    return a.is_floating_point() if isinstance(a, torch.Tensor) else isinstance(a, str) and not a.startswith("i")


def large(fused: Fused) -> dict[str, int]:
    """Sizes of real problems: heads 16, features 64, rows 1024; three coordinates stay three."""
    return {letter: n if n == 3 else 16 if n <= 4 else 64 if n <= 16 else 512 if n <= 32 else 1024 for letter, n in fused.sizes.items()}


def assert_no_tiny_tiles(program: Program, args: list[Any], target: str) -> None:
    """Every default is predicted to be nearly as fast as the best configuration of its space."""
    function = tdsl.function(program)
    try:
        parts = lowered(function, args, target, gradient=True)
    except ArgumentError:
        parts = lowered(function, args, target)
    for part in parts[:1] + parts[-1:]:  # what a forward also saves changes nothing here
        for (kernel, configurations), step in zip(spaces(part.state), part.state.steps, strict=True):
            times = [predict(kernel, tiled, part.state.target).seconds for _, tiled in configurations]
            assert times[0] == predict(kernel, step.tile, part.state.target).seconds, "the first is the default"
            assert times[0] <= SLOWEST * min(times), f"{kernel.name} for {target}: {times[0] / min(times):.2f} times the best of {len(times)}"


def sized(name: str, dtype: str) -> list[Any]:
    return [a.format(d=dtype) if isinstance(a, str) else a for a in REALISTIC[name]]


@pytest.mark.parametrize(("name", "dtype"), SAMPLE)
def test_a_sample_compiles_without_faults(name: str, dtype: str) -> None:
    assert_no_faults(program_of(name), sized(name, dtype), "cuda:90", tensor_cores=True)


@pytest.mark.parametrize(("name", "dtype"), FUSED_SAMPLE)
def test_a_sample_of_the_fusion_table_compiles_without_faults(name: str, dtype: str) -> None:
    fused = FUSED[name]
    assert_no_faults(parse(fused.text), fused.specs(dtype, large(fused)), "cuda:90", tensor_cores=True)


@pytest.mark.parametrize("target", GPUS)
def test_a_sample_has_no_tiny_tiles(target: str) -> None:
    for name, dtype in [("linear", "bf16"), ("layernorm", "bf16"), ("residual", "fp32")]:
        assert_no_tiny_tiles(program_of(name), sized(name, dtype), target)
    fused = FUSED["causal"]
    assert_no_tiny_tiles(parse(fused.text), fused.specs("bf16", large(fused)), target)


@pytest.mark.check_all
@pytest.mark.parametrize("target", GPUS)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("name", FUSED)
def test_the_fusion_table_on_every_target(name: str, dtype: str, target: str) -> None:
    fused = FUSED[name]
    program, args = parse(fused.text), fused.specs(dtype, large(fused))
    assert_no_faults(program, args, target, tensor_cores=True)
    assert_no_tiny_tiles(program, args, target)


@pytest.mark.check_all
@pytest.mark.parametrize("target", GPUS)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("name", REALISTIC)
def test_realistic_sizes_on_every_target(name: str, dtype: str, target: str) -> None:
    assert_no_faults(program_of(name), sized(name, dtype), target, tensor_cores=True)
    assert_no_tiny_tiles(program_of(name), sized(name, dtype), target)


@pytest.mark.check_all
@pytest.mark.parametrize("target", GPUS)
@pytest.mark.parametrize("name", CORPUS)
def test_small_shapes_on_every_target(name: str, target: str) -> None:
    assert_no_faults(program_of(name), arguments(program_of(name), CORPUS[name]), target, tensor_cores=False)
