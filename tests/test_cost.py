"""The roofline: what work it counts, which bound it names, and that it follows sizes, dtypes and chips."""

from __future__ import annotations

import pytest

import tdsl
from lowering.cost import Prediction, predict, special_results
from lowering.targets import TARGETS
from tdsl.ops import OPS

MATMUL = "C[i,j] += A[i,k] * B[k,j]"
GPUS = [name for name in TARGETS if name != "cpu"]


def predicted(text: str, *args: object, target: str = "cuda:90", compiled: bool = True) -> Prediction:
    """The prediction of a program that is one kernel."""
    state = tdsl.function(text).lower(*args, target=target)
    assert state.plan is not None
    (kernel,), (step,) = state.plan.kernels, state.steps
    return predict(kernel, step.tile, state.target, compiled=compiled)


@pytest.mark.parametrize("target", GPUS)
def test_a_large_matmul_is_bound_by_the_tensor_cores(target: str) -> None:
    n = 8192
    found = predicted(MATMUL, *[f"bf16[{n},{n}]"] * 2, target=target)
    chip = TARGETS[target]
    assert found.bound == "tensor cores"
    assert found.flops == 2 * n**3
    assert found.compulsory_bytes == 3 * n * n * 2
    assert found.bytes >= found.compulsory_bytes
    ideal = found.flops / (chip.flops["bfloat16"] * chip.sustained_flops)
    assert ideal <= found.seconds - chip.launch <= 1.1 * ideal


def test_only_16_bit_and_tf32_operands_reach_the_tensor_cores() -> None:
    half, single = (predicted(MATMUL, *[f"{dtype}[2048,2048]"] * 2) for dtype in ("bf16", "fp32"))
    assert half.terms["tensor cores"] > 0
    assert (single.bound, single.terms["tensor cores"]) == ("arithmetic", 0)
    double = predicted(MATMUL, *["fp64[2048,2048]"] * 2)
    assert double.seconds > 1.5 * single.seconds


def test_a_product_without_a_dot_runs_on_the_vector_units() -> None:
    assert predicted("y[i] += A[i,k] * x[k]", "bf16[4096,4096]", "bf16[4096]").terms["tensor cores"] == 0


@pytest.mark.parametrize("target", GPUS)
def test_a_large_copy_is_bound_by_memory_and_moves_each_byte_once(target: str) -> None:
    found = predicted("Y[i,j] = X[j,i] + b[j]", "fp32[8192,4096]", "fp32[8192]", target=target)
    size = 2 * 8192 * 4096 * 4 + 8192 * 4
    assert (found.bound, found.compulsory_bytes) == ("memory", size)
    assert size <= found.bytes <= 1.1 * size
    assert found.seconds == pytest.approx(found.terms["memory"] + TARGETS[target].launch)


@pytest.mark.parametrize("target", GPUS)
@pytest.mark.parametrize(("given", "arg"), [("x", 1.0), ("x[j]", "fp32[16384]")])
def test_what_only_stores_waits_for_no_loads(given: str, arg: object, target: str) -> None:
    rows, columns = 1 << 15, 1 << 14
    found = predicted(f"def fill({given}) -> Y[{rows},{columns}]: for i in 0:{rows}, j in 0:{columns}: Y[i,j] = {given}", arg, target=target)
    chip = TARGETS[target]
    stored = 4 * rows * columns / (chip.bandwidth * chip.sustained_bandwidth)
    assert found.bound == "memory"
    assert stored <= found.seconds - chip.launch <= 1.05 * stored


def test_a_tiny_kernel_is_bound_by_its_launch() -> None:
    found = predicted("Y[i] = 2 * x[i]", "fp32[64]")
    assert found.bound == "launch"
    assert found.seconds >= TARGETS["cuda:90"].launch


def test_rereading_by_tiles_counts_where_the_cache_is_too_small() -> None:
    small, large = (predicted(MATMUL, *[f"bf16[{n},{n}]"] * 2) for n in (1024, 8192))
    assert small.bytes == small.compulsory_bytes
    assert large.bytes > 2 * large.compulsory_bytes


