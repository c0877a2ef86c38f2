"""Ranges, sizes, dtypes and the errors about them."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdsl import errors
from tdsl.affine import Affine, enclosure, evaluate, interval, is_injective, linear, solve
from tdsl.infer import Inferred, Spec, infer, resolve
from tdsl.ir import Access, Call, Const, Expr, Index
from tdsl.text import parse
from tdsl.verify import VerifyError, verify

DTYPES = {
    "bf16": "bfloat16",
    "f16": "float16",
    "f32": "float32",
    "f64": "float64",
    "i32": "int32",
    "i64": "int64",
    "i8": "int8",
    "u8": "uint8",
    "b": "bool",
}


def spec(text: str | int | float) -> Spec:
    """`bf16[8,64]`, `i64[]` (0-d), or a Python number."""
    if isinstance(text, int | float):
        return Spec((), "float32" if isinstance(text, float) else "int64", weak=True)
    dtype, _, sizes = text.rstrip("]").partition("[")
    return Spec(tuple(int(n) for n in sizes.split(",") if n), DTYPES[dtype])


def inferred(source: str, **arguments: str | int | float) -> Inferred:
    program = verify(parse(source))
    values = {name: a for name, a in arguments.items() if isinstance(a, int)}
    result = infer(program, {name: spec(a) for name, a in arguments.items()}, values)
    verify(resolve(program, result))
    return result


@pytest.mark.parametrize(
    ("source", "arguments", "ranges", "shape"),
    [
        (
            "Y[h,i,j] += A[h,i,k] * B[h,j,k]",
            {"A": "f32[2,3,4]", "B": "f32[2,5,4]"},
            {"h": (0, 2), "i": (0, 3), "j": (0, 5), "k": (0, 4)},
            (2, 3, 5),
        ),
        ("Y[x] += X[x+r] * W[r]", {"X": "f32[10]", "W": "f32[3]"}, {"x": (0, 8), "r": (0, 3)}, (8,)),
        ("Y[x] += X[x+2-r] * W[r]", {"X": "f32[10]", "W": "f32[3]"}, {"x": (0, 8), "r": (0, 3)}, (8,)),
        ("Y[x] += X[2*x+r-1] * W[r]", {"X": "f32[10]", "W": "f32[3]"}, {"x": (1, 5), "r": (0, 3)}, (5,)),
        ("Y[x] += X[pad(2*x+r-1,1,1)] * W[r]", {"X": "f32[10]", "W": "f32[3]"}, {"x": (0, 5), "r": (0, 3)}, (5,)),
        ("Y[x] = X[x-1] + X[x+1]", {"X": "f32[10]"}, {"x": (1, 9)}, (9,)),
        ("Y[x] = X[9-x]", {"X": "f32[10]"}, {"x": (0, 10)}, (10,)),
        ("Y[x] = X[9-2*x]", {"X": "f32[10]"}, {"x": (0, 5)}, (5,)),
        ("for i in 2:5: Y[i] = X[i]", {"X": "f32[10]"}, {"i": (2, 5)}, (5,)),
        ("for i in 0:n: Y[i] = X[i]", {"X": "f32[10]", "n": 4}, {"i": (0, 4)}, (4,)),
        ("for i in 0:size(X,0)-1: Y[i] = X[i+1]", {"X": "f32[10]"}, {"i": (0, 9)}, (9,)),
        ("for i in 5:2: Y[i] = X[i]", {"X": "f32[10]"}, {"i": (5, 5)}, (5,)),
        ("Y[3*i+1] = X[i]", {"X": "f32[4]"}, {"i": (0, 4)}, (11,)),
        ("Y[i] += X[i,k]", {"X": "f32[4,0]"}, {"i": (0, 4), "k": (0, 0)}, (4,)),
        ("Y[x] += X[x+r] * W[r]", {"X": "f32[2]", "W": "f32[5]"}, {"x": (0, 0), "r": (0, 5)}, (0,)),
        ("S += X[i] * X[i]", {"X": "f32[4]"}, {"i": (0, 4)}, ()),
        ("def f(X[n]) -> Y[n,m]: for m in 0:3: Y[n,m] = X[n]", {"X": "f32[4]"}, {"n": (0, 4), "m": (0, 3)}, (4, 3)),
        ("def f(X[n]) -> Y[n]: Y[n] = 1.0", {"X": "f32[4]"}, {"n": (0, 4)}, (4,)),
        ("def f(X[n], N) -> Y[N]: Y[i] = 1.0", {"X": "f32[4]", "N": 6}, {"i": (0, 6)}, (6,)),
        ("def f(d[e], m[e], N) -> Y[N]: Y[d[e]] += m[e]", {"d": "i64[4]", "m": "f32[4]", "N": 6}, {"e": (0, 4)}, (6,)),
    ],
)
def test_ranges(source: str, arguments: dict[str, str | int], ranges: dict[str, tuple[int, int]], shape: tuple[int, ...]) -> None:
    result = inferred(source, **arguments)
    assert (ranges, shape) == (result.ranges[0], list(result.shapes.values())[-1])


def test_ragged_ranges_depend_on_the_call() -> None:
    result = inferred("for b, j in 0:len[b]: Y[b] += X[off[b]+j]", len="i64[3]", off="i64[3]", X="f32[10]")
    lo, hi = result.ranges[0]["j"]
    assert (0, Access("len", (Index("b"),))) == (lo, hi)
    assert [(c.access.tensor, c.dimension, c.kind, tuple(r[0] for r in c.ranges)) for c in result.checks] == [
        ("X", 0, "bounds", ("b", "j"))
    ]


def test_triangular_ranges_are_proved() -> None:
    assert inferred("for i in 0:5, j in 0:i: Y[i] += X[i-j-1]", X="f32[4]").checks == ()
    assert len(inferred("for i in 0:6, j in 0:i: Y[i] += X[i-j-1]", X="f32[4]").checks) == 1


def test_a_bound_index_hides_an_outer_one() -> None:
    result = inferred("for i, j in 0:i+1: Y[i] += B[j] * sum[i](A[i]) * C[i]", A="f32[7]", B="f32[4]", C="f32[4]")
    assert result.inner[0] == {"i": (0, 7)}
    assert {"i": (0, 4), "j": (0, Call("add", (Index("i"), Const(1))))} == result.ranges[0]
    assert result.checks == ()


def test_blocks_are_settled_together() -> None:
    source = """
        for ordered t:
            for b, i: G[b,t,i] = X[b,t,i] + sum[j](W[i,j] * H[b,pad(t-1),j])
            for b, i: H[b,t,i] = tanh(G[b,t,i])
    """
    result = inferred(source, X="f32[2,5,3]", W="f32[3,3]")
    assert result.ranges[1] == {"t": (0, 5), "b": (0, 2), "i": (0, 3)}
    assert result.shapes["H"] == (2, 5, 3)
    assert result.dtypes["H"] == "float32"


def test_gathers_are_checked_once_per_call() -> None:
    result = inferred("Y[b,d] = E[ids[b],d]", E="f32[10,4]", ids="i64[3]")
    assert [(c.statement, c.dimension, c.kind) for c in result.checks] == [(0, 0, "bounds")]


@pytest.mark.parametrize(
    ("source", "arguments", "error", "words"),
    [
        (
            "Y[i] += A[i,k] * B[k]",
            {"A": "f32[3,4]", "B": "f32[5]"},
            errors.SizeMismatch,
            ["k", "4", "A (dimension 1)", "5", "B (dimension 0)"],
        ),
        ("Y[i] += A[i,k] * B[k]", {"A": "f32[3,4]", "B": "f32[1]"}, errors.SizeMismatch, ["1"]),
        ("def f(A[n], B[n]) -> Y: Y += A[0] * B[0]", {"A": "f32[3]", "B": "f32[4]"}, errors.SizeMismatch, ["n", "A", "3", "B", "4"]),
        ("Y[i] = A[i]; Y[i] += B[i]", {"A": "f32[3]", "B": "f32[4]"}, errors.SizeMismatch, ["Y", "B"]),
        ("Y[x] += X[x+r]", {"X": "f32[10]"}, errors.RangeError, ["ambiguous", "x", "r", "in lo:hi"]),
        ("Y[x] = X[pad(x)]", {"X": "f32[10]"}, errors.RangeError, ["x", "in lo:hi"]),
        ("Y[x] = X[x%4]", {"X": "f32[10]"}, errors.RangeError, ["x", "in lo:hi"]),
        ("Y[i,z] = A[i]", {"A": "f32[3]"}, errors.IndexError_, ["z", "left"]),
        ("Y[d[e]] += m[e]", {"d": "i64[3]", "m": "f32[3]"}, errors.RangeError, ["size", "-> Y[N]"]),
        ("for i in 0:5: Y[i] = X[i]", {"X": "f32[4]"}, errors.BoundsError, ["0:5", "size 4"]),
        ("Y[i] = X[i] - X[i+1]", {"X": "f32[4]"}, errors.BoundsError, ["i+1", "1:5", "size 4"]),
        ("for i in 0:9: Y[i] = X[i%5]", {"X": "f32[4]"}, None, []),
        ("Y = X[4]", {"X": "f32[4]"}, errors.BoundsError, ["is 4", "size 4"]),
        ("Y[i-1] = X[i]", {"X": "f32[4]"}, errors.BoundsError, ["-1"]),
        ("Y[x] = X[7-2*x]", {"X": "f32[10]"}, errors.BoundsError, ["x", "-1"]),
        ("Y[i] = X[i]", {"X": "f32[4,4]"}, errors.RankMismatch, ["X", "1", "[4, 4]"]),
        ("Y[i] = X[f[i]]", {"X": "f32[4]", "f": "f32[4]"}, errors.DtypeError, ["f is float32"]),
        ("for j in 0:n: Y[i] += X[i,j]", {"X": "f32[4,4]", "n": 2.5}, errors.DtypeError, ["n"]),
        ("def f(X[n], k) -> Y[n-k]: Y[i] = 1.0", {"X": "f32[4]", "k": 6}, errors.BoundsError, ["Y", "-2"]),
        ("def f(X[i,j]) -> Y[3]: Y[i+j] = X[i,j]", {"X": "f32[2,2]"}, errors.NotInjective, ["4", "3"]),
        ("Y[i] max= X[i,k]", {"X": "f32[2,0]"}, errors.RangeError, ["max", "k", "empty"]),
        ("Y[i] = max[k](X[i,k])", {"X": "f32[2,0]"}, errors.RangeError, ["max", "k", "init="]),
    ],
)
def test_errors(source: str, arguments: dict[str, str | int], error: type[errors.Error] | None, words: list[str]) -> None:
    if error is None:
        assert len(inferred(source, **arguments).checks) == 1
        return
    with pytest.raises(error) as caught:
        inferred(source, **arguments)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("source", "arguments", "dtype"),
    [
        ("Y[i] = A[i] * B[i]", {"A": "bf16[2]", "B": "f16[2]"}, "float32"),
        ("Y[i] = A[i] * s", {"A": "bf16[2]", "s": "f64[]"}, "bfloat16"),
        ("Y[i] = A[i] * s", {"A": "i32[2]", "s": "f64[]"}, "float64"),
        ("Y[i] = A[i] * s", {"A": "i8[2]", "s": 3}, "int8"),
        ("Y[i] = A[i] * s", {"A": "i8[2]", "s": 3.0}, "float32"),
        ("Y[i] = A[i] * s", {"A": "b[2]", "s": 3}, "int64"),
        ("Y[i] = A[i] * i", {"A": "i32[2]"}, "int32"),
        ("Y[i] = A[i] / 2", {"A": "i32[2]"}, "float32"),
        ("Y[i] = exp(A[i])", {"A": "bf16[2]"}, "bfloat16"),
        ("Y[i] = exp(A[i])", {"A": "i64[2]"}, "float32"),
        ("Y[i] = A[i] > 0", {"A": "bf16[2]"}, "bool"),
        ("Y[i] = where(A[i] > 0, 1.0, A[i])", {"A": "bf16[2]"}, "bfloat16"),
        ("Y[i] = int32(A[i])", {"A": "bf16[2]"}, "int32"),
        ("Y += A[i]", {"A": "i32[2]"}, "int64"),
        ("Y += A[i]", {"A": "b[2]"}, "int64"),
        ("Y max= A[i]", {"A": "i32[2]"}, "int32"),
        ("Y += A[i] > 0", {"A": "f16[2]"}, "int64"),
        ("Y[i] = 1", {"Y": "f16[2]"}, "float16"),
        ("Y[i] *= B[i]", {"Y": "f16[2]", "B": "f32[2]"}, "float32"),
        ("Y = argmax[i](A[i])", {"A": "f16[2]"}, "int64"),
        ("Y = mean[i](A[i])", {"A": "i32[2]"}, "float32"),
        ("Y[i] = softmax[i](A[i])", {"A": "bf16[2]"}, "bfloat16"),
        ("Y[i] = A[i] + B[i]", {"A": "u8[2]", "B": "i8[2]"}, "int16"),
    ],
)
def test_dtypes(source: str, arguments: dict[str, str | int | float], dtype: str) -> None:
    if "Y" in arguments:
        params = ", ".join(f"{name}[i]" for name in arguments)
        source = f"def f({params}) -> Y: {source}"
    assert dtype == inferred(source, **arguments).dtypes["Y"]


def test_promotion_is_that_of_torch() -> None:
    torch = pytest.importorskip("torch")
    makers = {
        "t": lambda d: torch.ones(2, dtype=getattr(torch, d)),
        "s": lambda d: torch.ones((), dtype=getattr(torch, d)),
        "w": lambda d: {"int64": 1, "float32": 1.0}[d],
    }
    kinds = [("t", d) for d in DTYPES.values()] + [("s", d) for d in DTYPES.values()] + [("w", "int64"), ("w", "float32")]
    for (a, da), (b, db) in itertools.product(kinds, kinds):
        if a == b == "w":
            continue
        specs = {name: Spec((2,) if kind == "t" else (), dtype, kind == "w") for name, kind, dtype in (("A", a, da), ("B", b, db))}
        left, right = ("A[i]" if a == "t" else "A"), ("B[i]" if b == "t" else "B")
        source = f"Y[i] = {left} * {right}" if "t" in (a, b) else "Y = A * B"
        expected = str(torch.result_type(makers[a](da), makers[b](db))).removeprefix("torch.")
        assert expected == infer(parse(source), specs).dtypes["Y"], (a, da, b, db)


def test_injective_writes() -> None:
    assert inferred("Y[4*i+j] = X[i,j]", X="f32[3,4]").checks == ()
    assert [c.kind for c in inferred("def f(X[i,j]) -> Y[20]: Y[3*i+j] = X[i,j]", X="f32[3,4]").checks] == ["injective"]
    assert inferred("Y[i,i+j] = X[i,j]", X="f32[3,4]").checks == ()
    assert [c.kind for c in inferred("def f(p[i], X[i]) -> Y[i]: Y[p[i]] = X[i]", p="i64[3]", X="f32[3]").checks] == ["bounds", "injective"]


def test_self_reads() -> None:
    inferred("Y[i] = A[i]; Y[i] = 2 * Y[i]", A="f32[3]")
    inferred("for ordered t, i: H[t,i] = X[t,i] + H[pad(t-1),i]", X="f32[3,2]")
    with pytest.raises(errors.SelfRead):
        inferred("Y[i] = A[i]; Y[i] += Y[i] * A[k]", A="f32[3]")
    with pytest.raises(errors.SelfRead):
        inferred("for ordered t, i: H[t,i] = X[t,i] + sum[j](H[t,j])", X="f32[3,2]")


# ---------------------------------------------------------------------------------------------------------------------
# affine.py


def _expressions() -> st.SearchStrategy[Expr]:
    leaves = st.one_of(st.integers(-5, 5).map(Const), st.sampled_from("ijk").map(Index))

    def extend(inner: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
        pairs = st.builds(lambda op, a, b: Call(op, (a, b)), st.sampled_from(["add", "sub", "mul", "maximum", "minimum"]), inner, inner)
        divisions = st.builds(lambda op, a, n: Call(op, (a, Const(n))), st.sampled_from(["floordiv", "mod"]), inner, st.integers(1, 4))
        return st.one_of(pairs, divisions, st.builds(lambda a: Call("neg", (a,)), inner))

    return st.recursive(leaves, extend, max_leaves=8)


@pytest.mark.fuzz
@given(_expressions())
def test_linear_form_keeps_the_value_and_bounds_hold(expr: Expr) -> None:
    ranges = {"i": (0, 3), "j": (-2, 2), "k": (1, 5)}
    form = linear(expr)
    bounds = interval(expr, ranges)
    assert form == linear(form.expr())
    for point in itertools.product(*(range(lo, hi + 1) for lo, hi in ranges.values())):
        env = dict(zip(ranges, point, strict=True))
        value = evaluate(expr, env)
        assert value is not None
        assert value == evaluate(form.expr(), env)
        assert bounds is not None and bounds[0] <= value <= bounds[1]


@pytest.mark.fuzz
@given(st.integers(-3, 3).filter(bool), st.integers(-3, 3), st.integers(-4, 4), st.integers(0, 9), st.integers(0, 4))
def test_solve_gives_the_largest_range(a: int, b: int, c: int, size: int, n: int) -> None:
    form = linear(Call("add", (Call("add", (Call("mul", (Const(a), Index("x"))), Call("mul", (Const(b), Index("r"))))), Const(c))))
    found = solve(form, "x", 0, size, {"r": (0, n + 1)})
    assert found is not None
    inside = [x for x in range(-40, 40) if all(0 <= a * x + b * r + c < size for r in range(n + 1))]
    assert inside == list(range(*found))


@pytest.mark.fuzz
@given(
    st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4), st.integers(-2, 2)), min_size=1, max_size=2),
    st.integers(1, 4),
    st.integers(1, 4),
)
def test_injective_is_never_wrong(rows: list[tuple[int, int, int]], n: int, m: int) -> None:
    forms = [
        linear(Call("add", (Call("mul", (Const(a), Index("i"))), Call("add", (Call("mul", (Const(b), Index("j"))), Const(c))))))
        for a, b, c in rows
    ]
    points = [tuple(a * i + b * j + c for a, b, c in rows) for i in range(n) for j in range(m)]
    if is_injective(forms, {"i": (0, n), "j": (0, m)}):
        assert len(points) == len(set(points))


def test_floor_division_is_exact_where_it_divides() -> None:
    x = Index("x")
    assert Affine(1, ((x, 2),)) == linear(Call("floordiv", (Call("add", (Call("mul", (Const(4), x)), Const(3))), Const(2))))
    assert enclosure(linear(Call("mod", (x, Const(4)))), {"x": (0, 9)}) == (0, 3)


# ---------------------------------------------------------------------------------------------------------------------
# verify.py


def test_verify_names_what_is_wrong() -> None:
    from dataclasses import replace

    program = parse("for i, k: Y[i] += A[i,k] * x[k]")
    statement = program.body[0]
    for body, word in [
        ((replace(statement, ranges=statement.ranges[:1]),), "k is not in scope"),
        ((replace(statement, ranges=statement.ranges * 2),), "repeat"),
        ((replace(statement, value=Access("Z", ())),), "Z is read"),
        ((replace(statement, value=Access("x", ())),), "subscripts"),
        ((replace(statement, value=Call("nonsense", ())),), "nonsense"),
        ((replace(statement, op="="),), "`=`"),
        ((), "nothing writes"),
    ]:
        with pytest.raises(VerifyError, match=word):
            verify(replace(program, body=body))


def test_what_a_first_write_makes_too_small_is_told() -> None:
    with pytest.raises(errors.BoundsError) as caught:
        infer(parse("Y[i,0] = A[i,0]; Y[i,1] = A[i,1]"), {"A": Spec((3, 2), "float32")})
    assert "is as large as its first write makes it" in caught.value.help
    with pytest.raises(errors.BoundsError) as caught:
        infer(parse("Y[i] = A[i,2]"), {"A": Spec((3, 2), "float32")})
    assert "first write" not in caught.value.help
