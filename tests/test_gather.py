"""Affine targets become gathers: the rewritten program does what the loops do, and no target keeps a compound subscript."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

import tdsl
from tdsl import reference
from tdsl.gather import gather_form
from tdsl.ir import Index, Program, statements
from tdsl.swap import gradient
from tdsl.text import parse
from tdsl.verify import verify
from tests.corpus import CORPUS


def inputs_of(program: Program, shapes: dict[str, tuple[int, ...] | int], seed: int = 0) -> dict[str, np.ndarray | int]:
    """Random values; a number stands for itself."""
    generator = np.random.default_rng(seed)
    return {n: s if isinstance(s, int) else generator.normal(size=s) for n, s in shapes.items() if n in program.inputs}


def check(text: str, shapes: dict[str, tuple[int, ...] | int], *, plain: bool = True) -> Program:
    """The gather form of `text` does the same; every target is plain (unless the text is one that no rule inverts)."""
    program = parse(text)
    changed = verify(gather_form(program))
    assert parse(str(changed)) == changed
    inputs = inputs_of(program, shapes)
    before, after = reference.run(program, inputs), reference.run(changed, inputs)
    for name in program.results:
        np.testing.assert_allclose(after[name], before[name], rtol=1e-12, atol=1e-12, err_msg=str(changed))
    targets = [s.target for s in statements(changed.body)]
    assert plain == all(isinstance(e, Index) for t in targets for e in t.subscripts), str(changed)
    return changed


@pytest.mark.parametrize("stride", range(1, 5))
@pytest.mark.parametrize("dilation", range(1, 5))
@pytest.mark.parametrize("kernel", range(1, 6))
def test_convolution(stride: int, dilation: int, kernel: int) -> None:
    """Every stride, dilation and kernel, with sizes that divide and sizes that do not, unpadded, shifted and padded."""
    for extra, shift in itertools.product((0, 1, 3), (0, 1, 4)):
        n = (kernel - 1) * dilation + 1 + 2 * stride + extra
        x = (n - 1 - (kernel - 1) * dilation) // stride + 1
        head = "def f(X[n], W[r], G[x]) -> D[n]: for x, r:  "
        shapes = {"X": (n,), "W": (kernel,), "G": (x,)}
        check(f"{head}D[{stride}*x+{dilation}*r] += G[x] * W[r]", shapes)
        check(f"{head}D[pad({stride}*x+{dilation}*r-{shift})] += G[x] * W[r]", shapes)
        check(f"{head}D[pad({stride}*x+{dilation}*r-{shift})] += exp(G[x]) * W[r]", shapes)
        if stride == 1:
            assert "where" not in str(check(f"{head}D[pad(x+{dilation}*r-{shift})] += G[x] * W[r]", shapes))


CASES = {
    "two dimensions": (
        "def f(X[b,h,w], G[b,y,x], W[r,q]) -> D[b,h,w]: D[b,2*y+r,x+2*q] += G[b,y,x] * W[r,q]",
        {"X": (2, 7, 6), "G": (2, 3, 2), "W": (3, 3)},
    ),
    "pooled": (
        "def f(X[n], G[i]) -> D[n]: for i, r in 0:3: D[2*i+r] += where(X[2*i+r] == G[i], G[i] / (1 + X[2*i+r] ** 2), 0.0)",
        {"X": (9,), "G": (4,)},
    ),
    "apart": ("def f(X[n], G[i]) -> D[n]: for i, r in 0:3: D[3*i+r] += G[i] * X[3*i+r]", {"X": (13,), "G": (4,)}),
    "apart too short": ("def f(X[n], G[i]) -> D[n]: for i, r in 0:2: D[3*i+r] += G[i]", {"X": (13,), "G": (4,)}),
    "diagonal": ("def f(A[n,n], G[n]) -> D[n,n]: D[i,i] += G[i]", {"A": (4, 4), "G": (4,)}),
    "diagonal of three": ("def f(A[n,n,n], G[n,m]) -> D[n,n,n]: D[i,i,i] += G[i,k]", {"A": (3, 3, 3), "G": (3, 2)}),
    "off the diagonal": ("def f(A[n,m], G[k]) -> D[n,m]: D[i,i+1] += G[i]", {"A": (4, 6), "G": (4,)}),
    "band": ("def f(A[n,m], G[k,r]) -> D[n,m]: D[i+r,i] += G[i,r]", {"A": (6, 4), "G": (4, 3)}),
    "both diagonals": ("def f(A[n,m], G[k,l]) -> D[n,m]: D[i+j,i-j+3] += G[i,j]", {"A": (8, 8), "G": (4, 4)}),
    "reversed": ("def f(X[n], G[n]) -> D[n]: D[size(X, 0)-1-i] += G[i]", {"X": (5,), "G": (5,)}),
    "reversed and strided": ("def f(X[n], G[k]) -> D[n]: D[size(X, 0)-1-2*i] += G[i]", {"X": (8,), "G": (4,)}),
    "constant": ("def f(A[n,m], G[m]) -> D[n,m]: D[0,j] += G[j]", {"A": (3, 4), "G": (4,)}),
    "constant, reduced": ("def f(A[n,m], G[m,k]) -> D[n,m]: D[1,j] += G[j,k] * G[j,k]", {"A": (3, 4), "G": (4, 2)}),
    "constant, reduced, affine": ("def f(A[n,m], G[x], W[r]) -> D[n,m]: D[1,x+r] += G[x] * W[r]", {"A": (3, 6), "G": (4,), "W": (3,)}),
    "one element": ("def f(A[n,m], G[k]) -> D[n,m]: D[1,2] += G[k]", {"A": (3, 4), "G": (4,)}),
    "circular": ("def f(X[n], G[n], W[k]) -> D[n]: D[(i-k)%size(X, 0)] += G[i] * W[k]", {"X": (5,), "G": (5,), "W": (3,)}),
    "circular, long window": ("def f(X[n], G[n], W[k]) -> D[n]: D[(i-k)%size(X, 0)] += G[i] * W[k]", {"X": (3,), "G": (3,), "W": (5,)}),
    "circular, several turns": ("def f(X[n], G[m], W[k]) -> D[n]: D[(k-i)%size(X, 0)] += G[i] * W[k]", {"X": (3,), "G": (7,), "W": (2,)}),
    "circular, a part of a turn": (
        "def f(X[n], G[m], W[k]) -> D[n]: for i in 1:3, k: D[(i+k)%size(X, 0)] += G[i] * W[k]",
        {"X": (5,), "G": (4,), "W": (4,)},
    ),
    "circular, beside an edge": (
        "def f(X[n], G[n]) -> D[n]: D[(i+4)%size(X, 0)] += G[pad(i-1)] + X[pad(i+2)] * G[i]", {"X": (5,), "G": (5,)},
    ),
    "modulo a number": ("def f(X[n], G[m]) -> D[n]: D[i%3] += G[i]", {"X": (4,), "G": (8,)}),
    "repeated": ("def f(X[n], G[m]) -> D[n]: D[i//2] += G[i]", {"X": (4,), "G": (7,)}),
    "grouped": ("def f(X[g,d], G[h,d], n) -> D[g,d]: D[h//n,d] += G[h,d] * G[h,d]", {"X": (2, 3), "G": (6, 3), "n": 3}),
    "blocks": ("def f(X[a,b], G[m]) -> D[a,b]: D[i//4,i%4] += G[i]", {"X": (3, 4), "G": (10,)}),
    "explicit range": ("def f(X[n], G[m]) -> D[n]: for i in 2:5: D[i-1] += G[i]", {"X": (6,), "G": (6,)}),
    "explicit range, strided": ("def f(X[n], G[m]) -> D[n]: for i in 1:4, r in 0:2: D[3*i+r-2] += G[i+1] * r", {"X": (12,), "G": (6,)}),
    "empty range": ("def f(X[n], G[m]) -> D[n]: for i in 2:2: D[i+1] += G[i]", {"X": (6,), "G": (6,)}),
    "one step": ("def f(X[n], G[m]) -> D[n]: for i in 2:3: D[2*i+1] += G[i]", {"X": (6,), "G": (6,)}),
    "no kernel": ("def f(X[n], G[m]) -> D[n]: for i in 0:3, r in 0:0: D[2*i+r] += G[i]", {"X": (6,), "G": (6,)}),
    "empty tensor": ("def f(X[n], G[m]) -> D[n]: for i in 0:0, r in 0:2: D[2*i+r] += G[i]", {"X": (0,), "G": (0,)}),
    "by an affine bound": ("def f(X[n], W[r], g) -> D[n]: D[2*x+r] += g * W[r]", {"X": (9,), "W": (3,), "g": 2}),
    "by two affine bounds": (
        "def f(X[n], Z[m], W[r], g) -> D[n]: D[x+r] += g * W[r] * Z[x+2*r]",
        {"X": (9,), "Z": (7,), "W": (3,), "g": 2},
    ),
    "by its name": ("def f(X[n], g) -> D[n]: for n: D[n] += g", {"X": (4,), "g": 2}),
    "a triangle": ("def f(X[n], G[n,n]) -> D[n]: for i, j in 0:i+1: D[i-j] += G[i,j]", {"X": (5,), "G": (5, 5)}),
    "an index as a value": ("def f(X[n], W[r], G[x]) -> D[n]: D[2*x+r] += G[x] * x - W[r] * r * x", {"X": (9,), "W": (3,), "G": (4,)}),
    "clamped reads": ("def f(X[n], W[r], G[x]) -> D[n]: D[2*x+r] += G[clamp(x-1)] * W[r] * G[x]", {"X": (9,), "W": (3,), "G": (4,)}),
    "not finite at zero": (
        "def f(X[n], W[r], G[x]) -> D[n]: D[x+r] += G[x] * log(G[x] ** 2) * W[r] / G[x]",
        {"X": (6,), "W": (3,), "G": (4,)},
    ),
    "an equation": ("def f(A[n,m], X[n]) -> D[n]: for i, v: D[i] += where(v == i and i > 1, A[i,v], 0)", {"A": (4, 6), "X": (4,)}),
    "an equation outside": ("def f(A[n,m], X[n]) -> D[n]: for i, v: D[i] += where(v == i + 2, A[i,v] + 1, 0)", {"A": (4, 4), "X": (4,)}),
    "divisible": (
        "def f(G[x], H[n], W[r]) -> D[x]: D[pad((u-r+1)//2)] += where((u - r + 1) % 2 == 0, H[u] * W[r], 0)",
        {"G": (4,), "H": (8,), "W": (3,)},
    ),
}  # fmt: skip
UNCHANGED = {
    "a scatter": ("def f(X[n], p[k], G[k]) -> D[n]: D[p[i]] += G[i]", {"X": (4,), "G": (3,)}),
    "clamped": ("def f(X[n], G[n]) -> D[n]: D[clamp(i-1)] += G[i]", {"X": (4,), "G": (4,)}),
    "twice the index": ("def f(X[a], G[m]) -> D[a]: D[i//4+i%4] += G[i]", {"X": (6,), "G": (10,)}),
    "squares": ("def f(X[n], G[m]) -> D[n]: D[i*i] += G[i]", {"X": (10,), "G": (4,)}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_case(case: str) -> None:
    text, shapes = CASES[case]
    changed = check(text, shapes)
    assert gather_form(changed) == changed


def test_left_alone() -> None:
    for text, _ in UNCHANGED.values():
        program = parse(text)
        assert gather_form(program) == program


@pytest.mark.fuzz
@given(st.data())
def test_random_affine_targets(data: st.DataObject) -> None:
    """Two affine subscripts with random coefficients, offsets, pads and ranges."""
    draw = data.draw
    rank = draw(st.integers(1, 2))
    names = ("i", "j", "k")[: draw(st.integers(1, 3))]
    bounds = [(lo, lo + draw(st.integers(0, 3))) for lo in (draw(st.integers(0, 2)) for _ in names)]
    subscripts, sizes = [], []
    for _ in range(rank):
        coefficients = [draw(st.sampled_from((0, 0, 1, 1, -1, 2, 3, -2))) for _ in names]
        least = sum(min(c * lo, c * (hi - 1)) for c, (lo, hi) in zip(coefficients, bounds, strict=True))
        most = sum(max(c * lo, c * (hi - 1)) for c, (lo, hi) in zip(coefficients, bounds, strict=True))
        shift = draw(st.integers(-2, 1)) - least
        text = "+".join([*(f"{c}*{n}" for c, n in zip(coefficients, names, strict=True) if c), str(shift)]).replace("+-", "-")
        padded = least + shift < 0 or draw(st.booleans())
        subscripts.append(f"pad({text})" if padded else text)
        sizes.append(max(0, most + shift + 1 - (draw(st.integers(0, 2)) if padded else 0)))
    ranges = ", ".join(f"{n} in {lo}:{hi}" for n, (lo, hi) in zip(names, bounds, strict=True))
    dims = ",".join("abc"[:rank])
    value = " * ".join(f"G[{n}]" for n in names) if draw(st.booleans()) else f"exp(G[{names[0]}]) + {names[-1]}"
    program = f"def f(X[{dims}], G[n]) -> D[{dims}]: for {ranges}: D[{','.join(subscripts)}] += {value}"
    parsed = parse(program)
    changed = verify(gather_form(parsed))
    inputs = inputs_of(parsed, {"X": tuple(sizes), "G": (6,)})
    before, after = reference.run(parsed, inputs)["D"], reference.run(changed, inputs)["D"]
    np.testing.assert_allclose(after, before, rtol=1e-12, atol=1e-12, err_msg=f"{parsed}\n{changed}")


def numeric(program: Program, inputs: dict[str, np.ndarray], name: str, cotangent: np.ndarray, step: float = 1e-6) -> np.ndarray:
    """Central differences of the sum of output times cotangent."""
    found = np.zeros_like(inputs[name])
    for place in np.ndindex(found.shape):
        values = []
        for sign in (1, -1):
            moved = dict(inputs)
            moved[name] = inputs[name].copy()
            moved[name][place] += sign * step
            values.append(float((reference.run(program, moved)[program.results[0]] * cotangent).sum()))
        found[place] = (values[0] - values[1]) / (2 * step)
    return found


GRADIENTS = {
    "strided": ("Y[n,x] += X[n,pad(2*x+r-1,1,1)] * W[r]", {"X": (2, 7), "W": (3,)}),
    "square of a window": ("Y[x] += X[3*x+2*r] ** 2 * W[r]", {"X": (11,), "W": (3,)}),
    "sum of two windows": ("s += A[x+r] * W[r] + B[x+2*r]", {"A": (9,), "W": (3,), "B": (7,)}),
    "trace": ("t += A[i,i] * B[i]", {"A": (4, 4), "B": (4,)}),
    "max pool": ("for i, r in 0:2: Y[i] max= X[3*i+r]", {"X": (8,)}),
    "circular": ("for i in 0:size(X,0): Y[i] += X[(i-k)%size(X,0)] * W[k]", {"X": (5,), "W": (3,)}),
    "upsampled": ("def up(x[n], w[n]) -> Y[2*n]: for i in 0:2*size(x,0): Y[i] = x[i//2] * w[i//2]", {"x": (3,), "w": (3,)}),
    "an intermediate": ("Z[i,j] = X[i,j] ** 2; Y[i] += Z[2*i+r,0] * W[r]", {"X": (7, 3), "W": (3,)}),
}  # fmt: skip


@pytest.mark.parametrize("case", GRADIENTS)
def test_gradient(case: str) -> None:
    """First order against differences; second order as the differences of the first."""
    text, shapes = GRADIENTS[case]
    program = parse(text)
    first = gradient(program)
    generator = np.random.default_rng(1)
    inputs: dict[str, np.ndarray] = {n: generator.normal(size=s) for n, s in shapes.items()}
    shape = reference.run(program, inputs)[program.results[0]].shape
    cotangent = generator.normal(size=shape)
    everything = {**inputs, first.inputs[-1]: cotangent}
    found = reference.run(first, everything)
    for name in shapes:
        np.testing.assert_allclose(
            found[f"{name}.grad"], numeric(program, inputs, name, cotangent), rtol=1e-5, atol=1e-7, err_msg=str(first)
        )
    name = program.inputs[0]
    once = gradient(program, [name])
    second = verify(gradient(once))
    more = {**everything, second.inputs[-1]: generator.normal(size=shapes[name])}
    twice = reference.run(second, more)
    for other, result in zip(once.inputs, second.results, strict=True):
        expected = numeric(once, everything, other, more[second.inputs[-1]])
        np.testing.assert_allclose(twice[result], expected, rtol=1e-5, atol=1e-6, err_msg=str(second))
    for s in statements(second.body):
        assert all(isinstance(e, Index) for e in s.target.subscripts), str(second)


def test_printed() -> None:
    assert str(gradient(parse("Y[n,x] += X[n,pad(2*x+r-1,1,1)] * W[r]"), ["X"])).splitlines()[-1] == (
        "    for n, u, r:  X.grad[n,u] += where((u - r + 1) % 2 == 0, Y.grad[n,pad((u-r+1)//2)] * W[r], 0)"
    )
    assert (
        str(gradient(parse("Y[n,x] += X[n,x+r] * W[r]"), ["X"])).splitlines()[-1]
        == "    for n, u, r:  X.grad[n,u] += Y.grad[n,pad(u-r)] * W[r]"
    )
    assert "for u, k in 0:2:  x.grad[u] += Y.grad[k+2*u]" in str(
        gradient(parse("def up(x[n]) -> Y[2*n]: for i in 0:2*size(x,0): Y[i] = x[i//2]"))
    )


def test_pads_that_numbers_make_needless() -> None:
    """The gradient of grouped heads pads where n may not divide their number; where it does, kernels read plainly."""
    f = tdsl.function(CORPUS["attention_grouped"].text)
    assert "O.grad[pad(k+u*n),i,e]" in str(f.grad("V").program)
    shapes = ("fp32[8,16,16]", "fp32[4,16,16]", "fp32[4,16,16]", 2, "fp32[8,16,16]")
    assert "pad" not in str(f.grad("V").plan(*shapes, target="cuda:90"))


def test_no_atomics() -> None:
    """The kernels of a strided, dilated convolution's gradients store; only a true scatter adds."""
    f = tdsl.function("Y[n,o,x] += X[n,c,pad(2*x+3*r-1,1,1)] * W[o,c,r]")
    shapes = ("fp32[2,3,17]", "fp32[4,3,3]", "fp32[2,4,6]")
    assert "atomic" not in f.grad().emit("triton", *shapes)
    scatter = tdsl.function("def f(p[n], x[n], N) -> Y[N]: Y[p[i]] += x[i]")
    assert "atomic_add" in scatter.emit("triton", "i64[9]", "fp32[9]", 5)
