"""Fusion: how many kernels there are, what is never in memory, and that values and gradients are those of torch in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import tdsl
from lowering.triton_launch import on_launch
from tests.fused import FUSED, Fused, attention_text, by_hand


def leaves(args: list[Any], dtype: torch.dtype) -> list[Any]:
    return [a.detach().to(dtype).requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]


def results(function: Callable[..., torch.Tensor], args: list[Any]) -> list[torch.Tensor]:
    """The value, then the gradient of each float argument for a random cotangent, the same in every dtype that can hold it."""
    value = function(*args)
    wanted = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
    cotangent = torch.randn(value.shape, generator=torch.Generator().manual_seed(7)).to(wanted[0].dtype)
    return [value, *torch.autograd.grad(value, wanted, cotangent.to(value.dtype))]


def launched(function: Callable[..., torch.Tensor], args: list[Any]) -> tuple[list[torch.Tensor], int, int]:
    """The same with how many kernels the value took, and how many the gradients."""
    names: list[str] = []
    forward = 0

    def counted(*args: Any) -> torch.Tensor:
        nonlocal forward
        value = function(*args)
        forward = len(names)
        return value

    with on_launch(lambda launch: names.append(launch.kernel.name)):
        found = results(counted, args)
    return found, forward, len(names) - forward


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest error, relative to the largest magnitude."""
    assert actual.shape == expected.shape
    scale = float(expected.detach().abs().max()) or 1.0
    return float((actual.detach().double() - expected.detach()).abs().max()) / scale


def differentiated(case: Fused) -> list[str]:
    """The names of what `results` gives: the value, which has none, and the arguments that have a gradient."""
    return ["", *(name for name, spec in case.args.items() if isinstance(spec, str))]


