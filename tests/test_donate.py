"""donate=: calls that write into arguments."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import tdsl
from tdsl import errors

APPEND = "def append(C[b,s,d], K[b,t,d], pos[b]) -> C:  C[b,pos[b]+t,d] = K[b,t,d]"


def cache() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A cache, what is put into it, where, and what it is afterwards."""
    c, k, pos = torch.randn(2, 16, 4), torch.randn(2, 3, 4), torch.tensor([1, 5])
    after = c.clone()
    for b, at in enumerate(pos.tolist()):
        after[b, at : at + 3] = k[b]
    return c, k, pos, after


# Programs, whether the donated W is written right away, their other arguments, and what W and the other outputs are.
PROGRAMS: dict[str, tuple[str, bool, Any, Any]] = {
    "each element of itself": (
        "def sgd(W[i], G[i], lr) -> W:  W[i] += -lr * G[i]",
        True,
        lambda: (torch.arange(5.0), 0.5),
        lambda w, g, lr: (w - lr * g,),
    ),
    "some elements": (
        "def add(W[i], x[e], ids[e]) -> W, Y:  W[ids[e]] += x[e]; Y[i] = 2 * W[i]",
        True,
        lambda: (torch.arange(4.0), torch.tensor([0, 3, 3, 1])),
        lambda w, x, ids: (w.index_add(0, ids, x), 2 * w.index_add(0, ids, x)),
    ),
    "of other elements": (
        "def shift(W[i]) -> W:  T[i] = W[pad(i-1)]; W[i] = T[i]",
        False,
        lambda: (),
        lambda w: (torch.cat([w.new_zeros(1), w[:-1]]),),
    ),
    "read on": (
        "def step(W[i], G[i]) -> W, Y:  W[i] += G[i]; Y[i] = 2 * W[i]",
        False,
        lambda: (torch.arange(5.0),),
        lambda w, g: (w + g, 2 * (w + g)),
    ),
    "read before": (
        "def step(W[i], G[i], at) -> W, Y:  Y[i] = 2 * W[i]; W[at] = G[at]",
        False,
        lambda: (torch.arange(5.0), 2),
        lambda w, g, at: (torch.where(torch.arange(5) == at, g, w), 2 * w),
    ),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["auto", "triton", "reference"])
def test_a_cache_is_written_in_place(backend: str) -> None:
    f = tdsl.function(APPEND, donate="C", backend=backend)
    assert f.executor.aliases == {"C.v1": "C"}
    for _ in range(3):
        c, k, pos, after = cache()
        place, version = c.data_ptr(), c._version
        assert f(c, k, pos) is c
        assert c.data_ptr() == place and c._version > version
        torch.testing.assert_close(c, after)


@pytest.mark.parametrize("cpu", ["torch", "c++"])
@pytest.mark.parametrize("what", PROGRAMS)
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_what_a_program_means(what: str, backend: str, cpu: str) -> None:
    text, direct, arguments, expected = PROGRAMS[what]
    with tdsl.config.using(cpu=cpu):
        f = tdsl.function(text, donate="W", backend=backend)
        assert bool(f.executor.aliases) == direct
        for w in (torch.randn(5), torch.randn(10)[::2]):
            wanted = expected(w.clone(), *arguments())
            found = f(w, *arguments())
            found = found if isinstance(found, tuple) else (found,)
            assert found[0] is w
            for a, b in zip(found, wanted, strict=True):
                torch.testing.assert_close(a, b)


