"""Reverse mode on the IR: the gradient of a loop nest is the same loop nest with two names swapped.

    for h, i, j, k:  Y[h,i,j] += A[h,i,k] * B[h,j,k]
    -->
    for h, i, j, k:  A.grad[h,i,k] += Y.grad[h,i,j] * B[h,j,k]
    for h, i, j, k:  B.grad[h,j,k] += A[h,i,k] * Y.grad[h,i,j]

Every occurrence p of an operand X in `T[a] += f(..)` gets `X.grad[b] += T.grad[a] * df/dp` over the same loops.
The rule is `push` (rule.py); the rest names cotangents, keeps ranges known where an operand left, and repeats the forward.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from tdsl.affine import Bound
from tdsl.custom import with_custom
from tdsl.deviations import without_deviations
from tdsl.errors import ArgumentError, Unsupported
from tdsl.expand import expand
from tdsl.extents import Sizes, as_expr, loop_ranges, settled, symbolic_ranges
from tdsl.fills import covers_whole
from tdsl.gather import gather_form
from tdsl.ir import (
    REDUCTION_OF,
    Access,
    Call,
    Const,
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
    Statement,
    bounds,
    expressions,
    fresh_name,
    reads,
    statements,
    walk,
)
from tdsl.ops import REDUCTIONS
from tdsl.printer import print_expr
from tdsl.products import others
from tdsl.reassociate import reassociate
from tdsl.recurrence import Recurrence
from tdsl.rule import push
from tdsl.simplify import drop_dead, simplify, simplify_expr
from tdsl.ssa import ssa
from tdsl.states import explicit_updates, with_kept
from tdsl.terms import named_terms

ZERO = Const(0.0)


def gradient(program: Program, wrt: Sequence[str] | None = None) -> Program:
    """The program whose inputs are those of `program`, then `Y.grad` for each output, and whose outputs are `A.grad`
    for each differentiable input (or those named in `wrt`, in the order of the inputs).

    Raises ArgumentError for a name in `wrt` that is no input, or an integer one; Unsupported inside ordered loops.
    """
    swapper = _Swapper(program, wrt)
    whole = with_custom(swapper.run(), program.custom, len(swapper.out))
    cotangents = {s.target.tensor for s in statements(tuple(swapper.out))}
    simpler = simplify(gather_form(whole, cotangents), keep_all=True)
    return drop_dead(reassociate(without_deviations(simpler, cotangents)))


def backward(program: Program, wrt: Sequence[str] | None = None) -> Program:
    """The gradient as the rule alone gives it: the flat forward, then the swapped statements."""
    return _Swapper(program, wrt).run()


def flattened(program: Program, wrt: Sequence[str] | None = None) -> Program:
    """The forward statements that a gradient repeats: no reductions inside expressions, one name per version, and in ordered loops
    tensors that keep what a step read and a later one overwrites."""
    if not any(isinstance(node, Loop) for node in program.body):
        return _flat(program)
    swapper = _Swapper(program, wrt)
    swapper.run()
    return swapper.flat


def _flat(program: Program) -> Program:
    return named_terms(ssa(expand(program), differentiable=True))


def differentiable(program: Program) -> tuple[str, ...]:
    """The inputs that can have a gradient: all but those that serve as a subscript, a bound or a size."""
    integers: set[str] = set()
    for node in program.body:
        for e in (e for top in expressions(node) for e in walk(top)):
            inside = (*e.subscripts,) if isinstance(e, Access) else bounds(e.ranges) if isinstance(e, Reduce) else ()
            integers |= {a.tensor for i in inside for a in walk(i) if isinstance(a, Access)}
        integers |= {a.tensor for r in _headings(node) for b in bounds(r) for a in walk(b) if isinstance(a, Access)}
    for output in program.outputs:
        integers |= {a.tensor for size in output.sizes or () if size is not None for a in walk(size) if isinstance(a, Access)}
    return tuple(name for name in program.inputs if name not in integers)


def _headings(node: Statement | Loop) -> Iterator[tuple[Range, ...]]:
    """The ranges of a node, and of those inside it."""
    yield node.ranges
    if isinstance(node, Loop):
        for child in node.body:
            yield from _headings(child)


class _Lost(Exception):
    """What a statement of an ordered loop read, a later step overwrites, and the gradient needs it."""

    def __init__(self, statement: Statement, access: Access):
        super().__init__()
        self.statement = statement
        self.access = access

    def unsupported(self) -> Unsupported:
        """The error where the forward loop cannot keep it."""
        return Unsupported(
            f"the gradient of this loop needs the value that {print_expr(self.access)} had at each step, and a later step overwrites it (swap rule)",
            span=self.access.span or self.statement.span,
            help=f"give {self.access.tensor} the loop's index as a further subscript, so that every step writes elements of its own",
        )


class _Swapper:
    def __init__(self, program: Program, wrt: Sequence[str] | None):
        self.program = program
        possible = differentiable(program)
        for name in wrt or ():
            if name not in possible:
                what = "is used as a subscript, a bound or a size" if name in program.inputs else "is no input"
                raise ArgumentError(f"no gradient with respect to {name}: it {what}", help=f"inputs with a gradient: {', '.join(possible)}")
        self.wrt = tuple(name for name in possible if wrt is None or name in wrt)
        if not self.wrt:
            raise ArgumentError(
                f"{program.name} has no input that a gradient could be taken of",
                help="inputs used as a subscript, a bound or a size have none",
            )
        self.flat = _flat(program)
        self.taken = {*self.flat.inputs, *(s.target.tensor for s in statements(self.flat.body))}
        self.grad: dict[str, str] = {}  # tensor -> name of its cotangent
        self.out: list[Statement | Loop] = []
        self.forward = tuple(statements(self.flat.body))
        self.ties: dict[str, str] = {}  # a maximum -> the tensor that counts its ties
        self.recurrence: Recurrence | None = None  # the ordered loop whose gradient is being made
        self.around: dict[str, tuple[Bound, Bound]] = {}  # its indices, and those of loops inside it
        self.sizes = Sizes(self.flat)
        for node in self.flat.body:
            self.sizes.note(node)

    def run(self) -> Program:
        params = list(self.program.params)
        for external, output in zip(self.program.outputs, self.flat.outputs, strict=True):
            if output.name not in self.grad:
                params.append(Param(self._cotangent(output.name, external.name), self._dims(output.name, external)))
        self.sizes.shapes.update({self.grad[name]: self.sizes.shapes[name] for name in self.grad})
        for n, node in reversed(list(enumerate(self.flat.body))):
            if isinstance(node, Loop):
                self._outermost(node, n)
            elif node.target.tensor in self.grad:
                self._swap(node)
        outputs = []
        first: dict[str, Size] = {}  # a size is spelled by the first parameter that has it
        for param in self.program.params:
            for d, dim in enumerate(param.dims):
                first.setdefault(dim, Size(param.name, d))
        for param in self.flat.params:
            if param.name in self.wrt:
                sizes = tuple(first[dim] for dim in param.dims)
                if param.name not in self.grad:
                    self._zeros(param.name, self._cotangent(param.name), len(param.dims))
                outputs.append(Output(self.grad[param.name], sizes or None))
        body = (*self._declared(), *self.flat.body, *self.out)
        name = f"{self.program.name}_grad"
        return Program(name, tuple(params), tuple(outputs), body)

    def _declared(self) -> Iterator[Statement]:
        """An output of the program is no output here, and nothing declares its size: a fill does, where the first write covers less."""
        for output in self.flat.outputs:
            if output.name in self.flat.inputs or output.name not in self.sizes.declared:
                continue
            first = next((node for node in self.flat.body if any(t.target.tensor == output.name for t in statements((node,)))), None)
            assert first is not None
            inner = next(t for t in statements((first,)) if t.target.tensor == output.name)
            around = loop_ranges(first, self.sizes) if isinstance(first, Loop) else {}
            if not covers_whole(inner, self.sizes, around):
                shape = self.sizes.shapes[output.name]
                indices = tuple(Index(f"n{d}") for d in range(len(shape)))
                ranges = tuple(Range(i.name, Const(0), size) for i, size in zip(indices, shape, strict=True))
                start = REDUCTIONS[REDUCTION_OF[inner.op]].identity if inner.op in REDUCTION_OF else 0
                yield Statement(ranges, Access(output.name, indices), "=", Const(int(start) if math.isfinite(start) else start))

    # -- the rule -----------------------------------------------------------------------------------------------------

    def _swap(self, s: Statement) -> None:
        """The backward statements of one statement, then what its write cuts from the older version's cotangent."""
        seed: Expr = Access(self.grad[s.target.tensor], s.target.subscripts)
        updates = [t for t in self.forward if t.target.tensor == s.target.tensor]
        running = self.recurrence is not None and not self.recurrence.once(s)
        kept = self.recurrence is None or self.recurrence.keeps(s.target, s)
        y: Expr | None = s.target if s.op == "=" and len(updates) == 1 and not s.reduced and kept else None
        if s.op in ("*=", "max=", "min=") and (running or (self.recurrence is not None and len(updates) > 1)):
            raise Unsupported(
                f"the gradient of a `{s.op}` at computed places that runs over the steps of an ordered loop (swap rule)",
                span=s.span,
                help=f"give {s.target.tensor} the loop's index as a further subscript, or write the statement outside of the loop",
            )
        if self.recurrence is not None and s.op == "=" and (self.recurrence.overwrites(s) or self.recurrence.gathered(s.target.tensor)):
            seed = self._taken_out(s)
        seed = self._extremum(s, seed, updates) if any(t.op in ("max=", "min=") for t in updates) else self._reduction(s, seed)
        for operand, g in push(s.value, seed, (), y):
            self._accumulate(s, operand, simplify_expr(g))
        if self.recurrence is None and s.op == "=" and len(updates) > 1 and s is not updates[0]:
            target = replace(s.target, tensor=self.grad[s.target.tensor])
            self.out.append(replace(s, ranges=self._ranges(s, target, ZERO), target=target, value=ZERO))

    def _reduction(self, s: Statement, seed: Expr) -> Expr:
        """The cotangent of one term of the sum or product `s`."""
        if s.op != "*=":
            return seed
        rest = others(s, self._ranges(s, s.target, s.value), self.around)  # right with zeros present and at every order
        return seed if rest is None else Call("mul", (seed, rest))

    def _extremum(self, s: Statement, seed: Expr, updates: Sequence[Statement]) -> Expr:
        """The cotangent of one term of a maximum (or minimum), or of its start: shared equally among ties, as torch.amax does."""
        plain = {e.name for e in s.target.subscripts if isinstance(e, Index)}
        if len(updates) == 1 and plain >= set(s.indices):
            return seed
        hit = Call("eq", (s.value, s.target))
        ties: Expr = replace(s.target, tensor=self._ties(s.target.tensor, updates))
        if any(isinstance(e, Pad) for e in s.target.subscripts):  # outside there are none
            ties = Call("maximum", (ties, Const(1.0)))
        return Call("where", (hit, Call("div", (seed, ties)), ZERO))

    def _ties(self, tensor: str, updates: Sequence[Statement]) -> str:
        """The tensor that counts, for each element of a maximum, the terms that are equal to it."""
        if tensor in self.ties:
            return self.ties[tensor]
        name = fresh_name(f"{tensor}.ties", self.taken)
        self.taken.add(name)
        self.ties[tensor] = name
        if len(updates) > 1 or not all(isinstance(e, Index) for e in updates[0].target.subscripts):
            self._zeros(tensor, name, len(updates[0].target.subscripts), ZERO)
        for t in updates:
            value = Call("where", (Call("eq", (t.value, t.target)), Const(1.0), ZERO))
            self._emit(t, Statement(self._ranges(t, t.target, value), replace(t.target, tensor=name), "+=", value, t.span))
        return name

    def _accumulate(self, s: Statement, operand: Access, g: Expr) -> None:
        """`X.grad[b] += g` over the loops of `s`."""
        name = operand.tensor
        if name in self.flat.inputs and name not in self.wrt:
            return
        if name not in self.flat.inputs and not any(t.target.tensor == name for t in self.forward):
            return
        if name not in self.grad:
            self._cotangent(name)
            plain = {i.name for i in operand.subscripts if isinstance(i, Index)}
            explicit = {r.index for r in s.ranges if r.lo is not None}
            if name not in self.flat.inputs and (len(plain) < len(operand.subscripts) or plain & explicit):
                self._zeros(name, self.grad[name], len(operand.subscripts), Const(0))  # an int: it raises no dtype
        target = Access(self.grad[name], operand.subscripts)
        self._emit(s, Statement(self._ranges(s, target, g), target, "+=", g, s.span))
        self.sizes.shapes[target.tensor] = self.sizes.shapes[name]

    def _emit(self, s: Statement, new: Statement) -> None:
        """Adds a backward statement of `s`; what it reads of a recurrence must still be in memory."""
        if self.recurrence is not None:
            for access in reads(new):
                if not self.recurrence.keeps(access, s):
                    raise _Lost(s, access)
        self.out.append(new)

    # -- ordered loops ------------------------------------------------------------------------------------------------

    def _outermost(self, loop: Loop, position: int) -> None:
        """The gradient of an ordered loop: the loop the other way round, over the swapped statements in the other order.

        The cotangents of what the loop writes accumulate over its steps, so they exist before it. A value that the gradient needs and
        that a later step overwrites is kept by the forward loop, step by step.
        """
        earlier = self.flat.body[:position]
        started = {*self.flat.inputs, *(s.target.tensor for s in statements(earlier))}
        explicit = explicit_updates(loop, set(self._active(loop)), started, self.sizes, self.taken)
        if explicit != [loop]:
            self._replace(position, explicit)
            position += len(explicit) - 1
            earlier = self.flat.body[:position]
        while True:
            loop = self.flat.body[position]  # type: ignore[assignment]
            active = self._active(loop)
            if not active:
                return
            before = list(self.out), dict(self.grad), set(self.taken), dict(self.ties), dict(self.sizes.shapes)
            for name in active:
                if name not in self.grad and name not in self.flat.inputs:
                    self._zeros(name, self._cotangent(name), len(self.sizes.shapes[name]), Const(0))
            self.recurrence = Recurrence(loop, self.sizes, tuple(statements(earlier)))
            try:
                self._loop(loop)
                return
            except _Lost as lost:
                self.out, self.grad, self.taken, self.ties, self.sizes.shapes = before
                self.around = {}
                kept = with_kept(loop, lost.statement, lost.access, self.sizes, self.taken)
                if kept is None:
                    raise lost.unsupported() from None
                self._replace(position, [kept])
            finally:
                self.recurrence = None

    def _replace(self, position: int, nodes: Sequence[Statement | Loop]) -> None:
        body = self.flat.body
        self.flat = replace(self.flat, body=(*body[:position], *nodes, *body[position + 1 :]))
        self.forward = tuple(statements(self.flat.body))
        for node in nodes:
            self.sizes.note(node)

    def _active(self, loop: Loop) -> tuple[str, ...]:
        """The tensors that a cotangent reaches within a loop: those that have one, and what is read to make such a tensor."""
        found = dict.fromkeys(s.target.tensor for s in statements((loop,)) if s.target.tensor in self.grad)
        written = {s.target.tensor for s in self.forward}
        known = -1
        while known < len(found):
            known = len(found)
            for s in statements((loop,)):
                if s.target.tensor in found:
                    found.update(dict.fromkeys(a.tensor for a, _ in push(s.value, Const(1.0), ()) if a.tensor in written or a.tensor in self.wrt))
        return tuple(found)

    def _loop(self, loop: Loop) -> None:
        forward, around = self.out, self.around
        before = loop_ranges(loop, self.sizes)
        unknown = next((r for r in loop.ranges if r.index not in before), None)
        if unknown is not None:
            raise Unsupported(
                f"the range of ordered index {unknown.index} is not known from a plain use of it (swap rule)",
                span=unknown.span or loop.span,
                help=f"give it one: `for {unknown.order} {unknown.index} in lo:hi`",
            )
        self.out, self.around = [], {**around, **before}
        for child in reversed(loop.body):
            if isinstance(child, Loop):
                self._loop(child)
            elif child.target.tensor in self.grad:
                self._swap(child)
        body, self.out, self.around = tuple(self.out), forward, around
        if body:
            turned = Loop(tuple(replace(r, order="ordered" if r.order == "reversed" else "reversed") for r in loop.ranges), body, loop.span)
            after = loop_ranges(turned, self.sizes)
            ranges = tuple(r if r.lo is not None or after.get(r.index) == before[r.index] else _settled(r, before[r.index]) for r in turned.ranges)
            self.out.append(replace(turned, ranges=ranges))

    def _taken_out(self, s: Statement) -> Expr:
        """The cotangent of elements that `s` overwrites, in a tensor of its own: the older values' cotangent starts from zero."""
        name = fresh_name(f"{s.target.tensor}.seed", self.taken)
        self.taken.add(name)
        grad = replace(s.target, tensor=self.grad[s.target.tensor])
        seed = Access(name, tuple(Index(i) for i in (*self.around, *s.indices)))
        self.out.append(Statement(self._ranges(s, seed, grad), seed, "=", grad, s.span))
        self.out.append(Statement(self._ranges(s, grad, ZERO), grad, "=", ZERO, s.span))
        self.sizes.note(self.out[-2], self.around)
        return seed

    # -- names and ranges ---------------------------------------------------------------------------------------------

    def _cotangent(self, tensor: str, external: str | None = None) -> str:
        name = fresh_name(f"{external or tensor}.grad", self.taken)
        self.taken.add(name)
        self.grad[tensor] = name
        if tensor in self.flat.inputs:  # a declared size; that of an intermediate is known after its first write
            self.sizes.shapes[name] = self.sizes.shapes[tensor]
        return name

    def _zeros(self, tensor: str, grad: str, rank: int, zero: Const = ZERO) -> None:
        indices = tuple(Index(f"n{d}") for d in range(rank))
        ranges = tuple(Range(i.name, Const(0), size) for i, size in zip(indices, self.sizes.shapes[tensor], strict=True))
        self.out.append(Statement(ranges, Access(grad, indices), "=", zero))
        self.sizes.shapes[grad] = self.sizes.shapes[tensor]

    def _ranges(self, s: Statement, target: Access, value: Expr) -> tuple[Range, ...]:
        """The loops of `s` for a new statement: explicit where what settled an index is no longer read."""
        before = symbolic_ranges(s, self.sizes, self.around)
        return settled(Statement(s.ranges, target, "+=", value), before, self.sizes, self.around).ranges

    def _dims(self, tensor: str, external: Output) -> tuple[str, ...]:
        """Names for the sizes of an output's cotangent: those of the inputs where the output's sizes are theirs."""
        names = {Size(p.name, d): dim for p in self.program.params for d, dim in enumerate(p.dims)}
        used = set(names.values())
        definition = next((s for s in statements(self.flat.body) if s.target.tensor == tensor), None)
        if definition is None:  # an output that is an input, unchanged
            return next(p.dims for p in self.program.params if p.name == tensor)
        result = []
        for d, subscript in enumerate(definition.target.subscripts):
            size: Expr | None = external.sizes[d] if external.sizes is not None else self.sizes.shapes[tensor][d]
            known = names.get(size) if isinstance(size, Size) else None
            wanted = subscript.name if isinstance(subscript, Index) else "n"
            result.append(known or fresh_name(wanted, used))
            used.add(result[-1])
        return tuple(result)


def _settled(r: Range, bounds: tuple[Bound, Bound]) -> Range:
    return replace(r, lo=as_expr(bounds[0]), hi=as_expr(bounds[1]))
