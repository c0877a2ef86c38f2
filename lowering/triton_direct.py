"""Launching compiled kernels past Triton's own dispatch, which finds the compiled kernel anew at every launch.

`JITFunction.run` binds the arguments by name, works out what machine code may rely on (pointers at multiples of 16 bytes, ints that
are 1 or multiples of 16, how wide they are), prints that as a key, looks the compiled kernel up, and hands its launcher the current
stream and all arguments, constexprs among them. Here the first launch of each kind goes that way, and further ones give the very same
arguments to the very same launcher, for a quarter of what that takes the host (`python -m benchmarks overhead`). Whatever watches or
changes launches goes Triton's way: hooks, as profilers install them, stages that are inspected, globals of an edited kernel; and so
does a Triton of another version.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from lowering.kernel_source import KernelSource, namespace_of, require_triton
from lowering.triton_interpreter import LANGUAGE_LOCK
from tdsl.errors import CompileError, DeviceError

if TYPE_CHECKING:
    import torch

# The versions whose JITFunction.run ends in `kernel.run(x, y, z, stream, kernel.function, kernel.packed_metadata, metadata, *hooks, *args)`.
KNOWN = ("3.5", "3.6", "3.7")
# What Triton takes a pointer's alignment by.
_ALIGNED = 16
# The largest tensor whose elements AMD's buffer instructions reach.
_REACHED = 2**31 - 1

Entry = tuple[Callable[..., None], Any, Any]  # the launcher of a compiled kernel, its function's handle, its packed metadata


def jit_function(kernel: KernelSource) -> Any:
    """The kernel as Triton's JITFunction."""
    triton = require_triton()
    function = namespace_of(kernel)[kernel.name]
    if not isinstance(function, triton.runtime.jit.JITFunction):
        raise CompileError(
            f"kernel {kernel.name} cannot be compiled in this process: triton was imported with TRITON_INTERPRET set",
            help="unset TRITON_INTERPRET; tdsl's own interpreter does not need it",
        )
    names = tuple(a.name for a in kernel.args)
    if tuple(function.arg_names) != names:
        taken = ", ".join(function.arg_names)
        raise CompileError(f"kernel {kernel.name} takes ({taken}), its description says ({', '.join(names)})")
    for arg, parameter in zip(kernel.args, function.params, strict=True):
        if arg.kind == "int" and arg.dtype == "int64" and parameter.annotation_type != "i64":
            what = f"kernel {kernel.name}: the source must say {arg.name}: tl.int64"
            raise CompileError(what, help="Triton passes small values as 32 bits otherwise, and products of them overflow")
    return function


def number_class(value: Any) -> object:
    """What Triton may specialise a number on, or more: numbers of one class run the same machine code."""
    if type(value) is not int:
        return type(value)
    width = 0 if -(2**31) <= value < 2**31 else 1 if -(2**63) <= value < 2**63 else 2
    return value == 1, value % _ALIGNED == 0, width


class Jitted:
    """A kernel of this process: its JITFunction, and what that has compiled, by what it was compiled for."""

    def __init__(self, kernel: KernelSource):
        triton = require_triton()
        self.kernel = kernel
        self.function = jit_function(kernel)
        self.driver = triton.runtime.driver
        self.settings = triton.knobs.runtime
        self.compilation = triton.knobs.compilation
        self.allocation = triton.runtime._allocation
        self.compiled_kernel = triton.compiler.CompiledKernel
        self.scratch = "make_tensor_descriptor(" in kernel.source
        self.template = tuple(a.value for a in kernel.args)
        self.slots = tuple(n for n, a in enumerate(kernel.args) if a.kind != "constexpr")
        self.constants = self.template[len(self.slots) :]
        trailing = self.slots == tuple(range(len(self.slots)))
        self.known = trailing and triton.__version__.startswith(tuple(f"{v}." for v in KNOWN))
        self.entries: dict[object, Entry] = {}
        self.resolved: set[object] = set()

    def mode(self) -> tuple[object, ...] | None:
        """What Triton compiles for besides a kernel and its arguments; None while somebody looks at launches, which go its way then."""
        s = self.settings
        enter, leave = s.launch_enter_hook, s.launch_exit_hook  # chains of hooks, empty mostly; None in a Triton that has single ones
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave) or getattr(s, "add_stages_inspection_hook", None):
            return None
        return None if self.function.pre_run_hooks else (s.debug, getattr(self.compilation, "instrumentation_mode", None))

    def resolve(self, key: object, grid: int, values: Sequence[Any]) -> Entry | None:
        """Launches through Triton, on the current device; what launches the like directly from then on, if that can be.

        key: what was compiled for one launch serves another of the same key."""
        arguments = list(self.template)
        for slot, value in zip(self.slots, values, strict=True):
            arguments[slot] = value
        run = self.function[(grid,)]
        if key in self.resolved:
            compiled = run(*arguments, **self.kernel.options)
        else:
            with LANGUAGE_LOCK:  # this one may compile
                compiled = run(*arguments, **self.kernel.options)
            self.resolved.add(key)
        if not self.known or self.mode() is None or self.function.used_global_vals or type(compiled) is not self.compiled_kernel:
            return None
        entry = self.entries[key] = compiled.run, compiled.function, compiled.packed_metadata
        return entry