def test_nothing_is_copied_or_allocated() -> None:
    f = tdsl.function("def mark(C[i], at) -> C:  C[at] = 1.0", donate="C")
    text = f.executor.lower(tdsl.lowered.layout(f.program, [torch.zeros(9), 3], f.executor.integers), "cpu", cpp=None).text
    assert "C_v1 = C\n" in text and "empty" not in text and "clone" not in text and "copy_(c)" not in text


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_graph_sees_the_change(backend: str) -> None:
    f = tdsl.function(APPEND, donate="C")

    def step(c: Tensor, k: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        before = c.sum()
        new = f(c, k, pos)
        return before, new.sum() + c.sum()

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    c, k, pos, after = cache()
    before = c.sum()
    found = compiled(c, k, pos)
    torch.testing.assert_close(c, after)
    torch.testing.assert_close(found, (before, 2 * after.sum()))


def test_a_graph_gives_the_other_outputs_too() -> None:
    text, _, arguments, expected = PROGRAMS["read on"]
    f = tdsl.function(text, donate="W")
    w = torch.randn(5)
    wanted = expected(w.clone(), *arguments())
    found = torch.compile(f, fullgraph=True, backend="aot_eager")(w, *arguments())
    torch.testing.assert_close((w, found[1]), wanted)


def test_the_operator_does_what_its_schema_says() -> None:
    f = tdsl.function("def add(W[i], x[e], ids[e]) -> W, Y:  W[ids[e]] += x[e]; Y[i] = 2 * W[i]", donate="W")
    args = (f.recipe, "dtt", [torch.randn(5), torch.empty(5)], [torch.randn(3), torch.tensor([0, 4, 4])], [], [])
    torch.library.opcheck(torch.ops.tdsl.update.default, args)


def test_an_exported_graph_writes_too() -> None:
    f = tdsl.function(APPEND, donate="C")

    class Append(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cache: Tensor
            self.register_buffer("cache", torch.zeros(2, 16, 4))

        def forward(self, k: Tensor, pos: Tensor) -> Tensor:
            return f(self.cache, k, pos).sum()  # type: ignore[no-any-return]

    _, k, pos, _ = cache()
    module = torch.export.export(Append(), (k, pos)).module()
    torch.testing.assert_close(module(k, pos), k.sum())
    (buffer,) = module.buffers()
    torch.testing.assert_close(buffer[1, 5:8], k[1])


def test_copies_and_pickles_donate_too() -> None:
    f = pickle.loads(pickle.dumps(tdsl.function(APPEND, donate="C")))
    c, k, pos, after = cache()
    assert f(c, k, pos) is c
    torch.testing.assert_close(c, after)


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("gradient", "requires a gradient"),
        ("expanded", "some of its elements are the same memory"),
        ("folded", "some of its elements are the same memory"),
        ("shared", "K is the same memory"),
        ("dtype", "C is donated with dtype int64, and becomes float32"),
        ("graph", "requires a gradient"),
        ("func", "torch.func transforms functions that do not"),
    ],
)
def test_what_cannot_be_written(which: str, message: str) -> None:
    f = tdsl.function(APPEND.replace("K[b,t,d]\n", "K[b,t,d]"), donate="C")
    c, k, pos, _ = cache()
    before = c.clone()
    with pytest.raises((errors.ArgumentError, errors.Unsupported), match=message):
        if which == "gradient":
            f(c, k.requires_grad_(), pos)
        elif which == "expanded":
            f(c[:1].expand(2, 16, 4), k, pos)
        elif which == "folded":
            f(torch.as_strided(c, (2, 16, 4), (8, 2, 1)), k, pos)
        elif which == "shared":
            f(c, c[:, :3], pos)
        elif which == "dtype":
            tdsl.function("def f(C[i], K[i]) -> C:  C[i] = K[i]", donate="C")(c[0, 0].long(), k[0, 0])
        elif which == "graph":
            torch.compile(f, backend="aot_eager")(c, k.requires_grad_(), pos)
        else:
            torch.func.vmap(f)(c[None], k[None], pos[None])
    torch.testing.assert_close(c, before)


def test_what_cannot_be_donated() -> None:
    for nothing in (3, [0]):
        with pytest.raises(errors.ArgumentError, match="donate= is"):
            tdsl.function(APPEND, donate=nothing)
    with pytest.raises(errors.ArgumentError, match="D, which is no parameter of append"):
        tdsl.function(APPEND, donate="D")
    with pytest.raises(errors.ArgumentError, match="no output of append is what K becomes"):
        tdsl.function(APPEND, donate="K")


def test_under_no_grad_a_parameter_is_written() -> None:
    f = tdsl.function("def sgd(W[i], G[i]) -> W:  W[i] += -0.5 * G[i]", donate="W")
    w = torch.nn.Parameter(torch.ones(4))
    for _ in range(3):
        with torch.no_grad():
            assert f(w, torch.ones(4)) is w
    torch.testing.assert_close(w.detach(), torch.full((4,), -0.5))


def test_saved_values_that_a_call_overwrites_are_noticed() -> None:
    f = tdsl.function("def mark(C[i], at) -> C:  C[at] = 1.0", donate="C")
    x, c = torch.randn(4, requires_grad=True), torch.randn(4)
    y = (x * c).sum()
    f(c, 2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
