"""Two tables: the scalar functions and the reductions of the language. A new function is ONE row of OPS.

A row gives the derivative in the notation itself (x or a, b, c are the arguments, y the result, g the cotangent that
arrives) and how each backend spells the function. Backends that have no such builtin get a definition in `triton_def`.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from tdsl.ir import Call, Const, Expr, Index, rebuild

# ---------------------------------------------------------------------------------------------------------------------
# Element types


@dataclass(frozen=True, slots=True)
class Dtype:
    """kind: "bool" < "int" < "float" in promotion; bits: storage; short: the name in `bf16[8,64]`; compute: what arithmetic on it runs in."""

    name: str
    short: str
    kind: str
    bits: int
    triton: str
    mlir: str
    compute: str


# Dtypes that tensors have in memory only: an input counts as bfloat16, in which its values are exact.
STORED_ONLY = {
    d.name: d
    for d in (
        Dtype("float8_e4m3fn", "fp8e4nv", "float", 8, "float8e4nv", "f8E4M3FN", "float32"),
        Dtype("float8_e5m2", "fp8e5", "float", 8, "float8e5", "f8E5M2", "float32"),
    )
}


class _Dtypes(dict[str, Dtype]):
    """The dtypes that there is arithmetic on; of a dtype in memory each can be asked for."""

    def __missing__(self, name: str) -> Dtype:
        return STORED_ONLY[name]


DTYPES = _Dtypes(
    (d.name, d)
    for d in (
        #     name        short   kind    bits triton      mlir    compute
        Dtype("bool", "bool", "bool", 8, "int1", "i1", "bool"),
        Dtype("uint8", "u8", "int", 8, "uint8", "i8", "int64"),
        Dtype("int8", "i8", "int", 8, "int8", "i8", "int64"),
        Dtype("int16", "i16", "int", 16, "int16", "i16", "int64"),
        Dtype("int32", "i32", "int", 32, "int32", "i32", "int64"),
        Dtype("int64", "i64", "int", 64, "int64", "i64", "int64"),
        Dtype("float16", "fp16", "float", 16, "float16", "f16", "float32"),
        Dtype("bfloat16", "bf16", "float", 16, "bfloat16", "bf16", "float32"),
        Dtype("float32", "fp32", "float", 32, "float32", "f32", "float32"),
        Dtype("float64", "fp64", "float", 64, "float64", "f64", "float64"),
    )
)
SHORT = {d.short: d.name for d in DTYPES.values()} | {"f16": "float16", "f32": "float32", "f64": "float64"}
SHORT |= {"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}


def promote(a: str, b: str) -> str:
    """torch's promotion of two dtypes of the same category of tensors (both with dimensions, or both without)."""
    x, y = DTYPES[a], DTYPES[b]
    order = ("bool", "int", "float")
    if x.kind != y.kind:
        return max(x, y, key=lambda d: order.index(d.kind)).name
    if a == b:
        return a
    if {a, b} == {"float16", "bfloat16"}:
        return "float32"
    if x.bits == y.bits:  # uint8 with int8
        return "int16"
    wide, narrow = (x, y) if x.bits > y.bits else (y, x)
    return wide.name if narrow.name != "uint8" or wide.bits > 8 else "int16"


# ---------------------------------------------------------------------------------------------------------------------
# Scalar functions


@dataclass(frozen=True, slots=True)
class Op:
    """One scalar function.

    args: names of the arguments, as `grad` and `definition` use them. kind: the result is "float" (integers become
    float32), "same" (promotion of the arguments), "bool", "branch" (promotion of the arguments after the first), or a dtype.
    grad: per argument the cotangent in the notation, None where the derivative is zero or not defined.
    numpy, torch, triton: format strings of the arguments. mlir: the operation on floats ("" where there is none).
    definition: the same function by simpler ones. cost: instructions, in units of one fused multiply-add.
    homomorphism: (p, q) where f(x p y) == f(x) q f(y), for the p and q of "add" and "mul".
    base: (g, c) where f(x) == g(c * x) and g is what hardware computes.
    takes: the kinds of dtypes, after promotion, that the function is defined for.
    """

    name: str
    args: str
    kind: str
    grad: tuple[str | None, ...]
    numpy: str
    torch: str
    triton: str
    mlir: str = ""
    definition: str = ""
    triton_def: str = ""
    cost: float = 1.0
    homomorphism: tuple[str, str] = ("", "")
    base: tuple[str, float] = ("", 1.0)
    takes: tuple[str, ...] = ("bool", "int", "float")

    @property
    def arity(self) -> int:
        """The number of arguments."""
        return len(self.args.split())


