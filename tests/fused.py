"""Programs whose intermediates must never reach memory, beside what torch composes for the same: NAME -> Fused."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

_PRIMES = (131, 97, 67, 37, 31, 3, 2)


@dataclass(frozen=True)
class Fused:
    """text: the program. args: name -> the letters of a random tensor's sizes, a number, or (letter, letters) of integers below the
    first. sizes: of each letter.

    torch: the same in torch, of the same arguments. forward, backward: how many kernels there are. hidden: tensors that are
    in memory in neither. large: sizes for the plan of a real problem. cancels: arguments whose gradient is a small difference
    of large sums.
    """

    text: str
    args: dict[str, Any]
    sizes: dict[str, int]
    torch: Callable[..., torch.Tensor]
    forward: int
    backward: int
    hidden: tuple[str, ...] = ()
    large: dict[str, int] | None = None
    cancels: tuple[str, ...] = ()

    def given(self) -> dict[str, int]:
        """The sizes."""
        return self.sizes

    def primes(self) -> dict[str, int]:
        """A prime number near each size, so that nothing ends with a tile; a hundred and a few at the most."""
        return {letter: 17 if n == 16 else next(p for p in _PRIMES if p <= n) for letter, n in self.sizes.items()}

    def make(self, seed: int = 0, sizes: Mapping[str, int] | None = None) -> list[Any]:
        """Arguments in float32, at other sizes where given."""
        size = {**self.sizes, **(sizes or {})}
        generator = torch.Generator().manual_seed(seed)
        made: list[Any] = []
        for spec in self.args.values():
            if isinstance(spec, tuple):
                made.append(torch.randint(0, size[spec[0]], [size[i] for i in spec[1]], generator=generator))
            elif isinstance(spec, str):
                made.append(torch.randn([size[i] for i in spec], generator=generator))
            else:
                made.append(spec)
        return made

    def specs(self, dtype: str, sizes: Mapping[str, int] | None = None) -> list[Any]:
        """The same as descriptions, for the stages that need no tensors."""
        size = {**self.sizes, **(sizes or {})}

        def described(dtype: str, letters: str) -> str:
            return f"{dtype}[{','.join(str(size[i]) for i in letters)}]"

        given = self.args.values()
        return [described("i64", a[1]) if isinstance(a, tuple) else described(dtype, a) if isinstance(a, str) else a for a in given]


_QKV = {"Q": "hid", "K": "hjd", "V": "hje", "scale": 0.3}
_SIZES = {"h": 2, "i": 150, "j": 150, "d": 16, "e": 16}
_LARGE = {"h": 16, "i": 4096, "j": 4096, "d": 64, "e": 64}


def attention_text(score: str, more: str = "", value: str = "V[h,j,e]") -> str:
    return f"""
        def attention(Q[h,i,d], K[h,j,d], V[h,j,e], scale{more}) -> O[h,i,e]:
            S[h,i,j] += Q[h,i,d] * K[h,j,d]
            P[h,i,j] = softmax[j]({score})
            O[h,i,e] += P[h,i,j] * {value}
        """


def _attention(score: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def composed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: Any, *more: torch.Tensor) -> torch.Tensor:
        return torch.softmax(score(scale * (q @ k.mT), *more), -1) @ v

    return composed


def _apart(s: torch.Tensor) -> torch.Tensor:
    """i - j of each score."""
    return torch.arange(s.shape[-2])[:, None] - torch.arange(s.shape[-1])


def _quotient(base: float) -> Callable[..., torch.Tensor]:
    def composed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        weights = torch.exp(math.log(base) * scale * (q @ k.mT))
        return weights @ v / weights.sum(-1, keepdim=True)

    return composed


def by_hand(power: str, maximum: str) -> str:
    return f"""
        def by_hand(Q[h,i,d], K[h,j,d], V[h,j,e], scale) -> O[h,i,e]:
            S[h,i,j] += Q[h,i,d] * K[h,j,d]
            M[h,i] max= scale * S[h,i,j]
            E[h,i,j] = {power}(scale * S[h,i,j] - {maximum})
            L[h,i] += E[h,i,j]
            A[h,i,e] += E[h,i,j] * V[h,j,e]
            O[h,i,e] = A[h,i,e] / L[h,i]
        """


def _distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return ((x[:, None] - y[None]) ** 2).sum(-1)


def _kernel_sum(kernel: str) -> str:
    return f"def kernel_sum(x[i,d], y[j,d], b[j,e]) -> O[i,e]: D[i,j] += (x[i,d] - y[j,d]) ** 2; O[i,e] += ({kernel}) * b[j,e]"


_POINTS = {"x": "id", "y": "jd", "b": "je"}
_CLOUD = {"i": 130, "j": 140, "d": 3, "e": 2}
_SP = ("S", "P")

FUSED: dict[str, Fused] = {
    # -- attention
    "attention": Fused(attention_text("scale * S[h,i,j]"), _QKV, {**_SIZES, "i": 137}, _attention(lambda s: s), 1, 2, _SP, _LARGE),
    "causal": Fused(attention_text("where(i >= j, scale * S[h,i,j], -inf)"), _QKV, _SIZES, _attention(lambda s: torch.where(_apart(s) >= 0, s, -math.inf)), 1, 2, _SP, _LARGE),
    "window": Fused(
        attention_text("where((i >= j) and (i - j < 40), scale * S[h,i,j], -inf)"),
        _QKV,
        _SIZES,
        _attention(lambda s: torch.where((_apart(s) >= 0) & (_apart(s) < 40), s, -math.inf)),
        1, 2, _SP, _LARGE,
    ),
    "soft_cap": Fused(attention_text("20 * tanh(scale * S[h,i,j] / 20)"), _QKV, _SIZES, _attention(lambda s: 20 * torch.tanh(s / 20)), 1, 2, _SP, _LARGE),
    "bias": Fused(attention_text("scale * S[h,i,j] + B[i,j]", ", B[i,j]"), {**_QKV, "B": "ij"}, _SIZES, _attention(lambda s, b: s + b), 1, 3, _SP),
    "alibi": Fused(
        attention_text("scale * S[h,i,j] - (i - j) * slope[h]", ", slope[h]"),
        {**_QKV, "slope": "h"},
        _SIZES,
        _attention(lambda s, slope: s - _apart(s) * slope[:, None, None]),
        1, 3, _SP, cancels=("slope",),
    ),
    "values_of_two": Fused(
        attention_text("scale * S[h,i,j]", ", G[h,j,e]", "(V[h,j,e] * sigmoid(G[h,j,e]))"),
        {**_QKV, "G": "hje"},
        _SIZES,
        lambda q, k, v, scale, g: torch.softmax(scale * (q @ k.mT), -1) @ (v * torch.sigmoid(g)),
        1, 2, _SP,
    ),
    "grouped_query": Fused(
        """
        def grouped(Q[g,m,i,d], K[g,j,d], V[g,j,e], scale) -> O[g,m,i,e]:
            S[g,m,i,j] += Q[g,m,i,d] * K[g,j,d]
            P[g,m,i,j] = softmax[j](scale * S[g,m,i,j])
            O[g,m,i,e] += P[g,m,i,j] * V[g,j,e]
        """,
        {"Q": "gmid", "K": "gjd", "V": "gje", "scale": 0.3},
        {"g": 2, "m": 3, "i": 70, "j": 140, "d": 16, "e": 16},
        lambda q, k, v, scale: torch.softmax(scale * (q @ k[:, None].mT), -1) @ v[:, None],
        1, 2, _SP,
    ),
    "by_hand": Fused(by_hand("exp", "stop_gradient(M[h,i])"), _QKV, _SIZES, _quotient(math.e), 1, 2, ("S", "E")),
    "by_hand_base_2": Fused(by_hand("exp2", "stop_gradient(M[h,i])"), _QKV, _SIZES, _quotient(2), 1, 2, ("S", "E")),
    # With a gradient through the maximum the scores are compared with it, so they are made once, in memory, and never again.
    "by_hand_through_the_maximum": Fused(by_hand("exp", "M[h,i]"), _QKV, _SIZES, _quotient(math.e), 1, 3, ("E",)),
    "softmax_over_both_axes": Fused(
        """
        S[i,j] += A[i,k] * B[j,k]; P[i,j] = softmax[j](S[i,j]); Q[i,j] = softmax[i](S[i,j])
        Y[i,e] += P[i,j] * V[j,e]; Z[j,e] += Q[i,j] * U[i,e]; O[e] += Y[i,e] * Z[i,e]
        """,
        {"A": "ik", "B": "ik", "V": "ie", "U": "ie"},
        {"i": 150, "k": 16, "e": 16},
        lambda a, b, v, u: ((torch.softmax(a @ b.T, 1) @ v) * (torch.softmax(a @ b.T, 0).T @ u)).sum(0),
        3, 3, ("S", "P", "Q"),
    ),
    "weighted_logsumexp": Fused(
        """
        S[i,j] += A[i,k] * B[j,k]; T[i,j] += C[i,k] * B[j,k]; M[i] max= S[i,j]
        L[i] += exp(S[i,j] - stop_gradient(M[i])) * T[i,j] * T[i,j]; Y[i] = log(L[i]) + stop_gradient(M[i])
        """,
        {"A": "ik", "B": "jk", "C": "ik"},
        {"i": 150, "j": 150, "k": 16},
        lambda a, b, c: torch.log((torch.exp(a @ b.T) * (c @ b.T) ** 2).sum(1)),
        1, 3, ("S", "T"),
    ),
    # -- cross entropy of a linear layer
    "linear_cross_entropy": Fused(
        "def loss(X[n,d], W[v,d], t[n]) -> L[n]: G[n,v] += X[n,d] * W[v,d]; L[n] = logsumexp[v](G[n,v]) - G[n,t[n]]",
        {"X": "nd", "W": "vd", "t": ("v", "n")},
        {"n": 70, "v": 500, "d": 32},
        lambda x, w, t: F.cross_entropy(x @ w.T, t, reduction="none"),
        1, 2, ("G", "G.grad"), {"n": 4096, "v": 32000, "d": 1024},
    ),
    # -- kernel sums
    "gaussian_sum": Fused(_kernel_sum("exp(-D[i,j])"), _POINTS, _CLOUD, lambda x, y, b: torch.exp(-_distance(x, y)) @ b, 1, 2, ("D",)),
    "cauchy_sum": Fused(_kernel_sum("1 / (1 + D[i,j])"), _POINTS, _CLOUD, lambda x, y, b: (1 / (1 + _distance(x, y))) @ b, 1, 2, ("D",)),
    "student_sum": Fused(_kernel_sum("rsqrt((1 + D[i,j]) ** 3)"), _POINTS, _CLOUD, lambda x, y, b: torch.rsqrt((1 + _distance(x, y)) ** 3) @ b, 1, 2, ("D",)),
    "compact_sum": Fused(_kernel_sum("relu(1 - D[i,j] / 4) ** 2"), _POINTS, _CLOUD, lambda x, y, b: (torch.relu(1 - _distance(x, y) / 4) ** 2) @ b, 1, 2, ("D",)),
    # -- rows
    "softmax": Fused("Y[i,j] = softmax[j](X[i,j])", {"X": "ij"}, {"i": 100, "j": 300}, lambda x: torch.softmax(x, -1), 1, 1, ("Y.exp",)),
    "log_softmax": Fused("Y[i,j] = X[i,j] - logsumexp[j](X[i,j])", {"X": "ij"}, {"i": 100, "j": 300}, lambda x: torch.log_softmax(x, -1), 1, 1),
    "layer_norm": Fused(
        "def norm(X[n,d], g[d], b[d]) -> Y[n,d]: Y[n,d] = (X[n,d] - mean[e](X[n,e])) * rsqrt(var[e](X[n,e]) + 1e-05) * g[d] + b[d]",
        {"X": "nd", "g": "d", "b": "d"},
        {"n": 100, "d": 300},
        lambda x, g, b: F.layer_norm(x, (x.shape[-1],), g, b),
        1, 2,
    ),
    "rms_norm": Fused(
        "def norm(X[n,d], g[d]) -> Y[n,d]: Y[n,d] = X[n,d] * rsqrt(mean[e](X[n,e] * X[n,e]) + 1e-05) * g[d]",
        {"X": "nd", "g": "d"},
        {"n": 100, "d": 300},
        lambda x, g: F.rms_norm(x, (x.shape[-1],), g, 1e-5),
        1, 2,
    ),
    # -- contractions with what stands around them
    "linear": Fused(
        "def linear(X[n,k], W[m,k], b[m], R[n,m]) -> Y[n,m]: Z[n,m] += X[n,k] * W[m,k]; Y[n,m] = gelu(Z[n,m] + b[m]) + R[n,m]",
        {"X": "nk", "W": "mk", "b": "m", "R": "nm"},
        {"n": 100, "m": 70, "k": 40},
        lambda x, w, b, r: F.gelu(x @ w.T + b) + r,
        1, 2,
    ),
    "gated": Fused(
        "def gated(X[n,k], W[m,k], V[m,k]) -> Y[n,m]: A[n,m] += X[n,k] * W[m,k]; B[n,m] += X[n,k] * V[m,k]; Y[n,m] = silu(A[n,m]) * B[n,m]",
        {"X": "nk", "W": "mk", "V": "mk"},
        {"n": 100, "m": 70, "k": 40},
        lambda x, w, v: F.silu(x @ w.T) * (x @ v.T),
        1, 3,
    ),
}
