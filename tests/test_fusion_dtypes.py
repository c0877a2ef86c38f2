"""Fusion in 16 bits: values, gradients and kernels of every row of the table.

The kernels run in float16 through the interpreter (which computes bfloat16 wrongly), in both on the CPU executor, and in bfloat16 they are
compiled for a GPU with none in the machine. Everything is compared with torch's composition in float64 of the same rounded numbers.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import tdsl
from lowering.contraction import contraction
from tests.fused import FUSED, Fused
from tests.test_fusion import differentiated, error, launched, leaves, results

# What is not stored stays in float32. So a result is rounded a few times, each time by half an eps of the element at most: as it is
# stored, as a residual that the gradient reads, and as the operand of a product (weights of a sum whose total is a result).
ROUNDINGS = 3


def assert_rounded(case: Fused, found: list[torch.Tensor], args: list[Any], dtype: torch.dtype) -> None:
    """Each result is within ROUNDINGS eps of its largest element; one that cancels is no further off than torch's composition in the dtype."""
    exact = results(case.torch, leaves(args, torch.float64))
    for name, actual, wanted in zip(differentiated(case), found, exact, strict=True):
        assert actual.dtype == dtype
        limit = ROUNDINGS * torch.finfo(dtype).eps
        if name in case.cancels:
            limit = max(error(a, w) for a, w in zip(results(case.torch, leaves(args, dtype)), exact, strict=True))
        assert error(actual, wanted) < limit, f"the gradient of {name}" if name else "the value"


@pytest.mark.parametrize("name", FUSED)
def test_kernels_in_float16(name: str) -> None:
    """At odd lengths: as many kernels as in float32, none by the CPU executor."""
    case = FUSED[name]
    args = leaves(case.make(sizes=case.primes()), torch.float16)
    found, forward, backward = launched(tdsl.function(case.text, backend="triton"), args)
    assert (case.forward, case.backward) == (forward, backward)
    assert_rounded(case, found, args, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("name", FUSED)
def test_cpu(name: str, dtype: torch.dtype) -> None:
    case = FUSED[name]
    args = leaves(case.make(sizes=case.primes()), dtype)
    assert_rounded(case, results(tdsl.function(case.text), args), args, dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Machine code


def check_machine_code(name: str, gradient: bool, dtype: str = "bf16") -> None:
    """No spills, no stack, and products on the tensor cores, at the sizes of a real problem where there are some."""
    case = FUSED[name]
    args = case.specs(dtype, case.large)
    function = tdsl.function(case.text)
    report = function.check(*args, target="cuda:90", gradient=gradient)
    for kernel in report.kernels:
        assert (kernel.spills, kernel.stack, kernel.faults) == (0, 0, ()), f"{kernel.name}: {kernel.faults}"
        assert kernel.occupancy >= 1
    (kernel, *_) = function.plan(*args, target="cuda:90").kernels
    if any(
        (c := contraction(s)) and all(min(kernel.extents[i] for i in group) >= 16 for group in (c.m, c.n, c.k)) for s in kernel.statements
    ):
        assert report.kernels[0].tensor_core == "wgmma"


@pytest.mark.parametrize(("name", "gradient"), [("soft_cap", True), ("weighted_logsumexp", False), ("cauchy_sum", False)])
def test_a_sample_compiles_without_faults(name: str, gradient: bool) -> None:
    check_machine_code(name, gradient)


@pytest.mark.check_all
@pytest.mark.parametrize("name", FUSED)
def test_every_row_compiles_without_faults(name: str) -> None:
    check_machine_code(name, gradient=True)
