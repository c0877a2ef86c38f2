"""Functions as torch operators: torch.compile, torch.export, fake and meta tensors, torch.func, forward mode, the checks of torch.library.

A sample of the corpus runs in `make test`, all of it under --all-targets.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import tdsl
from tdsl import dispatch, errors, operators, recipes
from tdsl.arguments import form
from tdsl.function import Function
from tests.corpus import CORPUS
from tests.programs import arguments, program_of

SAMPLE = (
    "lecture", "linear", "rewriting", "softmax", "cross_entropy", "layernorm", "attention_window", "conv_padded", "upsample", "concatenate",
    "scatter", "gather", "argmax", "two_results", "scalars", "zero_d", "unused", "cumulative", "integers",
)  # fmt: skip
COMPILER = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")


def names(config: pytest.Config) -> tuple[str, ...]:
    """The programs to walk over."""
    return tuple(CORPUS) if config.getoption("--all-targets") else SAMPLE


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`name` walks over the sample, or the corpus."""
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", names(metafunc.config))


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Nothing that torch.compile remembers goes from one test to the next."""
    torch._dynamo.reset()
    yield


def case(name: str) -> tuple[Function, list[Any]]:
    """A Function of the corpus and arguments in float64; those that can have gradients ask for them."""
    f = Function(program_of(name))
    args = [a.detach().clone() if isinstance(a, Tensor) else a for a in arguments(f.program, CORPUS[name], torch.float64)]
    for parameter, a in zip(f.program.inputs, args, strict=True):
        if isinstance(a, Tensor) and a.dtype.is_floating_point and parameter in f.differentiable:
            a.requires_grad_()
    return f, args


def several(results: Any) -> tuple[Tensor, ...]:
    """One output or more, as a tuple."""
    return results if isinstance(results, tuple) else (results,)


def run(f: Callable[..., Any], args: list[Any]) -> tuple[list[Tensor], list[Tensor | None]]:
    """The outputs, and the gradients of a weighted sum of all of them."""
    args = [a.detach().clone().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in args]
    results = several(f(*args))
    losses = [(r * torch.linspace(0.5, 1.5, r.numel(), dtype=r.dtype).view(r.shape)).sum() for r in results if r.requires_grad]
    if losses:
        torch.stack(losses).sum().backward()
    return [r.detach() for r in results], [a.grad if isinstance(a, Tensor) else None for a in args]


def assert_same(found: tuple[list[Tensor], list[Tensor | None]], wanted: tuple[list[Tensor], list[Tensor | None]]) -> None:
    """Outputs and gradients agree; where nothing flows, a gradient may be missing or zero."""
    for a, b in zip(found[0], wanted[0], strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    for a, b in zip(found[1], wanted[1], strict=True):
        if a is None or b is None:
            left = b if a is None else a
            assert left is None or not left.any()
        else:
            torch.testing.assert_close(a, b)


# ---------------------------------------------------------------------------------------------------------------------
# Tracing


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_break(name: str, dynamic: bool) -> None:
    f, args = case(name)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    assert_same(run(compiled, args), run(f, args))


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_inductor_without_graph_break() -> None:
    linear = tdsl.function("def linear(X[n,k], W[m,k], b[m]) -> Y[n,m]:\n    Z[n,m] += X[n,k] * W[m,k]\n    Y[n,m] = gelu(Z[n,m] + b[m])")
    softmax = tdsl.function("P[i,j] = softmax[j](a * X[i,j])")

    def model(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return softmax(0.5, linear(x, w, b) + 1) @ w

    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for n in (5, 8):
        args = [torch.randn(n, 3, requires_grad=True), torch.randn(7, 3, requires_grad=True), torch.randn(7, requires_grad=True)]
        assert_same(run(compiled, args), run(model, args))


def test_one_graph_serves_all_sizes() -> None:
    conv = tdsl.function("Y[n,o,x] += X[n,c,2*x+r] * W[o,c,r]")
    scatter = tdsl.function("def count(dst[e], m[e,d], N) -> Y[N,d]: Y[dst[e],d] += m[e,d]")
    up = tdsl.function("def upsample(x[n]) -> Y[2*n]: for i in 0:2*size(x, 0):  Y[i] = x[i//2]")
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def model(x: Tensor, w: Tensor, dst: Tensor, rows: int) -> Tensor:
        y = up(conv(x, w).sum((0, 1)))
        return scatter(dst, y[:, None] * x.mean(), rows)

    compiled = torch.compile(model, fullgraph=True, backend=graphs, dynamic=True)
    for n, rows in ((9, 3), (11, 4), (16, 5)):
        length = (n - 3) // 2 + 1
        args = [
            torch.randn(2, 3, n, requires_grad=True),
            torch.randn(4, 3, 3, requires_grad=True),
            torch.randint(0, 3, (2 * length,)),
            rows,
        ]
        assert_same(run(compiled, args), run(model, args))
    assert graphs.frame_count == 1


def test_sizes_that_differ_are_an_error_when_traced() -> None:
    f = tdsl.function("Y[i,j] += A[i,k] * B[k,j]")
    with pytest.raises(Exception, match="size k is 3 in A"):
        torch.compile(f, fullgraph=True, backend="aot_eager")(torch.randn(2, 3), torch.randn(4, 5))


class Layer(torch.nn.Module):
    """A module that holds a Function and parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(7, 3))
        self.function = tdsl.function("Y[n,m] += X[n,2*k] * W[m,k]")

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight).relu()  # type: ignore[no-any-return]


