"""Prints the tile IR as torch code: whole tensors where a tile is a whole axis, blocks of them where it is not.

The code is made for exact shapes and strides, so sizes stand in it as numbers. A temporary that nothing reads again is
overwritten in place. Tensors that a kernel defines whole are returned as they are; others are given to it to write into.
"""

from __future__ import annotations

from collections import Counter

from lowering import tile_ir as ir
from lowering.reducing import identity
from lowering.torch_convolution import convolution
from lowering.torch_memory import Memory, literal_shape, number_text
from tdsl.ir import free_indices
from tdsl.ops import DTYPES, OPERATORS, OPS, REDUCTIONS

_UNARY_IN_PLACE = ("exp", "exp2", "log", "log1p", "expm1", "sqrt", "rsqrt", "sin", "cos", "tanh", "sigmoid", "relu", "erf", "abs")
_ARITHMETIC = {"add", "sub", "mul", "div", "neg"}
_IN_PLACE = {
    "add": "{0}.add_({1})", "sub": "{0}.sub_({1})", "mul": "{0}.mul_({1})", "div": "{0}.div_({1})", "neg": "{0}.neg_()",
    **{op: f"torch.{op}_({{0}})" for op in _UNARY_IN_PLACE},
    "silu": "torch.nn.functional.silu({0}, inplace=True)",
}  # fmt: skip
_SWAPPED = {"add": "{1}.add_({0})", "mul": "{1}.mul_({0})", "sub": "torch.sub({0}, {1}, out={1})", "div": "torch.div({0}, {1}, out={1})"}


def torch_source(kernel: ir.Kernel, direct: frozenset[str], *, convolves: bool = False) -> str:
    """A Python function `kernel.name(*buffers)`. direct: tensors (by name in the program) that it defines whole and
    returns; all other buffers are its parameters, those that it writes among them. It returns the direct ones, in order.

    convolves: whether the library's convolutions are as exact as its products there, which on a GPU they need not be."""
    return _Printer(kernel, direct, convolves).run()


def parameters(kernel: ir.Kernel, direct: frozenset[str]) -> tuple[ir.Buffer, ...]:
    """The buffers that the function takes, in order."""
    return tuple(b for b in kernel.buffers if b.tensor not in direct)


