"""Function: what users hold. A program that is called on torch tensors, differentiated, and looked at stage by stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from lowering.compiler import State
from lowering.plan import Plan
from lowering.schedule import Schedule
from lowering.targets import find_target
from tdsl.arguments import layout
from tdsl.autograd import Differentiable
from tdsl.batch import Dims, batch
from tdsl.config import config
from tdsl.define import define_grad
from tdsl.errors import ArgumentError, Unsupported
from tdsl.ir import Program
from tdsl.runtime import Executor, target_of
from tdsl.signature import place_of, place_of_inputs
from tdsl.swap import gradient
from tdsl.tangent import tangent
from tdsl.text import parse

KINDS = ("program", "gradient", "plan", "triton", "ttir", "ttgir", "llir", "ptx", "amdgcn", "sass", "torch", "c++", "mlir")


class Function:
    """A differentiable function of torch tensors, made from a program.

    Called with one argument per parameter (tensors of any strides, or Python numbers for scalars) it returns a tensor, or a
    tuple of them where the program has several outputs. Gradients of any order go through torch's graph.
    """

    def __init__(self, program: Program, backend: str | None = None):
        self._program = program
        self._backend = backend or config.backend
        self._executor = Executor(program, self._backend)
        self._training: dict[object, Differentiable | None] = {}
        self._gradients: dict[object, Function] = {}
        self._single = len(program.outputs) == 1
        self.__name__ = program.name
        self.__doc__ = str(program)

    @property
    def program(self) -> Program:
        """The program; `str()` of it is the notation."""
        return self._program

    @property
    def backend(self) -> str:
        """ "auto", "torch", "triton" or "reference"."""
        return self._backend

    def __repr__(self) -> str:
        return f"<tdsl.Function {self._program.name}>\n{self._program}"

    def __call__(self, *args: Any, **named: Any) -> Any:
        """The outputs. Raises tdsl.errors for arguments that do not fit; see design: sizes go by name, never by equal value."""
        if named:
            args = self._positional(args, named)
        if torch.is_grad_enabled():
            wrt = tuple(n for n, a in zip(self._program.inputs, args, strict=False) if isinstance(a, torch.Tensor) and a.requires_grad)
            differentiable = self._differentiable(wrt, args) if wrt else None
            if differentiable is not None:
                results = differentiable.apply(args)
                return results[0] if self._single else results
        results = self._executor(args)
        return results[0] if self._single else results

    def _positional(self, args: Sequence[Any], named: dict[str, Any]) -> tuple[Any, ...]:
        names = self._program.inputs
        unknown = [n for n in named if n not in names[len(args) :]]
        if unknown:
            what = "is given twice" if unknown[0] in names else f"is no parameter of {self._program.name}"
            raise ArgumentError(
                f"{unknown[0]} {what}", span=place_of_inputs(self._program), help=f"call it as {self._program.name}({', '.join(names)})"
            )
        missing = [n for n in names[len(args) :] if n not in named]
        if missing:
            raise ArgumentError(
                f"{self._program.name} lacks the argument {', '.join(missing)}",
                span=place_of(self._program, missing[0]),
                help=f"call it as {self._program.name}({', '.join(names)})",
            )
        return (*args, *(named[n] for n in names[len(args) :]))

    def _differentiable(self, wrt: tuple[str, ...], args: Sequence[Any]) -> Differentiable | None:
        """What runs a call that is recorded; None where no argument that asks for a gradient can have one."""
        fuses = self._executor.fuses(next(a.device for a in args if isinstance(a, torch.Tensor)))
        key = (wrt, fuses)
        if key not in self._training:
            possible = set(gradient_inputs(self._program))
            wrt = tuple(n for n in wrt if n in possible)
            made = Differentiable(self._executor, wrt, lambda *a: self.grad(wrt)(*a), fuses=fuses) if wrt else None
            self._training[key] = made
        return self._training[key]

    # -- transforms -----------------------------------------------------------------------------------------------------

    def grad(self, wrt: str | Sequence[str] | None = None) -> Function:
        """The gradient, a Function of the inputs and then `Y.grad` for each output, which returns `A.grad` for each float input
        (or for those in `wrt`). Its program is the swap rule's."""
        names = (wrt,) if isinstance(wrt, str) else None if wrt is None else tuple(wrt)
        if names not in self._gradients:
            self._gradients[names] = Function(gradient(self._program, names), self._backend)
        return self._gradients[names]

    def jvp(self, wrt: str | Sequence[str] | None = None) -> Function:
        """Forward mode: a Function of the inputs and then `A.dot` for each float input (or for those in `wrt`), which returns the
        tangent `Y.dot` of each output."""
        names = (wrt,) if isinstance(wrt, str) else None if wrt is None else tuple(wrt)
        return self._transformed(("jvp", names), lambda: tangent(self._program, names))

    def vmap(self, in_dims: Dims = 0, out_dims: Dims = 0) -> Function:
        """Batching by one more index, with the arguments of torch.func.vmap: dimensions per parameter and per output, None where
        there is no batch. Nothing loops."""
        ins, outs = (d if d is None or isinstance(d, int) else tuple(d) for d in (in_dims, out_dims))
        return self._transformed(("vmap", ins, outs), lambda: batch(self._program, ins, outs))

    def _transformed(self, key: object, make: Callable[[], Program]) -> Function:
        if key not in self._gradients:
            self._gradients[key] = Function(make(), self._backend)
        return self._gradients[key]

    def define_grad(self, tensor: str, text: str) -> None:
        """Puts statements of one's own in the place of those that the printed gradient has for an input; grad() and autograd use
        them from now on.

        They write `A.grad` from the inputs, the cotangents `Y.grad` and what the forward pass computes. Raises NameError_,
        RankMismatch or SizeMismatch, with the place, for a name that is not there or subscripts that do not fit.

        >>> f = function("Y[i] = x[i] * x[i]")
        >>> f.define_grad("x", "x.grad[i] = minimum(1.0, 2 * Y.grad[i] * x[i])")
        """
        self._program = define_grad(self._program, tensor, text)
        self._executor = Executor(self._program, self._backend, schedules=self._executor.schedules)
        self._training.clear()
        self._gradients.clear()

    # -- looking inside ---------------------------------------------------------------------------------------------------

    @property
    def executor(self) -> Executor:
        """What runs the program where no gradient is recorded."""
        return self._executor

    def lower(self, *args: Any, target: str | None = None) -> State:
        """Everything that the compiler finds for arguments: tensors, meta tensors, or strings such as "bf16[8,64]"."""
        found = layout(self._program, args, self._executor.integers)
        return self._executor.lower(found, find_target(target or self.target_for(args)).name)

    def target_for(self, args: Sequence[Any]) -> str:
        """The target that arguments are compiled for where none is named: their device's, and "cuda:90" for mere descriptions."""
        device = layout(self._program, args).device
        if device is None or device.type == "meta":
            return "cpu" if device is None and not any(isinstance(a, str) for a in args) and self._backend != "triton" else "cuda:90"
        return "cpu" if self._executor.backend_for(device) == "torch" else target_of(device)

    def plan(self, *args: Any, target: str | None = None) -> Plan:
        """The plan as data: `.kernels`, each with `.name .reads .writes .flops .bytes`, and `.memory`."""
        plan = self.lower(*args, target=target).plan
        assert plan is not None
        return plan

    def emit(self, kind: str, *args: Any, target: str | None = None) -> str:
        """The text of a stage: "program", "gradient", "plan", "triton", "ttir", "ttgir", "llir", "ptx", "amdgcn", "sass" or "torch".

        Kernels are compiled for `target` ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942"); no GPU is needed.
        """
        if kind == "program":
            return str(self._program)
        if kind == "gradient":
            return str(self.grad().program)
        if kind == "mlir":
            raise Unsupported("MLIR is not printed yet (mlir_source)", help=f"kinds: {', '.join(k for k in KINDS if k != 'mlir')}")
        if kind not in KINDS:
            raise ArgumentError(f"no stage is called {kind!r}", help=f"kinds: {', '.join(KINDS)}")
        if kind == "torch":
            return self._executor.lower(layout(self._program, args, self._executor.integers), "cpu", cpp=None).text
        if kind == "c++":
            return self._cpp(args)
        state = self.lower(*args, target=_gpu(target or self.target_for(args)))
        if kind == "plan":
            return str(self.plan(*args, target=target))
        if kind == "triton":
            return state.text
        from lowering.report import machine_text

        return machine_text(state, kind)

    def _cpp(self, args: Sequence[Any]) -> str:
        """The C++ of the kernels that are C++ on a CPU, whatever the sizes, and the code that calls them."""
        from lowering.cpp_source import cpp_module

        state = self._executor.lower(layout(self._program, args, self._executor.integers), "cpu", cpp=0)
        return cpp_module([step.cpp for step in state.steps if step.cpp is not None]) + "\n/*\n" + state.text + "*/\n"

    def check(self, *args: Any, target: str | None = None, gradient: bool = False) -> Any:
        """The static report of the machine code of every kernel; with gradient=True those of the gradient too. No GPU is needed."""
        from tdsl.check_report import check

        return check(self, args, target, gradient=gradient)

    def explain(self, *args: Any, target: str | None = None) -> Any:
        """Every stage, with FLOPs, bytes and predicted bound per kernel; prints itself in a terminal and in a notebook."""
        from tdsl.explain import explain

        return explain(self, args, target)

    def tune(self, *_: Any, **__: Any) -> None:
        """Search for configurations."""
        raise Unsupported("tuning is not built yet (tune)", help="give a configuration by hand: fn.schedule({kernel: Schedule(..)})")

    def schedule(self, configs: dict[str, Schedule]) -> None:
        """Fixes the configuration of kernels, by the names that the plan shows."""
        self._executor.schedules.update(configs)
        self._executor.forget()


