"""Prints the torch module of a whole program: a function per kernel, and `run`, which allocates, takes views, loops and calls them."""

from __future__ import annotations

import keyword
from collections.abc import Iterator

from lowering.state import Allocation, Part, Repeat, State, Step, contiguous, leaves
from lowering.steps import View
from lowering.torch_source import literal_shape, number_text, parameters, torch_source
from tdsl.affine import Bound
from tdsl.ir import Call, Clamp, Const, Expr, Index, Pad
from tdsl.ops import OPS
from tdsl.traced import whole


def torch_module(state: State) -> str:
    """A Python module whose function `run(*inputs)` returns the outputs of the program, in order."""
    return _Module(state).text()


class _Module:
    def __init__(self, state: State):
        self.state = state
        self.parts = state.parts or (Part(state, aliases=state.aliases),)
        self.steps = [step for part in leaves(self.parts) for step in part.state.steps]
        self.taken = {"torch", "math", "run", *keyword.kwlist} | {
            name for s in self.steps for name in (s.tile.name, f"{s.tile.name}_integers")
        }
        self.names: dict[str, str] = {}
        self.kept = {*state.program.inputs, *state.program.results}

    def text(self) -> str:
        program = self.state.program
        lines = [f"def run({', '.join(self.name(n) for n in program.inputs)}):"]
        last = {tensor: n for n, part in enumerate(self.parts) for tensor in _tensors(part)}
        always = {*program.inputs}  # what only the steps of a loop make has no name where there are none
        for n, part in enumerate(self.parts):
            always |= {a.tensor for a in part.allocate} if isinstance(part, Repeat) else set(_tensors(part))
            lines += self.part(part, "    ", final=n + 1 == len(self.parts))
            over = [t for t in last if last[t] == n and t in always - self.kept and t in self.state.shapes and t in self.names]
            if over and n + 1 < len(self.parts):
                lines.append(f"    del {', '.join(self.names[t] for t in over)}")
        results = []
        seen: set[str] = set()
        for tensor in program.results:
            copied = tensor in program.inputs or tensor in seen
            results.append(f"{self.name(tensor)}.clone()" if copied else self.name(tensor))
            seen.add(tensor)
        lines.append(f"    return ({''.join(r + ', ' for r in results)})")
        kernels = [torch_source(step.tile, step.direct, convolves=self.state.cpp) for step in self.steps if step.cpp is None]
        return "\n\n".join(["import math\n\nimport torch", *kernels, "\n".join(lines)]) + "\n"

    def name(self, tensor: str) -> str:
        """The Python name of a tensor."""
        if tensor not in self.names:
            name = tensor.replace(".", "_")
            while name in self.taken:
                name += "_"
            self.taken.add(name)
            self.names[tensor] = name
        return self.names[tensor]

    # -- parts --------------------------------------------------------------------------------------------------------

    def part(self, part: Part | Repeat, indent: str, *, final: bool) -> Iterator[str]:
        if isinstance(part, Repeat):
            for a in part.allocate:
                yield indent + self.allocation(a)
            steps = f"range({self.bound(part.lo)}, {self.bound(part.hi)})"
            yield f"{indent}for {self.name(part.index)} in {f'reversed({steps})' if part.reverse else steps}:"
            for inner in part.parts:
                yield from self.part(inner, indent + "    ", final=True)
            return
        for number, index in part.numbers.items():
            if number != index:
                yield f"{indent}{self.name(number)} = {self.name(index)}"
        for view in part.views:
            yield indent + self.view(view)
        for alias, source in part.aliases.items():
            yield f"{indent}{self.name(alias)} = {self.name(source)}"
        looped = bool(self.state.parts)
        ends = {b.tensor: n for n, step in enumerate(part.state.steps) for b in step.tile.buffers}
        for n, step in enumerate(part.state.steps):
            yield from self.step(step, indent)
            over = [t for t, at in ends.items() if at == n and t not in self.kept and not looped]
            if over and not (final and n + 1 == len(part.state.steps)):
                yield f"{indent}del {', '.join(self.names[t] for t in over)}"

    def step(self, step: Step, indent: str) -> Iterator[str]:
        for a in step.allocate:
            if a.tensor not in step.direct:
                yield indent + self.allocation(a)
        if step.cpp is not None:
            values = [self.name(b.tensor) if b.number else f"{self.name(b.tensor)}.data_ptr()" for b in step.cpp.buffers]
            threads = "torch.get_num_threads()" if step.cpp.parallel else "1"
            scratch = ["scratch.data_ptr()"] if step.cpp.scratch else []
            if scratch:
                yield f"{indent}scratch = torch.empty({threads} * {step.cpp.scratch}, dtype=torch.uint8)"
            yield f"{indent}{step.tile.name}({', '.join([*values, f'{step.tile.name}_integers', threads, *scratch])})"
            if scratch:
                yield f"{indent}del scratch"
            return
        call = f"{step.tile.name}({', '.join(self.name(b.tensor) for b in parameters(step.tile, step.direct))})"
        results = {b.tensor: self.name(b.tensor) for b in step.tile.buffers if b.tensor in step.direct}
        yield f"{indent}{', '.join(results.values()) + ' = ' if results else ''}{call}"
        elsewhere = {b.tensor for other in self.steps if other is not step for b in other.tile.buffers}
        elsewhere |= {view.tensor for part in leaves(self.parts) for view in part.views}  # under other names
        elsewhere |= {source for part in leaves(self.parts) for source in part.aliases.values()}
        for tensor in results:
            if tensor in elsewhere:  # other kernels are made for the strides of a contiguous tensor
                yield f"{indent}{results[tensor]} = {results[tensor]}.contiguous()"

    def allocation(self, a: Allocation) -> str:
        made = "empty(" if a.fill is None else "full("
        fill = "" if a.fill is None else f", {number_text(a.fill)}"
        return f"{self.name(a.tensor)} = torch.{made}{literal_shape(a.shape)}{fill}, dtype=torch.{a.dtype})"

    def view(self, view: View) -> str:
        """A slice; where a step may lie outside of the tensor, zeros in its place."""
        state = self.state
        shape = state.shapes[view.tensor]
        places, conditions = [], []
        for size, at in zip(shape, view.at, strict=True):
            if at is None:
                places.append(":")
            elif isinstance(at, Clamp):
                places.append(f"min(max({self.integer(at.value)}, 0), {size - 1})")
            elif isinstance(at, Pad):
                places.append(self.integer(at.value))
                conditions.append(f"0 <= {self.integer(at.value)} < {size}")
            else:
                places.append(self.integer(at))
        while places and places[-1] == ":":
            places.pop()
        text = f"{self.name(view.tensor)}[{', '.join(places)}]"
        if conditions:
            strides = state.strides.get(view.tensor) or contiguous(shape)
            left = [(n, step) for n, step, at in zip(shape, strides, view.at, strict=True) if at is None]
            sizes, steps = (literal_shape(tuple(numbers)) for numbers in ([n for n, _ in left], [s for _, s in left]))
            dtype = state.stored.get(view.tensor, state.dtypes[view.tensor])
            text = f"{text} if {' and '.join(conditions)} else torch.empty_strided({sizes}, {steps}, dtype=torch.{dtype}).zero_()"
        return f"{self.name(view.name)} = {text}"

    # -- integers -----------------------------------------------------------------------------------------------------

    def bound(self, bound: Bound) -> str:
        return str(bound) if isinstance(bound, int) else self.integer(bound)

    def integer(self, e: Expr) -> str:
        """A Python expression of loop indices."""
        match e:
            case Const(value=value):
                return repr(whole(value))
            case Index(name=name):
                return self.name(name)
            case Call(op="floordiv" | "mod" as op, args=(a, b)):
                return f"({self.integer(a)} {'//' if op == 'floordiv' else '%'} {self.integer(b)})"
            case Call(op="maximum" | "minimum" as op, args=(a, b)):
                return f"{op[:3]}({self.integer(a)}, {self.integer(b)})"
            case Call(op=op, args=args):
                text = OPS[op].numpy.format(*(self.integer(a) for a in args))
                return text[1:-1] if text.startswith("(") and text.endswith(")") and text.count("(") == 1 else text
        raise AssertionError(e)


def _tensors(part: Part | Repeat) -> Iterator[str]:
    """The tensors that a part uses, views by what they are views of."""
    if isinstance(part, Repeat):
        for inner in part.parts:
            yield from _tensors(inner)
        return
    source = {v.name: v.tensor for v in part.views}
    source.update({alias: source.get(name, name) for alias, name in part.aliases.items()})
    for step in part.state.steps:
        for b in step.tile.buffers:
            yield source.get(b.tensor, b.tensor)
