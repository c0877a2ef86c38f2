"""A sum of the terms of another sum, over more indices: it sums that one.

    T[n,h] += G[n,o] * D[o,h] * f(A[n,h]);  b[h] += G[n,o] * D[o,h] * f(A[n,h])
    -->  T[n,h] += G[n,o] * D[o,h] * f(A[n,h]);  b[h] += T[n,h]

The gradients of a tensor and of what was added to it are such sums. The same holds of maxima, minima and products.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from lowering.statement import extents, plain
from tdsl.ir import Access, Index, Program, Statement, free_indices, reads, statements
from tdsl.reassociate import renamings
from tdsl.simplify import factors


def nested_sums(program: Program) -> Program:
    """`program` (flat, resolved) with reductions of others' terms made of the others' results."""
    body = list(statements(program.body))
    counts = Counter(s.target.tensor for s in body)
    fixed = {t for t, n in counts.items() if n > 1 or t in program.inputs}
    steady = [s for s in body if s.reduced and plain(s.target) and not fixed & {s.target.tensor, *(a.tensor for a in reads(s))}]
    for s in [s for s in steady if len(s.reduced) > 1]:
        for inner in (t for t in steady if t is not s and t.op == s.op and 0 < len(t.reduced) < len(s.reduced)):
            value = _result(inner, s)
            if value is not None:
                body = _placed(body, inner, s, replace(s, value=value, ranges=tuple(r for r in s.ranges if r.index in free_indices(value))))
                break
    return replace(program, body=tuple(body))


def _result(inner: Statement, s: Statement) -> Access | None:
    """The elements of `inner` that `s` reduces, where both have the same terms and `inner` reduces fewer indices."""
    sizes = (extents(inner), extents(s))
    indices = [i.name for i in inner.target.subscripts if isinstance(i, Index)]
    terms, own = factors(inner.value), factors(s.value)
    for to in renamings(terms, own, {}) if len(terms) == len(own) else []:
        same = {*to} == {*sizes[0]} and {to[i]: n for i, n in sizes[0].items()} == sizes[1]
        if same and {to[i] for i in inner.reduced} < {*s.reduced}:
            return Access(inner.target.tensor, tuple(Index(to[i]) for i in indices))
    return None


def _placed(body: Sequence[Statement], inner: Statement, old: Statement, new: Statement) -> list[Statement]:
    """The statements with `new` in place of `old`, and `inner` before it: both read the same."""
    places = {id(s): n for n, s in enumerate(body)}
    if places[id(inner)] < places[id(old)]:
        return [new if s is old else s for s in body]
    return [x for s in body if s is not inner for x in ((inner, new) if s is old else (s,))]
