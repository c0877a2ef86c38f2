"""The notation in both spellings: what parses to what, that printing and parsing are inverse, and what every mistake is told."""

from __future__ import annotations

import math
import timeit
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest

from tdsl import embed as td
from tdsl import errors, ir
from tdsl.embed import trace
from tdsl.ir import Access, Call, Const, Index, Loop, Param, Program, Range, Reduce, Size, Softmax, Statement, free_indices
from tdsl.ops import OPS
from tdsl.printer import print_expr, print_statement
from tdsl.signature import dims_pattern, infer_signature
from tdsl.text import parse
from tests.corpus import CORPUS


def value(text: str) -> ir.Expr:
    """The value of a one-statement program."""
    (statement,) = parse(text).body
    assert isinstance(statement, Statement)
    return statement.value


# ---------------------------------------------------------------------------------------------------------------------
# Printing and parsing


@pytest.mark.parametrize("name", CORPUS)
def test_print_parses_back(name: str) -> None:
    program = parse(CORPUS[name].text)
    printed = str(program)
    again = parse(printed)
    assert again == program
    assert dims_pattern(again) == dims_pattern(program)
    assert printed == str(again)


@pytest.mark.parametrize("name", CORPUS)
def test_corpus_has_shapes_that_fit(name: str) -> None:
    case = CORPUS[name]
    program = parse(case.text)
    shapes = {**case.shapes, **dict.fromkeys(case.scalars, ())}
    assert set(shapes) == set(program.inputs)
    sizes: dict[str, int] = {}
    for param in program.params:
        assert len(param.dims) == len(shapes[param.name])
        for dim, size in zip(param.dims, shapes[param.name], strict=True):
            assert sizes.setdefault(dim, size) == size


def test_corpus_covers_the_grammar() -> None:
    assert len(CORPUS) >= 60
    text = "\n".join(case.text for case in CORPUS.values())
    pieces = ["def ", "ordered ", "reversed ", " in ", "pad(", "clamp(", "size(", "+=", "*=", "max=", "min="]
    pieces += ["inf", "and", "or", "not", "**", "//", "%", "init="]
    for piece in pieces:
        assert piece in text, piece
    for reduction in ["sum", "mean", "var", "max", "min", "prod", "argmax", "argmin", "logsumexp", "softmax"]:
        assert f"{reduction}[" in text, reduction


def test_canonical_text() -> None:
    text = "for h, i, j, k:  Y[h,i,j] += A[h,i,k] * B[h,j,k]"
    assert str(parse("Y[ h,i , j] += A[h,i,k]*B[h,j,k]  # a comment")) == text
    assert str(parse(text)) == text
    assert str(parse("Y[n,x]+=X[n,2*x + r - 1]*W[r]")) == "for n, x, r:  Y[n,x] += X[n,2*x+r-1] * W[r]"
    assert str(parse("s = 2")) == "s = 2"


def test_a_header_is_printed_only_where_inference_differs() -> None:
    body = "for i, k:  y[i] += A[i,k] * x[k]"
    assert str(parse(f"def y(A[i,k], x[k]) -> y: {body}")) == body
    assert str(parse(f"def y(A[n,m], x[m]) -> y: {body}")) == body
    for header in [
        "def f(A[i,k], x[k]) -> y:",
        "def y(x[k], A[i,k]) -> y:",
        "def y(A[n,n], x[n]) -> y:",
        "def y(A[i,k], x[l]) -> y:",
        "def y(A[i,k], x[k]) -> y[i]:",
        "def y(A[i,k], x[k], u) -> y:",
    ]:
        assert str(parse(f"{header} {body}")) == f"{header}\n    {body}"


def test_a_scalar_in_a_subscript_keeps_its_header() -> None:
    program = parse("def f(X[i], n) -> Y: for i in 0:3:  Y[i] = X[i+n]")
    assert [p.name for p in program.params] == ["X", "n"]
    assert parse(str(program)) == program


def test_an_index_that_only_its_name_settles_keeps_the_name() -> None:
    text = "def Y(X[m]) -> Y:\n    for m:  Z[m] = 1.0\n    for i, m:  Y[i,m] = X[i] * Z[m]"
    assert str(parse(text)) == text


EXPRESSIONS = """
    -a ** 2
    (-a) ** 2
    a ** -b
    a ** b ** c
    (a ** b) ** c
    --a
    -(1)
    -(-1)
    -1 ** 2
    (-1) ** 2
    2 ** -1
    a - (b - c)
    a - b - c
    a - -1
    a / (b * c)
    a * (b / c)
    a % b // c
    a * -b
    -a * b
    -(a * b)
    -(a + b)
    (a < b) < c
    a < (b < c)
    not a == b
    (not a) == b
    not (a and b)
    not not a
    a and (b and c)
    a and b and c
    a or b and c
    (a or b) and c
    -(not a)
    not -a
    where(a < b, -inf, inf)
    1e-05 + 1e+30 + 2.0 + 2
    True or False
    bitwise_and(a, b)
    float32(a)
    maximum(a, sum[i](X[i]))
    sum[i, j in 1:2](X[i] * a)
    max[i](X[i], init=-inf)
    softmax[i](X[i])
    sum[i](max[j](X[i+j]))
    size(X, 0) * a
    X[-1+i]
    X[-(i+1)]
    X[i//2%3]
    a and b < c + d * -e ** f
"""


