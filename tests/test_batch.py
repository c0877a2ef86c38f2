"""vmap: against one call per element, against torch.func, and mixed with the other transforms."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch.func import jvp, vjp, vmap

import tdsl
from tdsl import reference
from tdsl.batch import batch
from tdsl.errors import ArgumentError, NameError_, Unsupported
from tdsl.ir import Access, Program, statements, walk
from tdsl.swap import gradient
from tdsl.text import parse
from tdsl.verify import verify
from tests.corpus import CORPUS
from tests.derivatives import COUNTERPARTS, Values, assert_near, floats, of_floats, randoms, torch_arguments, values_of
from tests.programs import check, program_of

BATCH = 3
Dims = list[int | None]


def batchable(name: str) -> list[str]:
    """The inputs that may differ within a batch: all but those that an output's size depends on, or whose values are given together."""
    program = program_of(name)
    sizes = [e for o in program.outputs for size in o.sizes or () if size is not None for e in walk(size)]
    fixed = {e.tensor for e in sizes if isinstance(e, Access)} | set(CORPUS[name].values)
    return [n for n in program.inputs if n not in fixed]


def dimensions(program: Program, batched: set[str], pick: random.Random | None) -> tuple[Dims, Dims]:
    """Where the batch stands in inputs and outputs: first, or anywhere (the last counted from the end)."""
    ranks = {s.target.tensor: len(s.target.subscripts) for s in statements(program.body)}

    def place(rank: int) -> int:
        d = 0 if pick is None else pick.randint(0, rank)
        return -1 if pick is not None and d == rank else d

    return [place(len(p.dims)) if p.name in batched else None for p in program.params], [place(ranks[o]) for o in program.results]


def batches(name: str, ins: Dims) -> tuple[list[Values], Values]:
    """Values for each element of a batch, and the same stacked; elements share what is not batched."""
    program, shared = values_of(name)
    each = [values_of(name, seed=n)[1] for n in range(BATCH)]
    dims = dict(zip(program.inputs, ins, strict=True))
    each = [{n: shared[n] if dims[n] is None else v for n, v in values.items()} for values in each]
    return each, {n: shared[n] if d is None else np.stack([np.asarray(v[n]) for v in each], d) for n, d in dims.items()}


@pytest.mark.parametrize("name", [name for name in CORPUS if batchable(name)])
def test_elements(name: str) -> None:
    """All inputs batched, and each alone, at the first dimension and elsewhere: one call per element gives the same."""
    program, inputs = program_of(name), batchable(name)
    pick = random.Random(0)
    for batched in [set(inputs), *({n} for n in inputs if len(inputs) > 1)]:
        for where in (None, pick):
            ins, outs = dimensions(program, batched, where)
            result = verify(batch(program, ins, outs))
            assert parse(str(result)) == result
            each, together = batches(name, ins)
            found = reference.run(result, together)
            single = [reference.run(program, values) for values in each]
            for o, r, d in zip(program.results, result.results, outs, strict=True):
                expected = np.stack([s[o] for s in single], 0 if d is None else d)
                assert found[r].shape == expected.shape, str(result)
                np.testing.assert_allclose(found[r], expected, err_msg=str(result))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", [name for name in CORPUS if batchable(name) and not CORPUS[name].values])
