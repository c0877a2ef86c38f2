"""Long streams in parts: when, what the parts and their merge say, and that they give what one program gives."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import tdsl
from lowering import compiler, split_streams
from lowering.targets import TARGETS
from lowering.triton_launch import on_launch
from tests.fused import FUSED

# A chip on which nothing pays but to be busy: then every kernel that can be split is, whatever its size.
SLOW = replace(TARGETS["cuda:90"], launch=0.0, bandwidth=1e9, sms=16, flops=dict.fromkeys(TARGETS["cuda:90"].flops, 1e10))


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits small streams as well, of kernels that hold whatever may share one."""
    monkeypatch.setitem(TARGETS, "cuda:90", SLOW)  # type: ignore[arg-type]
    monkeypatch.setattr(compiler, "weighed", lambda planned, seconds: planned(frozenset()))
    monkeypatch.setattr(split_streams, "PART", 1000)
    monkeypatch.setattr(split_streams, "PART_DOT", 32)
    monkeypatch.setattr(split_streams, "ALIGNED", 16)


def run(text: str, *args: Any) -> tuple[Any, list[str]]:
    """The result of the generated kernels, through the interpreter, and the kernels that ran."""
    launched: list[str] = []
    with on_launch(lambda launch: launched.append(launch.kernel.name)):
        result = tdsl.function(text, backend="triton")(*args)
    return result, launched


def exact(text: str, *args: Any) -> torch.Tensor:
    """The same in float64, by torch code, which is not split."""
    wide = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
    result: torch.Tensor = tdsl.function(text, backend="torch")(*wide)
    return result


ATTENTION = """
    def attention(Q[h,i,d], K[h,j,d], V[h,j,e], scale) -> O[h,i,e]:
        S[h,i,j] += Q[h,i,d] * K[h,j,d]
        P[h,i,j] = softmax[j]({})
        O[h,i,e] += P[h,i,j] * V[h,j,e]
    """


@pytest.mark.parametrize("length", [256, 257, 331])
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("score", ["scale * S[h,i,j]", "where(i + 180 >= j, scale * S[h,i,j], -inf)"], ids=["all", "masked"])
@pytest.mark.usefixtures("always")
def test_attention_of_few_rows(score: str, rows: int, length: int) -> None:
    """Even and uneven parts, and parts that a mask leaves nothing of."""
    torch.manual_seed(0)
    args = [torch.randn(2, rows, 16), torch.randn(2, length, 16), torch.randn(2, length, 16), 0.3]
    text = ATTENTION.format(score)
    result, launched = run(text, *args)
    assert launched == ["attention_0", "attention_1"]
    torch.testing.assert_close(result.double(), exact(text, *args), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["causal", "by_hand_base_2", "weighted_logsumexp", "linear_cross_entropy", "cauchy_sum"])
@pytest.mark.usefixtures("always")
def test_gradients(name: str) -> None:
    """The kernels of the gradient have streams of their own."""
    case = FUSED[name]

    args, wide = (
        [a.to(t).requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in case.make()]
        for t in (torch.float32, torch.float64)
    )
    launched: list[str] = []
    with on_launch(lambda launch: launched.append(launch.kernel.name)):
        result, expected = tdsl.function(case.text, backend="triton")(*args), case.torch(*wide)
        cotangent = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        found = torch.autograd.grad(result, [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad], cotangent.float())
    exact_grads = torch.autograd.grad(expected, [a for a in wide if isinstance(a, torch.Tensor) and a.requires_grad], cotangent)
    assert len(launched) > case.forward + case.backward
    for grad, want in zip(found, exact_grads, strict=True):
        assert float((grad.double() - want).abs().max()) < 1e-4 * float(want.abs().max())


MASKED_VARIANCE = """
    n[i] += float32(M[i,j]); t[i] += where(M[i,j] > 0, X[i,j], 0)
    V[i] += where(M[i,j] > 0, (X[i,j] - t[i] / n[i]) ** 2, 0); Y[i] = V[i] / n[i]
    """
LONG = 20011


