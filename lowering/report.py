"""What the machine code says, with no GPU in the machine: registers, spills, instructions, occupancy, and faults in plain words.

CUDA: the cuobjdump and nvdisasm that come with Triton read the cubin. HIP: the assembly and its metadata are text.
Occupancy: the least of registers, shared memory and threads of an SM divided by what a block takes of them, with the granularities of
the CUDA occupancy calculator: registers per warp in steps of 256, and 1 KiB of shared memory reserved per block.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lowering import aot, disk_cache
from lowering.aot import Compiled
from lowering.compiler import State, Step
from lowering.kernel_source import KernelSource, require_triton
from lowering.targets import Target, find_target
from tdsl.errors import ArgumentError, CompileError, MissingPackage

_NO_HINTS: Mapping[str, int] = {}
# Raised when the meaning of a field changes, so that older entries are not read.
_VERSION = 2

Widths = tuple[tuple[int, int], ...]
Loads = tuple[tuple[int, int, bool], ...]


@dataclass(frozen=True, slots=True)
class KernelReport:
    """The machine code of one kernel for one target.

    registers: per thread. stack: bytes per thread. spills: instructions that touch spilled values (CUDA), spilled vector registers (HIP).
    shared: bytes per block. local_memory: whether any instruction touches memory private to a thread.
    tensor_core: "wgmma", "mma", "tcgen05", "mfma", or None. load_bytes, store_bytes: (width in bytes, count) of the loads from and
    stores to global memory, widest first; asynchronous copies count as loads, atomics as neither. async_copies: those copies, from
    global straight to shared memory. loads: (line of the source, bytes, whether it is such a copy) of the loads of tensors. long_offsets:
    operations on tiles of 64-bit integers in loops. occupancy: blocks that fit on one SM. faults: what is wrong, in words; empty is good.
    """

    name: str
    target: str
    registers: int
    stack: int
    spills: int
    shared: int
    local_memory: bool
    tensor_core: str | None
    load_bytes: Widths
    store_bytes: Widths
    async_copies: int
    loads: Loads
    long_offsets: int
    occupancy: int
    faults: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """No faults."""
        return not self.faults

    def as_json(self) -> dict[str, Any]:
        """The fields as JSON knows them."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


_kept: dict[str, KernelReport] = {}


def report(kernel: KernelSource, target: str, hints: Mapping[str, int] = _NO_HINTS) -> KernelReport:
    """Compile `kernel` for `target` (see `aot.compile` for the hints and errors) and read the machine code. Remembered on disk."""
    chip = find_target(target)
    key = f"{aot.cache_key(kernel, target, hints)}-{_VERSION}"
    if key not in _kept:
        entry = disk_cache.read("reports", key)
        found = None if entry is None else _from_entry(entry)
        if found is None:
            found = read_machine_code(aot.compile(kernel, target, hints), chip)
            disk_cache.write("reports", key, found.as_json())
        _kept[key] = found
    return _kept[key]


def read_machine_code(compiled: Compiled, chip: Target) -> KernelReport:
    """The report of a compiled kernel."""
    return _read_cuda(compiled, chip) if chip.backend == "cuda" else _read_hip(compiled, chip)


def sass(compiled: Compiled) -> str:
    """The machine instructions as text: SASS, or the assembly on HIP."""
    if "cubin" not in compiled.asm:
        return compiled.text("amdgcn")
    return _tool("nvdisasm", compiled, "-c")


def hints_of(step: Step) -> dict[str, int]:
    """What a launch of this kernel tells Triton of its integers: 1 where one is 1, 16 where it is a multiple of 16."""
    return {name: 1 if value == 1 else 16 for name, value in step.integers.items() if value == 1 or value % 16 == 0}


def machine_text(state: State, kind: str) -> str:
    """A stage of every kernel of a lowered program: "ttir", "ttgir", "llir", "ptx", "amdgcn" or "sass" (on HIP the assembly).

    Raises ArgumentError for a kind that the target does not have, and what `aot.compile` raises.
    """
    texts = []
    for step in state.steps:
        assert step.source is not None, "a program lowered for a CPU has no machine code"
        compiled = aot.compile(step.source, state.target.name, hints_of(step))
        if kind != "sass" and not isinstance(compiled.asm.get(kind), str):
            kinds = ", ".join(name for name, text in compiled.asm.items() if isinstance(text, str))
            raise ArgumentError(f"the target {state.target.name} has no {kind!r}", help=f"it has {kinds}, sass")
        texts.append(sass(compiled) if kind == "sass" else compiled.text(kind))
    return "\n".join(texts)


