"""Program -> callable: specialise on the arguments' layout, compile, launch; with the caches.

torch       the plan as torch code over whole tensors or blocks (CPU)
triton      the plan as Triton kernels: compiled on CUDA and HIP, through Triton's interpreter on CPU tensors
reference   the loops
"""

from __future__ import annotations

import linecache
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from lowering.compiler import Observer, State, compile_program
from lowering.schedule import Schedule
from tdsl import reference
from tdsl.arguments import TORCH_DTYPES, Layout, layout
from tdsl.config import config
from tdsl.errors import ArgumentError
from tdsl.expand import expand
from tdsl.guards import run_checks
from tdsl.infer import Inferred, Spec, infer
from tdsl.ir import Program
from tdsl.simplify import simplify
from tdsl.ssa import ssa
from tdsl.swap import differentiable

BACKENDS = ("auto", "torch", "triton", "reference")
Outputs = tuple[torch.Tensor, ...]


def flatten(program: Program) -> Program:
    """The form that the compiler takes: no inner reductions, one name per version."""
    return simplify(ssa(expand(program)))


class Executor:
    """Runs one program on any arguments; one compiled callable per layout of theirs.

    saved: outputs that are residuals, kept in the dtype that they are computed in. stored: inputs that are such residuals, by
    name with the dtype that promotion takes them for.
    """

    def __init__(
        self,
        program: Program,
        backend: str = "auto",
        *,
        saved: frozenset[str] = frozenset(),
        stored: Mapping[str, str] | None = None,
        flat: Program | None = None,
        schedules: dict[str, Schedule] | None = None,
    ):
        if backend not in BACKENDS:
            raise ArgumentError(f"backend {backend!r} is none of {', '.join(BACKENDS)}")
        self.program = program
        self.backend = backend
        self.saved = saved
        self.stored = dict(stored or {})
        self.integers = frozenset(program.inputs) - frozenset(differentiable(program))
        self.schedules: dict[str, Schedule] = {} if schedules is None else schedules
        self._flat = flat
        self._compiled: dict[object, Callable[[Sequence[Any]], Outputs]] = {}
        self._dtypes: dict[object, Mapping[str, str]] = {}
        self._recomputed: dict[object, frozenset[str]] = {}

    @property
    def flat(self) -> Program:
        """The program that is compiled."""
        if self._flat is None:
            self._flat = flatten(self.program)
        return self._flat

    def __call__(self, args: Sequence[Any]) -> Outputs:
        """The outputs of the program, in order. Raises what inference raises; nothing is compiled then."""
        try:
            key = self._key(args)
            compiled = self._compiled.get(key)
        except AttributeError:  # an argument that is neither a tensor nor a number
            layout(self.program, args)
            raise
        if compiled is None:
            compiled = self._specialise(args)
            self._compiled[key] = compiled
        return compiled(args)

    def forget(self) -> None:
        """Drops what was compiled: a schedule changed."""
        self._compiled.clear()

    def dtypes_for(self, args: Sequence[Any]) -> Mapping[str, str]:
        """The dtypes of all tensors of the flat program for such arguments."""
        key = self._key(args)
        if key not in self._dtypes:
            found = layout(self.program, args, self.integers)
            self._dtypes[key] = infer(self.flat, found.specs, found.values, unseen=self.saved).dtypes
        return self._dtypes[key]

    def recomputed_for(self, args: Sequence[Any]) -> frozenset[str]:
        """The intermediates that the plan for such arguments makes again rather than holds in memory."""
        try:
            key = self._key(args)
        except AttributeError:
            key = None
        if key not in self._recomputed:
            found = layout(self.program, args, self.integers)
            backend = self.backend_for(found.device)
            if backend == "reference":
                return frozenset()
            infer(self.program, found.specs, found.values)  # errors about the program as the user wrote it
            target = "cpu" if backend == "torch" else target_of(found.device or torch.device("cpu"))
            plan = self.lower(found, target).plan
            assert plan is not None
            self._recomputed[key] = plan.recomputed
        return self._recomputed[key]

    def _key(self, args: Sequence[Any]) -> object:
        """What a compiled callable is valid for: layouts of tensors, types of numbers, and values of sizes."""
        parts: list[object] = []
        for name, a in zip(self.program.inputs, args, strict=False):
            if isinstance(a, torch.Tensor):
                parts.append((a.shape, a.stride(), a.dtype, a.device))
                if name in self.integers and a.dim() == 0:
                    parts.append(int(a))
            else:
                parts.append((type(a), a if isinstance(a, int) else None))
        return (len(args), *parts)

    def backend_for(self, device: torch.device | None) -> str:
        """The executor that serves a device."""
        if self.backend != "auto":
            return self.backend
        return "torch" if device is None or device.type == "cpu" else "triton"

    def lower(self, found: Layout, target: str, observer: Observer | None = None) -> State:
        """The compiler's result for arguments of a layout."""
        in_memory = {}
        specs = dict(found.specs)
        for name, logical in self.stored.items():
            in_memory[name] = specs[name].dtype
            specs[name] = Spec(specs[name].shape, logical)
        declared = infer(self.program, specs, found.values, unseen=self.saved).dtypes
        # Versions have dtypes of their own; the last one, an output, has what all writes of its name promote to.
        results = {flat.name: declared[output.name] for flat, output in zip(self.flat.outputs, self.program.outputs, strict=False)}
        return compile_program(
            self.flat,
            specs,
            found.strides,
            target,
            found.values,
            schedules=self.schedules,
            stored=in_memory,
            saved=self.saved,
            results=results,
            observer=observer,
            input_precision="tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
        )

    def _specialise(self, args: Sequence[Any]) -> Callable[[Sequence[Any]], Outputs]:
        found = layout(self.program, args, self.integers)
        inferred = infer(self.program, found.specs, found.values)
        backend = self.backend_for(found.device)
        if backend == "reference":
            return self._reference(inferred)
        device = found.device or torch.device("cpu")
        state = self.lower(found, "cpu" if backend == "torch" else target_of(device))
        run = torch_callable(state) if backend == "torch" else triton_callable(state, device)
        if not inferred.checks or not (device.type == "cpu" or config.debug):
            return run
        names = self.program.inputs

        def checked(values: Sequence[Any]) -> Outputs:
            run_checks(inferred.checks, dict(zip(names, values, strict=True)), inferred.shapes)
            return run(values)

        return checked

    def _reference(self, inferred: Inferred) -> Callable[[Sequence[Any]], Outputs]:
        def run(args: Sequence[Any]) -> Outputs:
            device = next((a.device for a in args if isinstance(a, torch.Tensor)), None)
            arrays = {n: _array(a) for n, a in zip(self.program.inputs, args, strict=True)}
            results = reference.run(self.program, arrays)
            return tuple(
                torch.as_tensor(results[o]).to(device=device, dtype=TORCH_DTYPES[inferred.dtypes[o]]) for o in self.program.results
            )

        return run


