"""What a function name means: the node that `NAME(..)` or `NAME[..](..)` stands for, checked. Both spellings build their calls here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches

from tdsl.errors import ArgumentError, IndexError_, NameError_, ParseError, UnknownFunction
from tdsl.ir import Access, Call, Clamp, Const, Expr, Index, Pad, Range, Reduce, Size, Softmax, Span, free_indices
from tdsl.ops import INNER_REDUCTIONS, OPS, REDUCTIONS

_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
RESERVED = frozenset(["def", "for", "in", "ordered", "reversed", "and", "or", "not", "pad", "clamp", "inf", "True", "False"])
FORMS = frozenset({"pad", "clamp", "size", "softmax"})  # functions that are nodes of their own


def check_name(name: str, span: Span | None) -> str:
    """`name`, which must be a name of the notation, and no reserved word."""
    if not _NAME.fullmatch(name):
        raise NameError_(f"`{name}` is no name", span=span, help="a name has letters, digits and `_`, and begins with no digit")
    if name in RESERVED:
        raise NameError_(
            f"`{name}` is a reserved word and cannot name a tensor or an index", span=span, help=f"write another name, `{name}_` say"
        )
    return name


def call(name: str, args: Sequence[Expr], span: Span | None = None) -> Expr:
    """The node of `name(args)`.

    Raises UnknownFunction for a name that no table has, ArgumentError for the wrong number or kind of arguments.
    """
    if name == "size":
        return _size(args, span)
    if name in ("pad", "clamp"):
        _count(name, len(args), 1, 3 if name == "pad" else 1, span)
        value, lo, hi = (*args, None, None)[:3]
        assert value is not None
        return Pad(value, lo, hi, span=span) if name == "pad" else Clamp(value, span=span)
    if name in INNER_REDUCTIONS or name == "softmax":
        pair = {"max": "maximum", "min": "minimum"}.get(name)
        mend = f"write `{name}[j](..)` to go over the index j" + (f", or `{pair}(a, b)` of two values" if pair else "")
        raise UnknownFunction(f"`{name}` needs the indices that it goes over", span=span, help=mend)
    if name not in OPS:
        raise UnknownFunction(f"there is no function `{name}`", span=span, help=_suggest(name))
    if name == "rand" and len(args) > 1:  # rand(seed, i, j): a number in [0, 1) for each seed and each point
        key = args[0]
        for arg in args[1:]:
            key = Call("mix", (key, arg), span=span)
        args = (key,)
    _count(name, len(args), OPS[name].arity, OPS[name].arity, span)
    return Call(name, tuple(args), span=span)


def reduction(name: str, ranges: Sequence[Range], args: Sequence[Expr], init: Expr | None = None, span: Span | None = None) -> Expr:
    """The node of `name[ranges](arg, init=init)`: a Reduce, or a Softmax.

    Raises UnknownFunction, ArgumentError, and IndexError_ for an index that is bound twice or used by `init`.
    """
    if name not in INNER_REDUCTIONS and name != "softmax":
        if name in OPS or name in FORMS:
            raise UnknownFunction(f"`{name}` goes over no index", span=span, help=f"write `{name}(..)`, without the brackets before it")
        raise UnknownFunction(f"there is no reduction `{name}`", span=span, help=_suggest(name))
    _count(name, len(args), 1, 1, span)
    for position, r in enumerate(ranges):
        if r.order:
            raise ParseError(f"`{r.order}` stands only in a `for` line", span=r.span, help=f"write `{r.index}` alone")
        if r.index in {other.index for other in ranges[:position]}:
            raise IndexError_(f"index {r.index} is bound twice by `{name}`", span=r.span, help="name each index once")
    if name == "softmax":
        for r in ranges:
            if r.lo is not None:
                raise ParseError(
                    "softmax normalises over an index in scope, whole",
                    span=r.span,
                    help=f"write `softmax[{r.index}](..)` and the range in the `for` line",
                )
        if init is not None:
            raise ArgumentError("softmax takes no init=", span=init.span, help="leave it out")
        return Softmax(tuple(r.index for r in ranges), args[0], span=span)
    if name in ("argmax", "argmin") and len(ranges) != 1:
        raise ArgumentError(f"`{name}` gives the value of one index, not of {len(ranges)}", span=span, help=f"write `{name}[j](..)`")
    if init is not None and name not in REDUCTIONS:
        raise ArgumentError(f"`{name}` takes no init=", span=init.span, help=f"init= is for {_listed(sorted(REDUCTIONS))}")
    if init is not None:
        hidden = [r.index for r in ranges if r.index in free_indices(init) or Access(r.index) == init]
        if hidden:
            raise IndexError_(
                f"init= stands outside the reduction over {hidden[0]} and cannot use it",
                span=init.span,
                help="use a number, or what is in scope outside",
            )
    return Reduce(name, tuple(ranges), args[0], init, span=span)


def negative(operand: Expr, literal: bool, span: Span | None = None) -> Expr:
    """The node of `-operand`: a negative number where the operand is written as one, else a Call."""
    if literal and isinstance(operand, Const) and not isinstance(operand.value, bool):
        return replace(operand, value=-operand.value, span=span)
    return Call("neg", (operand,), span=span)


def _size(args: Sequence[Expr], span: Span | None) -> Size:
    _count("size", len(args), 2, 2, span)
    tensor, dim = args
    if not isinstance(tensor, Access | Index) or (isinstance(tensor, Access) and tensor.subscripts):
        raise ArgumentError("the first argument of `size` is the name of a tensor", span=tensor.span, help="write `size(A, 0)`")
    if not isinstance(dim, Const) or type(dim.value) is not int or dim.value < 0:
        raise ArgumentError(
            "the second argument of `size` is the number of a dimension: 0, 1, ..", span=dim.span or span, help="write `size(A, 0)`"
        )
    return Size(tensor.tensor if isinstance(tensor, Access) else tensor.name, dim.value, span=span)


def _count(name: str, given: int, least: int, most: int, span: Span | None) -> None:
    if not least <= given <= most:
        wanted = str(least) if least == most else f"{least} to {most}"
        arguments = f"({', '.join(OPS[name].args.split())})" if name in OPS else {"size": "(A, d)", "pad": "(e, lo, hi)"}.get(name, "(e)")
        raise ArgumentError(
            f"`{name}` takes {wanted} argument{'s' * (most != 1)}, not {given}", span=span, help=f"its arguments are `{name}{arguments}`"
        )


def _suggest(name: str) -> str:
    known = sorted({*OPS, *INNER_REDUCTIONS, *FORMS} - {"and", "or", "not"})
    close = get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean `{close[0]}`?" if close else "the functions are the rows of tdsl/ops.py; a product needs its `*`"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + " and " + names[-1]
