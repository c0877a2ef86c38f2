"""What a device, the settings and torch's own switches say of compiled code."""

from __future__ import annotations

import torch

from lowering.cpp_launch import compiler
from lowering.targets import Pays
from tdsl.config import config

GPU_BUILD = bool(torch.version.cuda or torch.version.hip)
# Points of the largest statement from which C++ pays whatever it computes: below, torch code takes microseconds an operation, and
# compiling a tenth of a second, once for a size class and all processes.
CPP_POINTS = 1 << 15
# Operations of a program from which it pays at any size: a call into C++ takes 10 microseconds, torch 6 to 10 for one operation, and 60
# for the dozen of a layer norm (one core of a shared Xeon at 2 GHz, 16 x 16 and 1 x 768 elements).
CPP_OPERATIONS = 3

_deterministic = torch._C._get_deterministic_algorithms


def switches() -> object:
    """What compiled code depends on besides its arguments."""
    return (config.version, _deterministic(), input_precision()) if GPU_BUILD else (config.version, _deterministic())


def input_precision() -> str:
    """What torch's switches say of float32 matrix products on a GPU: "tf32" or "ieee"."""
    if hasattr(torch._C, "_get_fp32_precision_getter"):  # the older switch raises where the newer one was used
        return "tf32" if torch._C._get_fp32_precision_getter("cuda", "matmul") == "tf32" else "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


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


def cpp_from() -> Pays | None:
    """When CPU tensors run C++; None: never."""
    if config.cpu == "torch" or compiler() is None:
        return None
    if config.cpu == "c++":
        return Pays()
    return Pays(CPP_POINTS, CPP_OPERATIONS if config.cpu == "auto" else None)
