"""Random programs: executors and gradients against the loops. `make fuzz N=1000` tries that many."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

pytest.importorskip("triton")

from lowering.cpp_launch import compiler
from tdsl.config import config
from tdsl.errors import BoundsError, RangeError, Unsupported
from tdsl.expand import expand
from tdsl.ir import Output, Program, statements
from tdsl.swap import differentiable
from tdsl.text import parse
from tdsl.verify import verify
from tests.programs import LAYOUTS, arguments, check, cotangents, expected, parsed
from tests.random_programs import random_case
from tests.test_gradients import assert_directional, is_float

# Each example compiles a dozen programs: `make test` tries few.
EXAMPLES = 8 if hypothesis.settings.default.derandomize else hypothesis.settings.default.max_examples
BACKENDS = [("torch", "torch"), ("triton", "torch"), *([("torch", "c++")] if compiler() else [])]


def differences(program: Program, args: list[Any]) -> tuple[Program, list[Any]]:
    """The gradient with arguments, compared with differences; closer ones where a kink is close."""
    try:
        return assert_directional(program, args, tolerance=1e-4)
    except AssertionError:
        return assert_directional(program, args, step=1e-7, tolerance=1e-3)


def is_finite(program: Program, args: list[Any]) -> bool:
    """Whether all that the statements and the reductions inside them write is: the logarithm of an empty sum, say, has no derivative,
    whatever is made of it."""
    program = expand(program)
    targets = dict.fromkeys(s.target.tensor for s in statements(program.body))
    try:
        values = expected(replace(program, outputs=tuple(map(Output, targets))), args)
    except (RangeError, BoundsError):  # in what no output needs
        return False
    return all(bool(v.double().isfinite().all()) for v in values)


@pytest.mark.fuzz
@hypothesis.settings(max_examples=EXAMPLES)
@hypothesis.given(st.integers(0, 2**32), st.sampled_from(LAYOUTS), st.sampled_from(BACKENDS))
def test_random_programs(seed: int, memory: str, backend: tuple[str, str]) -> None:
    case = random_case(seed)
    program = verify(parsed(case.text))
    assert parse(str(program)) == program
    args = arguments(program, case, torch.float64, memory)
    try:
        wanted = expected(program, args)
    except (RangeError, BoundsError):
        hypothesis.assume(False)  # the maximum of nothing; an index that only the left side has
    hypothesis.assume(is_finite(program, args))
    executor, cpu = backend
    with config.using(cpu=cpu):
        check(program, args, executor, scale=10_000, wanted=wanted)
        check(program, arguments(program, case, memory=memory), executor, scale=5)
    if not any(is_float(a) for n, a in zip(program.inputs, args, strict=True) if n in differentiable(program)):
        return
    given = arguments(program, case, torch.float64)  # of an expanded tensor all values are greatest: differences see one side
    hypothesis.assume(is_finite(program, given))
    try:
        derived, given = differences(program, given)
    except Unsupported:
        return
    assert parse(str(verify(derived))) == derived
    with config.using(cpu=cpu):
        check(derived, given, executor, scale=10_000)
    if differentiable(derived) and seed % 3 == 0:
        second = assert_directional(derived, given, step=1e-6, tolerance=1e-3)
        with config.using(cpu=cpu):
            check(*second, executor, scale=100_000)
    assert len(cotangents(derived, args, wanted)) == len(derived.params)


@pytest.mark.fuzz
@hypothesis.settings(max_examples=EXAMPLES)
@hypothesis.given(st.integers(0, 2**32), st.sampled_from(BACKENDS[:2]))
def test_random_programs_in_half_precision(seed: int, backend: tuple[str, str]) -> None:
    """16-bit inputs are promoted and rounded as inference says; what is compared with a kink may fall on its other side."""
    case = random_case(seed)
    hypothesis.assume(not any(word in case.text for word in ("where", "max", "min", "relu", "arg", "prod", "*=", "ordered", "reversed")))
    program = parsed(case.text)
    args = arguments(program, case, torch.float16)
    try:
        wanted = expected(program, args)
    except (RangeError, BoundsError):
        hypothesis.assume(False)
    hypothesis.assume(all(bool((w.double().abs() < 100).all()) for w in wanted))
    check(program, args, backend[0], scale=4, wanted=wanted)
