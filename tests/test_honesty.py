"""The plan is what runs: launches, pointers, allocations; nothing runs beside it."""

from __future__ import annotations

import contextlib
import inspect
import re
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from torch.utils._python_dispatch import TorchDispatchMode

import tdsl
from lowering import triton_launch
from tdsl import reference
from tdsl.arguments import layout
from tdsl.errors import Unsupported
from tdsl.ir import Loop, Program
from tdsl.runtime import Executor
from tdsl.swap import differentiable
from tests.corpus import CORPUS
from tests.programs import arguments, cotangents, expected, gradient_of, program_of

PROGRAMS = [(name, order) for name in CORPUS for order in (0, 1)]


def prepared(name: str, order: int) -> tuple[Program, list[Any]]:
    """A program of the corpus or its gradient, with arguments; skips what has none, and ordered loops, whose kernels run many times."""
    program = program_of(name)
    args = arguments(program, CORPUS[name])
    if any(isinstance(node, Loop) for node in program.body):
        pytest.skip("an ordered loop launches per step")
    if order == 0:
        return program, args
    if not differentiable(program):
        pytest.skip("no gradient")
    try:
        return gradient_of(name), cotangents(gradient_of(name), args, expected(program, args))
    except Unsupported:
        pytest.skip("no gradient yet")


@contextlib.contextmanager
def no_torch_printer(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from lowering.torch_source import torch_source

    def refuse(*_: Any, **__: Any) -> str:
        raise AssertionError("the torch printer ran under backend='triton'")

    users = [module for name, module in sys.modules.items() if name.startswith(("lowering", "tdsl")) and getattr(module, "torch_source", None) is torch_source]
    assert users
    with monkeypatch.context() as m:
        for module in users:
            m.setattr(module, "torch_source", refuse)
        yield


class Allocations(TorchDispatchMode):
    """Counts the tensors that torch's factories make, by shape and dtype."""

    FACTORIES = frozenset({torch.ops.aten.empty, torch.ops.aten.empty_strided, torch.ops.aten.new_empty_strided, torch.ops.aten.full})

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[tuple[tuple[int, ...], torch.dtype]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func.overloadpacket in self.FACTORIES:
            assert not torch.is_grad_enabled()
            self.counted[tuple(made.shape), made.dtype] += 1
        return made


@pytest.mark.parametrize(("name", "order"), PROGRAMS)
def test_the_plan_is_what_is_launched(name: str, order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    program, args = prepared(name, order)
    executor = Executor(program, "triton")
    launches: list[triton_launch.Launch] = []
    allocations = Allocations()

    with no_torch_printer(monkeypatch):
        found = layout(program, args, executor.integers)
        try:
            state = executor.lower(found, "cuda:90")
        except Unsupported:
            pytest.skip("not compiled yet")
        plan = state.plan
        assert plan is not None
        executor(args)  # compiles; what is counted is a second call
        with triton_launch.on_launch(launches.append), allocations:
            results = executor(args)

    # launches
    running = [k for k, step in zip(plan.kernels, state.steps, strict=True) if step.tile.programs]
    assert [launch.kernel.name for launch in launches] == [k.name for k in running]
    assert all(launch.interpreted for launch in launches)

    # pointers
    outside = {*state.program.inputs, *state.program.results}
    for step in state.steps:
        for buffer in step.tile.buffers:
            assert buffer.tensor in outside or buffer.tensor in plan.memory, f"{buffer.tensor} is a pointer of {step.tile.name}, but not in plan.memory"
    assert not set(plan.memory) & outside

    # allocations: the outputs that are no inputs, and what the plan keeps in memory
    def size(tensor: str) -> tuple[tuple[int, ...], torch.dtype]:
        return tuple(state.shape_of(tensor)), getattr(torch, state.stored.get(tensor, state.dtypes[tensor]))

    made = [t for t in dict.fromkeys(state.program.results) if t not in state.program.inputs]
    asked = Counter(size(t) for t in (*made, *plan.memory))
    allocated = allocations.counted
    beside = allocated - asked
    assert not beside or all(shape == () for shape, _ in beside), f"allocated beside the plan: {beside}"
    assert not asked - allocated, f"in the plan, but never allocated: {asked - allocated}"
    assert {t: plan.memory[t] for t in plan.memory} == {
        t: size(t)[1].itemsize * torch.Size(size(t)[0]).numel() for t in plan.memory
    }, "the plan's bytes are not those of the tensors"
    assert len(results) == len(program.outputs)
    assert not any(r.requires_grad for r in results)


@pytest.mark.parametrize("name", ["attention", "layernorm", "linear", "cross_entropy", "kernel_sum", "softmax"])
def test_training_launches_the_two_halves_of_one_plan(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward through autograd: as many launches as the cut programs have kernels, and no torch code."""
    program = program_of(name)
    args = [a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments(program, CORPUS[name])]
    f = tdsl.function(program, backend="triton")
    forward: list[str] = []
    backward: list[str] = []
    with no_torch_printer(monkeypatch):
        with triton_launch.on_launch(lambda launch: forward.append(launch.kernel.name)):
            result = f(*args)
        with triton_launch.on_launch(lambda launch: backward.append(launch.kernel.name)):
            result.sum().backward()
    assert len(forward) == len(set(forward)) > 0
    assert len(backward) == len(set(backward)) > 0
    inference = tdsl.function(program, backend="triton").plan(*[a.detach() if isinstance(a, torch.Tensor) else a for a in args], target="cuda:90")
    assert len(inference.kernels) <= len(forward)


def test_what_a_call_saves_is_what_the_cut_says() -> None:
    """Residuals: nothing of the size of the scores is kept by attention."""
    program = program_of("attention")
    q, k, v = (torch.randn(2, n, 8, requires_grad=True) for n in (33, 47, 47))
    kept: list[tuple[int, ...]] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept.append(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        tdsl.function(program, backend="triton")(q, k, v, 0.3)
    assert kept
    assert (2, 33, 47) not in kept


def test_the_reference_is_loops() -> None:
    text = inspect.getsource(reference)
    code = re.sub(r'""".*?"""|#[^\n]*', "", text, flags=re.DOTALL)
    assert not re.search(r"einsum|matmul|tensordot|\.dot\(|np\.(inner|outer|sum|prod|max\(|amax|cumsum)|torch|\s@\s", code)
    for name, case in CORPUS.items():
        program = program_of(name)
        found = layout(program, arguments(program, case))
        source = reference.source(program, found.specs, found.values)
        assert not re.search(r"einsum|matmul|\.dot\(|\s@\s|np\.sum|\[:", source), source


def test_no_rule_is_keyed_to_a_name() -> None:
    """Nothing between a program and its kernels knows functions or programs by name, except to print them."""
    from lowering import plan, stream

    for module in (plan, stream):
        code = re.sub(r'""".*?"""|#[^\n]*', "", inspect.getsource(module), flags=re.DOTALL)
        assert not re.search(r"['\"](exp|exp2|log|softmax|attention|layernorm|tanh|sigmoid)['\"]", code), module.__name__
