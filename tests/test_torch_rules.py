"""The rules of PyTorch around a call: what is saved and kept, in-place changes, checkpoints, threads, modules, several processes, order."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import tdsl
from lowering.triton_launch import Launch, on_launch
from tdsl import errors
from tdsl.function import Function
from tdsl.quick import test_of as argument_test
from tests.corpus import CORPUS
from tests.programs import arguments, program_of

LINEAR = "def linear(X[n,k], W[m,k], b[m]) -> Y[n,m]:\n    Z[n,m] += X[n,k] * W[m,k]\n    Y[n,m] = tanh(Z[n,m] + b[m])"
TWO = "def two(x[n], w[n]) -> a[n], b[n]:\n    a[i] = exp(x[i]) * w[i]\n    b[i] = tanh(x[i])"
SCATTER = "def count(dst[e], m[e,d], N) -> Y[N,d]: Y[dst[e],d] += m[e,d]"


def linear() -> tuple[Function, list[Tensor]]:
    """A layer, and arguments that ask for gradients."""
    return tdsl.function(LINEAR), [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 3), (4, 3), (4,))]


def by_hand(X: Tensor, W: Tensor, b: Tensor) -> Tensor:
    """The same layer in torch."""
    return torch.tanh(X @ W.T + b)


def gradients(f: Any, args: list[Tensor]) -> list[Tensor]:
    """Of a sum of squares."""
    return list(torch.autograd.grad(f(*args).square().sum(), args))


# ---------------------------------------------------------------------------------------------------------------------
# What is computed


def test_nothing_is_made_for_autograd_where_no_gradient_is_asked_for() -> None:
    f, args = linear()
    plain = [a.detach() for a in args]
    assert f(*plain).grad_fn is None
    with torch.no_grad():
        assert f(*args).grad_fn is None
    with torch.inference_mode():
        assert f(*args).is_inference()
    assert f._training == {}


def test_only_gradients_that_are_asked_for_are_computed() -> None:
    f, (X, W, b) = linear()
    f(X.detach(), W, b.detach()).sum().backward()
    (trained,) = f._training.values()
    assert trained is not None and trained.wrt == ("W",)
    (halves,) = trained._halves.values()
    assert halves.parts.backward.results == ("W.grad",)


def test_a_gradient_that_is_the_cotangent_is_not_copied() -> None:
    f = tdsl.function("Z[n,m] += X[n,k] * W[m,k]; Y[n,m] = gelu(Z[n,m]) + R[n,m]; s[n] = c[n]")
    args = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 4), (5, 4), (3, 5), (3,))]
    outputs = f(*args)
    cotangents = [torch.randn_like(y) for y in outputs]
    grads = torch.autograd.grad(outputs, args, cotangents)
    assert grads[2] is cotangents[0] and grads[3] is cotangents[1]
    (trained,) = f._training.values()
    (halves,) = trained._halves.values()
    assert halves.parts.backward.results == ("X.grad", "W.grad")
    assert torch.autograd.gradcheck(f, args) and torch.autograd.gradgradcheck(f, args)
    (alone,) = torch.autograd.grad(f(*args)[1].sum(), args[3])
    assert torch.equal(alone, torch.ones_like(alone))
    half = [a.detach().half().requires_grad_(n == 2) for n, a in enumerate(args)]
    (mixed,) = torch.autograd.grad(f(args[0].detach(), args[1].detach(), half[2], args[3].detach())[0].sum(), half[2])
    assert mixed.dtype is torch.float16 and torch.equal(mixed, torch.ones_like(mixed))
    turned = tdsl.function("Y[i,j] = R[j,i] * 1 + A[i,j]")
    a, r = (torch.randn(shape, requires_grad=True) for shape in ((2, 3), (3, 2)))
    g = torch.randn(2, 3)
    assert torch.equal(torch.autograd.grad(turned(r, a), r, g)[0], g.T)


def test_an_output_that_is_not_used_costs_nothing() -> None:
    f = tdsl.function(TWO)
    x, w = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    _, b = f(x, w)
    b.sum().backward()
    assert w.grad is None
    torch.testing.assert_close(x.grad, 1 - torch.tanh(x.detach()) ** 2)
    (trained,) = f._training.values()
    assert trained is not None
    (halves,) = trained._halves.values()
    backward = halves._backward[((), ("b",))]
    assert backward.executor is not None
    assert [p.name for p in backward.executor.program.params if p.name.endswith(".grad")] == ["b.grad"]
    assert "exp" not in str(backward.executor.program)


@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("name", ["two_results", "argmax", "agree_by_name", "concatenate"])
def test_any_subset_of_outputs(name: str, used: tuple[int, ...]) -> None:
    f = Function(program_of(name))
    reference = Function(program_of(name), "reference")
    args = [a.clone() for a in arguments(f.program, CORPUS[name], torch.float64)]
    found = []
    for g in (f, reference):
        leaves = [a.clone().requires_grad_() for a in args]
        results = g(*leaves)
        results = results if isinstance(results, tuple) else (results,)
        chosen = [results[n] for n in used if n < len(results) and results[n].requires_grad]
        if not chosen:
            return
        found.append(torch.autograd.grad([c.sum() for c in chosen], leaves, allow_unused=True, materialize_grads=True))
    torch.testing.assert_close(*found)


def test_an_input_that_nothing_depends_on_has_no_gradient() -> None:
    f = Function(program_of("unused"))
    x, y = torch.randn(5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    f(x, y, 1.0).sum().backward()
    assert y.grad is None
    torch.testing.assert_close(x.grad, torch.full((5,), 2.0))


@pytest.mark.parametrize("how", ["sum", "transposed", "sliced", "double"])
def test_cotangents_of_any_strides_and_dtypes(how: str) -> None:
    f, args = linear()
    cotangent = {
        "sum": torch.ones((), dtype=torch.float64).expand(5, 4),
        "transposed": torch.randn(4, 5, dtype=torch.float64).T,
        "sliced": torch.randn(5, 8, dtype=torch.float64)[:, ::2],
        "double": torch.randn(10, 4, dtype=torch.float64).as_strided((5, 4), (1, 1)),
    }[how]
    found, wanted = (torch.autograd.grad(g(*args), args, cotangent) for g in (f, by_hand))
    torch.testing.assert_close(found, wanted)


# ---------------------------------------------------------------------------------------------------------------------
# What is kept


def test_in_place_changes_of_what_is_saved_raise_as_in_torch() -> None:
    f, (X, W, b) = linear()
    inner = X * 1
    y = f(inner, W, b)
    inner.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y = f(X, W, b)
    y.mul_(2)  # the gradient of tanh reads its result
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_in_place_changes_of_what_nothing_reads_are_fine() -> None:
    f = tdsl.function("Y[i] = 2 * x[i] + z[i]")
    x = torch.randn(5, requires_grad=True)
    inner = x * 1
    y = f(inner, torch.randn(5))
    inner.add_(1)
    y.mul_(3)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.full((5,), 6.0))


def test_inputs_that_no_gradient_reads_are_not_kept() -> None:
    f = tdsl.function("Y[i] = 2 * x[i] + z[i]")
    z = torch.randn(5)
    gone = weakref.ref(z)
    y = f(torch.randn(5, requires_grad=True), z)
    del z
    gc.collect()
    assert gone() is None
    y.sum().backward()


def test_backward_frees_what_was_saved() -> None:
    f, args = linear()
    y = f(*args).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward()


def test_saved_tensor_hooks_see_everything_that_is_saved() -> None:
    f, args = linear()
    packed: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        packed.append(t)
        return t.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        found = gradients(f, args)
    assert len(packed) >= 3
    torch.testing.assert_close(found, gradients(by_hand, args))
    with torch.autograd.graph.save_on_cpu():
        torch.testing.assert_close(gradients(f, args), gradients(by_hand, args))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    f, args = linear()
    runs = 0

    def block(X: Tensor, W: Tensor, b: Tensor) -> Tensor:
        nonlocal runs
        runs += 1
        return f(f(X, W, b)[:, :3], W, b)

    def checkpointed(*a: Tensor) -> Tensor:
        return checkpoint(block, *a, use_reentrant=reentrant)  # type: ignore[no-any-return]

    def loss_gradients(g: Any) -> list[Tensor | None]:
        leaves = [a.detach().clone().requires_grad_() for a in args]
        g(*leaves).square().sum().backward()
        return [leaf.grad for leaf in leaves]

    torch.testing.assert_close(loss_gradients(checkpointed), loss_gradients(block))
    assert runs == 3


def test_selective_checkpointing_sees_the_operator() -> None:
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    f, args = linear()
    seen = []

    def policy(_: Any, op: Any, *__: Any, **___: Any) -> CheckpointPolicy:
        seen.append(str(op))
        return CheckpointPolicy.MUST_SAVE

    y = checkpoint(f, *args, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy))
    found = torch.autograd.grad(y.square().sum(), args)
    assert "tdsl.run.default" in seen
    torch.testing.assert_close(list(found), gradients(by_hand, args))


def test_outputs_share_no_memory_with_arguments_or_each_other() -> None:
    for name in CORPUS:
        f = Function(program_of(name))
        args = arguments(f.program, CORPUS[name])
        results = f(*args)
        results = results if isinstance(results, tuple) else (results,)
        places = [t.untyped_storage().data_ptr() for t in results if t.numel()]
        taken = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        assert len({*places}) == len(places) and not taken & {*places}, name


def test_out_takes_the_result() -> None:
    f, args = linear()
    plain = [a.detach() for a in args]
    out = torch.empty(5, 4, dtype=torch.float64)
    assert f(*plain, out=out) is out
    torch.testing.assert_close(out, by_hand(*plain))
    view = torch.zeros(4, 10, dtype=torch.float64)[:, ::2].T
    f(*plain, out=view)
    torch.testing.assert_close(view, by_hand(*plain))
    square = tdsl.function("Y[i,j] += A[i,k] * A[k,j]")
    a = torch.randn(3, 3)
    wanted = a @ a
    torch.testing.assert_close(square(a, out=a), wanted)  # an argument may take the result
    two = tdsl.function(TWO)
    pair = (torch.empty(5), torch.empty(5))
    x, w = torch.randn(5), torch.randn(5)
    assert two(x, w, out=pair) is pair
    torch.testing.assert_close(pair, two(x, w))
    with pytest.raises(errors.ArgumentError, match=r"float32\[5, 4\].* but Y is float64"):
        f(*plain, out=torch.empty(5, 4))
    with pytest.raises(errors.ArgumentError, match="requires a gradient"):
        f(*args, out=out)
    named = tdsl.function("Y[i] = 2 * out[i]")
    torch.testing.assert_close(named(out=x), 2 * x)


# ---------------------------------------------------------------------------------------------------------------------
# Threads, copies, modules, processes


def test_threads_that_compile_and_call_the_same_function() -> None:
    f, _ = linear()
    found: list[bool] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for n in range(1, 9):
            args = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in ((n, 3), (4, 3), (4,))]
            found.append(all(torch.allclose(a, b) for a, b in zip(gradients(f, args), gradients(by_hand, args), strict=True)))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 32


def test_copies_of_a_function() -> None:
    f, args = linear()
    again = pickle.loads(pickle.dumps(f))
    assert (again.program, again.backend) == (f.program, f.backend)
    torch.testing.assert_close(gradients(again, args), gradients(f, args))
    assert copy.deepcopy(f) is f and copy.copy(f) is f


class Model(torch.nn.Module):
    """Two layers whose math is one Function."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = tdsl.function(LINEAR)
        self.weights = torch.nn.ParameterList([torch.randn(3, 3) for _ in range(2)])
        self.bias = torch.nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        for w in self.weights:
            x = self.layer(x, w, self.bias)
        return x