_jitted: dict[str, Jitted] = {}


def jitted(kernel: KernelSource) -> Jitted:
    """The kernel in this process."""
    found = _jitted.get(kernel.digest)
    if found is None:
        with LANGUAGE_LOCK:
            found = _jitted.setdefault(kernel.digest, Jitted(kernel))
    return found


class DeviceLauncher:
    """Launches one kernel over one grid, with values whose dtypes and device are the same each time.

    integers: the values that come last, the same each time too. Per launch it is left to see where the tensors lie and what kind of
    numbers there are among the values, to ask for the stream, and to launch.
    """

    def __init__(self, kernel: KernelSource, grid: int, integers: Sequence[int] = ()):
        self.kernel = kernel
        self.grid = grid
        self.integers = tuple(integers)
        given = kernel.runtime_args[: len(kernel.runtime_args) - len(self.integers)]
        self.pointers = tuple((n, 1 << i) for i, n in enumerate(n for n, a in enumerate(given) if a.kind == "pointer"))
        self.numbers = tuple(n for n, a in enumerate(given) if a.kind != "pointer")
        self.entries: dict[object, Entry] = {}
        self.jitted: Jitted | None = None

    def __call__(self, values: Sequence[Any]) -> None:
        """Errors: DeviceError for tensors that are on no GPU; what Triton raises."""
        jit = self.jitted or self._prepared(values)
        active = jit.driver.active
        if active.get_current_device() != self.device:
            import torch

            with torch.cuda.device(self.device):  # Triton launches on the current device, whatever the tensors are on
                self(values)
            return
        if jit.scratch:
            provide_scratch(jit.allocation)
        places = 0
        for n, bit in self.pointers:
            if values[n].data_ptr() % _ALIGNED:
                places |= bit
        kinds = tuple([number_class(values[n]) for n in self.numbers]) if self.numbers else ()
        reached = tuple([values[n].untyped_storage().nbytes() <= _REACHED for n, _ in self.pointers]) if self.reaches else ()
        key = (places, reached, jit.mode(), kinds)
        entry = self.entries.get(key)
        if entry is None:
            self._resolve(jit, key, kinds, values)
            return
        run, function, packed = entry
        run(self.grid, 1, 1, active.get_current_stream(self.device), function, packed, None, None, None, *values, *self.rest)

    def _resolve(self, jit: Jitted, key: tuple[object, ...], kinds: tuple[object, ...], values: Sequence[Any]) -> None:
        """Such a launch for the first time, or one that is watched. With other integers of the same class there may have been one."""
        dtypes = tuple(values[n].dtype for n, _ in self.pointers)
        whole = (*key[:-1], *kinds, *map(number_class, self.integers), *dtypes, self.device)
        entry = jit.entries.get(whole)
        if entry is not None:
            self.entries[key] = entry
            self(values)
            return
        entry = jit.resolve(whole, self.grid, [*values, *self.integers])
        if entry is not None:
            self.entries[key] = entry

    def _prepared(self, values: Sequence[Any]) -> Jitted:
        """What the first launch settles for all: the device, and what follows the values."""
        device = None
        if self.pointers:
            first = self.pointers[0][0]
            device = values[first].device
            if device.type != "cuda":  # what torch calls HIP devices, too
                raise DeviceError(
                    f"kernel {self.kernel.name}: {self.kernel.runtime_args[first].name} is on {device}, not on a CUDA or HIP device",
                    help='CPU tensors run with backend="torch", or backend="triton" through the interpreter',
                )
        jit = jitted(self.kernel)
        active = jit.driver.active
        self.device = active.get_current_device() if device is None or device.index is None else device.index
        self.reaches = active.get_current_target().backend == "hip"
        self.rest = (*self.integers, *jit.constants)
        self.jitted = jit
        return jit


def provide_scratch(place: Any) -> None:
    """Memory for what kernels keep beside their arguments, their descriptors: torch's, unless this thread has an allocator already.

    place: Triton's module of allocators."""
    present = place._allocator.get() if isinstance(place._allocator, ContextVar) else place._allocator  # as older versions have it
    if isinstance(present, place.NullAllocator):
        place.set_allocator(scratch)


def scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """`size` bytes on the current device; torch's allocator aligns to 512 bytes."""
    import torch

    return torch.empty(size, dtype=torch.int8, device="cuda")