@pytest.mark.parametrize("strict", [True, False])
def test_export_with_a_dynamic_size(strict: bool) -> None:
    layer = Layer()
    exported = torch.export.export(layer, (torch.randn(5, 6),), dynamic_shapes={"x": {0: torch.export.Dim("n")}}, strict=strict)
    assert [node.target for node in exported.graph.nodes if "tdsl" in str(node.target)] == [torch.ops.tdsl.call.default]
    x = torch.randn(9, 6)
    torch.testing.assert_close(exported.module()(x), layer(x))
    lowered = exported.run_decompositions().module()
    assert_same(run(lowered, [x.requires_grad_()]), run(layer, [x]))


def test_an_exported_graph_runs_in_another_process(tmp_path: Path) -> None:
    layer = Layer()
    x = torch.randn(5, 6)
    torch.export.save(torch.export.export(layer, (x,)), tmp_path / "layer.pt2")
    torch.save((x, layer(x)), tmp_path / "values.pt")
    code = (
        "import sys, torch, tdsl; tdsl.function\n"
        f"module = torch.export.load({str(tmp_path / 'layer.pt2')!r}).module()\n"
        f"x, y = torch.load({str(tmp_path / 'values.pt')!r})\n"
        "torch.testing.assert_close(module(x), y)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.check_all
@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
def test_a_package_of_ahead_of_time_compiled_code(tmp_path: Path) -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.randn(4, 3))
            self.f = tdsl.function("def linear(X[n,i], W[o,i], s) -> Y[n,o]: Z[n,o] += X[n,i] * W[o,i]; Y[n,o] = relu(Z[n,o]) * s")

        def forward(self, x: Tensor) -> Tensor:
            return self.f(x, self.w, 0.5) + 1  # type: ignore[no-any-return]

    layer, x = Layer(), torch.randn(5, 3)
    with torch.no_grad():
        graph = torch.export.export(layer, (x,), dynamic_shapes={"x": {0: torch.export.Dim("n", min=2, max=64)}})
        path = torch._inductor.aoti_compile_and_package(graph, package_path=str(tmp_path / "layer.pt2"))
        package = torch._inductor.aoti_load_package(path)
        for n in (5, 9):
            x = torch.randn(n, 3)
            torch.testing.assert_close(package(x), layer(x))
    load = f"import torch; torch._inductor.aoti_load_package({path!r})(torch.randn(2, 3))"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    bare = subprocess.run([sys.executable, "-c", load], env=environment, capture_output=True, text=True, check=False)
    assert bare.returncode != 0 and "tdsl::run" in bare.stderr  # torch names the operator that the process lacks
    subprocess.run([sys.executable, "-c", f"import tdsl.function; {load}"], env=environment, check=True)


