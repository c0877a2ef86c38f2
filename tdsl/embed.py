"""The Python spelling: a function of symbolic tensors, run once, leaves its statements behind.

i, k = indices("i k")
def f(A):
    Y = tensors("Y")
    Y[i] += A[i, k]          -->   for i, k:  Y[i] += A[i,k]
    return Y
"""

from __future__ import annotations

import builtins
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

from tdsl.calls import call, check_name, reduction
from tdsl.errors import ArgumentError
from tdsl.header import Header
from tdsl.ir import REDUCTION_OF, Access, Index, Loop, Output, Param, Program, Range, Span, Statement, expressions, walk
from tdsl.ops import INNER_REDUCTIONS, OPS
from tdsl.resolve import resolve
from tdsl.symbolic import TRACE, Computed, Element, Operand, Tensor, Value, as_expr, here, open_blocks, record, whole_line

# ---------------------------------------------------------------------------------------------------------------------
# Names


def _names(names: str) -> list[str]:
    return names.replace(",", " ").split()


def indices(names: str) -> Any:
    """Loop indices: `i, j = indices("i j")`; a single one is not in a tuple."""
    made = [Computed(Index(check_name(name, here()))) for name in _names(names)]
    return made[0] if len(made) == 1 else tuple(made)


def tensors(names: str) -> Any:
    """Tensors to write: `S, P = tensors("S P")`; a single one is not in a tuple. A 0-d one is written as `s[()]`."""
    made = [Tensor(name) for name in _names(names)]
    return made[0] if len(made) == 1 else tuple(made)


def tensor(name: str, *sizes: Operand) -> Tensor:
    """One tensor to write; as an output it has the sizes given: integers, index names as sizes of parameters, scalars, + - * // %."""
    return Tensor(name, tuple(as_expr(s) for s in sizes) if sizes else None)


# ---------------------------------------------------------------------------------------------------------------------
# Statements


def accumulate(target: Value, op: str, value: Operand) -> None:
    """`target op value` as a statement; op: "=", "+=", "*=", "max=", "min=", or the reduction's name "sum", "prod", "max", "min"."""
    spelled = {"=": "=", **{a: a for a in REDUCTION_OF}, **{r: a for a, r in REDUCTION_OF.items()}}
    if op not in spelled:
        raise ArgumentError(f"{op!r} is no assignment", span=whole_line(here()), help=f"one of {', '.join(spelled)}")
    if not isinstance(target, Element | Tensor):
        raise ArgumentError("the target is no element of a tensor", span=whole_line(here()), help='write `tdsl.accumulate(m[i], "max", x)`')
    record(target.expr, spelled[op], as_expr(value))


def _index_name(x: object) -> str:
    if isinstance(x, Value) and isinstance(x.expr, Index):
        return x.expr.name
    raise ArgumentError("this is no index", span=whole_line(here()), help='indices come from `tdsl.indices("i j")`')


def _range(index: Value, lo: Operand | None, hi: Operand | None, order: str = "") -> Range:
    name = _index_name(index)
    if (lo is None) != (hi is None):
        raise ArgumentError(f"the range of {name} has one bound", span=whole_line(here()), help=f"write both, `({name}, 0, n)`, or none")
    return Range(name, None if lo is None else as_expr(lo), None if hi is None else as_expr(hi), order, span=here())


@contextmanager
def _block(r: Range) -> Iterator[None]:
    blocks = open_blocks()
    inner: list[Statement | Loop] = []
    blocks.append(inner)
    try:
        yield
    finally:
        blocks.pop()
    if inner:
        blocks[-1].append(Loop((r,), tuple(inner), span=r.span))


@contextmanager
def loop(index: Value, lo: Operand | None = None, hi: Operand | None = None) -> Iterator[None]:
    """`with loop(i, 0, n - 1):` the statements inside share the range, half open as Python's."""
    with _block(_range(index, lo, hi)):
        yield


@contextmanager
def ordered(index: Value, lo: Operand | None = None, hi: Operand | None = None) -> Iterator[None]:
    """`with ordered(t):` the block runs whole at each step, in increasing order."""
    with _block(_range(index, lo, hi, "ordered")):
        yield


@contextmanager
def reversed(index: Value, lo: Operand | None = None, hi: Operand | None = None) -> Iterator[None]:
    """`with reversed(t):` the block runs whole at each step, in decreasing order."""
    with _block(_range(index, lo, hi, "reversed")):
        yield


# ---------------------------------------------------------------------------------------------------------------------
# Functions


def pad(value: Operand, lo: Operand | None = None, hi: Operand | None = None) -> Value:
    """A subscript that reads zero outside its tensor; with lo and hi it is bounded to [-lo, size+hi)."""
    return Computed(call("pad", [as_expr(x) for x in (value, lo, hi) if x is not None], here()))


def clamp(value: Operand) -> Value:
    """A subscript that reads the nearest element."""
    return Computed(call("clamp", [as_expr(value)], here()))


def size(tensor: Value, dim: int) -> Value:
    """The extent of a dimension of a tensor."""
    return Computed(call("size", [as_expr(tensor), as_expr(dim)], here()))


