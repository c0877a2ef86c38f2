"""Well-formedness of a Program: what every pass may rely on, and must leave true. Run after every stage in tests.

names are defined before they are read; ranges are complete, unique and in scope; ranks agree; operations are known, with
their number of arguments; pad and clamp stand only as whole subscripts; outputs are written.
"""

from __future__ import annotations

from collections.abc import Iterable

from tdsl.errors import Error
from tdsl.ir import (
    REDUCTION_OF,
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
    Reduce,
    Size,
    Softmax,
    Span,
    Statement,
    statements,
)
from tdsl.ops import INNER_REDUCTIONS, OPS


class VerifyError(Error, AssertionError):
    """A program that no pass should have made."""


def verify(program: Program) -> Program:
    """`program` itself, if it is well formed; else VerifyError, which names what is wrong."""
    _Verifier(program).run()
    return program


def _demand(condition: bool, what: str, span: Span | None = None) -> None:
    if not condition:
        raise VerifyError(what, span=span)


def _unique(names: Iterable[str], what: str) -> None:
    names = list(names)
    _demand(len(set(names)) == len(names), f"{what} repeat a name: {', '.join(names)}")


class _Verifier:
    def __init__(self, program: Program):
        self.program = program
        self.defined = set(program.inputs)
        self.ranks = {p.name: len(p.dims) for p in program.params}
        for s in statements(program.body):
            self._rank(s.target)

    def run(self) -> None:
        _unique(self.program.inputs, "parameters")
        _unique(self.program.results, "outputs")
        for node in self.program.body:
            self._node(node, frozenset())
        for output in self.program.outputs:
            _demand(output.name in self.defined, f"nothing writes the output {output.name}", output.span)
            if output.sizes is not None:
                rank = self.ranks[output.name]
                _demand(len(output.sizes) == rank, f"{output.name} has {rank} dimensions and {len(output.sizes)} sizes", output.span)
                self.defined = set(self.program.inputs)
                for size in output.sizes:
                    if size is not None:
                        self._expr(size, frozenset())
                self.defined |= {s.target.tensor for s in statements(self.program.body)}

    def _rank(self, access: Access) -> None:
        rank = self.ranks.setdefault(access.tensor, len(access.subscripts))
        _demand(
            rank == len(access.subscripts), f"{access.tensor} has {rank} dimensions and {len(access.subscripts)} subscripts", access.span
        )

    def _node(self, node: Statement | Loop, scope: frozenset[str]) -> None:
        scope = self._ranges(node.ranges, scope, shadow=False)
        if isinstance(node, Loop):
            _demand(bool(node.ranges) and bool(node.body), "an empty ordered loop", node.span)
            _demand(all(r.order in ("ordered", "reversed") for r in node.ranges), "a loop node without an order", node.span)
            self.defined |= {s.target.tensor for s in statements((node,))}  # a recurrence reads what it writes
            for child in node.body:
                self._node(child, scope)
            return
        _demand(all(r.order == "" for r in node.ranges), "a statement with an ordered range", node.span)
        _demand(node.op == "=" or node.op in REDUCTION_OF, f"an unknown assignment {node.op}", node.span)
        _demand(node.op != "=" or not node.reduced, f"`=` with {', '.join(node.reduced)} not on the left", node.span)
        self._expr(node.value, scope)
        self.defined.add(node.target.tensor)
        self._expr(node.target, scope)

    def _ranges(self, ranges: tuple[Range, ...], scope: frozenset[str], *, shadow: bool) -> frozenset[str]:
        _unique((r.index for r in ranges), "ranges")
        for r in ranges:
            _demand(shadow or r.index not in scope, f"index {r.index} is bound twice", r.span)
            _demand((r.lo is None) == (r.hi is None), f"the range of {r.index} has one bound", r.span)
            for bound in (r.lo, r.hi):
                if bound is not None:
                    self._expr(bound, scope)
            scope |= {r.index}
        return scope

    def _expr(self, e: Expr, scope: frozenset[str], *, subscript: bool = False) -> None:
        match e:
            case Const(value=value):
                _demand(type(value) in (bool, int, float), f"a constant of type {type(value).__name__}", e.span)
            case Index(name=name):
                _demand(name in scope, f"index {name} is not in scope", e.span)
            case Size(tensor=name, dim=dim):
                _demand(name in self.defined or name in self.ranks, f"size of {name}, which nothing defines", e.span)
                _demand(0 <= dim < self.ranks.get(name, dim + 1), f"{name} has no dimension {dim}", e.span)
            case Access():
                _demand(e.tensor in self.defined, f"{e.tensor} is read, but nothing defines it before", e.span)
                self._rank(e)
                for s in e.subscripts:
                    self._expr(s, scope, subscript=True)
            case Call(op=op, args=args):
                _demand(op in OPS, f"an unknown function {op}", e.span)
                _demand(len(args) == OPS[op].arity, f"{op} with {len(args)} arguments", e.span)
                for arg in args:
                    self._expr(arg, scope)
            case Pad() | Clamp():
                _demand(subscript, "pad or clamp that is not a whole subscript", e.span)
                parts = (e.value, e.lo, e.hi) if isinstance(e, Pad) else (e.value,)
                for part in parts:
                    if part is not None:
                        self._expr(part, scope)
            case Reduce(op=op):
                _demand(op in INNER_REDUCTIONS, f"an unknown reduction {op}", e.span)
                _demand(bool(e.ranges) and all(r.order == "" for r in e.ranges), f"{op} over no index, or an ordered one", e.span)
                self._expr(e.body, self._ranges(e.ranges, scope, shadow=True))
                if e.init is not None:
                    self._expr(e.init, scope)
            case Softmax(over=over):
                _unique(over, "softmax indices")
                _demand(bool(over) and set(over) <= scope, f"softmax over {', '.join(over)}, not all in scope", e.span)
                self._expr(e.body, scope)
            case _:
                raise VerifyError(f"{type(e).__name__} is no expression")