class _Printer(Memory):
    def __init__(self, kernel: ir.Kernel, direct: frozenset[str], convolves: bool):
        super().__init__(kernel, direct)
        self.lines: list[str] = []
        self.ranges: set[str] = set()
        self.home: dict[str, int] = {}
        self.block = 0
        self.remaining: Counter[str] = Counter()
        self.pinned: set[str] = set()
        self.constants: dict[str, str] = {}
        for op in ir.operations(kernel.body):
            for v in _operands(op):
                self.remaining[v.name] += 1
            if isinstance(op, ir.Store | ir.Assign):
                self.pinned.add(op.src.name)
            plain = isinstance(op, ir.Elementwise) and op.op in _ARITHMETIC and any(isinstance(a, ir.Value) and a.axes for a in op.args)
            if isinstance(op, ir.Elementwise) and op.op not in DTYPES and not plain:
                self.called |= {a.name for a in op.args if isinstance(a, ir.Value)}
            if isinstance(op, ir.Load | ir.Store):
                self.pinned |= {i for e in op.subscripts for i in free_indices(e)}
        loads = {op.dst.name: op for op in ir.operations(kernel.body) if isinstance(op, ir.Load) and self.remaining[op.dst.name] == 1}
        dots = [op for op in ir.operations(kernel.body) if isinstance(op, ir.Dot) and convolves]
        found = {op.dst.name: convolution(op, loads, kernel, self.remaining.keys()) for op in dots}
        self.convolutions = {name: c for name, c in found.items() if c is not None}
        self.images = {c.image.dst.name: c for c in self.convolutions.values()}

    def run(self) -> str:
        blocked = [a for a in self.kernel.axes if a.role == "grid"]
        indent = "    "
        for axis in blocked:
            indent = self.open(axis, indent)
        self.emit(self.kernel.body, indent)
        names = ", ".join(b.name for b in parameters(self.kernel, self.direct))
        head = [f"def {self.kernel.name}({names}):"]
        head += [f"    # {line}" for line in self.kernel.notation.splitlines()]
        results = [b.name for b in self.kernel.buffers if b.tensor in self.direct]
        tail = [f"    return {', '.join(results)}"] if results else []
        body = self.lines or ["    pass"]
        return "\n".join([*(f"{name} = {text}" for text, name in self.constants.items()), *head, *body, *tail]) + "\n"

    # -- loops ------------------------------------------------------------------------------------------------------------

    def open(self, axis: ir.Axis, indent: str) -> str:
        """The head of a loop over the blocks of an axis."""
        (index, extent) = axis.indices[0]
        if axis.scalar:
            self.lines.append(f"{indent}for {index} in range({extent}):")
        else:
            self.lines.append(f"{indent}for {index}_start in range(0, {extent}, {axis.tile}):")
            self.lines.append(f"{indent}    {index}_stop = min({index}_start + {axis.tile}, {extent})")
        return indent + "    "

    def emit(self, body: tuple[ir.Operation, ...], indent: str) -> None:
        self.block += 1
        here = self.block
        ranges = set(self.ranges)
        for op in body:
            if isinstance(op, ir.For):
                inside = self.open(op.axis, indent)
                self.emit(op.body, inside)
                continue
            self.block = here
            for name in self._index_names(op):
                if name not in self.ranges and name not in self.values:
                    self.ranges.add(name)
                    self.lines.append(f"{indent}{name} = {self._arange(name)}")
            if isinstance(op, ir.Store):
                self.lines += [indent + line for line in self.store(op)]
            elif isinstance(op, ir.Assign):
                self.lines.append(f"{indent}{op.dst.name} = {op.src.name}")
            else:
                text = self.value(op)
                self.values[op.dst.name] = op.dst
                self.home.setdefault(op.dst.name, here)
                self.lines.append(f"{indent}{op.dst.name} = {text}")
            for v in _operands(op):
                self.remaining[v.name] -= 1
        self.ranges = ranges

    def _index_names(self, op: ir.Operation) -> list[str]:
        """The indices whose values an operation needs as a tensor."""
        if isinstance(op, ir.Load) and op.dst.name in self.images:
            return []
        if isinstance(op, ir.IndexOf):
            exprs = [op.expr]
        elif (isinstance(op, ir.Load) and not self._is_view(op.buffer, op.subscripts) and self._strided(op) is None) or (
            isinstance(op, ir.Store) and not (self._is_plain(op.subscripts) and op.mode in ("set", "add"))
        ):
            exprs = list(op.subscripts)
        else:
            return []
        return [i for e in exprs for i in free_indices(e) if i not in self.values and not self.kernel.axis_of(i).scalar]

    def _arange(self, index: str) -> str:
        start, stop = self.span(index)
        return f"torch.arange({start}, {stop})" if start != "0" else f"torch.arange({stop})"

    # -- values -----------------------------------------------------------------------------------------------------------

    def value(self, op: ir.Operation) -> str:
        match op:
            case ir.Load():
                return self.images[op.dst.name].source(self.kernel) if op.dst.name in self.images else self.load(op)
            case ir.IndexOf():
                return self.integer(op.expr, op.dst.axes)
            case ir.Elementwise():
                return self.elementwise(op)
            case ir.Full():
                self.owned.add(op.dst.name)
                return f"torch.full(({''.join(self.length(a) + ', ' for a in op.dst.axes)}), {number_text(op.fill)}, dtype=torch.{op.dst.dtype})"
            case ir.Mask():
                return op.src.name
            case ir.Fold():
                return self.fold(op)
            case ir.Dot():
                return self.dot(op)
        raise AssertionError(op)

    def elementwise(self, op: ir.Elementwise) -> str:
        row = OPS[op.op]
        if op.op in DTYPES:
            (source,) = op.args
            assert isinstance(source, ir.Value)
            if source.name in self.numbers:
                return f"torch.tensor({source.name}, dtype=torch.{op.dst.dtype})"
            self.owned.add(op.dst.name)
            return f"{source.name}.to(torch.{op.dst.dtype})"
        infix = op.op in _ARITHMETIC
        plain = [a for a in op.args if isinstance(a, ir.Value) and a.name not in self.numbers]
        if infix and not plain:
            self.numbers.add(op.dst.name)
        args = []
        for a in op.args:
            if isinstance(a, ir.Value):
                args.append(self.suffixed(a.name, a.axes, op.dst.axes))
            elif (
                infix
                or (op.op in OPERATORS and op.op not in ("and", "or", "not"))
                or (op.op == "where" and any(isinstance(x, ir.Value) for x in op.args[1:]))
            ):
                args.append(number_text(a))
            else:
                dtype = op.dst.dtype if row.kind != "bool" else "bool"
                args.append(self.constant(a, dtype))
        spelled = self._in_place(op)
        if spelled is None:
            self.owned.add(op.dst.name)
            if op.op == "div" and plain and op.args[0] not in plain:  # number / tensor is reciprocal() * number, which rounds twice
                return f"torch.div({args[0]}, {args[1]})"
            text = row.torch.format(*args)
            return text[1:-1] if text.startswith("(") and text.endswith(")") and op.op in OPERATORS else text
        return spelled.format(*args)

    def _in_place(self, op: ir.Elementwise) -> str | None:
        """The in-place spelling where an argument is a temporary that ends here."""
        for n, table in ((0, _IN_PLACE), (1, _SWAPPED)):
            if op.op in table and n < len(op.args):
                a = op.args[n]
                if (
                    isinstance(a, ir.Value)
                    and self._ends(a)
                    and (a.axes, a.dtype) == (op.dst.axes, op.dst.dtype)
                    and list(op.args).count(a) == 1
                ):
                    self.owned.discard(a.name)
                    self.owned.add(op.dst.name)
                    return table[op.op]
        return None

    def _ends(self, v: ir.Value) -> bool:
        alone = self.remaining[v.name] == 1 and v.name not in self.pinned and self.home.get(v.name) == self.block
        return alone and v.name in self.owned

    def constant(self, value: float | int | bool, dtype: str) -> str:
        """A 0-d tensor, made once per module."""
        text = f"torch.tensor({number_text(value)}, dtype=torch.{dtype})"
        return self.constants.setdefault(text, f"_{self.kernel.name}_c{len(self.constants)}")

    def fold(self, op: ir.Fold) -> str:
        dims = [op.src.axes.index(a) for a in op.axes]
        self.owned.add(op.dst.name)
        if any(self.kernel.axis(a).extent == 0 for a in op.axes):
            return f"torch.full(({''.join(self.length(a) + ', ' for a in op.dst.axes)}), {number_text(_identity(op))}, dtype=torch.{op.dst.dtype})"
        if op.reduction == "prod":  # torch.prod takes one dimension
            text = op.src.name
            for d in sorted(dims, reverse=True):
                text = f"torch.prod({text}, {d})"
            return text
        return REDUCTIONS[op.reduction].torch.format(x=op.src.name, dims=tuple(dims) if len(dims) > 1 else dims[0])

    def dot(self, op: ir.Dot) -> str:
        """A batched matrix product; several axes on one side are flattened into one. Or a convolution."""
        self.owned.add(op.dst.name)
        if op.dst.name in self.convolutions:
            return self.convolutions[op.dst.name].call(op, self.kernel)
        left, right = op.lhs, op.rhs
        outer = [a for a in op.dst.axes if a not in op.batch]
        if outer and outer[0] not in left.axes:
            left, right = right, left
        m = [a for a in op.dst.axes if a in left.axes and a not in op.batch]
        n = [a for a in op.dst.axes if a in right.axes and a not in op.batch]
        k = list(op.contract)
        lead = m[: op.dst.axes.index(n[0])] if n and not op.batch else []
        if lead and len(lead) < len(m) and [*lead, *n, *m[len(lead) :]] == list(op.dst.axes):
            # Z[n,o,x] += X[n,c,x] * W[o,c]: a product for each n gives the result in its own order, and X is read in its own.
            rest = m[len(lead) :]
            text = f"torch.matmul({self.arranged(right, [], [n, k])}, {self.arranged(left, lead, [k, rest])})"
            if len(n) != 1 or len(rest) != 1:
                text = f"{text}.reshape({', '.join(self.length(x) for x in op.dst.axes)})"
            return f"{op.acc.name} + {text}" if op.acc else text
        if [*op.batch, *m, *n] != list(op.dst.axes):  # the result is turned anyway: its sides follow what they are read from
            m, n = self._as_read(left, m), self._as_read(right, n)
        a = self.arranged(left, [*op.batch], [m, k])
        b = self.arranged(right, [*op.batch], [k, n])
        text = f"torch.matmul({a}, {b})"
        made = [*op.batch, *m, *n]
        if len(m) != 1 or len(n) != 1:
            text = f"{text}.reshape({', '.join(self.length(x) for x in made)})"
        if made != list(op.dst.axes):
            text = f"{text}.permute({', '.join(str(made.index(x)) for x in op.dst.axes)})"
        return f"{op.acc.name} + {text}" if op.acc else text

    def arranged(self, v: ir.Value, batch: list[str], groups: list[list[str]]) -> str:
        """An operand as (batch.., rows, columns). What must be copied for that is copied along the longest of its last axes, or as it lies
        in memory."""
        steps = self.steps.get(v.name, {})
        if max(map(len, groups)) > 1 and any(steps.get(x) == 1 for x in groups[0]) and not any(steps.get(x) == 1 for x in groups[1]):
            return f"{self._flattened(v, batch, groups[::-1])}.mT"
        if v.name in self.strided_values and self._extent(groups[0][-1]) > self._extent(groups[1][-1]):
            return f"{self._flattened(v, batch, groups[::-1])}.mT"
        return self._flattened(v, batch, groups)

    def _as_read(self, v: ir.Value, axes: list[str]) -> list[str]:
        """Axes in the order in which an operand has them in memory."""
        steps = self.steps.get(v.name)
        return axes if steps is None or any(x not in steps for x in axes) else sorted(axes, key=lambda x: -steps[x])

    def _extent(self, axis: str) -> int:
        return self.kernel.axis(axis).extent

    def _flattened(self, v: ir.Value, batch: list[str], groups: list[list[str]]) -> str:
        order = [*batch, *groups[0], *groups[1]]
        axes = list(v.axes)
        text = v.name
        if order != axes:
            swapped = [*order[:-2], order[-1], order[-2]]
            dims = ", ".join(str(axes.index(x)) for x in order)
            text = f"{text}.mT" if swapped == axes and len(order) >= 2 else f"{text}.permute({dims})"
        if any(len(g) != 1 for g in groups):
            sizes = [self.length(x) for x in batch] + [
                " * ".join(f"({self.length(x)})" if " " in self.length(x) else self.length(x) for x in g) or "1" for g in groups
            ]
            text = f"{text}.reshape({', '.join(sizes)})"
        return text


def _identity(op: ir.Fold) -> float | int | bool:
    return identity(op.reduction, op.dst.dtype)


def _operands(op: ir.Operation) -> list[ir.Value]:
    match op:
        case ir.Elementwise(args=args):
            return [a for a in args if isinstance(a, ir.Value)]
        case ir.Dot(lhs=lhs, rhs=rhs, acc=acc):
            return [lhs, rhs, *([acc] if acc else [])]
        case ir.Fold(src=src) | ir.Mask(src=src) | ir.Store(src=src) | ir.Assign(src=src):
            return [src]
    return []


__all__ = ["literal_shape", "number_text", "parameters", "torch_source"]
