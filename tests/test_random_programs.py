"""Random programs: executors and gradients against the loops. `make fuzz N=1000` tries that many."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

pytest.importorskip("triton")

from tdsl.errors import RangeError, Unsupported
from tdsl.swap import differentiable
from tdsl.text import parse
from tdsl.verify import verify
from tests.programs import arguments, check, cotangents, expected, parsed
from tests.random_programs import random_case
from tests.test_gradients import assert_directional

# Each example compiles a dozen programs: `make test` tries few.
EXAMPLES = 8 if hypothesis.settings.default.derandomize else hypothesis.settings.default.max_examples


@pytest.mark.fuzz
@hypothesis.settings(max_examples=EXAMPLES)
@hypothesis.given(st.integers(0, 2**32))
def test_random_programs(seed: int) -> None:
    case = random_case(seed)
    program = verify(parsed(case.text))
    assert parse(str(program)) == program
    args = arguments(program, case, torch.float64)
    try:
        wanted = expected(program, args)
    except RangeError:
        hypothesis.assume(False)  # an index that only the left side has
    for backend in ("torch", "triton"):
        check(program, args, backend, scale=10_000, wanted=wanted)
        check(program, arguments(program, case), backend, scale=3)
    if not differentiable(program):
        return
    try:
        derived, given = assert_directional(program, args, tolerance=1e-4)
    except Unsupported:
        return
    assert parse(str(verify(derived))) == derived
    for backend in ("torch", "triton"):
        check(derived, given, backend, scale=10_000)
    if differentiable(derived):
        second = assert_directional(derived, given, step=1e-6, tolerance=1e-3)
        check(*second, "torch", scale=100_000)
    assert len(cotangents(derived, args, wanted)) == len(derived.params)