def test_executors(name: str, backend: str) -> None:
    program, inputs = program_of(name), batchable(name)
    ins, outs = dimensions(program, set(inputs), random.Random(1))
    result = batch(program, ins, outs)
    values = batches(name, ins)[1]
    args = [torch.as_tensor(v) if isinstance(v, np.ndarray) else v for v in (values[n] for n in result.inputs)]
    args = [a.float() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
    check(result, args, backend, scale=5)


@pytest.mark.parametrize("name", [name for name in CORPUS if floats(*values_of(name)) and batchable(name) and name != "scatter_max"])
def test_gradients(name: str) -> None:
    """vmap(grad) and grad(vmap) with batched inputs both give every element's own gradient."""
    program = program_of(name)
    wrt = [n for n in floats(*values_of(name)) if n in batchable(name)]
    ins: Dims = [0 if n in wrt else None for n in program.inputs]
    each, together = batches(name, ins)
    single = gradient(program, wrt)
    cotangents = [n for n in single.inputs if n not in program.inputs]
    generator = np.random.default_rng(5)
    outputs = reference.run(program, each[0])
    seeds = [{n: generator.normal(size=outputs[o].shape) for n, o in zip(cotangents, program.results, strict=True)} for _ in each]
    expected = [reference.run(single, {**v, **s}) for v, s in zip(each, seeds, strict=True)]
    stacked = {n: np.stack([s[n] for s in seeds]) for n in cotangents}
    inner = verify(batch(single, [*ins, *[0] * len(cotangents)]))
    outer = verify(gradient(batch(program, ins), wrt))
    given = dict(zip(outer.inputs[len(ins) :], stacked.values(), strict=True))
    for result, values in ((inner, stacked), (outer, given)):
        assert parse(str(result)) == result
        found = reference.run(result, {**together, **values})
        for name_, r in zip(single.results, result.results, strict=True):
            assert_near(found[r], np.stack([e[name_] for e in expected]), 1e-9, str(result))


# ---------------------------------------------------------------------------------------------------------------------
# Against torch.func


@pytest.mark.parametrize("name", [n for n in COUNTERPARTS if n != "trace"])
def test_against_torch(name: str) -> None:
    """vmap, vmap(grad), grad(vmap), vmap(jvp) and jvp(vmap) of Functions, against the same of a torch function; the last input is shared."""
    args, used = torch_arguments(name)
    function = tdsl.function(CORPUS[name].text)
    wrt = [function.program.inputs[n] for n in used]
    plain = of_floats(COUNTERPARTS[name], args, used)
    batched = used[:-1] or used
    ins: Dims = [0 if n in batched else None for n in range(len(args))]
    dims = tuple(0 if n in batched else None for n in used)
    x = [torch.stack([torch_arguments(name, seed)[0][n] for seed in range(BATCH)]) if n in batched else args[n] for n in used]
    full = list(args)
    for n, value in zip(used, x, strict=True):
        full[n] = value
    expected = vmap(plain, dims)(*x)
    torch.testing.assert_close(function.vmap(ins)(*full), expected)
    (c,) = randoms([expected.shape], 4)
    v = randoms([a.shape for a in x], 5)

    def pulled(seed: torch.Tensor, *point: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return vjp(plain, *point)[1](seed)

    assert_all(function.grad(wrt).vmap([*ins, 0])(*full, c), vmap(pulled, (0, *dims))(c, *x))
    assert_all(function.vmap(ins).grad(wrt)(*full, c), vjp(vmap(plain, dims), *x)[1](c))

    def pushed(*point: torch.Tensor) -> torch.Tensor:
        n = len(point) // 2
        return jvp(plain, point[:n], point[n:])[1]

    assert_all(function.jvp(wrt).vmap([*ins, *dims])(*full, *v), vmap(pushed, dims * 2)(*x, *v))
    assert_all(function.vmap(ins).jvp(wrt)(*full, *v), jvp(vmap(plain, dims), tuple(x), tuple(v))[1])


def assert_all(actual: Any, expected: Any) -> None:
    actual, expected = (a if isinstance(a, tuple) else (a,) for a in (actual, expected))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_hessian() -> None:
    """vmap(jvp(grad)) over the unit directions is the Hessian: three transforms, one program."""
    function = tdsl.function("s += tanh(A[i,k] * x[k]) * y[i]")
    a, x, y = randoms([(3, 4), (4,), (3,)], 0)
    hessian = function.grad("x").jvp("x").vmap([None, None, None, None, 0])
    found = hessian(a, x, y, torch.tensor(1.0, dtype=torch.float64), torch.eye(4, dtype=torch.float64))
    expected = torch.func.hessian(lambda x: (torch.tanh(a * x) * y[:, None]).sum())(x)
    torch.testing.assert_close(found, expected)


# ---------------------------------------------------------------------------------------------------------------------
# What is batched, and what is not


def lines(program: Program) -> list[str]:
    return [line.strip() for line in str(program).splitlines()]


def test_printed() -> None:
    """One index more where something depends on a batched input; the rest is computed once."""
    program = parse("def f(X[i,k], W[k,j], b[j], n) -> Y[i,j]:\n    Z[i,j] += X[i,k] * W[k,j]\n    Y[i,j] = softmax[j](n * Z[i,j] + b[j])")
    assert lines(batch(program, (None, None, 1, None))) == [
        "def f_vmap(X[i,k], W[k,j], b[j,n2], n) -> Y[n2,i,j]:",
        "for i, j, k:  Z[i,j] += X[i,k] * W[k,j]",
        "for n2, i, j:  Y[n2,i,j] = softmax[j](n * Z[i,j] + b[j,n2])",
    ]
    assert lines(batch(program, (0, None, None, 0), -1, name="batch")) == [
        "def f_vmap(X[batch,i,k], W[k,j], b[j], n[batch]) -> Y[i,j,batch]:",
        "for batch, i, j, k:  Z[batch,i,j] += X[batch,i,k] * W[k,j]",
        "for batch, i, j:  Y[i,j,batch] = softmax[j](n[batch] * Z[batch,i,j] + b[j])",
    ]


def test_versions() -> None:
    """Where versions of a name differ in their dimensions, each has a name of its own."""
    program = parse("Y[i,j] += A[i,k] * B[k,j]\nY[i,j] = Y[i,j] + c[j]")
    assert lines(batch(program, (None, None, 0)))[1:] == [
        "for i, j, k:  Y.v1[i,j] += A[i,k] * B[k,j]",
        "for n, i, j:  Y[n,i,j] = Y.v1[i,j] + c[n,j]",
    ]
    update = parse("def step(w[i], g[i], lr) -> w: w[i] = w[i] - lr * g[i]")
    assert batch(update, (0, 0, None)).results == ("w",)
    assert batch(update, (None, 0, None)).results == ("w2",)


def test_outputs_without_a_batch() -> None:
    """An output that depends on nothing batched is repeated, or stays as it is where out_dims says None."""
    program = parse("def f(x[i], y[j]) -> a[2*i], b:\n    for k in 0:size(x, 0): a[k] = x[k]\n    b += y[j]")
    assert lines(batch(program, (None, 0), (None, 0)))[1:] == ["for k in 0:size(x, 0):  a[k] = x[k]", "for n, j:  b[n] += y[n,j]"]
    repeated = batch(program, (None, 0), (1, 0))
    assert lines(repeated)[-1] == "for n in 0:size(y, 0), k:  a[k,n] = a.one[k]"
    x, y = np.array([1.0, 2.0]), np.ones((3, 5))
    found = reference.run(repeated, {"x": x, "y": y})
    np.testing.assert_array_equal(found["a"], np.repeat([[1.0], [2.0], [0.0], [0.0]], 3, axis=1))
    function = tdsl.function(program)
    a, b = function.vmap((None, 0), (None, 0))(torch.tensor(x), torch.tensor(y))
    assert (a.shape, b.shape) == ((4,), (3,))


def test_integers() -> None:
    """Index tensors are batched as all others are: a gather with its own indices for each element."""
    function = tdsl.function("Y[t,d] = E[ids[t],d]")
    table, ids = torch.randn(7, 3), torch.randint(7, (4, 5))
    torch.testing.assert_close(function.vmap((None, 0))(table, ids), table[ids])
    gradient_ = function.vmap((None, 0)).grad("E")(table, ids, torch.ones(4, 5, 3))
    torch.testing.assert_close(gradient_, torch.bincount(ids.flatten(), minlength=7)[:, None].expand(7, 3).float())


def test_calls() -> None:
    """The arguments of torch.func.vmap; transforms are made once."""
    function = tdsl.function("Y[i] = x[i] * y[i]")
    x, y = torch.randn(5, 4), torch.randn(4, 5)
    torch.testing.assert_close(function.vmap((0, -1))(x, y), x * y.T)
    torch.testing.assert_close(function.vmap((0, 1), 1)(x, y), (x * y.T).T)
    torch.testing.assert_close(function.vmap()(x, x), x * x)
    assert function.vmap((0, 1)) is function.vmap([0, 1])
    torch.testing.assert_close(function.vmap((0, None)).vmap((None, 1))(x, y), x * y.T[:, None])


def test_errors() -> None:
    program = parse("def f(x[i], k, m) -> Y[m]:\n    for i in 0:m: Y[i] = x[i] * k")
    with pytest.raises(ArgumentError, match="no parameter is batched"):
        batch(program, None)
    with pytest.raises(ArgumentError, match="2 entries for 3 parameters"):
        batch(program, (0, 0))
    with pytest.raises(ArgumentError, match="gives 2 for x, which has dimensions -2 to 1"):
        batch(program, (2, None, None))
    with pytest.raises(ArgumentError, match="the output Y depends on the batch"):
        batch(program, (0, None, None), None)
    with pytest.raises(ArgumentError, match="the size of Y depends on m, which is batched") as caught:
        batch(program, (None, None, 0))
    assert "^" in str(caught.value)
    with pytest.raises(NameError_, match="`for` is a reserved word"):
        batch(program, (0, None, None), name="for")
    with pytest.raises(Unsupported, match=r"the number of steps of an ordered loop depends on len") as unsupported:
        batch(parse("def f(X[t], len) -> H[t]: for ordered t in 0:len: H[t] = H[pad(t-1)] + X[t]"), (0, 0))
    assert "^" in str(unsupported.value)