def test_the_older_tracer_sees_a_call() -> None:
    f = tdsl.function("Y[i,j] += A[i,k] * B[k,j]")
    traced = torch.jit.trace(lambda a, b: f(a, b) + 1, (torch.randn(3, 4), torch.randn(4, 5)))
    a, b = torch.randn(3, 4, requires_grad=True), torch.randn(4, 5)
    torch.testing.assert_close(traced(a, b), a @ b + 1)
    torch.testing.assert_close(torch.autograd.grad(traced(a, b).sum(), a), torch.autograd.grad((a @ b).sum(), a))


def test_fake_tensors_are_like_the_real_ones(name: str) -> None:
    from torch._subclasses import FakeTensorMode

    f, args = case(name)
    real = several(f(*args))
    with FakeTensorMode() as mode:
        fake = several(f(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args)))
    for a, b in zip(fake, real, strict=True):
        assert (a.shape, a.dtype, a.device, a.requires_grad) == (b.shape, b.dtype, b.device, b.requires_grad)
        assert a.is_contiguous()


def test_fake_tensors_of_a_gpu_need_no_gpu() -> None:
    from torch._subclasses import FakeTensorMode

    f, args = case("attention")
    with FakeTensorMode():
        fake = [torch.empty(a.shape, device="cuda") if isinstance(a, Tensor) else a for a in args]
        result = f(*fake)
    assert (result.device.type, result.shape) == ("cuda", (2, 5, 4))
    trained = f._trained(("Q",), True)  # what a recorded call would save there; torch without CUDA cannot record it
    assert trained is not None
    halves = trained.halves(trained.base.recomputed_for([form(a) for a in fake]))
    assert len(halves.forward.outputs_for([form(a) for a in fake])) == 1 + len(halves.parts.saved)


def test_meta_tensors(name: str) -> None:
    f, args = case(name)
    if any(isinstance(a, Tensor) and a.dim() == 0 and not a.dtype.is_floating_point for a in args):
        pytest.skip("a size is the value of a tensor")
    real = several(f(*args))
    meta = several(f(*(a.detach().to("meta").requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in args)))
    if not any(isinstance(a, Tensor) for a in args):
        return
    for a, b in zip(meta, real, strict=True):
        assert (a.shape, a.dtype, a.requires_grad, a.device.type) == (b.shape, b.dtype, b.requires_grad, "meta")


def test_opcheck(name: str) -> None:
    f, args = case(name)
    torch.library.opcheck(torch.ops.tdsl.call.default, (f.recipe, *operators.pack(args)))


def test_dispatch_modes_see_one_operator() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    f, args = case("attention")
    with Watch():
        f(*args)
    assert [s for s in seen if not s.startswith("aten.detach")] == ["tdsl.run.default"]


def test_eager_calls_go_past_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("an eager call went through the dispatcher")

    f, args = case("attention")
    monkeypatch.setattr(sys.modules["tdsl.torch_function"], "call", never)
    monkeypatch.setattr(operators, "pack", never)
    run(f, args)


def test_a_graph_keeps_to_its_function_after_a_change_by_hand() -> None:
    f = tdsl.function("Y[i] = x[i] * x[i]")
    x = torch.randn(5, requires_grad=True)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    compiled(x).sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach())
    f.define_grad("x", "x.grad[i] = 3 * Y.grad[i]")
    x.grad = None
    compiled(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.full((5,), 3.0))
    other = tdsl.function("Y[i] = x[i] * x[i]")
    assert other.recipe != f.recipe
    recipe = f.recipe
    del f, compiled
    torch._dynamo.reset()
    if recipe not in recipes._functions:  # nothing else holds it
        with pytest.raises(errors.Unsupported, match="changed by hand"):
            dispatch.function_of(recipe)


# ---------------------------------------------------------------------------------------------------------------------
# Derivatives


def derivable(f: Function, args: list[Any]) -> bool:
    """Whether an output is float and an input asks for a gradient."""
    return any(isinstance(a, Tensor) and a.requires_grad for a in args) and any(r.requires_grad for r in several(f(*args)))