def test_a_function_in_a_module() -> None:
    model = Model()
    assert set(model.state_dict()) == {"weights.0", "weights.1", "bias"}
    x = torch.randn(5, 3)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(x), model(x))
        other.bias.data.zero_()
        other.load_state_dict(model.state_dict())
        torch.testing.assert_close(other(x), model(x))
    assert model.double()(x.double()).dtype == torch.float64
    assert torch.func.functional_call(model, dict(model.named_parameters()), (x.double(),)).shape == (5, 3)


def distributed(rank: int, folder: str) -> None:
    """One of two processes: DDP, then FSDP2, against the same steps on the whole batch."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    model, batch = Model(), torch.randn(4, 3)
    whole = copy.deepcopy(model)
    whole(batch).square().mean().backward()
    half = batch[2 * rank : 2 * rank + 2]

    replicated = DistributedDataParallel(copy.deepcopy(model))
    replicated(half).square().mean().backward()
    for a, b in zip(replicated.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)

    sharded = copy.deepcopy(model)
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
    sharded(half).square().mean().backward()
    for a, b in zip(sharded.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a.grad.full_tensor(), b.grad)  # type: ignore[union-attr]
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # an interpreter that winds down is aborted by a thread of gloo's now and then


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_two_processes_with_ddp_and_fsdp(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(distributed, args=(str(tmp_path),), nprocs=2)


# ---------------------------------------------------------------------------------------------------------------------
# Calls like one before, which go past all look-ups


@pytest.mark.parametrize(
    "text, args, expected",
    [
        ("y[i] = x[i] * a[i] + b[i]", (4, 4, 4), lambda x, a, b: x * a + b),
        ("y[i] = b[i] + a[i] * x[i]", (4, 4, 4), lambda b, a, x: b + a * x),
        ("Y[i] = tanh(scale * x[i]) + i // n", (0.5, 4, 3), lambda s, x, n: torch.tanh(s * x) + torch.arange(4) // n),
        ("Y[i] = exp(x[i] * x[i]) * w[i]", (4, 4), lambda x, w: torch.exp(x * x) * w),
        ("Y[i] = x[i] + x[i]", (4,), lambda x: x + x),
        ("h[i] += x[i] * exp(a[k]); Y[i] = tanh(h[i]) * a[i]", (4, 4), lambda x, a: torch.tanh(x * a.exp().sum()) * a),
        ("P[i] = sigmoid(x[i]); Y[i] = P[i] * a[i]; Z[i] = P[i] - a[i]", (4, 4), lambda x, a: (torch.sigmoid(x) * a, torch.sigmoid(x) - a)),
    ],
)
def test_what_backward_reads_stays_in_its_place(text: str, args: tuple[Any, ...], expected: Callable[..., Any]) -> None:
    """Inputs that no gradient reads, Python numbers, outputs and residuals, in every repetition of a call."""
    f = tdsl.function(text)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        given = [torch.randn(a, generator=generator, requires_grad=True) if a == 4 else a for a in args]
        tensors = [a for a in given if isinstance(a, torch.Tensor)]
        actual, wanted = f(*given), expected(*given)
        cotangents = [torch.randn(4, generator=generator) for _ in (wanted if isinstance(wanted, tuple) else (wanted,))]
        torch.testing.assert_close(actual, wanted)
        gradients = (torch.autograd.grad(made, tensors, cotangents) for made in (actual, wanted))
        torch.testing.assert_close(*gradients)


def test_an_executor_looks_up_what_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced graphs call executors: what is like a call before is not looked up, and whatever code depends on is noticed."""
    executor = tdsl.function("def first(x[n], m, s) -> Y[m]:\n    for i in 0:m:  Y[i] = s * x[i]").executor
    looked_up: list[Any] = []
    find = executor.find
    monkeypatch.setattr(executor, "find", lambda args: looked_up.append(args) or find(args))

    def run(x: Tensor, m: int, s: float = 2.0) -> int:
        looked_up.clear()
        torch.testing.assert_close(executor([x, m, s])[0], s * x[:m])
        return len(looked_up)

    x = torch.randn(8)
    assert [run(x, 3) for _ in range(4)] == [1, 1, 0, 0]
    assert run(torch.randn(8), 3, 0.5) == 0
    others: list[tuple[Tensor, int]] = [(x, 4), (x.double(), 3), (torch.randn(16)[::2], 3), (torch.randn(9), 3)]
    for other in others:
        assert run(*other) == 1
    assert run(x, 3) == 0
    torch.use_deterministic_algorithms(True)
    try:
        assert run(x, 3) == 1
    finally:
        torch.use_deterministic_algorithms(False)
    with tdsl.config.using(cpu="torch"):
        assert run(x, 3) == 1
    with pytest.raises(errors.ArgumentError):
        executor([x, 3])
    scalar = tdsl.function("def first(x[n], m) -> Y[m]:\n    for i in 0:m:  Y[i] = x[i]").executor
    for m in (3, 3, 3, 4):  # a tensor whose value is a size
        torch.testing.assert_close(scalar([x, torch.tensor(m)])[0], x[:m])


