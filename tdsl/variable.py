"""Statements as the objects of a graph: a variable has inputs, a value and a gradient, and passes messages forward and backward.

    W, x = Variable([[1.0, 2.0], [3.0, 4.0]]), Variable([1.0, 1.0])
    y = Variable("for i, j:  y[i] += W[i,j] * x[j]", W=W, x=x)
    y.forward()                   # [3, 7]: the loops of the statement, run literally
    y.grad = [1.0, 0.0]
    y.backward()                  # W.grad += [[1, 1], [0, 0]] and x.grad += [1, 2]: the same loops with two names swapped

A message concerns one statement only. Sent over a whole graph (`Graph.forward`, `Graph.backward`), they give what the gradient
program gives.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from tdsl import reference
from tdsl.errors import ArgumentError
from tdsl.infer import infer, resolve
from tdsl.ir import Access, Const, Loop, Output, Param, Program, Size, Statement, expressions, fresh_name, statements, walk
from tdsl.ops import DTYPES
from tdsl.reference import Argument, Array
from tdsl.signature import place_of_inputs
from tdsl.swap import differentiable, gradient
from tdsl.text import parse


class Variable:
    """A leaf that holds a value, or what one program (usually one statement) computes from other variables.

    inputs: by the name that the statement uses. value: None until `forward`, then float64, int64 or bool (a leaf keeps its own dtype).
    grad: None until a message arrives; of the value's shape.
    """

    def __init__(self, statement: str | Program | object, /, **inputs: Variable | object):
        """A statement (text or Program with one output) with its inputs, or the value of a leaf: an array, a torch tensor, a number.

        Raises what `parse` raises, and ArgumentError where the inputs are not those of the statement or it has several outputs.
        """
        self.program: Program | None = None
        self.inputs: dict[str, Variable] = {}
        self.grad: Any = None
        if not isinstance(statement, str | Program):
            if inputs:
                raise ArgumentError("a leaf has no inputs", help='give the statement first: Variable("for i:  Y[i] = 2 * X[i]", X=..)')
            self.name, self.value = "", to_array(statement)
            return
        program = parse(statement) if isinstance(statement, str) else statement
        if len(program.outputs) != 1:
            raise ArgumentError(
                f"a variable has one value, but this has {len(program.outputs)}: {', '.join(program.results)}",
                help="make one variable per output",
            )
        if set(inputs) != set(program.inputs):
            raise ArgumentError(
                f"the statement reads {', '.join(program.inputs) or 'nothing'}, but got {', '.join(inputs) or 'nothing'}",
                span=place_of_inputs(program),
                help="give each name that it reads: " + ", ".join(f"{name}=.." for name in program.inputs),
            )
        self.program = program
        self.name, self.value = program.results[0], None
        self.inputs = {name: v if isinstance(v, Variable) else Variable(v) for name in program.inputs for v in (inputs[name],)}

    def __repr__(self) -> str:
        shape = "no value yet" if self.value is None else f"shape {list(np.shape(self.value))}"
        return f"Variable({'leaf' if self.program is None else str(self.program)!r}, {shape})"

    def forward(self) -> Argument | Array:
        """The value, computed from the inputs' values by the statement's loops; inputs without a value compute theirs first."""
        if self.program is not None:
            values = {name: v.forward() if v.value is None else v.value for name, v in self.inputs.items()}
            self.value = reference.run(self.program, values)[self.name]
        return self.value  # type: ignore[no-any-return]

    def backward(self) -> None:
        """Sends `grad` to the inputs, whose `.grad` it is added to. A 0-d variable without a gradient is given 1.

        Raises ArgumentError without a value, or without a gradient of the value's shape.
        """
        if self.value is None:
            raise ArgumentError(f"{self.name} has no value yet", help="call forward() first")
        if self.grad is None and np.ndim(self.value) == 0:
            self.grad = np.float64(1.0)
        if self.grad is None or np.shape(self.grad) != np.shape(self.value):
            found = "none" if self.grad is None else f"shape {list(np.shape(self.grad))}"
            raise ArgumentError(
                f"{self.name or 'a leaf'} needs a gradient of shape {list(np.shape(self.value))}, and has {found}", help="set .grad"
            )
        self._send()

    def _send(self) -> None:
        if self.program is None or self.grad is None:
            return
        possible = differentiable(self.program)
        wrt = [name for name, v in self.inputs.items() if name in possible and _is_float(v.value)]
        if not wrt:
            return
        swapped = gradient(self.program, wrt)
        values = {name: v.value for name, v in self.inputs.items()}
        values |= {p.name: to_array(self.grad) for p in swapped.params if p.name not in values}
        messages = reference.run(swapped, {name: values[name] for name in swapped.inputs})
        for name, output in zip(wrt, swapped.outputs, strict=True):
            v = self.inputs[name]
            v.grad = messages[output.name] if v.grad is None else v.grad + messages[output.name]


class Graph:
    """Variables in an order in which each comes after its inputs; `graph["Y"]` is the last version of Y."""

    def __init__(
        self, variables: Iterable[Variable], inputs: Mapping[str, Variable], outputs: Mapping[str, Variable], names: Mapping[str, Variable]
    ):
        self.variables = tuple(variables)
        self.inputs = dict(inputs)
        self.outputs = dict(outputs)
        self._names = dict(names)

    def __getitem__(self, name: str) -> Variable:
        return self._names[name]

    def forward(self) -> dict[str, Argument | Array]:
        """Every variable computes its value, once; the outputs' values by name."""
        for v in self.variables:
            v.forward()
        return {name: v.value for name, v in self.outputs.items()}

    def backward(self, **grads: object) -> dict[str, Any]:
        """Messages from the outputs to the inputs, in reverse order; `grads`: per output, 1 for a single 0-d output.

        The gradients of the inputs by name: None where there is none. Gradients of an earlier pass are forgotten.
        """
        if not grads and len(self.outputs) == 1 and all(np.ndim(v.value) == 0 for v in self.outputs.values()):
            grads = dict.fromkeys(self.outputs, 1.0)
        if set(grads) != set(self.outputs):
            raise ArgumentError(
                f"backward takes a gradient for each of {', '.join(self.outputs)}",
                help="write backward(" + ", ".join(f"{name}=.." for name in self.outputs) + ")",
            )
        for v in self.variables:
            v.grad = None
        for name, grad in grads.items():
            v, arrived = self.outputs[name], np.asarray(to_array(grad), dtype=np.float64)
            if arrived.shape != np.shape(v.value):
                raise ArgumentError(
                    f"{name} has shape {list(np.shape(v.value))}, but its gradient has {list(arrived.shape)}",
                    help="a gradient has the shape of its value",
                )
            v.grad = arrived if v.grad is None else v.grad + arrived
        for v in reversed(self.variables):
            v._send()
        return {name: v.grad for name, v in self.inputs.items()}


