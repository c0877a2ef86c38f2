"""Program -> callable: specialise on the arguments' layout, compile, launch; with the caches.

torch       the plan as torch code over whole tensors or blocks (CPU)
triton      the plan as Triton kernels: compiled on CUDA and HIP, through Triton's interpreter on CPU tensors
reference   the loops
"""

from __future__ import annotations

import linecache
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch

from lowering import tile_ir
from lowering.compiler import Observer, compile_program
from lowering.control import Control
from lowering.cpp_launch import compiler, functions
from lowering.ragged import Limits
from lowering.state import Allocation, Part, Repeat, State, leaves
from lowering.steps import View
from tdsl import reference
from tdsl.affine import evaluate, linear
from tdsl.arguments import TORCH_DTYPES, Form, Layout, check_callable, layout
from tdsl.config import config
from tdsl.distribute import distribute
from tdsl.edited import verify
from tdsl.errors import ArgumentError, CompileError, Unsupported
from tdsl.expand import expand
from tdsl.extents import as_expr
from tdsl.gather import gather_form
from tdsl.guards import axes, run_checks, value_of
from tdsl.hand import check_names
from tdsl.infer import Inferred, Spec, infer
from tdsl.ir import Access, Clamp, Expr, Pad, Program, Reduce, bounds, expressions, statements, walk
from tdsl.ops import DTYPES
from tdsl.simplify import simplify
from tdsl.ssa import ssa
from tdsl.swap import differentiable

BACKENDS = ("auto", "torch", "triton", "reference")
Outputs = tuple[torch.Tensor, ...]
_CPU = torch.device("cpu")
_GPU_BUILD = bool(torch.version.cuda or torch.version.hip)


def flatten(program: Program) -> Program:
    """The form that the compiler takes: no inner reductions, one name per version, plain targets, short ordered loops."""
    return simplify(distribute(gather_form(ssa(expand(program)), colliding=True)))


_Extent = tuple[Expr, tuple[tuple[str, int | Expr, int | Expr], ...]]  # how long a range is, and the ranges of the indices in that
_NO_LIMITS: Limits = {}


def _is_ragged(program: Program) -> bool:
    """Whether a range depends on the values of a tensor."""
    tops = [top for node in program.body for top in expressions(node)]
    found = [b for s in statements(program.body) for b in bounds(s.ranges)]
    found += [b for top in tops for e in walk(top) if isinstance(e, Reduce) for b in bounds(e.ranges)]
    return any(isinstance(a, Access) and a.subscripts for b in found for a in walk(b))