def test_tensors_that_outlived_a_transform() -> None:
    """They stand for what they wrap; no test of arguments is made of them, since torch.func is not at work any more."""
    kept: list[torch.Tensor] = []
    x, w = torch.randn(4, 5), torch.randn(5, requires_grad=True)
    torch.func.grad(lambda x: (kept.append(x), x.sum())[1])(x)
    f = tdsl.function("Y[n,c] = X[n,c] * w[c]")
    for _ in range(4):
        (gradient,) = torch.autograd.grad(f(kept[0], w).sum(), w)
        torch.testing.assert_close(gradient, x.sum(0))
    assert argument_test([w]) is not None
    assert argument_test([kept[0], w]) is None


def test_hooks_and_anomaly_mode_see_the_node() -> None:
    x = torch.randn(4, requires_grad=True)
    f = tdsl.function("y[i] = x[i] * x[i]")
    for _ in range(4):
        seen: list[Any] = []
        y = f(x)
        y.grad_fn.register_hook(lambda out, given, seen=seen: seen.append((out, given)))
        y.grad_fn.register_prehook(lambda given: (2 * given[0],))
        with torch.autograd.set_detect_anomaly(True, check_nan=False):
            (gradient,) = torch.autograd.grad(y, x, torch.ones(4), create_graph=True)
        torch.testing.assert_close(gradient, 4 * x)
        assert len(seen) == 1
        torch.testing.assert_close(torch.autograd.grad(gradient.sum(), x), (torch.full((4,), 4.0),))


