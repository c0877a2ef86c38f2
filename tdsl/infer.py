"""Sizes, dtypes and ranges of a program for given arguments; every error about shapes is made here.

    scores(A: bf16[8,64,32], B: bf16[8,48,32])   -->   Y: bf16[8,64,48];  h in 0:8, i in 0:64, j in 0:48, k in 0:32

The rules of ranges are in ranges.py, those of promotion in dtypes.py. What cannot be proved for all values of the index
tensors is listed in `Inferred.checks`, for the executor to check once per call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from tdsl.access_checks import Check, in_bounds, injective, nonempty, not_of_nothing, self_reads
from tdsl.affine import Bound, evaluate, known_values
from tdsl.dtypes import Typed, category, dtype_of, written
from tdsl.errors import ArgumentError, BoundsError, DtypeError, RankMismatch, SizeMismatch, counted
from tdsl.ir import (
    Access,
    Call,
    Const,
    Expr,
    Loop,
    Param,
    Program,
    Range,
    Reduce,
    Size,
    Span,
    Statement,
    bounds,
    expressions,
    rebuild,
    walk,
)
from tdsl.ops import DTYPES, OPERATORS, OPS
from tdsl.printer import print_expr
from tdsl.ranges import Node, Sizes, text_of
from tdsl.signature import place_of, place_of_inputs


@dataclass(frozen=True, slots=True)
class Spec:
    """What inference needs of an argument. weak: a Python number, which promotes as one. stored: its dtype in memory, where that is
    another than the one that it counts as."""

    shape: tuple[int, ...]
    dtype: str
    weak: bool = False
    stored: str = ""


@dataclass(frozen=True, slots=True)
class Inferred:
    """What `infer` finds.

    shapes: of every parameter and target. dtypes: of its last version. weak: parameters that are Python numbers.
    ranges: per statement, in the order of ir.statements, the half-open range of each index, those of enclosing ordered loops first;
    ints where constant, else IR over outer indices and tensors. inner: the same per Reduce node, in the order of `reductions`.
    written: per statement, the dtype of its target after it.
    """

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    weak: frozenset[str]
    ranges: tuple[dict[str, tuple[Bound, Bound]], ...]
    inner: tuple[dict[str, tuple[Bound, Bound]], ...]
    written: tuple[str, ...]
    checks: tuple[Check, ...]

    @property
    def ranks(self) -> dict[str, int]:
        """Per tensor, for `dtype_of`: -1 for Python numbers."""
        return {name: -1 if name in self.weak else len(shape) for name, shape in self.shapes.items()}

    def dtype_of(self, expr: Expr) -> Typed:
        """The dtype and category of an expression over this program's tensors."""
        return dtype_of(expr, self.dtypes, self.ranks)


def infer(
    program: Program, specs: Mapping[str, Spec], values: Mapping[str, int] | None = None, *, unseen: frozenset[str] = frozenset()
) -> Inferred:
    """Sizes, dtypes and ranges of `program` for arguments like `specs` (one per parameter).

    unseen: outputs that no user sees (residuals), which may be the maximum of nothing.
    values: the integer scalars among the arguments, as far as known; one that is used as a size must be there, any other one makes
    its ranges depend on the call's values. Raises ArgumentError, RankMismatch, SizeMismatch, RangeError, BoundsError, DtypeError,
    IndexError_, NameError_, SelfRead, NotInjective.
    """
    return _Inference(program, specs, dict(values or {}), frozenset(program.results) - unseen).run()


def reductions(program: Program) -> Iterator[Reduce]:
    """Every Reduce node, in the order of `Inferred.inner`."""
    for node in program.body:
        for expr in expressions(node):
            yield from (e for e in walk(expr) if isinstance(e, Reduce))


def resolve(program: Program, inferred: Inferred) -> Program:
    """`program` with explicit bounds in every range, of statements, loops and reductions, and with sizes as numbers."""
    inner = iter(inferred.inner)
    numbers = iter(inferred.ranges)
    known = known_values(inferred.shapes)

    def expr(e: Expr) -> Expr:
        if isinstance(e, Reduce):
            found = next(inner)  # before those inside it: the order of `walk`
            ranges = tuple(_explicit(r, found) for r in e.ranges)
            for bound in bounds(e.ranges):
                expr(bound)
            body = expr(e.body)
            return replace(e, ranges=ranges, body=body, init=None if e.init is None else expr(e.init))
        value = known(e) if isinstance(e, Size) else None
        return rebuild(e, expr) if value is None else Const(value, e.span)

    def node(n: Statement | Loop, outer: dict[str, tuple[Bound, Bound]] | None) -> Statement | Loop:
        for bound in bounds(n.ranges):
            expr(bound)
        if isinstance(n, Loop):
            first = next(numbers) if outer is None else outer
            ranges = tuple(_explicit(r, first) for r in n.ranges)
            body = []
            for position, child in enumerate(n.body):
                body.append(node(child, first if position == 0 else None))
            return replace(n, ranges=ranges, body=tuple(body))
        found = next(numbers) if outer is None else outer
        target = expr(n.target)
        assert isinstance(target, Access)
        return replace(n, ranges=tuple(_explicit(r, found) for r in n.ranges), target=target, value=expr(n.value))

    return replace(program, body=tuple(node(n, None) for n in program.body))


