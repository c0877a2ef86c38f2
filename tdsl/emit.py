"""The text of a stage: of a program, its gradient, plan and kernels, and of what their compilers make of these."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lowering.cpp_source import cpp_module
from lowering.report import machine_text
from lowering.targets import Pays
from tdsl.arguments import layout
from tdsl.errors import ArgumentError, Unsupported
from tdsl.lowered import Runnable, lowered

KINDS = ("program", "gradient", "plan", "triton", "ttir", "ttgir", "llir", "ptx", "amdgcn", "sass", "torch", "c++", "mlir")


def emit(function: Runnable, kind: str, args: Sequence[Any], target: str | None = None, *, gradient: bool = False) -> str:
    """The text that `Function.emit` gives. Raises ArgumentError for a kind that is none."""
    program, executor = function.program, function.executor
    if kind == "program":
        return str(program)
    if kind == "gradient":
        return str(function.grad().program)
    if kind == "mlir":
        raise Unsupported("MLIR is not printed yet (mlir_source)", help=f"kinds: {', '.join(k for k in KINDS if k != 'mlir')}")
    if kind not in KINDS:
        raise ArgumentError(f"no stage is called {kind!r}", help=f"kinds: {', '.join(KINDS)}")
    if kind == "torch":
        return executor.lower(layout(program, args, executor.integers), "cpu", cpp=None).text
    if kind == "c++":
        state = executor.lower(layout(program, args, executor.integers), "cpu", cpp=Pays())  # whatever the sizes
        return cpp_module([step.cpp for step in state.steps if step.cpp is not None]) + "\n/*\n" + state.text + "*/\n"
    target = target or function.target_for(args)
    if kind == "plan":
        return str(function.lower(*args, target=target).plan)
    state = function.lower(*args, target="cuda:90" if target == "cpu" else target)
    if kind != "triton":
        return machine_text(state, kind)
    if not gradient:
        return state.text
    parts = lowered(function, args, state.target.name, gradient=True)
    return "\n\n".join(f"# {part.title}\n\n{part.state.text}" for part in parts)