@pytest.mark.parametrize("text", [line.strip() for line in EXPRESSIONS.strip().splitlines()])
def test_expressions_print_as_they_were_written(text: str) -> None:
    program = parse("Y[i] = 0 * X[i] + where(False, 0, " + text + ")")
    expr = program.body[0].value.args[1].args[2]  # type: ignore[union-attr]
    assert print_expr(expr) == text


def test_numbers_are_what_they_look_like() -> None:
    for text, expected in [
        ("1", 1),
        ("1.", 1.0),
        (".5", 0.5),
        ("2e3", 2000.0),
        ("-3", -3),
        ("-inf", -math.inf),
        ("- -1", 1),
        ("True", True),
    ]:
        assert value(f"s = {text}") == Const(expected)
    assert value("s = -(1)") == Call("neg", (Const(1),))
    assert value("s = -1 ** 2") == Call("neg", (Call("pow", (Const(1), Const(2))),))


def test_loops_print_and_parse() -> None:
    lines = "for ordered t in 1:5, ordered s:\n    for b:  c[b,t,s] = c[b,t-1,s] + X[b]\n    for b:  h[b,t,s] = c[b,t,s]"
    program = parse(lines)
    assert str(program) == lines
    (loop,) = program.body
    assert isinstance(loop, Loop)
    assert print_statement(loop) == lines
    nested = parse("for ordered t in 1:5:\n  for ordered s:\n    c[b,t,s] = c[b,t-1,s] + X[b]\n\n    h[b,t,s] = c[b,t,s]")
    assert nested == program


def test_parsing_is_quick() -> None:
    text = CORPUS["attention"].text
    parse(text)
    assert min(timeit.repeat(lambda: parse(text), number=1, repeat=7)) < 0.01


# ---------------------------------------------------------------------------------------------------------------------
# What parses to what


def test_the_lecture() -> None:
    program = parse("for h, i, j, k:  Y[h,i,j] += A[h,i,k] * B[h,j,k]")
    h, i, j, k = map(Index, "hijk")
    statement = Statement(
        tuple(map(Range, "hijk")), Access("Y", (h, i, j)), "+=", Call("mul", (Access("A", (h, i, k)), Access("B", (h, j, k))))
    )
    assert program == Program("Y", (Param("A"), Param("B")), (ir.Output("Y"),), (statement,))
    assert [p.dims for p in program.params] == [("h", "i", "k"), ("h", "j", "k")]


def test_layouts_that_mean_the_same() -> None:
    expected = parse("Y[i] += A[i,k]\nZ[i] = Y[i]")
    for text in [
        "Y[i] += A[i,k]; Z[i] = Y[i];",
        "\n\n   Y[i] += A[i,k]   # one\n\n   # two\n   Z[i] = Y[i]\n",
        "Y[i] += A[i,\n k]\nZ[i] = (Y[\ni])",
        "for i:\n\tY[i] += A[i,k]\n\n\tZ[i] = Y[i]",
        "Y[i] += A[i,k]\n       Z[i] = Y[i]\n",
        "Y[i] += \\\n A[i,k]\r\nZ[i] = Y[i]\r\n",
        "for i:  Y[i] += A[i,k] ; for i:  Z[i] = Y[i]",
    ]:
        assert parse(text) == expected, text
    headed = parse("def f(A[i,k]) -> Z: Y[i] += A[i,k]; Z[i] = Y[i]")
    for text in [
        "def f(A[i,k]) -> Z:\n  Y[i] += A[i,k]\n  Z[i] = Y[i]",
        "def f(A[i,k]) -> Z:\nY[i] += A[i,k]\nZ[i] = Y[i]",
        "def f(A[\ni,k],) -> Z: Y[i] += A[i,k]\nZ[i] = Y[i]",
    ]:
        assert parse(text) == headed, text


def test_max_equals_is_read_before_names() -> None:
    for text in ["m[i] max= X[i,j]", "m[i]max=X[i,j]"]:
        (statement,) = parse(text).body
        assert isinstance(statement, Statement) and statement.op == "max="
    assert isinstance(value("m = max[i](X[i])"), Reduce)
    (statement,) = parse("s min= X[i]").body
    assert isinstance(statement, Statement) and statement.op == "min=" and statement.target == Access("s")


def test_keywords_are_whole_words() -> None:
    program = parse("format[index] = order[index] * inference + android")
    assert program.inputs == ("order", "inference", "android")


def test_bare_names() -> None:
    program = parse("Y[i] = n * X[i] + i")
    assert program.inputs == ("n", "X")
    assert value("Y[i] = n * X[i] + i") == Call("add", (Call("mul", (Access("n"), Access("X", (Index("i"),)))), Index("i")))
    assert parse("for i in 0:n:  Y[i] = X[i]").inputs == ("n", "X")
    assert value("for i, n in 0:3:  Y[i] += n * X[i]") == Call("mul", (Index("n"), Access("X", (Index("i"),))))
    written = parse("n += w[i]; Y[i] = X[n]*w[i]")
    assert written.body[1].value.args[0] == Access("X", (Access("n"),))  # type: ignore[union-attr]
    assert value("y = sum[j](j * 2)") == Reduce("sum", (Range("j"),), Call("mul", (Index("j"), Const(2))))


def test_ranges_are_complete() -> None:
    def ranges(text: str) -> str:
        return ", ".join(r.index for r in parse(text).body[0].ranges)

    assert ranges("for k:  Y[i,j] += A[i,k] * B[k,j]") == "k, i, j"
    assert ranges("for j in 0:len[b]:  Y[b] += X[off[b]+j]") == "b, j"
    assert ranges("for i in 0:3, j in 0:i+1:  Y[i] += X[j]") == "i, j"
    assert ranges("Y[dst[e],d] += m[e,d]") == "e, d"