def _from_entry(entry: dict[str, Any]) -> KernelReport | None:
    try:
        widths = {name: tuple((width, count) for width, count in entry[name]) for name in ("load_bytes", "store_bytes")}
        loads = tuple((line, width, copied) for line, width, copied in entry["loads"])
        return KernelReport(**{**entry, **widths, "loads": loads, "faults": tuple(entry["faults"])})
    except (KeyError, TypeError, ValueError):
        return None


# ---------------------------------------------------------------------------------------------------------------------
# Loads by the line of the source that they come from. The text before the assembler has the lines, as `.loc FILE LINE COLUMN`.

_PTX_LOAD = re.compile(r"\bld\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)\b")
_PTX_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global .*?\], (?:0x)?([0-9a-f]+)")
_LINE = re.compile(r"^\s*\.loc\s+1 (\d+) ")


def _loads(compiled: Compiled) -> Loads:
    """Each kind of load of each line, once."""
    cuda = "ptx" in compiled.asm
    found: dict[tuple[int, int, bool], None] = {}
    at = 0
    for text in compiled.text("ptx" if cuda else "amdgcn").splitlines():
        if line := _LINE.match(text):
            at = int(line.group(1)) or at
        elif cuda and (copy := _PTX_COPY.search(text)):
            found[at, int(copy.group(1), 16), True] = None
        elif cuda and "cp.async.bulk.tensor" in text and ".global.shared" not in text:
            found[at, 16, True] = None
        elif cuda and (load := _PTX_LOAD.search(text)):
            found[at, int(load.group(1) or 1) * int(load.group(2)) // 8, False] = None
        elif not cuda and (memory := _HIP_MEMORY.match(text)) and memory.group(1) == "load":
            found[at, _HIP_BYTES.get(memory.group(3), 4), bool(memory.group(2))] = None
    return tuple(sorted(found))


_LONG = re.compile(r"= arith\.(?:addi|subi|muli) .*: tensor<\w+xi64>")


def _long_offsets(compiled: Compiled) -> int:
    """Operations on tiles of 64-bit integers inside loops, in Triton's own form."""
    count = 0
    loops: list[int] = []
    for text in compiled.text("ttir").splitlines():
        indent = len(text) - len(text.lstrip())
        if loops and indent <= loops[-1] and text.lstrip().startswith("}"):
            loops.pop()
        if re.search(r"\bscf\.(?:for|while)\b", text):
            loops.append(indent)
        elif loops and _LONG.search(text):
            count += 1
    return count


# ---------------------------------------------------------------------------------------------------------------------
# CUDA


def _tool(name: str, compiled: Compiled, option: str) -> str:
    triton = require_triton()
    path = Path(str(triton.__file__)).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise MissingPackage(f"this Triton comes without {name}", help='pip install --force-reinstall "triton>=3.5"')
    binary = compiled.asm["cubin"]
    assert isinstance(binary, bytes)
    handle, cubin = tempfile.mkstemp(suffix=".cubin")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(binary)
        done = subprocess.run([str(path), option, cubin], capture_output=True, text=True, check=False)
    finally:
        os.unlink(cubin)
    if done.returncode != 0:
        raise CompileError(f"{name} cannot read the machine code of kernel {compiled.name}: {done.stderr.strip()}")
    return done.stdout


_SASS = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.a-z]*)", re.MULTILINE)
# Instructions by what they start with: fifth generation tensor cores, warp groups, warps.
_CUDA_TENSOR = {r"UTC\w*MMA": "tcgen05", r"[HIQ]GMMA": "wgmma", r"[HIDQ]MMA": "mma"}
_LOADS, _STORES, _LOCAL = {"LDG", "LDGSTS", "LD", "UTMALDG", "UBLKCP"}, {"STG", "ST", "UTMASTG"}, {"LDL", "STL"}
_ASYNC = {"LDGSTS", "UTMALDG", "UBLKCP"}


