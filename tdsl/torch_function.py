"""Function: what users hold. A program that is called on torch tensors, differentiated, and looked at stage by stage."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from lowering.control import Control
from lowering.targets import find_target
from tdsl.arguments import check_gradients, form, layout
from tdsl.autocast import autocast, spread
from tdsl.autograd import Backward, Differentiable
from tdsl.batch import Dims, batch
from tdsl.config import config
from tdsl.define import define_grad
from tdsl.devices import switches, target_of
from tdsl.donate import check_recorded, donated_names
from tdsl.errors import Unsupported
from tdsl.ir import Program
from tdsl.launching import Outputs
from tdsl.named import check_unrecorded, copy_into, positional
from tdsl.operators import call, checked, compiling, execute, looked_at, modes, transforms, update
from tdsl.quick import KEPT, Test, test_of
from tdsl.recipes import forget, recipe_of, remember
from tdsl.runtime import Executor
from tdsl.sharding import has_dtensors, sharded_call
from tdsl.swap import differentiable, gradient
from tdsl.tangent import tangent

if TYPE_CHECKING:
    from lowering.plan import Plan
    from lowering.state import State
    from tdsl.hand import Choice


class Function:
    """A differentiable function of torch tensors, made from a program.

    Called with one argument per parameter (tensors of any strides, or Python numbers for scalars) it returns a tensor, or a
    tuple of them where the program has several outputs. Gradients of any order go through torch's graph.
    """

    def __init__(self, program: Program, backend: str | None = None, *, precision: str | None = None, donate: str | Sequence[str] = ()):
        """precision: the dtype that autocast has cast the program's contractions to; their gradients follow. donate: inputs that calls
        may write into."""
        self._program = program
        self._backend = backend or config.backend
        self._precision = precision
        self._donate = donated_names(program, donate)
        self._changes = 0
        self._recipe = ""
        self._control = Control()
        self._settle()

    def _settle(self) -> None:
        """Starts anew with the program as it is now."""
        program = self._program
        self._executor = Executor(program, self._backend, control=self._control, donate=self._donate)
        instance = next(_changed) if self._changes or program.custom else 0
        forget(self._recipe, self)
        self._recipe = recipe_of(program, self._backend, self._precision, instance, self._donate)
        remember(self._recipe, self._executor, self)
        self._training: dict[object, Differentiable | None] = {}
        self._recording: dict[object, Differentiable | None] = {}
        self._recent: tuple[object, ...] = ()
        self._quick: tuple[tuple[Test, object, tuple[bool, ...], Callable[..., Any]], ...] = ()
        self._gradients: dict[object, Function] = {}
        self._cast: dict[object, Function | None] = {}
        self._differentiable = frozenset(differentiable(program))
        self._single = len(program.outputs) == 1
        self._arity = len(program.params)
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
        """The outputs. Raises tdsl.errors for arguments that do not fit; see design: sizes go by name, never by equal value.

        out=: a tensor, or a tuple of them, that takes the outputs and is returned; as in torch, nothing is recorded then.
        """
        if named:
            if "out" in named and "out" not in self._program.inputs:
                out = named.pop("out")
                return self._into(out, positional(self._program, args, named))
            args = positional(self._program, args, named)
        if compiling():
            if len(args) != self._arity:  # the less is looked at here, the fewer guards a graph has
                checked(self._program, args)
            results: Sequence[Tensor] = self._updated(args) if self._donate else call(self._recipe, args)
            return results[0] if self._single else tuple(results)
        for test, before, recording, run in self._quick:
            try:
                alike = test(*args)
            except TypeError:  # another number of arguments
                break
            if alike and torch.is_grad_enabled() in recording and not modes() and forward_ad._current_level < 0 and switches() == before:
                return run(*args)
        return self._eager(args)

    def _eager(self, args: Sequence[Any]) -> Any:
        """A call that nothing traces; what is known of calls like it goes first in the list of quick ones."""
        if self._donate:
            check_recorded(self._program, args)
        ordinary = True
        wanted = False
        for a in args:
            kind = type(a)
            if kind is Tensor or kind is Parameter:
                wanted = wanted or a.requires_grad
            elif isinstance(a, Tensor):
                ordinary = False
        if not ordinary or looked_at():
            results = self._general(args)
            return results[0] if self._single else results
        recording = wanted and torch.is_grad_enabled()
        trained = self.recorded_by(args) if recording else None
        if trained is not None:
            call = trained.call_for(args)
            self._learn(args, call, call.quick, wanted, recording)
            return call.run(*args)
        if recording:  # of what has no gradient
            results = self._executor(args)
            return results[0] if self._single else results
        run = self._executor.find(args)
        self._learn(args, run, partial(_only, run) if self._single else run, wanted, recording)
        results = run(*args)
        return results[0] if self._single else results

    def _updated(self, args: Sequence[Any]) -> Sequence[Tensor]:
        """A call as the operator that writes into donated arguments."""
        check_recorded(self._program, args)
        if transforms():
            raise Unsupported(
                f"{self._program.name} writes into an argument, and torch.func transforms functions that do not (torch_function)",
                help="make a function without donate= for it",
            )
        return update(self._recipe, self._program, self._donate, args)

    def _learn(self, args: Sequence[Any], made: object, run: Callable[..., Any], wanted: bool, recording: bool) -> None:
        """Remembers what runs arguments like these, without the look-ups, once it was looked up twice of late. made: what was found."""
        if all(made is not one for one in self._recent):
            self._recent = (made, *self._recent[: KEPT - 1])
            return
        test = test_of(args)
        if test is not None and not self._executor.depends(args):
            # Whether recording is on matters where an argument asks for a gradient, and nowhere else.
            entry = (test, switches(), (recording,) if wanted else (True, False), run)
            self._quick = (entry, *self._quick[: KEPT - 1])

    def _general(self, args: Sequence[Any]) -> Sequence[Tensor]:
        """A call that something traces, transforms, intercepts or casts, or whose tensors are more than tensors."""
        if has_dtensors(args):
            return sharded_call(self, args)
        if self._donate:
            checked(self._program, args)
            return self._updated(args)
        cast = self.under_autocast(args)
        if cast is not None:
            results = cast(*args)
            return (results,) if self._single else results
        checked(self._program, args)
        return tuple(call(self._recipe, args))

    def recorded(self, args: Sequence[Any]) -> Outputs:
        """The outputs of a call in torch's graph, where an argument that asks for a gradient can have one."""
        found = self.recorded_by(args)
        return execute(self._executor, args) if found is None else found.apply(args)

    def recorded_by(self, args: Sequence[Any]) -> Differentiable | None:
        """What records such a call."""
        asks = tuple([isinstance(a, Tensor) and a.requires_grad for a in args])
        check_gradients(self._program, args, asks)
        device = args[asks.index(True)].device
        key = (asks, device, config.version)
        if key not in self._recording:
            wrt = tuple(n for n, ask in zip(self._program.inputs, asks, strict=False) if ask)
            self._recording[key] = self._trained(wrt, self._executor.fuses(device))
        return self._recording[key]

    def _into(self, out: Any, args: Sequence[Any]) -> Any:
        """Writes the outputs into tensors of the caller's."""
        targets = (out,) if isinstance(out, Tensor) else tuple(out)
        check_unrecorded(self._program, (*args, *targets))
        results = self(*args)
        copy_into(self._program, targets, (results,) if self._single else results)
        return out

    def _trained(self, wrt: tuple[str, ...], fuses: bool) -> Differentiable | None:
        """What runs a call that is recorded; None where no argument that asks for a gradient can have one."""
        key = (wrt, fuses)
        if key not in self._training:
            possible = tuple(n for n in wrt if n in self._differentiable)
            made = None
            if possible:
                made = Differentiable(self._executor, possible, lambda *a: self.grad(possible)(*a), fuses=fuses, rule=self._gradient)
            self._training[key] = made
        return self._training[key]

    # -- what torch sees of it ------------------------------------------------------------------------------------------

    @property
    def recipe(self) -> str:
        """What names this Function in a traced graph."""
        return self._recipe

    @property
    def differentiable(self) -> frozenset[str]:
        """The inputs that can have a gradient."""
        return self._differentiable

    def part(
        self,
        part: str,
        wrt: Sequence[str],
        fuses: bool,
        recomputed: Sequence[str],
        orders: Sequence[Any] = (),
        crossing: Sequence[str] = (),
        **backward: Any,
    ) -> Executor:
        """The executor of one side of the cut gradient, as recipes name it. Raises Unsupported where the cut is another one by now."""
        trained = self._trained(tuple(wrt), fuses)
        assert trained is not None
        halves = trained.halves(frozenset(recomputed), tuple((n, tuple(map(tuple, path))) for n, path in orders))
        if tuple(crossing) != halves.crossing:
            raise Unsupported(
                f"a graph of another version of tdsl: its backward of {self._program.name} expects {', '.join(crossing) or 'nothing'} of the "
                f"forward, and this one {', '.join(halves.crossing) or 'nothing'} (torch_function)",
                help="trace or export it again; where torch.compile found it in its cache, with TORCHINDUCTOR_FORCE_DISABLE_CACHES=1",
            )
        if part == "forward":
            return halves.forward
        found: Backward = halves.backward(backward["stored"], tuple(backward["outputs"]))
        assert found.executor is not None
        return found.executor

    def under_autocast(self, args: Sequence[Any]) -> Function | None:
        """The Function that torch.autocast makes of this one for such arguments; None where it changes nothing."""
        if self._precision is not None or not torch._C._is_any_autocast_enabled():
            return None
        device = next((a.device.type for a in args if isinstance(a, Tensor)), "cpu")
        if not torch.is_autocast_enabled(device):
            return None
        dtype = str(torch.get_autocast_dtype(device)).removeprefix("torch.")
        key = (dtype, *(a.dtype if isinstance(a, Tensor) else type(a) for a in args))
        if key not in self._cast:
            found = layout(self._program, [form(a) for a in args], self._executor.integers)
            program = autocast(self._program, dtype, found.specs, found.values)
            self._cast[key] = None if program == self._program else Function(program, self._backend, precision=dtype)
        return self._cast[key]

    def __reduce__(self) -> Any:
        return _restored, (self._program, self._backend, self._precision, self._control, self._donate)

    def __copy__(self) -> Function:
        return self

    def __deepcopy__(self, _: Any) -> Function:
        """Itself, as of any Python function: copies of a module share what is compiled."""
        return self

    # -- transforms -----------------------------------------------------------------------------------------------------

    def grad(self, wrt: str | Sequence[str] | None = None) -> Function:
        """The gradient, a Function of the inputs and then `Y.grad` for each output, which returns `A.grad` for each float input
        (or for those in `wrt`). Its program is the swap rule's."""
        names = (wrt,) if isinstance(wrt, str) else None if wrt is None else tuple(wrt)
        if names not in self._gradients:
            self._gradients[names] = Function(self._gradient(self._program, names), self._backend, precision=self._precision)
        return self._gradients[names]

    def _gradient(self, program: Program, wrt: Sequence[str] | None) -> Program:
        whole = gradient(program, wrt)
        return whole if self._precision is None else spread(whole, self._precision)

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
            self._gradients[key] = Function(make(), self._backend, precision=self._precision)
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
        self._changes += 1
        self._settle()

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

    def emit(self, kind: str, *args: Any, target: str | None = None, gradient: bool = False) -> str:
        """The text of a stage: "program", "gradient", "plan", "triton", "ttir", "ttgir", "llir", "ptx", "amdgcn", "sass" or "torch".

        Kernels are compiled for `target` ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942"); no GPU is needed. gradient: with "triton",
        the kernels of training too, under a line each: of the forward that saves, and of the backward.
        """
        from tdsl.emit import emit

        return emit(self, kind, args, target, gradient=gradient)

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

    def schedule(self, choices: Mapping[str, Choice]) -> None:
        """Fixes by hand, from the next call on, what the compiler would decide. Choices add up; None takes one back.

        A kernel's name, as `plan` shows it (`attention_0`; of the backward `attention_bwd_0`, as `check(.., gradient=True)` does), takes
        - some fields of its configuration, `{"tiles": {"i": 64, "j": 32}, "num_warps": 8}`, or a whole `tdsl.Schedule`: for GPUs; a CPU
          cuts its own tiles;
        - an edited copy of its source, as text or as the path of a file: what `emit("triton", .., gradient=True)` prints, parameters as
          they are. On the first call for each layout of arguments both kernels run, and another result is refused. A kernel that also
          saves something for the backward is another one, `attention_0 (saves P.sum, P.max)`. CPU tensors run an edited kernel with
          backend="triton" only.

        An intermediate's name takes "store", to be written to memory once and read from there, or "recompute", to be made again in
        whatever reads it, in the backward too.

        Raises NameError_, with the names that there are, for others; ArgumentError for a configuration that is none, and at the call for
        one that does not fit the kernel, or an intermediate that cannot be made again; CompileError for a text that is no such kernel.
        The kernels of `grad()` are a Function's own: `f.grad().schedule(..)`.

        >>> f = function("S[i,j] += A[i,k] * B[k,j]; Y[i,j] = relu(S[i,j]) + S[i,j]")
        >>> f.schedule({"S": "store", "Y_0": {"tiles": {"k": 32}, "num_stages": 3}})
        """
        from tdsl.hand import control

        self._control = control(self._control, choices, self._program, self._executor.flat)
        self._changes += 1
        self._settle()


def _restored(program: Program, backend: str, precision: str | None, control: Control, donate: tuple[str, ...]) -> Function:
    made = Function(program, backend, precision=precision, donate=donate)
    if control != Control():
        made._control = control
        made._changes += 1
        made._settle()
    return made


_changed = itertools.count(1)


def _only(run: Callable[..., Outputs], *args: Any) -> Tensor:
    return run(*args)[0]