def test_names_of_sizes() -> None:
    def dims(text: str) -> dict[str, tuple[str, ...]]:
        return {p.name: p.dims for p in parse(text).params}

    assert dims("Y[i] = A[i]; Z[i] = B[i]") == {"A": ("i",), "B": ("i2",)}
    assert dims("Y[i] = A[i]; Z[i] = Y[i] * B[i]") == {"A": ("i",), "B": ("i",)}
    assert dims("for i in 0:3:  Y[i] = A[i] * B[i]") == {"A": ("i",), "B": ("i2",)}
    assert dims("t += A[i,i]") == {"A": ("i", "i")}
    assert dims("for i in 0:3:  t += A[i,i]") == {"A": ("i", "i2")}
    assert dims("Y[x] += X[x+r] * W[r]") == {"X": ("n",), "W": ("r",)}
    assert dims("Y[n] += X[n+r] * W[r]") == {"X": ("n2",), "W": ("r",)}
    assert dims("Y[i] = A[i] * sum[i](B[i])") == {"A": ("i",), "B": ("i2",)}
    assert dims("Y[b,t] = E[ids[b,t]]") == {"E": ("n",), "ids": ("b", "t")}


def test_inputs_and_outputs() -> None:
    def signature(text: str) -> tuple[tuple[str, ...], tuple[str, ...], str]:
        p = parse(text)
        return p.inputs, p.results, p.name

    assert signature("Y[i] = A[i]; Z[i] = Y[i]; W[i] = B[i]") == (("A", "B"), ("Z", "W"), "Z_W")
    assert signature("Y[i] = Y[i] + A[i]") == (("Y", "A"), ("Y",), "Y")
    assert signature("Y[i] = A[i]; Z[i] = Y[i]; Y[i] = B[i]") == (("A", "B"), ("Y", "Z"), "Y_Z")
    assert signature("A.grad[i] = B[i]") == (("B",), ("A.grad",), "A_grad")
    assert signature(CORPUS["rnn"].text) == (("X", "W"), ("H",), "H")
    assert signature("Y[i] = x[i] * size(A, 0); Z[i] = A[i]") == (("x", "A"), ("Y", "Z"), "Y_Z")
    assert parse("Y[i] = A[i]", name="mine").name == "mine"
    assert parse("def f(A[i]) -> Y: Y[i] = A[i]").name == "f"


def test_names_of_sizes_are_integers_in_bounds_and_values() -> None:
    """What no index and no tensor is called; in a subscript such a name is an index."""
    program = parse("def f(X[n,m], y[m]) -> Y[n]:\n  for i in 1:n-1:  Y[i] += X[i,m] * y[m] / n")
    assert str(program).splitlines()[-1].strip() == "for i in 1:size(X, 0)-1, m:  Y[i] += X[i,m] * y[m] / size(X, 0)"
    assert str(parse("def f(X[n]) -> n: for ordered i in 0:size(X, 0):  n = n + X[i]")).endswith("n = n + X[i]")
    with pytest.raises(errors.IndexError_, match=r"write size\(X, 0\)"):
        parse("def f(X[n]) -> Y[n]: Y[i] = X[n-1-i]")


def test_sizes_of_outputs() -> None:
    def sizes(header: str) -> Any:
        return parse(f"def f(A[i,k], B[k,j], n) -> Y{header}: Y[i,j] += A[i,k] * B[k,j]").outputs[0].sizes

    assert sizes("") is None
    assert sizes("[x,y]") is None
    assert sizes("[i,j]") == (Size("A", 0), Size("B", 1))
    assert sizes("[i,y]") == (Size("A", 0), None)
    assert sizes("[i+k,2*n]") == (Call("add", (Size("A", 0), Size("A", 1))), Call("mul", (Const(2), Access("n"))))
    for header in ["[i,y]", "[y,j]", "[i+k,2*n]", "[size(B, 0),j]"]:
        program = parse(f"def f(A[i,k], B[k,j], n) -> Y{header}: Y[i,j] += A[i,k] * B[k,j]")
        assert parse(str(program)) == program


def test_spans_reach_into_the_text() -> None:
    text = "\n  for i, k:  Y[i] += A[i,k] * exp(B[k])  # sum\n"
    (statement,) = parse(text, origin="model.py").body
    assert isinstance(statement, Statement) and isinstance(statement.value, Call)

    def source(node: Any) -> str:
        assert node.span.text == text and node.span.origin == "model.py"
        return text[node.span.start : node.span.end]

    assert source(statement) == "for i, k:  Y[i] += A[i,k] * exp(B[k])"
    assert source(statement.target) == "Y[i]"
    assert source(statement.ranges[1]) == "k"
    assert [source(e) for e in ir.walk(statement.value)] == ["A[i,k] * exp(B[k])", "A[i,k]", "i", "k", "exp(B[k])", "B[k]", "k"]


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes: class, what is said, and what the carets stand under


def caret(error: errors.Error) -> str:
    """The text that the carets of an error stand under, from its message as printed."""
    lines = str(error).splitlines()
    at = next(n for n, line in enumerate(lines) if set(line.partition("| ")[2].strip()) == {"^"})
    marks, source = lines[at].partition("| ")[2], lines[at - 1].partition("| ")[2]
    return source[marks.index("^") : len(marks)].strip()


