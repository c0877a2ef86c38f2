"""Launches past Triton's dispatch hand the launcher what Triton's dispatch hands it; what watches or changes launches goes Triton's way.

There is no device here: kernels are compiled, and a launcher that only notes its arguments stands in for the driver's.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")

import tdsl  # noqa: E402
from benchmarks.no_device import Driver, no_device, on_device  # noqa: E402
from lowering import triton_direct  # noqa: E402
from lowering.kernel_source import KernelSource  # noqa: E402
from lowering.triton_direct import DeviceLauncher, jit_function, number_class, scratch  # noqa: E402
from lowering.triton_launch import launch, launcher, on_launch  # noqa: E402
from tests.sample_kernels import elementwise, matmul, source  # noqa: E402

pytestmark = pytest.mark.skipif(
    not triton.__version__.startswith(tuple(f"{v}." for v in triton_direct.KNOWN)), reason="kernels of this Triton are launched by its own means"
)

PROGRAMS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "fma": ("y[i] = x[i] * a[i] + b[i]", ("fp32[1000]",) * 3),
    "softmax": ("Y[n,c] = softmax[c](X[n,c])", ("bf16[64,200]",)),
    "scaled": ("def scaled(X[i], scale, n) -> Y[i]:\n    Y[i] = scale * X[i] + i // n", ("fp16[64]", 0.5, 3)),
    "gather": ("def gather(ids[t], E[v,d]) -> Y[t,d]:\n    Y[t,d] = E[ids[t],d]", ("int64[7]", "fp32[50,32]")),
    "a column": ("Y[i,j] = X[i,j] * c[i]", ("fp32[64,1]", "fp32[64]")),
    "tiles moved by descriptors": ("Y[i,j] += A[i,k] * B[k,j]", ("bf16[4096,4096]",) * 2),
}


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test compiles for its own driver."""
    monkeypatch.setattr(triton_direct, "_jitted", {})