def _array(a: Any) -> Any:
    if not isinstance(a, torch.Tensor):
        return a
    a = a.detach().cpu()
    return (a.double() if a.dtype.is_floating_point else a).numpy()


def target_of(device: torch.device) -> str:
    """The chip of a device, as targets.py names it; for a CPU (the interpreter) the one whose kernels the tests hold."""
    if device.type != "cuda":
        return "cuda:90"
    if torch.version.hip:
        return "hip:gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return f"cuda:{min(10, max(8, major)) * 10}"


# ---------------------------------------------------------------------------------------------------------------------
# Callables


def torch_callable(state: State) -> Callable[[Sequence[Any]], Outputs]:
    """The torch module of a program, loaded; it is registered with linecache, so that a traceback shows its lines."""
    name = f"<tdsl {state.program.name} torch {abs(hash(state.text)):x}>"
    linecache.cache[name] = (len(state.text), None, state.text.splitlines(keepends=True), name)
    namespace: dict[str, Any] = {}
    exec(compile(state.text, name, "exec"), namespace)
    run = namespace["run"]

    def call(args: Sequence[Any]) -> Outputs:
        with torch.no_grad():
            return run(*args)  # type: ignore[no-any-return]

    return call


def triton_callable(state: State, device: torch.device) -> Callable[[Sequence[Any]], Outputs]:
    """Allocates, launches and returns; the very same kernels on a GPU and through the interpreter."""
    from lowering.triton_launch import launch

    interpret = device.type == "cpu"
    names, results = state.program.inputs, state.program.results

    def call(args: Sequence[Any]) -> Outputs:
        memory: dict[str, Any] = dict(zip(names, args, strict=True))
        with torch.no_grad():
            for step in state.steps:
                for a in step.allocate:
                    dtype = TORCH_DTYPES[a.dtype]
                    if a.fill is None:
                        memory[a.tensor] = torch.empty(a.shape, dtype=dtype, device=device)
                    else:
                        memory[a.tensor] = torch.full(a.shape, a.fill, dtype=dtype, device=device)
                assert step.source is not None
                values = [_operand(memory[b.tensor], b.number, b.dtype, device) for b in step.tile.buffers]
                launch(step.source, step.tile.programs, [*values, *step.integers.values()], interpret=interpret)
            return tuple(memory[o].clone() if o in names or results.count(o) > 1 else memory[o] for o in results)

    return call


def _operand(value: Any, number: bool, dtype: str, device: torch.device) -> Any:
    if number:
        return value
    if not isinstance(value, torch.Tensor):
        return torch.tensor(value, dtype=TORCH_DTYPES[dtype], device=device)
    return value.to(device) if value.device != device else value