MISTAKES = [
    # text, class, words of the message, under the caret, words of the help
    ("Y[i] += A[i", errors.ParseError, "`[` is never closed", "[", "`]`"),
    ("Y[i] += A[i]]", errors.ParseError, "found `]`", "]", ""),
    ("Y[i] += A[i] B[i]", errors.ParseError, "expected an operator", "B", "`*`"),
    ("Y[i] += ", errors.ParseError, "expected an expression, found the end of the statement", "", ""),
    ("Y[i] == A[i]", errors.ParseError, "expected one of = += *= max= min=, found `==`", "==", "write `=`"),
    ("Y[i] -= A[i]", errors.ParseError, "expected one of = += *= max= min=", "-", "+="),
    ("Y[i] = A[i] & B[i]", errors.ParseError, "`&` is not in the notation", "&", "`and`"),
    ("Y[i] = a < A[i] < 2", errors.ParseError, "comparisons do not chain", "a < A[i] < 2", "`a < A[i] and A[i] < 2`"),
    ("", errors.ParseError, "found the end of the text", "", "statements"),
    ("for i\n  Y[i] = A[i]", errors.ParseError, "`:`", "", "end with `:`"),
    ("for i:\nY[i] = A[i]", errors.ParseError, "expected an indented block", "Y", "indent"),
    ("Y[i] = A[i]\nZ[i] = A[i]\n  W[i] = A[i]", errors.ParseError, "unexpected indentation", "W", "ends with `:`"),
    ("for i:\n    Y[i] = A[i]\n  Z[i] = A[i]", errors.ParseError, "indented like no line", "Z", "align"),
    ("def f(A[i]) Y: Y[i] = A[i]", errors.ParseError, "`->`", "Y", ""),
    ("Y[i] = sum[2*j](A[j])", errors.ParseError, "this is no index", "2*j", "sum[j]"),
    ("Y[i in 0:3] = A[i]", errors.ParseError, "a range stands where a subscript", "i in 0:3", "`for`"),
    ("Y[i] = pad(i-1) * A[i]", errors.ParseError, "`pad(..)` stands only as a whole subscript", "pad(i-1)", "X[pad(i-1)]"),
    ("Y[i] = A[2*clamp(i)] + A[i]", errors.ParseError, "`clamp(..)` stands only", "clamp(i)", ""),
    ("Y[i] = exp(A[i], init=2)", errors.ParseError, "init= is for reductions", "2", ""),
    ("Y[i] = sum[j](A[i,j], start=2)", errors.ParseError, "`start=`", "start=", "init="),
    ("Y[i] = sum[ordered j](A[i,j])", errors.ParseError, "`ordered` stands only in a `for` line", "ordered j", ""),
    ("Y[i] = softmax[j in 0:3](A[i,j])", errors.ParseError, "whole", "j in 0:3", ""),
    ("Y[i] = expp(A[i])", errors.UnknownFunction, "no function `expp`", "expp(A[i])", "did you mean `exp`?"),
    ("Y[i] = summ[j](A[i,j])", errors.UnknownFunction, "no reduction `summ`", "summ[j](A[i,j])", "did you mean `sum`?"),
    ("Y[i] = max(A[i], 0)", errors.UnknownFunction, "`max` needs the indices", "max(A[i], 0)", "maximum(a, b)"),
    ("Y[i] = exp[j](A[i,j])", errors.UnknownFunction, "goes over no index", "exp[j](A[i,j])", "`exp(..)`"),
    ("Y[i] = exp(A[i], 2)", errors.ArgumentError, "`exp` takes 1 argument, not 2", "exp(A[i], 2)", "exp(x)"),
    ("Y[i] = where(A[i])", errors.ArgumentError, "`where` takes 3 arguments, not 1", "where(A[i])", "where(c, a, b)"),
    ("Y[i] = A[pad(i, 1, 1, 1)]", errors.ArgumentError, "1 to 3 arguments, not 4", "pad(i, 1, 1, 1)", ""),
    ("Y[i] = A[i] * size(A)", errors.ArgumentError, "`size` takes 2", "size(A)", ""),
    ("Y[i] = A[i] * size(A, -1)", errors.ArgumentError, "number of a dimension", "-1", ""),
    ("a[i] = argmax[j, k](A[i,j,k])", errors.ArgumentError, "one index, not of 2", "argmax[j, k](A[i,j,k])", ""),
    ("a[i] = mean[j](A[i,j], init=0)", errors.ArgumentError, "`mean` takes no init=", "0", "sum"),
    ("Y[i] = A[i,k]", errors.IndexError_, "index k is not on the left of `=`", "k", "`+=`"),
    ("for i, k:  Y[i] = A[i]", errors.IndexError_, "index k is not on the left", "k", "`+=`"),
    ("for i, i:  Y[i] = A[i]", errors.IndexError_, "index i is bound twice", "i", ""),
    ("Y[i] = sum[j, j](A[i,j])", errors.IndexError_, "index j is bound twice", "j", ""),
    ("for ordered t:\n  for t:  Y[t] = A[t]", errors.IndexError_, "index t is bound twice", "t", ""),
    ("Y[i] = softmax[z](A[i])", errors.IndexError_, "softmax goes over z, which is no index here", "softmax[z](A[i])", "i"),
    ("Y[i] = sum[j](A[i,j], init=j)", errors.IndexError_, "outside the reduction over j", "j", ""),
    ("Y[i] = A[i] + A[i,i]", errors.RankMismatch, "A has 1 dimension before, and 2 subscripts here", "A[i,i]", ""),
    ("def f(A[i,j]) -> Y: Y[i] = A[i]", errors.RankMismatch, "A has 2 dimensions in the signature, and 1 subscript here", "A[i]", ""),
    ("Y[i] = A[i]; Y[i,j] = B[i,j]", errors.RankMismatch, "Y has 1 dimension before, and 2", "Y[i,j]", ""),
    ("def f(A[i]) -> Y[i,i]: Y[i] = A[i]", errors.RankMismatch, "output Y has 2 sizes", "Y[i,i]", ""),
    ("Y[i] = A[i] * size(A, 1)", errors.RankMismatch, "A has 1 dimension, and no dimension 1", "size(A, 1)", ""),
    ("def f(A[i], A[j]) -> Y: Y[i] = A[i]", errors.NameError_, "A is parameter twice", "A[j]", ""),
    ("def f(A[i]) -> Y, Y: Y[i] = A[i]", errors.NameError_, "Y is output twice", "Y", ""),
    ("def f(A[n], n) -> Y: Y[i] = A[i]", errors.NameError_, "n names a size of A and a scalar", "A[n]", ""),
    ("def f(A[i]) -> Z: Y[i] = A[i]", errors.NameError_, "output Z is never written", "Z", ""),
    ("def f(A[i], weight[i]) -> Y: Y[i] = A[i] * wieght[i]", errors.NameError_, "wieght is neither", "wieght[i]", "`weight`"),
    ("def f(A[i]) -> Y: Y[i] = A[i] * s", errors.NameError_, "s is neither", "s", "parameters"),
    ("def f(A[i]) -> Y: Y[i] = A[i] * size(B, 0)", errors.NameError_, "B is neither", "size(B, 0)", ""),
    ("def f(A[i]) -> Y[i+z]: Y[i] = A[i]", errors.NameError_, "z is no size", "z", "i"),
    ("pad[i] = A[i]", errors.NameError_, "`pad` is a reserved word", "pad", "pad_"),
    ("Y[i] = clamp * A[i]", errors.NameError_, "`clamp` is a reserved word", "clamp", ""),
    ("Y[in] = A[i]", errors.NameError_, "`in` is a reserved word", "in", "in_"),
    ("for for in 0:3:  Y[i] = A[i]", errors.ParseError, "found `for`", "for", "reserved word"),
    ("inf[i] = A[i]", errors.NameError_, "`inf` is a reserved word", "inf", "inf_"),
    ("def f(A[i], n) -> Y: for n in 0:3: Y[n] = A[n]", errors.NameError_, "n is used as an index and as a scalar", "n in 0:3", ""),
    ("Y[i] = n * A[i]; Z[n] = A[n]", errors.NameError_, "n is used as an index and as a scalar", "n", "declare"),
    ("def f(A[i], n) -> Y: Y[i] = sum[n](A[i] * n)", errors.NameError_, "n is used as an index and as a scalar", "n", ""),
    ("def f(A[i], ids[i]) -> Y: Y[i] = A[ids]", errors.NameError_, "ids is used as an index, and is a tensor", "ids", "ids[..]"),
    ("Y[i] = x[i] * size(A, 0)", errors.NameError_, "A is only measured", "size(A, 0)", "def f"),
    ("Y[i] = A[1.5]*A[i]", errors.DtypeError, "1.5 is no integer", "1.5", ""),
    ("Y[i] = A[i/2]", errors.DtypeError, "`/` cannot stand in a subscript", "i/2", "`//`"),
    ("Y[i] = A[exp(i)]", errors.DtypeError, "`exp` cannot stand", "exp(i)", ""),
    ("Y[i] = A[i < 2]", errors.DtypeError, "`<` cannot stand", "i < 2", ""),
    ("Y[i] = A[argmax[j](A[j])] + A[i]", errors.DtypeError, "a reduction cannot stand", "argmax[j](A[j])", "tensor first"),
    ("for i in 0:2.5:  Y[i] = 1", errors.DtypeError, "2.5 is no integer", "2.5", ""),
    ("Y[i] = A[pad(i, 0.5)]", errors.DtypeError, "0.5 is no integer", "0.5", ""),
    ("for i in 0:j, j in 0:3:  Y[i,j] = 1", errors.RangeError, "the bound of i uses j, which comes after it", "j", "put j before i"),
    ("for b, ordered t in 0:len[b]:  Y[b,t] = 1", errors.RangeError, "uses b, which no ordered loop", "len[b]", "mask"),
    ("Y[i] = X[i] + Y[i+1]", errors.SelfRead, "read with other subscripts", "Y[i+1]", "ordered i"),
    ("for ordered t, i:  Y[t,i] = Y[t,i+1] + X[t,i]", errors.SelfRead, "read with other subscripts", "Y[t,i+1]", "over i"),
    ("for ordered j, i in j:n:  L[i,j] = A[i,j] / L[j,j]", errors.SelfRead, "read with other subscripts", "L[j,j]", "over i"),
    ("for i in 1:n:  L[i,0] = A[i,0] / L[0,0]", errors.SelfRead, "read with other subscripts", "L[0,0]", "another tensor"),
    ("Y[i] += Y[i] * A[i,k]", errors.SelfRead, "being reduced over k", "Y[i]", "another tensor"),
    ("Y[Y[i]] = A[i]", errors.SelfRead, "cannot be a subscript", "Y[i]", "copy"),
    ("Y[i] = A[Y[i]]", errors.SelfRead, "cannot be a subscript", "Y[i]", "copy"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "kind", "what", "under", "help_"), MISTAKES, ids=[repr(m[0]) for m in MISTAKES])
