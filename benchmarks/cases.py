"""The programs that are timed: each in the notation, and in torch as a person who knows torch well would write it.

Before anything is timed both are compared with the torch version in float64 (see `benchmarks.table.verify`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Make = Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class Case:
    """One program.

    text: the notation. inputs: name -> (shape by size names, scale); an integer name as scale means indices below that size.
    eager: torch, by hand. flops: of the forward, from the sizes. sizes: device -> size name -> extent. dtypes: device -> names.
    backward: FLOPs of forward and backward together, as a multiple of the forward's.
    """

    name: str
    group: str
    text: str
    inputs: Mapping[str, tuple[str, float | str]]
    eager: Callable[..., Tensor]
    flops: Callable[[Mapping[str, int]], float]
    sizes: Mapping[str, Mapping[str, int]]
    dtypes: Mapping[str, tuple[str, ...]]
    backward: float = 3.0

    def make(self, device: str, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, ...]:
        """One set of inputs; float tensors require a gradient."""
        generator = torch.Generator(device).manual_seed(seed)
        sizes = self.sizes[device]
        made = []
        for dims, scale in self.inputs.values():
            shape = [sizes[d] for d in dims.split()]
            if isinstance(scale, str):
                made.append(torch.randint(sizes[scale], shape, device=device, generator=generator))
            else:
                value = torch.randn(shape, device=device, generator=generator, dtype=torch.float32) * scale
                made.append(value.to(dtype).requires_grad_())
        return tuple(made)

    def shape(self, device: str) -> str:
        """The sizes, as a table shows them."""
        return " ".join(f"{name}={extent}" for name, extent in self.sizes[device].items())


HALF = {"cpu": ("float32",), "cuda": ("bfloat16",)}
BOTH = {"cpu": ("float32",), "cuda": ("bfloat16", "float32")}
SINGLE = {"cpu": ("float32",), "cuda": ("float32",)}


def _sizes(cpu: str, cuda: str) -> dict[str, dict[str, int]]:
    """`"i=4 j=5"` per device."""
    return {device: {n: int(e) for n, e in (part.split("=") for part in text.split())} for device, text in (("cpu", cpu), ("cuda", cuda))}


def _product(names: str, factor: float = 2.0) -> Callable[[Mapping[str, int]], float]:
    """`factor` operations for every point of the loops over `names`."""
    return lambda sizes: factor * math.prod(sizes[n] for n in names.split())


# ---------------------------------------------------------------------------------------------------------------------
# torch by hand, where one expression does not say it


def _chain(x: Tensor, y: Tensor, b: Tensor) -> Tensor:
    return torch.tanh(x * y + b) * torch.sigmoid(x) + y


def _kernel_sum(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    square = (x * x).sum(-1)[:, None] + (y * y).sum(-1) - 2 * (x @ y.T)
    return torch.exp(-square.clamp_min(0)) @ w


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q[None], k[None], v[None])[0]


def _attention_unfused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5), -1) @ v


# ---------------------------------------------------------------------------------------------------------------------

CONTRACTIONS = (
    Case(
        "matmul",
        "contractions",
        "Y[i,j] += A[i,k] * B[k,j]",
        {"A": ("i k", 1), "B": ("k j", 1)},
        lambda a, b: a @ b,
        _product("i j k"),
        _sizes("i=768 j=768 k=768", "i=8192 j=8192 k=8192"),
        HALF,
    ),
    Case(
        "matmul, both transposed",
        "contractions",
        "Y[i,j] += A[k,i] * B[j,k]",
        {"A": ("k i", 1), "B": ("j k", 1)},
        lambda a, b: a.T @ b.T,
        _product("i j k"),
        _sizes("i=768 j=768 k=768", "i=4096 j=4096 k=4096"),
        HALF,
    ),
    Case(
        "scores",
        "contractions",
        "for h, i, j, k:  Y[h,i,j] += A[h,i,k] * B[h,j,k]",
        {"A": ("h i k", 1), "B": ("h j k", 1)},
        lambda a, b: a @ b.transpose(-1, -2),
        _product("h i j k"),
        _sizes("h=8 i=384 j=384 k=64", "h=64 i=2048 j=2048 k=128"),
        HALF,
    ),
    Case(
        "odd sizes",
        "contractions",
        "Y[i,j] += A[i,k] * B[k,j]",
        {"A": ("i k", 1), "B": ("k j", 1)},
        lambda a, b: a @ b,
        _product("i j k"),
        _sizes("i=511 j=769 k=641", "i=4095 j=4097 k=4001"),
        HALF,
    ),
    Case(
        "two of four",
        "contractions",
        "Y[a,b,c,d] += A[a,e,b,f] * B[f,c,e,d]",
        {"A": ("a e b f", 1), "B": ("f c e d", 1)},
        lambda a, b: torch.einsum("aebf,fced->abcd", a, b),
        _product("a b c d e f"),
        _sizes("a=24 b=24 c=24 d=24 e=24 f=24", "a=64 b=64 c=64 d=64 e=64 f=64"),
        HALF,
    ),
    Case(
        "long sum",
        "contractions",
        "Y[i,j] += A[k,i] * B[k,j]",
        {"A": ("k i", 1), "B": ("k j", 1)},
        lambda a, b: a.T @ b,
        _product("i j k"),
        _sizes("i=64 j=64 k=65536", "i=128 j=128 k=1048576"),
        HALF,
    ),
    Case(
        "matrix times vector",
        "contractions",
        "y[i] += W[i,j] * x[j]",
        {"W": ("i j", 1), "x": ("j", 1)},
        lambda w, x: w @ x,
        _product("i j"),
        _sizes("i=2048 j=2048", "i=16384 j=16384"),
        HALF,
    ),
    Case(
        "convolution",
        "contractions",
        "Y[n,o,x,y] += X[n,c,x+r,y+s] * W[o,c,r,s]",
        {"X": ("n c h w", 1), "W": ("o c r r", 0.1)},
        lambda x, w: F.conv2d(x, w),
        lambda s: 2.0 * s["n"] * s["o"] * s["c"] * s["r"] ** 2 * (s["h"] - s["r"] + 1) * (s["w"] - s["r"] + 1),
        _sizes("n=8 o=64 h=58 w=58 r=3 c=64", "n=64 o=256 h=58 w=58 r=3 c=256"),
        HALF,
    ),
    Case(
        "three operands",
        "contractions",
        "Y[i,l] += A[i,j] * B[j,k] * C[k,l]",
        {"A": ("i j", 1), "B": ("j k", 1), "C": ("k l", 1)},
        lambda a, b, c: a @ (b @ c),
        lambda s: 2.0 * s["l"] * (s["j"] * s["k"] + s["i"] * s["j"]),
        _sizes("i=1024 j=1024 k=1024 l=64", "i=8192 j=8192 k=8192 l=512"),
        HALF,
    ),
)

LAYERS = (
    Case(
        "linear + bias + gelu",
        "layers",
        "Z[n,o] += X[n,i] * W[o,i]\nY[n,o] = gelu(Z[n,o] + b[o])",
        {"X": ("n i", 1), "W": ("o i", 0.05), "b": ("o", 1)},
        lambda x, w, b: F.gelu(F.linear(x, w, b)),
        _product("n o i"),
        _sizes("n=1024 i=512 o=1024", "n=8192 i=4096 o=4096"),
        HALF,
    ),
    Case(
        "layer norm",
        "layers",
        "M[n] = mean[c](X[n,c])\nV[n] = var[c](X[n,c])\nY[n,c] = (X[n,c] - M[n]) * rsqrt(V[n] + 1e-5) * g[c] + b[c]",
        {"X": ("n c", 1), "g": ("c", 1), "b": ("c", 1)},
        lambda x, g, b: F.layer_norm(x, g.shape, g, b),
        _product("n c", 8),
        _sizes("n=4096 c=1024", "n=8192 c=4096"),
        BOTH,
    ),
    Case(
        "rms norm",
        "layers",
        "Y[n,c] = X[n,c] * rsqrt(mean[k](X[n,k] * X[n,k]) + 1e-5) * g[c]",
        {"X": ("n c", 1), "g": ("c", 1)},
        lambda x, g: F.rms_norm(x, g.shape, g, 1e-5),
        _product("n c", 5),
        _sizes("n=4096 c=1024", "n=8192 c=4096"),
        BOTH,
    ),
    Case(
        "softmax",
        "layers",
        "Y[n,c] = softmax[c](X[n,c])",
        {"X": ("n c", 1)},
        lambda x: torch.softmax(x, -1),
        _product("n c", 5),
        _sizes("n=4096 c=1024", "n=8192 c=4096"),
        BOTH,
    ),
    Case(
        "cross entropy",
        "layers",
        "def cross_entropy(Z[n,c], y[n]) -> L:\n    L = mean[n](logsumexp[c](Z[n,c]) - sum[c](where(c == y[n], Z[n,c], 0)))",
        {"Z": ("n c", 1), "y": ("n", "c")},
        lambda z, y: F.cross_entropy(z, y),
        _product("n c", 5),
        _sizes("n=1024 c=8192", "n=8192 c=32768"),
        SINGLE,
    ),
)

POINTWISE = (
    Case(
        "pointwise chain",
        "pointwise",
        "Z[i,j] = tanh(X[i,j] * Y[i,j] + b[j]) * sigmoid(X[i,j]) + Y[i,j]",
        {"X": ("i j", 1), "Y": ("i j", 1), "b": ("j", 1)},
        _chain,
        _product("i j", 30),
        _sizes("i=2048 j=1024", "i=16384 j=8192"),
        BOTH,
    ),
    Case(
        "add a transpose",
        "pointwise",
        "Z[i,j] = X[i,j] + Y[j,i]",
        {"X": ("i j", 1), "Y": ("j i", 1)},
        lambda x, y: x + y.T,
        _product("i j", 1),
        _sizes("i=2048 j=2048", "i=16384 j=8192"),
        SINGLE,
    ),
    Case(
        "sum of a column",
        "pointwise",
        "y[j] += X[i,j] * X[i,j]",
        {"X": ("i j", 1)},
        lambda x: (x * x).sum(0),
        _product("i j", 2),
        _sizes("i=4096 j=1024", "i=65536 j=4096"),
        SINGLE,
    ),
)

FUSED = (
    Case(
        "kernel sum",
        "fusion",
        "S[i,j] += (x[i,d] - y[j,d]) ** 2\nO[i,e] += exp(-S[i,j]) * w[j,e]",
        {"x": ("i d", 1), "y": ("j d", 1), "w": ("j e", 1)},
        _kernel_sum,
        lambda s: s["i"] * s["j"] * (3.0 * s["d"] + 8 + 2 * s["e"]),
        _sizes("i=2048 j=2048 d=3 e=4", "i=16384 j=16384 d=3 e=4"),
        SINGLE,
    ),
    Case(
        "attention",
        "fusion",
        "S[h,i,j] += Q[h,i,d] * K[h,j,d]\nP[h,i,j] = softmax[j](0.125 * S[h,i,j])\nO[h,i,e] += P[h,i,j] * V[h,j,e]",
        {"Q": ("h i d", 1), "K": ("h j d", 1), "V": ("h j e", 1)},
        _attention,
        _product("h i j d", 4),
        _sizes("h=8 i=512 j=512 d=64 e=64", "h=32 i=4096 j=4096 d=64 e=64"),
        HALF,
        backward=3.5,
    ),
    Case(
        "attention, torch unfused",
        "fusion",
        "S[h,i,j] += Q[h,i,d] * K[h,j,d]\nP[h,i,j] = softmax[j](0.125 * S[h,i,j])\nO[h,i,e] += P[h,i,j] * V[h,j,e]",
        {"Q": ("h i d", 1), "K": ("h j d", 1), "V": ("h j e", 1)},
        _attention_unfused,
        _product("h i j d", 4),
        _sizes("h=8 i=512 j=512 d=64 e=64", "h=32 i=2048 j=2048 d=64 e=64"),
        HALF,
    ),
    Case(
        "attention, longer, torch unfused",
        "fusion",
        "S[h,i,j] += Q[h,i,d] * K[h,j,d]\nP[h,i,j] = softmax[j](0.125 * S[h,i,j])\nO[h,i,e] += P[h,i,j] * V[h,j,e]",
        {"Q": ("h i d", 1), "K": ("h j d", 1), "V": ("h j e", 1)},
        _attention_unfused,
        _product("h i j d", 4),
        _sizes("h=8 i=2048 j=2048 d=64 e=64", "h=32 i=4096 j=4096 d=64 e=64"),
        HALF,
    ),
)

CASES = (*CONTRACTIONS, *LAYERS, *POINTWISE, *FUSED)
GROUPS = tuple(dict.fromkeys(case.group for case in CASES))
