"""The scalar functions that generated C++ calls: branch-free, so that a compiler makes vector code of a loop around them.

float: within 2 units in the last place (tests/test_cpp.py measures each), with the infinities, NaN and denormal numbers of the
C library. double: exp, log and what is made of them likewise; the rest is the C library's, one number at a time.
Nothing is included: a header costs more compile time than a kernel. The formulas stand in cpp_functions.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

from lowering.cpp_functions import PIECES, PROVIDES
from tdsl.ir import Call, Const, Expr, Index
from tdsl.ops import OPS, template

TYPES = """\
typedef unsigned char u8; typedef signed char i8; typedef short i16; typedef int i32; typedef long long i64;
typedef unsigned short u16; typedef unsigned int u32; typedef unsigned long long u64;
#define INLINE static inline __attribute__((always_inline))
template <class T> struct integer_of;
template <> struct integer_of<float> { typedef int type; };
template <class T> INLINE T choose(bool c, T a, T b) { return c ? a : b; }
"""

_OF = {function: piece for piece in PIECES for function in PROVIDES.get(piece, (piece,))}
# Every function that stands here: generated names keep clear of them.
NAMES = frozenset(_OF)
_NAME = re.compile(r"\b([a-z_][a-z_0-9]*)\(")
_COMMENT = re.compile(r"//.*")


def known(op: str) -> bool:
    """Whether generated code can call a function of ops.OPS: it stands here, or its row defines it by others that do."""
    return op in _OF or bool(OPS[op].definition)


def prelude(names: Iterable[str]) -> str:
    """The definitions of some functions and of all that they call, in an order in which each comes after those."""
    found: dict[str, str] = {}

    def visit(piece: str) -> None:
        if piece in found:
            return
        text = _text(piece)
        for name in _NAME.findall(_COMMENT.sub("", text)):
            other = _OF.get(name) or (name if name in OPS and OPS[name].definition else None)
            if other is not None and other != piece:
                visit(other)
        found[piece] = text

    for name in sorted(names):
        visit(_OF.get(name, name))
    return "".join(found.values())


@cache
def _text(piece: str) -> str:
    if piece not in PIECES:
        row = OPS[piece]
        arguments = ", ".join(f"T {name}" for name in row.args.split())
        return f"template <class T> INLINE T {piece}({arguments}) {{ return {_formula(template(row.definition))}; }}\n"
    return PIECES[piece].replace("@TURNS@", _turns()) if piece == "turn" else PIECES[piece]


def _formula(e: Expr) -> str:
    """A definition of the table as C++ on a type T."""
    match e:
        case Const(value=value):
            return f"T({float(value)!r})"
        case Index(name=name):
            return name
        case Call(op="neg", args=(x,)):
            return f"(-{_formula(x)})"
        case Call(op="add" | "sub" | "mul" | "div" as op, args=(a, b)):
            return f"({_formula(a)} {'+-*/'[('add', 'sub', 'mul', 'div').index(op)]} {_formula(b)})"
        case Call(op=op, args=args):
            return f"{op}({', '.join(_formula(a) for a in args)})"
    raise AssertionError(e)


# 2 pi to 60 decimals, scaled: 2^104 mod 2 pi to 24 digits needs 32 + 24.
_TWO_PI = 6283185307179586476925286766559005768394338798750211641949889  # times 10^-60


def _turns() -> str:
    """2^k mod 2 pi for k = 27 .. 104, and NaN for the exponent of infinity."""
    unit = 10**60
    return ", ".join([*(repr((2**k * unit % _TWO_PI) / unit) for k in range(27, 105)), '__builtin_nan("")'])
