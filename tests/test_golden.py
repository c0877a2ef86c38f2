"""The printed stages of a handful of small programs, as files that a reviewer reads: tests/golden/test_golden/*.txt."""

from __future__ import annotations

import pytest

import tdsl
from tests.conftest import Golden

PROGRAMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "contraction": ("for h, i, j, k:  Y[h,i,j] += A[h,i,k] * B[h,j,k]", ("bf16[8,1024,64]", "bf16[8,1024,64]")),
    "linear": (
        "def linear(X[n,i], W[o,i], b[o]) -> Y[n,o]:\n    Z[n,o] += X[n,i] * W[o,i]\n    Y[n,o] = relu(Z[n,o] + b[o])",
        ("bf16[512,256]", "bf16[128,256]", "bf16[128]"),
    ),
    "softmax": ("P[i,j] = softmax[j](X[i,j])", ("fp32[1000,300]",)),
    "transpose": ("B[j,i] = A[i,j]", ("fp32[1000,300]",)),
    "gather": ("Y[b,d] = E[ids[b],d]", ("fp32[5000,64]", "i64[33]")),
}
STAGES = ("program", "gradient", "plan", "triton", "torch")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", PROGRAMS)
def test_stage(name: str, stage: str, golden: Golden) -> None:
    text, args = PROGRAMS[name]
    target = None if stage == "torch" else "cuda:90"
    golden(tdsl.function(text).emit(stage, *args, target=target))
