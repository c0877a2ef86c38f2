"""The algebra of cascaded reductions: which share a pass, by which factor, and that the kernels compute what the loops do.

Kernels run through the interpreter. Rows that a program could hold in registers are streamed all the same: the longest that it may
hold is set to a few elements, and a schedule walks the rows by tiles of 32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

pytest.importorskip("triton")

import tdsl
from lowering import join, kernel_shape, tile_ir
from lowering.schedule import Schedule
from lowering.stream import OLD, Reduction, passes, rescale
from tdsl.ir import Access, Call, Const, Expr, statements
from tdsl.ops import OPS
from tdsl.printer import print_expr
from tdsl.text import parse

LENGTH, TILE = 149, 32


@dataclass(frozen=True)
class Cascade:
    """text: reductions of X[i,j], Y[i,j] over j. passes: what `described` says of them. masked: they can bear rows that start with -inf."""

    text: str
    passes: str
    masked: bool = True


BY_E = "* exp(-(M[i] - M.old[i]))"
CASCADES = {
    # -- a maximum, and what is relative to it
    "softmax": Cascade("M[i] max= X[i,j]; L[i] += exp(X[i,j] - M[i]); O[i] += exp(X[i,j] - M[i]) * Y[i,j] / L[i]", f"M, L {BY_E}, O {BY_E}"),
    "base_2": Cascade("M[i] max= X[i,j]; L[i] += exp2(X[i,j] - M[i])", "M, L * exp2(-(M[i] - M.old[i]))"),
    "minimum": Cascade("M[i] min= -X[i,j]; L[i] += exp(M[i] + X[i,j])", "M, L * exp(M[i] - M.old[i])"),
    "a_third": Cascade("M[i] max= X[i,j]; L[i] += exp((X[i,j] - M[i]) / 3)", "M, L * exp(-(M[i] - M.old[i]) / 3)"),
    "a_learned_scale": Cascade("M[i] max= X[i,j]; L[i] += exp(z[i] * (X[i,j] - M[i]))", "M, L * exp(-(z[i] * (M[i] - M.old[i])))"),
    "root": Cascade("M[i] max= X[i,j]; L[i] += sqrt(exp(X[i,j] - M[i]))", "M, L * sqrt(exp(-(M[i] - M.old[i])))"),
    "magnitude": Cascade("M[i] max= X[i,j]; L[i] += abs(Y[i,j] * exp(X[i,j] - M[i]))", "M, L * abs(exp(-(M[i] - M.old[i])))"),
    "negated": Cascade("M[i] max= X[i,j]; L[i] += -exp(-(M[i] - X[i,j]))", f"M, L {BY_E}"),
    # -- several
    "two_maxima": Cascade(
        "M[i] max= X[i,j]; N[i] max= Y[i,j]; L[i] += exp(X[i,j] - M[i]) * exp(Y[i,j] - N[i])",
        "M, N, L * exp(-(M[i] - M.old[i])) * exp(-(N[i] - N.old[i]))",
    ),
    "quotient": Cascade(
        "M[i] max= X[i,j]; N[i] min= Y[i,j]; L[i] += exp(X[i,j] - M[i]) / exp(N[i] - Y[i,j])",
        "M, N, L * exp(-(M[i] - M.old[i])) / exp(N[i] - N.old[i])",
    ),
    "weighted_moments": Cascade(
        "M[i] max= X[i,j]; L[i] += exp(X[i,j] - M[i]); A[i] += exp(X[i,j] - M[i]) * Y[i,j]; B[i] += exp(X[i,j] - M[i]) * Y[i,j] * Y[i,j]; V[i] = B[i] / L[i] - (A[i] / L[i]) ** 2",
        f"M, L {BY_E}, A {BY_E}, B {BY_E}",
    ),
    "softmax_of_a_softmax": Cascade(
        "M[i] max= X[i,j]; L[i] += exp(X[i,j] - M[i]); N[i] max= exp(X[i,j] - M[i]) / L[i]; K[i] += exp(exp(X[i,j] - M[i]) / L[i] - N[i])",
        f"M, L {BY_E} | N, K * exp(-(N[i] - N.old[i]))",
    ),
    "three_one_after_the_other": Cascade(
        "M[i] max= X[i,j]; L[i] += exp(X[i,j] - M[i]); T[i] += exp(X[i,j] - M[i] - log(L[i])) * Y[i,j]",
        f"M, L {BY_E}, T {BY_E}",
    ),
    # -- moments about running means
    "variance": Cascade("S[i] += X[i,j]; V[i] += (X[i,j] - S[i] / size(X, 1)) ** 2", "S, V centred"),
    "covariance": Cascade("S[i] += X[i,j]; T[i] += Y[i,j]; V[i] += (X[i,j] - S[i] / size(X, 1)) * (Y[i,j] - T[i] / size(X, 1))", "S, T, V centred"),
    "about_the_maximum": Cascade("M[i] max= X[i,j]; V[i] += (X[i,j] - M[i]) ** 2", "M, V centred", masked=False),
    "about_a_maximum_and_a_mean": Cascade(
        "M[i] max= X[i,j]; S[i] += Y[i,j]; V[i] += (X[i,j] - M[i]) * (Y[i,j] - S[i] / size(X, 1))", "M, S, V centred", masked=False
    ),
    # -- masks
    "masked_terms": Cascade("M[i] max= X[i,j]; L[i] += where(Y[i,j] > 0, exp(X[i,j] - M[i]), 0)", f"M, L {BY_E}"),
    "masked_scores": Cascade("M[i] max= X[i,j]; L[i] += exp(where(Y[i,j] > 0, X[i,j], -inf) - M[i])", f"M, L {BY_E}"),
    "masked_beside_all": Cascade("M[i] max= X[i,j]; L[i] += where(j < i + 40, exp(X[i,j] - M[i]), 0)", f"M, L {BY_E}"),
    "masked_by_the_running_value": Cascade("M[i] max= X[i,j]; L[i] += where(X[i,j] > M[i] - 1, exp(X[i,j] - M[i]), 0)", "M | L"),
    # -- what does not factor takes a pass of its own
    "sine": Cascade("M[i] max= X[i,j]; L[i] += sin(X[i,j] - M[i])", "M | L"),
    "cube": Cascade("M[i] max= X[i,j]; L[i] += (X[i,j] - M[i]) ** 3", "M | L"),
    "reciprocal": Cascade("M[i] max= X[i,j]; L[i] += 1 / (X[i,j] + M[i] + 9)", "M | L"),
    "maximum_of_products": Cascade("M[i] max= X[i,j]; N[i] max= X[i,j] * M[i]", "M | N"),
    "product": Cascade("M[i] max= X[i,j]; N[i] *= exp((X[i,j] - M[i]) / 100)", "M | N"),
    "entropy": Cascade("M[i] max= X[i,j]; L[i] += exp(X[i,j] - M[i]); H[i] += exp(X[i,j] - M[i]) * (X[i,j] - M[i]) / L[i]", f"M, L {BY_E} | H"),
    "weighted_variance": Cascade(
        "M[i] max= X[i,j]; L[i] += exp(X[i,j] - M[i]); A[i] += exp(X[i,j] - M[i]) * Y[i,j] / L[i]; V[i] += exp(X[i,j] - M[i]) * (Y[i,j] - A[i]) ** 2 / L[i]",
        f"M, L {BY_E}, A {BY_E} | V",
    ),
}  # fmt: skip

# Running values that are no running maxima pass through values from which no factor leads to the end: a sum starts at 0, whose
# logarithm is infinite, and may come from far below or above; a maximum may start outside of the domain of a function.
ASTRAY = {
    "logarithm_of_a_sum": "S[i] += exp(X[i,j]); T[i] += exp(X[i,j] + log(S[i]))",
    "reciprocal_of_a_sum": "S[i] += exp(X[i,j]); T[i] += exp(X[i,j] - 1 / S[i])",
    "root_of_a_maximum": "M[i] max= X[i,j]; T[i] += exp(X[i,j] - sqrt(M[i]))",
    "logarithm_of_a_maximum": "M[i] max= X[i,j]; T[i] += exp(X[i,j] - log(M[i]))",
    "from_far_below": "M[i] max= X[i,j]; T[i] += exp(X[i,j] + 60 * M[i])",
    "a_sum_that_falls_and_rises": "S[i] += Y[i,j]; T[i] += exp(Y[i,j] + 2 * S[i])",
    "a_sum_that_rises_and_falls": "S[i] += Y[i,j]; T[i] += exp(Y[i,j] - 2 * S[i])",
}


@pytest.fixture(autouse=True)
def short_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (kernel_shape, join):
        monkeypatch.setattr(module, "RESIDENT_ROW", TILE)


def rows(*kinds: str) -> list[torch.Tensor]:
    """X, Y and z, with a row of each kind."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(len(kinds), LENGTH, generator=generator) for _ in range(2))
    for n, kind in enumerate(kinds):
        if kind == "masked_at_first":
            x[n, : TILE + 9] = -torch.inf
        elif kind == "masked":
            x[n] = -torch.inf
        elif kind == "rising":
            x[n] = torch.linspace(-3, 1, LENGTH)
            y[n] = torch.where(torch.arange(LENGTH) < LENGTH // 2, -1.0, 1.0)
    return [x, y, torch.rand(len(kinds), generator=generator)]


def streamed(text: str, data: list[torch.Tensor]) -> tuple[tuple[tuple[Reduction, ...], ...], torch.Tensor, torch.Tensor]:
    """The passes of the one kernel, what it computes by tiles of TILE, and what the loops compute."""
    function = tdsl.function(text, backend="triton")
    args = [data["XYz".index(name)] for name in function.program.inputs]
    (kernel,) = function.plan(*args).kernels
    assert kernel.stream == ("j",)
    function.schedule({kernel.name: Schedule(((("i",), 2), (("j",), TILE)))})
    found = passes(kernel.statements, kernel.stream)
    (step,) = function.lower(*args).steps
    loops = [op for op in step.tile.body if isinstance(op, tile_ir.For)]
    assert [TILE] * len(found) == [loop.axis.tile for loop in loops]
    with np.errstate(all="ignore"):
        expected = tdsl.function(text, backend="reference")(*[a.double() for a in args])
    return found, function(*args), expected


def described(found: Sequence[Sequence[Reduction]]) -> str:
    """The reductions of each pass: "M", "L * factor" or "V centred"; passes stand between bars."""

    def one(r: Reduction) -> str:
        factor = f" * {print_expr(r.factor)}" if r.factor is not None else " centred" if r.centred else ""
        return r.statement.target.tensor + factor

    return " | ".join(", ".join(map(one, members)) for members in found)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=2e-5, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("name", CASCADES)
def test_passes_and_values(name: str) -> None:
    case = CASCADES[name]
    kinds = ("random", "masked_at_first", "random", "masked") if case.masked else ("random", "random", "random")
    found, actual, expected = streamed(case.text, rows(*kinds))
    assert case.passes == described(found)
    assert_close(actual, expected)
    assert expected[0].isfinite()


@pytest.mark.parametrize("name", ASTRAY)
def test_running_values_that_lead_astray(name: str) -> None:
    _, actual, expected = streamed(ASTRAY[name], rows("rising"))
    assert_close(actual, expected)


def test_a_normaliser_inside_the_exponential_bears_a_masked_start() -> None:
    text = CASCADES["three_one_after_the_other"].text
    _, actual, expected = streamed(text, rows("random", "masked_at_first"))
    assert_close(actual, expected)


@pytest.mark.parametrize("shift", [1e3, 1e4])
def test_a_variance_far_from_zero(shift: float) -> None:
    """Moments that are carried about running means do not cancel. Squares of numbers like these differ by less than float32 can tell."""
    data = rows("random")
    data[0] += shift
    _, actual, expected = streamed(CASCADES["variance"].text, data)
    assert abs(float(actual / expected) - 1) < 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# Random terms

VARYING = st.sampled_from(["X[i,j]", "Y[i,j]", "sin(X[i,j] * Y[i,j])", "where(X[i,j] > Y[i,j], X[i,j], -inf)", "(X[i,j] - 2) * z[i]"])
RUNNING = st.sampled_from(["M[i]", "-S[i]", "z[i] * M[i]", "M[i] / 3", "tanh(S[i])", "(M[i] + S[i])"])
EXPONENTIAL = st.builds("{}({} {} {})".format, st.sampled_from(["exp", "exp2"]), VARYING, st.sampled_from("+-"), RUNNING)
ANYTHING = st.recursive(
    st.one_of(EXPONENTIAL, EXPONENTIAL, VARYING, st.sampled_from(["M[i]", "S[i]", "z[i]", "2", "0.5"])),
    lambda inner: st.one_of(
        st.builds("({} {} {})".format, inner, st.sampled_from("+-*/*/*/"), inner),
        st.builds("{}({})".format, st.sampled_from(["exp", "log", "sqrt", "rsqrt", "abs", "abs", "sin", "-", "-"]), inner),
        st.builds("where({} > {}, {}, {})".format, inner, inner, inner, st.sampled_from(["0", "-inf", "1"])),
        st.builds("({}) ** 2".format, inner),
    ),
    max_leaves=6,
)
# Terms that are a product of what varies and what runs, by the ways in which that can be written.
SEPARABLE = st.recursive(
    EXPONENTIAL,
    lambda inner: st.one_of(
        st.builds("({} {} {})".format, inner, st.sampled_from("*/"), inner),
        st.builds("({} * {})".format, VARYING.filter(lambda text: "inf" not in text), inner),
        st.builds(
            "{}({})".format, st.sampled_from(["sqrt", "rsqrt", "abs", "-", "stop_gradient", "float32"]), st.builds("({})".format, inner)
        ),
        st.builds("where({} > 1, {}, 0)".format, VARYING, inner),
    ),
    max_leaves=3,
)


def term_of(text: str) -> Expr:
    (s,) = statements(parse(f"T[i] += {text} + 0 * X[i,j]").body)
    (term, _) = s.value.args
    return term


def value_of(e: Expr, at: dict[str, Any]) -> Any:
    """An expression where every tensor has one value."""
    if isinstance(e, Access):
        return at[e.tensor]
    if isinstance(e, Const):
        return np.float64(e.value)
    assert isinstance(e, Call)
    return eval(OPS[e.op].numpy.format(*(f"a[{n}]" for n in range(len(e.args)))), {"np": np, "a": [value_of(x, at) for x in e.args]})


def assert_factor(term: Expr, seed: int) -> Expr | None:
    """phi(a, r') == phi(a, r) * factor(r, r') at random numbers, if there is a factor, wherever all of it is a number."""
    factor = rescale(term, frozenset({"M", "S"}), frozenset({"j"}))
    if factor is None:
        return None
    random = np.random.default_rng(seed)
    for _ in range(20):
        fixed = {name: random.uniform(0.1, 2) * random.choice([-1, 1]) for name in "XYz"}
        then, now = ({name: random.uniform(0.1, 2) * random.choice([-1, 1]) for name in "MS"} for _ in range(2))
        with np.errstate(all="ignore"):
            before, after = (value_of(term, {**fixed, **r}) for r in (then, now))
            by = value_of(factor, {**fixed, **now, **{name + OLD: v for name, v in then.items()}})
        if all(1e-100 < abs(v) < 1e100 for v in (before, after, by)):
            assert after == pytest.approx(before * by, rel=1e-8), print_expr(factor)
        elif np.isfinite(by) and before == 0:
            assert after == 0 or abs(after) < 1e-100
    return factor


@pytest.mark.fuzz
@hypothesis.settings(max_examples=max(200, hypothesis.settings.default.max_examples))
@hypothesis.given(ANYTHING, st.integers(0, 2**32))
def test_what_is_accepted_is_a_factor(text: str, seed: int) -> None:
    assert_factor(term_of(text), seed)


@pytest.mark.fuzz
@hypothesis.given(SEPARABLE, st.integers(0, 2**32))
def test_what_separates_is_accepted(text: str, seed: int) -> None:
    assert assert_factor(term_of(text), seed) is not None, text


# Exponents of what is summed, with the largest that they get: then no sum is out of range.
EXPONENTS = {
    "X[i,j]": "max= X[i,j]", "2 * X[i,j] - Y[i,j]": "max= 2 * X[i,j] - Y[i,j]", "z[i] * X[i,j]": "max= z[i] * X[i,j]",
    "X[i,j] / 2 - Y[i,j]": "max= X[i,j] / 2 - Y[i,j]", "where(Y[i,j] > 0, X[i,j], -inf)": "max= where(Y[i,j] > 0, X[i,j], -inf)",
}  # fmt: skip
WEIGHTS = ["1", "Y[i,j]", "X[i,j] * Y[i,j]", "cos(Y[i,j])", "where(Y[i,j] < 0.5, 1, 0)", "z[i] / (1 + Y[i,j] ** 2)"]


@st.composite
def cascades(draw: st.DrawFn) -> str:
    """Maxima, then sums weighted by exponentials that are relative to them and divided by the first sum."""
    names = draw(st.lists(st.sampled_from(list(EXPONENTS)), min_size=1, max_size=2, unique=True))
    lines = [f"M{n}[i] {EXPONENTS[name]}" for n, name in enumerate(names)]
    for n in range(draw(st.integers(1, 3))):
        m = draw(st.integers(0, len(names) - 1))
        over = " / S0[i]" if n and draw(st.booleans()) else ""
        lines.append(f"S{n}[i] += exp({names[m]} - M{m}[i]) * {draw(st.sampled_from(WEIGHTS))}{over}")
    total = " + ".join(f"S{n}[i]" for n in range(len(lines) - len(names)))
    return "\n    ".join(["def cascade(X[i,j], Y[i,j], z[i]) -> R[i]:", *lines, f"R[i] = {total}"])


@pytest.mark.fuzz
@hypothesis.settings(max_examples=8 if hypothesis.settings.default.derandomize else hypothesis.settings.default.max_examples)
@hypothesis.given(cascades())
def test_random_cascades(text: str) -> None:
    found, actual, expected = streamed(text, rows("random", "masked_at_first"))
    assert len(found) == 1, described(found)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-3, atol=1e-4, equal_nan=True)
