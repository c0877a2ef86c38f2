"""Compiling kernels with no GPU in the machine: Triton's compiler, told the target."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lowering import disk_cache
from lowering.kernel_source import KernelSource, require_triton
from lowering.targets import find_target
from lowering.triton_direct import jit_function
from lowering.triton_interpreter import LANGUAGE_LOCK
from tdsl.errors import ArgumentError, CompileError
from tdsl.ops import DTYPES, STORED_ONLY

# How Triton's signatures spell the dtypes.
_SIGNATURE = {d.name: d.short.replace("bool", "i1") for d in (*DTYPES.values(), *STORED_ONLY.values())}
_BINARIES = ("cubin", "hsaco")
_NO_HINTS: Mapping[str, int] = {}


@dataclass(frozen=True, slots=True)
class Compiled:
    """A compiled kernel.

    asm: the stages by name, "ttir" "ttgir" "llir" then "ptx" "cubin" on CUDA, "amdgcn" "hsaco" on HIP; the last of each is bytes.
    shared: bytes of shared memory of one block. triton: the version that compiled it.
    """

    name: str
    target: str
    asm: Mapping[str, str | bytes] = field(hash=False, repr=False)
    shared: int
    num_warps: int
    num_stages: int
    triton: str

    def text(self, stage: str) -> str:
        """A stage that is text; KeyError if this target has none of that name."""
        found = self.asm[stage]
        assert isinstance(found, str), f"{stage} is binary"
        return found


def parse_target(name: str) -> Any:
    """Triton's GPUTarget of "cuda:90", "hip:gfx942", ..; ArgumentError for a name that is not in targets.py, and for "cpu"."""
    target = find_target(name)
    if target.backend == "cpu":
        raise ArgumentError("no GPU compiler makes code for the target 'cpu'", help='name a GPU: "cuda:90", say')
    require_triton()
    from triton.backends.compiler import GPUTarget

    arch = name.partition(":")[2]
    return GPUTarget(target.backend, int(arch) if target.backend == "cuda" else arch, target.warp)


def cache_key(kernel: KernelSource, target: str, hints: Mapping[str, int]) -> str:
    """What the machine code depends on, hashed."""
    return hashlib.sha256(json.dumps([kernel.digest, target, sorted(hints.items()), require_triton().__version__]).encode()).hexdigest()


_kept: dict[str, Compiled] = {}


def compile(kernel: KernelSource, target: str, hints: Mapping[str, int] = _NO_HINTS) -> Compiled:
    """Compile for a target by name.

    hints: what is known of int arguments: 16 says the value is a multiple of 16, 1 that it is 1 (a constant then, as when Triton
    specialises a launch). Pointers are taken to be aligned to 16 bytes, as torch allocates them; a hint 1 for a pointer says it is not.
    Errors: ArgumentError (target, hints), CompileError, MissingPackage.
    """
    gpu = parse_target(target)
    _check_hints(kernel, hints)
    key = cache_key(kernel, target, hints)
    if key not in _kept:
        entry = disk_cache.read("kernels", key)
        compiled = None if entry is None else _from_entry(entry)
        if compiled is None:
            compiled = _compile(kernel, target, gpu, hints)
            disk_cache.write("kernels", key, _to_entry(compiled))
        _kept[key] = compiled
    return _kept[key]


def _check_hints(kernel: KernelSource, hints: Mapping[str, int]) -> None:
    known = {a.name for a in kernel.runtime_args}
    for name, hint in hints.items():
        if name not in known:
            what = f"a hint names {name!r}, which kernel {kernel.name} does not take"
            raise ArgumentError(what, help=f"it takes {', '.join(sorted(known))}")
        if hint not in (1, 16):
            raise ArgumentError(f"the hint of {name} is {hint}: it can be 1 or 16")


def _compile(kernel: KernelSource, target: str, gpu: Any, hints: Mapping[str, int]) -> Compiled:
    triton = require_triton()
    from triton.compiler import ASTSource

    with LANGUAGE_LOCK:
        function = jit_function(kernel)
        signature: dict[str, str] = {}
        constants: dict[tuple[int], int | None] = {}
        attributes: dict[tuple[int], list[list[Any]]] = {}
        for n, (arg, parameter) in enumerate(zip(kernel.args, function.params, strict=True)):
            # An annotated int is never specialised to the constant 1, at a launch neither.
            one = arg.kind == "int" and hints.get(arg.name) == 1 and not parameter.annotation_type
            if arg.kind == "constexpr" or one:
                signature[arg.name] = "constexpr"
                constants[(n,)] = 1 if one else arg.value
                continue
            spelled = _SIGNATURE[arg.dtype]
            signature[arg.name] = f"*{spelled}" if arg.kind == "pointer" else spelled
            if hints.get(arg.name, 16 if arg.kind == "pointer" else 1) == 16:
                attributes[(n,)] = [["tt.divisibility", 16]]
        try:
            made = triton.compile(ASTSource(function, signature, constants, attributes), target=gpu, options=dict(kernel.options))
        except Exception as error:  # whatever its passes raise
            raise CompileError(
                f"kernel {kernel.name} does not compile for {target}: {type(error).__name__}: {error}",
                help=f"its source is shown by linecache as {kernel.filename}",
            ) from error
    asm = {stage: text for stage, text in made.asm.items() if stage != "source"}
    return Compiled(kernel.name, target, asm, made.metadata.shared, kernel.num_warps, kernel.num_stages, triton.__version__)


def _to_entry(compiled: Compiled) -> dict[str, Any]:
    asm = {stage: base64.b64encode(text).decode() if isinstance(text, bytes) else text for stage, text in compiled.asm.items()}
    return {field: getattr(compiled, field) for field in Compiled.__slots__} | {"asm": asm}


def _from_entry(entry: dict[str, Any]) -> Compiled | None:
    try:
        asm = {stage: base64.b64decode(text) if stage in _BINARIES else text for stage, text in entry["asm"].items()}
        return Compiled(**{**entry, "asm": asm})
    except (KeyError, TypeError, AttributeError, ValueError):  # of another version of this project: made anew
        return None
