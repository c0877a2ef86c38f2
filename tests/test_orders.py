"""Contractions of three operands and more in training: what the forward makes on its way is saved, and its cotangent shared."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

import tdsl
from lowering.contraction import contraction
from tdsl import recipes
from tdsl.autograd import Differentiable, Halves
from tdsl.lowered import lowered
from tdsl.pairwise import in_order
from tdsl.swap import gradient
from tests.programs import assert_close, cotangents, expected

THREE = "Y[i,l] += A[i,j] * B[j,k] * C[k,l]"
WINDOWS = "Y[x,d] += X[x+r,c] * W[r,c,o] * V[o,d]"
# name -> (text, sizes of the indices, subscripts of the operands)
CHAINS = {
    "three": (THREE, "i=20 j=21 k=22 l=3"),
    "three_from_the_left": (THREE, "i=3 j=21 k=22 l=20"),
    "four": ("Y[i,m] += A[i,j] * B[j,k] * C[k,l] * D[l,m]", "i=7 j=8 k=9 l=6 m=2"),
    "five": ("Y[i,n] += A[i,j] * B[j,k] * C[k,l] * D[l,m] * E[m,n]", "i=5 j=6 k=5 l=4 m=6 n=2"),
    "batch": ("Y[b,i,l] += A[b,i,j] * B[b,j,k] * C[b,k,l]", "b=3 i=9 j=10 k=11 l=2"),
    "shared_operand": ("Y[b,i,l] += A[b,i,j] * B[j,k] * C[k,l]", "b=3 i=9 j=10 k=11 l=2"),
    "mttkrp": ("Y[i,r] += X[i,j,k] * B[j,r] * C[k,r]", "i=9 j=10 k=11 r=6"),
    "tucker": ("Y[i,j,k] += G[p,q,r] * A[i,p] * B[j,q] * C[k,r]", "i=6 j=7 k=8 p=3 q=4 r=2"),
    "twice": ("Y[i,l] += A[i,j] * B[j,k] * A[k,l]", "i=20 j=20 k=20 l=20"),
    "scaled": ("Y[i,l] += 2 * s * A[i,j] * exp(B[j,k]) * w[k] * C[k,l] / 3", "i=20 j=21 k=22 l=3"),
    "padded": ("def f(A[i,p], B[p,k], C[k,l]) -> Y[i,l]: Y[i,l] += A[i,j] * B[pad(j-1),k] * C[k,l]", "i=20 p=21 k=22 l=3"),
    "then_more": ("T[i,l] += A[i,j] * B[j,k] * C[k,l]\nY[i,l] = tanh(T[i,l]) * T[i,l]", "i=20 j=21 k=22 l=3"),
    "added_to": ("Y[i,l] = D[i,l] * D[i,l]\nY[i,l] += A[i,j] * B[j,k] * C[k,l]", "i=20 j=21 k=22 l=3"),
    "inside": ("Y[i,l] = tanh(sum[j,k](A[i,j] * B[j,k] * C[k,l]))", "i=20 j=21 k=22 l=3"),
    "part_of_the_range": ("for i, l, j, k in 2:20: Y[i,l] += A[i,j] * B[j,k] * C[k,l]", "i=20 j=21 k=22 l=3"),
    "windows": (WINDOWS, "x=12 r=3 c=9 o=10 d=2"),
}
WHOLE = ("mttkrp", "part_of_the_range")  # no order is cheaper than the nest; a range that does not begin at zero


def arguments(text: str, sizes: str, dtype: torch.dtype = torch.float64) -> list[Any]:
    size = {name: int(n) for name, n in (pair.split("=") for pair in sizes.split())}
    generator = torch.Generator().manual_seed(2)
    dims = [[d.rstrip("0123456789") for d in p.dims] for p in tdsl.function(text).program.params]
    shapes = [
        [size["x"] + size["r"] - 1 if (text, n, m) == (WINDOWS, 0, 0) else size[d] for m, d in enumerate(ds)] for n, ds in enumerate(dims)
    ]
    return [(torch.randn(shape, generator=generator, dtype=torch.float64) / 2).to(dtype).requires_grad_() for shape in shapes]


def halves(f: Any, args: list[Any]) -> Halves:
    trained = f.recorded_by(args)
    assert isinstance(trained, Differentiable)
    return trained.halves_for(args)


def check(text: str, args: list[Any], tolerance: float = 1e-9) -> Halves:
    """Outputs and gradients are those of the loops."""
    f = tdsl.function(text)
    result = f(*args)
    assert_close(result, expected(f.program, args)[0], tolerance)
    derived = gradient(f.program)
    given = cotangents(derived, args, [result])
    grads = torch.autograd.grad(result, args, given[-1].to(result.dtype))
    for actual, wanted in zip(grads, expected(derived, given), strict=True):
        assert_close(actual, wanted, tolerance)
    return halves(f, args)


@pytest.mark.parametrize("name", CHAINS)
def test_gradients(name: str) -> None:
    text, sizes = CHAINS[name]
    found = check(text, arguments(text, sizes))
    assert bool(found.orders) == (name not in WHOLE)
    assert bool(found.orders) == any(t.endswith(".c1") for t in found.parts.saved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["three", "four", "batch", "then_more"])
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    text, sizes = CHAINS[name]
    tolerance = {torch.float32: 2e-4, torch.bfloat16: 6e-2, torch.float16: 8e-3}[dtype]
    assert check(text, arguments(text, sizes, dtype), tolerance).orders


@pytest.mark.parametrize(
    "sizes", ["i=0 j=21 k=22 l=3", "i=20 j=0 k=22 l=3", "i=20 j=21 k=22 l=0", "i=1 j=70 k=80 l=1", "i=1 j=1 k=1 l=1", "i=70 j=1 k=80 l=9"]
)
def test_sizes_of_zero_and_one(sizes: str) -> None:
    check(THREE, arguments(THREE, sizes))


@pytest.mark.parametrize("name", ["three", "twice", "then_more"])
def test_second_derivatives(name: str) -> None:
    text, _ = CHAINS[name]
    args = arguments(text, "i=9 j=9 k=9 l=9")
    assert halves(tdsl.function(text), args).orders
    assert torch.autograd.gradgradcheck(tdsl.function(text), args)


@pytest.mark.parametrize("target", ["cpu", "cuda:90"])
def test_six_products(target: str) -> None:
    """Two forward and four backward, as torch's own graph of `A @ (B @ C)` has them."""
    parts = lowered(tdsl.function(THREE), ["fp32[1024,1024]", "fp32[1024,1024]", "fp32[1024,64]"], target, gradient=True)
    products = [s for part in parts[1:] for k in part.state.plan.kernels for s in k.statements if contraction(s)]  # type: ignore[union-attr]
    assert [part.title for part in parts] == ["forward", "forward that saves Y.c1", "backward"]
    assert len(products) == 6


