"""One mistake of every kind, what it is called, and where its carets stand: the source of errors.md, and of the test that keeps it true.

    python -m examples.page                 write errors.md again
"""

from __future__ import annotations

import linecache
from dataclasses import dataclass
from itertools import groupby

import torch

import tdsl
from tdsl import errors

_MARKS = str.maketrans("", "", "⟦⟧")
_FILE = "mistake.py"  # what the code of a mistake is called in errors about Python


@dataclass(frozen=True)
class Mistake:
    """A program that is wrong, or that is called wrongly.

    text: the notation, in which ⟦..⟧ stand around what the carets are under. what: the first line of the message. call: code that
    follows `f = tdsl.function(text)`. python: code in place of text and call.
    """

    kind: type[errors.Error]
    what: str
    text: str = ""
    call: str = ""
    python: str = ""

    @property
    def code(self) -> str:
        """What a user would have written."""
        if self.python:
            return self.python.translate(_MARKS)
        text = self.text.translate(_MARKS)
        quoted = f'tdsl.function("""\n{text}\n""")' if "\n" in text else f'tdsl.function("{text}")'
        return f"f = {quoted}\n{self.call}" if self.call else quoted

    @property
    def place(self) -> tuple[str, int, int] | None:
        """The line that the message shows, the column of its first caret and their number; None where it shows no line."""
        marked = next((line for line in (self.text or self.python).split("\n") if "⟦" in line), None)
        if marked is None:
            return None
        start = marked.index("⟦")
        end = marked.index("⟧") if "⟧" in marked else len(marked)
        return marked.translate(_MARKS), start, max(1, end - start - 1)

    def run(self) -> errors.Error:
        """The error that the code raises."""
        code = self.code + "\n"
        linecache.cache[_FILE] = (len(code), None, code.splitlines(keepends=True), _FILE)
        try:
            exec(compile(code, _FILE, "exec"), {"__name__": "mistake", "torch": torch, "tdsl": tdsl})
        except errors.Error as error:
            return error
        raise AssertionError(f"no error:\n{code}")


_MATMUL = "Y[i,j] += A[i,k] * B[k,j]"
_MATMUL_B = "Y[i,j] += A[i,k] * ⟦B[k,j]⟧"
_MATMUL_ALL = "⟦Y[i,j] += A[i,k] * B[k,j]⟧"
_SECTION = str  # a title

