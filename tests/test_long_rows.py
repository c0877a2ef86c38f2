"""Reductions of long rows: how often each kernel reads its input, while a row fits into registers and beyond, for few rows and for many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton")

import tdsl
from lowering import tile_ir
from lowering.fold import ROW
from lowering.kernel_shape import RESIDENT_ROW
from lowering.state import State
from tdsl.lowered import lowered
from tests.fused import FUSED
from tests.test_fusion import error, leaves, results


@dataclass(frozen=True)
class Row:
    """text: a program of X, whose last axis is the row, and of vectors as long. forward: how often X is read, over all kernels, beyond what
    fits into registers. backward: the same of its gradient, where it has one, while one program has room for sums down the columns too,
    while a row fits, and beyond."""

    text: str
    torch: Callable[..., torch.Tensor] | None
    forward: int = 2
    backward: tuple[int, int, int] = (1, 1, 1)


ROWS = {
    "softmax": Row(FUSED["softmax"].text, FUSED["softmax"].torch, backward=(0, 0, 0)),  # its own output is all that it reads
    "log_softmax": Row(FUSED["log_softmax"].text, FUSED["log_softmax"].torch),
    "layer_norm": Row(FUSED["layer_norm"].text, FUSED["layer_norm"].torch, backward=(1, 2, 3)),
    "rms_norm": Row(FUSED["rms_norm"].text, lambda x, g: F.rms_norm(x, (x.shape[-1],), g, 1e-5), backward=(1, 2, 3)),
    "logsumexp": Row("L[i] = logsumexp[j](X[i,j])", lambda x: torch.logsumexp(x, -1), forward=1),
    "variance": Row("V[i] = var[j](X[i,j])", lambda x: torch.var(x, -1, correction=0), forward=1),
    "argmax": Row("A[i] = argmax[j](X[i,j])", None),
}  # fmt: skip
LENGTHS = (1000, ROW + 1, RESIDENT_ROW, RESIDENT_ROW + 1, 100_003)


def sizes(name: str, rows: int, length: int) -> list[tuple[int, ...]]:
    return [(rows, length) if param.name == "X" else (length,) for param in tdsl.function(ROWS[name].text).program.params]


def parts(name: str, rows: int, length: int) -> list[State]:
    """The forward and, where there is one, the backward, lowered for a GPU."""
    specs = [f"fp32[{','.join(map(str, shape))}]" for shape in sizes(name, rows, length)]
    function = tdsl.function(ROWS[name].text)
    if ROWS[name].torch is None:
        return [function.lower(*specs, target="cuda:90")]
    forward, _, backward = lowered(function, specs, "cuda:90", gradient=True)
    return [forward.state, backward.state]


def loads(state: State) -> Counter[str]:
    """How often each tensor is read, over all kernels: a loop over a tensor's tiles is one time."""
    found = [op.buffer.tensor for step in state.steps for op in tile_ir.operations(step.tile.body) if isinstance(op, tile_ir.Load)]
    return Counter(found)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", ROWS)
def test_many_rows(name: str, length: int) -> None:
    """One kernel forward, which reads its input once while a row fits; backward no more than two times a tensor, or three beyond."""
    resident = length <= RESIDENT_ROW
    forward, *backward = parts(name, 4096, length)
    assert len(forward.steps) == 1
    assert loads(forward)["X"] == (1 if resident else ROWS[name].forward)
    for state in backward:
        most = ROWS[name].backward[(length > ROW) + (length > RESIDENT_ROW)]
        assert loads(state)["X"] == most
        assert all(n <= max(2, most) for n in loads(state).values())


FEW = [(name, length) for name in ROWS for length in LENGTHS]


@pytest.mark.parametrize(("name", "length"), FEW)
def test_few_rows_forward(name: str, length: int) -> None:
    """No row waits for another pass of its input than it would among many; rows that do not fit are shared by programs."""
    (forward, *_) = parts(name, 4, length)
    assert loads(forward)["X"] <= (1 if length <= RESIDENT_ROW else 2)
    if length > 100_000 and name != "argmax":
        assert max(step.tile.programs for step in forward.steps) >= 128


@pytest.mark.parametrize(("name", "length"), [case for case in FEW if ROWS[case[0]].torch is not None])
def test_few_rows_backward(name: str, length: int) -> None:
    (_, backward) = parts(name, 4, length)
    _, fits, beyond = ROWS[name].backward  # four rows are too few for programs that walk several
    assert loads(backward)["X"] <= (fits if length <= RESIDENT_ROW else max(beyond, 2))


# ---------------------------------------------------------------------------------------------------------------------
# Values, through the interpreter


def arguments(name: str, rows: int, length: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in sizes(name, rows, length)]


def check(name: str, rows: int, length: int) -> None:
    """Values and gradients as torch's in float64; pairwise sums keep the errors of long rows small."""
    args = arguments(name, rows, length)
    composed = ROWS[name].torch
    assert composed is not None
    found = results(tdsl.function(ROWS[name].text, backend="triton"), leaves(args, torch.float32))
    for actual, expected in zip(found, results(composed, leaves(args, torch.float64)), strict=True):
        assert error(actual, expected) < 2e-6


DIFFERENTIABLE = [name for name, row in ROWS.items() if row.torch is not None]


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_rows_that_just_fit(name: str) -> None:
    check(name, 2, RESIDENT_ROW)


@pytest.mark.parametrize("name", ROWS)
def test_values_of_rows_that_do_not_fit(name: str) -> None:
    args: list[Any] = arguments(name, 2, 16411)
    composed = ROWS[name].torch
    actual = tdsl.function(ROWS[name].text, backend="triton")(*args)
    if composed is None:
        assert torch.equal(actual, args[0].argmax(-1))
    else:
        assert error(actual, composed(*(a.double() for a in args))) < 1e-6


@pytest.mark.parametrize("name", ["softmax", "logsumexp"])
def test_gradients_of_rows_that_do_not_fit(name: str) -> None:
    check(name, 2, 16411)


@pytest.mark.check_all
@pytest.mark.parametrize(("rows", "length"), [(3, 16411), (130, 16411), (3, 100_003)])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_values_and_gradients_of_rows_that_do_not_fit(name: str, rows: int, length: int) -> None:
    check(name, rows, length)


def test_argmax_of_equals_is_the_first_along_a_streamed_row() -> None:
    x = torch.zeros(2, 16411)
    x[0, [5, 16000]] = 1
    x[1, 16400:] = 3
    assert [5, 16400] == tdsl.function(ROWS["argmax"].text, backend="triton")(x).tolist()


def test_two_cascades_over_different_tensors() -> None:
    """Each streams in a kernel of its own; together both rows would be held whole."""
    text = "M0[i] max= X[i,j]; M1[i] max= Y[i,j]; S0[i] += exp(X[i,j] - M0[i]); S1[i] += exp(Y[i,j] - M1[i]); R[i] = S0[i] + S1[i]"
    state = tdsl.function(text).lower("fp32[4096,100003]", "fp32[4096,100003]", target="cuda:90")
    assert len(state.steps) == 2
    assert all(a.tile <= RESIDENT_ROW for step in state.steps for a in step.tile.axes)
    for name in "XY":
        assert sum(isinstance(op, tile_ir.Load) and op.buffer.tensor == name for step in state.steps for op in tile_ir.operations(step.tile.body)) == 1
