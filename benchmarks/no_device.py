"""A Triton driver without a device: kernels are compiled ahead of time, and launches go to a launcher that only notes them."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import GPUDriver

LIMITS = {"max_shared_mem": 232448, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}


class Driver(GPUDriver):  # type: ignore[misc]
    """What is "current" can be set: device, stream. launches: the arguments of each launch, where recording is on."""

    def __init__(self, target: GPUTarget, *, recording: bool = True):
        self.target = target
        self.recording = recording
        self.device = 0
        self.stream = 7
        self.launches: list[tuple[Any, ...]] = []
        self._compiled_for = ""
        self.utils = SimpleNamespace(load_binary=self._load, get_device_properties=lambda device: LIMITS)
        self.launcher_cls = self._launcher
        self.get_current_device = lambda: self.device
        self.get_current_stream = lambda device: self.stream

    def _launcher(self, source: Any, metadata: Any) -> Any:
        self._compiled_for = f"{source.signature} {source.constants} {source.attrs} {metadata}"

        def launch(*arguments: Any) -> None:
            enter, leave = arguments[7:9]  # what a launcher does besides
            if enter is not None:
                enter(arguments[6])
            if self.recording:
                self.launches.append(arguments)
            if leave is not None:
                leave(arguments[6])

        return launch

    def _load(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        """Module and function as plain numbers, the same where the same was compiled; registers, spills and the most threads."""
        return 1, zlib.crc32(binary + self._compiled_for.encode()), 32, 0, 1024

    @staticmethod
    def is_active() -> bool:
        """Only where it is asked for."""
        return False

    def get_current_target(self) -> GPUTarget:
        """The chip that kernels are compiled for."""
        return self.target

    def get_active_torch_device(self) -> torch.device:
        """The device whose tensors kernels take."""
        return torch.device("cuda", self.device)

    def map_python_to_cpp_type(self, ty: str) -> str:
        """No launcher is written in C++."""
        raise NotImplementedError

    def get_benchmarker(self) -> Any:
        """Nothing runs."""
        raise NotImplementedError


class OnDevice(torch.Tensor):
    """A CPU tensor that says it lies on a GPU; in all else it is a plain one, and as quick."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where it says it lies."""
        return torch.device("cuda", 0)


def on_device(tensor: torch.Tensor) -> OnDevice:
    """The tensor, as one of a GPU."""
    return tensor.as_subclass(OnDevice)


@contextmanager
def no_device(target: GPUTarget | None = None, *, recording: bool = True) -> Iterator[Driver]:
    """Triton with such a driver; by default of an H100."""
    driver = Driver(target or GPUTarget("cuda", 90, 32), recording=recording)
    config = triton.runtime.driver
    before = config._active
    config.set_active(driver)
    try:
        yield driver
    finally:
        config._active = before
