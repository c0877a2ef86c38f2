"""Signatures: what a body of statements says about its parameters, outputs and sizes.

Sizes that must agree by the rules of plain subscripts form classes; a parameter's dims carry one name per class, since equal
names in a header are a constraint.

    S[i,j] += Q[i,d] * K[j,d]; O[i,e] += S[i,j] * V[j,e]   -->   Q[i,d], K[j,d], V[j,e] -> O
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import TypeAlias

from tdsl.errors import NameError_
from tdsl.ir import (
    Access,
    Clamp,
    Expr,
    Index,
    Loop,
    Output,
    Pad,
    Param,
    Program,
    Range,
    Reduce,
    Size,
    Span,
    Statement,
    bounds,
    children,
    expressions,
    fresh_name,
    reads,
    statements,
    walk,
)

Body: TypeAlias = tuple[Statement | Loop, ...]
Slot: TypeAlias = tuple[str, int]  # dimension `int` of tensor `str`


def infer_signature(body: Body, name: str | None = None) -> Program:
    """The Program of a resolved body without a header.

    Parameters: names read before they are written, in order of first appearance. Outputs: targets that no later statement reads.
    Raises NameError_ where a tensor of unknown rank is only measured by `size`.
    """
    inputs, outputs = input_names(body), output_names(body)
    ranks = tensor_ranks(body)
    for tensor in inputs:
        if tensor not in ranks:
            span = next(e.span for n in body for x in expressions(n) for e in walk(x) if isinstance(e, Size) and e.tensor == tensor)
            raise NameError_(
                f"{tensor} is only measured, and nothing says how many dimensions it has",
                span=span,
                help=f"declare it: `def f(.., {tensor}[n]) -> ..:`",
            )
    dims = Sizes(body, inputs).dims({tensor: ranks[tensor] for tensor in inputs})
    params = tuple(Param(tensor, dims[tensor]) for tensor in inputs)
    return Program(name or default_name(outputs), params, tuple(Output(o) for o in outputs), body)


def default_name(outputs: Collection[str]) -> str:
    """The name of a program that has none: its outputs' names."""
    return "_".join(outputs).replace(".", "_")


def input_names(body: Body) -> tuple[str, ...]:
    """Names read (or measured by `size`) before they are written; inside a loop, its own targets count as written."""
    found: dict[str, None] = {}
    _inputs(body, set(), found)
    return tuple(found)


def _inputs(body: Body, written: set[str], found: dict[str, None]) -> None:
    for node in body:
        if isinstance(node, Loop):
            _note(bounds(node.ranges), written, found)
            written |= {s.target.tensor for s in statements(node.body)}
            _inputs(node.body, written, found)
        else:
            _note((*bounds(node.ranges), *node.target.subscripts, node.value), written, found)
            written.add(node.target.tensor)


def _note(exprs: tuple[Expr, ...], written: set[str], found: dict[str, None]) -> None:
    for expr in exprs:
        for e in walk(expr):
            if isinstance(e, Access | Size) and e.tensor not in written:
                found.setdefault(e.tensor)


def output_names(body: Body) -> tuple[str, ...]:
    """Targets that no statement after their last write reads, in order of first write."""
    unread: dict[str, bool] = {}
    for s in _with_loop_reads(body):
        for access in reads(s):
            if access.tensor in unread:
                unread[access.tensor] = False
        if isinstance(s, Statement):
            unread[s.target.tensor] = True
    return tuple(name for name, last in unread.items() if last)


def _with_loop_reads(body: Body) -> Iterator[Statement | Loop]:
    for node in body:
        if isinstance(node, Loop):
            yield Loop(node.ranges, ())
            yield from _with_loop_reads(node.body)
        else:
            yield node


def tensor_ranks(body: Body) -> dict[str, int]:
    """The number of dimensions of every tensor that is accessed, by its first access."""
    ranks: dict[str, int] = {}
    for node in body:
        for expr in expressions(node):
            for e in walk(expr):
                if isinstance(e, Access):
                    ranks.setdefault(e.tensor, len(e.subscripts))
    return ranks


def place_of(program: Program, name: str) -> Span | None:
    """Where an error about a parameter points: at it in the `def` line, else at its first access."""
    declared = next((p.span for p in program.params if p.name == name), None)
    nodes = (e for n in program.body for x in expressions(n) for e in walk(x) if isinstance(e, Access | Size))
    return declared or next((e.span for e in nodes if e.tensor == name), None)


def place_of_inputs(program: Program) -> Span | None:
    """Where an error about all parameters points: at them in the `def` line, else at the first statement."""
    spans = [p.span for p in program.params if p.span is not None]
    if spans and len(spans) == len(program.params):
        return replace(spans[0], end=spans[-1].end) if spans[0].text == spans[-1].text else spans[0]
    return next((node.span for node in program.body), None)


# ---------------------------------------------------------------------------------------------------------------------
# Classes of sizes


_Node: TypeAlias = Slot | int  # a dimension, or the range of an index in one scope


