"""One compilation for all sizes of a class: what it was asked for holds where it is used again."""

from __future__ import annotations

import math
import random
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import tdsl
from tdsl import errors
from tdsl.arguments import layout
from tdsl.config import config
from tdsl.errors import Error
from tdsl.size_classes import class_of
from tdsl.traced import Trace, whole, with_symbols
from tests.corpus import CORPUS
from tests.programs import LAYOUTS, arguments, assert_close, expected, parsed, program_of, resized, tolerance_of
from tests.random_programs import random_case

EXAMPLES = 10 if hypothesis.settings.default.derandomize else hypothesis.settings.default.max_examples
# Sizes of one class (one power of two), and of others.
OLD = (3, 5, 7)
WALK = {3: (3, 4, 9, 2, 1, 11), 5: (5, 6, 8, 13, 1, 14), 7: (7, 8, 6, 19, 23, 17)}
SAMPLE = (
    "lecture", "linear", "softmax", "layernorm", "attention", "cross_entropy", "conv_padded", "upsample", "concatenate", "scatter", "gather",
    "argmax", "cumulative", "diagonal", "accumulate_twice", "kernel_sum",
)  # fmt: skip


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`name` walks over a sample of the corpus, or all of it."""
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", tuple(CORPUS) if metafunc.config.getoption("--all-targets") else SAMPLE)


def walked(name: str) -> list[list[Any]]:
    """Arguments of one program, whose sizes change from one call to the next, one of them or all together."""
    case, program = CORPUS[name], program_of(name)
    cases = [case]
    for old in OLD:
        cases += [resized(case, old, new) for new in WALK[old]]
    for step in range(len(WALK[3])):
        changed = case
        for old in OLD:
            changed = resized(changed, old, -old)
        for old in OLD:
            changed = resized(changed, -old, WALK[old][step])
        cases.append(changed)
    return [arguments(program, c, seed=n) for n, c in enumerate(cases)]


@pytest.mark.parametrize("backend", ["torch", "c++", "triton"])
def test_another_size_gives_what_it_gives_alone(name: str, backend: str) -> None:
    with config.using(cpu="c++" if backend == "c++" else "torch"):
        f = tdsl.function(program_of(name), backend="triton" if backend == "triton" else "auto")
        calls = walked(name)[:: 3 if backend == "triton" else 1]
        for args in calls:
            try:
                wanted = expected(f.program, args)
            except Error as error:
                with pytest.raises(type(error)):
                    f(*args)
                continue
            found = f(*args)
            found = found if isinstance(found, tuple) else (found,)
            for a, b in zip(found, wanted, strict=True):
                assert_close(a, b, tolerance_of(args), f"{name} on {[tuple(x.shape) for x in args if isinstance(x, torch.Tensor)]}")


def test_few_compilations_serve_many_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    f = tdsl.function("Y[n,c] = softmax[c](X[n,c] * s)")
    lowered = []
    lower = f.executor.lower
    monkeypatch.setattr(f.executor, "lower", lambda *a, **k: lowered.append(1) or lower(*a, **k))
    for n in range(33, 64):
        for c in (17, 24, 31):
            x = torch.randn(n, c)
            torch.testing.assert_close(f(x, 2.0), torch.softmax(2 * x, -1))
    assert f.executor.classes.compiled == len(lowered) <= 3


COUNTING = (
    "Y[i] = x[i] * (2.5 * size(x, 0))", "Y[i] = x[i] * (1.0 / size(x, 0))", "Y[i] = x[i] * (size(x, 0) + 0.5)", "Y[i] = x[i] * exp(-size(x, 0) * 0.1)",
    "def f(x[n]) -> Y[n]:  Y[i] = x[i] / (n - 1.5)", "Y[i] = x[i] * size(x, 0) ** 0.5", "Y[i] = x[i] * sqrt(size(x, 0))", "Y[i] = x[i] + size(x, 0) // 4",
    "def f(x[n]) -> Y[n]:  Y[i] = where(n > 37.5, x[i], -x[i])", "def f(x[n]) -> Y[n]:  Y[i] = where(i > n / 2, x[i], -x[i])",
    "Y[i] = tanh(x[i] / size(x, 0)) * size(x, 0)", "Y[i] = maximum(x[i], size(x, 0) / 40)", "Y[i] = x[i] - mean[k](x[k])", "Y[i] = x[i] * rsqrt(var[k](x[k]) + 1)",
)  # fmt: skip


@pytest.mark.parametrize("backend", ["torch", "c++", "triton"])
@pytest.mark.parametrize("text", COUNTING)
def test_programs_that_count_with_a_size(text: str, backend: str) -> None:
    """Also where it meets a float, and where what they make of both is known before anything runs."""
    with config.using(cpu="c++" if backend == "c++" else "torch"):
        f, g = (tdsl.function(text, backend=b) for b in ("triton" if backend == "triton" else "auto", "reference"))
        for n in (41, 43, 45) if backend == "triton" else (40, 41, 43, 35, 37, 38, 60, 5, 7, 3):
            x, y = (torch.linspace(0.1, 2, n).requires_grad_() for _ in range(2))
            found, wanted = f(x), g(y)
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(torch.autograd.grad(found.sum(), x), torch.autograd.grad(wanted.sum(), y), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "c++", "triton"])
def test_a_mean_of_one_length_serves_others(backend: str) -> None:
    text = "def norm(x[n,c]) -> Y[n,c]:  Y[n,c] = (x[n,c] - mean[k](x[n,k])) * rsqrt(var[k](x[n,k]) + 1e-5)"
    with config.using(cpu="c++" if backend == "c++" else "torch"):
        f = tdsl.function(text, backend="triton" if backend == "triton" else "auto")
        for c in range(33, 64, 2 if backend == "triton" else 1):
            x = torch.randn(3, c)
            torch.testing.assert_close(f(x), torch.nn.functional.layer_norm(x, (c,)), rtol=1e-4, atol=1e-5)
        assert f.executor.classes.compiled <= 3


def test_sizes_of_a_backward() -> None:
    f = tdsl.function("def mlp(x[n,i], w[o,i], b[o]) -> Y[n,o]:  Z[n,o] += x[n,i] * w[o,i]; Y[n,o] = tanh(Z[n,o] + b[o])")
    w, b = torch.randn(6, 5, requires_grad=True), torch.randn(6, requires_grad=True)
    for n in range(1, 20):
        x = torch.randn(n, 5, requires_grad=True)
        wanted = torch.tanh(x @ w.T + b)
        g = torch.randn_like(wanted)
        torch.testing.assert_close(torch.autograd.grad(f(x, w, b), (x, w, b), g), torch.autograd.grad(wanted, (x, w, b), g))


def test_layouts_of_a_class_are_told_apart() -> None:
    f = tdsl.function("Y[i,j] = A[i,j] + B[i,j]")
    base = torch.randn(40, 40)
    for n in (17, 20, 24, 31):
        for view in (
            base[:n, :n],
            base[:n, :n].T,
            base[:n, :n].clone(),
            base[:1, :n].expand(n, n),
            base[:n, :1].expand(n, n),
            base[: n * 1 : 1, 2 : n + 2],
        ):
            torch.testing.assert_close(f(view, base[:n, :n]), view + base[:n, :n])


def test_sizes_that_must_agree_still_must() -> None:
    f = tdsl.function("Y[i,j] += A[i,k] * B[k,j]")
    f(torch.randn(5, 6), torch.randn(6, 7))
    with pytest.raises(errors.SizeMismatch, match="6 .* 7|7 .* 6"):
        f(torch.randn(5, 6), torch.randn(7, 7))
    f(torch.randn(5, 7), torch.randn(7, 7))


def test_bounds_are_checked_for_the_sizes_of_the_call() -> None:
    f = tdsl.function("Y[t,d] = E[ids[t],d]")
    for n in (20, 25, 30, 17):
        table = torch.randn(n, 4)
        torch.testing.assert_close(f(table, torch.tensor([0, n - 1])), table[[0, n - 1]])
        with pytest.raises(errors.BoundsError, match=f"is {n}.*size {n}"):
            f(table, torch.tensor([0, n]))


def test_what_inference_proves_of_one_size_is_not_taken_for_another() -> None:
    f = tdsl.function("def f(x[n], y[m]) -> Y: for i in 0:size(y,0): Y[i] = y[i] + x[pad(i)]")
    for n, m in ((20, 18), (18, 20), (25, 31), (31, 25), (17, 17)):
        x, y = torch.randn(n), torch.randn(m)
        torch.testing.assert_close(f(x, y), y + torch.nn.functional.pad(x, (0, max(0, m - n)))[:m])


def test_integer_arguments_are_sizes_too() -> None:
    f = tdsl.function("def f(x[i], N) -> Y[N]: for i in 0:N: Y[i] = x[i] * N")
    x = torch.arange(100.0)
    for n in (17, 18, 31, 64, 99, 2, 1, 0):
        torch.testing.assert_close(f(x, n), x[:n] * n)


def test_numbers_that_text_and_counts_need_are_fixed() -> None:
    trace = Trace()
    n, m = trace.symbol(24), trace.symbol(7)
    assert isinstance(n, int) and not isinstance(n, bool) and n.__class__ is int
    assert f"{n}" == "24" and trace.fixed == {"__n0": 24}
    assert list(range(m)) == list(range(7)) and trace.fixed["__n1"] == 7


def test_comparisons_are_conditions() -> None:
    trace = Trace()
    n, m = trace.symbol(24), trace.symbol(7)
    assert n % 16 != 0 and n > m and m + 1 <= n and n != m and n + 0 == n and 2 * n - n == n
    assert (-(-n // 16)) == 2 and max(n, m) is n
    holds = trace.holds()
    assert holds(24, 7) and holds(25, 7) and holds(23, 20)
    assert not holds(32, 7) and not holds(33, 7) and not holds(16, 7) and not holds(24, 24) and not holds(20, 20)


def test_arithmetic_is_remembered() -> None:
    trace = Trace()
    n, m = trace.symbol(24), trace.symbol(7)
    made = [
        n + 1,
        2 * n - m,
        n * m,
        m * n,
        -(-n // 16),
        n % 5,
        1 - n,
        (n + m) * (n - m),
        math.prod([n, m, 2]),
        sum([n, m, 3]),
        whole(n),
        n & 15,
    ]
    assert n * m == m * n and not trace.conditions
    for a, b in ((24, 7), (5, 9), (100, 1)):
        n2, m2 = a, b
        again = (
            n2 + 1,
            2 * n2 - m2,
            n2 * m2,
            m2 * n2,
            -(-n2 // 16),
            n2 % 5,
            1 - n2,
            (n2 + m2) * (n2 - m2),
            n2 * m2 * 2,
            n2 + m2 + 3,
            n2,
            n2 & 15,
        )
        assert trace.numbers(made)(a, b) == again
    with with_symbols():
        assert eval(f"{2 * n - m} * 3", {"__n0": 10, "__n1": 1}) == 57


def test_integers_of_an_older_trace_are_numbers() -> None:
    old = Trace().symbol(24)
    trace = Trace()
    n = trace.symbol(24)
    assert n == old
    assert trace.fixed == {} and not trace.holds()(25)
    assert trace.numbers([n + old])(24) == (48,)


def test_a_class_tells_what_compiling_takes_for_granted() -> None:
    f = tdsl.function("Y[i,j] = A[i,j] * s")

    def key(a: torch.Tensor, s: Any) -> object:
        return class_of([a, s], layout(f.program, [a, s], f.executor.integers))[0]

    a = torch.randn(20, 30)
    assert key(a, 1.0) == key(torch.randn(17, 25), 2.0)
    others = (a.double(), a[:1], a[:16], a.T, a[:0], a.to("meta"))
    assert all(key(a, 1.0) != key(other, 1.0) for other in others)
    assert key(a, 1.0) != key(a, 1) and key(a, torch.tensor(1.0)) != key(a, 1.0)


def test_a_layout_that_was_called_is_not_looked_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    f = tdsl.function("Y[i] = x[i] * s * size(x, 0)")
    x = torch.randn(5)
    for _ in range(2):
        f(x, 2.0)
    found = []
    find = f.executor.find
    monkeypatch.setattr(f.executor, "find", lambda args: found.append(args) or find(args))
    torch.testing.assert_close(f(torch.ones(5), 3.0), torch.full((5,), 15.0))
    torch.testing.assert_close(f(x=torch.ones(5), s=3.0), torch.full((5,), 15.0))
    assert not found
    others = (torch.ones(5, dtype=torch.float64), torch.ones(6), torch.ones(10)[::2])
    for other in others:
        torch.testing.assert_close(f(other, 3.0), other * 3.0 * len(other))
    torch.testing.assert_close(f(x, 3), x * 15)
    assert len(found) == 4
    asking = torch.ones(5, requires_grad=True)
    for _ in range(3):
        assert f(asking, 3.0).requires_grad
        with torch.no_grad():
            assert not f(asking, 3.0).requires_grad
        assert not f(x, 3.0).requires_grad
    with pytest.raises(errors.ArgumentError):
        f(x)
    found.clear()
    config.cpu = "torch"
    torch.testing.assert_close(f(x, 2.0), x * 10)
    assert found  # another setting is looked up


class Operators(TorchDispatchMode):
    """Sees every operator."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_what_looks_at_a_call_sees_one_that_is_known() -> None:
    config.cpu = "c++"  # whose kernels torch sees nothing of
    f = tdsl.function("Z[i,j] += A[i,k] * B[k,j]; Y[i,j] = exp(Z[i,j])")
    a, b = torch.randn(4, 4), torch.randn(4, 4)
    for _ in range(3):
        f(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        assert f(a, b).dtype == torch.bfloat16
    assert torch.func.vmap(f, (0, None))(a[None], b).shape == (1, 4, 4)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(f(a, b), torch._subclasses.FakeTensor)
    with Operators() as operators:
        f(a, b)
    assert [str(op) for op in operators.seen] == ["tdsl.run.default"]
    with forward_ad.dual_level():
        assert forward_ad.unpack_dual(f(forward_ad.make_dual(a, a), b)).tangent is not None
    assert type(f(torch.nn.Parameter(a), b)) is torch.Tensor
    torch.testing.assert_close(torch.jit.trace(f, (a, b))(2 * a, b), f(2 * a, b))


@pytest.mark.fuzz
@hypothesis.settings(max_examples=EXAMPLES)
@hypothesis.given(st.integers(0, 2**32), st.sampled_from(["torch", "c++", "triton"]))
def test_random_programs_of_many_sizes(seed: int, backend: str) -> None:
    case, draw = random_case(seed), random.Random(seed)
    program = parsed(case.text)
    chosen = "triton" if backend == "triton" else "auto"
    with config.using(cpu="c++" if backend == "c++" else "torch"):
        f = tdsl.function(program, backend=chosen)
        for n in range(5):
            args = arguments(program, case, torch.float64, draw.choice(LAYOUTS), seed=n)
            alone = tdsl.function(program, backend=chosen)
            alone.executor.classes.find = lambda *_: None  # type: ignore[method-assign, assignment]
            try:
                wanted = alone.executor(args)
            except (Error, RuntimeError, IndexError) as error:
                with pytest.raises(type(error)):
                    f.executor(args)
            else:
                for a, b in zip(f.executor(args), wanted, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8, equal_nan=True)
            sizes = sorted({size for shape in case.shapes.values() for size in shape})
            for old in sizes:
                case = resized(case, old, -old)
            for old in sizes:
                case = resized(case, -old, draw.choice((old, old, old + 1, max(int(bool(case.ints)), old - 1), draw.randint(1, 9))))
