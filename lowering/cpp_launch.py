"""C++ source -> functions: compiled once by the system's compiler, kept on disk, loaded with ctypes.

A library is remembered under a hash of its source, the flags, the compiler and the processor, beside a checksum: one that
was cut short or damaged is compiled again.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowering import disk_cache
from tdsl.errors import CompileError
from tdsl.ops import DTYPES

if TYPE_CHECKING:
    from lowering.cpp_source import CppKernel

# No -ffast-math: infinities and NaN mean what they mean, and sums keep their order; signed integers wrap, as torch's do.
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-w", "-fno-exceptions", "-fno-rtti"),
    *("-fno-math-errno", "-fno-trapping-math", "-fwrapv"),
)
# GCC 12 loses terms of `for i, j: total += A[i][6 - j]` where it unrolls the inner loop before it vectorises the outer one.
UNROLLED_LATE = "-fdisable-tree-cunrolli"
# Whether a multiplication and an addition may be one operation.
FUSED = {True: "-ffp-contract=fast", False: "-ffp-contract=off"}
OPENMP = "-fopenmp"

Function = Callable[..., None]


@cache
def compiler() -> str | None:
    """The C++ compiler: $CXX, else g++ or clang++ from the path; None where there is none."""
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        found = name and shutil.which(name)
        if found:
            return found
    return None


@cache
def _machine() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        cpu = platform.processor()
    path = compiler() or ""
    real = os.stat(os.path.realpath(path)) if path else None
    return f"{platform.machine()} {cpu} {os.path.realpath(path)} {real.st_size if real else 0} {real.st_mtime_ns if real else 0}"


_loaded: dict[str, ctypes.CDLL] = {}


def functions(kernels: Sequence[CppKernel]) -> dict[str, Any]:
    """What the code that calls the kernels of a program needs: each kernel's function. It also needs `<name>_integers`, an array.

    Raises CompileError where the compiler is missing or rejects the source.
    """
    from lowering.cpp_source import cpp_module  # no printer is needed before there are kernels

    library = load(cpp_module(kernels), fused=all(k.fused for k in kernels))
    found: dict[str, Any] = {}
    for k in kernels:
        function = getattr(library, k.name)
        numbers = [ctypes.c_double if DTYPES[b.dtype].kind == "float" else ctypes.c_longlong for b in k.buffers if b.number]
        rest = iter(numbers)
        function.argtypes = [
            *(next(rest) if b.number else ctypes.c_void_p for b in k.buffers),
            ctypes.c_void_p,
            ctypes.c_int,
            *([ctypes.c_void_p] if k.scratch else []),
        ]
        function.restype = None
        found[k.name] = function
    return found


def load(source: str, *, fused: bool = True) -> ctypes.CDLL:
    """The library of a source, from this process, from disk, or compiled now."""
    flags = (*FLAGS, FUSED[fused], UNROLLED_LATE)
    key = hashlib.sha256("\n".join([source, *flags, _machine()]).encode()).hexdigest()[:32]
    if key not in _loaded:
        path = disk_cache.directory() / "cpp" / f"{key}.so"
        entry = disk_cache.read("cpp", key)
        if entry is None or _checksum(path) != entry.get("sha256"):
            path = compile_source(source, path, flags)
            disk_cache.write("cpp", key, {"sha256": _checksum(path)})
        _loaded[key] = ctypes.CDLL(str(path))
    return _loaded[key]


def _checksum(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def compile_source(source: str, path: Path, flags: Sequence[str] = (*FLAGS, FUSED[True], UNROLLED_LATE)) -> Path:
    """Compiles a source to `path`, or to a temporary folder where that cannot be written. Readers see all of a library or none."""
    program = compiler()
    if program is None:
        raise CompileError("there is no C++ compiler", help="install g++ or clang++, or set CXX; without one CPU tensors run torch code")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = path.parent
    except OSError as error:
        warnings.warn(f"cannot write the cache in {path.parent}: {error}", RuntimeWarning, stacklevel=2)
        folder = Path(tempfile.mkdtemp(prefix="tdsl"))
    with tempfile.TemporaryDirectory(dir=folder) as work:
        text, made = Path(work) / "kernels.cpp", Path(work) / "kernels.so"
        text.write_text(source)
        others = [f for f in flags if f != UNROLLED_LATE]  # what no other compiler than GCC knows
        for options in ([*flags, OPENMP], flags, [*others, OPENMP], others):  # a compiler without OpenMP runs one thread
            done = subprocess.run([program, *options, str(text), "-o", str(made)], capture_output=True, text=True, check=False)
            if done.returncode == 0:
                break
        else:
            raise CompileError(f"{program} rejects generated C++:\n{done.stderr[:2000]}")
        os.replace(made, folder / path.name)
    return folder / path.name