# ---------------------------------------------------------------------------------------------------------------------
# Order


@pytest.fixture
def deterministic() -> Any:
    """torch.use_deterministic_algorithms(True), for one test."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_scatter_adds_by_atomics_on_a_gpu() -> None:
    pytest.importorskip("triton")
    launches: list[Launch] = []
    with on_launch(launches.append):
        tdsl.function(SCATTER, backend="triton")(torch.randint(0, 5, (40,)), torch.randn(40, 3), 5)
    assert len(launches) == 1 and "atomic_add" in launches[0].kernel.source


def test_deterministic_mode_adds_in_one_order(deterministic: None) -> None:
    pytest.importorskip("triton")
    dst, m = torch.randint(0, 5, (40,)), torch.randn(40, 3, requires_grad=True)
    wanted = torch.zeros(5, 3).index_add(0, dst, m)
    launches: list[Launch] = []
    with on_launch(launches.append):
        f = tdsl.function(SCATTER, backend="triton")
        torch.testing.assert_close(f(dst, m, 5), wanted)
        gather = tdsl.function("Y[b,d] = E[ids[b],d]", backend="triton")
        gather(dst, m) if gather.program.inputs[0] == "ids" else gather(m, dst).sum().backward()
        torch.testing.assert_close(m.grad, torch.zeros(40, 3).index_add(0, dst, torch.ones(40, 3)))
    assert not any("atomic_add" in launch.kernel.source for launch in launches)


def test_deterministic_mode_keeps_kernels_whose_order_does_not_matter(deterministic: None) -> None:
    pytest.importorskip("triton")
    launches: list[Launch] = []
    with on_launch(launches.append):
        tdsl.function("Y[i,j] += A[i,k] * B[k,j]", backend="triton")(torch.randn(3, 4), torch.randn(4, 5))
    assert len(launches) == 1
