"""Computed operands of matrix products: stored once where that is predicted to be faster, made again where it is not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import tdsl
from lowering.contraction import contraction
from lowering.plan import Plan
from lowering.targets import TARGETS
from tdsl.explain import predictions
from tdsl.ir import Access
from tdsl.lowered import lowered

LINEAR = "def f(X[n,i], W[o,i], b[o]) -> Y[n,o]: Z[n,o] += X[n,i] * W[o,i]; Y[n,o] = {}(Z[n,o] + b[o])"
LARGE = ["bf16[8192,4096]", "bf16[4096,4096]", "bf16[4096]"]


def computed(state: object) -> list[str]:
    """The products of a state's plan that compute an operand of theirs."""
    found = [(s, contraction(s)) for k in state.plan.kernels for s in k.statements]  # type: ignore[attr-defined]
    return [s.target.tensor for s, c in found if c is not None and not all(len(side) == 1 and isinstance(side[0], Access) for side in (c.lhs, c.rhs))]


@pytest.mark.parametrize("name", ["gelu", "relu", "silu", "tanh"])
def test_a_gradient_of_an_activation_is_made_once(name: str) -> None:
    (*_, backward) = lowered(tdsl.function(LINEAR.format(name)), LARGE, "cuda:90", gradient=True)
    assert [] == computed(backward.state)
    chip = TARGETS["cuda:90"]
    products = 2 * 2 * 8192 * 4096 * 4096 / (chip.flops["bfloat16"] * chip.sustained_flops)
    moved = 7 * 2 * 8192 * 4096 / (chip.bandwidth * chip.sustained_bandwidth)  # three operands and a result, a sum, and both products' own
    assert sum(p.seconds for p in predictions(backward.state)) < 1.1 * products + moved


def test_an_activation_between_two_products_is_the_epilogue_of_the_first() -> None:
    state = tdsl.function("def f(X[n,i], U[h,i], D[o,h]) -> Y[n,o]: A[n,h] += X[n,i] * U[h,i]; Y[n,o] += gelu(A[n,h]) * D[o,h]").lower(
        "bf16[8192,4096]", "bf16[11008,4096]", "bf16[4096,11008]", target="cuda:90"
    )
    assert [] == computed(state)
    assert state.plan is not None
    assert [2, 1] == [len(k.statements) for k in state.plan.kernels]


def test_a_scale_stays_in_its_product() -> None:
    state = tdsl.function("def f(X[n,i], s[i], W[o,i]) -> Y[n,o]: Y[n,o] += 2 * X[n,i] * s[i] * W[o,i]").lower(
        "bf16[8192,512]", "bf16[512]", "bf16[512,512]", target="cuda:90"
    )
    assert ["Y"] == computed(state)


def test_a_short_product_makes_its_operand_again() -> None:
    (*_, backward) = lowered(tdsl.function(LINEAR.format("gelu")), ["bf16[64,512]", "bf16[512,512]", "bf16[512]"], "cuda:90", gradient=True)
    assert {"X.grad", "W.grad"} == {*computed(backward.state)}


@pytest.mark.parametrize("name", ["gelu", "silu"])
def test_values(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the interpreter, at a size where storing pays on a chip that starts kernels for nothing."""
    slow = replace(TARGETS["cuda:90"], launch=0.0, flops=dict.fromkeys(TARGETS["cuda:90"].flops, 1e9))
    monkeypatch.setitem(TARGETS, "cuda:90", slow)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    args = [torch.randn(shape, generator=generator, dtype=torch.float64) / 8 for shape in ((160, 48), (96, 48), (96,))]
    cotangent = torch.randn(160, 96, generator=generator, dtype=torch.float64)
    small = [a.float() for a in (*args, cotangent)]
    found, expected = (tdsl.function(LINEAR.format(name), backend=backend).grad() for backend in ("triton", "reference"))
    assert any("operand" in s.target.tensor for k in found.plan(*small, target="cuda:90").kernels for s in k.statements)
    for actual, wanted in zip(found(*small), expected(*args, cotangent), strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=1e-3, atol=1e-3)


def test_the_choice_is_named_and_can_be_pinned() -> None:
    small = ["bf16[64,512]", "bf16[512,512]", "bf16[512]"]

    def backward(choice: str | None, args: list[str]) -> Plan:
        f = tdsl.function(LINEAR.format("gelu"))
        f.schedule({"X.grad.operand": choice})
        found = lowered(f, args, "cuda:90", gradient=True)[-1].state.plan
        assert found is not None
        return found

    free = backward(None, LARGE)
    assert ("X.grad.operand", "make once", "the faster") in [(c.subject, c.chosen, c.reason) for c in free.choices]
    assert free.memory == backward("store", LARGE).memory and "X.grad.operand" in free.memory
    assert "X.grad.operand" not in backward("recompute", LARGE).memory
    assert "X.grad.operand" not in backward(None, small).memory
    assert "X.grad.operand" in backward("store", small).memory
    with pytest.raises(tdsl.errors.NameError_, match=r"Q\.grad\.operand is no intermediate of f"):
        tdsl.function(LINEAR.format("gelu")).schedule({"Q.grad.operand": "store"})
