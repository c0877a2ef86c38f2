"""Program -> callable: specialise on the arguments' layout, compile, with the caches.

torch       the plan as torch code over whole tensors or blocks, and C++ (CPU)
triton      the plan as Triton kernels: compiled on CUDA and HIP, through Triton's interpreter on CPU tensors
reference   the loops

A layout is looked up as it is; one that is new goes to the templates of its size class (size_classes.py); compiling comes last.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn import Parameter

from lowering.control import Control
from lowering.targets import TARGETS, Pays
from tdsl import reference
from tdsl.arguments import TORCH_DTYPES, Form, Layout, check_callable, layout, widened
from tdsl.config import config
from tdsl.devices import cpp_from, input_precision, switches, target_of
from tdsl.distribute import distribute
from tdsl.donate import check_dtypes, into_donated, written_in_place
from tdsl.errors import ArgumentError, CompileError, Error, Unsupported
from tdsl.expand import expand
from tdsl.gather import gather_form
from tdsl.guards import run_checks
from tdsl.infer import Inferred, Spec, infer
from tdsl.ir import Program
from tdsl.launching import MakeKernels, Outputs, Run, order_matters, torch_template, triton_callable, triton_template
from tdsl.quick import KEPT, Test, test_of
from tdsl.ragged_limits import NO_LIMITS, Extent, is_ragged, limits_of, ragged_extents
from tdsl.simplify import simplify
from tdsl.size_classes import Make, SizeClasses, class_of
from tdsl.ssa import ssa
from tdsl.swap import differentiable
from tdsl.traced import Trace

if TYPE_CHECKING:
    from lowering.compiler import Observer
    from lowering.ragged import Limits
    from lowering.state import State

BACKENDS = ("auto", "torch", "triton", "reference")
# Layouts that an executor remembers; beyond, it begins anew.
_LAYOUTS = 4096


def flatten(program: Program) -> Program:
    """The form that the compiler takes: no inner reductions, one name per version, plain targets, short ordered loops."""
    return simplify(distribute(gather_form(ssa(expand(program)), colliding=True)))


class Executor:
    """Runs one program on any arguments; one compiled callable per layout of theirs.

    saved: outputs that are residuals, kept in the dtype that they are computed in. stored: inputs that are such residuals, by
    name with the dtype that promotion takes them for. donate: inputs that calls write into.
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
        donate: tuple[str, ...] = (),
    ):
        if backend not in BACKENDS:
            raise ArgumentError(f"there is no backend {backend!r}", help=f"the backends are {', '.join(BACKENDS)}")
        self.program = program
        self.backend = backend
        self.saved = saved
        self.stored = dict(stored or {})
        self.integers = frozenset(program.inputs) - frozenset(differentiable(program))
        self.control = control or Control()
        self.donate = donate
        self.recipe = ""  # what names it in a graph: recipes.py
        self.ragged = backend != "reference" and is_ragged(program)
        self.classes = SizeClasses(program.inputs, self.integers)
        self._flat = flat
        # 0-d integers, whose values sizes or subscripts may depend on
        self._scalars = tuple(n for n, p in enumerate(program.params) if p.name in self.integers and not p.dims)
        self._compiled: dict[object, Run] = {}
        self._quick: tuple[tuple[Test, object, Run], ...] = ()
        self._last: Run | None = None
        self._dtypes: dict[object, Mapping[str, str]] = {}
        self._recomputed: dict[object, frozenset[str]] = {}
        self._outputs: dict[object, tuple[tuple[tuple[int, ...], torch.dtype], ...]] = {}
        self._extents: dict[object, tuple[Mapping[str, tuple[int, ...]], tuple[Extent, ...]]] = {}

    @cached_property
    def aliases(self) -> Mapping[str, str]:
        """Versions of donated inputs that are written right into these; what other donated inputs become is copied into them."""
        return written_in_place(self.flat, self.program, self.donate) if self.donate else {}

    @property
    def flat(self) -> Program:
        """The program that is compiled."""
        if self._flat is None:
            self._flat = flatten(self.program)
        return self._flat

    # -- calls ----------------------------------------------------------------------------------------------------------

    def __call__(self, args: Sequence[Any]) -> Outputs:
        """The outputs of the program, in order, of which nothing is recorded. Raises what inference raises; nothing is compiled then."""
        run = self._like_before(args) or self._found(args)
        if not torch.is_grad_enabled():
            return run(*args)
        torch._C._set_grad_enabled(False)  # torch.no_grad() takes a microsecond more
        try:
            return run(*args)
        finally:
            torch._C._set_grad_enabled(True)

    def _like_before(self, args: Sequence[Any]) -> Run | None:
        """What ran arguments like these, without the look-up."""
        for test, before, run in self._quick:
            try:
                if test(*args) and switches() == before:
                    return run
            except TypeError:  # another number of arguments
                return None
        return None

    def _found(self, args: Sequence[Any]) -> Run:
        """What runs these arguments, remembered where it was looked up last, too."""
        run = self.find(args)
        if run is not self._last:
            self._last = run
            return run
        test = None if self.depends(args) else test_of(args)
        if test is not None:
            self._quick = ((test, switches(), run), *self._quick[: KEPT - 1])
        return run

    def ready(self, args: Sequence[Any]) -> Run:
        """What runs all arguments of that layout under the same switches: without the look-up, where nothing depends on values.

        To be called where nothing would be recorded: the inputs need no gradient, or recording is off.
        """
        return self._by_values if self.depends(args) else self.find(args)

    def depends(self, args: Sequence[Any]) -> bool:
        """Whether the values of tensors say what code runs."""
        return self.ragged or any(n < len(args) and isinstance(args[n], torch.Tensor) for n in self._scalars)

    def _by_values(self, *args: Any) -> Outputs:
        return self(args)

    def find(self, args: Sequence[Any]) -> Run:
        """What runs these arguments; to be called where nothing would be recorded."""
        key = self.key(args)
        limits = NO_LIMITS
        if self.ragged and not any(isinstance(a, torch.Tensor) and a.is_meta for a in args):
            limits = self._limits(key, args)
            key = (key, tuple(limits.values()))
        run = self._compiled.get(key)
        if run is None:
            run = self._specialise(args, limits)
            if len(self._compiled) >= _LAYOUTS:
                self._compiled.clear()
            self._compiled[key] = run
        return run

    def key(self, args: Sequence[Any]) -> object:
        """What a compiled callable is valid for: layouts of tensors, types of numbers, values of sizes, and the switches."""
        parts: list[object] = [switches()]
        for a in args:
            kind = type(a)
            if kind is torch.Tensor or kind is Parameter or isinstance(a, torch.Tensor):
                parts += (a.shape, a.stride(), a.dtype, a.device)
            elif kind is Form:
                parts += (a.shape, a.strides, a.dtype, a.device)
            else:
                parts += (kind, a if isinstance(a, int) else None)
        for n in self._scalars:
            if n < len(args) and isinstance(args[n], torch.Tensor) and args[n].dim() == 0 and not args[n].is_meta:
                parts.append(int(args[n]))
        return tuple(parts)

    def _limits(self, key: object, args: Sequence[Any]) -> Limits:
        """The most that ranges which depend on tensors are in these tensors."""
        if key not in self._extents:
            found = layout(self.program, args, self.integers)
            inferred = infer(self.flat, found.specs, found.values, unseen=self.saved)
            self._extents[key] = inferred.shapes, tuple(ragged_extents(inferred, frozenset(self.program.inputs)))
        shapes, extents = self._extents[key]
        return limits_of(extents, dict(zip(self.program.inputs, args, strict=True)), shapes)

    # -- what can be said without compiling -------------------------------------------------------------------------------

    def dtypes_for(self, args: Sequence[Any]) -> Mapping[str, str]:
        """The dtypes of all tensors of the flat program for such arguments."""
        found = layout(self.program, args, self.integers)
        key, _ = class_of(args, found)
        if key not in self._dtypes:
            self._dtypes[key] = infer(self.flat, found.specs, found.values, unseen=self.saved).dtypes
        return self._dtypes[key]

    def recomputed_for(self, args: Sequence[Any]) -> frozenset[str]:
        """The intermediates that the plan for such arguments makes again rather than holds in memory."""
        found = layout(self.program, args, self.integers)
        key, _ = class_of(args, found)
        if key not in self._recomputed:
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
                names = state.program.results
                shapes = {name: state.shape_of(name) for name in names}
                dtypes = {name: state.stored.get(name, state.dtypes[name]) for name in names}
            self._outputs[key] = tuple((shapes[name], TORCH_DTYPES[dtypes[name]]) for name in names)
        return self._outputs[key]

    def _on_gpu(self, found: Layout) -> bool:
        return self.backend_for(found.device) == "triton"

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
        limits: Limits = NO_LIMITS,
        cpp: Pays | Literal["auto"] | None = "auto",
        control: Control | None = None,
    ) -> State:
        """The compiler's result for arguments of a layout. limits: the most that ranges which depend on tensors are.

        cpp: when a CPU's kernels are C++, None for torch code alone; by default what the settings say.
        control: taken as it is, in the place of what the user fixed.
        """
        from lowering.compiler import compile_program  # with this comes most of what there is to import
        from tdsl.hand import check_names

        in_memory = {}
        specs = dict(found.specs)
        for name, logical in self.stored.items():
            in_memory[name] = specs[name].dtype
            specs[name] = Spec(specs[name].shape, logical)
        for name, spec in specs.items():
            if spec.stored and TARGETS[target].float8:  # others get such tensors as what they count as
                in_memory[name] = spec.stored
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
            aliases=self.aliases,
            observer=observer,
            input_precision=input_precision(),
        )
        check_names(control, self.program, state)
        return state

    # -- compiling --------------------------------------------------------------------------------------------------------

    def _specialise(self, args: Sequence[Any], limits: Limits = NO_LIMITS) -> Run:
        found = layout(self.program, args, self.integers)
        check_callable(self.program, args)
        if any(spec.stored for spec in found.specs.values()) and not self._reads_float8(found.device):
            wide = self.find([widened(a) for a in args])
            return lambda *values: wide(*map(widened, values))
        if found.device is not None and found.device.type == "meta":
            return self._without_memory(args)
        backend = self.backend_for(found.device)
        if backend != "triton" and self.control.sources:
            edits = ", ".join(self.control.sources)
            raise Unsupported(
                f"the edited kernel {edits} runs on a GPU, and these arguments run as {backend} code (runtime)",
                help='CPU tensors run it with backend="triton", through the interpreter; schedule({name: None}) takes the edit back',
            )
        run = None if limits or self.ragged or self.control.sources or backend == "reference" else self._of_class(args, found)
        return run or self._compile(found, Trace(), limits)((), found)

    def _of_class(self, args: Sequence[Any], found: Layout) -> Run | None:
        """What runs these arguments from a template of their size class; None where they are compiled for themselves."""
        try:
            return self.classes.find(args, self._compile, found)
        except (Error, RecursionError):  # with the numbers themselves its message is right
            return None

    def _compile(self, found: Layout, trace: Trace, limits: Limits = NO_LIMITS) -> Make:
        """What is called for arguments of a layout, or of all layouts that a trace stands for."""
        inferred = infer(self.program, found.specs, found.values)
        if self.donate:
            check_dtypes(self.program, self.donate, found, inferred.dtypes)
        make = self._reference(inferred) if self.backend_for(found.device) == "reference" else self._kernels(found, trace, limits)
        written = frozenset(self.aliases.values()) if self.backend_for(found.device) != "reference" else frozenset()
        checks = bool(inferred.checks) and (found.device is None or found.device.type == "cpu" or config.debug)

        def complete(numbers: Sequence[int], actual: Layout) -> Run:
            run = make(numbers)
            if self.donate:
                run = into_donated(run, self.program, self.donate, written)
            return self._checked(run, actual) if checks else run

        return complete

    def _kernels(self, found: Layout, trace: Trace, limits: Limits) -> MakeKernels:
        device = found.device or torch.device("cpu")
        backend = self.backend_for(found.device)
        state = self.lower(found, "cpu" if backend == "torch" else target_of(device), limits=limits)
        if backend == "torch":
            return self._on_cpu(state, found, trace, limits)
        if torch.are_deterministic_algorithms_enabled() and order_matters(state) and not self.control.sources:
            return torch_template(self.lower(found, "cpu", limits=limits, cpp=None), trace, device)  # torch's own scatter sorts then
        if not state.parts:
            return triton_template(state, trace, device)
        if trace.symbols:
            raise Unsupported("the steps of ordered loops are compiled for their sizes (runtime)")
        run = triton_callable(state, device)
        return lambda _: run

    def _checked(self, run: Run, found: Layout) -> Run:
        """`run` after the checks of one call, that every subscript is in bounds and that writes do not collide."""
        names = self.program.inputs
        inferred = infer(self.program, found.specs, found.values)

        def checked(*values: Any) -> Outputs:
            run_checks(inferred.checks, dict(zip(names, values, strict=True)), inferred.shapes)
            return run(*values)

        return checked

    def _reads_float8(self, device: torch.device | None) -> bool:
        return device is not None and device.type != "cpu" and (device.type == "meta" or TARGETS[target_of(device)].float8)

    def _without_memory(self, args: Sequence[Any]) -> Run:
        outputs = self.outputs_for(args)
        return lambda *_: tuple(torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in outputs)

    def _on_cpu(self, state: State, found: Layout, trace: Trace, limits: Limits) -> MakeKernels:
        """The template of a CPU; torch code alone where the C++ compiler fails, with a warning."""
        try:
            return torch_template(state, trace)
        except CompileError as error:
            warnings.warn(f"{self.program.name} runs as torch code: {error}", RuntimeWarning, stacklevel=4)
            return torch_template(self.lower(found, "cpu", limits=limits, cpp=None), trace)

    def _reference(self, inferred: Inferred) -> MakeKernels:
        def run(*args: Any) -> Outputs:
            device = next((a.device for a in args if isinstance(a, torch.Tensor)), None)
            arrays = {n: _array(a) for n, a in zip(self.program.inputs, args, strict=True)}
            results = reference.run(self.program, arrays)
            return tuple(
                torch.as_tensor(results[o]).to(device=device, dtype=TORCH_DTYPES[inferred.dtypes[o]]) for o in self.program.results
            )

        return lambda _: run


def _array(a: Any) -> Any:
    if not isinstance(a, torch.Tensor):
        return a
    a = a.detach().cpu()
    return (a.double() if a.dtype.is_floating_point else a).numpy()