_LN2 = repr(math.log(2.0))
_SQRT_HALF = repr(math.sqrt(0.5))
_INV_SQRT_2PI = repr(1.0 / math.sqrt(2.0 * math.pi))
_TWO_OVER_SQRT_PI = repr(2.0 / math.sqrt(math.pi))
_GELU_U = f"{math.sqrt(2.0 / math.pi)!r} * (x + 0.044715 * x * x * x)"
_GELU_TANH_GRAD = (
    f"g * (0.5 * (1 + tanh({_GELU_U})) + 0.5 * x * (1 - tanh({_GELU_U}) * tanh({_GELU_U}))"
    f" * {math.sqrt(2.0 / math.pi)!r} * (1 + 0.134145 * x * x))"
)

# As lowering/exponent.py spells exp: hardware has 2**x, and `tl.exp` takes three instructions more for results below 1e-38, which are 0 here.
_EXP = f"""
@triton.jit
def exp_in_base_2(x):
    if x.dtype == tl.float64:
        return tl.math.exp(x)
    else:
        return tl.exp2(x * {math.log2(math.e)!r})
"""
# exp(x) - 1 and log(1 + x) without cancellation, from exp and log alone (Higham, Accuracy and Stability, section 1.14.1).
_EXPM1 = _EXP + """
@triton.jit
def expm1(x):
    u = exp_in_base_2(x)
    exact = (u - 1.0) * (x / tl.log(u))
    return tl.where(u == 1.0, x, tl.where((u - 1.0 == -1.0) | (u == float("inf")), u - 1.0, exact))
"""
_LOG1P = """
@triton.jit
def log1p(x):
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.where(u == float("inf"), u, tl.log(u) * (x / (u - 1.0))))
"""
_TANH = _EXPM1 + """
@triton.jit
def tanh(x):
    e = expm1(-2.0 * tl.abs(x))
    t = -e / (e + 2.0)
    return tl.where(x < 0, -t, t)
"""
_SIGMOID = _EXP + """
@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + exp_in_base_2(-x))
"""
_SOFTPLUS = _EXP + _LOG1P + """
@triton.jit
def softplus(x):
    return tl.where(x > 0, x, 0.0) + log1p(exp_in_base_2(-tl.abs(x)))
"""
_SIGN = """
@triton.jit
def sign(x):
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)
"""
_ROUND_HALF_EVEN = """
@triton.jit
def round_half_even(x):
    low = tl.floor(x)
    rest = x - low
    return tl.where((rest > 0.5) | ((rest == 0.5) & (tl.floor(low * 0.5) * 2.0 != low)), low + 1.0, low)
"""
_FLOORDIV = """
@triton.jit
def floordiv(a, b):
    r = a % b
    if r.dtype.is_floating():
        q = (a - r) / b
        return tl.where(b == 0, a / b, tl.floor(tl.where((r != 0) & ((r < 0) != (b < 0)), q - 1, q) + 0.5))
    else:
        q = a // b
        return tl.where((r != 0) & ((a < 0) != (b < 0)), q - 1, q)
"""
_MOD = """
@triton.jit
def mod(a, b):
    r = a % b
    return tl.where((r != 0) & ((r < 0) != (b < 0)), r + b, r)
"""
# A 32-bit hash in the low half of 64 bits, where its products do not overflow: all backends give the same bits.
_ROUND = "(_h := (_h ^ (_h >> 16)) * 73244475 & 4294967295)"
_HASH = f"{_ROUND}, {_ROUND}, (_h := _h ^ (_h >> 16))"
_FOLDED = "(_h := (_h & 4294967295) + (_h >> 32 & 4294967295) * 73244475 & 4294967295)"
_MIXED = f"((_h := {{b}}), {_FOLDED}, (_b := _h), (_h := {{a}}), {_FOLDED}, {_HASH}, (_h := _h + _b & 4294967295), {_HASH})[-1]"
_DRAWN = f"((_h := {{a}}), {_FOLDED}, {_HASH}, {{drawn}})[-1]"
_RANDOM = """
@triton.jit
def hashed(h):
    h = (h ^ (h >> 16)) * 73244475 & 4294967295
    h = (h ^ (h >> 16)) * 73244475 & 4294967295
    return h ^ (h >> 16)

@triton.jit
def folded(x):
    h = x * tl.full((), 1, tl.int64)
    return (h & 4294967295) + (h >> 32 & 4294967295) * 73244475 & 4294967295

@triton.jit
def mix(a, b):
    return hashed(hashed(folded(a)) + folded(b) & 4294967295)

@triton.jit
def rand(key):
    return (hashed(folded(key)) >> 8).to(tl.float32) * 5.9604644775390625e-08
"""
_NUMBERS = ("int", "float")
_MAXIMUM = "tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)"
_MINIMUM = "tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)"

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        # name, arguments, kind, cotangents, NumPy, torch, Triton, MLIR
        Op("add", "a b", "same", ("g", "g"), "({0} + {1})", "({0} + {1})", "({0} + {1})", "arith.addf"),
        Op("sub", "a b", "same", ("g", "-g"), "({0} - {1})", "({0} - {1})", "({0} - {1})", "arith.subf"),
        Op("mul", "a b", "same", ("g * b", "a * g"), "({0} * {1})", "({0} * {1})", "({0} * {1})", "arith.mulf"),
        Op("div", "a b", "float", ("g / b", "-(g * y / b)"), "np.divide({0}, {1})", "({0} / {1})", "({0} / {1})", "arith.divf", cost=4),
        Op("floordiv", "a b", "same", (None, None), "np.floor_divide({0}, {1})", "torch.floor_divide({0}, {1})", "floordiv({0}, {1})", triton_def=_FLOORDIV, cost=8, takes=_NUMBERS),
        Op("mod", "a b", "same", ("g", "-(g * floor(a / b))"), "np.mod({0}, {1})", "torch.remainder({0}, {1})", "mod({0}, {1})", triton_def=_MOD, cost=8, takes=_NUMBERS),
        Op("neg", "x", "same", ("-g",), "(-{0})", "(-{0})", "(-{0})", "arith.negf"),
        Op("pow", "a b", "same", ("where(b == 0, 0, g * b * a ** (b - 1))", "where(a == 0, 0, g * y * log(a))"), "np.float_power({0}, {1})", "torch.pow({0}, {1})", "power({0}, {1})", "math.powf", cost=12, takes=_NUMBERS, triton_def="""
@triton.jit
def power(a, b):
    if (a + b).dtype.is_floating():
        a = tl.where(b == b, a, a)
        whole = tl.floor(b) == b
        odd = whole & (tl.floor(b * 0.5) * 2.0 != b)
        size = tl.exp2(b * tl.log2(tl.abs(a)))
        signed = tl.where(a < 0, tl.where(whole, tl.where(odd, -size, size), float("nan")), size)
        return tl.where((b == 0.0) | (a == 1.0), 1.0, signed)
    else:  # by squaring: 6 bits of the exponent, since larger powers of integers overflow
        a = a + (b - b)
        result = tl.where(b & 1 != 0, a, 1)
        for bit in tl.static_range(1, 6):
            a = a * a
            result *= tl.where((b >> bit) & 1 != 0, a, 1)
        return result
"""),
        Op("eq", "a b", "bool", (None, None), "({0} == {1})", "({0} == {1})", "({0} == {1})"),
        Op("ne", "a b", "bool", (None, None), "({0} != {1})", "({0} != {1})", "({0} != {1})"),
        Op("lt", "a b", "bool", (None, None), "({0} < {1})", "({0} < {1})", "({0} < {1})"),
        Op("le", "a b", "bool", (None, None), "({0} <= {1})", "({0} <= {1})", "({0} <= {1})"),
        Op("gt", "a b", "bool", (None, None), "({0} > {1})", "({0} > {1})", "({0} > {1})"),
        Op("ge", "a b", "bool", (None, None), "({0} >= {1})", "({0} >= {1})", "({0} >= {1})"),
        Op("and", "a b", "bool", (None, None), "bool({0} and {1})", "({0} & {1})", "({0} & {1})"),
        Op("or", "a b", "bool", (None, None), "bool({0} or {1})", "({0} | {1})", "({0} | {1})"),
        Op("not", "x", "bool", (None,), "(not {0})", "(~{0})", "({0} == 0)"),
        # `where` has its own rule in swap.py: a branch that is not taken must not let a NaN through.
        Op("where", "c a b", "branch", (None, "g", "g"), "({1} if {0} else {2})", "torch.where({0}, {1}, {2})", "tl.where({0}, {1}, {2})", "arith.select"),
        Op("maximum", "a b", "same", ("where(a > b, g, where(a == b, 0.5 * g, 0))", "where(b > a, g, where(a == b, 0.5 * g, 0))"), "np.maximum({0}, {1})", "torch.maximum({0}, {1})", _MAXIMUM, "arith.maximumf"),
        Op("minimum", "a b", "same", ("where(a < b, g, where(a == b, 0.5 * g, 0))", "where(b < a, g, where(a == b, 0.5 * g, 0))"), "np.minimum({0}, {1})", "torch.minimum({0}, {1})", _MINIMUM, "arith.minimumf"),
        Op("exp", "x", "float", ("g * y",), "np.exp({0})", "torch.exp({0})", "tl.exp({0})", "math.exp", cost=8, homomorphism=("add", "mul"), base=("exp2", math.log2(math.e))),
        Op("exp2", "x", "float", (f"g * y * {_LN2}",), "np.exp2({0})", "torch.exp2({0})", "tl.exp2({0})", "math.exp2", cost=8, homomorphism=("add", "mul")),
        Op("log", "x", "float", ("g / x",), "np.log({0})", "torch.log({0})", "tl.log({0})", "math.log", cost=8, homomorphism=("mul", "add")),
        Op("log2", "x", "float", (f"g / (x * {_LN2})",), "np.log2({0})", "torch.log2({0})", "tl.log2({0})", "math.log2", cost=8, homomorphism=("mul", "add")),
        Op("log1p", "x", "float", ("g / (1 + x)",), "np.log1p({0})", "torch.log1p({0})", "log1p({0})", "math.log1p", triton_def=_LOG1P, cost=16),
        Op("expm1", "x", "float", ("g * exp(x)",), "np.expm1({0})", "torch.expm1({0})", "expm1({0})", "math.expm1", triton_def=_EXPM1, cost=20),
        Op("sqrt", "x", "float", ("g / (2 * y)",), "np.sqrt({0})", "torch.sqrt({0})", "tl.sqrt({0})", "math.sqrt", cost=8, homomorphism=("mul", "mul")),
        Op("rsqrt", "x", "float", ("-0.5 * g * y * y * y",), "np.divide(1.0, np.sqrt({0}))", "torch.rsqrt({0})", "tl.rsqrt({0})", "math.rsqrt", cost=8, homomorphism=("mul", "mul")),
        Op("sin", "x", "float", ("g * cos(x)",), "np.sin({0})", "torch.sin({0})", "tl.sin({0})", "math.sin", cost=20),
        Op("cos", "x", "float", ("-(g * sin(x))",), "np.cos({0})", "torch.cos({0})", "tl.cos({0})", "math.cos", cost=20),
        Op("tanh", "x", "float", ("g * (1 - y * y)",), "np.tanh({0})", "torch.tanh({0})", "tanh({0})", "math.tanh", triton_def=_TANH, cost=20),
        Op("sigmoid", "x", "float", ("g * y * (1 - y)",), "np.divide(1.0, 1.0 + np.exp(-{0}))", "torch.sigmoid({0})", "sigmoid({0})", triton_def=_SIGMOID, definition="1 / (1 + exp(-x))", cost=12),
        Op("relu", "x", "same", ("where(x > 0, g, 0)",), "np.maximum({0}, 0)", "torch.relu({0})", "tl.maximum({0}, 0, propagate_nan=tl.PropagateNan.ALL)", definition="maximum(x, 0)", takes=_NUMBERS),
        Op("gelu", "x", "float", (f"g * (0.5 * (1 + erf(x * {_SQRT_HALF})) + x * exp(-0.5 * x * x) * {_INV_SQRT_2PI})",), f"(0.5 * {{0}} * (1.0 + math.erf({{0}} * {_SQRT_HALF})))", "torch.nn.functional.gelu({0})", "gelu({0})", definition=f"0.5 * x * (1 + erf(x * {_SQRT_HALF}))", cost=24, triton_def=f"""
@triton.jit
def gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * {_SQRT_HALF}))
"""),
        Op("gelu_tanh", "x", "float", (_GELU_TANH_GRAD,), f"(0.5 * {{0}} * (1.0 + np.tanh({_GELU_U.replace('x', '{0}')})))", "torch.nn.functional.gelu({0}, approximate='tanh')", "gelu_tanh({0})", definition=f"0.5 * x * (1 + tanh({_GELU_U}))", cost=28, triton_def=_TANH + f"""
@triton.jit
def gelu_tanh(x):
    return 0.5 * x * (1.0 + tanh({_GELU_U}))
"""),
        Op("silu", "x", "float", ("g * sigmoid(x) * (1 + x * (1 - sigmoid(x)))",), "np.divide({0}, 1.0 + np.exp(-{0}))", "torch.nn.functional.silu({0})", "({0} * sigmoid({0}))", triton_def=_SIGMOID, definition="x / (1 + exp(-x))", cost=14),
        Op("softplus", "x", "float", ("g * sigmoid(x)",), "np.logaddexp({0}, 0.0)", "torch.nn.functional.softplus({0}, threshold=50.0)", "softplus({0})", triton_def=_SOFTPLUS, definition="maximum(x, 0) + log1p(exp(-abs(x)))", cost=28),
        Op("erf", "x", "float", (f"g * {_TWO_OVER_SQRT_PI} * exp(-x * x)",), "math.erf({0})", "torch.erf({0})", "tl.erf({0})", "math.erf", cost=20),
        Op("abs", "x", "same", ("g * sign(x)",), "abs({0})", "torch.abs({0})", "tl.abs({0})", "math.absf", homomorphism=("mul", "mul")),
        Op("sign", "x", "same", (None,), "(np.sign({0}) if {0} == {0} else 0.0)", "torch.sign({0})", "sign({0})", triton_def=_SIGN),
        Op("floor", "x", "same", (None,), "np.floor({0})", "torch.floor({0})", "tl.floor({0})", "math.floor"),
        Op("ceil", "x", "same", (None,), "np.ceil({0})", "torch.ceil({0})", "tl.ceil({0})", "math.ceil"),
        # To the nearest integer, halves to the even one, as NumPy and torch round.
        Op("round", "x", "same", (None,), "np.rint({0})", "torch.round({0})", "round_half_even({0})", "math.roundeven", triton_def=_ROUND_HALF_EVEN, cost=6),
        Op("isnan", "x", "bool", (None,), "({0} != {0})", "torch.isnan({0})", "({0} != {0})"),
        Op("bitwise_and", "a b", "same", (None, None), "({0} & {1})", "({0} & {1})", "({0} & {1})", takes=("bool", "int")),
        Op("bitwise_or", "a b", "same", (None, None), "({0} | {1})", "({0} | {1})", "({0} | {1})", takes=("bool", "int")),
        Op("bitwise_xor", "a b", "same", (None, None), "({0} ^ {1})", "({0} ^ {1})", "({0} ^ {1})", takes=("bool", "int")),
        Op("left_shift", "a b", "same", (None, None), "({0} << {1})", "({0} << {1})", "({0} << {1})", takes=("int",)),
        Op("right_shift", "a b", "same", (None, None), "({0} >> {1})", "({0} >> {1})", "({0} >> {1})", takes=("int",)),
        Op("mix", "a b", "int64", (None, None), _MIXED.format(a="int({0})", b="int({1})").replace("(", "({0}, {1}, ", 1), _MIXED.format(a="({0}).to(torch.int64)", b="({1}).to(torch.int64)"), "mix({0}, {1})", triton_def=_RANDOM, takes=("bool", "int"), cost=16),
        Op("rand", "key", "float32", (None,), _DRAWN.format(a="int({0})", drawn="(_h >> 8) / 16777216"), _DRAWN.format(a="({0}).to(torch.int64)", drawn="(_h >> 8).to(torch.float32) / 16777216"), "rand({0})", triton_def=_RANDOM, takes=("bool", "int"), cost=12),
        Op("stop_gradient", "x", "same", (None,), "{0}", "{0}", "{0}", cost=0),
        *(
            # A cast. The reference computes in float64, so a cast between floats leaves its values alone there.
            Op(d.name, "x", d.name, ("g" if d.kind == "float" else None,), "float({0})" if d.kind == "float" else "bool({0})" if d.kind == "bool" else f"int(np.array(int({{0}})).astype(np.{d.name}))", f"({{0}}).to(torch.{d.name})", "({0} != 0)" if d.kind == "bool" else f"({{0}}).to(tl.{d.triton})")
            for d in DTYPES.values()
        ),
    )
}

