"""A program as a node of torch's graph: forward saves what residuals.py chose, backward runs the gradient program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tdsl.ir import Program
from tdsl.residuals import cut
from tdsl.runtime import Executor, Outputs
from tdsl.swap import gradient

_HALF = (torch.float16, torch.bfloat16)


class Differentiable:
    """Forward and backward of one program with respect to some of its inputs.

    derivative: called instead of the cut backward when the backward itself is recorded (create_graph): the whole gradient
    as a function of inputs and cotangents, differentiable again. base: the executor of the program alone; its plan says what
    is made again rather than saved. fuses: whether elementwise work is nearly free.
    """

    def __init__(self, base: Executor, wrt: Sequence[str], derivative: Callable[..., Outputs], *, fuses: bool):
        self.base = base
        self.program: Program = base.program
        self.wrt = tuple(wrt)
        self.derivative = derivative
        self.fuses = fuses
        self.results = len(self.program.outputs)
        self.positions = tuple(self.program.inputs.index(name) for name in self.wrt)
        whole = gradient(self.program, wrt)
        self.needed = frozenset(name for name in self.program.inputs if _reads(whole, name))
        self._halves: dict[frozenset[str], Halves] = {}

    def apply(self, args: Sequence[Any]) -> Outputs:
        """The outputs, recorded in torch's graph."""
        results = _Node.apply(self, *args)  # type: ignore[no-untyped-call]
        return results if isinstance(results, tuple) else (results,)

    def halves(self, args: Sequence[Any]) -> Halves:
        """The cut that suits such arguments."""
        recomputed = self.base.recomputed_for(args)
        if recomputed not in self._halves:
            self._halves[recomputed] = Halves(self, recomputed)
        return self._halves[recomputed]


class Halves:
    """One cut of a gradient and the executors of its two sides."""

    def __init__(self, owner: Differentiable, recomputed: frozenset[str]):
        self.parts = cut(owner.program, owner.wrt, fuses=owner.fuses, recomputed=recomputed)
        self.base = owner.base
        self.forward = Executor(
            owner.program, self.base.backend, flat=self.parts.forward, saved=frozenset(self.parts.saved), schedules=self.base.schedules
        )
        self._backward: dict[tuple[tuple[str, str], ...], Executor] = {}

    def backward_for(self, args: Sequence[Any]) -> Executor:
        """The executor of the backward; residuals of 16-bit tensors are kept in float32 and promote as what they stand for."""
        logical: tuple[tuple[str, str], ...] = ()
        if any(isinstance(a, torch.Tensor) and a.dtype in _HALF for a in args):
            dtypes = self.forward.dtypes_for(args)
            logical = tuple((name, dtypes[name]) for name in self.parts.saved)
        if logical not in self._backward:
            self._backward[logical] = Executor(self.parts.backward, self.base.backend, stored=dict(logical), schedules=self.base.schedules)
        return self._backward[logical]


def _reads(program: Program, name: str) -> bool:
    from tdsl.ir import expressions, reads, walk

    sizes = {e.tensor for node in program.body for top in expressions(node) for e in walk(top) if type(e).__name__ == "Size"}  # type: ignore[union-attr]
    return name in sizes or any(a.tensor == name for node in program.body for a in reads(node))


class _Node(torch.autograd.Function):
    """One call. Non-tensor arguments and inputs that no gradient reads are kept as they are."""

    @staticmethod
    def forward(ctx: Any, node: Differentiable, *args: Any) -> Any:
        halves = node.halves(args)
        outputs = halves.forward(args)
        results, saved = outputs[: node.results], outputs[node.results :]
        kept = [results[halves.parts.forward.results.index(name)] for name in halves.parts.kept]
        ctx.node = node
        ctx.backward_executor = halves.backward_for(args)
        ctx.shapes = tuple(a.dtype if isinstance(a, torch.Tensor) else None for a in args)
        inputs = [
            a if isinstance(a, torch.Tensor) and name in node.needed else None for name, a in zip(node.program.inputs, args, strict=True)
        ]
        ctx.numbers = tuple(
            a if not isinstance(a, torch.Tensor) else None if name in node.needed else a.new_empty(()).expand(a.shape)
            for name, a in zip(node.program.inputs, args, strict=True)
        )
        ctx.save_for_backward(*inputs, *kept, *saved)
        ctx.mark_non_differentiable(*(r for r in results if not r.dtype.is_floating_point))
        return results if len(results) > 1 else results[0]

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> Any:
        node: Differentiable = ctx.node
        count = len(ctx.numbers)
        saved = ctx.saved_tensors
        inputs = [number if tensor is None else tensor for tensor, number in zip(saved[:count], ctx.numbers, strict=True)]
        if torch.is_grad_enabled():
            found = node.derivative(*inputs, *cotangents)
            grads = found if isinstance(found, tuple) else (found,)
        else:
            grads = ctx.backward_executor([*inputs, *cotangents, *saved[count:]])
        result: list[torch.Tensor | None] = [None] * count
        for position, grad in zip(node.positions, grads, strict=True):
            dtype = ctx.shapes[position]
            result[position] = None if dtype is None else grad if grad.dtype == dtype else grad.to(dtype)
        return (None, *result)