def _ragged_extents(inferred: Inferred, inputs: frozenset[str]) -> Iterator[_Extent]:
    """The lengths of ranges that depend on the values of input tensors."""
    for ranges in inferred.ranges:
        before: list[tuple[str, int | Expr, int | Expr]] = []
        for name, (lo, hi) in ranges.items():
            extent = (linear(as_expr(hi)) - linear(as_expr(lo))).expr()
            read = [a for a in walk(extent) if isinstance(a, Access) and a.subscripts]
            if read and all(a.tensor in inputs for a in walk(extent) if isinstance(a, Access)):
                yield extent, tuple(before)
            before.append((name, lo, hi))


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
        control: Control | None = None,
    ):
        if backend not in BACKENDS:
            raise ArgumentError(f"there is no backend {backend!r}", help=f"the backends are {', '.join(BACKENDS)}")
        self.program = program
        self.backend = backend
        self.saved = saved
        self.stored = dict(stored or {})
        self.integers = frozenset(program.inputs) - frozenset(differentiable(program))
        self.control = control or Control()
        self._flat = flat
        self._compiled: dict[object, Callable[[Sequence[Any]], Outputs]] = {}
        self._dtypes: dict[object, Mapping[str, str]] = {}
        self._recomputed: dict[object, frozenset[str]] = {}
        self._outputs: dict[object, tuple[tuple[tuple[int, ...], torch.dtype], ...]] = {}
        self.recipe = ""  # what names it in a graph: operators.py
        self.ragged = backend != "reference" and _is_ragged(program)
        self._extents: dict[object, tuple[Mapping[str, tuple[int, ...]], tuple[_Extent, ...]]] = {}

    @property
    def flat(self) -> Program:
        """The program that is compiled."""
        if self._flat is None:
            self._flat = flatten(self.program)
        return self._flat

    def __call__(self, args: Sequence[Any]) -> Outputs:
        """The outputs of the program, in order. Raises what inference raises; nothing is compiled then."""
        try:
            key = self.key(args)
            limits = _NO_LIMITS
            if self.ragged and not any(isinstance(a, torch.Tensor) and a.is_meta for a in args):
                limits = self._limits(key, args)
                key = (key, tuple(limits.values()))
            compiled = self._compiled.get(key)
        except AttributeError:  # an argument that is neither a tensor nor a number
            layout(self.program, args)
            raise
        if compiled is None:
            compiled = self._specialise(args, limits)
            self._compiled[key] = compiled
        return compiled(args)

    def ready(self, args: Sequence[Any]) -> Callable[[Sequence[Any]], Outputs]:
        """What runs all arguments of that layout under the same switches: without the look-up, where nothing depends on values."""
        if self.ragged:
            return self
        key = self.key(args)
        if key not in self._compiled:
            self._compiled[key] = self._specialise(args)
        return self._compiled[key]

    def _limits(self, key: object, args: Sequence[Any]) -> Limits:
        """The most that ranges which depend on tensors are in these tensors, as powers of two: kernels are made for that.

        It is read once per call, which waits for a GPU; the terms beyond a range are masked.
        """
        if key not in self._extents:
            found = layout(self.program, args, self.integers)
            inferred = infer(self.flat, found.specs, found.values, unseen=self.saved)
            self._extents[key] = inferred.shapes, tuple(_ragged_extents(inferred, frozenset(self.program.inputs)))
        shapes, extents = self._extents[key]
        tensors = dict(zip(self.program.inputs, args, strict=True))
        limits: dict[Expr, int] = {}
        for extent, ranges in extents:
            grid, _, runs = axes(ranges, tensors, shapes)
            values = torch.as_tensor(value_of(extent, grid, tensors, shapes)) * runs
            most = max(0, int(values.max())) if values.numel() else 0
            limits[extent] = 1 << (most - 1).bit_length() if most else 0
        return limits

    def dtypes_for(self, args: Sequence[Any]) -> Mapping[str, str]:
        """The dtypes of all tensors of the flat program for such arguments."""
        key = self.key(args)
        if key not in self._dtypes:
            found = layout(self.program, args, self.integers)
            self._dtypes[key] = infer(self.flat, found.specs, found.values, unseen=self.saved).dtypes
        return self._dtypes[key]

    def recomputed_for(self, args: Sequence[Any]) -> frozenset[str]:
        """The intermediates that the plan for such arguments makes again rather than holds in memory."""
        try:
            key = self.key(args)
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

    def outputs_for(self, args: Sequence[Any]) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
        """The shape and dtype of each output for such arguments. Nothing is computed; raises what a call would raise."""
        key = self.key(args)
        if key not in self._outputs:
            found = layout(self.program, args, self.integers)
            inferred = infer(self.program, found.specs, found.values, unseen=self.saved)
            shapes: Mapping[str, tuple[int, ...]] = inferred.shapes
            dtypes: Mapping[str, str] = inferred.dtypes
            names = self.program.results
            if self.saved or self.stored:
                state = self.lower(found, target_of(found.device or torch.device("cpu")) if self._on_gpu(found) else "cpu")
                shapes, names = state.shapes, state.program.results
                dtypes = {name: state.stored.get(name, state.dtypes[name]) for name in names}
            self._outputs[key] = tuple((shapes[name], TORCH_DTYPES[dtypes[name]]) for name in names)
        return self._outputs[key]

    def _on_gpu(self, found: Layout) -> bool:
        return self.backend_for(found.device) == "triton"

    def key(self, args: Sequence[Any]) -> object:
        """What a compiled callable is valid for: layouts of tensors, types of numbers, values of sizes, and the switches."""
        parts: list[object] = [self.switches()]
        for name, a in zip(self.program.inputs, args, strict=False):
            if isinstance(a, torch.Tensor):
                parts.append((a.shape, a.stride(), a.dtype, a.device))
                if name in self.integers and a.dim() == 0 and not a.is_meta:
                    parts.append(int(a))
            elif isinstance(a, Form):
                parts.append((a.shape, a.strides, a.dtype, a.device))
            else:
                parts.append((type(a), a if isinstance(a, int) else None))
        return (len(args), *parts)

    def switches(self) -> object:
        """What the settings and torch's own switches say of compiled code."""
        return config.version, torch._C._get_deterministic_algorithms(), _GPU_BUILD and input_precision()

    def backend_for(self, device: torch.device | None) -> str:
        """The executor that serves a device."""
        if self.backend != "auto":
            return self.backend
        return "torch" if device is None or device.type == "cpu" else "triton"

    def fuses(self, device: torch.device | None) -> bool:
        """Whether elementwise work is nearly free there: in Triton's kernels and in C++, not in torch code."""
        return self.backend_for(device) == "triton" or (self.backend_for(device) == "torch" and cpp_from() is not None)

    def lower(
        self,
        found: Layout,
        target: str,
        observer: Observer | None = None,
        limits: Limits = _NO_LIMITS,
        cpp: int | Literal["auto"] | None = "auto",
        control: Control | None = None,
    ) -> State:
        """The compiler's result for arguments of a layout. limits: the most that ranges which depend on tensors are.

        cpp: points of a statement from which a CPU's kernels are C++, None for torch code alone; by default what the settings say.
        control: taken as it is, in the place of what the user fixed.
        """
        in_memory = {}
        specs = dict(found.specs)
        for name, logical in self.stored.items():
            in_memory[name] = specs[name].dtype
            specs[name] = Spec(specs[name].shape, logical)
        declared = infer(self.program, specs, found.values, unseen=self.saved).dtypes
        # Versions have dtypes of their own; the last one, an output, has what all writes of its name promote to.
        results = {flat.name: declared[output.name] for flat, output in zip(self.flat.outputs, self.program.outputs, strict=False)}
        # Tiles and sources are a GPU's; what is stored and what is made again holds on a CPU too.
        if control is None:
            control = replace(self.control, schedules={}, sources={}) if target == "cpu" else self.control
        state = compile_program(
            self.flat,
            specs,
            found.strides,
            target,
            found.values,
            control=control,
            stored=in_memory,
            saved=self.saved,
            results=results,
            limits=limits,
            cpp_from=cpp_from() if cpp == "auto" else cpp,
            observer=observer,
            input_precision=input_precision(),
        )
        check_names(control, self.program, state)
        return state

    def _specialise(self, args: Sequence[Any], limits: Limits = _NO_LIMITS) -> Callable[[Sequence[Any]], Outputs]:
        found = layout(self.program, args, self.integers)
        check_callable(self.program, args)
        inferred = infer(self.program, found.specs, found.values)
        if found.device is not None and found.device.type == "meta":
            return self._without_memory(args)
        backend = self.backend_for(found.device)
        if backend != "triton" and self.control.sources:
            edits = ", ".join(self.control.sources)
            raise Unsupported(
                f"the edited kernel {edits} runs on a GPU, and these arguments run as {backend} code (runtime)",
                help='CPU tensors run it with backend="triton", through the interpreter; schedule({name: None}) takes the edit back',
            )
        if backend == "reference":
            return self._reference(inferred)
        device = found.device or torch.device("cpu")
        state = self.lower(found, "cpu" if backend == "torch" else target_of(device), limits=limits)
        if backend == "triton" and torch.are_deterministic_algorithms_enabled() and order_matters(state) and not self.control.sources:
            run = torch_callable(self.lower(found, "cpu", limits=limits, cpp=None), device)  # torch's own scatter sorts then
        else:
            run = self._on_cpu(state, found, limits) if backend == "torch" else triton_callable(state, device)
        if not inferred.checks or not (device.type == "cpu" or config.debug):
            return run
        names = self.program.inputs

        def checked(values: Sequence[Any]) -> Outputs:
            run_checks(inferred.checks, dict(zip(names, values, strict=True)), inferred.shapes)
            return run(values)

        return checked

    def _without_memory(self, args: Sequence[Any]) -> Callable[[Sequence[Any]], Outputs]:
        outputs = self.outputs_for(args)
        return lambda _: tuple(torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in outputs)

    def _on_cpu(self, state: State, found: Layout, limits: Limits) -> Callable[[Sequence[Any]], Outputs]:
        """The callable of a CPU; torch code alone where the C++ compiler fails, with a warning."""
        try:
            return torch_callable(state)
        except CompileError as error:
            warnings.warn(f"{self.program.name} runs as torch code: {error}", RuntimeWarning, stacklevel=4)
            return torch_callable(self.lower(found, "cpu", limits=limits, cpp=None))

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