class Sizes:
    """Which sizes must agree: dimensions joined by plain subscripts of one index whose range is inferred.

    The first write of an intermediate gives it its size, so it hands agreement on. `sized` names the targets whose size
    comes from the signature, which do not.
    """

    def __init__(self, body: Body, inputs: Collection[str], sized: Collection[str] = ()):
        self._parent: dict[_Node, _Node] = {}
        self._scopes = 0
        self._written = {*inputs, *sized}
        self._full: dict[str, tuple[str, ...]] = {}
        self._plain: dict[Slot, str] = {}
        self._unsettled: dict[_Node, str] = {}
        self._names = {e.name for n in body for x in expressions(n) for e in walk(x) if isinstance(e, Index)}
        self._names |= {e.tensor for n in body for x in expressions(n) for e in walk(x) if isinstance(e, Access | Size)}
        for node in body:
            self._visit_node(node, {})

    def dims(self, ranks: Mapping[str, int]) -> dict[str, tuple[str, ...]]:
        """Names for the dimensions of some tensors: the index of the first plain access, one name per class."""
        names: dict[_Node, str] = {}
        taken: set[str] = set()
        for tensor, rank in ranks.items():
            full = self._full.get(tensor)
            for d in range(rank):
                root = self.find((tensor, d))
                if root in names:
                    continue
                base = full[d] if full else self._plain.get((tensor, d))
                fresh = base if base is not None and base not in taken else fresh_name(base or "n", taken | self._names)
                names[root] = fresh
                taken.add(fresh)
        return {tensor: tuple(names[self.find((tensor, d))] for d in range(rank)) for tensor, rank in ranks.items()}

    @property
    def unsettled(self) -> frozenset[str]:
        """The indices without an explicit range that no plain subscript reads with: only affine subscripts or a name settle them."""
        return frozenset(self._unsettled.values())

    def find(self, node: _Node) -> _Node:
        """The representative of a dimension's class."""
        while (parent := self._parent.get(node, node)) != node:
            node = parent
        return node

    def _join(self, a: _Node, b: _Node) -> None:
        a, b = self.find(a), self.find(b)
        if a != b:
            self._parent[b] = a

    def _scope(self, ranges: tuple[Range, ...], env: Mapping[str, int]) -> dict[str, int]:
        inner = dict(env)
        for r in ranges:
            self._scopes += 1
            inner[r.index] = self._scopes if r.lo is None else 0  # 0: an explicit range settles the index, its uses need not agree
            if r.lo is None:
                self._unsettled[self._scopes] = r.index
        return inner

    def _visit_node(self, node: Statement | Loop, env: Mapping[str, int]) -> None:
        inner = self._scope(node.ranges, env)
        for e in bounds(node.ranges):
            self._visit(e, inner)
        if isinstance(node, Loop):
            for child in node.body:
                self._visit_node(child, inner)
            return
        for e in (*node.target.subscripts, node.value):
            self._visit(e, inner)
        first = node.target.tensor not in self._written
        self._written.add(node.target.tensor)
        self._visit_access(node.target, inner if first else {}, read=False)

    def _visit(self, expr: Expr, env: Mapping[str, int]) -> None:
        if isinstance(expr, Access):
            self._visit_access(expr, env)
        if isinstance(expr, Reduce):
            env = self._scope(expr.ranges, env)
        for child in children(expr):
            self._visit(child, env)

    def _visit_access(self, access: Access, env: Mapping[str, int], read: bool = True) -> None:
        plain = [s.name for s in access.subscripts if isinstance(s, Index)]
        if len(plain) == len(access.subscripts):
            self._full.setdefault(access.tensor, tuple(plain))
        for d, s in enumerate(access.subscripts):
            if isinstance(s, Index):
                self._plain.setdefault((access.tensor, d), s.name)
                if scope := env.get(s.name):
                    self._join((access.tensor, d), scope)
                    if read:
                        self._unsettled.pop(scope, None)


# ---------------------------------------------------------------------------------------------------------------------
# Headers


def header_needed(p: Program) -> bool:
    """Whether inference from the body alone would give another signature than p's."""
    inferred = infer_or_none(p.body)
    if inferred is None or any(o.sizes is not None for o in p.outputs) or _scalar_subscripts(p.body):
        return True
    return _shape(p) != _shape(inferred) or _meanings(p) != _meanings(inferred)


def _scalar_subscripts(body: Body) -> bool:
    """Whether a scalar input stands in a subscript, where a bare name without a header is an index."""
    written: set[str] = set()
    for s in _with_loop_reads(body):
        if any(name not in written for e in expressions(s) for name in bare_in_subscripts(e)):
            return True
        if isinstance(s, Statement):
            written.add(s.target.tensor)
    return False


def bare_in_subscripts(e: Expr, inside: bool = False) -> set[str]:
    """The accesses without subscripts that stand inside some subscript of `e`."""
    if isinstance(e, Access) and not e.subscripts:
        return {e.tensor} if inside else set()
    inside = inside or isinstance(e, Access | Pad | Clamp)
    return {name for child in children(e) for name in bare_in_subscripts(child, inside)}


def infer_or_none(body: Body) -> Program | None:
    """The inferred Program, or None where the body alone does not settle it."""
    try:
        return infer_signature(body)
    except NameError_:
        return None


def _shape(p: Program) -> tuple[object, ...]:
    return (p.name, tuple((x.name, len(x.dims)) for x in p.params), p.results, dims_pattern(p))


def dims_pattern(p: Program) -> tuple[int, ...]:
    """The dims of all parameters in a row, each name replaced by the place where it first stood: which sizes must agree."""
    names = [name for x in p.params for name in x.dims]
    return tuple(names.index(name) for name in names)


def _meanings(p: Program) -> dict[str, list[Slot]]:
    """For the indices that perhaps only their name settles: the dimensions of that name."""
    unsettled = Sizes(p.body, p.inputs).unsettled
    return {i: [(x.name, d) for x in p.params for d, name in enumerate(x.dims) if name == i] for i in sorted(unsettled)}