@pytest.mark.parametrize(
    ("text", "make"),
    [
        ("Y[i,j] = softmax[j](X[i,j])", lambda x, m: (x,)),
        ("Y[i] = logsumexp[j](X[i,j])", lambda x, m: (x,)),
        ("Y[i] = var[j](X[i,j])", lambda x, m: (x + 1000,)),
        (MASKED_VARIANCE, lambda x, m: (m, x + 100)),
        (f"a[i] += X[i,j]; b[i] += Z[i,j]; C[i] += (X[i,j] - a[i] / {LONG}) * (Z[i,j] - b[i] / {LONG})", lambda x, m: (x + 50, 2 * x.flip(1))),
        ("M[i] max= X[i,j]; L[i] += exp(X[i,j] - M[i]) * Z[i,j]; Y[i] = L[i]", lambda x, m: (torch.where(m > 0, x, -math.inf), x)),
        ("M[i] min= X[i,j]; L[i] += exp2(3 * M[i] - 3 * X[i,j]); Y[i] = log2(L[i]) - 3 * M[i]", lambda x, m: (x,)),
    ],
    ids=["softmax", "logsumexp", "variance", "masked_variance", "covariance", "masked_maximum", "minimum"],
)
@pytest.mark.usefixtures("always")
def test_long_rows(text: str, make: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]) -> None:
    """Rows beyond what a program holds: one pass over parts of an uneven length, one merge; softmax reads its rows once more."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, LONG, generator=generator)
    mask = torch.randint(0, 2, (2, LONG), generator=generator)
    mask[0, :12000] = 0  # some parts have nothing
    args = make(x, mask)
    result, launched = run(text, *args)
    assert len(launched) == (3 if "softmax" in text else 2)
    torch.testing.assert_close(result.double(), exact(text, *args), rtol=3e-5, atol=1e-6)


@pytest.mark.usefixtures("always")
def test_rows_without_anything() -> None:
    """As in one part: NaN for a row that is masked out whole, which torch.softmax gives too."""
    text = "P[i,j] = softmax[j](where(m[i,j] > 0, X[i,j], -inf)); O[i] += P[i,j] * X[i,j]"
    x, mask = torch.randn(3, LONG), torch.ones(3, LONG)
    mask[1] = 0
    mask[2, 100:] = 0
    result, launched = run(text, mask, x)
    assert len(launched) == 2
    expected = (torch.softmax(torch.where(mask > 0, x, -math.inf), -1) * x).sum(-1)
    torch.testing.assert_close(result, expected, equal_nan=True, rtol=1e-4, atol=1e-5)
    assert result.isnan().tolist() == [False, True, False]


def plan(text: str, *args: Any) -> Any:
    return tdsl.function(text).plan(*args, target="cuda:90")


@pytest.mark.parametrize(
    ("text", "args"),
    [
        (FUSED["attention"].text, ("bf16[16,1,64]", "bf16[16,65536,64]", "bf16[16,65536,64]", 0.1)),
        (FUSED["grouped_query"].text, ("bf16[4,8,1,128]", "bf16[4,65537,128]", "bf16[4,65537,128]", 0.1)),
        (FUSED["linear_cross_entropy"].text, ("bf16[16,1024]", "bf16[128000,1024]", "i64[16]")),
        ("Y[i] = logsumexp[j](X[i,j])", ("fp32[4,1000000]",)),
        ("Y[i] = var[j](X[i,j])", ("fp32[4,1000003]",)),
    ],
    ids=["decoding", "grouped", "vocabulary", "logsumexp", "variance"],
)
def test_few_rows_on_a_large_chip(text: str, args: tuple[Any, ...]) -> None:
    """One kernel of parts that fills the chip, one merge; what is between them is small, and inputs are read once."""
    found = plan(text, *args)
    assert len(found.kernels) == 2
    parts = found.kernels[0]
    assert math.prod(parts.extents[i] for i in parts.grid) >= 132
    assert sum(found.memory.values()) < 0.02 * parts.bytes
    assert any("parts" in choice.chosen for choice in found.choices)


@pytest.mark.parametrize(
    ("text", "args"),
    [
        (FUSED["attention"].text, ("bf16[64,4096,64]", "bf16[64,4096,64]", "bf16[64,4096,64]", 0.1)),  # many programs
        (FUSED["attention"].text, ("bf16[1,16,64]", "bf16[1,512,64]", "bf16[1,512,64]", 0.1)),  # little work
        ("Y[i] = logsumexp[j](X[i,j])", ("fp32[4096,100000]",)),
    ],
    ids=["many", "little", "rows"],
)
def test_not_in_parts(text: str, args: tuple[Any, ...]) -> None:
    assert len(plan(text, *args).kernels) == 1


def test_what_does_not_factor_is_not_split() -> None:
    """sin(x - m) cannot be rescaled: two passes, in one kernel for each row."""
    found = plan("M[i] max= X[i,j]; L[i] += sin(X[i,j] - M[i]); Y[i] = L[i]", "fp32[4,1000000]")
    assert not any("parts (" in str(choice) for choice in found.choices if choice.subject == found.kernels[-1].name)


def test_the_statements_of_the_parts() -> None:
    """What is merged is written as statements of the notation: relative to the maximum of a part, then to the finished one."""
    first, second = plan("M[i] max= X[i,j]; L[i] += exp(X[i,j] - M[i])", "fp32[4,1048576]").kernels
    assert [s.target.tensor for s in first.statements] == ["M.part", "L.part"]
    assert [s.target.tensor for s in second.statements] == ["M", "L"]
    assert "M.part[p,i] max= X[i,p*" in first.notation
    assert "L[i] += L.part[p,i] * exp(" in second.notation