def input_precision() -> str:
    """What torch's switches say of float32 matrix products on a GPU: "tf32" or "ieee"."""
    if hasattr(torch._C, "_get_fp32_precision_getter"):  # the older switch raises where the newer one was used
        return "tf32" if torch._C._get_fp32_precision_getter("cuda", "matmul") == "tf32" else "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def order_matters(state: State) -> bool:
    """Whether a kernel adds floats atomically, so that the order of its programs shows in the last digits."""
    steps = [step for part in leaves(state.parts or (Part(state),)) for step in part.state.steps]
    return any(
        isinstance(op, tile_ir.Store) and op.mode == "add" and DTYPES[op.buffer.dtype].kind == "float"
        for step in steps
        for op in tile_ir.operations(step.tile.body)
    )


def target_of(device: torch.device) -> str:
    """The chip of a device, as targets.py names it; for a CPU (the interpreter) the one whose kernels the tests hold."""
    if device.type != "cuda":
        return "cuda:90"
    if torch.version.hip:
        return "hip:gfx942"
    if not torch.cuda.is_available():  # fake tensors, on a machine that only traces
        return "cuda:90"
    major, _ = torch.cuda.get_device_capability(device)
    return f"cuda:{min(10, max(8, major)) * 10}"


# ---------------------------------------------------------------------------------------------------------------------
# Callables

