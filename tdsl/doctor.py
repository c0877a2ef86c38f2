"""One page about this machine, to paste into a bug report: versions, devices, caches, and every executor tried on a small program.

$ tdsl doctor
$ tdsl doctor --settings
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowering import cpp_launch, disk_cache
from lowering.targets import TARGETS
from tdsl.config import SETTINGS, config
from tdsl.devices import target_of
from tdsl.errors import Error, Unsupported
from tdsl.function import Function
from tdsl.page import Page, Section, Table, quantity
from tdsl.text import parse

# Packages and what is lost without each.
PACKAGES = {
    "torch": "everything but the language",
    "triton": "GPUs; pip install triton (Linux)",
    "numpy": "the reference executor",
    "lark": "the notation as text",
    "opt_einsum": "long contractions",
    "rich": "explain in colour",
    "platformdirs": "the place of the cache",
    "filelock": "several processes that tune",
}
PROGRAM = "S[i,j] += Q[i,d] * K[j,d]\nP[i,j] = softmax[j](S[i,j])\nO[i,e] += P[i,j] * V[j,e]"


@dataclass(frozen=True, slots=True)
class Trial:
    """One executor on a small program, forward and backward. seconds: with compiling. failure: "" where it agrees with torch;
    missing: what it needs and this machine does not have."""

    executor: str
    seconds: float = 0.0
    failure: str = ""
    missing: str = ""

    @property
    def verdict(self) -> str:
        """One word or one line."""
        return self.failure or (f"not tried: {self.missing}" if self.missing else "works")


@dataclass(frozen=True, slots=True)
class Diagnosis(Page):
    """What doctor() found. ok: nothing that was tried failed."""

    versions: tuple[tuple[str, str], ...]
    devices: tuple[tuple[str, str], ...]
    caches: tuple[tuple[str, str], ...]
    trials: tuple[Trial, ...]
    mends: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return not any(t.failure for t in self.trials)

    def sections(self) -> tuple[Section, ...]:
        """The page."""
        trials = tuple((t.executor, quantity(t.seconds, "s") if t.seconds else "-", t.verdict) for t in self.trials)
        return (
            Section("versions", Table(("what", "version"), self.versions), level=1),
            Section("devices", Table(("device", "what it is"), self.devices), level=1),
            Section("caches", Table(("cache", "where"), self.caches), level=1),
            settings(),
            Section("executors", Table(("executor", "took", "verdict"), trials), level=1),
            Section("to mend", "\n".join(self.mends) or "nothing", level=1),
        )

    def as_json(self) -> dict[str, Any]:
        """The same as JSON knows it."""
        return {
            "ok": self.ok,
            "versions": dict(self.versions),
            "devices": dict(self.devices),
            "caches": dict(self.caches),
            "settings": {name: {"value": getattr(config, name), "from": config.source(name)} for name in SETTINGS},
            "executors": [{"name": t.executor, "seconds": t.seconds, "failure": t.failure, "missing": t.missing} for t in self.trials],
            "mends": list(self.mends),
        }


def doctor() -> Diagnosis:
    """Looks at this machine and tries every executor that it has."""
    versions = tuple(_versions())
    trials = tuple(_trials())
    mends = [f"{name}: not installed; without it: {PACKAGES[name]}" for name, version in versions if version == "missing"]
    mends += [f"{t.executor}: {t.missing}" for t in trials if t.missing]
    mends += [f"{t.executor}: {t.failure.splitlines()[0]}" for t in trials if t.failure]
    if not os.access(_writable(disk_cache.directory()), os.W_OK):
        mends.append(f"the cache {disk_cache.directory()} cannot be written: set TDSL_CACHE to a folder that can")
    return Diagnosis(versions, tuple(_devices()), tuple(_caches()), trials, tuple(mends))


def settings() -> Section:
    """The settings, their values, and where these come from."""
    rows = tuple(
        (name, repr(getattr(config, name)), config.source(name), s.variable, s.keyword or "-", s.meaning + _choices(s.choices))
        for name, s in SETTINGS.items()
    )
    return Section("settings", Table(("setting", "value", "from", "environment", "keyword of", "meaning"), rows), level=1)


def _choices(choices: tuple[str, ...]) -> str:
    return f" ({', '.join(choices)})" if choices else ""


# ---------------------------------------------------------------------------------------------------------------------
# Looking


def _versions() -> Iterator[tuple[str, str]]:
    from tdsl import __version__

    yield "tdsl", __version__
    yield "Python", f"{platform.python_version()} on {platform.platform()}"
    for name in PACKAGES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "missing"
        if name == "torch":
            version += f", built for {_build()}"
        yield name, version
    compiler = cpp_launch.compiler()
    yield "C++ compiler", _first_line([compiler, "--version"]) if compiler else "none"


def _build() -> str:
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}" if torch.version.hip else "CPUs only"


def _first_line(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]}: {error}"
    return (done.stdout or done.stderr).partition("\n")[0].strip()


def _devices() -> Iterator[tuple[str, str]]:
    yield "cpu", f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    for n in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(n)
        name = f"{p.name}, {quantity(p.total_memory, 'B')}, {p.multi_processor_count} multiprocessors"
        yield f"cuda:{n}", f"{name}, compiled for as {target_of(torch.device('cuda', n))}"
    if shutil.which("nvidia-smi") and torch.cuda.is_available():
        yield "driver", _first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _caches() -> Iterator[tuple[str, str]]:
    folder = disk_cache.directory()
    state = "" if os.access(_writable(folder), os.W_OK) else " (cannot be written)"
    yield "tdsl", f"{folder}{state}: {_contents(folder)}"
    triton = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    yield "triton", f"{triton}: {_contents(triton)}"


def _writable(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists: that one must be writable."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def _contents(folder: Path) -> str:
    files = [p.stat().st_size for p in folder.rglob("*") if p.is_file()] if folder.is_dir() else []
    return f"{len(files)} files, {quantity(sum(files), 'B')}" if files else "empty"


# ---------------------------------------------------------------------------------------------------------------------
# Trying


def _trials() -> Iterator[Trial]:
    no_triton = "" if _has("triton") else "install triton (Linux): pip install triton"
    yield _tried("reference", lambda: _run("reference"))
    yield _tried("torch code on the CPU", lambda: _run("torch", cpu="torch"))
    no_compiler = "" if cpp_launch.compiler() else "install g++ or clang++, or set CXX"
    yield _tried("C++ on the CPU", lambda: _run("torch", cpu="c++"), no_compiler)
    yield _tried("Triton's interpreter", lambda: _run("triton"), no_triton)
    for target in TARGETS:
        if target != "cpu":
            yield _tried(f"Triton's compiler for {target}", lambda t=target: _compile(t), no_triton)  # type: ignore[misc]
    for n in range(torch.cuda.device_count()):
        yield _tried(f"Triton on cuda:{n}", lambda n=n: _run("triton", device=f"cuda:{n}"), no_triton)  # type: ignore[misc]
    if not torch.cuda.device_count():
        yield Trial("Triton on a GPU", missing=_why_no_gpu())
    yield _tried("torch.compile", _torch_compile)


def _why_no_gpu() -> str:
    if not (torch.version.cuda or torch.version.hip):
        return "this torch is built for CPUs only; on a machine with a GPU, install the build for it (pytorch.org)"
    return "no GPU is visible to torch: look at nvidia-smi or rocm-smi, and at CUDA_VISIBLE_DEVICES"


def _has(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _tried(executor: str, work: Callable[[], None], missing: str = "") -> Trial:
    if missing:
        return Trial(executor, missing=missing)
    started = time.perf_counter()
    try:
        work()
    except Unsupported as error:
        return Trial(executor, time.perf_counter() - started, missing=error.what)
    except Exception as error:  # a doctor reports what happens, whatever it is
        text = str(error) if isinstance(error, Error) else f"{type(error).__name__}: {error}"
        return Trial(executor, time.perf_counter() - started, failure=text.strip() or type(error).__name__)
    return Trial(executor, time.perf_counter() - started)


def _arguments(device: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in ((17, 16), (19, 16), (19, 16))]


def _check(f: Callable[..., torch.Tensor], device: str = "cpu") -> None:
    """Compares with torch: the result, and the gradients of the sum of its squares."""
    q, k, v = args = _arguments(device)
    found, wanted = f(*args), torch.softmax(q @ k.T, 1) @ v
    pairs = [(found, wanted), *zip(*(torch.autograd.grad(y.square().sum(), args) for y in (found, wanted)), strict=True)]
    for a, b in pairs:
        torch.testing.assert_close(a, b, atol=5e-3, rtol=5e-3)


def _run(backend: str, device: str = "cpu", cpu: str | None = None) -> None:
    with config.using(**({"cpu": cpu} if cpu else {})):
        _check(Function(parse(PROGRAM), backend), device)


def _compile(target: str) -> None:
    f = Function(parse(PROGRAM))
    f.check("fp32[128,64]", "fp32[128,64]", "fp32[128,64]", target=target)


def _torch_compile() -> None:
    torch._dynamo.reset()
    _check(torch.compile(Function(parse(PROGRAM)), fullgraph=True, backend="aot_eager"))
