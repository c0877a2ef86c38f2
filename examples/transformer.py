"""A small language model whose layers are written in index notation, trained on the sources of Python's own library.

    python examples/transformer.py          train for half a minute, on the GPU if there is one
    python examples/transformer.py --quick  the same in a few steps, for tests

Every layer is a tdsl function of a few statements: RMSNorm, the projections to and from the heads, causal attention whose scores
fall off with distance (ALiBi), a gated MLP, and the cross-entropy of the last linear layer. The same parameters run through plain
torch beside them: at the start the loss and every gradient must agree. transformer.md shows each layer's gradient, plan and kernel.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import math
import sys
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

import tdsl

# ---------------------------------------------------------------------------------------------------------------------
# The layers. n: rows, b: texts, t, i, j: places in a text, c: channels, h: heads, d, e: a head's channels, m: the MLP's, v: the vocabulary

embed = tdsl.function("""
def embed(token[b,t], E[v,c]) -> Y[b,t,c]:
    Y[b,t,c] = E[token[b,t],c]
""")

rms_norm = tdsl.function("""
def rms_norm(X[b,t,c], g[c]) -> Y[b,t,c]:
    r[b,t]   = rsqrt(mean[c](X[b,t,c] * X[b,t,c]) + 1e-6)
    Y[b,t,c] = X[b,t,c] * r[b,t] * g[c]
""")

to_heads = tdsl.function("""
def to_heads(X[b,t,c], W[h,d,c]) -> Y[b,h,t,d]:
    Y[b,h,t,d] += X[b,t,c] * W[h,d,c]
""")

attention = tdsl.function("""
def attention(Q[b,h,i,d], K[b,h,j,d], V[b,h,j,e], slope[h], scale) -> O[b,h,i,e]:
    S[b,h,i,j] += Q[b,h,i,d] * K[b,h,j,d]
    P[b,h,i,j]  = softmax[j](where(j <= i, scale * S[b,h,i,j] - slope[h] * (i - j), -inf))
    O[b,h,i,e] += P[b,h,i,j] * V[b,h,j,e]
""")

from_heads = tdsl.function("""
def from_heads(O[b,h,t,d], W[c,h,d], R[b,t,c]) -> Y[b,t,c]:
    Z[b,t,c] += O[b,h,t,d] * W[c,h,d]
    Y[b,t,c]  = Z[b,t,c] + R[b,t,c]
""")

gated = tdsl.function("""
def gated(X[b,t,c], W[m,c], U[m,c]) -> Y[b,t,m]:
    A[b,t,m] += X[b,t,c] * W[m,c]
    B[b,t,m] += X[b,t,c] * U[m,c]
    Y[b,t,m]  = silu(A[b,t,m]) * B[b,t,m]
""")

linear = tdsl.function("""
def linear(X[b,t,m], W[c,m], R[b,t,c]) -> Y[b,t,c]:
    Z[b,t,c] += X[b,t,m] * W[c,m]
    Y[b,t,c]  = Z[b,t,c] + R[b,t,c]
""")

cross_entropy = tdsl.function("""
def cross_entropy(X[b,t,c], W[v,c], label[b,t]) -> loss:
    Z[b,t,v] += X[b,t,c] * W[v,c]
    loss = mean[b,t](logsumexp[v](Z[b,t,v]) - Z[b,t,label[b,t]])