# Operators of the notation: name in OPS -> (symbol, precedence as in Python).
OPERATORS: Mapping[str, tuple[str, int]] = {
    "or": ("or", 1), "and": ("and", 2), "not": ("not", 3),
    "eq": ("==", 4), "ne": ("!=", 4), "lt": ("<", 4), "le": ("<=", 4), "gt": (">", 4), "ge": (">=", 4),
    "add": ("+", 5), "sub": ("-", 5), "mul": ("*", 6), "div": ("/", 6), "floordiv": ("//", 6), "mod": ("%", 6),
    "neg": ("-", 7), "pow": ("**", 8),
}  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------
# Reductions


@dataclass(frozen=True, slots=True)
class Reduction:
    """One reduction that a statement can perform.

    combine: the op of OPS that joins two partial results. torch: of {x} over {dims}. identity: of an empty reduction
    (for max and min it is no value that a user may see: reducing nothing is an error there unless init= is given).
    """

    name: str
    combine: str
    identity: float
    empty_is_error: bool
    torch: str


REDUCTIONS = {
    r.name: r
    for r in (
        Reduction("sum", "add", 0.0, False, "torch.sum({x}, {dims})"),
        Reduction("prod", "mul", 1.0, False, "torch.prod({x}, {dims})"),
        Reduction("max", "maximum", -math.inf, True, "torch.amax({x}, {dims})"),
        Reduction("min", "minimum", math.inf, True, "torch.amin({x}, {dims})"),
    )
}
# Reductions that only stand inside expressions: simplify.py spells them by the four above (var divides by the count, as layer norm does).
INNER_REDUCTIONS = frozenset({*REDUCTIONS, "mean", "var", "argmax", "argmin", "logsumexp"})

