"""Prints a program as the loops that it means: Python text over NumPy arrays, one scalar at a time.

    for i, k:  Y[i] += A[i,k] * x[k]      -->      for i in range(4):
                                                       for k in range(3):
                                                           Y[i] += A[i, k] * x[k]

It decides nothing: sizes, ranges and dtypes are those of `infer`; what inference could not prove calls `check` at run time.
"""

from __future__ import annotations

import keyword
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import numpy as np

from tdsl.affine import Bound
from tdsl.dtypes import dtype_of
from tdsl.infer import Inferred, reductions
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
    Reduce,
    Size,
    Softmax,
    Statement,
    fresh_name,
    rebuild,
    rebuild_range,
    statements,
    walk,
)
from tdsl.ops import DTYPES, OPS
from tdsl.printer import print_statement

_FAMILY = {"float": "np.float64", "int": "np.int64", "bool": "np.bool_"}
_WORDS = frozenset(
    {*keyword.kwlist, "np", "math", "range", "reversed", "min", "max", "abs", "float", "int", "bool", "set", "check", "seen"}
)
_ATOM = re.compile(r"[\w.]+(\[[^()]*\])?")


class LoopPrinter:
    """Prints one program. An expression's text may need lines before it (inner loops); they are appended as it is built."""

    def __init__(self, program: Program, inferred: Inferred):
        self.program = program = _distinct(program)
        self.inferred = inferred
        self.places: list[Access | Expr] = []
        self.lines: list[str] = []
        self.depth = 1
        self.dtypes = {name: inferred.dtypes[name] for name in program.inputs}
        self.ranks = inferred.ranks
        self.names = _identifiers([*program.inputs, *(s.target.tensor for s in statements(program.body))])
        self.taken = {*_WORDS, *self.names.values()}
        self.inner = _by_identity(program, inferred)
        self.unproved = {(c.statement, _comparable(c.access, inferred), c.dimension) for c in inferred.checks if c.kind == "bounds"}
        self.repeated = {c.statement for c in inferred.checks if c.kind == "injective"}
        self.older: dict[str, str] = {}  # the name of what a target was before its statement, where a softmax reads it
        self.number = 0
        self.ranges: dict[str, tuple[Bound, Bound]] = {}
        self.scope: dict[str, str] = {}  # index -> the Python name of its loop
        self.integer = False
        for node in program.body:
            self._node(node)
        results = ", ".join(self.names[name] for name in program.results)
        self.name = fresh_name(re.sub(r"\W", "_", program.name), _WORDS)
        head = f"def {self.name}({', '.join([*(self.names[name] for name in program.inputs), *(['check'] if self.places else [])])}):"
        self.text = "\n".join([head, *self.lines, f"    return ({results},)", ""])

    def emit(self, line: str) -> None:
        self.lines.append("    " * self.depth + line)

    def fresh(self, name: str) -> str:
        found = fresh_name(name, self.taken)
        self.taken.add(found)
        return found

    # -- statements ---------------------------------------------------------------------------------------------------

    def _node(self, node: Statement | Loop) -> None:
        numbers = range(self.number, self.number + sum(1 for _ in statements((node,))))
        self._allocate(list(zip(statements((node,)), numbers, strict=True)))
        self.emit(f"# {_comment(node)}")
        self._body(node)

    def _allocate(self, written: list[tuple[Statement, int]]) -> None:
        """Gives each target its array: new, or a copy of the input, or of the older version in another dtype."""
        last = {s.target.tensor: self.inferred.written[number] for s, number in written}
        for s, _ in written:
            name = s.target.tensor
            if name not in last:
                continue
            dtype = last.pop(name)
            family = _FAMILY[DTYPES[dtype].kind]
            if name not in self.dtypes:
                start, shape = _identity(s.op, dtype), self.inferred.shapes[name]
                new = f"np.zeros({shape}" if start == "0" else f"np.full({shape}, {start}"
                self.emit(f"{self.names[name]} = {new}, dtype={family})")
            elif name in self.program.inputs or _FAMILY[DTYPES[self.dtypes[name]].kind] != family:
                self.emit(f"{self.names[name]} = {self.names[name]}.astype({family})")
            self.dtypes[name] = dtype
            self.ranks[name] = len(s.target.subscripts)

    def _body(self, node: Statement | Loop) -> None:
        outer = dict(self.scope), self.ranges, self.depth, self.taken
        self.taken = set(self.taken)
        self.ranges = self.inferred.ranges[self.number]
        once = isinstance(node, Statement) and self.number in self.repeated
        if once:
            self.emit("seen = set()")
        name = node.target.tensor if isinstance(node, Statement) else ""
        if isinstance(node, Statement) and any(isinstance(e, Softmax) and name in _tensors(e) for e in walk(node.value)):
            self.older[name] = self.fresh(f"older_{self.names[name]}")  # it goes over elements that the loops have written already
            self.emit(f"{self.older[name]} = {self.names[name]}.copy()")
        for r in node.ranges:
            self._for(r, self.ranges)
        if isinstance(node, Loop):
            for child in node.body:
                self._body(child)
        else:
            self._assign(node, once)
            self.number += 1
            self.older.pop(name, None)
        self.scope, self.ranges, self.depth, self.taken = outer

    def _for(self, r: Range, ranges: Mapping[str, tuple[Bound, Bound]]) -> str:
        lo, hi = (str(b) if isinstance(b, int) else self.subscript(b) for b in ranges[r.index])
        steps = f"range({hi})" if lo == "0" else f"range({lo}, {hi})"
        name = self.fresh(r.index)
        self.emit(f"for {name} in {f'reversed({steps})' if r.order == 'reversed' else steps}:")
        self.scope[r.index] = name
        self.depth += 1
        return name

    def _assign(self, s: Statement, once: bool) -> None:
        subscripts, conditions = self._place(s.target)
        target = f"{self.names[s.target.tensor]}[{', '.join(subscripts) or '()'}]"
        if conditions:
            self.emit(f"if {' and '.join(conditions)}:")
            self.depth += 1
        if once:
            self.emit(f"check.once(seen, ({', '.join(subscripts)},), {self._number(s.target)})")
        value = _bare(self.expr(s.value))
        if s.op in ("max=", "min="):
            self.emit(f"{target} = np.{'maximum' if s.op == 'max=' else 'minimum'}({target}, {value})")
        else:
            self.emit(f"{target} {s.op} {value}")

    def _number(self, e: Access | Expr) -> int:
        self.places.append(e)
        return len(self.places) - 1

    # -- accesses -----------------------------------------------------------------------------------------------------

    def _place(self, access: Access) -> tuple[list[str], list[str]]:
        """The subscripts of an access, and the conditions under which it lies inside (for those with pad)."""
        subscripts, conditions = [], []
        key = _comparable(access, self.inferred)
        for dim, s in enumerate(access.subscripts):
            size = self.inferred.shapes[access.tensor][dim]
            text = self.subscript(s.value if isinstance(s, Pad | Clamp) else s)
            if isinstance(s, Pad):
                conditions.append(f"0 <= {f'({text})' if ' if ' in text else text} < {size}")
            elif isinstance(s, Clamp):
                text = f"min(max({text}, 0), {size - 1})"
            if (self.number, key, dim) in self.unproved:
                text = f"check.at({text}, {size}, {self._number(access)})"
            subscripts.append(text)
        return subscripts, conditions

    def subscript(self, e: Expr) -> str:
        """The text of an integer expression, with Python's own // and %."""
        before, self.integer = self.integer, True
        text = _bare(self.expr(e))
        self.integer = before
        return text

    # -- expressions --------------------------------------------------------------------------------------------------

    def expr(self, e: Expr) -> str:
        match e:
            case Const(value=value):
                return _number(value)
            case Index(name=name):
                return self.scope[name]
            case Size(tensor=name, dim=dim):
                return str(self.inferred.shapes[name][dim])
            case Access():
                subscripts, conditions = self._place(e)
                text = f"{self.names[e.tensor]}[{', '.join(subscripts) or '()'}]"
                return f"({text} if {' and '.join(conditions)} else {self._zero(e)})" if conditions else text
            case Call(op="where"):
                return self._where(e)
            case Call():
                return self._call(e)
            case Reduce():
                return self._reduce(e)
            case Softmax():
                return self._softmax(e)
        raise AssertionError(f"{e} stands where only subscripts stand")

    def _kind(self, e: Expr) -> str:
        return DTYPES[dtype_of(e, self.dtypes, self.ranks)[0]].kind

    def _zero(self, e: Expr) -> str:
        return {"float": "0.0", "int": "0", "bool": "False"}[self._kind(e)]

    def _call(self, e: Call) -> str:
        op = OPS[e.op]
        if self.integer and e.op in ("floordiv", "mod"):
            return f"({self.expr(e.args[0])} {'//' if e.op == 'floordiv' else '%'} {self.expr(e.args[1])})"
        args = []
        bools = [self._kind(arg) == "bool" for arg in e.args]
        for n, arg in enumerate(e.args):
            text = self.expr(arg)
            if bools[n] and op.kind == "float":
                text = f"float({_bare(text)})"
            elif op.kind == "same" and all(bools) and e.op != "stop_gradient":
                text = f"int({_bare(text)})"
            if op.numpy.count(f"{{{n}}}") > 1 and not _ATOM.fullmatch(text):
                text = self._keep(text)
            args.append(text)
        text = op.numpy.format(*args)
        return f"bool({_bare(text)})" if op.kind == "same" and all(bools) else text

    def _keep(self, text: str) -> str:
        name = self.fresh("t")
        self.emit(f"{name} = {_bare(text)}")
        return name

    def _where(self, e: Call) -> str:
        """Only the branch that is taken is evaluated."""
        condition = self.expr(e.args[0])
        texts, blocks = [], []
        lines = self.lines
        self.depth += 1
        for branch in e.args[1:]:
            self.lines = []
            texts.append(self.expr(branch))
            blocks.append(self.lines)
        self.depth -= 1
        self.lines = lines
        if not any(blocks):
            return OPS["where"].numpy.format(condition, *texts)
        name = self.fresh("t")
        for head, block, text in zip((f"if {_bare(condition)}:", "else:"), blocks, texts, strict=True):
            self.emit(head)
            self.lines += block
            self.depth += 1
            self.emit(f"{name} = {_bare(text)}")
            self.depth -= 1
        return name

    # -- reductions ---------------------------------------------------------------------------------------------------

    def _nest(self, e: Reduce, step: Callable[[str], None]) -> None:
        self._loops(e.ranges, self.inner[id(e)], e.body, step)

    def _loops(self, loops: tuple[Range, ...], found: Mapping[str, tuple[Bound, Bound]], body: Expr, step: Callable[[str], None]) -> None:
        """The loops of a reduction around the lines that `step` emits for one term."""
        scope, ranges, depth = dict(self.scope), self.ranges, self.depth
        for r in loops:
            self._for(r, found)
            self.ranges = {**self.ranges, r.index: found[r.index]}
        step(self.expr(body))
        self.scope, self.ranges, self.depth = scope, ranges, depth

    def _reduce(self, e: Reduce) -> str:
        return getattr(self, f"_{_METHODS.get(e.op, e.op)}")(e)  # type: ignore[no-any-return]

    def _start(self, name: str, value: str) -> str:
        found = self.fresh(name)
        self.emit(f"{found} = {value}")
        return found

    def _accumulate(self, e: Reduce) -> str:
        kind = self._kind(e)
        empty = {"sum": "0", "prod": "1"}[e.op] + (".0" if kind == "float" else "")
        total = self._start(e.op, empty if e.init is None else _bare(self.expr(e.init)))
        self._nest(e, lambda term: self.emit(f"{total} = {total} {'+' if e.op == 'sum' else '*'} {term}"))
        return total

    def _extremum(self, e: Reduce) -> str:
        best = self._start(e.op, "None" if e.init is None else _bare(self.expr(e.init)))

        def step(term: str) -> None:
            joined = f"np.{e.op}imum({best}, {_bare(term)})"
            self.emit(f"{best} = {joined}" if e.init is not None else f"{best} = {term} if {best} is None else {joined}")

        self._nest(e, step)
        if e.init is None:
            self._demand(best, e)
        return best

    def _demand(self, name: str, e: Reduce) -> None:
        self.emit(f"if {name} is None:")
        self.emit(f"    check.nothing({self._number(e)})")

    def _mean(self, e: Reduce) -> str:
        total, count = self._start("sum", "0.0"), self._start("count", "0")

        def step(term: str) -> None:
            self.emit(f"{total}, {count} = {total} + {term}, {count} + 1")

        self._nest(e, step)
        self.emit(f"if {count} == 0:")
        self.emit(f"    check.nothing({self._number(e)})")
        return self._start("mean", f"np.divide({total}, {count})")

    def _var(self, e: Reduce) -> str:
        mean = self._mean(e)
        total, count = self._start("squares", "0.0"), self._start("count", "0")

        def step(term: str) -> None:
            self.emit(f"{total}, {count} = {total} + ({term} - {mean}) * ({term} - {mean}), {count} + 1")

        self._nest(e, step)
        return self._start("var", f"np.divide({total}, {count})")

    def _logsumexp(self, e: Reduce) -> str:
        total = self._start("logsumexp", "-np.inf" if e.init is None else _bare(self.expr(e.init)))
        self._nest(e, lambda term: self.emit(f"{total} = np.logaddexp({total}, {_bare(term)})"))
        return total

    def _arg(self, e: Reduce) -> str:
        """The first position of the extremum; a NaN is the extremum, as in NumPy and torch."""
        best, position = self._start("best", "None"), self._start(e.op, "None")
        found = self.inner[id(e)]

        def step(term: str) -> None:
            value = self._keep(term)
            flat = self.scope[e.ranges[0].index]
            for r in e.ranges[1:]:
                lo, hi = (b if isinstance(b, int) else self.subscript(b) for b in found[r.index])
                flat = f"({flat}) * ({hi} - {lo}) + {self.scope[r.index]}"
            less = "<" if e.op == "argmin" else ">"
            self.emit(f"if {best} is None or {value} {less} {best} or ({value} != {value} and {best} == {best}):")
            self.emit(f"    {best}, {position} = {value}, {flat}")

        self._nest(e, step)
        self._demand(position, e)
        return position

    def _softmax(self, e: Softmax) -> str:
        names, self.names = self.names, {**self.names, **self.older}
        over, found = tuple(Range(name) for name in self.ranges if name in e.over), self.ranges
        top, total = self._start("top", "-np.inf"), self._start("sum", "0.0")
        self._loops(over, found, e.body, lambda term: self.emit(f"{top} = np.maximum({top}, {_bare(term)})"))
        self._loops(over, found, e.body, lambda term: self.emit(f"{total} = {total} + np.exp({term} - {top})"))
        value = f"np.divide(np.exp({self.expr(e.body)} - {top}), {total})"
        self.names = names
        return self._start("softmax", value)


