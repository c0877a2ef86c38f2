"""Fusion: how many kernels there are, what is never in memory, and that values and gradients are those of torch in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tdsl
from lowering.triton_launch import on_launch
from tests.fused import FUSED, Fused


def leaves(args: list[Any], dtype: torch.dtype) -> list[Any]:
    return [a.to(dtype).requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    scale = float(expected.detach().abs().max()) or 1.0
    error = float((actual.detach().double() - expected.detach()).abs().max()) / scale
    assert error < tolerance, error


@pytest.mark.parametrize("name", FUSED)
def test_kernels_values_and_gradients(name: str) -> None:
    """The generated kernels, through the interpreter, against torch's composition in float64."""
    case = FUSED[name]
    function = tdsl.function(case.text, backend="triton")
    args, exact = leaves(case.make(), torch.float32), leaves(case.make(), torch.float64)
    launched: list[str] = []
    with on_launch(lambda launch: launched.append(launch.kernel.name)):
        result = function(*args)
        forward = len(launched)
        expected = case.torch(*exact)
        cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        wanted = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
        grads = torch.autograd.grad(result, wanted, cotangent.float())
    expected_grads = torch.autograd.grad(expected, [a for a in exact if isinstance(a, torch.Tensor) and a.requires_grad], cotangent)
    close(result, expected, 1e-5)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        close(grad, expected_grad, 5e-4)
    assert (case.forward, case.backward) == (forward, len(launched) - forward)


@pytest.mark.parametrize("name", FUSED)
def test_cpu(name: str) -> None:
    """The same plans through the CPU executor."""
    case = FUSED[name]
    args, exact = leaves(case.make(), torch.float32), leaves(case.make(), torch.float64)
    result, expected = tdsl.function(case.text)(*args), case.torch(*exact)
    close(result, expected, 1e-5)
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    grads = torch.autograd.grad(result, [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad], cotangent.float())
    expected_grads = torch.autograd.grad(expected, [a for a in exact if isinstance(a, torch.Tensor) and a.requires_grad], cotangent)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        close(grad, expected_grad, 5e-4)


@pytest.mark.parametrize("name", [n for n, case in FUSED.items() if case.hidden])
def test_never_in_memory(name: str) -> None:
    """No kernel of the forward or of the gradient reads or writes the hidden tensors or their cotangents."""
    case = FUSED[name]
    args = list((case.large or {}).values()) or case.make()
    for function in (tdsl.function(case.text), ):
        for plan in (function.plan(*args, target="cuda:90"), _gradient_plan(function, case, args)):
            hidden = {*case.hidden, *(f"{t}.grad" for t in case.hidden)}
            assert set() == hidden & set(plan.memory)
            for kernel in plan.kernels:
                assert set() == hidden & {*kernel.reads, *kernel.writes}


def _gradient_plan(function: Any, case: Fused, args: list[Any]) -> Any:
    """The plan of the whole gradient: inputs and cotangents in, gradients out."""
    shapes = function.lower(*args, target="cuda:90").shapes
    dtype = "bf16" if case.large else "fp32"
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


def test_rows_that_are_masked_out_whole() -> None:
    """As torch.softmax: NaN there, and nowhere else; a first tile that is masked out does no harm to the row."""
    text = """
        def attention(Q[i,d], K[j,d], V[j,e], m[i,j]) -> O[i,e]:
            S[i,j] += Q[i,d] * K[j,d]
            P[i,j] = softmax[j](where(m[i,j] > 0, S[i,j], -inf))
            O[i,e] += P[i,j] * V[j,e]
        """
    torch.manual_seed(0)
    q, k, v = torch.randn(70, 16), torch.randn(300, 16), torch.randn(300, 16)
    mask = torch.ones(70, 300)
    mask[3] = 0
    mask[5, :250] = 0
    expected = torch.softmax(torch.where(mask > 0, q @ k.T, -torch.inf), -1) @ v
    for backend in ("triton", "torch"):
        actual = tdsl.function(text, backend=backend)(q, k, v, mask)
        torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-4, atol=1e-5)
    assert expected[3].isnan().all() and not expected[5].isnan().any()


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_extreme_scores(scale: float) -> None:
    torch.manual_seed(0)
    q = torch.randn(1, 100, 16)
    expected = torch.softmax(scale * (q @ q.mT).double(), -1) @ q.double()
    actual = tdsl.function(FUSED["attention"].text, backend="triton")(q, q, q, scale)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-2, atol=1e-2)