def test_gradcheck(name: str) -> None:
    f, args = case(name)
    if not derivable(f, args):
        pytest.skip("nothing to differentiate")
    everything = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True, "check_undefined_grad": True}
    assert torch.autograd.gradcheck(f, args, **everything)


def test_gradgradcheck(name: str, request: pytest.FixtureRequest) -> None:
    f, args = case(name)
    if not derivable(f, args):
        pytest.skip("nothing to differentiate")
    small = request.config.getoption("--all-targets") or sum(a.numel() for a in args if isinstance(a, Tensor)) < 120
    if not small:
        pytest.skip("larger ones under --all-targets")
    assert torch.autograd.gradgradcheck(f, args)


LINEAR = "def linear(X[n,k], W[m,k], b[m]) -> Y[n,m]:\n    Z[n,m] += X[n,k] * W[m,k]\n    Y[n,m] = tanh(Z[n,m] + b[m])"


def linear_pair() -> tuple[Function, Callable[..., Tensor], tuple[Tensor, ...]]:
    """The same layer by tdsl and by torch, and arguments."""
    args = tuple(torch.randn(shape, dtype=torch.float64) for shape in ((5, 3), (4, 3), (4,)))
    return tdsl.function(LINEAR), lambda X, W, b: torch.tanh(X @ W.T + b), args


def transforms(f: Callable[..., Tensor]) -> dict[str, Callable[..., Any]]:
    """Programs of torch.func over a layer."""
    func = torch.func

    def loss(*args: Tensor) -> Tensor:
        return f(*args).square().sum()

    return {
        "grad": func.grad(loss, (0, 1, 2)),
        "vjp": lambda X, W, b: func.vjp(f, X, W, b)[1](torch.ones(5, 4, dtype=X.dtype)),
        "jacrev": lambda X, W, b: func.jacrev(f, 1)(X, W, b),
        "jacfwd": lambda X, W, b: func.jacfwd(f, 1)(X, W, b),
        "jvp": lambda X, W, b: func.jvp(f, (X, W, b), (X + 1, W, b))[1],
        "jvp of one": lambda X, W, b: func.jvp(lambda w: f(X, w, b), (W,), (W,))[1],
        "hessian": func.hessian(loss, 1),
        "forward over reverse": lambda X, W, b: func.jvp(lambda w: func.grad(loss, 1)(X, w, b), (W,), (W + 1,))[1],
        "reverse over reverse": lambda X, W, b: func.grad(lambda w: func.grad(loss, 1)(X, w, b).square().sum())(W),
        "vmap": lambda X, W, b: func.vmap(f, (0, None, None))(torch.stack([X, 2 * X]), W, b),
        "vmap along others": lambda X, W, b: func.vmap(f, (None, 1, -1))(X, torch.stack([W, -W], 1), torch.stack([b, -b], -1)),
        "vmap of vmap": lambda X, W, b: func.vmap(func.vmap(f, (0, None, None)), (None, 0, None))(
            torch.stack([X, -X]), torch.stack([W, W]), b
        ),
        "per-sample gradients": lambda X, W, b: func.vmap(func.grad(lambda w, x: loss(x[None], w, b)), (None, 0))(W, X),
    }


TRANSFORMS = tuple(transforms(lambda *_: torch.zeros(())))


@pytest.mark.parametrize("what", TRANSFORMS)
def test_torch_func(what: str) -> None:
    f, by_hand, args = linear_pair()
    torch.testing.assert_close(transforms(f)[what](*args), transforms(by_hand)[what](*args))


@pytest.mark.parametrize("what", TRANSFORMS)
def test_torch_func_inside_a_graph(what: str) -> None:
    f, by_hand, args = linear_pair()
    compiled = torch.compile(transforms(f)[what], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), transforms(by_hand)[what](*args))


