"""Launching kernels: on CUDA and HIP devices through Triton's compiler, on CPU tensors through the interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowering.descriptors import ALIGNED
from lowering.kernel_source import KernelSource
from lowering.triton_direct import DeviceLauncher
from lowering.triton_interpreter import run_interpreted
from tdsl.errors import ArgumentError, DeviceError, DtypeError

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
    launcher(kernel, grid, interpret=interpret)(values)


def launcher(
    kernel: KernelSource, grid: int, integers: Sequence[int] = (), *, interpret: bool
) -> Callable[[Sequence[torch.Tensor | int | float]], None]:
    """`launch` for many times: of the values that come before `integers`, which stay. Their dtypes and device must stay as well."""
    if grid == 0:
        return _nothing
    if kernel.otherwise is None:
        return _launcher(kernel, grid, integers, interpret)
    # A kernel whose descriptors need tensors at multiples of 16 bytes, or the one with pointers where some tensor is not at one.
    aligned, places = kernel.otherwise.aligned, kernel.otherwise.values
    count = len(kernel.runtime_args) - len(integers)
    given = [n for n in places if n < count]
    own = _launcher(kernel, grid, integers, interpret)
    other = _launcher(kernel.otherwise.kernel, grid, [integers[n - count] for n in places if n >= count], interpret)

    def either(values: Sequence[Any]) -> None:
        for n in aligned:
            if values[n].data_ptr() % ALIGNED:
                other([values[n] for n in given])
                return
        own(values)

    return either


def _nothing(values: Sequence[Any]) -> None:
    """A launch of no programs."""


def _launcher(kernel: KernelSource, grid: int, integers: Sequence[int], interpret: bool) -> Callable[[Sequence[Any]], None]:
    on_device = DeviceLauncher(kernel, grid, integers)

    def run(values: Sequence[Any]) -> None:
        if interpret:
            values = [*values, *integers]
            _check_host(kernel, values)
        for observer in _observers:
            observer(Launch(kernel, grid, interpret))
        if interpret:
            run_interpreted(kernel, grid, values)
        else:
            on_device(values)

    return run


def _check_host(kernel: KernelSource, values: Sequence[Any]) -> None:
    """The interpreter reads raw memory: a wrong dtype or device there would be a crash, not an exception."""
    for arg, value in zip(kernel.runtime_args, values, strict=True):
        if arg.kind != "pointer":
            continue
        if value.device.type != "cpu":
            raise DeviceError(f"kernel {kernel.name}: {arg.name} is on {value.device}, and the interpreter runs on CPU tensors")
        if str(value.dtype) != f"torch.{arg.dtype}":
            raise DtypeError(f"kernel {kernel.name}: {arg.name} has dtype {value.dtype}, the kernel was made for {arg.dtype}")
