"""Every kind of mistake: its class, its message, the exact place of its carets, and a help; and examples/errors.md, which shows them."""

from __future__ import annotations

import difflib
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import tdsl
from examples import mistakes
from examples.mistakes import Mistake
from tdsl import errors
from tdsl.arguments import layout
from tdsl.text import parse

ALL = mistakes.mistakes()


def carets(error: errors.Error) -> tuple[str, int, int] | None:
    """The line that a message shows, the column of its first caret, and how many there are."""
    lines = str(error).splitlines()
    for line, below in pairwise(lines):
        marks = below.partition("| ")[2]
        if marks.strip() and set(marks.strip()) == {"^"}:
            return line.partition("| ")[2], marks.index("^"), marks.count("^")
    return None


@pytest.mark.parametrize("mistake", ALL, ids=[f"{m.kind.__name__}-{m.text or m.what}" for m in ALL])
def test_mistake(mistake: Mistake) -> None:
    error = mistake.run()
    assert mistake.kind is type(error)
    assert mistake.what == error.what
    assert mistake.place == carets(error)
    assert error.help and str(error).endswith(f"   = help: {error.help}")


def test_every_kind_is_there() -> None:
    kinds = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.Error)}
    elsewhere = {errors.Error, errors.MissingPackage, errors.CompileError}
    assert kinds - elsewhere == {m.kind for m in ALL}


def test_torch_users_find_the_classes_that_they_expect() -> None:
    for m in ALL:
        assert issubclass(m.kind, (ValueError, TypeError, NotImplementedError)), m.kind


def test_no_two_are_alike() -> None:
    assert len({(m.code, m.what) for m in ALL}) == len(ALL)


def test_a_place_that_is_off_is_seen() -> None:
    """The comparison itself: carets one column off, or one more of them, are another place."""
    right = Mistake(errors.UnknownFunction, "", "Y[i] = ⟦expp(A[i])⟧")
    error = right.run()
    assert right.place == carets(error) == ("Y[i] = expp(A[i])", 7, 10)
    for text in ("Y[i] =⟦ expp(A[i])⟧", "Y[i] = ⟦expp(A[i]⟧)", "Y[i] = ⟦expp⟧(A[i])", "Y[i] = expp(A[i])"):
        assert Mistake(errors.UnknownFunction, "", text).place != carets(error)
    with pytest.raises(AssertionError, match="no error"):
        Mistake(errors.UnknownFunction, "", "Y[i] = exp(A[i])").run()


def test_the_page_is_true() -> None:
    path = Path(mistakes.__file__).with_name("errors.md")
    diff = "\n".join(difflib.unified_diff(path.read_text().splitlines(), mistakes.page().splitlines(), str(path), "now", lineterm=""))
    assert not diff, f"`python -m examples.page` writes it again:\n{diff}"


# ---------------------------------------------------------------------------------------------------------------------
# What is not on the page


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
@pytest.mark.parametrize(
    ("expression", "dtype"),
    [
        ("bitwise_xor(A[i], A[i])", torch.float16),
        ("left_shift(A[i], 2)", torch.float32),
        ("right_shift(A[i], A[i])", torch.bool),
        ("A[i] // A[i]", torch.bool),
        ("A[i] % A[i]", torch.bool),
        ("A[i] ** A[i]", torch.bool),
        ("relu(A[i])", torch.bool),
    ],
)
def test_functions_of_dtypes_that_they_are_not_defined_for(expression: str, dtype: torch.dtype, backend: str) -> None:
    with pytest.raises(errors.DtypeError, match="is not defined for"):
        tdsl.function(f"Y[i] = {expression}", backend=backend)(torch.ones(3, dtype=dtype))


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
def test_powers_of_integers(backend: str) -> None:
    base, exponent = torch.tensor([2, -3, 5, 0, 7]), torch.tensor([10, 3, 0, 0, 1])
    power = tdsl.function("Y[i] = A[i] ** B[i]", backend=backend)
    torch.testing.assert_close(power(base, exponent), base**exponent)
    torch.testing.assert_close(tdsl.function("Y[i] = 2 ** B[i]", backend=backend)(exponent), 2**exponent)
    torch.testing.assert_close(power(base.abs().float(), exponent), base.abs().float() ** exponent)


def test_0d_tensors_may_be_on_another_device() -> None:
    program = parse("def f(s, A[i], r) -> Y[i]: Y[i] = s * A[i] + r")
    found = layout(program, (torch.tensor(2.0), torch.zeros(3, device="meta"), torch.tensor(1.0)))
    assert found.device == torch.device("meta")
    assert layout(program, (torch.tensor(2.0), "bf16[3]", 1.0)).device == torch.device("cpu")
    assert layout(program, (2.0, "bf16[3]", 1.0)).device is None


def test_subscripts_that_ask_for_a_gradient() -> None:
    """A float tensor as an index is the mistake, whether or not it asks for a gradient."""
    gather = tdsl.function("Y[i] = A[f[i]]")
    with pytest.raises(errors.DtypeError, match="f is float32"):
        gather(torch.zeros(3, dtype=torch.int64), torch.zeros(3, requires_grad=True))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_value_outside_is_found_where_it_stands(backend: str) -> None:
    """The index values of the message count from the lower bound of their range, in every dimension."""
    f = tdsl.function("for i in 2:4, j in 1:3:  Y[i,j] = A[ids[i,j],i]", backend=backend)
    ids = torch.zeros(4, 3, dtype=torch.int64)
    f(torch.zeros(5, 4), ids)
    ids[3, 2] = 5
    with pytest.raises(errors.BoundsError, match=r"subscript ids\[i,j\] of A is 5 at i = 3, j = 2, but dimension 0 of A has size 5"):
        f(torch.zeros(5, 4), ids)


def test_names_of_the_python_spelling() -> None:
    for names in ("i-j", "2i", "i.2"):
        with pytest.raises(errors.NameError_, match="is no name"):
            tdsl.indices(names)


def test_an_object_that_is_no_program() -> None:
    with pytest.raises(errors.ArgumentError, match="5 is no program"):
        tdsl.function(5)