# Points of the largest statement from which C++ pays: below, torch code takes tens of microseconds and compiling half a second.
CPP_FROM = 1 << 15


def cpp_from() -> int | None:
    """From how many points of a statement on CPU tensors run C++; None: never."""
    if config.cpu == "torch" or compiler() is None:
        return None
    return 0 if config.cpu == "c++" else CPP_FROM


def torch_callable(state: State, device: torch.device = _CPU) -> Callable[[Sequence[Any]], Outputs]:
    """The torch module of a program, loaded; it is registered with linecache, so that a traceback shows its lines."""
    name = f"<tdsl {state.program.name} torch {abs(hash(state.text)):x}>"
    linecache.cache[name] = (len(state.text), None, state.text.splitlines(keepends=True), name)
    kernels = [step.cpp for step in state.steps if step.cpp is not None]
    namespace: dict[str, Any] = functions(kernels) if kernels else {}
    exec(compile(state.text, name, "exec"), namespace)
    run = namespace["run"]
    copies = any(o in state.program.inputs for o in state.program.results) or len({*state.program.results}) < len(state.program.results)
    if not copies and not state.parts and all(step.cpp is not None for step in state.steps):
        return lambda args: run(*args)  # nothing that torch could record

    def call(args: Sequence[Any]) -> Outputs:
        if not torch.is_grad_enabled():
            return run(*args)  # type: ignore[no-any-return]
        torch._C._set_grad_enabled(False)  # torch.no_grad() takes a microsecond more
        try:
            return run(*args)  # type: ignore[no-any-return]
        finally:
            torch._C._set_grad_enabled(True)

    def elsewhere(args: Sequence[Any]) -> Outputs:
        with device:
            return call(args)

    return call if device.type == "cpu" else elsewhere


