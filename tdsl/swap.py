"""Reverse mode on the IR: the gradient of a loop nest is the same loop nest with two names swapped.

    for h, i, j, k:  Y[h,i,j] += A[h,i,k] * B[h,j,k]
    -->
    for h, i, j, k:  A.grad[h,i,k] += Y.grad[h,i,j] * B[h,j,k]
    for h, i, j, k:  B.grad[h,j,k] += A[h,i,k] * Y.grad[h,i,j]

Every occurrence p of an operand X in `T[a] += f(..)` gets `X.grad[b] += T.grad[a] * df/dp` over the same loops.
The rule is `_push`; the rest names cotangents, keeps ranges known where an operand left, and repeats the forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from tdsl.errors import ArgumentError, Unsupported
from tdsl.expand import expand, witness
from tdsl.gather import gather_form
from tdsl.ir import (
    Access,
    Call,
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
    fresh_name,
    statements,
    substitute,
    walk,
)
from tdsl.ops import OPS, cotangent
from tdsl.reassociate import reassociate
from tdsl.simplify import drop_dead, simplify, simplify_expr
from tdsl.ssa import ssa

ZERO = Const(0.0)


def gradient(program: Program, wrt: Sequence[str] | None = None) -> Program:
    """The program whose inputs are those of `program`, then `Y.grad` for each output, and whose outputs are `A.grad`
    for each differentiable input (or those named in `wrt`, in the order of the inputs).

    Raises ArgumentError for a name in `wrt` that is no input, or an integer one; Unsupported inside ordered loops.
    """
    swapper = _Swapper(program, wrt)
    whole = swapper.run()
    gathered = gather_form(whole, {s.target.tensor for s in swapper.out})
    return drop_dead(reassociate(simplify(gathered, keep_all=True)))


def differentiable(program: Program) -> tuple[str, ...]:
    """The inputs that can have a gradient: all but those that serve as a subscript, a bound or a size."""
    integers: set[str] = set()
    for s in statements(program.body):
        for expr in (*bounds(s.ranges), s.target, s.value):
            for e in walk(expr):
                inside = (*e.subscripts,) if isinstance(e, Access) else bounds(e.ranges) if isinstance(e, Reduce) else ()
                integers |= {a.tensor for i in inside for a in walk(i) if isinstance(a, Access)}
        integers |= {a.tensor for b in bounds(s.ranges) for a in walk(b) if isinstance(a, Access)}
    for output in program.outputs:
        integers |= {a.tensor for size in output.sizes or () if size is not None for a in walk(size) if isinstance(a, Access)}
    return tuple(name for name in program.inputs if name not in integers)


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
        self.flat = ssa(expand(program))
        self.taken = {*self.flat.inputs, *(s.target.tensor for s in statements(self.flat.body))}
        self.grad: dict[str, str] = {}  # tensor -> name of its cotangent
        self.out: list[Statement] = []
        self.forward = tuple(s for s in self.flat.body if isinstance(s, Statement))

    def run(self) -> Program:
        params = list(self.program.params)
        for external, output in zip(self.program.outputs, self.flat.outputs, strict=True):
            if output.name not in self.grad:
                params.append(Param(self._cotangent(output.name, external.name), self._dims(output.name, external)))
        self.loops = [node for node in self.flat.body if isinstance(node, Loop)]
        for node in reversed(self.flat.body):
            if isinstance(node, Loop):
                if any(s.target.tensor in self.grad for s in statements((node,))):
                    raise Unsupported(
                        "the gradient of an ordered loop is not built yet (swap rule)",
                        span=node.span,
                        help="write the backward recurrence as a program of its own",
                    )
                continue
            if node.target.tensor in self.grad:
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
        body = (*self.flat.body, *self.out)
        name = f"{self.program.name}_grad"
        return Program(name, tuple(params), tuple(outputs), body)

    # -- the rule -----------------------------------------------------------------------------------------------------

    def _swap(self, s: Statement) -> None:
        """The backward statements of one statement, then what its write cuts from the older version's cotangent."""
        seed: Expr = Access(self.grad[s.target.tensor], s.target.subscripts)
        updates = [t for t in self.forward if t.target.tensor == s.target.tensor]
        y: Expr | None = s.target if s.op == "=" and len(updates) == 1 and not s.reduced else None
        if s.op in ("*=", "max=", "min=") and len(updates) > 1:
            raise Unsupported(
                f"the gradient of a partial `{s.op}` onto an older version (swap rule)",
                span=s.span,
                help="give the result a name of its own and combine it",
            )
        seed = self._reduction(s, seed)
        for operand, g in _push(s.value, seed, (), y):
            self._accumulate(s, operand, simplify_expr(g))
        if s.op == "=" and len(updates) > 1 and s is not updates[0]:
            target = replace(s.target, tensor=self.grad[s.target.tensor])
            self.out.append(replace(s, ranges=self._ranges(s, target, ZERO), target=target, value=ZERO))

    def _reduction(self, s: Statement, seed: Expr) -> Expr:
        """The cotangent of one term of the reduction `s`."""
        if not s.reduced and s.op != "*=":
            return seed
        if s.op in ("max=", "min="):  # shared equally among ties, as torch.amax does
            ties = fresh_name(f"{s.target.tensor}.ties", self.taken)
            self.taken.add(ties)
            hit = Call("eq", (s.value, s.target))
            value = Call("where", (hit, Const(1.0), ZERO))
            self.out.append(Statement(self._ranges(s, s.target, value), replace(s.target, tensor=ties), "+=", value, s.span))
            return Call("where", (hit, Call("div", (seed, replace(s.target, tensor=ties))), ZERO))
        if s.op == "*=" and s.reduced:  # the product of the other factors, right with zeros present and at every order
            fresh = {i: fresh_name(i, {*s.indices}) for i in s.reduced}
            to = {i: Index(name) for i, name in fresh.items()}
            ranges = tuple(replace(r, index=fresh[r.index]) for r in self._ranges(s, s.target, s.value) if r.index in fresh)
            itself: Expr | None = None
            for i, name in fresh.items():
                same = Call("eq", (Index(name), Index(i)))
                itself = same if itself is None else Call("and", (itself, same))
            assert itself is not None
            others = Reduce("prod", ranges, Call("where", (itself, Const(1.0), substitute(s.value, to))))
            return Call("mul", (seed, others))
        return seed

    def _accumulate(self, s: Statement, operand: Access, g: Expr) -> None:
        """`X.grad[b] += g` over the loops of `s`."""
        name = operand.tensor
        if name in self.flat.inputs and name not in self.wrt:
            return
        if (
            name not in self.flat.inputs
            and not any(t.target.tensor == name for t in self.forward)
            and not any(t.target.tensor == name for t in statements(tuple(self.loops)))
        ):
            return
        if name not in self.grad:
            self._cotangent(name)
            plain = {i.name for i in operand.subscripts if isinstance(i, Index)}
            explicit = {r.index for r in s.ranges if r.lo is not None}
            if name not in self.flat.inputs and (len(plain) < len(operand.subscripts) or plain & explicit):
                self._zeros(name, self.grad[name], len(operand.subscripts), Const(0))  # an int: it raises no dtype
        target = Access(self.grad[name], operand.subscripts)
        self.out.append(Statement(self._ranges(s, target, g), target, "+=", g, s.span))

    # -- names and ranges ---------------------------------------------------------------------------------------------

    def _cotangent(self, tensor: str, external: str | None = None) -> str:
        name = fresh_name(f"{external or tensor}.grad", self.taken)
        self.taken.add(name)
        self.grad[tensor] = name
        return name

    def _zeros(self, tensor: str, grad: str, rank: int, zero: Const = ZERO) -> None:
        indices = tuple(Index(f"n{d}") for d in range(rank))
        ranges = tuple(Range(i.name, Const(0), Size(tensor, d)) for d, i in enumerate(indices))
        self.out.append(Statement(ranges, Access(grad, indices), "=", zero))

    def _ranges(self, s: Statement, target: Access, value: Expr) -> tuple[Range, ...]:
        """The loops of `s` for a new statement: explicit where the operand that settled an index is no longer read."""
        sized = {o.name for o in self.flat.outputs if o.sizes is not None}
        grads = {self.grad[t] for t in self.grad}
        result = []
        for r in s.ranges:
            before = witness(r.index, s.value, *s.target.subscripts)
            after = witness(r.index, value, *target.subscripts)
            trusted = after is not None and (after.tensor not in grads or s.target.tensor not in sized)
            if r.lo is None and before is not None and not trusted:
                r = replace(r, lo=Const(0), hi=before)
            result.append(r)
        return tuple(result)

    def _dims(self, tensor: str, external: Output) -> tuple[str, ...]:
        """Names for the sizes of an output's cotangent: those of the inputs where the output's sizes are theirs."""
        names = {Size(p.name, d): dim for p in self.program.params for d, dim in enumerate(p.dims)}
        used = set(names.values())
        definition = next((s for s in statements(self.flat.body) if s.target.tensor == tensor), None)
        if definition is None:  # an output that is an input, unchanged
            return next(p.dims for p in self.program.params if p.name == tensor)
        result = []
        for d, subscript in enumerate(definition.target.subscripts):
            size: Expr | None = external.sizes[d] if external.sizes is not None else None
            explicit = external.sizes is not None
            if not explicit and isinstance(subscript, Index):
                settled = any(r.index == subscript.name and r.lo is None for r in definition.ranges)
                size = witness(subscript.name, definition.value) if settled else None
            known = names.get(size) if isinstance(size, Size) else None
            wanted = subscript.name if isinstance(subscript, Index) else "n"
            result.append(known or fresh_name(wanted, used))
            used.add(result[-1])
        return tuple(result)


