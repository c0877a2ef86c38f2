"""Batching on the IR: one more index on every statement that depends on a batched input. Nothing loops.

    for h, i, j, k:  Y[h,i,j] += A[h,i,k] * B[h,j,k]
    -->  A batched along dimension 0, B not at all
    for n, h, i, j, k:  Y[n,h,i,j] += A[n,h,i,k] * B[h,j,k]

The index stands first in an intermediate, and where `in_dims` and `out_dims` say in an input and an output, so that no
tensor is moved. What depends on no batched input is computed once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from tdsl.calls import check_name
from tdsl.custom import renamed
from tdsl.declared import declared
from tdsl.errors import ArgumentError, Unsupported
from tdsl.extents import Sizes
from tdsl.ir import (
    Access,
    Const,
    Expr,
    Index,
    Loop,
    Output,
    Param,
    Program,
    Range,
    Reduce,
    Size,
    Statement,
    bounds,
    expressions,
    fresh_name,
    reads,
    rebuild,
    rebuild_range,
    statements,
    walk,
)
from tdsl.printer import print_expr
from tdsl.ssa import ssa

Dims = int | None | Sequence[int | None]


def batch(program: Program, in_dims: Dims = 0, out_dims: Dims = 0, name: str = "n") -> Program:
    """`program` on a batch of inputs. Its arguments mean what those of torch.func.vmap mean.

    in_dims: for each parameter the dimension along which it is batched (-1: the last), None where all share one value; a number
    stands for all parameters. A scalar becomes a vector. out_dims: the same for each output; an output that depends on no batched
    input is repeated along its dimension, unless that is None. name: of the new index; if it is taken it gets a number.

    Raises ArgumentError for dimensions that do not fit, for a batched scalar that an output's size depends on, and for None as the
    dimension of an output that depends on the batch; Unsupported for an ordered loop whose number of steps does.

    >>> from tdsl.text import parse
    >>> print(batch(parse("Y[i] += A[i,k] * x[k]"), (None, 1)))
    def Y_vmap(A[i,k], x[k,n]) -> Y:
        for n, i, k:  Y[n,i] += A[i,k] * x[k,n]
    """
    if program.custom:
        raise Unsupported(
            f"a batch of {program.name}, whose gradient {program.custom[0].name} was written by hand (batch)",
            help="define the gradient of the batched function instead: f.vmap(..).define_grad(..)",
        )
    ins = _per_name("in_dims", "parameter", in_dims, [(p.name, len(p.dims) + 1) for p in program.params])
    if all(d is None for d in ins.values()):
        raise ArgumentError("no parameter is batched", help="give in_dims a dimension for at least one of them")
    ranks = {s.target.tensor: len(s.target.subscripts) + 1 for s in statements(program.body)}
    outs = _per_name("out_dims", "output", out_dims, [(o.name, ranks[o.name]) for o in program.outputs])
    return _Batcher(program, ins, outs, check_name(name, None)).run()


def _per_name(what: str, noun: str, dims: Dims, ranks: Sequence[tuple[str, int]]) -> dict[str, int | None]:
    given = [dims] * len(ranks) if dims is None or isinstance(dims, int) else list(dims)
    if len(given) != len(ranks):
        raise ArgumentError(
            f"{what} has {len(given)} entries for {len(ranks)} {noun}s", help=f"the {noun}s are {', '.join(n for n, _ in ranks)}"
        )
    result: dict[str, int | None] = {}
    for (name, rank), d in zip(ranks, given, strict=True):
        if d is not None and not -rank <= d < rank:
            raise ArgumentError(f"{what} gives {d} for {name}, which has dimensions {-rank} to {rank - 1} with the batch")
        result[name] = d if d is None else d % rank
    return result


class _Batcher:
    def __init__(self, program: Program, ins: dict[str, int | None], outs: dict[str, int | None], name: str):
        self.external = program
        versions = _changes(program, ins, outs)
        self.program = ssa(program) if versions else program
        self.ins = ins
        results = zip(program.outputs, self.program.outputs, strict=True)
        self.outs = {o.name: outs[e.name] for e, o in results}
        self.names = {*self.program.inputs, *(s.target.tensor for s in statements(self.program.body))}
        self.index = fresh_name(name, self.names | set(_indices(self.program)) | {d for p in program.params for d in p.dims})
        source, d = next((name, d) for name, d in ins.items() if d is not None)
        self.count = Size(source, d)
        self.places: dict[str, int] = {n: d for n, d in ins.items() if d is not None}  # where the index stands, per batched tensor
        self._spread()

    def _spread(self) -> None:
        """All that depends on a batched input."""
        known = -1
        while known < len(self.places):
            known = len(self.places)
            for s in statements(self.program.body):
                if any(a.tensor in self.places for a in reads(s)):
                    self.places.setdefault(s.target.tensor, self.outs.get(s.target.tensor) or 0)

    def run(self) -> Program:
        params = []
        for p in self.program.params:
            d = self.ins[p.name]
            params.append(p if d is None else Param(p.name, (*p.dims[:d], self.index, *p.dims[d:]), p.span))
        body = [self._node(node, frozenset(s.target.tensor for s in statements((node,)))) for node in self.program.body]
        once, repeated = self._repeated()
        body = [*self._fills(once), *(renamed(node, once) for node in body), *repeated]
        outputs = []
        for external, o in zip(self.external.outputs, self.program.outputs, strict=True):
            d = self.outs[o.name]
            if d is None and o.name in self.places:
                raise ArgumentError(
                    f"the output {external.name} depends on the batch, and out_dims gives it no dimension",
                    help="out_dims=None is for outputs that depend on no batched input",
                )
            outputs.append(Output(o.name, self._sizes(external, d), o.span))
        final = Program(f"{self.external.name}_vmap", tuple(params), tuple(outputs), tuple(body))
        return _named(final, self.external.results, self.names)

    # -- rewriting ----------------------------------------------------------------------------------------------------

    def _expr(self, e: Expr) -> Expr:
        e = rebuild(e, self._expr)
        if isinstance(e, Access) and e.tensor in self.places:
            d = self.places[e.tensor]
            return replace(e, subscripts=(*e.subscripts[:d], Index(self.index), *e.subscripts[d:]))
        if isinstance(e, Size) and e.tensor in self.places and e.dim >= self.places[e.tensor]:
            return replace(e, dim=e.dim + 1)
        return e

    def _node(self, node: Statement | Loop, here: frozenset[str]) -> Statement | Loop:
        """A node with the index in it. here: what the outermost node around it writes, whose sizes are not known before."""
        ranges = tuple(rebuild_range(r, self._expr) for r in node.ranges)
        if isinstance(node, Loop):
            moving = next((a for e in bounds(node.ranges) for a in walk(e) if isinstance(a, Access) and a.tensor in self.places), None)
            if moving is not None:
                raise Unsupported(
                    f"the number of steps of an ordered loop depends on {print_expr(moving)}, which is batched (batch)",
                    span=moving.span or node.span,
                    help=f"give {moving.tensor} None in in_dims, or run the longest loop and mask with where(..)",
                )
            return replace(node, ranges=ranges, body=tuple(self._node(child, here) for child in node.body))
        if node.target.tensor in self.places:
            told = any(a.tensor in self.places and a.tensor not in here for a in reads(node))
            ranges = (Range(self.index) if told else Range(self.index, Const(0), self.count), *ranges)
        target = self._expr(node.target)
        assert isinstance(target, Access)
        return replace(node, ranges=ranges, target=target, value=self._expr(node.value))

    def _sizes(self, external: Output, d: int | None) -> tuple[Expr | None, ...] | None:
        if external.sizes is None:
            return None
        for size in external.sizes:
            moving = next((a for a in walk(size) if isinstance(a, Access) and a.tensor in self.places), None) if size is not None else None
            if moving is not None:
                raise ArgumentError(
                    f"the size of {external.name} depends on {moving.tensor}, which is batched",
                    span=moving.span or external.span,
                    help=f"all elements of a batch have one size: give {moving.tensor} None in in_dims",
                )
        sizes = tuple(None if size is None else self._expr(size) for size in external.sizes)
        return sizes if d is None else (*sizes[:d], self.count, *sizes[d:])

    # -- outputs that depend on no batched input ----------------------------------------------------------------------

    def _repeated(self) -> tuple[dict[str, str], list[Statement]]:
        """New names for the outputs that are computed once, and the statements that repeat them."""
        once: dict[str, str] = {}
        result = []
        for o in self.program.outputs:
            d = self.outs[o.name]
            if d is None or o.name in self.places:
                continue
            once[o.name] = fresh_name(f"{o.name}.one", self.names)
            self.names.add(once[o.name])
            target = next(s.target for s in statements(self.program.body) if s.target.tensor == o.name)
            indices: list[Index] = []
            taken = self.names | {self.index}
            for n, e in enumerate(target.subscripts):
                indices.append(Index(fresh_name(e.name if isinstance(e, Index) else f"n{n}", taken | {i.name for i in indices})))
            batched = (*indices[:d], Index(self.index), *indices[d:])
            ranges = (Range(self.index, Const(0), self.count), *(Range(i.name) for i in indices))
            result.append(Statement(ranges, Access(o.name, batched), "=", Access(once[o.name], tuple(indices))))
        return once, result

    def _fills(self, once: dict[str, str]) -> Iterator[Statement]:
        flat = self.program
        for s in declared(flat, Sizes(flat)):
            if s.target.tensor in once:
                filled = renamed(replace(s, ranges=tuple(rebuild_range(r, self._expr) for r in s.ranges)), once)
                assert isinstance(filled, Statement)
                yield filled


def _indices(program: Program) -> Iterator[str]:
    """Every name of an index, those that a reduction binds too."""
    for node in program.body:
        for s in statements((node,)):
            yield from s.indices
        for expr in expressions(node):
            for e in walk(expr):
                if isinstance(e, Index):
                    yield e.name
                if isinstance(e, Reduce):
                    yield from (r.index for r in e.ranges)
    yield from (r.index for node in program.body if isinstance(node, Loop) for r in _ordered(node))


def _ordered(loop: Loop) -> Iterator[Range]:
    yield from loop.ranges
    for child in loop.body:
        if isinstance(child, Loop):
            yield from _ordered(child)


def _changes(program: Program, ins: dict[str, int | None], outs: dict[str, int | None]) -> bool:
    """Whether versions of one name differ in their dimensions, so that each needs a name of its own."""
    if any(name in outs and outs[name] != d for name, d in ins.items()):
        return True
    batched = {name: d is not None for name, d in ins.items()}
    for node in program.body:
        new = {s.target.tensor: False for s in statements((node,))}
        known = -1
        while known < sum(new.values()):
            known = sum(new.values())
            for s in statements((node,)):
                if any(new.get(a.tensor, batched.get(a.tensor, False)) or batched.get(a.tensor, False) for a in reads(s)):
                    new[s.target.tensor] = True
        if any(batched.setdefault(name, now) != now for name, now in new.items()):
            return True
    return False


def _named(program: Program, wanted: Sequence[str], taken: set[str]) -> Program:
    """`program` whose outputs, where they are versions of an input, have the input's name with a number."""
    to = {}
    for o, name in zip(program.outputs, wanted, strict=True):
        if o.name != name:
            to[o.name] = fresh_name(name, taken)
            taken.add(to[o.name])
    outputs = tuple(replace(o, name=to.get(o.name, o.name)) for o in program.outputs)
    return replace(program, outputs=outputs, body=tuple(renamed(node, to) for node in program.body))