def test_a_gather_touches_only_the_rows_that_it_reads() -> None:
    found = predicted("Y[b,d] = E[ids[b],d]", "fp32[100000,64]", "i64[32]")
    assert found.compulsory_bytes == 32 * 64 * 4 * 2 + 32 * 8


def test_exponentials_are_counted() -> None:
    n = 4096
    found = predicted("S[i,j] = exp(x[i] - y[j]) + exp(x[i] * y[j])", f"fp32[{n}]", f"fp32[{n}]")
    assert found.exps == 2 * n * n
    half = predicted("S[i,j] = exp(x[i] - y[j]) + x[i] * y[j]", f"fp32[{n}]", f"fp32[{n}]")
    assert found.terms["exponentials"] == pytest.approx(2 * half.terms["exponentials"])


def test_special_results_are_read_off_the_table() -> None:
    counts = {op: special_results(op) for op in ("add", "where", "exp", "rsqrt", "div", "sigmoid")}
    assert counts == {"add": 0, "where": 0, "exp": 1, "rsqrt": 1, "div": 1, "sigmoid": 2}  # its exponential and its quotient
    assert all(special_results(op) > 0 for op, row in OPS.items() if row.kind == "float")


def test_an_idle_chip_costs_time() -> None:
    few, many = (predicted(MATMUL, f"bf16[64,{k}]", f"bf16[{k},{n}]") for k, n in ((4096, 64), (4096, 64 * 132)))
    assert few.share < 0.05
    assert many.share > 0.9
    assert many.terms["tensor cores"] < 10 * few.terms["tensor cores"]


def test_time_grows_with_the_work() -> None:
    times = [predicted(MATMUL, f"bf16[{n},{n}]", f"bf16[{n},{n}]").seconds for n in (1024, 2048, 4096, 8192)]
    assert times == sorted(times)
    assert 5 < times[3] / times[2] < 9


def test_on_a_cpu_large_intermediates_pass_through_memory_unless_compiled() -> None:
    text = "P[i,j] = softmax[j](X[i,j])"
    small, large = (predicted(text, f"fp32[{n},1024]", target="cpu", compiled=False) for n in (16, 16384))
    assert small.bytes == small.compulsory_bytes
    assert large.terms["tensor cores"] == 0
    whole = predicted(text, "fp32[16384,1024]", target="cpu")
    assert whole.bytes == whole.compulsory_bytes
    assert whole.seconds < large.seconds


def test_a_mask_that_bounds_the_loop_halves_the_work() -> None:
    text = """
        def attention(Q[h,i,d], K[h,j,d], V[h,j,e]) -> O[h,i,e]:
            S[h,i,j] += Q[h,i,d] * K[h,j,d]
            P[h,i,j] = softmax[j]({score})
            O[h,i,e] += P[h,i,j] * V[h,j,e]
    """
    scores = ("S[h,i,j]", "where(j <= i, S[h,i,j], -inf)", "where(j <= i and i - j < 128, S[h,i,j], -inf)")
    full, causal, window = (predicted(text.format(score=score), *["bf16[16,4096,64]"] * 3).terms["tensor cores"] for score in scores)
    assert 0.5 < causal / full < 0.6
    assert window / full < 0.15


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_to_do_is_predicted_too(target: str) -> None:
    found = predicted(MATMUL, "fp32[0,8]", "fp32[8,16]", target=target)
    assert found.flops == 0
    assert 0 < found.seconds < 1e-3


def test_tensor_cores_wait_for_what_makes_their_operands() -> None:
    """One product makes an operand, the other loads it; rows and columns are on the grid of both. That of attention lies along its stream."""
    made, plain = (
        predicted(f"Y[n,o] += {value} * W[o,i]", "bf16[1024,1024]", "bf16[1024,1024]") for value in ("sin(X[n,i] + sin(X[n,i]))", "X[n,i]")
    )
    assert plain.terms["operands"] == 0
    assert made.terms["operands"] > made.terms["tensor cores"] + 0.8 * made.terms["exponentials"] > 1.5 * made.terms["tensor cores"]
    assert made.seconds >= made.terms["operands"]