def _push(expr: Expr, g: Expr, guards: tuple[Expr, ...], y: Expr | None = None) -> Iterator[tuple[Access, Expr]]:
    """(operand, its cotangent) for every occurrence of an operand in `expr`, whose own cotangent is `g`.

    guards: the conditions under which the occurrence counts; they are applied outside of everything, so that a NaN
    of a branch that was not taken never reaches a sum. y: an access that holds the value of `expr`, if any.
    """
    match expr:
        case Access():
            for condition in reversed(guards):
                g = Call("where", (condition, g, Const(0)))
            yield expr, g
        case Call(op="where", args=(condition, a, b)):
            yield from _push(a, g, (*guards, condition))
            yield from _push(b, g, (*guards, Call("not", (condition,))))
        case Call(op="mul"):  # the swap itself: the factor's place is taken by the cotangent
            factors = list(_factors(expr))
            for n, factor in enumerate(factors):
                yield from _push(factor, _product([*factors[:n], g, *factors[n + 1 :]]), guards)
        case Call(op=op) if op in OPS:
            for n, arg in enumerate(expr.args):
                part = cotangent(expr, n, g, expr if y is None else y)
                if part is not None:
                    yield from _push(arg, part, guards)
        case _:
            return


def _factors(expr: Expr) -> Iterator[Expr]:
    if isinstance(expr, Call) and expr.op == "mul":
        for arg in expr.args:
            yield from _factors(arg)
    else:
        yield expr


def _product(factors: list[Expr]) -> Expr:
    result = factors[0]
    for factor in factors[1:]:
        result = Call("mul", (result, factor))
    return result
