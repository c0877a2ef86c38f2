"""Loads, stores and subscripts as torch code: slices and strided views where an access is one, indexing where it is not."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from lowering import tile_ir as ir
from lowering.addresses import with_axes
from lowering.torch_views import strided
from tdsl.affine import linear
from tdsl.ir import Call, Clamp, Const, Expr, Index, Pad, free_indices
from tdsl.ops import OPS
from tdsl.traced import whole


class Memory:
    """What a printer knows of a kernel's values, and how it spells accesses to memory.

    values: those made so far. numbers: those that are Python numbers. owned: temporaries that belong to the kernel alone.
    direct: tensors that it defines whole and returns. called: values that some function, not only arithmetic, takes.
    """

    def __init__(self, kernel: ir.Kernel, direct: frozenset[str]):
        self.kernel = kernel
        self.direct = direct
        self.values: dict[str, ir.Value] = {}
        self.numbers: set[str] = set()
        self.owned: set[str] = set()
        self.called: set[str] = set()
        self.steps: dict[str, dict[str, int]] = {}  # of views by plain subscripts: elements between neighbours along each axis
        self.strided_values: set[str] = set()  # views whose windows overlap: a matrix of them is a copy

    def span(self, index: str) -> tuple[str, str]:
        """The first value of an index in this block and the one after its last, as text."""
        axis = self.kernel.axis_of(index)
        return ("0", str(axis.extent)) if axis.role == "whole" else (f"{index}_start", f"{index}_stop")

    def length(self, index: str) -> str:
        axis = self.kernel.axis_of(index)
        return str(axis.extent) if axis.role == "whole" else f"{index}_stop - {index}_start"

    def load(self, op: ir.Load) -> str:
        if op.buffer.number:
            if op.dst.name in self.called:
                return f"torch.tensor({op.buffer.name}, dtype=torch.{op.dst.dtype})"
            self.numbers.add(op.dst.name)
            return op.buffer.name
        if self._is_view(op.buffer, op.subscripts):
            if self._is_plain(op.subscripts):
                self.steps[op.dst.name] = {e.name: n for e, n in zip(op.subscripts, op.buffer.strides, strict=True) if isinstance(e, Index)}
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
        return f"torch.where({self.within(op.buffer, op.subscripts, op.dst.axes)}, {text}, {number_text(False if op.dst.dtype == 'bool' else 0)})"

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
        return with_axes(text, have, want[want.index(have[0]) :]) if have else text

    def integer(self, e: Expr, axes: tuple[str, ...]) -> str:
        match e:
            case Const(value=value):
                return repr(whole(value))
            case Index(name=name):
                if name in self.values:
                    return with_axes(name, self.values[name].axes, axes)
                return with_axes(name, () if self.kernel.axis_of(name).scalar else (self.kernel.axis_of(name).name,), axes)
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


def number_text(value: float | int | bool) -> str:
    """A number as Python text."""
    if isinstance(value, float) and (math.isinf(value) or math.isnan(value)):
        return "math.inf" if value > 0 else "-math.inf" if value < 0 else "math.nan"
    return repr(value)


def literal_shape(shape: tuple[int, ...]) -> str:
    """A shape as Python text."""
    return f"({''.join(f'{n}, ' for n in shape)})"