# ---------------------------------------------------------------------------------------------------------------------
# The notation inside this table

_AST_OPS = {
    ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "div", ast.FloorDiv: "floordiv", ast.Mod: "mod", ast.Pow: "pow",
    ast.USub: "neg", ast.Eq: "eq", ast.NotEq: "ne", ast.Lt: "lt", ast.LtE: "le", ast.Gt: "gt", ast.GtE: "ge",
}  # fmt: skip


@cache
def template(text: str) -> Expr:
    """A formula of the table as IR; its names are `Index` nodes that `instantiate` replaces."""

    def convert(node: ast.expr) -> Expr:
        match node:
            case ast.Constant(value=bool() | int() | float() as value):
                return Const(value)
            case ast.Name(id=name):
                return Index(name)
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
                return Const(-value)
            case ast.UnaryOp(op=op, operand=x):
                return Call(_AST_OPS[type(op)], (convert(x),))
            case ast.BinOp(left=a, op=op, right=b):
                return Call(_AST_OPS[type(op)], (convert(a), convert(b)))
            case ast.Compare(left=a, ops=[op], comparators=[b]):
                return Call(_AST_OPS[type(op)], (convert(a), convert(b)))
            case ast.Call(func=ast.Name(id=name), args=args):
                return Call(name, tuple(convert(a) for a in args))
        raise AssertionError(f"not in the notation of the table: {text}")

    return convert(ast.parse(text, mode="eval").body)


def instantiate(text: str, names: Mapping[str, Expr]) -> Expr:
    """A formula of the table with its names replaced by expressions."""

    def visit(e: Expr) -> Expr:
        return names[e.name] if isinstance(e, Index) else rebuild(e, visit)

    return visit(template(text))


def cotangent(call: Call, position: int, g: Expr, y: Expr) -> Expr | None:
    """What the argument at `position` of `call` gets from cotangent `g`; `y` is the call's value. None: no gradient."""
    op = OPS[call.op]
    text = op.grad[position]
    if text is None:
        return None
    return instantiate(text, {**dict(zip(op.args.split(), call.args, strict=True)), "g": g, "y": y})