def test_mistakes(text: str, kind: type[errors.Error], what: str, under: str, help_: str) -> None:
    with pytest.raises(kind) as caught:
        parse(text)
    error = caught.value
    assert type(error) is kind
    assert what in error.what
    assert error.help and help_ in error.help
    assert "help: " in str(error)
    assert caret(error) == under


@pytest.mark.parametrize(
    "text",
    [
        "for j:  Y[j] = where(c > 0, sum[j in 1:j](A[j]), softmax[j](j + 1))",
        "for i, j:  Y[i] += A[i,j] * sum[k in 0:j](sum[j](softmax[j](k * A[i,j])))",
        "for i, j:  Y[i,j] = softmax[j](sum[k in 0:j](B[i,k]))",
    ],
)
def test_ranges_that_have_nothing_to_do_with_a_softmax(text: str) -> None:
    assert str(parse(text)).splitlines()[-1].strip() == text


def test_an_error_on_a_later_line_names_it() -> None:
    with pytest.raises(errors.IndexError_) as caught:
        parse("Y[i] = A[i]\nZ[i] = A[i]\nW[i] = B[i,k]", origin="model.tdsl")
    assert "model.tdsl:3" in str(caught.value)
    assert "3 | W[i] = B[i,k]" in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# The Python spelling