def test_the_printed_gradient_is_the_rule_s() -> None:
    assert (
        str(tdsl.function(THREE).grad().program)
        == """\
def Y_grad(A[i,j], B[j,k], C[k,l], Y.grad[i,l]) -> A.grad[i,j], B.grad[j,k], C.grad[k,l]:
    for i, l, j, k:  A.grad[i,j] += Y.grad[i,l] * B[j,k] * C[k,l]
    for i, l, j, k:  B.grad[j,k] += A[i,j] * Y.grad[i,l] * C[k,l]
    for i, l, j, k:  C.grad[k,l] += A[i,j] * B[j,k] * Y.grad[i,l]"""
    )


def test_each_class_of_sizes_has_its_order() -> None:
    f = tdsl.function(THREE)
    wide, tall, small = (halves(f, arguments(THREE, sizes)) for sizes in ("i=99 j=99 k=99 l=3", "i=3 j=99 k=99 l=99", "i=3 j=3 k=3 l=3"))
    saved = [[str(s) for s in h.parts.forward.body] for h in (wide, tall)]
    assert wide.orders and tall.orders and wide.orders != tall.orders and saved[0] != saved[1]
    assert not small.orders and not small.parts.saved


def test_some_operands() -> None:
    """Only what is asked for is weighed: where A alone has a gradient, B * C is saved; C's own takes the order that costs it least."""
    for wanted in ((0,), (1,), (2,), (0, 2)):
        args = [a.detach().requires_grad_(n in wanted) for n, a in enumerate(arguments(THREE, "i=20 j=21 k=22 l=3"))]
        result = tdsl.function(THREE)(*args)
        cotangent = torch.randn_like(result)
        grads = torch.autograd.grad(result, [args[n] for n in wanted], cotangent)
        for actual, exact in zip(
            grads, torch.autograd.grad(args[0] @ args[1] @ args[2], [args[n] for n in wanted], cotangent), strict=True
        ):
            assert_close(actual, exact, 1e-9)


def test_where_it_would_cost_more_gradients_go_their_own_ways() -> None:
    text = "Y[c,e] += A[a,b] * B[b,c,d] * C[a,d,e] * D[c,d]"
    args = arguments(text, "a=2 b=2 c=30 d=12 e=5")
    assert halves(tdsl.function(text), args).orders
    assert not halves(tdsl.function(text), [a.detach().requires_grad_(n in (1, 3)) for n, a in enumerate(args)]).orders


