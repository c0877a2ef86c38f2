"""Prints the tile IR as torch code: whole tensors where a tile is a whole axis, blocks of them where it is not.

The code is made for exact shapes and strides, so sizes stand in it as numbers. A temporary that nothing reads again is
overwritten in place. Tensors that a kernel defines whole are returned as they are; others are given to it to write into.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from lowering import tile_ir as ir
from lowering.tiling import identity
from lowering.torch_views import strided
from tdsl.affine import linear
from tdsl.ir import Call, Clamp, Const, Expr, Index, Pad, free_indices
from tdsl.ops import DTYPES, OPERATORS, OPS, REDUCTIONS

_UNARY_IN_PLACE = ("exp", "exp2", "log", "log1p", "expm1", "sqrt", "rsqrt", "sin", "cos", "tanh", "sigmoid", "relu", "erf", "abs")
_ARITHMETIC = {"add", "sub", "mul", "div", "neg"}
_IN_PLACE = {
    "add": "{0}.add_({1})", "sub": "{0}.sub_({1})", "mul": "{0}.mul_({1})", "div": "{0}.div_({1})", "neg": "{0}.neg_()",
    **{op: f"torch.{op}_({{0}})" for op in _UNARY_IN_PLACE},
    "silu": "torch.nn.functional.silu({0}, inplace=True)",
}  # fmt: skip
_SWAPPED = {"add": "{1}.add_({0})", "mul": "{1}.mul_({0})", "sub": "torch.sub({0}, {1}, out={1})", "div": "torch.div({0}, {1}, out={1})"}


def torch_source(kernel: ir.Kernel, direct: frozenset[str]) -> str:
    """A Python function `kernel.name(*buffers)`. direct: tensors (by name in the program) that it defines whole and
    returns; all other buffers are its parameters, those that it writes among them. It returns the direct ones, in order."""
    return _Printer(kernel, direct).run()


def parameters(kernel: ir.Kernel, direct: frozenset[str]) -> tuple[ir.Buffer, ...]:
    """The buffers that the function takes, in order."""
    return tuple(b for b in kernel.buffers if b.tensor not in direct)


class _Printer:
    def __init__(self, kernel: ir.Kernel, direct: frozenset[str]):
        self.kernel = kernel
        self.direct = direct
        self.lines: list[str] = []
        self.ranges: set[str] = set()
        self.values: dict[str, ir.Value] = {}
        self.numbers: set[str] = set()
        self.owned: set[str] = set()
        self.strided_values: set[str] = set()  # views whose windows overlap: a matrix of them is a copy
        self.home: dict[str, int] = {}
        self.block = 0
        self.remaining: Counter[str] = Counter()
        self.pinned: set[str] = set()
        self.called: set[str] = set()  # values that some function, not only arithmetic, takes
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

    def span(self, index: str) -> tuple[str, str]:
        """The first value of an index in this block and the one after its last, as text."""
        axis = self.kernel.axis_of(index)
        return ("0", str(axis.extent)) if axis.role == "whole" else (f"{index}_start", f"{index}_stop")

    def length(self, index: str) -> str:
        axis = self.kernel.axis_of(index)
        return str(axis.extent) if axis.role == "whole" else f"{index}_stop - {index}_start"

    # -- values -----------------------------------------------------------------------------------------------------------

    def value(self, op: ir.Operation) -> str:
        match op:
            case ir.Load():
                return self.load(op)
            case ir.IndexOf():
                return self.integer(op.expr, op.dst.axes)
            case ir.Elementwise():
                return self.elementwise(op)
            case ir.Full():
                self.owned.add(op.dst.name)
                return (
                    f"torch.full(({''.join(self.length(a) + ', ' for a in op.dst.axes)}), {number_text(op.fill)}, dtype=torch.{op.dst.dtype})"
                )
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
            return (
                f"torch.full(({''.join(self.length(a) + ', ' for a in op.dst.axes)}), {number_text(_identity(op))}, dtype=torch.{op.dst.dtype})"
            )
        if op.reduction == "prod":  # torch.prod takes one dimension
            text = op.src.name
            for d in sorted(dims, reverse=True):
                text = f"torch.prod({text}, {d})"
            return text
        return REDUCTIONS[op.reduction].torch.format(x=op.src.name, dims=tuple(dims) if len(dims) > 1 else dims[0])

    def dot(self, op: ir.Dot) -> str:
        """A batched matrix product; several axes on one side are flattened into one."""
        self.owned.add(op.dst.name)
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
        """An operand as (batch.., rows, columns). What must be copied for that is copied along the longest of its last axes."""
        if v.name in self.strided_values and self._extent(groups[0][-1]) > self._extent(groups[1][-1]):
            return f"{self._flattened(v, batch, groups[::-1])}.mT"
        return self._flattened(v, batch, groups)

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

    # -- memory -----------------------------------------------------------------------------------------------------------

    def load(self, op: ir.Load) -> str:
        if op.buffer.number:
            if op.dst.name in self.called:
                return f"torch.tensor({op.buffer.name}, dtype=torch.{op.dst.dtype})"
            self.numbers.add(op.dst.name)
            return op.buffer.name
        if self._is_view(op.buffer, op.subscripts):
            return self.view(op.buffer, op.subscripts, op.dst.axes)
        if found := self._strided(op):
            text, owned = found
            self.owned |= {op.dst.name} if owned else set()
            self.strided_values.add(op.dst.name)
            return text
        return self.gather(op)

    def _strided(self, op: ir.Load) -> tuple[str, bool] | None:
        return strided(op, self.kernel, frozenset(self.values), self.length) if all(op.buffer.shape) else None

    def _is_view(self, buffer: ir.Buffer, subscripts: tuple[Expr, ...]) -> bool:
        """Whether an access is a strided view: integer multiples of indices, none of them backwards."""
        if any(n == 0 for n in buffer.shape) and not all(isinstance(e, Index) for e in subscripts):
            return False
        for e in subscripts:
            if isinstance(e, Pad | Clamp):
                return False
            form = linear(e)
            if any(not isinstance(atom, Index) or atom.name in self.values or c < 0 for atom, c in form.terms):
                return False
        return True

    def _is_plain(self, subscripts: tuple[Expr, ...]) -> bool:
        """Whether every subscript is a loop index of its own."""
        names = [e.name for e in subscripts if isinstance(e, Index) and e.name not in self.values]
        return len({*names}) == len(subscripts)

    def view(self, buffer: ir.Buffer, subscripts: tuple[Expr, ...], axes: tuple[str, ...]) -> str:
        names = [e.name if isinstance(e, Index) else "" for e in subscripts]
        if self._is_plain(subscripts):
            return self._sliced(buffer, names, axes)
        offset = [str(sum(linear(e).const * s for e, s in zip(subscripts, buffer.strides, strict=True)))]
        steps: Counter[str] = Counter()
        for e, s in zip(subscripts, buffer.strides, strict=True):
            for atom, c in linear(e).terms:
                assert isinstance(atom, Index)
                steps[atom.name] += c * s
        for index in steps:
            axis = self.kernel.axis_of(index)
            if axis.role != "whole":
                offset.append(f"{index if axis.scalar else index + '_start'} * {steps[index]}")
        sizes = "".join(self.length(a) + ", " for a in axes)
        strides = "".join(f"{steps[a]}, " for a in axes)
        return f"{buffer.name}.as_strided(({sizes}), ({strides}), {buffer.name}.storage_offset() + {' + '.join(offset)})"

    def _sliced(self, buffer: ir.Buffer, names: list[str], axes: tuple[str, ...]) -> str:
        """Plain subscripts: slices for blocks, numbers for single elements, and the dimensions in the order of the axes."""
        parts = []
        for i, size in zip(names, buffer.shape, strict=True):
            axis = self.kernel.axis_of(i)
            whole = ":" if axis.extent == size else f":{axis.extent}"
            parts.append(i if axis.scalar else whole if axis.role == "whole" else f"{i}_start:{i}_stop")
        while parts and parts[-1] == ":":
            parts.pop()
        text = f"{buffer.name}[{', '.join(parts)}]" if parts else buffer.name
        left = [i for i in names if not self.kernel.axis_of(i).scalar]
        if tuple(left) != axes:
            text = f"{text}.mT" if len(left) == 2 else f"{text}.permute({', '.join(str(left.index(a)) for a in axes)})"
        return text

    def gather(self, op: ir.Load) -> str:
        """Advanced indexing; outside of a padded dimension the value is zero."""
        padded = [d for d, e in enumerate(op.subscripts) if isinstance(e, Pad)]
        if padded or op.dst.axes:  # where every place is one number, indexing gives a view
            self.owned.add(op.dst.name)
        if any(op.buffer.shape[d] == 0 for d in range(len(op.subscripts))):
            return f"torch.zeros(({''.join(self.length(a) + ', ' for a in op.dst.axes)}), dtype=torch.{op.dst.dtype})"
        text = f"{op.buffer.name}[{', '.join(self.place(op.buffer, d, e, op.dst.axes) for d, e in enumerate(op.subscripts))}]"
        if not padded:
            return text
        return (
            f"torch.where({self.within(op.buffer, op.subscripts, op.dst.axes)}, {text}, {number_text(False if op.dst.dtype == 'bool' else 0)})"
        )

    def place(self, buffer: ir.Buffer, d: int, e: Expr, axes: tuple[str, ...]) -> str:
        if isinstance(e, Pad | Clamp):
            text = self.integer(e.value, axes)
            last = buffer.shape[d] - 1
            return f"({text}).clamp(0, {last})" if self._is_tensor(e.value) else f"min(max({text}, 0), {last})"
        return self.integer(e, axes)

    def within(self, buffer: ir.Buffer, subscripts: tuple[Expr, ...], axes: tuple[str, ...]) -> str:
        """The condition that every padded subscript is inside, as a tensor."""
        terms = []
        for d, e in enumerate(subscripts):
            if isinstance(e, Pad):
                text = self.integer(e.value, axes)
                terms.append(f"({text} >= 0) & ({text} < {buffer.shape[d]})")
        joined = " & ".join(terms)
        return joined if any(self._is_tensor(e.value) for e in subscripts if isinstance(e, Pad)) else f"torch.tensor({joined})"

    def _is_tensor(self, e: Expr) -> bool:
        return any(i not in self.numbers if i in self.values else not self.kernel.axis_of(i).scalar for i in free_indices(e))

    def store(self, op: ir.Store) -> Iterator[str]:
        value = op.src.name
        target = op.buffer
        names = [e.name if isinstance(e, Index) else "" for e in op.subscripts]
        plain = self._is_plain(op.subscripts)
        missing = op.axes != op.src.axes
        if target.tensor in self.direct:
            text = self.suffixed(value, op.src.axes, op.axes)
            if op.src.name in self.numbers:
                text = f"torch.tensor({text}, dtype=torch.{target.dtype})"
            if missing:
                text = f"{text}.expand({', '.join(self.length(a) for a in op.axes)})"
            order = tuple(names)
            if order != op.axes:
                text = f"{text}.permute({', '.join(str(op.axes.index(a)) for a in order)})"
            if missing or op.src.name not in self.owned or self.shared(op.src.name):
                text = f"{text}.clone(memory_format=torch.contiguous_format)"
            elif order != op.axes or not op.src.name:
                text = f"{text}.contiguous()"
            yield f"{target.name} = {text}"
            return
        number = op.src.name in self.numbers
        if plain and op.mode in ("set", "add"):
            place = self._sliced(target, names, op.axes)
            source = self._as_tensor(op.src) if number else self.suffixed(value, op.src.axes, op.axes)
            yield f"{place}.{'copy_' if op.mode == 'set' else 'add_'}({source})"
            return
        shape = f"({''.join(self.length(a) + ', ' for a in op.axes)})"
        places = [self.place(target, d, e, op.axes) for d, e in enumerate(op.subscripts)]
        spread = f"torch.broadcast_to({self._as_tensor(op.src) if number else self.suffixed(value, op.src.axes, op.axes)}, {shape})"
        yield f"places = [torch.broadcast_to(torch.as_tensor(p), {shape}) for p in ({''.join(p + ', ' for p in places)})]"
        if any(isinstance(e, Pad) for e in op.subscripts):
            yield f"inside = torch.broadcast_to({self.within(target, op.subscripts, op.axes)}, {shape})"
            yield f"places, spread = [p[inside] for p in places], {spread}[inside]"
        else:
            yield f"spread = {spread}"
        if op.mode in ("set", "add"):
            yield f"{target.name}.index_put_(tuple(places), spread, accumulate={op.mode == 'add'})"
        else:
            flat = " + ".join(f"places[{d}] * {s}" for d, s in enumerate(target.strides)) or "torch.zeros((), dtype=torch.int64)"
            yield f"{target.name}.view(-1).scatter_reduce_(0, ({flat}).reshape(-1), spread.reshape(-1), 'a{op.mode}')"

    def shared(self, name: str) -> bool:
        """Whether a stored value is also stored elsewhere: two outputs must not share memory."""
        stores = [op for op in ir.operations(self.kernel.body) if isinstance(op, ir.Store) and op.src.name == name]
        return len(stores) > 1

    def _as_tensor(self, v: ir.Value) -> str:
        return f"torch.tensor({v.name}, dtype=torch.{v.dtype})"

    # -- names ------------------------------------------------------------------------------------------------------------

    def suffixed(self, text: str, have: tuple[str, ...], want: tuple[str, ...]) -> str:
        """A tensor with a new dimension wherever `want` has an axis that it lacks, but for leading ones, which broadcast anyway."""
        if not have or have == want:
            return text
        first = want.index(have[0])
        rest = want[first:]
        return text if rest == have else f"{text}[{', '.join(':' if a in have else 'None' for a in rest)}]"

    def integer(self, e: Expr, axes: tuple[str, ...]) -> str:
        match e:
            case Const(value=value):
                return repr(int(value))
            case Index(name=name):
                if name in self.values:
                    return self._full_rank(name, self.values[name].axes, axes)
                return self._full_rank(name, () if self.kernel.axis_of(name).scalar else (self.kernel.axis_of(name).name,), axes)
            case Call(op=op, args=args):
                texts = [self.integer(a, axes) for a in args]
                if not self._is_tensor(e) and op in ("floordiv", "mod"):
                    return f"({texts[0]} {'//' if op == 'floordiv' else '%'} {texts[1]})"
                if op in ("maximum", "minimum"):  # torch's take no numbers
                    tensors = [self._is_tensor(a) for a in args]
                    if not any(tensors):
                        return f"{op[:3]}({', '.join(texts)})"
                    if not all(tensors):
                        tensor, number = texts if tensors[0] else reversed(texts)
                        return f"({tensor}).clamp({'min' if op == 'maximum' else 'max'}={number})"
                return OPS[op].torch.format(*texts)
        raise AssertionError(e)

    def _full_rank(self, text: str, have: tuple[str, ...], want: tuple[str, ...]) -> str:
        if not have or have == want:
            return text
        return f"{text}[{', '.join(':' if a in have else 'None' for a in want)}]"


def _operands(op: ir.Operation) -> list[ir.Value]:
    match op:
        case ir.Elementwise(args=args):
            return [a for a in args if isinstance(a, ir.Value)]
        case ir.Dot(lhs=lhs, rhs=rhs, acc=acc):
            return [lhs, rhs, *([acc] if acc else [])]
        case ir.Fold(src=src) | ir.Mask(src=src) | ir.Store(src=src) | ir.Assign(src=src):
            return [src]
    return []


def _identity(op: ir.Fold) -> float | int | bool:
    return identity(op.reduction, op.dst.dtype)


def number_text(value: float | int | bool) -> str:
    """A number as Python text."""
    if isinstance(value, float) and (math.isinf(value) or math.isnan(value)):
        return "math.inf" if value > 0 else "-math.inf" if value < 0 else "math.nan"
    return repr(value)


def literal_shape(shape: tuple[int, ...]) -> str:
    """A shape as Python text."""
    return f"({''.join(f'{n}, ' for n in shape)})"


__all__ = ["literal_shape", "number_text", "parameters", "torch_source"]
