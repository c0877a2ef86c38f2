"""Forward mode on the IR: beside every statement stands one that carries tangents, over the same loops.

    for h, i, j, k:  Y[h,i,j] += A[h,i,k] * B[h,j,k]
    -->
    for h, i, j, k:  Y.dot[h,i,j] += A.dot[h,i,k] * B[h,j,k]
    for h, i, j, k:  Y.dot[h,i,j] += A[h,i,k] * B.dot[h,j,k]

The derivatives are those of ops.py: a formula that is linear in the cotangent g of a result is the tangent of the result
when g is the tangent of the argument. An order of loops stays as it is: a tangent is made when its value is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tdsl.affine import Bound
from tdsl.declared import declared, fill
from tdsl.differential import differential, products
from tdsl.errors import ArgumentError, Unsupported
from tdsl.expand import expand
from tdsl.extents import Sizes, as_expr, loop_ranges, symbolic_ranges
from tdsl.ir import (
    REDUCTION_OF,
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
    Size,
    Statement,
    bounds,
    free_indices,
    fresh_name,
    reads,
    statements,
)
from tdsl.ops import REDUCTIONS
from tdsl.products import others
from tdsl.recurrence import Recurrence
from tdsl.simplify import simplify, simplify_expr
from tdsl.ssa import ssa
from tdsl.swap import differentiable

# Integers raise no dtype.
ZERO, ONE = Const(0), Const(1)
_BINARY = {"max=": "maximum", "min=": "minimum", "*=": "mul"}


def tangent(program: Program, wrt: Sequence[str] | None = None) -> Program:
    """The program whose inputs are those of `program`, then `A.dot` for each differentiable input (or those named in `wrt`, in
    the order of the inputs), and whose outputs are the tangents `Y.dot` of the outputs, and not the outputs themselves.

    A tangent has the shape of what it belongs to; a name that is taken gets a number. Outputs that no tangent reaches (integers,
    comparisons, stop_gradient) have zeros, in torch's default dtype. `max=` gives the mean of the tangents of the tied terms, `*=` is right with zeros.
    Raises ArgumentError for a name in `wrt` that is no input, or an integer one; Unsupported for a maximum that runs over an
    ordered loop. Source: forward accumulation, Griewank and Walther, Evaluating Derivatives, chapter 3.

    >>> from tdsl.text import parse
    >>> print(tangent(parse("Y[i] += A[i,k] * x[k]"), ["x"]))
    def Y_jvp(A[i,k], x[k], x.dot[k]) -> Y.dot:
        for i, k:  Y.dot[i] += A[i,k] * x.dot[k]
    """
    return simplify(_Forward(program, wrt).run())


class _Forward:
    def __init__(self, program: Program, wrt: Sequence[str] | None):
        self.program = program
        possible = differentiable(program)
        for name in wrt or ():
            if name not in possible:
                what = "is used as a subscript, a bound or a size" if name in program.inputs else "is no input"
                raise ArgumentError(f"no tangent of {name}: it {what}", help=f"inputs with a tangent: {', '.join(possible) or 'none'}")
        self.wrt = tuple(name for name in possible if wrt is None or name in wrt)
        if not self.wrt:
            raise ArgumentError(
                f"{program.name} has no input that could have a tangent", help="inputs used as a subscript, a bound or a size have none"
            )
        own = [c.name for c in program.custom]
        if own:
            raise Unsupported(
                f"forward mode of {program.name}, whose gradient {own[0]} was written by hand (tangent)",
                help="the tangent would not be its transpose; take jvp() before define_grad()",
            )
        self.flat = ssa(expand(program))
        self.taken = {*self.flat.inputs, *(s.target.tensor for s in statements(self.flat.body))}
        self.writes: dict[str, list[Statement]] = {}
        for s in statements(self.flat.body):
            self.writes.setdefault(s.target.tensor, []).append(s)
        self.dots: dict[str, str] = {}  # tensor -> name of its tangent, for those that have one
        self.made: set[str] = set()  # the tensors whose tangent was written already
        self.sizes = Sizes(self.flat)
        self.recurrence: Recurrence | None = None
        self.around: dict[str, tuple[Bound, Bound]] = {}  # the indices of the ordered loops around
        self.before: list[Statement] = []  # what a loop needs before it

    def run(self) -> Program:
        dims = {p.name: p.dims for p in self.program.params}
        params = [*self.program.params, *(Param(self._name(name), dims[name]) for name in self.wrt)]
        pairs = list(zip(self.program.outputs, self.flat.outputs, strict=True))
        names = {o.name: self._fresh(f"{external.name}.dot") for external, o in pairs}
        for name in self._reached():
            self._name(name, names.get(name))
        for name, dot in self.dots.items():
            if name in self.sizes.declared:
                self.sizes.shapes[dot] = self.sizes.shapes[name]
        body: list[Statement | Loop] = list(declared(self.flat, self.sizes))
        for node in self.flat.body:
            body += self._loop_node(node) if isinstance(node, Loop) else self._statement(node)
        for name, dot in names.items():
            if self.dots.get(name) != dot:  # no tangent reaches it
                body.append(self._fill(name, dot, Const(0.0)))
        outputs = tuple(Output(names[o.name], external.sizes) for external, o in pairs)
        return Program(f"{self.program.name}_jvp", tuple(params), outputs, tuple(body))

    def _fresh(self, name: str) -> str:
        name = fresh_name(name, self.taken)
        self.taken.add(name)
        return name

    def _name(self, tensor: str, name: str | None = None) -> str:
        self.dots[tensor] = name or self._fresh(f"{tensor}.dot")
        return self.dots[tensor]

    def _reached(self) -> tuple[str, ...]:
        """The tensors that the tangents of `wrt` reach, in the order of their first writes."""
        reached = dict.fromkeys(self.wrt)
        known = -1
        while known < len(reached):
            known = len(reached)
            names = {name: name for name in reached}
            reached.update(dict.fromkeys(name for name, writes in self.writes.items() if any(differential(s.value, names) for s in writes)))
        return tuple(name for name in self.writes if name in reached)

    def _fill(self, shape_of: str, name: str, value: Const) -> Statement:
        return fill(name, self.sizes.shapes[shape_of], value)

    # -- loops --------------------------------------------------------------------------------------------------------

    def _loop_node(self, loop: Loop) -> list[Statement | Loop]:
        """An outermost ordered loop, and before it the zeros from which running products start."""
        earlier = self.flat.body[: next(n for n, node in enumerate(self.flat.body) if node is loop)]
        self.recurrence = Recurrence(loop, self.sizes, tuple(statements(earlier)))
        self.sizes.note(loop)
        self.before = []
        result = self._loop(loop)
        self.recurrence = None
        return [*self.before, result]

    def _loop(self, loop: Loop) -> Loop:
        around, before = self.around, loop_ranges(loop, self.sizes)
        self.around = {**around, **before}
        body: list[Statement | Loop] = []
        for child in loop.body:
            body += [self._loop(child)] if isinstance(child, Loop) else self._statement(child)
        self.around = around
        carried = set(self.dots.values())
        left = Loop(loop.ranges, tuple(s for s in statements(tuple(body)) if s.target.tensor in carried))
        after = loop_ranges(left, self.sizes)  # the statements that settled an index may be dropped
        ranges = tuple(
            r if r.lo is not None or r.index not in before or after.get(r.index) == before[r.index] else _settled(r, before[r.index])
            for r in loop.ranges
        )
        return replace(loop, ranges=ranges, body=tuple(body))

    # -- statements ---------------------------------------------------------------------------------------------------

    def _statement(self, s: Statement) -> list[Statement]:
        """A statement with those of its tangent, before it where they read what it overwrites."""
        name = s.target.tensor
        self.sizes.note(s, self.around)
        result = [s] if name not in self.dots else self._alone(s) if s.op in ("=", "+=") else self._combining(s)
        if name in self.dots:
            self.made.add(name)
            self.sizes.shapes[self.dots[name]] = self.sizes.shapes[name]
        return result

    def _alone(self, s: Statement) -> list[Statement]:
        """The rule of `=` and `+=`, where each term has its own part in the tangent."""
        overwrites = any(a.tensor == s.target.tensor for a in reads(s))
        y = s.target if s.op == "=" and len(self.writes[s.target.tensor]) == 1 and not overwrites else None
        g = differential(s.value, self.dots, y)
        if g is None:
            new = [] if s.op == "+=" and s.target.tensor in self.made else [self._zero(s)]
        else:
            new = [self._carrying(s, s.op, term) for term in (products(g) if s.reduced else [g])]
        return [*new, s] if overwrites else [s, *new]

    def _zero(self, s: Statement) -> Statement:
        """The tangent of a write that none reaches: it cuts (`=`), or gives the tangent its size."""
        new = self._carrying(s, "=" if s.op == "=" else "+=", ZERO)
        used = {*free_indices(s.target), *(i for e in bounds(s.ranges) for i in free_indices(e))}
        return replace(new, ranges=tuple(r for r in new.ranges if r.index in used))

    def _carrying(self, s: Statement, op: str, value: Expr) -> Statement:
        target = replace(s.target, tensor=self.dots[s.target.tensor])
        return replace(s, ranges=self._ranges(s, target, value), target=target, op=op, value=simplify_expr(value))

    def _ranges(self, s: Statement, target: Access, value: Expr) -> tuple[Range, ...]:
        """The loops of `s` for a new statement: explicit where what settled an index is no longer read."""
        before = symbolic_ranges(s, self.sizes, self.around)
        after = symbolic_ranges(replace(s, target=target, value=value), self.sizes, self.around)
        return tuple(
            r if r.lo is not None or r.index not in before or after.get(r.index) == before[r.index] else _settled(r, before[r.index])
            for r in s.ranges
        )

    # -- products, maxima and minima ----------------------------------------------------------------------------------

    def _combining(self, s: Statement) -> list[Statement]:
        """The rule of `*=`, `max=` and `min=`, where the terms of one element have a part in each other's."""
        name = s.target.tensor
        own = self.recurrence is None or self.recurrence.once(s)
        g = differential(s.value, self.dots)
        if s is self.writes[name][0] and own:
            if g is None:
                return [s, self._zero(s)]
            return self._product(s, g) if s.op == "*=" else self._extremum(s, g)
        if s.op == "*=":
            return self._scaled(s, g)
        if not own:
            raise Unsupported(
                f"the tangent of a `{s.op}` that runs over the steps of an ordered loop (tangent)",
                span=s.span,
                help=f"give {name} the loop's index as a further subscript, and write it with `=` and {_BINARY[s.op]}(..)",
            )
        return self._joined(s)

    def _product(self, s: Statement, g: Expr) -> list[Statement]:
        """Each term's tangent times the product of the other terms."""
        rest = self._others(s)
        if rest is None:
            return [s, self._carrying(s, "=", g)]
        return [s, *self._sized(s, self.dots[s.target.tensor]), self._carrying(s, "+=", Call("mul", (g, rest)))]

    def _sized(self, s: Statement, name: str) -> list[Statement]:
        """Zeros in `name`, of the size of the target of `s`, where the subscripts of `s` alone would not tell it."""
        plain = all(isinstance(e, Index) for e in s.target.subscripts)
        return [] if plain or self.recurrence is not None or name in self.sizes.shapes else [self._fill(s.target.tensor, name, ZERO)]

    def _scaled(self, s: Statement, g: Expr | None) -> list[Statement]:
        """`T[a] *= f` onto an older version: `T.dot[a] *= f; T.dot[a] += T[a] * df`, both before it."""
        name = s.target.tensor
        if any(a.tensor == name for a in reads(s)):
            raise Unsupported(
                f"the tangent of a `*=` that reads {name}, its own target (tangent)",
                span=s.span,
                help="write the factor to a tensor of its own before",
            )
        if name not in self.made:
            if any(isinstance(size, Size) and size.tensor == name for size in self.sizes.shapes[name]):
                raise Unsupported(
                    f"the size of {name}, a product that runs over an ordered loop, is not known before it (tangent)",
                    span=s.span,
                    help=f"write `{name}[..] = 1` before the loop",
                )
            self.before.append(self._fill(name, self.dots[name], ZERO))
        new = [self._carrying(s, "*=", s.value)]
        if g is not None:
            rest = self._others(s)
            value = Call("mul", (s.target, g))
            new.append(self._carrying(s, "+=", value if rest is None else Call("mul", (value, rest))))
        return [*new, s]

    def _others(self, s: Statement) -> Expr | None:
        return others(s, self._ranges(s, s.target, s.value), self.around)

    def _extremum(self, s: Statement, g: Expr) -> list[Statement]:
        """The tied terms' tangents, each divided by the number of the tied."""
        plain = {e.name for e in s.target.subscripts if isinstance(e, Index)}
        if plain >= set(s.indices):
            return [s, self._carrying(s, "=", g)]
        ties = replace(s.target, tensor=self._fresh(f"{s.target.tensor}.ties"))
        hit = Call("eq", (s.value, s.target))
        count = Call("where", (hit, ONE, ZERO))
        counted = replace(s, ranges=self._ranges(s, ties, count), target=ties, op="+=", value=count)
        carried = self._carrying(s, "+=", Call("where", (hit, Call("div", (g, ties)), ZERO)))
        return [s, *self._sized(s, ties.tensor), counted, *self._sized(s, carried.target.tensor), carried]

    def _joined(self, s: Statement) -> list[Statement]:
        """`T[a] max= f` onto an older version: `T.part[a] max= f; T[a] = maximum(T[a], T.part[a])`, and the rules of these."""
        name = s.target.tensor
        plain = {e.name for e in s.target.subscripts if isinstance(e, Index)}
        result: list[Statement] = []
        value, ranges, target = s.value, s.ranges, s.target
        if not plain >= set(s.indices):
            part = self._fresh(f"{name}.part")
            term = replace(s, target=replace(s.target, tensor=part))
            if set(free_indices(s.target)) - plain:  # several terms may meet in an element that only the values tell
                if self.recurrence is not None:
                    raise Unsupported(f"the tangent of a scattering `{s.op}` inside an ordered loop (tangent)", span=s.span)
                result.append(self._fill(name, part, Const(REDUCTIONS[REDUCTION_OF[s.op]].identity)))
                self.sizes.note(result[0])
                whole = self._fill(name, name, ZERO)
                ranges, target = whole.ranges, whole.target
            else:
                ranges = tuple(r for r in self._ranges(s, s.target, ZERO) if r.index not in s.reduced)
            self.writes[part] = [term]
            if differential(s.value, self.dots) is not None:
                self._name(part)
            result += self._statement(term)
            value = replace(target, tensor=part)
        joined = replace(s, ranges=ranges, target=target, op="=", value=Call(_BINARY[s.op], (target, value)))
        return result + self._alone(joined)


def _settled(r: Range, limits: tuple[Bound, Bound]) -> Range:
    return replace(r, lo=as_expr(limits[0]), hi=as_expr(limits[1]))