def _gpu(target: str) -> str:
    return "cuda:90" if target == "cpu" else target


def gradient_inputs(program: Program) -> tuple[str, ...]:
    """The inputs that can have a gradient."""
    from tdsl.swap import differentiable

    return differentiable(program)


def function(source: str | Program | Callable[..., Any] | None = None, *, name: str | None = None, backend: str | None = None) -> Any:
    """Makes a Function from the notation as text, from a Program, or (as a decorator) from a Python function traced once.

    >>> scores = function("for h, i, j, k:  Y[h,i,j] += A[h,i,k] * B[h,j,k]")
    >>> print(scores.grad("A").program)
    def Y_grad(A[h,i,k], B[h,j,k], Y.grad[h,i,j]) -> A.grad[h,i,k]:
        for h, i, j, k:  A.grad[h,i,k] += Y.grad[h,i,j] * B[h,j,k]

    backend: "auto" (by the arguments' device), "torch", "triton" (the interpreter on CPU tensors) or "reference".
    Raises ParseError and the other errors of the notation, with the place.
    """
    if source is None:
        return lambda f: function(f, name=name, backend=backend)
    if isinstance(source, str):
        return Function(parse(source, name=name), backend)
    if isinstance(source, Program):
        return Function(source, backend)
    from tdsl.embed import trace

    if not callable(source):
        raise ArgumentError(
            f"{source!r} is no program", help='write the notation as text, "Y[i,j] += A[i,k] * B[k,j]", or decorate a Python function'
        )
    return Function(trace(source), backend)
