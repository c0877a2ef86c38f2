"""DTensors: what is cut between devices, and what two processes make of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tdsl
from tdsl.errors import Unsupported
from tdsl.runtime import flatten
from tdsl.sharding import SUM, shards

LINEAR = "def linear(X[n,i], W[o,i], b[o]) -> Y[n,o]:  Z[n,o] += X[n,i] * W[o,i]; Y[n,o] = relu(Z[n,o] + b[o])"
PRODUCT = "def product(X[n,i], W[o,i], s) -> Y[n,o]:  Y[n,o] += s * X[n,i] * W[o,i]"
SOFTMAX = "Y[n,c] = softmax[c](X[n,c])"


@pytest.mark.parametrize(
    ("text", "given", "found"),
    [
        (LINEAR, {"X": 0}, {"X": 0, "Z": 0, "Y": 0}),
        (LINEAR, {"W": 0}, {"W": 0, "Z": 1, "b": 0, "Y": 1}),
        (LINEAR, {"b": 0}, {"W": 0, "Z": 1, "b": 0, "Y": 1}),
        (PRODUCT, {"X": 1}, {"X": 1, "W": 1, "Y": SUM}),
        ("Y[n,c] = softmax[c](X[n,c])", {"X": 0}, {"X": 0, "Y": 0}),
        ("Y[t,d] = E[ids[t],d]", {"ids": 0}, {"ids": 0, "Y": 0}),
        ("Y[t,d] = E[ids[t],d]", {"E": 1}, {"E": 1, "Y": 1}),
        ("def f(x[e,d], at[e], N) -> Y[N,d]: Y[at[e],d] += x[e,d]", {"x": 0}, {"x": 0, "at": 0, "Y": SUM}),
        ("for ordered t, b: H[b,t] = X[b,t] + H[b,pad(t-1)]", {"X": 0}, {"X": 0, "H": 0}),
    ],
)
def test_what_is_cut(text: str, given: dict[str, int], found: dict[str, int]) -> None:
    flat = flatten(tdsl.parse(text))
    known = shards(flat, given)
    assert {n: d for n, d in known.items() if n in found or n in (*flat.inputs, *flat.results)} == found


@pytest.mark.parametrize(
    ("text", "given", "message"),
    [
        (LINEAR, {"X": 1}, "reduces over i"),
        (SOFTMAX, {"X": 1}, "reduces over c"),
        ("Y[i] = X[pad(i-1)] + X[i]", {"X": 0}, "several parts|other places"),
        ("Y[i] = x[i] * i", {"x": 0}, "uses i as a number"),
        ("for i in 0:3: Y[i] = x[i]", {"x": 0}, "bounds"),
        ("Y[t,d] = E[ids[t],d]", {"E": 0}, "several parts"),
        ("d[i] = A[i,i]", {"A": 0}, "other places"),
        ("def f(x[n], y[m]) -> Y, Z: Y[n] = x[n]; Z[m] = y[m]", {"x": 0}, "same on every device"),
        ("Y[t] = E[t+1] * x[t]", {"x": 0}, "other places"),
        ("m max= x[i]", {"x": 0}, "reduces over i"),
        ("s += x[i]; Y[i] = x[i] / s", {"x": 0}, "reduces over i"),
        ("def f(x[i]) -> s, Y: s += x[i]; Y[i] = x[i] / s", {"x": 0}, "reads s, which is a sum over the devices"),
        ("Y[i] = mean[j](A[i,j])", {"A": 1}, "reduces over|whole size"),
        ("for ordered t, b: H[b,t] = X[b,t] + H[b,pad(t-1)]", {"X": 1}, "several parts|other places|meet"),
    ],
)
def test_what_is_not_cut(text: str, given: dict[str, int], message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        shards(flatten(tdsl.parse(text)), given)


def process(rank: int, folder: str) -> None:
    """One of two processes: values and gradients of calls on DTensors against those of whole tensors."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    linear, product, softmax = (tdsl.function(text) for text in (LINEAR, PRODUCT, SOFTMAX))
    x, w, b = torch.randn(5, 3), torch.randn(7, 3), torch.randn(7)

    def compare(f: object, args: list[object], placed: list[object], expected: object) -> None:
        whole = [a.clone().requires_grad_() if isinstance(a, Tensor) else a for a in args]
        cut = [
            distribute_tensor(a.detach(), mesh, [p]).requires_grad_() if isinstance(a, Tensor) else a
            for a, p in zip(whole, placed, strict=True)
        ]
        wanted, found = f(*whole), f(*cut)  # type: ignore[operator]
        assert found.placements == (expected,)
        torch.testing.assert_close(found.full_tensor(), wanted)
        g = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
        (wanted * g).sum().backward()
        (found * distribute_tensor(g, mesh, [Replicate()])).sum().backward()
        for a, c in zip(whole, cut, strict=True):
            if isinstance(a, Tensor):
                torch.testing.assert_close(c.grad.full_tensor(), a.grad)

    whole = Replicate()
    compare(linear, [x, w, b], [Shard(0), whole, whole], Shard(0))
    compare(linear, [x, w, b], [whole, Shard(0), Shard(0)], Shard(1))
    compare(linear, [x, w, b], [whole, Shard(0), whole], Shard(1))
    compare(linear, [x, w, b], [whole, whole, whole], whole)
    compare(product, [x, w, 0.5], [Shard(1), Shard(1), whole], Partial())
    compare(product, [x, w, torch.tensor(0.5)], [Shard(1), whole, whole], Partial())
    compare(softmax, [x], [Shard(0)], Shard(0))
    with pytest.raises(Unsupported, match="reduces over"):
        softmax(distribute_tensor(x, mesh, [Shard(1)]))
    with pytest.raises(Unsupported, match="w is an ordinary tensor|W is an ordinary tensor"):
        linear(distribute_tensor(x, mesh, [Shard(0)]), w, b)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # an interpreter that winds down is aborted by a thread of gloo's now and then


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_two_processes(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(process, args=(str(tmp_path),), nprocs=2)