""")

# ---------------------------------------------------------------------------------------------------------------------
# The model


def weight(*shape: int) -> nn.Parameter:
    """A matrix of that shape, of normal numbers whose products with as many ones have variance 1."""
    return nn.Parameter(torch.randn(shape) / math.sqrt(shape[-1]))


class Block(nn.Module):
    """Attention and a gated MLP, each behind a norm and added to what came in: [b, t, width] -> [b, t, width]."""

    slope: Tensor

    def __init__(self, width: int, heads: int):
        super().__init__()
        each, hidden = width // heads, 3 * width
        self.scale = 1 / math.sqrt(each)
        self.before_attention, self.before_mlp = (nn.Parameter(torch.ones(width)) for _ in range(2))
        self.query, self.key, self.value = (weight(heads, each, width) for _ in range(3))
        self.output = nn.Parameter(weight(width, width).detach().view(width, heads, each))
        self.gate, self.up, self.down = weight(hidden, width), weight(hidden, width), weight(width, hidden)
        self.register_buffer("slope", 2.0 ** -(torch.arange(heads) + 1.0))

    def forward(self, x: Tensor) -> Tensor:
        y = rms_norm(x, self.before_attention)
        q, k, v = (to_heads(y, w) for w in (self.query, self.key, self.value))
        x = from_heads(attention(q, k, v, self.slope, self.scale), self.output, x)
        y = rms_norm(x, self.before_mlp)
        result: Tensor = linear(gated(y, self.gate, self.up), self.down, x)
        return result

    def plain(self, x: Tensor) -> Tensor:
        """The same by torch's own functions."""
        y = F.rms_norm(x, x.shape[-1:], self.before_attention, 1e-6)
        q, k, v = ((y @ w.flatten(0, 1).T).unflatten(-1, w.shape[:2]).transpose(1, 2) for w in (self.query, self.key, self.value))
        i = torch.arange(x.shape[1], device=x.device)
        distance = i[:, None] - i
        bias = torch.where(distance >= 0, -self.slope[:, None, None] * distance, -math.inf).to(x.dtype)
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.scale)
        x = x + o.transpose(1, 2).flatten(-2) @ self.output.flatten(1).T
        y = F.rms_norm(x, x.shape[-1:], self.before_mlp, 1e-6)
        return x + (F.silu(y @ self.gate.T) * (y @ self.up.T)) @ self.down.T


