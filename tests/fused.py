"""Programs whose intermediates must never reach memory, beside what torch composes for the same: NAME -> Fused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F


@dataclass(frozen=True)
class Fused:
    """text: the program. args: name -> sizes of a random tensor, a number, or (count, sizes) of integers below it.

    torch: the same in torch, of the same arguments. forward, backward: how many kernels there are. hidden: tensors that are
    in memory in neither. large: sizes by index letter for the plan of a real problem.
    """

    text: str
    args: dict[str, Any]
    torch: Callable[..., torch.Tensor]
    forward: int
    backward: int
    hidden: tuple[str, ...] = ()
    large: dict[str, Any] | None = None

    def make(self, seed: int = 0) -> list[Any]:
        """Arguments."""
        generator = torch.Generator().manual_seed(seed)
        made: list[Any] = []
        for spec in self.args.values():
            if isinstance(spec, tuple) and spec and isinstance(spec[1] if len(spec) == 2 else None, tuple):
                made.append(torch.randint(0, spec[0], spec[1], generator=generator))
            elif isinstance(spec, tuple):
                made.append(torch.randn(spec, generator=generator))
            else:
                made.append(spec)
        return made


_N = 300
_I = torch.arange(_N)
_DIFFERENCE = _I[:, None] - _I[None, :]
_QKV = {"Q": (2, _N, 16), "K": (2, _N, 16), "V": (2, _N, 16), "scale": 0.3}
_LARGE = {"Q": "bf16[16,4096,64]", "K": "bf16[16,4096,64]", "V": "bf16[16,4096,64]", "scale": 0.125}


def _attention_text(score: str, more: str = "", value: str = "V[h,j,e]") -> str:
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


def _by_hand(power: str, maximum: str) -> str:
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


_POINTS = {"x": (200, 3), "y": (210, 3), "b": (210, 2)}
_SP = ("S", "P")

FUSED: dict[str, Fused] = {
    # -- attention
    "attention": Fused(_attention_text("scale * S[h,i,j]"), {**_QKV, "Q": (2, 257, 16)}, _attention(lambda s: s), 1, 2, _SP, _LARGE),
    "causal": Fused(_attention_text("where(i >= j, scale * S[h,i,j], -inf)"), _QKV, _attention(lambda s: torch.where(_DIFFERENCE >= 0, s, -math.inf)), 1, 2, _SP, _LARGE),
    "window": Fused(
        _attention_text("where((i >= j) and (i - j < 40), scale * S[h,i,j], -inf)"),
        _QKV,
        _attention(lambda s: torch.where((_DIFFERENCE >= 0) & (_DIFFERENCE < 40), s, -math.inf)),
        1, 2, _SP, _LARGE,
    ),
    "soft_cap": Fused(_attention_text("20 * tanh(scale * S[h,i,j] / 20)"), _QKV, _attention(lambda s: 20 * torch.tanh(s / 20)), 1, 2, _SP, _LARGE),
    "bias": Fused(_attention_text("scale * S[h,i,j] + B[i,j]", ", B[i,j]"), {**_QKV, "B": (_N, _N)}, _attention(lambda s, b: s + b), 1, 3, _SP),
    "alibi": Fused(
        _attention_text("scale * S[h,i,j] - (i - j) * slope[h]", ", slope[h]"),
        {**_QKV, "slope": (2,)},
        _attention(lambda s, slope: s - _DIFFERENCE * slope[:, None, None]),
        1, 3, _SP,
    ),
    "values_of_two": Fused(
        _attention_text("scale * S[h,i,j]", ", G[h,j,e]", "(V[h,j,e] * sigmoid(G[h,j,e]))"),
        {**_QKV, "G": (2, _N, 16)},
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
        {"Q": (2, 3, 200, 16), "K": (2, 210, 16), "V": (2, 210, 16), "scale": 0.3},
        lambda q, k, v, scale: torch.softmax(scale * (q @ k[:, None].mT), -1) @ v[:, None],
        1, 2, _SP,
    ),
    "by_hand": Fused(_by_hand("exp", "stop_gradient(M[h,i])"), _QKV, _attention(lambda s: s), 1, 2, ("S", "E")),
    "by_hand_base_2": Fused(_by_hand("exp2", "stop_gradient(M[h,i])"), _QKV, _attention(lambda s: s * math.log(2)), 1, 2, ("S", "E")),
    # With a gradient through the maximum the scores are compared with it, so they are made once, in memory, and never again.
    "by_hand_through_the_maximum": Fused(_by_hand("exp", "M[h,i]"), _QKV, _attention(lambda s: s), 1, 3, ("E",)),
    "softmax_over_both_axes": Fused(
        """
        S[i,j] += A[i,k] * B[j,k]; P[i,j] = softmax[j](S[i,j]); Q[i,j] = softmax[i](S[i,j])
        Y[i,e] += P[i,j] * V[j,e]; Z[j,e] += Q[i,j] * U[i,e]; O[e] += Y[i,e] * Z[i,e]
        """,
        {"A": (200, 16), "B": (200, 16), "V": (200, 16), "U": (200, 16)},
        lambda a, b, v, u: ((torch.softmax(a @ b.T, 1) @ v) * (torch.softmax(a @ b.T, 0).T @ u)).sum(0),
        3, 3, ("S", "P", "Q"),
    ),
    "weighted_logsumexp": Fused(
        """
        S[i,j] += A[i,k] * B[j,k]; T[i,j] += C[i,k] * B[j,k]; M[i] max= S[i,j]
        L[i] += exp(S[i,j] - stop_gradient(M[i])) * T[i,j] * T[i,j]; Y[i] = log(L[i]) + stop_gradient(M[i])
        """,
        {"A": (200, 16), "B": (200, 16), "C": (200, 16)},
        lambda a, b, c: torch.log((torch.exp(a @ b.T) * (c @ b.T) ** 2).sum(1)),
        1, 3, ("S", "T"),
    ),
    # -- cross entropy of a linear layer
    "linear_cross_entropy": Fused(
        "def loss(X[n,d], W[v,d], t[n]) -> L[n]: G[n,v] += X[n,d] * W[v,d]; L[n] = logsumexp[v](G[n,v]) - G[n,t[n]]",
        {"X": (70, 32), "W": (500, 32), "t": (500, (70,))},
        lambda x, w, t: F.cross_entropy(x @ w.T, t, reduction="none"),
        1, 2, ("G", "G.grad"), {"X": "bf16[4096,1024]", "W": "bf16[32000,1024]", "t": "i64[4096]"},
    ),
    # -- kernel sums
    "gaussian_sum": Fused(_kernel_sum("exp(-D[i,j])"), _POINTS, lambda x, y, b: torch.exp(-_distance(x, y)) @ b, 1, 2, ("D",)),
    "cauchy_sum": Fused(_kernel_sum("1 / (1 + D[i,j])"), _POINTS, lambda x, y, b: (1 / (1 + _distance(x, y))) @ b, 1, 2, ("D",)),
    "student_sum": Fused(_kernel_sum("rsqrt((1 + D[i,j]) ** 3)"), _POINTS, lambda x, y, b: ((1 + _distance(x, y)) ** -1.5) @ b, 1, 2, ("D",)),
    "compact_sum": Fused(_kernel_sum("relu(1 - D[i,j] / 4) ** 2"), _POINTS, lambda x, y, b: (torch.relu(1 - _distance(x, y) / 4) ** 2) @ b, 1, 2, ("D",)),
    # -- rows
    "softmax": Fused("Y[i,j] = softmax[j](X[i,j])", {"X": (100, 300)}, lambda x: torch.softmax(x, -1), 1, 1, ("Y.exp",)),
    "log_softmax": Fused("Y[i,j] = X[i,j] - logsumexp[j](X[i,j])", {"X": (100, 300)}, lambda x: torch.log_softmax(x, -1), 1, 1),
    "layer_norm": Fused(
        "def norm(X[n,d], g[d], b[d]) -> Y[n,d]: Y[n,d] = (X[n,d] - mean[e](X[n,e])) * rsqrt(var[e](X[n,e]) + 1e-05) * g[d] + b[d]",
        {"X": (200, 300), "g": (300,), "b": (300,)},
        lambda x, g, b: F.layer_norm(x, (x.shape[-1],), g, b),
        1, 2,
    ),
    "rms_norm": Fused(
        "def norm(X[n,d], g[d]) -> Y[n,d]: Y[n,d] = X[n,d] * rsqrt(mean[e](X[n,e] * X[n,e]) + 1e-05) * g[d]",
        {"X": (200, 300), "g": (300,)},
        lambda x, g: F.rms_norm(x, (x.shape[-1],), g, 1e-5),
        1, 2,
    ),
    # -- contractions with what stands around them
    "linear": Fused(
        "def linear(X[n,k], W[m,k], b[m], R[n,m]) -> Y[n,m]: Z[n,m] += X[n,k] * W[m,k]; Y[n,m] = gelu(Z[n,m] + b[m]) + R[n,m]",
        {"X": (100, 40), "W": (70, 40), "b": (70,), "R": (100, 70)},
        lambda x, w, b, r: F.gelu(x @ w.T + b) + r,
        1, 3,
    ),
    "gated": Fused(
        "def gated(X[n,k], W[m,k], V[m,k]) -> Y[n,m]: A[n,m] += X[n,k] * W[m,k]; B[n,m] += X[n,k] * V[m,k]; Y[n,m] = silu(A[n,m]) * B[n,m]",
        {"X": (100, 40), "W": (70, 40), "V": (70, 40)},
        lambda x, w, v: F.silu(x @ w.T) * (x @ v.T),
        1, 3,
    ),
}