@contextmanager
def resolutions(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the kernels that Triton's dispatch launches meanwhile."""
    names: list[str] = []
    run = triton.runtime.jit.JITFunction.run

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(self.__name__)
        return run(self, *args, **kwargs)

    with monkeypatch.context() as m:
        m.setattr(triton.runtime.jit.JITFunction, "run", counted)
        yield names


def kernel_of(text: str, args: tuple[Any, ...]) -> tuple[KernelSource, list[int]]:
    """The only kernel of a program, and its sizes and strides."""
    (step,) = tdsl.function(text).lower(*args, target="cuda:90").steps
    assert step.source is not None
    return step.source, list(step.integers.values())


def values_of(kernel: KernelSource, integers: list[int], shift: int = 0, n: int = 3) -> list[Any]:
    """What a launch gives besides the integers; tensors begin `shift` elements behind a multiple of 16 bytes."""
    given = kernel.runtime_args[: len(kernel.runtime_args) - len(integers)]
    kinds = {"pointer": lambda a: tensor(a.dtype, shift), "float": lambda a: 0.5, "int": lambda a: n}
    return [kinds[a.kind](a) for a in given]


def tensor(dtype: str = "float32", shift: int = 0) -> torch.Tensor:
    return on_device(torch.zeros(64, dtype=getattr(torch, dtype))[shift:])


def through_triton(driver: Driver, kernel: KernelSource, grid: int, values: list[Any]) -> tuple[Any, ...]:
    """The arguments that Triton's own dispatch hands the launcher."""
    given = iter(values)
    function = jit_function(kernel)
    function[(grid,)](*(a.value if a.kind == "constexpr" else next(given) for a in kernel.args), **kernel.options)
    return driver.launches.pop()


def same(direct: tuple[Any, ...], theirs: tuple[Any, ...]) -> None:
    """x, y, z, stream, function, packed metadata; then metadata and hooks, of which there are none; then the kernel's arguments."""
    assert direct[:6] == theirs[:6]
    assert direct[6:9] == (None, None, None)
    assert not getattr(theirs[7], "calls", theirs[7]) and not getattr(theirs[8], "calls", theirs[8])
    assert len(direct) == len(theirs)
    assert all(a is b if isinstance(b, torch.Tensor) else (type(a), a) == (type(b), b) for a, b in zip(direct[9:], theirs[9:], strict=True))


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("name", PROGRAMS)
def test_generated_kernels(name: str, shift: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, integers = kernel_of(*PROGRAMS[name])
    assert (kernel.otherwise is not None) == ("make_tensor_descriptor" in kernel.source) == (name == "tiles moved by descriptors")
    values = values_of(kernel, integers, shift)
    chosen, rest = kernel, [*values, *integers]
    if kernel.otherwise is not None and shift:
        chosen, rest = kernel.otherwise.kernel, [rest[n] for n in kernel.otherwise.values]
    run = launcher(kernel, 5, integers, interpret=False)
    with no_device() as driver, resolutions(monkeypatch) as resolved:
        run(values)
        first = driver.launches.pop()
        run(values)
        assert resolved == [chosen.name]
        theirs = through_triton(driver, chosen, 5, rest)
        same(driver.launches.pop(), theirs)
        same((*first[:6], None, None, None, *first[9:]), theirs)


@pytest.mark.parametrize("n", [1, 16, 17, 2**31, 2**31 + 1])
def test_ints_of_each_class(n: int) -> None:
    with no_device() as driver:
        for kernel in (elementwise("float32"), source("wide", "\n    tl.store(X + n, 1.0)\n", X="float32", n="int64")):
            values = [*(tensor() for a in kernel.runtime_args if a.kind == "pointer"), n]
            run = DeviceLauncher(kernel, 3)
            run(values)
            run(values)
            direct = driver.launches.pop()
            same(direct, through_triton(driver, kernel, 3, values))


def test_another_class_is_another_kernel_and_is_resolved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever comes, the function of a launch is the one that Triton's dispatch finds."""
    kernel = elementwise("float32")
    x, y = tensor(), tensor()
    odd = tensor(shift=1)
    cases: list[list[Any]] = [[x, y, 48], [x, y, 50], [x, y, 1], [odd, y, 48], [x, odd, 48], [odd, odd, 50], [x, y, 2**40]]
    run = DeviceLauncher(kernel, 1)
    with no_device() as driver, resolutions(monkeypatch) as resolved:
        for case in cases:
            run(case)
        assert len(resolved) == len(cases)
        functions = [arguments[4] for arguments in driver.launches]
        assert len({*functions}) == len(cases)
        driver.launches.clear()
        likes = [0, 0, 1, 3]
        more = [[x, y, 64], [y, x, 64], [x, y, 51], [odd, y, 16]]
        for case, like in [*zip(cases, range(len(cases)), strict=True), *zip(more, likes, strict=True)] * 3:
            run(case)
            assert driver.launches.pop()[4] == functions[like]
        assert len(resolved) == len(cases)


def test_sizes_of_one_class_are_resolved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = matmul("float32")
    tensors = [tensor() for _ in range(3)]
    with no_device() as driver, resolutions(monkeypatch) as resolved:
        for sizes in ((32, 48, 64), (16, 160, 80), (64, 64, 64)):
            DeviceLauncher(kernel, 2, sizes)(tensors)
        assert len(resolved) == 1
        DeviceLauncher(kernel, 2, (33, 48, 64))(tensors)
        assert len(resolved) == 2
        launch(kernel, 2, [*tensors, 35, 48, 64])
        assert len(resolved) == 2
        assert [arguments[12:15] for arguments in driver.launches] == [
            (32, 48, 64),
            (16, 160, 80),
            (64, 64, 64),
            (33, 48, 64),
            (35, 48, 64),
        ]


@pytest.mark.parametrize("backend", ["cuda", "hip"])
def test_classes_are_no_coarser_than_tritons(backend: str) -> None:
    """Numbers that are of one class are alike to Triton's binder."""
    from triton.backends.compiler import GPUTarget

    numbers = [
        -(2**63),
        -(2**31) - 16,
        -(2**31),
        -17,
        -16,
        -1,
        0,
        1,
        2,
        15,
        16,
        17,
        2**31 - 16,
        2**31 - 1,
        2**31,
        2**31 + 1,
        2**32,
        2**63 - 1,
    ]
    numbers += [2**63, 2**64 - 1, 2**64 - 16, 0.5, 1.0, 16.0, True, False]  # type: ignore[list-item]
    kernel = source("both", "\n    tl.store(X, n + m)\n", X="float32", n="int64", m="int32")
    with no_device(GPUTarget(backend, 90, 32) if backend == "cuda" else GPUTarget("hip", "gfx942", 64)):
        *_, binder = jit_function(kernel).device_caches[0]
        for annotated in (True, False):
            found: dict[object, object] = {}
            for n in numbers:
                if annotated and type(n) is not int:
                    continue
                _, specialization, _ = binder(*((tensor(), n, 2) if annotated else (tensor(), 2, n)))
                assert found.setdefault(number_class(n), specialization) == specialization


def test_hooks_see_every_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As profilers install them: before and after each launch, with the launch's metadata."""
    kernel = elementwise("float32")
    values = [tensor(), tensor(), 50]
    seen: list[tuple[str, str]] = []

    def enter(metadata: Any) -> None:
        seen.append(("enter", metadata.get()["name"]))

    def leave(metadata: Any) -> None:
        seen.append(("exit", metadata.get()["name"]))

    settings = triton.knobs.runtime
    run = DeviceLauncher(kernel, 1)
    with no_device(), resolutions(monkeypatch) as resolved:
        settings.launch_enter_hook.add(enter)
        settings.launch_exit_hook.add(leave)
        try:
            run(values)  # the first one too
            run(values)
        finally:
            settings.launch_enter_hook.remove(enter)
            settings.launch_exit_hook.remove(leave)
        assert seen == [("enter", "elementwise"), ("exit", "elementwise")] * 2
        assert len(resolved) == 2
        run(values)
        run(values)
        assert len(resolved) == 3
        settings.launch_exit_hook.add(leave)
        try:
            run(values)
        finally:
            settings.launch_exit_hook.remove(leave)
        assert seen[4:] == [("exit", "elementwise")]
        calls: list[Any] = []
        run.jitted.function.add_pre_run_hook(lambda *args, **_: calls.append(args))  # type: ignore[union-attr]
        run(values)
        run(values)
        assert len(calls) == 2


def test_what_changes_the_compiler_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = elementwise("float32")
    values = [tensor(), tensor(), 50]
    run = DeviceLauncher(kernel, 1)
    inspected: list[int] = []

    def inspect(*_: Any) -> tuple[str, str]:
        inspected.append(1)
        return "key", "hash"

    with no_device(), resolutions(monkeypatch) as resolved:
        run(values)
        with monkeypatch.context() as m:
            m.setattr(triton.knobs.runtime, "debug", True)
            run(values)
            run(values)
        assert len(resolved) == 2
        run(values)
        assert len(resolved) == 2
        with monkeypatch.context() as m:
            m.setattr(triton.knobs.runtime, "add_stages_inspection_hook", inspect)
            for _ in range(3):
                run(values)
        assert len(inspected) >= 3 or triton.__version__.startswith(("3.5.", "3.6."))  # which ask the hook when they compile alone
        assert len(resolved) == 5


def test_streams_and_devices_are_the_current_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = elementwise("float32")
    values = [tensor(), tensor(), 50]
    run = DeviceLauncher(kernel, 1)
    entered: list[int] = []

    @contextmanager
    def device(index: int) -> Iterator[None]:
        entered.append(index)
        before, driver.device = driver.device, index
        try:
            yield
        finally:
            driver.device = before

    monkeypatch.setattr(torch.cuda, "device", device)
    with no_device() as driver:
        for stream in (3, 4, 5):
            driver.stream = stream
            run(values)
        assert [arguments[3] for arguments in driver.launches] == [3, 4, 5]
        assert entered == []
        driver.device = 1  # the tensors stay where they are
        run(values)
        DeviceLauncher(kernel, 1)(values)
        assert entered == [0, 0]
        assert driver.device == 1


def test_an_unknown_triton_launches_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", "9.0.0")
    run = DeviceLauncher(elementwise("float32"), 1)
    with no_device() as driver, resolutions(monkeypatch) as resolved:
        for _ in range(3):
            run([tensor(), tensor(), 50])
        assert len(resolved) == len(driver.launches) == 3


def test_globals_of_an_edited_kernel_are_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton refuses to run a kernel whose globals were changed after it was compiled."""
    kernel = source("f", "\n    tl.store(X, FACTOR)\n", "FACTOR: tl.constexpr = tl.constexpr(2.0)\n", X="float32")
    run = DeviceLauncher(kernel, 1)
    with no_device():
        run([tensor()])
        run([tensor()])
        run.jitted.function.__globals__["FACTOR"] = triton.language.constexpr(3.0)  # type: ignore[union-attr]
        with pytest.raises(RuntimeError, match="FACTOR has changed"):
            run([tensor()])


def test_observers_see_direct_launches() -> None:
    seen: list[Any] = []
    run = launcher(elementwise("float32"), 4, interpret=False)
    with no_device():
        run([tensor(), tensor(), 50])
        with on_launch(seen.append):
            run([tensor(), tensor(), 50])
    assert [(s.kernel.name, s.grid, s.interpreted) for s in seen] == [("elementwise", 4, False)]


def test_tensors_beyond_the_reach_of_buffer_instructions() -> None:
    """AMD's backend compiles another kernel where a tensor's memory is larger than 2 GiB."""
    from triton.backends.compiler import GPUTarget

    near, far = tensor(), on_device(torch.empty(2**29 + 64)[:64])
    run = DeviceLauncher(elementwise("float32"), 1)
    with no_device(GPUTarget("hip", "gfx942", 64)) as driver:
        for x in (near, near, far, far):
            run([x, near, 50])
            direct = driver.launches[-1]
            theirs = through_triton(driver, elementwise("float32"), 1, [x, near, 50])
            assert direct[:6] == theirs[:6]
    a, b, c, d = (arguments[4] for arguments in driver.launches)
    assert a == b != c == d


def test_descriptors_find_memory() -> None:
    import contextvars

    kernel, integers = kernel_of(*PROGRAMS["tiles moved by descriptors"])
    run = DeviceLauncher(kernel, 1, integers)
    values = values_of(kernel, integers)

    def allocator() -> Any:
        run(values)
        return triton.runtime._allocation._allocator.get()

    with no_device() as driver:
        for _ in range(2):  # through Triton, and direct
            assert contextvars.Context().run(allocator) is scratch
        assert len(driver.launches) == 2


def test_threads_launch_what_they_give() -> None:
    kernel = elementwise("float32")
    run = DeviceLauncher(kernel, 1)
    tensors = [[tensor(shift=n % 2), tensor(), 48 + n % 3] for n in range(8)]
    with no_device() as driver:
        threads = [threading.Thread(target=lambda v=v: [run(v) for _ in range(20)]) for v in tensors]  # type: ignore[misc]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert len(driver.launches) == 160
        for arguments in driver.launches[-40:]:
            theirs = through_triton(driver, kernel, 1, list(arguments[9:12]))
            assert arguments[4] == theirs[4]