b, d, e, h, i, j, k, n, t = td.indices("b d e h i j k n t")


def same(function: Any, text: str) -> None:
    """The traced function and the text are one Program."""
    traced, parsed = trace(function), parse(text)
    assert str(parsed) == str(traced)
    assert parsed == traced
    assert dims_pattern(parsed) == dims_pattern(traced)


def test_trace_attention() -> None:
    def attention(Q, K, V, scale):  # type: ignore[no-untyped-def]
        S, P, O = td.tensors("S P O")  # noqa: E741
        S[h, i, j] += Q[h, i, d] * K[h, j, d]
        P[h, i, j] = td.softmax(scale * S[h, i, j], over=j)
        O[h, i, e] += P[h, i, j] * V[h, j, e]
        return O

    same(attention, CORPUS["attention"].text)


def test_trace_every_assignment() -> None:
    def assign(A, ids, x):  # type: ignore[no-untyped-def]
        Y, Z, m, p, s = td.tensors("Y, Z, m, p, s")
        Y[i] += A[i, k]
        Z[i] = Y[i] + 1
        Z[i] = Z[i] + Y[i]
        Z[i] += Y[i]
        p[i] *= A[i, k]
        td.accumulate(m[ids[i]], "max", A[i, 0])
        td.accumulate(m[i], "min=", A[i, k])
        s[()] += x * Y[i]
        s[()] = s + 1
        return Z, m, p, s

    same(assign, """
        def assign(A[i,k], ids[i], x) -> Z[i], m, p[i], s:
            Y[i] += A[i,k]
            Z[i] = Y[i] + 1
            Z[i] = Z[i] + Y[i]
            Z[i] += Y[i]
            p[i] *= A[i,k]
            m[ids[i]] max= A[i,0]
            m[i] min= A[i,k]
            s += x * Y[i]
            s = s + 1
    """)  # fmt: skip


def test_trace_loops() -> None:
    def lstm(X, W):  # type: ignore[no-untyped-def]
        c, hidden = td.tensors("c hidden")
        with td.ordered(t):
            c[b, t, k] = X[b, t, k] + td.sum(W[k, j] * hidden[b, td.pad(t - 1), j], over=j)
            with td.loop(b):
                hidden[b, t, k] = td.tanh(c[b, t, k])
        return hidden

    same(lstm, """
        def lstm(X[b,t,k], W[k,k]) -> hidden[b,t,k]:
            for ordered t:
                c[b,t,k] = X[b,t,k] + sum[j](W[k,j] * hidden[b,pad(t-1),j])
                for b:  hidden[b,t,k] = tanh(c[b,t,k])
    """)  # fmt: skip

    def backwards(X):  # type: ignore[no-untyped-def]
        Y = td.tensors("Y")
        with td.ordered(i, 1, 5), td.reversed(j, 0, td.size(X, 1) - 1):
            Y[i, j] = Y[i - 1, j + 1] + X[i, j]
        return Y

    same(backwards, "def backwards(X[i,j]) -> Y: for ordered i in 1:5, reversed j in 0:size(X,1)-1: Y[i,j] = Y[i-1,j+1] + X[i,j]")


