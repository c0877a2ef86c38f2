"""Maxima of scaled scores: the factor is taken out where it is positive and known, and values stay those of the program."""

from __future__ import annotations

import re

import pytest
import torch

import tdsl

ATTENTION = """
    def attention(Q[i,d], K[j,d], V[j,e], scale) -> O[i,e], M[i]:
        S[i,j] += Q[i,d] * K[j,d]
        P[i,j] = softmax[j]({scores})
        O[i,e] += P[i,j] * V[j,e]
        M[i] {op}= {scores}
    """


def source(scores: str, op: str = "max") -> str:
    text = ATTENTION.format(scores=scores, op=op)
    return tdsl.function(text).emit("triton", *["bf16[65536,64]"] * 3, 0.5, target="cuda:90")


@pytest.mark.parametrize(
    ("scores", "reduced"),
    [
        ("0.125 * S[i,j]", "s"),
        ("where(j <= i, 0.125 * S[i,j], -inf)", "chosen"),
        ("where(j <= i, where(i - j < 99, S[i,j] * 0.125, -inf), -inf)", "chosen"),
    ],
)
def test_the_factor_is_taken_out(scores: str, reduced: str) -> None:
    """Nothing but the exponent's own multiplication is left for each score."""
    text = source(scores)
    loop = text[text.index("for j_start") :]
    found = re.search(r"tl\.reduce\((\w+), 1, max_of\)\n +scaled = \w+ \* 0\.125\n", loop)
    assert found is not None and found[1].startswith(reduced)
    assert f"{found[1]} * {0.125 * 1.4426950408889634!r}" in loop
    assert loop.count("* 0.125") == 1


@pytest.mark.parametrize("scores", ["-0.125 * S[i,j]", "scale * S[i,j]", "where(j <= i, 0.125 * S[i,j], 0.5)"])
def test_a_factor_that_may_turn_or_miss_the_order_stays(scores: str) -> None:
    loop = source(scores).split("for j_start")[1]
    assert re.search(r"tl\.reduce\((\w+), 1, max_of\)\n +scaled\w* = \w+ \* ", loop) is None


@pytest.mark.parametrize("odd", [None, torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("op", ["max", "min"])
@pytest.mark.parametrize("factor", [0.3, -0.3, 1e-3, 7.0])
def test_values(factor: float, op: str, odd: float | None) -> None:
    """Rows that are masked out whole, and a score that is infinite or missing, give what torch gives."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, 32, generator=generator) for n in (37, 53, 53))
    if odd is not None:
        q[5], k[7] = 0.0, 0.0
        q[5, 0], k[7, 0] = 1.0, odd
    fill = "-inf" if op == "max" else "inf"
    text = ATTENTION.format(scores=f"where(j < i, {factor} * S[i,j], -inf)", op=op).replace(
        f"M[i] {op}= where(j < i, {factor} * S[i,j], -inf)", f"M[i] {op}= where(j < i, {factor} * S[i,j], {fill})"
    )
    mean, extreme = tdsl.function(text, backend="triton")(q, k, v, 0.5)
    inside = torch.arange(53) < torch.arange(37)[:, None]
    scores = factor * (q @ k.T)
    expected = torch.where(inside, scores, -torch.inf).softmax(1) @ v
    most = torch.where(inside, scores, float(fill))
    rows = slice(None) if odd is None else slice(0, 8)  # all that come after are infinite or missing
    torch.testing.assert_close(extreme, most.amax(1) if op == "max" else most.amin(1), rtol=1e-4, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(mean[rows], expected[rows], rtol=1e-3, atol=1e-4, equal_nan=True)


def test_a_maximum_is_bit_for_bit_that_of_the_products() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(40, 32, generator=generator), torch.randn(300, 32, generator=generator)
    text = "def f(A[i,k], B[j,k]) -> M[i], T[i]:\n    S[i,j] += A[i,k] * B[j,k]\n    M[i] max= {}\n    T[i] += exp({} - M[i])"
    pulled, plain = (tdsl.function(text.format(e, e), backend="triton")(a, b)[0] for e in ("0.3 * S[i,j]", "S[i,j]"))
    assert torch.equal(pulled, 0.3 * plain)