def triton_callable(state: State, device: torch.device) -> Callable[[Sequence[Any]], Outputs]:
    """Allocates, launches and returns; the very same kernels on a GPU and through the interpreter. Ordered loops run on the host."""
    names, results = state.program.inputs, state.program.results
    parts = state.parts or (Part(state),)
    verified: set[str] = set()

    def call(args: Sequence[Any]) -> Outputs:
        memory: dict[str, Any] = dict(zip(names, args, strict=True))
        with torch.no_grad():
            for part in parts:
                _run_part(part, memory, {}, device, verified)
            return tuple(memory[o].clone() if o in names or results.count(o) > 1 else memory[o] for o in results)

    return call


def _run_part(part: Part | Repeat, memory: dict[str, Any], steps: dict[str, int], device: torch.device, verified: set[str]) -> None:
    """Runs the kernels of a part on the tensors of `memory`, or all steps of a loop. steps: where the loops around it are. verified: the
    edited kernels that have been compared with the generated ones."""
    from lowering.triton_launch import launch

    if isinstance(part, Repeat):
        for a in part.allocate:
            memory[a.tensor] = _allocated(a, device)
        values = range(_bound(part.lo, steps), _bound(part.hi, steps))
        for value in reversed(values) if part.reverse else values:
            for inner in part.parts:
                _run_part(inner, memory, {**steps, part.index: value}, device, verified)
        return
    for number, index in part.numbers.items():
        memory[number] = steps[index]
    for view in part.views:
        memory[view.name] = _slice(view, memory[view.tensor], steps)
    for alias, name in part.aliases.items():
        memory[alias] = memory[name]
    for step in part.state.steps:
        for a in step.allocate:
            memory[a.tensor] = _allocated(a, device)
        assert step.source is not None
        values_ = [_operand(memory[b.tensor], b.number, b.dtype, device) for b in step.tile.buffers]
        values_ += step.integers.values()
        if step.unedited is not None and step.source.digest not in verified:
            verify(step, values_, interpret=device.type == "cpu")
            verified.add(step.source.digest)
        launch(step.source, step.tile.programs, values_, interpret=device.type == "cpu")


def _allocated(a: Allocation, device: torch.device) -> torch.Tensor:
    dtype = TORCH_DTYPES[a.dtype]
    return torch.empty(a.shape, dtype=dtype, device=device) if a.fill is None else torch.full(a.shape, a.fill, dtype=dtype, device=device)


def _bound(bound: int | Expr, steps: Mapping[str, int]) -> int:
    value = bound if isinstance(bound, int) else evaluate(bound, steps)
    assert value is not None
    return value


def _slice(view: View, tensor: torch.Tensor, steps: Mapping[str, int]) -> torch.Tensor:
    """A view at one step: zeros of its own where the step lies outside of a padded dimension."""
    places: list[int | slice] = []
    for size, at in zip(tensor.shape, view.at, strict=True):
        if at is None:
            places.append(slice(None))
            continue
        place = _bound(at.value if isinstance(at, Pad | Clamp) else at, steps)
        if isinstance(at, Clamp):
            place = min(max(place, 0), size - 1)
        elif isinstance(at, Pad) and not 0 <= place < size:
            left = [(n, step) for n, step, a in zip(tensor.shape, tensor.stride(), view.at, strict=True) if a is None]
            return tensor.new_empty_strided([n for n, _ in left], [step for _, step in left]).zero_()  # kernels are made for strides
        places.append(place)
    return tensor[tuple(places)]


def _operand(value: Any, number: bool, dtype: str, device: torch.device) -> Any:
    if number:
        return value
    if not isinstance(value, torch.Tensor):
        return torch.tensor(value, dtype=TORCH_DTYPES[dtype], device=device)
    return value.to(device) if value.device != device else value
