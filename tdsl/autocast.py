"""torch.autocast on the IR: contractions take their operands in the autocast dtype, everything else follows promotion.

    under bfloat16:  Z[n,o] += X[n,i] * W[o,i]      -->      Z[n,o] += bfloat16(X[n,i]) * bfloat16(W[o,i])
                     Y[n,o] = gelu(Z[n,o] + b[o])            Y[n,o] = gelu(Z[n,o] + b[o])

A contraction is a sum over products, as a matrix product is. It accumulates in float32 and gives the autocast dtype; sums of single
tensors, softmax, norms and other functions keep the dtype of what they are given. float64 and integers are never cast.
The casts are part of the program, so the gradient has them too: a product with a cast operand takes all of them cast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from tdsl.infer import Spec, infer
from tdsl.ir import Access, Call, Expr, Loop, Program, Reduce, Statement, free_indices, rebuild, walk

_CAST = ("float16", "bfloat16", "float32")


def autocast(program: Program, dtype: str, specs: Mapping[str, Spec], values: Mapping[str, int]) -> Program:
    """`program` with the operands of its contractions cast to `dtype` ("bfloat16" or "float16"), for arguments like `specs`.

    Raises what inference raises.
    """
    inferred = infer(program, specs, values)

    def eligible(operands: Sequence[Expr]) -> bool:
        return all(inferred.dtype_of(e)[0] in _CAST for e in operands)

    return _rewritten(program, dtype, eligible)


def spread(program: Program, dtype: str) -> Program:
    """A gradient program whose contractions take all operands in `dtype` where one is cast to it already."""
    return _rewritten(program, dtype, lambda operands: any(_is_cast(e, dtype) for e in operands))


def _rewritten(program: Program, dtype: str, eligible: Callable[[Sequence[Expr]], bool]) -> Program:
    def inside(e: Expr) -> Expr:
        if isinstance(e, Reduce) and e.op == "sum":
            e = replace(e, body=_terms(e.body, {r.index for r in e.ranges}, dtype, eligible))
        return rebuild(e, inside)

    def node(n: Statement | Loop) -> Statement | Loop:
        if isinstance(n, Loop):
            return replace(n, body=tuple(node(child) for child in n.body))
        value = _terms(n.value, set(n.reduced), dtype, eligible) if n.op == "+=" and n.reduced else n.value
        return replace(n, value=inside(value))

    return replace(program, body=tuple(node(n) for n in program.body))


def _terms(e: Expr, reduced: set[str], dtype: str, eligible: Callable[[Sequence[Expr]], bool]) -> Expr:
    """A sum of products with the operands of each contraction among them cast."""
    if isinstance(e, Call) and e.op in ("add", "sub", "neg"):
        return replace(e, args=tuple(_terms(a, reduced, dtype, eligible) for a in e.args))
    operands = [f for f in _factors(e) if reduced & set(free_indices(f)) and any(isinstance(x, Access) for x in walk(f))]
    if not _contracts(operands, reduced) or not eligible(operands):
        return e
    return _product(e, {id(f) for f in operands}, dtype)


def _contracts(operands: Sequence[Expr], reduced: set[str]) -> bool:
    """Whether a product is one that a matrix unit computes: operands meet at a reduced index and have others apart."""
    sets = [set(free_indices(f)) for f in operands]
    return any(a & b & reduced and a != b for n, a in enumerate(sets) for b in sets[n + 1 :])


def _factors(e: Expr) -> list[Expr]:
    return [f for a in e.args for f in _factors(a)] if isinstance(e, Call) and e.op == "mul" else [e]


def _product(e: Expr, operands: set[int], dtype: str) -> Expr:
    if isinstance(e, Call) and e.op == "mul":
        return replace(e, args=tuple(_product(a, operands, dtype) for a in e.args))
    return Call(dtype, (e,)) if id(e) in operands and not _is_cast(e, dtype) else e


def _is_cast(e: Expr, dtype: str) -> bool:
    return isinstance(e, Call) and e.op == dtype