MISTAKES: tuple[Mistake | _SECTION, ...] = (
    "Syntax",
    Mistake(errors.ParseError, "`[` is never closed", "Y[i] += A⟦[⟧i,k * x[k]"),
    Mistake(errors.ParseError, "expected an operator, the end of the statement or `(`, found `x`", "Y[i] += A[i,k] ⟦x⟧[k]"),
    Mistake(errors.ParseError, "expected an expression, found the end of the statement", "Y[i] += A[i,k] *⟦⟧"),
    Mistake(errors.ParseError, "expected one of = += *= max= min=, found `==`", "Y[i] ⟦==⟧ A[i]"),
    Mistake(errors.ParseError, "expected one of = += *= max= min=, found `-`", "Y[i] ⟦-⟧= A[i]"),
    Mistake(errors.ParseError, "`@` is not in the notation", "Y[i,j] = A[i,k] ⟦@⟧ B[k,j]"),
    Mistake(errors.ParseError, "comparisons do not chain", "Y[i] = where(⟦0 < A[i] < 1⟧, A[i], 0)"),
    Mistake(errors.ParseError, "expected an operator, the end of the statement or `(`, found `if`", "Y[i] = A[i] ⟦if⟧ A[i] > 0 else 0"),
    Mistake(errors.ParseError, "expected an expression or `ordered`, `reversed`, found `:`", "Y[i] = A[⟦:⟧,i]"),
    Mistake(errors.ParseError, "expected an operator, `(`, `,` or `:`, found `=`", "for i in range(5): Y[i] ⟦=⟧ A[i]"),
    Mistake(errors.ParseError, "expected an indented block, found `Y`", "for i:\n⟦Y⟧[i] = A[i]"),
    Mistake(errors.ParseError, "unexpected indentation", "Y[i] = A[i]\nZ[i] = B[i]\n    ⟦W⟧[i] = Y[i] + Z[i]"),
    Mistake(errors.ParseError, "expected `->`, found `:`", "def f(A[i,k])⟦:⟧ Y[i] += A[i,k]"),
    Mistake(errors.ParseError, "`pad(..)` stands only as a whole subscript", "Y[i] = ⟦pad(i-1)⟧ * A[i]"),
    "Functions",
    Mistake(errors.UnknownFunction, "there is no function `tan_h`", "Y[i] = ⟦tan_h(A[i])⟧"),
    Mistake(errors.UnknownFunction, "there is no function `A`", "Y[i] = ⟦A(i)⟧ + 1"),
    Mistake(errors.UnknownFunction, "`max` needs the indices that it goes over", "Y[i] = ⟦max(A[i], 0)⟧"),
    Mistake(errors.UnknownFunction, "there is no reduction `average`", "Y[i] = ⟦average[k](A[i,k])⟧"),
    Mistake(errors.ArgumentError, "`where` takes 3 arguments, not 2", "Y[i] = ⟦where(A[i] > 0, A[i])⟧"),
    Mistake(errors.ArgumentError, "`mean` takes no init=", "Y[i] = mean[k](A[i,k], init=⟦0⟧)"),
    "Names",
    Mistake(
        errors.NameError_, "wieght is neither a parameter nor written before", "def f(A[i], weight[i]) -> Y[i]: Y[i] = A[i] * ⟦wieght[i]⟧"
    ),
    Mistake(errors.NameError_, "output Z is never written", "def f(A[i]) -> ⟦Z[i]⟧: Y[i] = A[i]"),
    Mistake(errors.NameError_, "`clamp` is a reserved word and cannot name a tensor or an index", "Y[i] = ⟦clamp⟧ * A[i]"),
    Mistake(errors.NameError_, "n is used as an index and as a scalar", "def f(A[i], n) -> Y: for ⟦n in 0:3⟧: Y[n] = A[n]"),
    Mistake(
        errors.NameError_, "ids is used as an index, and is a tensor with 1 dimension", "def f(A[i], ids[i]) -> Y[i]: Y[i] = A[⟦ids⟧]"
    ),
    "Indices",
    Mistake(errors.IndexError_, "index k is not on the left of `=`", "Y[i] = A[i,⟦k⟧] * x[k]"),
    Mistake(errors.IndexError_, "index j stands only on the left, where nothing gives it a range", "Y[i,⟦j⟧] = A[i]", "f(torch.zeros(3))"),
    Mistake(errors.IndexError_, "index i is bound twice", "for i, ⟦i⟧:  Y[i] = A[i]"),
    Mistake(errors.IndexError_, "softmax goes over z, which is no index here", "Y[i,j] = ⟦softmax[z](A[i,j])⟧"),
    Mistake(
        errors.IndexError_, "softmax goes over i, and the range of j depends on it", "for i, j in 0:len[i]:  Y[i,j] = ⟦softmax[i](A[i,j])⟧"
    ),
    "Sizes",
    Mistake(
        errors.SizeMismatch, "size k is 3 in A (dimension 1) but 4 in B (dimension 0)", _MATMUL_B, "f(torch.zeros(2, 3), torch.zeros(4, 5))"
    ),
    Mistake(
        errors.SizeMismatch, "size k is 3 in A (dimension 1) but 1 in B (dimension 0)", _MATMUL_B, "f(torch.zeros(2, 3), torch.zeros(1, 5))"
    ),
    Mistake(
        errors.SizeMismatch,
        "size n is 3 in A (dimension 0) but 4 in B (dimension 0)",
        "def f(A[n], ⟦B[n]⟧) -> Y: Y = A[0] * B[0]",
        "f(torch.zeros(3), torch.zeros(4))",
    ),
    Mistake(
        errors.SizeMismatch,
        "index i has size 4 in B (dimension 0) but size 3 in Y (dimension 0)",
        "Y[i] = A[i]; ⟦Y[i]⟧ += B[i]",
        "f(torch.zeros(3), torch.zeros(4))",
    ),
    "Ranges",
    Mistake(
        errors.RangeError,
        "the range of index x is ambiguous: subscripts bound it only together with r",
        "Y[x] += X[⟦x+r⟧]",
        "f(torch.zeros(10))",
    ),
    Mistake(errors.RangeError, "nothing gives index i a range", "Y[i] = A[⟦pad(i-1)⟧]", "f(torch.zeros(10))"),
    Mistake(
        errors.RangeError,
        "the bound of the ordered index t uses b, which no ordered loop outside binds",
        "for b, ordered t in 0:⟦len[b]⟧:  H[b,t] = X[b,t] + H[b,pad(t-1)]",
    ),
    Mistake(errors.RangeError, "the bound of i uses j, which comes after it", "for i in 0:⟦j⟧, j in 0:3:  Y[i,j] = 1"),
    Mistake(
        errors.RangeError,
        "the size of dimension 0 of Y cannot be inferred: its subscript depends on the values of a tensor",
        "Y[⟦dst[e]⟧] += m[e]",
        "f(torch.tensor([0, 2]), torch.ones(2))",
    ),
    Mistake(
        errors.RangeError, "max over index k, whose range is empty, has no value", "Y[i] = ⟦max[k](A[i,k])⟧", "f(torch.zeros(3, 0))"
    ),
    "Bounds",
    Mistake(
        errors.BoundsError,
        "subscript i of A runs over 0:5, but dimension 0 of A has size 4",
        "for i in 0:5:  Y[i] = A[⟦i⟧]",
        "f(torch.zeros(4))",
    ),
    Mistake(
        errors.BoundsError,
        "subscript i+1 of A runs over 1:5, but dimension 0 of A has size 4",
        "Y[i] = A[⟦i+1⟧] - A[i]",
        "f(torch.zeros(4))",
    ),
    Mistake(errors.BoundsError, "a subscript of Y (dimension 0) goes down to -1", "Y[⟦i-1⟧] = A[i]", "f(torch.zeros(4))"),
    Mistake(
        errors.BoundsError,
        "subscript ids[b] of E is 7 at b = 2, but dimension 0 of E has size 5",
        "Y[b,d] = E[⟦ids[b]⟧,d]",
        "f(torch.zeros(5, 8), torch.tensor([0, 4, 7]))",
    ),
    Mistake(
        errors.BoundsError,
        "subscript dst[e] of Y is -1 at e = 0, but dimension 0 of Y has size 3",
        "def f(dst[e], m[e], N) -> Y[N]: Y[⟦dst[e]⟧] += m[e]",
        "f(torch.tensor([-1, 1]), torch.ones(2), 3)",
    ),
    "Ranks",
    Mistake(errors.RankMismatch, "A has 2 dimensions before, and 1 subscript here", "Y[i] += A[i,k] * ⟦A[i]⟧"),
    Mistake(errors.RankMismatch, "output Y has 2 sizes, and 1 subscript where it is written", "def f(A[i]) -> ⟦Y[i,i]⟧: Y[i] = A[i]"),
    Mistake(
        errors.RankMismatch,
        "B has 2 dimensions in the program, but got a tensor of shape [8, 4, 5]",
        _MATMUL_B,
        "f(torch.zeros(2, 4), torch.zeros(8, 4, 5))",
    ),
    Mistake(
        errors.RankMismatch,
        "scale has 0 dimensions in the program, but got a tensor of shape [1]",
        "def f(A[i], ⟦scale⟧) -> Y[i]: Y[i] = scale * A[i]",
        "f(torch.zeros(3), torch.ones(1))",
    ),
    "Element types",
    Mistake(errors.DtypeError, "`/` cannot stand in a subscript, a bound or a size", "Y[i] = A[⟦i/2⟧]"),
    Mistake(
        errors.DtypeError,
        "ids is float32, but stands where an integer is needed",
        "Y[b,d] = E[⟦ids[b]⟧,d]",
        "f(torch.zeros(5, 8), torch.tensor([0.0, 4.0]))",
    ),
    Mistake(errors.DtypeError, "`bitwise_and` is not defined for float32 and int64", "Y[i] = ⟦bitwise_and(A[i], 1)⟧", "f(torch.zeros(3))"),
    Mistake(
        errors.DtypeError, "A has dtype complex64, which no kernel computes with", "Y[i] = ⟦A[i]⟧", "f(torch.zeros(3, dtype=torch.complex64))"
    ),
    "Devices",
    Mistake(
        errors.DeviceError, "B is on meta, but A is on cpu", _MATMUL_B, 'f(torch.zeros(2, 3), torch.zeros(3, 4, device="meta"))'
    ),
    "Statements that read what they write",
    Mistake(errors.SelfRead, "Y is read with other subscripts in the statement that writes it", "Y[i] = A[i] + 0.5 * ⟦Y[i-1]⟧"),
    Mistake(errors.SelfRead, "Y is read where it is being reduced over k", "Y[i] += ⟦Y[i]⟧ * A[i,k]"),
    Mistake(errors.SelfRead, "p is the target of this statement and cannot be a subscript or a bound in it", "p[i] = A[⟦p[i]⟧]"),
    "Elements written twice",
    Mistake(
        errors.NotInjective,
        "`=` would write 4 values to the 3 elements of Y",
        "def f(A[i,j]) -> Y[3]: ⟦Y[i+j]⟧ = A[i,j]",
        "f(torch.zeros(2, 2))",
    ),
    Mistake(
        errors.NotInjective,
        "`=` writes an element of Y more than once, at Y[p[i]]",
        "def f(p[i], A[i]) -> Y[i]: ⟦Y[p[i]]⟧ = A[i]",
        "f(torch.tensor([1, 0, 1]), torch.ones(3))",
    ),
    "What the language has and one stage cannot do",
    Mistake(
        errors.Unsupported,
        "the gradient of a `max=` at computed places that runs over the steps of an ordered loop (swap rule)",
        "def f(p[t,e], A[t,e], Y[n]) -> Y[n]: ⟦for ordered t, e:  Y[p[t,e]] max= A[t,e]⟧",
        "f.grad()",
    ),
    Mistake(errors.Unsupported, "the number of terms over index j is not known from a plain use of it", "Y[i] = mean[⟦j⟧](A[2*i+j])", "f.grad()"),
    Mistake(
        errors.Unsupported,
        "the gradient of this loop needs the value that h[j] had at each step, and a later step overwrites it (swap rule)",
        "def f(len[t], X[t,n]) -> h[n]: for ordered t, j in 0:len[t]:  h[j] += sin(⟦h[j]⟧ * X[t,j])",
        "f.grad()",
    ),
    "Calls",
    Mistake(errors.ArgumentError, "Y takes 2 arguments, but got 1", _MATMUL_ALL, "f(torch.zeros(2, 3))"),
    Mistake(
        errors.ArgumentError,
        "C is no parameter of matmul",
        "def matmul(⟦A[i,k], B[k,j]⟧) -> Y[i,j]: Y[i,j] += A[i,k] * B[k,j]",
        "f(torch.zeros(2, 3), C=torch.zeros(3, 4))",
    ),
    Mistake(errors.ArgumentError, "Y lacks the argument B", _MATMUL_B, "f(A=torch.zeros(2, 3))"),
    Mistake(
        errors.ArgumentError,
        "B is a list; an argument is a torch tensor or a Python number",
        _MATMUL_B,
        "f(torch.zeros(2, 3), [[1.0], [2.0], [3.0]])",
    ),
    Mistake(
        errors.ArgumentError, "B is 'bf16(3,4)', which describes no tensor", _MATMUL_B, 'f.plan("bf16[2,3]", "bf16(3,4)")'
    ),
    Mistake(
        errors.ArgumentError,
        "B is 'bf16[3,4]', which describes a tensor and is none",
        _MATMUL_B,
        'f(torch.zeros(2, 3, dtype=torch.bfloat16), "bf16[3,4]")',
    ),
    Mistake(errors.ArgumentError, "no gradient with respect to C: it is no input", _MATMUL, 'f.grad("C")'),
    Mistake(errors.ArgumentError, "no stage is called 'cuda'", _MATMUL, 'f.emit("cuda", "bf16[2,3]", "bf16[3,4]")'),
    Mistake(
        errors.ArgumentError, "unknown target 'cuda:1'", _MATMUL, 'f.emit("ptx", "bf16[2,3]", "bf16[3,4]", target="cuda:1")'
    ),
    Mistake(
        errors.ArgumentError, "there is no backend 'cuda'", python='tdsl.function("Y[i] = A[i]", backend="cuda")'
    ),
    "The Python spelling",
    Mistake(
        errors.ArgumentError,
        "double returns nothing, and a traced function returns tensors",
        python="i = tdsl.indices('i')\n\n@tdsl.function\n⟦def double(A):⟧\n    Y = tdsl.tensors('Y')\n    Y[i] = 2 * A[i]",
    ),
    Mistake(
        errors.ArgumentError,
        "parameter scale of scaled has a default",
        python="i = tdsl.indices('i')\n\n@tdsl.function\n⟦def scaled(A, scale=2.0):⟧\n    Y = tdsl.tensors('Y')\n    Y[i] = scale * A[i]\n    return Y",
    ),
)  # fmt: skip