def graph(program: Program, inputs: Mapping[str, object]) -> Graph:
    """One variable per input and per statement of `program` (per target of an ordered block), linked; no values yet but the inputs'.

    inputs: per parameter an array, a torch tensor, a number, or a leaf. Raises what `infer` raises.
    """
    leaves = {name: v if isinstance(v, Variable) else Variable(v) for name, v in inputs.items()}
    specs = {name: reference.spec_of(v.value) for name, v in leaves.items()}
    values = {name: int(leaves[name].value) for name, spec in specs.items() if spec.shape == () and DTYPES[spec.dtype].kind == "int"}
    inferred = infer(program, specs, values)
    explicit = resolve(program, inferred)  # a statement alone would not know what its neighbours say about its ranges
    current = dict(leaves)
    variables = list(leaves.values())
    for name, leaf in leaves.items():
        leaf.name = leaf.name or name
    for node in explicit.body:
        targets = dict.fromkeys(s.target.tensor for s in statements((node,)))
        new = [_link(node, target, current, inferred.shapes) for target in targets]
        variables += new
        current |= {v.name: v for v in new}
    outputs = {name: current[name] for name in program.results}
    return Graph(variables, leaves, outputs, current)


def _link(node: Statement | Loop, target: str, current: Mapping[str, Variable], shapes: Mapping[str, tuple[int, ...]]) -> Variable:
    """The variable of one target of a statement: its program reads the current versions of the names in it."""
    used = dict.fromkeys(e.tensor for x in expressions(node) for e in walk(x) if isinstance(e, Access | Size))
    names = [name for name in used if name in current]
    taken: set[str] = set()
    params = []
    for name in names:
        dims = []
        for d in range(len(shapes[name])):
            dims.append(fresh_name(f"n{d}", taken))
            taken.add(dims[-1])
        params.append(Param(name, tuple(dims)))
    sizes = None if target in current else tuple(Const(n) for n in shapes[target])
    program = Program(target.replace(".", "_"), tuple(params), (Output(target, sizes or None),), (node,))
    return Variable(program, **{name: current[name] for name in names})


def to_array(value: object) -> Any:
    """A NumPy array of an array, a nested list or a torch tensor; a Python number as it is."""
    if isinstance(value, bool | int | float):
        return value
    if hasattr(value, "detach"):  # a torch tensor; bfloat16 has no NumPy dtype
        tensor: Any = value.detach().cpu()
        value = tensor.double().numpy() if tensor.is_floating_point() else tensor.numpy()
    return np.asarray(value)


def _is_float(value: Any) -> bool:
    return isinstance(value, float) or (not isinstance(value, bool | int) and np.asarray(value).dtype.kind == "f")