_METHODS = {"sum": "accumulate", "prod": "accumulate", "max": "extremum", "min": "extremum", "argmax": "arg", "argmin": "arg"}


def _tensors(e: Expr) -> set[str]:
    return {a.tensor for a in walk(e) if isinstance(a, Access)}


def _identifiers(names: Iterable[str]) -> dict[str, str]:
    """A Python name for every tensor: `Y.grad` is Y_grad."""
    taken = set(_WORDS)
    result: dict[str, str] = {}
    for name in names:
        if name not in result:
            result[name] = fresh_name(name.replace(".", "_"), taken)
            taken.add(result[name])
    return result


def _distinct(program: Program) -> Program:
    """The same program with a new object for every reduction, also where one object stood in two places."""

    def visit(e: Expr) -> Expr:
        return rebuild(e, visit)

    def node(n: Statement | Loop) -> Statement | Loop:
        ranges = tuple(rebuild_range(r, visit) for r in n.ranges)
        if isinstance(n, Loop):
            return replace(n, ranges=ranges, body=tuple(node(child) for child in n.body))
        target = visit(n.target)
        assert isinstance(target, Access)
        return replace(n, ranges=ranges, target=target, value=visit(n.value))

    return replace(program, body=tuple(node(n) for n in program.body))


def _by_identity(program: Program, inferred: Inferred) -> dict[int, dict[str, tuple[Bound, Bound]]]:
    return {id(e): found for e, found in zip(reductions(program), inferred.inner, strict=True)}


