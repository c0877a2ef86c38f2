"""Launching kernels: on CUDA and HIP devices through Triton's compiler, on CPU tensors through the interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowering.descriptors import ALIGNED
from lowering.kernel_source import KernelSource, Otherwise, namespace_of, require_triton
from lowering.triton_interpreter import LANGUAGE_LOCK, run_interpreted
from tdsl.errors import ArgumentError, CompileError, DeviceError, DtypeError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch, as observers see it."""

    kernel: KernelSource
    grid: int
    interpreted: bool


_observers: list[Callable[[Launch], None]] = []


@contextmanager
def on_launch(observer: Callable[[Launch], None]) -> Iterator[None]:
    """Call `observer` at each launch made inside, before it; grids of zero programs launch nothing.

    >>> with on_launch(launches.append): y = f(x)
    """
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def launch(kernel: KernelSource, grid: int, values: Sequence[torch.Tensor | int | float], interpret: bool = False) -> None:
    """Run `grid` programs of `kernel`. `values`: of the arguments that are not constexpr, in order.

    interpret=True runs CPU tensors, bfloat16 included, through the interpreter; the environment is not touched.
    Errors: ArgumentError (number of values), DeviceError (tensors on the wrong device), MissingPackage (no triton), CompileError.
    """
    if len(values) != len(kernel.runtime_args):
        names = ", ".join(a.name for a in kernel.runtime_args)
        raise ArgumentError(f"kernel {kernel.name} takes {len(kernel.runtime_args)} values ({names}), got {len(values)}")
    if grid == 0:
        return
    if kernel.otherwise is not None:
        kernel, values = _that_may_run(kernel, kernel.otherwise, values)
    if interpret:
        _check_host(kernel, values)
    for observer in _observers:
        observer(Launch(kernel, grid, interpret))
    (run_interpreted if interpret else _on_device)(kernel, grid, values)


def _that_may_run(kernel: KernelSource, otherwise: Otherwise, values: Sequence[Any]) -> tuple[KernelSource, Sequence[Any]]:
    """A kernel whose descriptors need tensors at multiples of 16 bytes, or the one with pointers where some tensor is not at one."""
    if all(values[n].data_ptr() % ALIGNED == 0 for n in otherwise.aligned):
        return kernel, values
    return otherwise.kernel, [values[n] for n in otherwise.values]


def _check_host(kernel: KernelSource, values: Sequence[Any]) -> None:
    """The interpreter reads raw memory: a wrong dtype or device there would be a crash, not an exception."""
    for arg, value in zip(kernel.runtime_args, values, strict=True):
        if arg.kind != "pointer":
            continue
        if value.device.type != "cpu":
            raise DeviceError(f"kernel {kernel.name}: {arg.name} is on {value.device}, and the interpreter runs on CPU tensors")
        if str(value.dtype) != f"torch.{arg.dtype}":
            raise DtypeError(f"kernel {kernel.name}: {arg.name} has dtype {value.dtype}, the kernel was made for {arg.dtype}")


@dataclass(frozen=True, slots=True)
class _Compiled:
    """A kernel ready to launch: the jitted function, its arguments with gaps for the values, and where the gaps are."""

    function: Any
    template: tuple[Any, ...]
    slots: tuple[int, ...]
    pointer: int | None
    started: list[int]
    scratch: bool


_compiled: dict[str, _Compiled] = {}


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


def _prepare(kernel: KernelSource) -> _Compiled:
    slots = tuple(n for n, a in enumerate(kernel.args) if a.kind != "constexpr")
    pointer = next((n for n, a in enumerate(kernel.runtime_args) if a.kind == "pointer"), None)
    return _Compiled(jit_function(kernel), tuple(a.value for a in kernel.args), slots, pointer, [], "make_tensor_descriptor(" in kernel.source)


def _provide_scratch() -> None:
    """Memory for what kernels keep beside their arguments, their descriptors: torch's, unless this thread has an allocator already."""
    triton = require_triton()
    place: Any = triton.runtime._allocation
    present = place._allocator.get() if isinstance(place._allocator, ContextVar) else place._allocator  # as older versions have it
    if isinstance(present, place.NullAllocator):
        triton.set_allocator(_scratch)


def _scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """`size` bytes on the current device; torch's allocator aligns to 512 bytes."""
    import torch

    return torch.empty(size, dtype=torch.int8, device="cuda")


def _on_device(kernel: KernelSource, grid: int, values: Sequence[Any]) -> None:
    compiled = _compiled.get(kernel.digest)
    if compiled is None:
        with LANGUAGE_LOCK:
            compiled = _compiled.setdefault(kernel.digest, _prepare(kernel))
    arguments = list(compiled.template)
    for slot, value in zip(compiled.slots, values, strict=True):
        arguments[slot] = value
    import torch

    device = torch.device("cuda") if compiled.pointer is None else values[compiled.pointer].device
    if device.type != "cuda":  # what torch calls HIP devices, too
        raise DeviceError(
            f"kernel {kernel.name}: {kernel.runtime_args[compiled.pointer or 0].name} is on {device}, not on a CUDA or HIP device",
            help='CPU tensors run with backend="torch", or backend="triton" through the interpreter',
        )
    index = torch.cuda.current_device() if device.index is None else device.index
    if compiled.scratch:
        _provide_scratch()
    run = compiled.function[(grid,)]
    with torch.cuda.device(index):  # Triton launches on the current device, whatever the tensors are on
        if index in compiled.started:
            run(*arguments, **kernel.options)
        else:
            with LANGUAGE_LOCK:  # the first launch compiles
                run(*arguments, **kernel.options)
            compiled.started.append(index)