class Transformer(nn.Module):
    """Tokens [b, t] and the tokens that follow them [b, t] -> the mean cross-entropy, in nats per token."""

    def __init__(self, vocabulary: int = 256, width: int = 128, heads: int = 4, depth: int = 2):
        super().__init__()
        self.table = nn.Parameter(torch.randn(vocabulary, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.Parameter(torch.ones(width))
        self.head = nn.Parameter(weight(vocabulary, width).detach() / 10)  # near the uniform guess, log(vocabulary)

    def forward(self, tokens: Tensor, following: Tensor) -> Tensor:
        x = embed(tokens, self.table)
        for block in self.blocks:
            x = block(x)
        loss: Tensor = cross_entropy(rms_norm(x, self.norm), self.head, following)
        return loss

    def plain(self, tokens: Tensor, following: Tensor) -> Tensor:
        """The same by torch's own functions."""
        x = F.embedding(tokens, self.table)
        for block in self.blocks:
            assert isinstance(block, Block)
            x = block.plain(x)
        logits = F.rms_norm(x, x.shape[-1:], self.norm, 1e-6) @ self.head.T
        return F.cross_entropy(logits.flatten(0, 1), following.flatten())


Loss = Callable[[Tensor, Tensor], Tensor]

# ---------------------------------------------------------------------------------------------------------------------
# Real text: what every Python has on its disk

MODULES = "argparse ast calendar cmd codecs configparser csv difflib doctest fractions ftplib functools gettext heapq inspect optparse"
MODULES += " pdb pickle pprint random shutil smtplib statistics string subprocess tarfile tempfile textwrap threading trace typing zipfile"


def library(modules: str = MODULES) -> bytes:
    """The sources of some of the standard library's modules, one after the other."""
    texts = []
    for name in modules.split():
        try:
            texts.append(inspect.getsource(importlib.import_module(name)))
        except (ImportError, OSError, TypeError):  # not in this version, or without its source
            continue
    return "\n".join(texts).encode()


def batches(text: Tensor, batch: int, length: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Pieces of `length` bytes from random places, and the same one byte on: two int64[batch, length], without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text) - length - 1, (batch, 1), generator=generator)
        pieces = text[(starts + torch.arange(length + 1)).to(text.device)].long()
        yield pieces[:, :-1], pieces[:, 1:]


# ---------------------------------------------------------------------------------------------------------------------


def check(model: Transformer, tokens: Tensor, following: Tensor, tolerance: float = 1e-4) -> int:
    """Asserts that the loss and the gradient of every parameter are those of plain torch, to a share of the largest; how many there are."""
    found = []
    for loss in (model.forward, model.plain):
        model.zero_grad()
        value = loss(tokens, following)
        value.backward()
        found.append({"loss": value.detach(), **{name: p.grad for name, p in model.named_parameters()}})
    model.zero_grad()
    actual, expected = found
    for name, wanted in expected.items():
        got = actual[name]
        assert wanted is not None and got is not None, f"{name} has no gradient"
        error = ((got - wanted).abs().max() / wanted.abs().max()).item()
        assert error <= tolerance, f"{name} is off by {error:.1e}"  # a NaN too
    return len(expected) - 1


def speed(model: Transformer, loss: Loss, tokens: Tensor, following: Tensor, repeats: int) -> float:
    """Tokens per second of forward and backward, the best of `repeats` after one that compiles."""
    best = math.inf
    for repeat in range(repeats + 1):
        model.zero_grad()
        started = time.perf_counter()
        loss(tokens, following).backward()
        if tokens.is_cuda:
            torch.cuda.synchronize()
        if repeat:
            best = min(best, time.perf_counter() - started)
    model.zero_grad()
    return tokens.numel() / best


def held_out(model: Transformer, text: Tensor, batch: int, length: int) -> float:
    """The loss on text that training does not see, in nats per byte."""
    pieces = batches(text, batch, length, seed=1)
    with torch.no_grad():
        losses = [float(model(*next(pieces))) for _ in range(4)]
    return sum(losses) / len(losses)


def train(model: Transformer, text: Tensor, steps: int, batch: int, length: int, console: Console) -> None:
    """AdamW with a warm-up and a cosine schedule."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.1)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min((n + 1) / warm, 0.05 + 0.95 * (1 + math.cos(math.pi * n / steps)) / 2)
    )
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.3f}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("training", total=steps, loss=math.nan)
        pieces = batches(text, batch, length, seed=0)
        for step in range(steps):
            loss = model(*next(pieces))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress.advance(bar)
            if step % 10 == 9:
                progress.update(bar, loss=loss.item())


def main(arguments: list[str] | None = None) -> int:
    """Runs the example; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a few steps, for tests")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    steps, batch, length, repeats, fall = (30, 4, 64, 2, 1.5) if options.quick else (300, 8, 128, 5, 3.0)

    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    torch.manual_seed(0)
    if options.device == "cpu":
        torch.set_num_threads(1)  # layers this small gain little from more, and lose much where the cores are busy
    started = time.perf_counter()
    text = torch.frombuffer(bytearray(library()), dtype=torch.uint8).to(options.device)
    cut = len(text) * 9 // 10
    model = Transformer().to(options.device)
    parameters = sum(p.numel() for p in model.parameters())
    console.print(f"{parameters:,} parameters, {len(text):,} bytes of the standard library, on {options.device}")

    piece = next(batches(text, batch, length, seed=2))
    try:
        gradients = check(model, *piece)
    except AssertionError as error:
        console.print(f"[red]differs from plain torch: {error}[/red]")
        return 1
    console.print(f"the loss and {gradients} gradients agree with plain torch")
    before = held_out(model, text[cut:], batch, length)
    train(model, text[:cut], steps, batch, length, console)
    after = held_out(model, text[cut:], batch, length)
    console.print(f"held-out loss {before:.3f} before, {after:.3f} after, in nats per byte (a uniform guess has {math.log(256):.3f})")
    rates = [speed(model, loss, *piece, repeats) for loss in (model.forward, model.plain)]
    console.print(f"forward and backward: {rates[0]:,.0f} tokens per second, plain torch {rates[1]:,.0f}")
    console.print(f"{time.perf_counter() - started:.1f} s")
    if not after < before - fall:
        console.print(f"[red]expected the loss to fall by more than {fall}[/red]")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