def test_under_torch_func_nothing_is_computed_twice() -> None:
    text = "def f(x[n,i], w[o,i]) -> Y: Z[n,o] += x[n,i] * w[o,i]; P[n,o] = softmax[o](Z[n,o]); Y += P[n,o] * P[n,o]"
    f = tdsl.function(text)
    x, w = torch.randn(4, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)

    def plain(x: Tensor, w: Tensor) -> Tensor:
        return (x @ w.T).softmax(-1).square().sum()

    for wrt in (1, (0, 1)):
        torch.testing.assert_close(torch.func.grad(f, wrt)(x, w), torch.func.grad(plain, wrt)(x, w))
    value, pull = torch.func.vjp(f, x, w)
    torch.testing.assert_close(pull(torch.ones_like(value)), torch.func.grad(plain, (0, 1))(x, w))
    again = [grad.executor for grad in f._gradients.values()]
    assert again and not any(executor._compiled for executor in again)  # the gradient from the inputs alone never ran
    for nested in (
        lambda g: torch.func.hessian(g, 1)(x, w),
        lambda g: torch.func.grad(lambda w: torch.func.grad(g)(x, w).square().sum())(w),
    ):
        torch.testing.assert_close(nested(f), nested(plain))
    batched = torch.func.vmap(torch.func.grad(f), (0, None))
    torch.testing.assert_close(batched(x[:, None], w), torch.func.vmap(torch.func.grad(plain), (0, None))(x[:, None], w))
    w.requires_grad_()
    outer = [torch.autograd.grad(torch.func.grad(g)(x, w).square().sum(), w)[0] for g in (f, plain)]
    torch.testing.assert_close(*outer)


def test_vmap_adds_an_index_and_loops_over_nothing() -> None:
    f, _, (X, W, b) = linear_pair()
    torch.func.vmap(f, (0, None, None))(torch.stack([X, X]), W, b)
    assert str(f.vmap((0, None, None)).program).startswith("def linear_vmap(X[n2,n,k], W[m,k], b[m])")


def test_forward_mode_on_dual_tensors() -> None:
    f, by_hand, (X, W, b) = linear_pair()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(W.requires_grad_(), 2 * W.detach())
        found, wanted = (forward_ad.unpack_dual(g(X, dual, b)).tangent for g in (f, by_hand))
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(torch.autograd.grad(found.sum(), W), torch.autograd.grad(wanted.sum(), W))


def test_forward_mode_inside_itself_is_an_error_and_no_zero() -> None:
    f, _, (X, W, b) = linear_pair()
    nested = torch.func.jacfwd(torch.func.jacfwd(lambda w: f(X, w, b).sum()))
    with pytest.raises(errors.Unsupported, match="forward mode inside forward mode"):
        nested(W)


@pytest.mark.parametrize("forward", ["eager", "compiled"])
def test_compiled_autograd(forward: str) -> None:
    f, by_hand, args = linear_pair()
    g = f if forward == "eager" else torch.compile(f, fullgraph=True, backend="aot_eager")
    leaves = [a.clone().requires_grad_() for a in args]
    loss = g(*leaves).square().sum()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        loss.backward()
    wanted = torch.func.grad(lambda *a: by_hand(*a).square().sum(), (0, 1, 2))(*args)
    torch.testing.assert_close([leaf.grad for leaf in leaves], list(wanted))


def test_the_older_functions_of_torch_autograd() -> None:
    f, by_hand, args = linear_pair()
    for options in ({}, {"vectorize": True}, {"vectorize": True, "strategy": "forward-mode"}):
        found, wanted = (torch.autograd.functional.jacobian(g, args, **options) for g in (f, by_hand))
        torch.testing.assert_close(found, wanted)
    scalar = [lambda *a, g=g: g(*a).square().sum() for g in (f, by_hand)]
    torch.testing.assert_close(torch.autograd.functional.hessian(scalar[0], args), torch.autograd.functional.hessian(scalar[1], args))


def test_a_graph_of_another_version_is_refused() -> None:
    f = tdsl.function("P[n,c] = softmax[c](X[n,c])")
    trained = f.recorded_by([torch.randn(3, 4, requires_grad=True)])
    assert trained is not None
    recipe = trained.halves(frozenset()).forward.recipe
    assert '"crossing"' in recipe and dispatch.executor_of(recipe) is trained.halves(frozenset()).forward
    with pytest.raises(errors.Unsupported, match="another version of tdsl"):
        dispatch.executor_of(recipe.replace('"crossing": [', '"crossing": ["P.older", '))