def test_trace_expressions() -> None:
    def everything(A, x, y):  # type: ignore[no-untyped-def]
        Y = td.tensor("Y", n + 1)
        m = td.tensors("m")
        Y[n] = td.where((n <= 2) & ~(n == 0) | (n != y), -A[n], 2 / A[n] ** 2) + abs(A[n // 2 % 3]) - 1.5 * td.maximum(x[n], math.inf)
        acc = A[n]
        acc += x[n]
        Y[n] = acc * td.size(A, 0) + n
        m[()] = td.max(A[i] * td.float32(x[i]), over={i: (0, y)}, init=-math.inf) + td.FUNCTIONS["sigmoid"](x[td.clamp(0)])
        return Y, m

    same(everything, """
        def everything(A[n], x[n], y) -> Y[n+1], m:
            Y[n] = where(n <= 2 and not n == 0 or n != y, -A[n], 2 / A[n] ** 2) + abs(A[n//2%3]) - 1.5 * maximum(x[n], inf)
            Y[n] = (A[n] + x[n]) * size(A, 0) + n
            m = max[i in 0:y](A[i] * float32(x[i]), init=-inf) + sigmoid(x[clamp(0)])
    """)  # fmt: skip


def test_trace_scalars_in_subscripts() -> None:
    def window(X, w):  # type: ignore[no-untyped-def]
        Y = td.tensors("Y")
        with td.loop(i, 0, 3):
            Y[i] = X[i + w]
        return Y

    same(window, "def window(X[n], w) -> Y: for i in 0:3: Y[i] = X[i+w]")


def test_trace_rewrites_a_parameter() -> None:
    def step(w, g, lr):  # type: ignore[no-untyped-def]
        w[i] = w[i] - lr * g[i]
        return w

    same(step, "def step(w[i], g[i], lr) -> w[i]: w[i] = w[i] - lr * g[i]")


def test_every_function_of_the_table_has_a_python_name() -> None:
    for name, op in OPS.items():
        if name in ("and", "or", "not"):
            continue
        call = td.FUNCTIONS[name](*[0.5] * op.arity)
        assert call.expr == Call(name, (Const(0.5),) * op.arity)
    assert td.exp(1).expr == Call("exp", (Const(1),))
    with pytest.raises(AttributeError):
        td.expp  # noqa: B018


def test_spans_of_python() -> None:
    def f(A):  # type: ignore[no-untyped-def]
        Y = td.tensors("Y")
        Y[i] += A[i, k]
        return Y

    (statement,) = trace(f).body
    assert statement.span is not None and statement.span.origin == __file__
    assert statement.span.text.strip() == "Y[i] += A[i, k]"


def test_python_mistakes() -> None:
    def branch(A):  # type: ignore[no-untyped-def]
        Y = td.tensors("Y")
        if A[i] > 0:
            Y[i] = A[i]
        return Y

    def chain(A):  # type: ignore[no-untyped-def]
        Y = td.tensors("Y")
        Y[i] = td.where(0 < i < 3, A[i], 0)
        return Y

    def iterate(A):  # type: ignore[no-untyped-def]
        for row in A:
            print(row)

    def nothing(A):  # type: ignore[no-untyped-def]
        Y = td.tensors("Y")
        Y[i] = A[i]

    def element(A):  # type: ignore[no-untyped-def]
        Y = td.tensors("Y")
        Y[i] = A[i]
        return Y[i]

    def default(A, scale=1.0):  # type: ignore[no-untyped-def]
        return A

    def stars(*A):  # type: ignore[no-untyped-def]
        return A

    def minus(A):  # type: ignore[no-untyped-def]
        Y = td.tensors("Y")
        Y[i] -= A[i]
        return Y

    def bare(A):  # type: ignore[no-untyped-def]
        Y = td.tensors("Y")
        Y += A[i]
        return Y

    def slices(A):  # type: ignore[no-untyped-def]
        Y = td.tensors("Y")
        Y[i] = A[i, :]
        return Y

    def text(A):  # type: ignore[no-untyped-def]
        Y = td.tensors("Y")
        Y[i] = A["i"]
        return Y

    def arity(A):  # type: ignore[no-untyped-def]
        Y = td.tensors("Y")
        Y[i] = td.exp(A[i], 2)
        return Y

    def left(A):  # type: ignore[no-untyped-def]
        Y = td.tensors("Y")
        Y[i] = A[i, k]
        return Y

    def ranks(A):  # type: ignore[no-untyped-def]
        Y = td.tensors("Y")
        Y[i] = A[i] + A[i, i]
        return Y

    def unwritten(A):  # type: ignore[no-untyped-def]
        Y, Z = td.tensors("Y Z")
        Y[i] = A[i] * Z[i]
        return Y

    def unwritten_output(A):  # type: ignore[no-untyped-def]
        Y, Z = td.tensors("Y Z")
        Y[i] = A[i]
        return Z

    def two_uses(A):  # type: ignore[no-untyped-def]
        Y, s = td.tensors("Y n")
        s[()] = 1
        Y[n] = A[n] * s
        return Y

    for function, kind, what, line in [
        (branch, errors.ArgumentError, "neither true nor false", "if A[i] > 0:"),
        (chain, errors.ArgumentError, "neither true nor false", "0 < i < 3"),
        (iterate, errors.ArgumentError, "the tensor A cannot be iterated", "for row in A:"),
        (nothing, errors.ArgumentError, "nothing returns nothing", "def nothing(A):"),
        (element, errors.ArgumentError, "an element of Y", "def element(A):"),
        (default, errors.ArgumentError, "parameter scale of default has a default", "def default("),
        (stars, errors.ArgumentError, "no plain parameter", "def stars("),
        (minus, errors.ArgumentError, "the assignments are", "Y[i] -= A[i]"),
        (bare, errors.ArgumentError, "names no element", "Y += A[i]"),
        (slices, errors.ArgumentError, "no slice", "Y[i] = A[i, :]"),
        (text, errors.ArgumentError, "a str stands where", 'Y[i] = A["i"]'),
        (arity, errors.ArgumentError, "`exp` takes 1 argument, not 2", "td.exp(A[i], 2)"),
        (left, errors.IndexError_, "index k is not on the left", "Y[i] = A[i, k]"),
        (ranks, errors.RankMismatch, "A has 1 dimension before, and 2 subscripts here", "A[i, i]"),
        (unwritten, errors.NameError_, "Z is neither", "Y[i] = A[i] * Z[i]"),
        (unwritten_output, errors.NameError_, "output Z is never written", "def unwritten_output"),
        (two_uses, errors.NameError_, "n is used as an index and as a scalar", "Y[n] = A[n] * s"),
    ]:
        with pytest.raises(kind) as caught:
            trace(function)
        message = str(caught.value)
        assert what in caught.value.what
        assert line in message and f"--> {__file__}:" in message
        assert "help: " in message


def test_statements_outside_a_function() -> None:
    Y = td.tensors("Y")
    with pytest.raises(errors.ArgumentError, match="outside a traced function"):
        Y[i] = 1


# ---------------------------------------------------------------------------------------------------------------------
# Random programs

INDICES = ["i", "j", "k"]
TENSORS = {"A": 1, "B.x": 2, "C": 3, "u": 0, "v": 0}
BINARY = ["add", "sub", "mul", "div", "floordiv", "mod", "pow", "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "maximum", "bitwise_and"]
INTEGER = ["add", "sub", "mul", "floordiv", "mod"]

integers: st.SearchStrategy[ir.Expr] = st.recursive(
    st.integers(-9, 9).map(Const) | st.sampled_from(INDICES).map(Index) | st.just(Size("C", 2)),
    lambda x: (
        st.builds(lambda op, a, b: Call(op, (a, b)), st.sampled_from(INTEGER), x, x)
        | x.map(lambda a: Call("neg", (a,)))
        | x.map(lambda a: Access("A", (a,)))
    ),
    max_leaves=4,
)
subscripts = integers | st.builds(ir.Clamp, integers) | st.builds(ir.Pad, integers) | st.builds(ir.Pad, integers, integers, integers)
accesses = st.sampled_from(sorted(TENSORS)).flatmap(lambda t: st.tuples(*[subscripts] * TENSORS[t]).map(lambda s: Access(t, s)))
leaves = (
    st.booleans().map(Const)
    | st.integers(-9, 9).map(Const)
    | st.floats(allow_nan=False).map(Const)
    | st.sampled_from(INDICES).map(Index)
    | accesses
)
ranges = st.builds(
    lambda index, limits: Range(index, *limits), st.sampled_from(["j", "r", "s"]), st.just(()) | st.tuples(integers, integers)
)


def compound(x: st.SearchStrategy[ir.Expr]) -> st.SearchStrategy[ir.Expr]:
    """Expressions of expressions."""
    return (
        st.builds(lambda op, a, b: Call(op, (a, b)), st.sampled_from(BINARY), x, x)
        | st.builds(lambda op, a: Call(op, (a,)), st.sampled_from(["neg", "not", "exp", "float16", "stop_gradient"]), x)
        | st.builds(lambda a, b, c: Call("where", (a, b, c)), x, x, x)
        | st.builds(lambda op, r, body: Reduce(op, (r,), body), st.sampled_from(["sum", "mean", "max", "argmin", "logsumexp"]), ranges, x)
        | st.builds(lambda r, body, init: Reduce("max", (r,), body, init), ranges, x, st.integers(-9, 9).map(Const))
        | st.builds(lambda i, body: Softmax((i,), Call("add", (Index(i), body))), st.sampled_from(INDICES), x)
    )


expressions = st.recursive(leaves, compound, max_leaves=12)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Random programs without a header: a few statements, some of them in an ordered loop."""
    body: list[Statement | Loop] = []
    for number in range(draw(st.integers(1, 4))):
        expr = draw(expressions)
        target = Access(f"Y{number}", tuple(Index(x) for x in free_indices(expr)))
        op = draw(st.sampled_from(["=", "+=", "*=", "max=", "min="]))
        if op != "=" and target.subscripts and draw(st.booleans()):
            target = Access(target.tensor, target.subscripts[1:])
        names = list(dict.fromkeys((*free_indices(target), *free_indices(expr))))
        limits = draw(st.sampled_from([(None, None), (Const(0), Size("C", 0))]))
        if names and draw(st.booleans()):
            loop, *names = [*[x for x in names if Index(x) in target.subscripts], *[x for x in names if Index(x) not in target.subscripts]]
            inner = Statement(tuple(Range(x) for x in names), target, op, expr)
            body.append(Loop((Range(loop, *limits, order=draw(st.sampled_from(["ordered", "reversed"]))),), (inner,)))
        else:
            body.append(Statement(tuple(Range(x, *(limits if x == "i" else ())) for x in names), target, op, expr))
    keep = Statement(tuple(map(Range, INDICES)), Access("Z", tuple(map(Index, INDICES))), "=", Access("C", tuple(map(Index, INDICES))))
    return infer_signature((*body, keep))


@pytest.mark.fuzz
@hypothesis.given(programs())
def test_random_programs_print_and_parse_back(program: Program) -> None:
    printed = str(program)
    again = parse(printed)
    assert again == program
    assert dims_pattern(again) == dims_pattern(program)
    assert str(again) == printed


@pytest.mark.fuzz
@hypothesis.given(st.text(alphabet="Yij[]()=+*-<>: ,;#\n0.5max pad for in def", max_size=40))
def test_random_text_is_a_program_or_an_error_with_help(text: str) -> None:
    try:
        parse(text)
    except errors.Error as error:
        assert error.help and error.span is not None
        assert 0 <= error.span.start <= error.span.end <= max(1, len(text) + 1)