def _comparable(access: Access, inferred: Inferred) -> Expr:
    """An access as checks and statements both spell it: indices without the marks of hidden ones."""

    def visit(e: Expr) -> Expr:
        return Index(e.name.rstrip("'")) if isinstance(e, Index) else rebuild(e, visit)

    return visit(access)


def _identity(op: str, dtype: str) -> str:
    kind = DTYPES[dtype].kind
    if op in ("max=", "min="):
        low = op == "max="
        if kind == "int":
            info = np.iinfo(dtype)
            return str(info.min if low else info.max)
        return str(not low) if kind == "bool" else "-np.inf" if low else "np.inf"
    return "1" if op == "*=" else "0"


def _number(value: bool | int | float) -> str:
    if isinstance(value, float) and (math.isinf(value) or math.isnan(value)):
        return "np.nan" if math.isnan(value) else "np.inf" if value > 0 else "(-np.inf)"
    return f"({value!r})" if value < 0 or repr(value).startswith("-") else repr(value)


def _bare(text: str) -> str:
    """`text` without parentheses around the whole of it."""
    if not (text.startswith("(") and text.endswith(")")):
        return text
    depth = 0
    for n, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0 and n < len(text) - 1:
            return text
    return text[1:-1]


def _comment(node: Statement | Loop) -> str:
    return print_statement(node).replace("\n", "\n    # ")
