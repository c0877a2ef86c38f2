"""The loops against NumPy, and what only the values show."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tdsl import errors
from tdsl.infer import Spec
from tdsl.reference import run, source
from tdsl.text import parse

rng = np.random.default_rng(0)
A = rng.normal(size=(3, 4))
B = rng.normal(size=(4, 5))
X = rng.normal(size=10)
W = rng.normal(size=3)
IDS = np.array([2, 0, 2, 1])
NAN = np.array([[1.0, np.nan, 3.0], [2.0, 2.0, 1.0]])


def evaluate(text: str, **inputs: Any) -> Any:
    """The single output of a program."""
    (result,) = run(parse(text), inputs).values()
    return result


def softmax(x: Any) -> Any:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


CASES: list[tuple[str, dict[str, Any], Any]] = [
    # contractions, maps, 0-d
    ("Y[i,j] += A[i,k] * B[k,j]", {"A": A, "B": B}, A @ B),
    ("S += A[i,j] * A[i,j]", {"A": A}, (A * A).sum()),
    ("Y[i] *= A[i,k]", {"A": A}, A.prod(1)),
    ("Y[i] max= A[i,k]", {"A": A}, A.max(1)),
    ("Y[i] min= A[i,k]", {"A": A}, A.min(1)),
    ("Y[i] max= A[i,k]", {"A": NAN}, NAN.max(1)),
    ("Y = s * t", {"s": 2.0, "t": np.float32(3)}, 6.0),
    ("Y[i,j] = 10 * i + j + 0 * A[i,j]", {"A": A}, 10 * np.arange(3)[:, None] + np.arange(4.0)),
    ("Y += A[i,i]", {"A": A[:, :3]}, np.trace(A[:, :3])),
    ("Y[i] += A[i,k]", {"A": np.zeros((3, 0))}, np.zeros(3)),
    # windows, edges
    ("Y[x] += X[x+r] * W[r]", {"X": X, "W": W}, np.correlate(X, W)),
    ("Y[x] += X[pad(x+r-1,1,1)] * W[r]", {"X": X, "W": W}, np.correlate(np.pad(X, 1), W)),
    ("for x in 0:10: Y[x] = X[clamp(x-3)] + X[clamp(x+3)]", {"X": X}, np.pad(X, (3, 0), "edge")[:10] + np.pad(X, (0, 3), "edge")[3:]),
    ("def f(X[n]) -> Y[n]: Y[pad(x-2)] = X[x]", {"X": X}, np.append(X[2:], [0, 0])),
    ("for x in 0:20: Y[x] = X[x//2]", {"X": X}, X.repeat(2)),
    ("for x in 0:12: Y[x] = X[(x-1)%10]", {"X": X}, X[np.arange(-1, 11) % 10]),
    ("Y[x] = X[x-1] + X[x+1]", {"X": X}, np.append(0, X[:-2] + X[2:])),
    # gather, scatter, ragged
    ("Y[b,k] = A[ids[b],k]", {"A": A, "ids": IDS}, A[IDS]),
    ("def f(ids[e], m[e], N) -> Y[N]: Y[ids[e]] += m[e]", {"ids": IDS, "m": A[0], "N": 4}, np.bincount(IDS, A[0], 4)),
    (
        "def f(ids[e], m[e]) -> Y[3]: Y[ids[e]] max= m[e]",
        {"ids": np.array([0, 2, 0, 0]), "m": A[0]},
        [max(A[0][[0, 2, 3]]), -np.inf, A[0][1]],
    ),
    (
        "for b, j in 0:n[b]: Y[b] += X[off[b]+j]",
        {"X": X, "n": np.array([3, 0, 2]), "off": np.array([0, 3, 7])},
        [X[:3].sum(), 0, X[7:9].sum()],
    ),
    ("for i in 0:4, j in 0:i+1: Y[i] += X[j]", {"X": X}, np.cumsum(X)[:4]),
    ("def f(p[i], X[i]) -> Y[i]: Y[p[i]] = X[i]", {"p": np.array([2, 0, 1]), "X": W}, W[[1, 2, 0]]),
    # versions
    ("Y[i] = A[i,0]; Y[i] += A[i,k]", {"A": A}, A[:, 0] + A.sum(1)),
    ("Y[i] = A[i,0]; Y[i] = 2 * Y[i]", {"A": A}, 2 * A[:, 0]),
    ("Y[i] = A[i,0]; for i in 1:3: Y[i] = 7", {"A": A}, [A[0, 0], 7, 7]),
    ("def f(A[i,j]) -> A: A[i,0] = 7.0", {"A": A}, np.concatenate([np.full((3, 1), 7.0), A[:, 1:]], 1)),
    ("Y[i] = i + 0 * n[i]; Y[i] += 0.5", {"n": IDS}, np.arange(4) + 0.5),
    # recurrences
    ("for ordered t, i: H[t,i] = A[t,i] + 0.5 * H[pad(t-1),i]", {"A": A}, [A[0], A[1] + A[0] / 2, A[2] + A[1] / 2 + A[0] / 4]),
    ("for reversed t: H[t] = W[t] + 0.5 * H[pad(t+1)]", {"W": W}, [W[0] + W[1] / 2 + W[2] / 4, W[1] + W[2] / 2, W[2]]),
    # reductions inside
    ("Y[i] = sum[k](A[i,k]) + prod[k](A[i,k])", {"A": A}, A.sum(1) + A.prod(1)),
    ("Y[i] = mean[k](A[i,k]) + var[k](A[i,k])", {"A": A}, A.mean(1) + A.var(1)),
    ("Y[i] = max[k](A[i,k]) - min[k](A[i,k])", {"A": A}, A.max(1) - A.min(1)),
    ("Y[i] = max[k](A[i,k], init=0.5)", {"A": A}, np.maximum(A.max(1), 0.5)),
    ("Y[i] = max[k](A[i,k], init=0.5)", {"A": A[:, :0]}, [0.5] * 3),
    ("Y[i] = argmax[k](A[i,k])", {"A": NAN}, NAN.argmax(1)),
    ("Y[k] = argmin[i](A[i,k])", {"A": A}, A.argmin(0)),
    ("Y[i] = logsumexp[k](A[i,k])", {"A": A}, np.logaddexp.reduce(A, 1)),
    ("Y[i] = logsumexp[k](A[i,k])", {"A": A[:, :0]}, [-np.inf] * 3),
    ("P[i,j] = softmax[j](2 * A[i,j])", {"A": A}, softmax(2 * A)),
    ("P[i,j] = softmax[i,j](A[i,j])", {"A": A}, softmax(A.reshape(-1)).reshape(A.shape)),
    ("Y[i] = A[i,0] + sum[i](W[i])", {"A": A, "W": W}, A[:, 0] + W.sum()),
    ("Y[i] = where(W[i] > 0, sum[k](A[i,k]), A[i,0])", {"A": A, "W": W}, np.where(W > 0, A.sum(1), A[:, 0])),
    # functions and dtypes
    ("Y[i] = silu(W[i]) + gelu(2 * W[i] + 1) * sigmoid(W[i])", {"W": np.zeros(3)}, [0.5 * (0.5 * (1 + 0.6826894921370859))] * 3),
    ("Y[i] = 1 / W[i]", {"W": np.zeros(3)}, [np.inf] * 3),
    ("Y[i] = where(W[i] == 0, 0, 1 / W[i])", {"W": np.zeros(3)}, [0.0] * 3),
    ("Y[i] = int8(n[i] * 100)", {"n": IDS}, (IDS * 100).astype(np.int8)),
    ("Y[i] = n[i] // 2 - n[i] % 2", {"n": -IDS}, -IDS // 2 - -IDS % 2),
    ("Y[i] = W[i] > 0 and not W[i] > 1 or i == 0", {"W": W}, ((W > 0) & (W <= 1)) | (np.arange(3) == 0)),
    ("S += W[i] > 0", {"W": W}, (W > 0).sum()),
]


@pytest.mark.parametrize(("text", "inputs", "expected"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_the_loops_compute(text: str, inputs: dict[str, Any], expected: Any) -> None:
    before = {name: np.array(value) for name, value in inputs.items()}
    np.testing.assert_allclose(evaluate(text, **inputs), expected, rtol=1e-12, atol=1e-14)
    for name, value in inputs.items():
        np.testing.assert_array_equal(before[name], value)


def test_a_block_runs_whole_at_each_step() -> None:
    text = """
        for ordered t:
            for i: C[t,i] = 0.5 * C[pad(t-1),i] + A[t,i]
            for i: H[t,i] = tanh(C[t,i]) + H[pad(t-1),i]
    """
    c = h = np.zeros(4)
    expected = []
    for row in A:
        c = 0.5 * c + row
        h = np.tanh(c) + h
        expected.append(h)
    np.testing.assert_allclose(run(parse(text), {"A": A})["H"], expected)


def test_attention() -> None:
    text = """
        S[h,i,j] += Q[h,i,d] * K[h,j,d]
        P[h,i,j] = softmax[j](where(j <= i, scale * S[h,i,j], -inf))
        O[h,i,e] += P[h,i,j] * V[h,j,e]
    """
    q, k, v = (rng.normal(size=(2, 4, n)) for n in (3, 3, 5))
    scores = np.where(np.tri(4, dtype=bool), 0.7 * q @ k.transpose(0, 2, 1), -np.inf)
    np.testing.assert_allclose(evaluate(text, Q=q, K=k, V=v, scale=0.7), softmax(scores) @ v)


@pytest.mark.parametrize(
    ("text", "inputs", "error", "words"),
    [
        ("Y[b,k] = A[ids[b],k]", {"A": A, "ids": np.array([0, 3])}, errors.BoundsError, ["ids[b]", "3", "0:3"]),
        ("Y[b,k] = A[ids[b],k]", {"A": A, "ids": np.array([0, -1])}, errors.BoundsError, ["-1"]),
        ("def f(p[i], X[i]) -> Y[i]: Y[p[i]] = X[i]", {"p": np.array([1, 0, 1]), "X": W}, errors.NotInjective, ["twice", "[1]"]),
        ("for b, j in 0:n[b]: Y[b] += X[j]", {"X": X, "n": np.array([3, 11])}, errors.BoundsError, ["10"]),
        ("for b: Y[b] = max[j in 0:n[b]](X[j])", {"X": X, "n": np.array([3, 0])}, errors.RangeError, ["empty"]),
        ("Y = mean[i](X[i])", {"X": X[:0]}, errors.RangeError, ["mean", "i"]),
    ],
)
def test_what_only_the_values_show(text: str, inputs: dict[str, Any], error: type[errors.Error], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        evaluate(text, **inputs)
    for word in words:
        assert word in str(caught.value)


def test_source_is_the_loops() -> None:
    expected = """\
def Y(A, x):
    Y = np.zeros((4,), dtype=np.float64)
    # for i, k:  Y[i] += A[i,k] * x[k]
    for i in range(4):
        for k in range(3):
            Y[i] += A[i, k] * x[k]
    return (Y,)
"""
    assert expected == source(parse("Y[i] += A[i,k] * x[k]"), {"A": Spec((4, 3), "float32"), "x": Spec((3,), "float32")})


def test_a_traceback_shows_the_loops() -> None:
    with pytest.raises(errors.BoundsError) as caught:
        evaluate("Y[b] = X[ids[b]]", X=X, ids=np.array([99]))
    assert any("check.at(ids[b], 10" in str(entry.statement) for entry in caught.traceback)


def test_dotted_names_and_python_words() -> None:
    result = run(parse("def f(Y.grad[i], lambda[i]) -> X.grad: X.grad[i] = Y.grad[i] * lambda[i]"), {"Y.grad": W, "lambda": W})
    np.testing.assert_allclose(result["X.grad"], W * W)
