"""A kernel as text: what the Triton printer hands to the launcher, to the ahead-of-time compiler and to the report."""

from __future__ import annotations

import hashlib
import importlib
import json
import linecache
from dataclasses import asdict, dataclass
from functools import cached_property
from types import ModuleType
from typing import Any, Literal

from tdsl.errors import CompileError, MissingPackage


@dataclass(frozen=True, slots=True)
class Arg:
    """One parameter of a kernel.

    dtype: of a pointer the tensor's element type ("float16", "bool", ..), "int32" or "int64" of an int, "float32" of a float.
    value: of a constexpr, fixed with the source.
    """

    name: str
    kind: Literal["pointer", "int", "float", "constexpr"]
    dtype: str = ""
    value: int | None = None


@dataclass(frozen=True, slots=True)
class Otherwise:
    """The same kernel with pointers. By their places among the values of a launch: aligned, the tensors that descriptors need at
    multiples of 16 bytes; values, those that this kernel takes."""

    kernel: KernelSource
    aligned: tuple[int, ...]
    values: tuple[int, ...]


@dataclass(frozen=True)  # not slotted: the digest is computed once and kept, it is looked up at every launch
class KernelSource:
    """A complete Triton module: imports, helper functions, and `@triton.jit def <name>(<args in this order>)`.

    An int argument of dtype "int64" is annotated `n: tl.int64` in the source; Triton would pass small values as 32 bits otherwise.
    otherwise: of a kernel with tensor descriptors, what runs where some tensor does not begin at a multiple of 16 bytes.
    """

    name: str
    source: str
    args: tuple[Arg, ...]
    num_warps: int = 4
    num_stages: int = 2
    max_registers: int | None = None
    fused: bool = True
    otherwise: Otherwise | None = None

    @cached_property
    def digest(self) -> str:
        """A hash of everything that the machine code depends on besides target, hints and Triton's version."""
        told = [self.num_warps, self.num_stages, self.max_registers, self.fused]
        text = json.dumps([self.name, self.source, [asdict(a) for a in self.args], *told])
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def runtime_args(self) -> tuple[Arg, ...]:
        """The arguments that a launch gives, in order: all but the constexprs."""
        return tuple(a for a in self.args if a.kind != "constexpr")

    @cached_property
    def options(self) -> dict[str, Any]:
        """What Triton's compiler is told besides the source. Fused multiply-adds are asked for: their default differs between versions."""
        found = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": self.fused}
        return found if self.max_registers is None else {**found, "maxnreg": self.max_registers}

    @cached_property
    def filename(self) -> str:
        """The name that tracebacks show and that linecache knows the source by."""
        return f"<tdsl kernel {self.name} {self.digest[:12]}>"


def require_triton() -> ModuleType:
    """The module `triton`, or an error that says what to install."""
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        raise MissingPackage(
            f"Triton kernels need the package triton, which cannot be imported here: {error}",
            help='pip install "triton>=3.5"  (or use backend="torch", which needs none)',
        ) from error
    return triton


def namespace_of(kernel: KernelSource) -> dict[str, Any]:
    """Run the source and return its module namespace.

    The text is registered in linecache, where Triton's `inspect.getsource` and tracebacks find it.
    """
    # mtime None: linecache.checkcache leaves the entry alone.
    linecache.cache[kernel.filename] = (len(kernel.source), None, kernel.source.splitlines(keepends=True), kernel.filename)
    # An imported module's name: otherwise inspect searches every loaded module for the file, milliseconds per function.
    namespace: dict[str, Any] = {"__name__": __name__}
    try:
        exec(compile(kernel.source, kernel.filename, "exec"), namespace)
    except SyntaxError as error:
        raise CompileError(f"the source of kernel {kernel.name} is not Python: {error}") from error
    if kernel.name not in namespace:
        raise CompileError(f"the source of kernel {kernel.name} defines no function of that name")
    return namespace