def test_some_outputs() -> None:
    """A backward of fewer cotangents has the same saved tensors."""
    text = f"{THREE}\nZ[i,j] = A[i,j] * A[i,j]"
    f = tdsl.function(text)
    args = arguments(text, "i=20 j=21 k=22 l=3")
    found = halves(f, args)
    assert found.orders and [found.backward({}, [name]).cotangents for name in f.program.results] == [(0,), (1,)]
    exact = (args[0] @ args[1] @ args[2]), args[0] * args[0]
    for n in (0, 1):
        wanted = args if n == 0 else args[:1]
        grads = torch.autograd.grad(f(*args)[n].sum(), wanted)
        for actual, right in zip(grads, torch.autograd.grad(exact[n].sum(), wanted), strict=True):
            assert_close(actual, right, 1e-9)


def test_an_intermediate_that_dominates_memory_is_made_again() -> None:
    """Of few terms an element, and larger than all inputs and outputs: it does not wait for the backward."""
    text = "Y[i,l] += exp(x[b,i] - y[j]) * exp(z[j] - w[k]) * exp(u[k] - v[b,l])"
    assert not check(text, arguments(text, "b=3 i=9 j=30 k=30 l=9")).orders
    assert halves(tdsl.function(text), arguments(text, "b=3 i=9 j=30 k=9999 l=9")).orders


def test_statements_of_a_user_stay() -> None:
    f = tdsl.function(THREE)
    f.define_grad("B", "B.grad[i,j] = 7 * B[i,j]")
    args = arguments(THREE, "i=20 j=21 k=22 l=3")
    assert not halves(f, args).orders
    (grad,) = torch.autograd.grad(f(*args).sum(), args[1:2])
    assert_close(grad, 7 * args[1], 1e-9)


NONE = {
    "kernel_sum": "O[i,d] += exp(-sum[c]((x[i,c] - y[j,c]) ** 2)) * b[j,d]",
    "attention": "O[i,d] += softmax[j](sum[c](x[i,c] * y[j,c])) * b[j,d]",
    "recurrence": "def h(x[i,j], y[j,k]) -> H[i,i]:\n    for ordered t: H[t,i] = tanh(sum[j,k](x[i,j] * y[j,k] * H[pad(t-1),k]))",
}


@pytest.mark.parametrize("name", NONE)
def test_what_has_no_such_order(name: str) -> None:
    f = tdsl.function(NONE[name])
    assert not halves(f, [torch.randn(40, 40, requires_grad=True) for _ in f.program.params]).orders


def test_recipes_name_the_order() -> None:
    """A graph runs in another process: what its recipes say is enough to find the same halves."""
    f = tdsl.function(THREE)
    args = arguments(THREE, "i=20 j=21 k=22 l=3")
    found = halves(f, args)
    backward = found.backward(found.stored_for(args), f.program.results).executor
    assert backward is not None
    for executor in (found.forward, backward):
        assert json.loads(executor.recipe)["orders"] == [[0, [[1, 2], [0, 1]]]]
    fields = json.loads(found.forward.recipe)
    again = tdsl.function(THREE).part(**{k: v for k, v in fields.items() if k in recipes.PARTS})
    assert again is not found.forward and again.flat == found.forward.flat


def test_under_transforms_and_compile() -> None:
    f = tdsl.function(THREE)
    args = arguments(THREE, "i=20 j=21 k=22 l=3", torch.float32)

    def product(A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        return A @ B @ C

    plain = [a.detach() for a in args]
    for ours, wanted in zip(
        *(torch.func.grad(lambda *a, g=g: g(*a).square().sum(), argnums=(0, 1, 2))(*plain) for g in (f, product)), strict=True
    ):
        assert_close(ours, wanted, 2e-4)
    compiled = torch.compile(lambda *a: f(*a).square().sum(), backend="aot_eager", fullgraph=True)
    for ours, wanted in zip(
        torch.autograd.grad(compiled(*args), args), torch.autograd.grad(product(*args).square().sum(), args), strict=True
    ):
        assert_close(ours, wanted, 2e-4)


def test_in_order_means_the_same() -> None:
    """The rewritten program alone, on the loops."""
    for text, sizes in CHAINS.values():
        args = arguments(text, sizes)
        f = tdsl.function(text)
        orders = halves(f, args).orders
        for actual, wanted in zip(expected(in_order(f.program, orders), args), expected(f.program, args), strict=True):
            assert_close(actual, wanted, 1e-9)
