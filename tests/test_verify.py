"""What every pass leaves true, and that a printed program parses back to itself: for the corpus, its gradients and theirs."""

from __future__ import annotations

import pytest

from tdsl.errors import ArgumentError, Unsupported
from tdsl.expand import expand
from tdsl.ir import Program, Reduce, Softmax, expressions, statements, walk
from tdsl.simplify import simplify
from tdsl.ssa import ssa
from tdsl.swap import differentiable, gradient
from tdsl.text import parse
from tdsl.verify import verify
from tests.corpus import CORPUS
from tests.programs import parsed
from tests.strange import STRANGE

TEXTS = {name: case.text for name, case in {**CORPUS, **STRANGE}.items()}


def derivatives(program: Program) -> list[Program]:
    """The program, its gradient, and the gradient of that; fewer where there is none."""
    found = [program]
    while len(found) < 3 and differentiable(found[-1]):
        try:
            found.append(gradient(found[-1]))
        except Unsupported:
            break
    return found


def reductions_left(program: Program) -> list[object]:
    return [e for s in statements(program.body) for top in expressions(s) for e in walk(top) if isinstance(e, Reduce | Softmax)]


@pytest.mark.parametrize("name", TEXTS)
def test_every_pass_leaves_a_well_formed_program(name: str) -> None:
    for program in derivatives(parsed(TEXTS[name])):
        verify(program)
        expanded = verify(expand(program))
        flat = verify(ssa(expanded))
        assert reductions_left(flat) == []
        assert verify(simplify(flat)).inputs == program.inputs
        assert len(flat.results) == len(program.results)


@pytest.mark.parametrize("name", TEXTS)
def test_printing_round_trips(name: str) -> None:
    for program in derivatives(parsed(TEXTS[name])):
        for form in (program, expand(program), simplify(program)):
            assert parse(str(form)) == form
            assert str(parse(str(form))) == str(form)


@pytest.mark.parametrize("name", TEXTS)
def test_passes_do_nothing_the_second_time(name: str) -> None:
    for program in derivatives(parsed(TEXTS[name])):
        flat = simplify(ssa(expand(program)))
        assert simplify(flat) == flat
        assert expand(flat) == flat


@pytest.mark.parametrize("name", TEXTS)
def test_the_signature_of_a_gradient(name: str) -> None:
    """Inputs: those of the program, then one cotangent per output. Outputs: one per differentiable input, in their order."""
    program = parsed(TEXTS[name])
    if not differentiable(program):
        with pytest.raises(ArgumentError):
            gradient(program)
        return
    for derived, before in zip(derivatives(program)[1:], derivatives(program), strict=False):
        assert derived.inputs[: len(before.inputs)] == before.inputs
        assert len(derived.inputs) == len(before.inputs) + len(before.outputs)
        assert len(derived.outputs) == len(differentiable(before))
