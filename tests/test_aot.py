"""Compiling for every target with no GPU, and what the reports say about the machine code."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton")

from lowering import aot, disk_cache
from lowering import report as reports
from lowering.report import KernelReport, occupancy, report
from lowering.targets import TARGETS, find_target
from tdsl import errors
from tests.sample_kernels import elementwise, matmul, row_softmax, scatter_add, source

GPUS = [name for name in TARGETS if name != "cpu"]
TENSOR_CORE = {"cuda:80": "mma", "cuda:90": "wgmma", "cuda:100": "tcgen05", "hip:gfx942": "mfma"}
ALIGNED = {"M": 16, "N": 16, "K": 16}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TDSL_CACHE", str(tmp_path))
    monkeypatch.setattr(aot, "_kept", {})
    monkeypatch.setattr(reports, "_kept", {})
    return tmp_path


@pytest.mark.parametrize("target", GPUS)
@pytest.mark.parametrize("make", [elementwise, row_softmax, scatter_add, matmul])
def test_sample_kernels_have_no_faults(make, target: str) -> None:  # type: ignore[no-untyped-def]
    for dtype in ["bfloat16", "float32"]:
        found = report(make(dtype), target)
        assert (found.faults, found.stack, found.spills, found.local_memory) == ((), 0, 0, False)
        assert 0 < found.registers <= find_target(target).registers_thread
        assert found.occupancy >= 1
        assert found.load_bytes


@pytest.mark.parametrize("target", GPUS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_an_aligned_matmul_uses_the_tensor_cores_and_wide_copies(dtype: str, target: str) -> None:
    found = report(matmul(dtype, tile=(128, 128, 64), num_warps=8), target, ALIGNED)
    assert found.faults == ()
    assert found.tensor_core == TENSOR_CORE[target]
    assert found.load_bytes[0][0] == 16
    assert len(found.load_bytes) == 1
    assert (found.async_copies > 0) == target.startswith("cuda")


@pytest.mark.parametrize("target", GPUS)
def test_matmuls_of_other_dtypes_compile(target: str) -> None:
    assert report(matmul("float64"), target, ALIGNED).faults == ()
    assert report(matmul("int8", "int32"), target, ALIGNED).faults == ()
    assert report(matmul("float32", precision="ieee"), target).tensor_core in (None, "mfma")
    assert report(matmul("float32", precision="tf32", tile=(64, 64, 32)), target).tensor_core is not None


def test_hints_decide_the_width_of_loads() -> None:
    wide = report(elementwise("float32"), "cuda:90", {"N": 16})
    narrow = report(elementwise("float32"), "cuda:90", {"X": 1, "Y": 1})
    assert narrow.load_bytes[0][0] == 4
    assert narrow.store_bytes[0][0] == 4
    assert wide.load_bytes[0][0] >= narrow.load_bytes[0][0]


def test_a_hint_of_one_is_a_constant() -> None:
    kernel = elementwise("float32")
    assert "%N" in aot.compile(kernel, "cuda:90").text("ttir")
    assert "%N" not in aot.compile(kernel, "cuda:90", {"N": 1}).text("ttir")


@pytest.mark.parametrize("target", GPUS)
def test_the_stages_of_a_compiled_kernel(target: str) -> None:
    compiled = aot.compile(elementwise("float32"), target)
    expected = {"cuda": {"ttir", "ttgir", "llir", "ptx", "cubin"}, "hip": {"ttir", "ttgir", "llir", "amdgcn", "hsaco"}}
    assert set(compiled.asm) == expected[find_target(target).backend]
    assert "tt.func public @elementwise" in compiled.text("ttir")
    assert reports.sass(compiled).strip()


def test_spills_are_faults() -> None:
    found = report(matmul("float16", tile=(256, 256, 64), num_warps=4), "cuda:80", ALIGNED)
    assert found.local_memory
    assert any("spilled" in fault for fault in found.faults)
    assert any("stack" in fault for fault in found.faults)


def test_too_much_shared_memory_is_a_fault() -> None:
    found = report(matmul("float32", precision="tf32", tile=(128, 256, 128), num_warps=8), "hip:gfx942", ALIGNED)
    assert found.shared > 65536
    assert any("shared memory, MI300X has 65536" in fault for fault in found.faults)
    assert found.occupancy == 0


@pytest.mark.parametrize(
    "target, registers, shared, warps, blocks",
    [
        ("cuda:90", 32, 0, 4, 16),  # threads
        ("cuda:90", 32, 0, 1, 32),  # blocks
        ("cuda:90", 128, 98304, 8, 2),  # registers and shared memory
        ("cuda:90", 168, 0, 4, 3),  # registers
        ("cuda:80", 32, 100000, 4, 1),  # shared memory
        ("cuda:80", 32, 166913, 4, 0),
        ("hip:gfx942", 128, 32768, 4, 2),
        ("hip:gfx942", 256, 0, 4, 2),
    ],
)
def test_occupancy(target: str, registers: int, shared: int, warps: int, blocks: int) -> None:
    assert occupancy(find_target(target), registers, shared, warps) == blocks


def test_reports_and_kernels_are_remembered_on_disk(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = elementwise("float32")
    first = report(kernel, "cuda:90")
    compiled = aot.compile(kernel, "cuda:90")
    monkeypatch.setattr(aot, "_kept", {})
    monkeypatch.setattr(reports, "_kept", {})
    monkeypatch.setattr(aot, "_compile", lambda *_: pytest.fail("compiled again"))
    assert report(kernel, "cuda:90") == first
    assert aot.compile(kernel, "cuda:90") == compiled
    assert sorted(p.parent.name for p in own_cache.rglob("*.json")) == ["kernels", "reports"]
    assert not list(own_cache.rglob("*.tmp"))


def test_a_corrupt_or_foreign_file_is_made_anew(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = elementwise("float32")
    expected = report(kernel, "cuda:90")
    for text in ("{ no json", "[]"):
        for path in own_cache.rglob("*.json"):
            path.write_text(text)
        monkeypatch.setattr(reports, "_kept", {})
        monkeypatch.setattr(aot, "_kept", {})
        with pytest.warns(RuntimeWarning, match="corrupt cache file"):
            assert report(kernel, "cuda:90") == expected
    for path in own_cache.rglob("*.json"):
        path.write_text('{"of": "another version"}')
    monkeypatch.setattr(reports, "_kept", {})
    monkeypatch.setattr(aot, "_kept", {})
    assert report(kernel, "cuda:90") == expected


def test_a_cache_that_cannot_be_written_only_warns(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (own_cache / "file").write_text("")
    monkeypatch.setenv("TDSL_CACHE", str(own_cache / "file"))
    with pytest.warns(RuntimeWarning, match="cannot write the cache"):
        assert isinstance(report(elementwise("float32"), "cuda:90"), KernelReport)
    assert disk_cache.read("kernels", "none") is None


@pytest.mark.parametrize("target", ["cuda:70", "cuda", "gfx942", "", "cpu"])
def test_unknown_targets_are_errors(target: str) -> None:
    with pytest.raises(errors.ArgumentError, match="target"):
        aot.parse_target(target)


def test_bad_hints_are_errors() -> None:
    with pytest.raises(errors.ArgumentError, match="'TILE', which kernel elementwise does not take"):
        aot.compile(elementwise("float32"), "cuda:90", {"TILE": 16})
    with pytest.raises(errors.ArgumentError, match="can be 1 or 16"):
        aot.compile(elementwise("float32"), "cuda:90", {"N": 8})


def test_a_kernel_that_does_not_compile_says_which() -> None:
    with pytest.raises(errors.CompileError, match="kernel broken does not compile for cuda:90"):
        aot.compile(source("broken", "\n    tl.store(X, undefined)\n", X="float32"), "cuda:90")
    with pytest.raises(errors.CompileError, match="is not Python"):
        aot.compile(source("broken", "\n    tl.store(X,\n", X="float32"), "cuda:90")


def test_interpreting_leaves_compiling_as_it_is() -> None:
    torch = pytest.importorskip("torch")
    from lowering.triton_launch import launch

    kernel = row_softmax("float32")
    before = aot._compile(kernel, "cuda:90", aot.parse_target("cuda:90"), {}).text("ptx")
    x, y = torch.randn(2, 100), torch.zeros(2, 100)
    launch(kernel, 2, (x, y, 100), interpret=True)
    torch.testing.assert_close(y, torch.softmax(x, 1))
    assert aot._compile(kernel, "cuda:90", aot.parse_target("cuda:90"), {}).text("ptx") == before
