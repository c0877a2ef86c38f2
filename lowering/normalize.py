"""Statements with resolved ranges -> statements that the planner can place: loops from zero, pairwise contractions.

for i in 2:9:  Y[i] = X[i+1]                    -->   for i in 0:7:  Y[i+2] = X[i+3]
for i, j, k, l:  Y[i,l] += A[i,j]*B[j,k]*C[k,l]  -->   Y.c1[i,k] += A[i,j]*B[j,k];  Y[i,l] += Y.c1[i,k]*C[k,l]
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from lowering.indirect import direct
from lowering.nested_sums import nested_sums
from lowering.statement import extents, inlined
from tdsl.affine import linear
from tdsl.errors import Unsupported
from tdsl.ir import (
    Access,
    Call,
    Clamp,
    Const,
    Expr,
    Index,
    Loop,
    Pad,
    Program,
    Range,
    Statement,
    children,
    free_indices,
    fresh_name,
    statements,
    substitute,
    walk,
)
from tdsl.ops import OPS
from tdsl.pairwise import Operand, Path, groups, pairwise
from tdsl.simplify import drop_dead, factors, merge_same, product, simplify_expr
from tdsl.traced import estimates, whole

# Producers cheaper than this many multiply-adds per element are always recomputed inside their consumers.
CHEAP = 3.0
# Products of many factors with fewer points stay one loop nest.
CONTRACTED = 4096
# How many times the multiply-adds of a loop nest pairs may take where they are products of matrices, whose sides have SIDE elements or more.
MATRICES, SIDE = 1.25, 16


def normalize(program: Program, dtypes: Mapping[str, str], *, fuses: bool, stored: frozenset[str] = frozenset()) -> Program:
    """`program` (flat, resolved) with loops from zero, products of many factors in the cheapest pairwise order, and
    elementwise producers inside their consumers.

    fuses: whether the executor keeps chains of operations in registers; one that does not (whole tensors on a CPU)
    recomputes a producer only where it has a single use. stored: tensors that stay statements of their own.
    Raises Unsupported for ordered and ragged loops.
    """
    body = tuple(integer_sum(forwards(unused_range(from_zero(s))), dtypes) for s in checked(program))
    body = tuple(statements(nested_sums(direct(replace(program, body=body))).body))
    program = replace(program, body=tuple(part for s in body for part in contraction_order(s, body)))
    return drop_dead(merge_same(inline(program, fuses=fuses, stored=stored)))


def checked(program: Program) -> tuple[Statement, ...]:
    """The statements, after refusing what no kernel can run yet."""
    for node in program.body:
        if isinstance(node, Loop):
            raise Unsupported("an ordered loop cannot be compiled yet (lowering)", span=node.span, help='run it with backend="reference"')
    for s in statements(program.body):
        for r in s.ranges:
            if not (isinstance(r.lo, Const) and isinstance(r.hi, Const)):
                raise Unsupported(
                    f"the range of {r.index} depends on other indices or on tensor values, which cannot be compiled yet (lowering)",
                    span=r.span or s.span,
                    help='use a mask, where(j < n[i], .., 0), or backend="reference"',
                )
    return tuple(statements(program.body))


def from_zero(s: Statement) -> Statement:
    """`for i in lo:hi: f(i)` --> `for i in 0:hi-lo: f(i+lo)`."""
    to: dict[str, Expr] = {}
    ranges = []
    for r in s.ranges:
        assert isinstance(r.lo, Const) and isinstance(r.hi, Const)
        lo = whole(r.lo.value)
        if lo:
            to[r.index] = Call("add", (Index(r.index), Const(lo)))
        ranges.append(Range(r.index, Const(0), Const(max(0, whole(r.hi.value) - lo))))
    target = simplify_expr(substitute(s.target, to))
    assert isinstance(target, Access)
    return replace(s, ranges=tuple(ranges), target=target, value=simplify_expr(substitute(s.value, to)))


def unused_range(s: Statement) -> Statement:
    """`for i, k in 0:K: Y[i] += f(i)` --> `for i: Y[i] += K * f(i)`; a maximum or minimum just drops the range."""
    used = {*free_indices(s.target), *free_indices(s.value)}
    idle = {i: n for i, n in extents(s).items() if i not in used}
    if not idle or s.op in ("=", "*=") or 0 in idle.values():
        return s
    value = Call("mul", (Const(math.prod(idle.values())), s.value)) if s.op == "+=" else s.value
    return replace(s, ranges=tuple(r for r in s.ranges if r.index not in idle), value=simplify_expr(value))


def forwards(s: Statement) -> Statement:
    """`Y[i] += X[i-k+2] * W[k]` --> `Y[i] += X[i+k] * W[2-k]` for k in 0:3: the larger tensor of a sum is read forwards, so that it
    is a view, or a wide load."""
    size = extents(s)
    to: dict[str, Expr] = {}
    for index in s.reduced if s.op == "+=" else ():
        steps: dict[Access, list[int]] = {}
        for a in (e for e in walk(s.value) if isinstance(e, Access)):
            for i in a.subscripts:
                form = linear(i.value if isinstance(i, Pad | Clamp) else i)
                if index in form.indices:
                    steps.setdefault(a, []).append(form.coefficient(index))
        if steps and all(c < 0 for c in steps[max(steps, key=lambda a: math.prod(size[i] for i in free_indices(a)))]):
            to[index] = Call("sub", (Const(size[index] - 1), Index(index)))
    return replace(s, value=simplify_expr(substitute(s.value, to))) if to else s


def integer_sum(s: Statement, dtypes: Mapping[str, str]) -> Statement:
    """A sum that is an int64 sums int64 terms, whatever narrower integers or booleans they come from."""
    if s.op in ("+=", "*=") and dtypes.get(s.target.tensor) == "int64":
        return replace(s, value=Call("int64", (s.value,)))
    return s


# ---------------------------------------------------------------------------------------------------------------------
# Contraction order


def contraction_order(s: Statement, body: tuple[Statement, ...]) -> list[Statement]:
    """A sum over a product of three or more operands, split where pairs cost fewer multiply-adds (opt_einsum finds the order)."""
    if s.op != "+=" or not s.reduced:
        return [s]
    size = extents(s)
    if math.prod(size.values()) < CONTRACTED:
        return [s]
    before, s = private_sums(s, body)
    operands = groups(factors(s.value))
    if len(operands) < 3:
        return [*before, s]
    path = cheapest(s, operands)
    return [*before, *([s] if path is None else pairwise(s, operands, path, names_of((*body, *before))))]


def private_sums(s: Statement, body: tuple[Statement, ...]) -> tuple[list[Statement], Statement]:
    """An operand's reduced indices that no other operand has are summed first:
    `Y[i,j] += A[i,k,l] * B[k,j]` --> `Y.c1[i,k] += A[i,k,l];  Y[i,j] += Y.c1[i,k] * B[k,j]`."""
    operands = groups(factors(s.value))
    if len(operands) < 2:
        return [], s
    taken = names_of(body)
    before: list[Statement] = []
    terms: list[Expr] = []
    gone: set[str] = set()
    for key, inside in operands:
        others = frozenset().union(*(k for k, _ in operands if k is not key))
        private = {i for i in s.reduced if i in key and i not in others}
        if not private:
            terms += inside
            continue
        gone |= private
        name = fresh_name(f"{s.target.tensor}.c1", taken)
        taken.add(name)
        target = Access(name, tuple(Index(i) for i in s.indices if i in key - private))
        before.append(Statement(tuple(r for r in s.ranges if r.index in key), target, "+=", product(inside), s.span))
        terms.append(target)
    if not before:
        return [], s
    op = s.op if set(s.reduced) - gone else "="
    return before, replace(s, value=product(terms), ranges=tuple(r for r in s.ranges if r.index not in gone), op=op)


def names_of(body: tuple[Statement, ...]) -> set[str]:
    """Every tensor that some statements write or read in their values."""
    return {t.target.tensor for t in body} | {a.tensor for e in body for a in walk(e.value) if isinstance(a, Access)}


def cheapest(s: Statement, operands: Sequence[Operand]) -> Path | None:
    """The pairwise order of the fewest multiply-adds; None where none has fewer than the loop nest of `s` itself, nor about as many as that
    where its first pair is a product of matrices, which tensor cores multiply."""
    import opt_einsum

    size = extents(s)
    output = frozenset(free_indices(s.target))
    names = {index: opt_einsum.get_symbol(n) for n, index in enumerate(size)}
    equation = ",".join("".join(names[i] for i in sorted(key)) for key, _ in operands)
    equation += "->" + "".join(names[i] for i in sorted(output & frozenset().union(*(k for k, _ in operands))))
    shapes = [tuple(size[i] for i in sorted(key)) for key, _ in operands]
    path, _ = opt_einsum.contract_path(equation, *shapes, shapes=True, optimize="auto")
    found = tuple(tuple(int(p) for p in positions) for positions in path)
    parts = pairwise(s, operands, found, set())
    work = sum(math.prod(size[i] for i in part.indices) for part in parts)
    few = sum(bool({*s.reduced} & key) for key, _ in operands) < 3  # a product of two with a factor of its result is one already
    with estimates():
        nest = math.prod(size.values()) * (MATRICES if not few and _multiplies(parts[0]) else 1.0)
        return found if work < nest else None


def _multiplies(s: Statement) -> bool:
    """Whether a sum over a product of two is a product of matrices, of which no side is too narrow for tiles."""
    size, reduced = extents(s), {*s.reduced}
    keys = [key for key, _ in groups(factors(s.value))]
    if s.op != "+=" or len(keys) != 2 or not reduced or not reduced <= keys[0] & keys[1]:
        return False
    sides = (reduced, keys[0] - keys[1], keys[1] - keys[0])
    return all(math.prod(size[i] for i in side) >= SIDE for side in sides if side) and all(sides)


# ---------------------------------------------------------------------------------------------------------------------
# Inlining


def cost(expr: Expr) -> float:
    """Multiply-adds per element of an expression, subscripts left out."""
    if isinstance(expr, Access):
        return 0.0
    own = OPS[expr.op].cost if isinstance(expr, Call) else 0.0
    return own + sum(cost(e) for e in children(expr))


def inline(program: Program, *, fuses: bool, stored: frozenset[str] = frozenset()) -> Program:
    """`T[i] = f(i); Y[j] = g(T[j])` --> `Y[j] = g(f(j))`, where T is no output and not `stored`, and written once, whole, by an
    elementwise statement."""
    body = list(statements(program.body))
    writes = Counter(s.target.tensor for s in body)
    uses = Counter(a.tensor for s in body for e in (s.value, *s.target.subscripts) for a in walk(e) if isinstance(a, Access))
    same = {s.target.tensor for s in body if s.op == "="} if fuses else set()  # elementwise, it is the same wherever it is made again
    fixed = set(program.results) | stored | (compared(body) - same) | _indirect(body)
    definitions: dict[str, Statement] = {}
    result = []
    for s in body:
        s = replace(s, value=simplify_expr(inlined(s.value, definitions)))
        result.append(s)
        name = s.target.tensor
        plain = [i.name for i in s.target.subscripts if isinstance(i, Index)]
        elementwise = (s.op == "=" or not s.reduced) and s.op in ("=", "+=") and len({*plain}) == len(s.target.subscripts)
        whole = set(plain) == set(s.indices)
        if elementwise and whole and writes[name] == 1 and name not in fixed:
            used_twice = uses[name] > 1 and not fuses
            if cost(s.value) <= (0 if used_twice else CHEAP) or not used_twice:
                definitions[name] = s
    return replace(program, body=tuple(result))


# ---------------------------------------------------------------------------------------------------------------------
# What must be stored


def compared(body: Sequence[Statement]) -> set[str]:
    """Tensors that are compared for equality: two evaluations of one formula may round differently, so these are stored."""
    return {
        a.tensor
        for s in body
        for e in walk(s.value)
        if isinstance(e, Call) and e.op in ("eq", "ne")
        for arg in e.args
        for a in walk(arg)
        if isinstance(a, Access)
    }


def _indirect(body: list[Statement]) -> set[str]:
    """Tensors read through pad or clamp, or as a subscript: their elements are picked out, so they are stored."""
    found = set()
    for s in body:
        for e in (x for top in (s.value, s.target) for x in walk(top)):
            if isinstance(e, Access):
                if any(isinstance(i, Pad | Clamp) for i in e.subscripts):
                    found.add(e.tensor)
                found |= {a.tensor for i in e.subscripts for a in walk(i) if isinstance(a, Access)}
    return found