def _read_cuda(compiled: Compiled, chip: Target) -> KernelReport:
    usage = _tool("cuobjdump", compiled, "-res-usage")
    numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    names = _SASS.findall(sass(compiled))
    heads = [name.split(".")[0] for name in names]
    pairs = list(zip(names, heads, strict=True))
    return _finish(
        compiled,
        chip,
        registers=numbers["REG"],
        stack=numbers["STACK"],
        spills=sum(head in _LOCAL for head in heads),
        tensor_core=next((kind for pattern, kind in _CUDA_TENSOR.items() if any(re.match(pattern, head) for head in heads)), None),
        loads=Counter(_cuda_width(name) for name, head in pairs if head in _LOADS),
        stores=Counter(_cuda_width(name) for name, head in pairs if head in _STORES),
        async_copies=sum(head in _ASYNC for head in heads),
    )


def _cuda_width(name: str) -> int:
    """Bytes per thread: `LDG.E.128` 16, `LDG.E.U16` 2, `LDG.E` 4; the bulk copies of the tensor memory accelerator count as 16."""
    if name.startswith("U"):
        return 16
    sizes = [int(bits) for bits in re.findall(r"\.[USF]?(8|16|64|128|256)\b", name)]
    return sizes[-1] // 8 if sizes else 4


# ---------------------------------------------------------------------------------------------------------------------
# HIP

_HIP_MEMORY = re.compile(r"^\s+(?:global|buffer|flat)_(load|store)_(lds_)?([a-z]+\w*?)(?:_\w+)?(\s.*)$", re.MULTILINE)
_HIP_BYTES = {"byte": 1, "ubyte": 1, "sbyte": 1, "short": 2, "ushort": 2, "sshort": 2, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}


def _read_hip(compiled: Compiled, chip: Target) -> KernelReport:
    text = compiled.text("amdgcn")
    numbers = {key: int(value) for key, value in re.findall(r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s+(\d+)", text)}
    memory = _HIP_MEMORY.findall(text)
    return _finish(
        compiled,
        chip,
        registers=numbers["vgpr_count"],
        stack=numbers["private_segment_fixed_size"],
        spills=numbers["vgpr_spill_count"],
        tensor_core="mfma" if re.search(r"^\s+v_mfma_", text, re.MULTILINE) else None,
        loads=Counter(_HIP_BYTES.get(size, 4) for direction, _, size, _ in memory if direction == "load"),
        stores=Counter(_HIP_BYTES.get(size, 4) for direction, _, size, _ in memory if direction == "store"),
        async_copies=sum(bool(to_lds) or rest.rstrip().endswith(" lds") for _, to_lds, _, rest in memory),
    )


# ---------------------------------------------------------------------------------------------------------------------


def occupancy(chip: Target, registers: int, shared: int, num_warps: int) -> int:
    """Blocks that fit on one SM at once; 0 if not even one does. registers: per thread; shared: bytes per block."""
    threads = num_warps * chip.warp
    step = 256 if chip.backend == "cuda" else 512
    per_warp = -(-max(registers, 1) * chip.warp // step) * step
    reserved = 1024 if chip.backend == "cuda" else 0
    limits = [chip.blocks, chip.threads // threads, chip.registers_sm // (per_warp * num_warps)]
    if shared + reserved > 0:
        limits.append(chip.shared_sm // (shared + reserved) if shared <= chip.shared_block else 0)
    return min(limits)


def _finish(
    compiled: Compiled, chip: Target, *, registers: int, stack: int, spills: int, loads: Counter[int], stores: Counter[int], **rest: Any
) -> KernelReport:
    threads = compiled.num_warps * chip.warp
    fits = occupancy(chip, registers, compiled.shared, compiled.num_warps)
    faults = []
    if spills:
        what = "instructions touch spilled registers" if chip.backend == "cuda" else "vector registers are spilled to memory"
        faults.append(f"{spills} {what}")
    if stack:
        faults.append(f"each thread keeps {stack} bytes on a stack in memory")
    if compiled.shared > chip.shared_block:
        faults.append(f"a block needs {compiled.shared} bytes of shared memory, {chip.chip} has {chip.shared_block}")
    elif fits == 0:
        faults.append(f"no block fits: {registers} registers for each of {threads} threads, an SM of {chip.chip} has {chip.registers_sm}")
    return KernelReport(
        name=compiled.name,
        target=chip.name,
        registers=registers,
        stack=stack,
        spills=spills,
        shared=compiled.shared,
        local_memory=bool(stack or spills),
        load_bytes=tuple(sorted(loads.items(), reverse=True)),
        store_bytes=tuple(sorted(stores.items(), reverse=True)),
        loads=_loads(compiled),
        long_offsets=_long_offsets(compiled),
        occupancy=fits,
        faults=tuple(faults),
        **rest,
    )