def assert_close(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """What float32 leaves of a float64 composition: 1e-5 for values, 5e-4 for gradients, some of which are differences of sums."""
    for n, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert error(a, e) < (5e-4 if n else 1e-5)


@pytest.mark.parametrize("name", FUSED)
def test_kernels_values_and_gradients(name: str) -> None:
    """The generated kernels, through the interpreter, against torch's composition in float64."""
    case = FUSED[name]
    found, forward, backward = launched(tdsl.function(case.text, backend="triton"), leaves(case.make(), torch.float32))
    assert_close(found, results(case.torch, leaves(case.make(), torch.float64)))
    assert (case.forward, case.backward) == (forward, backward)


@pytest.mark.parametrize("sizes", [Fused.given, Fused.primes], ids=["given", "primes"])
@pytest.mark.parametrize("name", FUSED)
def test_cpu(name: str, sizes: Callable[[Fused], dict[str, int]]) -> None:
    """The same plans through the CPU executor."""
    case = FUSED[name]
    args = case.make(sizes=sizes(case))
    assert_close(results(tdsl.function(case.text), leaves(args, torch.float32)), results(case.torch, leaves(args, torch.float64)))


# ---------------------------------------------------------------------------------------------------------------------
# Sizes 1 and 0: what torch gives, NaN where nothing is divided by nothing


def check_sizes(case: Fused, size: int, backend: str) -> None:
    """Each letter in turn is 0, or every other letter is 1, or all of them; those that are left are small and odd."""
    small = {letter: min(n, 5) for letter, n in case.primes().items()}
    chosen = [list(small)[::2], list(small)[1::2], list(small)] if size else [[letter] for letter in small]
    variants = [{**small, **dict.fromkeys(letters, size)} for letters in chosen]
    function = tdsl.function(case.text, backend=backend)
    for sizes in variants:
        if any(isinstance(spec, tuple) and not sizes[spec[0]] and math.prod(sizes[i] for i in spec[1]) for spec in case.args.values()):
            continue  # there is no integer below 0
        args = case.make(sizes=sizes)
        found = results(function, leaves(args, torch.float32))
        for name, actual, wanted in zip(differentiated(case), found, results(case.torch, leaves(args, torch.float64)), strict=True):
            torch.testing.assert_close(
                actual.double(), wanted.double(), rtol=1e-4, atol=1e-4, equal_nan=True, msg=lambda m, s=sizes, n=name: f"{s}: {n}: {m}"
            )


@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize("name", FUSED)
def test_small_sizes_on_a_cpu(name: str, size: int) -> None:
    check_sizes(FUSED[name], size, "torch")


@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize("name", ["causal", "linear_cross_entropy", "layer_norm"])
def test_small_sizes_in_a_sample_of_kernels(name: str, size: int) -> None:
    check_sizes(FUSED[name], size, "triton")


@pytest.mark.check_all
@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize("name", FUSED)
def test_small_sizes_in_every_kernel(name: str, size: int) -> None:
    check_sizes(FUSED[name], size, "triton")


# ---------------------------------------------------------------------------------------------------------------------
# What is in memory


@pytest.mark.parametrize("name", [n for n, case in FUSED.items() if case.hidden])
def test_never_in_memory(name: str) -> None:
    """No kernel of the forward or of the gradient reads or writes the hidden tensors or their cotangents."""
    case = FUSED[name]
    hidden = {*case.hidden, *(f"{t}.grad" for t in case.hidden)}
    function = tdsl.function(case.text)
    for dtype, sizes in (("fp32", case.sizes), ("bf16", case.large or case.sizes)):
        args = case.specs(dtype, sizes)
        for plan in (function.plan(*args, target="cuda:90"), gradient_plan(function, args, dtype)):
            assert set() == hidden & set(plan.memory)
            for kernel in plan.kernels:
                assert set() == hidden & {*kernel.reads, *kernel.writes}


def gradient_plan(function: Any, args: list[Any], dtype: str) -> Any:
    """The plan of the whole gradient: inputs and cotangents in, gradients out."""
    shapes = function.lower(*args, target="cuda:90").shapes
    cotangents = [f"{dtype}[{','.join(map(str, shapes[o]))}]" for o in function.program.results]
    return function.grad().plan(*args, *cotangents, target="cuda:90")


def test_masked_tiles_are_not_visited() -> None:
    """A causal mask ends the loop over keys at the tile's last row, a window starts it; in the gradient it is the other way round."""
    causal = tdsl.function(FUSED["causal"].text).emit("triton", *_strings(), target="cuda:90")
    window = tdsl.function(FUSED["window"].text).emit("triton", *_strings(), target="cuda:90")
    plain = tdsl.function(FUSED["attention"].text).emit("triton", *_strings(), target="cuda:90")
    assert "for j_start in range(0, size_j, TILE_J)" in plain
    assert "for j_start in range(0, tl.minimum(" in causal
    assert "for j_start in range(tl.maximum(" in window


def _strings() -> list[Any]:
    return ["bf16[4,512,64]", "bf16[4,512,64]", "bf16[4,512,64]", 0.125]


def test_visited_tiles_are_counted() -> None:
    """Through the interpreter: the loads of keys of a causal program are about half of those without a mask."""
    import numpy as np
    from triton.runtime import interpreter

    def loads(name: str) -> int:
        count = 0
        original = interpreter.InterpreterBuilder.create_masked_load

        def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            return original(self, *args, **kwargs)

        interpreter.InterpreterBuilder.create_masked_load = counting
        try:
            torch.manual_seed(0)
            q = torch.randn(1, 1024, 16)
            tdsl.function(FUSED[name].text, backend="triton")(q, q, q, 0.3)
        finally:
            interpreter.InterpreterBuilder.create_masked_load = original
        return count

    full, causal, window = loads("attention"), loads("causal"), loads("window")
    assert np.isclose(0.55, causal / full, atol=0.12)
    assert window < 0.5 * full


# ---------------------------------------------------------------------------------------------------------------------
# Masked rows, infinities, NaN and extreme scores: forward and backward as torch's composition of the same has them


def assert_as_torch(
    function: Callable[..., torch.Tensor], composed: Callable[..., torch.Tensor], args: list[Any], exempt: frozenset[int] = frozenset()
) -> None:
    """Values and gradients are the composition's in float64, NaN and infinities included; exempt: results compared only where they are finite."""
    found, expected = (results(f, leaves(args, dtype)) for f, dtype in ((function, torch.float32), (composed, torch.float64)))
    for n, (a, e) in enumerate(zip(found, expected, strict=True)):
        a = a.double()
        scale = float(e.detach()[e.isfinite()].abs().max()) if e.isfinite().any() else 1.0
        at = e.isfinite() if n in exempt else torch.ones_like(e, dtype=torch.bool)
        torch.testing.assert_close(a[at], e[at], rtol=1e-4, atol=1e-5 * scale, equal_nan=True, msg=lambda m, n=n: f"result {n}: {m}")


def masked_by_logsumexp(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, mask: torch.Tensor) -> torch.Tensor:
    s = torch.where(mask > 0, scale * (q @ k.mT), -math.inf)
    return torch.exp(s - s.logsumexp(-1, keepdim=True)) @ v


def masked_softmax(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, mask: torch.Tensor) -> torch.Tensor:
    return torch.softmax(torch.where(mask > 0, scale * (q @ k.mT), -math.inf), -1) @ v


MASKED = "where(m[i,j] > 0, scale * S[h,i,j], -inf)"
FORMS: dict[str, tuple[str, Callable[..., torch.Tensor]]] = {
    "softmax": (attention_text(MASKED, ", m[i,j]"), masked_softmax),
    "by_hand": (by_hand("exp", "stop_gradient(M[h,i])").replace("scale)", "scale, m[i,j])").replace("scale * S[h,i,j]", MASKED), masked_softmax),
    "a_bias": (attention_text("scale * S[h,i,j] + log(m[i,j])", ", m[i,j]"), lambda q, k, v, s, m: torch.softmax(s * (q @ k.mT) + torch.log(m), -1) @ v),
    "logsumexp": (
        f"""
        def attention(Q[h,i,d], K[h,j,d], V[h,j,e], scale, m[i,j]) -> O[h,i,e]:
            S[h,i,j] += Q[h,i,d] * K[h,j,d]
            L[h,i] = logsumexp[j]({MASKED})
            O[h,i,e] += exp({MASKED} - L[h,i]) * V[h,j,e]
        """,
        masked_by_logsumexp,
    ),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("whole", [False, True], ids=["from_the_first_tile", "whole_rows"])
@pytest.mark.parametrize("form", FORMS)
def test_masked_rows(form: str, whole: bool, backend: str) -> None:
    """A row that starts with masked tiles is as any other; one that is masked out whole is NaN, and nothing else is that torch has not."""
    text, composed = FORMS[form]
    mask = torch.ones(40, 150, dtype=torch.float32 if form == "a_bias" else torch.int64)
    mask[5, :130] = 0
    mask[6, :-1] = 0
    if whole:
        mask[3] = 0
    q, k, v = (torch.randn(2, n, 16, generator=torch.Generator().manual_seed(n)) for n in (40, 150, 150))
    assert_as_torch(tdsl.function(text, backend=backend), composed, [q, k, v, 0.3, mask])


def test_tiles_that_are_not_visited_see_no_nan() -> None:
    """Rows that a causal mask empties are NaN, as torch's; values whose tiles no row visits get no gradient where torch has NaN from them."""
    text = attention_text("where(i >= j + 20, scale * S[h,i,j], -inf)")

    def composed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        visible = torch.arange(q.shape[1])[:, None] >= torch.arange(k.shape[1]) + 20
        return torch.softmax(torch.where(visible, scale * (q @ k.mT), -math.inf), -1) @ v

    q, k, v = (torch.randn(2, n, 16, generator=torch.Generator().manual_seed(n)) for n in (70, 150, 150))
    for backend in ("triton", "torch"):
        assert_as_torch(tdsl.function(text, backend=backend), composed, [q, k, v, 0.3], exempt=frozenset({3}))


@pytest.mark.parametrize(("where", "special"), [(0, math.inf), (1, -math.inf), (1, math.nan), (2, math.inf)])
def test_attention_of_what_is_not_finite(special: float, where: int) -> None:
    case = FUSED["attention"]
    args = case.make(sizes={"i": 40, "j": 70})
    args[where][1, 7, 2] = special
    assert_as_torch(tdsl.function(case.text, backend="triton"), case.torch, args)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(("where", "special"), [(0, math.inf), (1, math.nan), (2, math.inf)])
@pytest.mark.parametrize("name", ["gaussian_sum", "cauchy_sum", "student_sum", "compact_sum"])
def test_kernel_sums_of_what_is_not_finite(name: str, where: int, special: float, backend: str) -> None:
    """The derivative of relu at NaN is 0 here, where torch has NaN, so of the gradients that NaN reaches only the finite ones are compared."""
    case = FUSED[name]
    args = case.make(sizes={"i": 37, "j": 71})
    args[where][3, 1] = special
    exempt = frozenset({1, 2} if name == "compact_sum" and math.isnan(special) else ())
    assert_as_torch(tdsl.function(case.text, backend=backend), case.torch, args, exempt)


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_extreme_scores(scale: float) -> None:
    """Weights are 0 and 1. Gradients are products of the scale with differences that float32 has to its eps, so no more exact than that."""
    case = FUSED["attention"]
    q, k, v, _ = case.make(sizes={"h": 1, "i": 100, "j": 100})
    found, exact = (
        results(f, leaves([q, k, v, scale], d))
        for f, d in ((tdsl.function(case.text, backend="triton"), torch.float32), (case.torch, torch.float64))
    )
    limits = [1e-2, *[100 * torch.finfo(torch.float32).eps * abs(scale)] * 2, 1e-2]
    for actual, expected, limit in zip(found, exact, limits, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-2, atol=limit)