def mistakes() -> tuple[Mistake, ...]:
    """All of them, in the order of the page."""
    return tuple(m for m in MISTAKES if isinstance(m, Mistake))


def page() -> str:
    """errors.md: the code of every mistake, and the message that it gets."""
    parts = [_INTRODUCTION]
    title = ""
    for is_title, group in groupby(MISTAKES, key=lambda m: isinstance(m, str)):
        if is_title:
            title = str(next(group))
            parts.append(f"## {title}")
            continue
        for m in group:
            assert isinstance(m, Mistake)
            error = m.run()
            shown = "\n".join(line.rstrip() for line in str(error).splitlines())
            parts.append(f"```python\n{m.code}\n```\n```text\n{type(error).__name__}: {shown}\n```")
    return "\n\n".join(parts) + "\n"


_INTRODUCTION = """# What mistakes get

<!-- Made by `python -m examples.page`; tests/test_errors.py keeps it true. -->

Every error is a class of [tdsl/errors.py](../tdsl/errors.py), all of them subclasses of `tdsl.Error`, and of `ValueError` or `TypeError` where torch's users
expect those. Its message says what is wrong, shows the place with carets, and says how to mend it; `.what`, `.span` and `.help` are the same as data.
Each piece of code below is run to make this page, and is followed by the message that it gets. Two kinds are missing, since they need a broken
installation or an edited kernel: `MissingPackage` and `CompileError`."""