def softmax(value: Operand, over: Value | Sequence[Value]) -> Value:
    """softmax over indices of the statement that it stands in: it binds none."""
    return _reduction("softmax", value, over, None)


def _reduction(name: str, value: Operand, over: Any, init: Operand | None) -> Value:
    if isinstance(over, Mapping):
        ranges = [_range(index, *limits) for index, limits in over.items()]
    else:
        ranges = [_range(index, None, None) for index in (over if isinstance(over, tuple | list) else (over,))]
    return Computed(reduction(name, ranges, [as_expr(value)], None if init is None else as_expr(init), here()))


def _scalar_function(name: str) -> Callable[..., Value]:
    def function(*args: Operand) -> Value:
        return Computed(call(name, [as_expr(a) for a in args], here()))

    function.__name__ = function.__qualname__ = name
    function.__doc__ = f"`{name}({', '.join(OPS[name].args.split())})` of the notation, element by element."
    return function


def _inner_reduction(name: str) -> Callable[..., Value]:
    def function(value: Operand, *, over: Any, init: Operand | None = None) -> Value:
        return _reduction(name, value, over, init)

    function.__name__ = function.__qualname__ = name
    function.__doc__ = f"`{name}[over](value, init=init)`; over: an index, several, or a mapping {{index: (lo, hi)}}."
    return function


# Every function of the notation by name: the rows of OPS that are written as functions, and the reductions.
FUNCTIONS: Mapping[str, Callable[..., Value]] = {
    **{name: _scalar_function(name) for name in OPS if name not in ("and", "or", "not")},
    **{name: _inner_reduction(name) for name in sorted(INNER_REDUCTIONS)},
    "softmax": softmax, "pad": pad, "clamp": clamp, "size": size,
}  # fmt: skip


def __getattr__(name: str) -> Callable[..., Value]:
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# ---------------------------------------------------------------------------------------------------------------------
# Tracing


def trace(function: Callable[..., Any]) -> Program:
    """The Program of a Python function: it runs once, with a symbolic tensor for each parameter.

    A parameter that is used bare is a scalar; the first access fixes the rank of every other. It returns one tensor or a tuple.
    Raises ArgumentError for parameters with defaults or stars and for results that are no tensors, and what `resolve` raises.
    """
    span = _definition(function)
    symbols = {name: Tensor(name) for name in _parameters(function, span)}
    blocks: list[list[Statement | Loop]] = [[]]
    token = TRACE.set(blocks)
    try:
        result = function(*symbols.values())
    finally:
        TRACE.reset(token)
    returned = _returned(result, function, span)
    body = tuple(blocks[0])
    ranks: dict[str, int] = {}
    for node in body:
        for e in (x for expr in expressions(node) for x in walk(expr)):
            if isinstance(e, Access):
                ranks.setdefault(e.tensor, len(e.subscripts))
    params = tuple(Param(name, ("",) * ranks.get(name, 0), span=span) for name in symbols)
    outputs = tuple(Output(t.name, t.sizes, span=span) for t in returned)
    name = function.__name__ if function.__name__.isidentifier() else None
    return resolve(body, Header(name, params, outputs, named=False), explicit=True)


def _parameters(function: Callable[..., Any], span: Span | None) -> list[str]:
    names = []
    for p in inspect.signature(function).parameters.values():
        if p.kind not in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD):
            raise ArgumentError(
                f"parameter {p.name} of {function.__name__} is no plain parameter",
                span=span,
                help="every parameter of a traced function is one tensor or scalar",
            )
        if p.default is not p.empty:
            raise ArgumentError(
                f"parameter {p.name} of {function.__name__} has a default",
                span=span,
                help="leave the default out, or write the number into the body",
            )
        names.append(check_name(p.name, span))
    return names


def _returned(result: object, function: Callable[..., Any], span: Span | None) -> list[Tensor]:
    returned = list(result) if isinstance(result, tuple | list) else [result]
    for item in returned:
        if not isinstance(item, Tensor):
            what = (
                f"an element of {item.expr.tensor}"
                if isinstance(item, Element) and isinstance(item.expr, Access)
                else "nothing"
                if item is None
                else f"a {type(item).__name__}"
            )
            raise ArgumentError(
                f"{function.__name__} returns {what}, and a traced function returns tensors",
                span=span,
                help="end with `return O`, or `return O, P`",
            )
    if not returned:
        raise ArgumentError(f"{function.__name__} returns no tensor", span=span, help="end with `return O`")
    return cast("list[Tensor]", returned)


def _definition(function: Callable[..., Any]) -> Span | None:
    """The `def` line of a function."""
    code = getattr(function, "__code__", None)
    if code is None:
        return None
    try:
        lines, first = inspect.getsourcelines(function)
    except (OSError, TypeError):
        return None
    at = next((k for k, text in builtins.enumerate(lines) if text.lstrip().startswith(("def ", "async def "))), 0)
    text = lines[at].rstrip("\n")
    return Span(text, len(text) - len(text.lstrip()), len(text), code.co_filename, first + at)


__all__ = [
    "FUNCTIONS", "Tensor", "Value", "accumulate", "clamp", "indices", "loop", "ordered", "pad", "reversed", "size", "softmax",
    "tensor", "tensors", "trace",
]  # fmt: skip