def _explicit(r: Range, found: Mapping[str, tuple[Bound, Bound]]) -> Range:
    lo, hi = (Const(b) if isinstance(b, int) else b for b in found[r.index])
    return replace(r, lo=lo, hi=hi)


_KINDS = ("bool", "int", "float")
_KIND_NAMES = {"bool": "booleans", "int": "integers", "float": "floats"}


class _Inference:
    """One pass over the program: statement by statement, sizes and dtypes of what came before being known."""

    def __init__(self, program: Program, specs: Mapping[str, Spec], values: dict[str, int], seen: frozenset[str]):
        self.program = program
        self.seen = seen
        self.specs = specs
        self.values = values
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self.ranks: dict[str, int] = {}
        self.known = known_values(self.shapes, values)
        self.ranges: list[dict[str, tuple[Bound, Bound]]] = []
        self.inner: list[dict[str, tuple[Bound, Bound]]] = []
        self.written: list[str] = []
        self.checks: list[Check] = []

    def run(self) -> Inferred:
        names = self._arguments()
        self.sizes = Sizes(self.shapes, self._declared(), self.known, names)
        number = 0
        for item in self.program.body:
            number = self._node(item, number)
        weak = frozenset(p.name for p in self.program.params if self.specs[p.name].weak)
        return Inferred(self.shapes, self.dtypes, weak, tuple(self.ranges), tuple(self.inner), tuple(self.written), tuple(self.checks))

    # -- the signature ------------------------------------------------------------------------------------------------

    def _arguments(self) -> dict[str, int]:
        """Checks the arguments against the parameters; the sizes that the signature names."""
        inputs = self.program.inputs
        if set(self.specs) != set(inputs):
            odd = sorted(set(self.specs) ^ set(inputs))
            raise ArgumentError(
                f"{self.program.name} takes {', '.join(inputs) or 'nothing'}; {', '.join(odd)} is missing or not among them",
                span=place_of_inputs(self.program),
                help="give each parameter its value, and nothing else",
            )
        names: dict[str, tuple[int, Param, int]] = {}
        for param in self.program.params:
            spec = self.specs[param.name]
            if len(spec.shape) != len(param.dims):
                raise RankMismatch(
                    f"{param.name} has {counted(len(param.dims), 'dimension')} in the program, but got {_described(spec)}",
                    span=place_of(self.program, param.name),
                    help=_rank_help(param, len(spec.shape)),
                )
            for dim, (name, size) in enumerate(zip(param.dims, spec.shape, strict=True)):
                before, other, place = names.setdefault(name, (size, param, dim))
                if before != size:
                    raise SizeMismatch(
                        f"size {name} is {before} in {other.name} (dimension {place}) but {size} in {param.name} (dimension {dim})",
                        span=place_of(self.program, param.name),
                        help="the names in a signature's brackets are sizes: equal names agree"
                        if param.span is not None
                        else f"{name} is one index, with one range; sizes never broadcast, not even 1",
                    )
            self.shapes[param.name] = spec.shape
            self.dtypes[param.name] = spec.dtype
            self.ranks[param.name] = -1 if spec.weak else len(spec.shape)
        return {name: size for name, (size, _, _) in names.items()}

    def _declared(self) -> dict[str, tuple[int | None, ...]]:
        """The sizes that the signature gives to outputs."""
        declared: dict[str, tuple[int | None, ...]] = {}
        for output in self.program.outputs:
            if output.sizes is None:
                continue
            shape: list[int | None] = []
            for dim, e in enumerate(output.sizes):
                if e is not None:
                    self._integer(e, output.span)
                size = None if e is None else evaluate(e, self.values, self.known)
                if e is not None and size is None:
                    raise ArgumentError(
                        f"the size {text_of(e)} of {output.name} needs the value of an integer argument",
                        span=e.span or output.span,
                        help="pass a Python number, or a 0-d tensor that has a value",
                    )
                if size is not None and size < 0:
                    raise BoundsError(
                        f"dimension {dim} of {output.name} would have size {size}",
                        span=(e.span if e is not None else None) or output.span,
                        help="sizes are 0 or more",
                    )
                shape.append(size)
            declared[output.name] = tuple(shape)
        return declared

    # -- a statement, or an ordered block -----------------------------------------------------------------------------

    def _node(self, item: Statement | Loop, number: int) -> int:
        node = Node(item, number, self.sizes)
        new = {p.statement.target.tensor for p in node.statements} - set(self.shapes)
        late = [pair for pair in node.integers if not self._integer(*pair)]
        node.settle()
        self._dtypes(node)
        for placed in node.statements:
            self._operands(placed.statement.value)
        for pair in late:
            self._integer(*pair)
        for use in node.uses:
            self.checks += in_bounds(node, use, self.shapes, self.program.inputs)
        for placed in node.statements:
            self.checks += injective(node, placed, self.shapes)
            self_reads(node, placed)
            if placed.statement.target.tensor in new:
                new.discard(placed.statement.target.tensor)
                if placed.statement.target.tensor in self.seen:  # what is no output may be the maximum of nothing: nobody sees it
                    not_of_nothing(placed)
            self.ranges.append({name: node.named(loop, placed.scope) for name, loop in placed.scope.loops.items()})
        for reduction, loops, scope in node.reductions:
            nonempty(reduction, loops, scope)
            inside = scope
            for loop in loops:
                inside = inside.inside(loop)
            self.inner.append({loop.name: node.named(loop, inside) for loop in loops})
        return number + len(node.statements)

    def _integer(self, expr: Expr, span: Span | None) -> bool:
        """Checks that an integer expression is one; False where a tensor in it is not known yet."""
        accesses = [e for e in walk(expr) if isinstance(e, Access)]
        if any(e.tensor not in self.dtypes for e in accesses):
            return False
        dtype, _ = dtype_of(expr, self.dtypes, self.ranks)
        if DTYPES[dtype].kind != "int":
            wrong = next((e for e in accesses if DTYPES[self.dtypes[e.tensor]].kind != "int"), expr)
            self._not_an_integer(wrong, self.dtypes[wrong.tensor] if isinstance(wrong, Access) else dtype, span)
        return True

    def _not_an_integer(self, e: Expr, dtype: str, span: Span | None) -> None:
        what = e.tensor if isinstance(e, Access) else print_expr(e)
        mend = (
            f"subscripts, bounds and sizes are integers; pass {e.tensor}.long() if its values are whole"
            if isinstance(e, Access)
            else "use // for a quotient"
        )
        raise DtypeError(f"{what} is {dtype}, but stands where an integer is needed", span=getattr(e, "span", None) or span, help=mend)

    def _dtypes(self, node: Node) -> None:
        """The dtypes of the targets; in a recurrence, until they no longer change."""
        for placed in node.statements:
            self.ranks[placed.statement.target.tensor] = len(placed.statement.target.subscripts)
        result: list[str] = []
        for _ in range(len(DTYPES)):
            before = dict(self.dtypes)
            result.clear()
            for placed in node.statements:
                s = placed.statement
                name = s.target.tensor
                old = (self.dtypes[name], category(self.ranks[name])) if name in self.dtypes else None
                dtype = written(s.op, dtype_of(s.value, self.dtypes, self.ranks), old)
                self.dtypes[name] = dtype
                result.append(dtype)
            if self.dtypes == before or not any(p.outer.loops for p in node.statements):
                break
        self.written += result

    def _operands(self, value: Expr) -> None:
        """Raises DtypeError for a function of dtypes that it is not defined for."""
        for e in walk(value):
            if not isinstance(e, Call) or len(takes := OPS[e.op].takes) == len(_KINDS):
                continue
            found = [dtype_of(a, self.dtypes, self.ranks)[0] for a in e.args]
            kind = max((DTYPES[d].kind for d in found), key=_KINDS.index)
            if kind not in takes:
                names = [_KIND_NAMES[k] for k in takes]
                raise DtypeError(
                    f"`{OPERATORS[e.op][0] if e.op in OPERATORS else e.op}` is not defined for {' and '.join(dict.fromkeys(found))}",
                    span=e.span,
                    help=f"it takes {' or '.join(names)}; a cast is written `{'float32' if 'float' in takes else 'int64'}(..)`",
                )

def _described(spec: Spec) -> str:
    if spec.weak:
        return f"a Python number ({spec.dtype})"
    return f"a tensor of shape {list(spec.shape)}"


def _rank_help(param: Param, rank: int) -> str:
    if not param.dims:
        return f"{param.name} is a scalar: pass a Python number or a 0-d tensor, or give {param.name} subscripts in the program"
    if not rank:
        return f"pass a tensor, {param.name}[{','.join(param.dims)}]; to take a number, write {param.name} without brackets"
    return f"pass {param.name}[{','.join(param.dims)}]; sizes never broadcast: a batch is one more index in the program"
