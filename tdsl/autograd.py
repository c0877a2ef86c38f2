"""A program as a node of torch's graph: forward saves what residuals.py chose, backward runs the gradient program."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from tdsl.arguments import FLOAT8, form, layout
from tdsl.devices import switches
from tdsl.ir import Program, Size, expressions, reads, walk
from tdsl.launching import Outputs, Run
from tdsl.operators import AUTOCAST, compiling, execute, modes, plain, transforms
from tdsl.orders import training_orders
from tdsl.pairwise import Orders, in_order
from tdsl.quick import Test, test_of
from tdsl.recipes import part_of, remember
from tdsl.residuals import Cut, Rule, backward_of, cut, sources, uncut, without_copies
from tdsl.runtime import Executor
from tdsl.size_classes import class_of
from tdsl.swap import gradient

Gradients = tuple[Tensor | None, ...]  # of the node itself, which has none, and of its arguments
Pick = Callable[[tuple[Tensor | None, ...]], Gradients]
_HALF = (torch.float16, torch.bfloat16, *FLOAT8)


class Differentiable:
    """Forward and backward of one program with respect to some of its inputs.

    base: the executor of the program alone; its plan says what is made again rather than saved. derivative: called instead of the
    cut backward when the backward itself is recorded or transformed: the whole gradient as a function of inputs and cotangents,
    differentiable again. fuses: whether elementwise work is nearly free. rule: the gradient of a program, if not the swap rule's.
    """

    def __init__(self, base: Executor, wrt: Sequence[str], derivative: Callable[..., Outputs], *, fuses: bool, rule: Rule = gradient):
        self.base = base
        self.program: Program = base.program
        self.wrt = tuple(wrt)
        self.rule = rule
        self.derivative = derivative
        self.fuses = fuses
        self.results = len(self.program.outputs)
        self.positions = tuple(self.program.inputs.index(name) for name in self.wrt)
        whole = rule(self.program, wrt)
        self.needed = tuple(_reads(whole, name) for name in self.program.inputs)
        self._halves: dict[object, Halves] = {}
        self._orders: dict[object, Orders] = {}
        self._calls: dict[object, Call] = {}

    def apply(self, args: Sequence[Any]) -> Outputs:
        """The outputs, recorded in torch's graph."""
        results = self.call_for(args).run(*args)
        return results if self.results > 1 else (results,)

    def halves(self, recomputed: frozenset[str], orders: Orders = ()) -> Halves:
        """One cut."""
        key = (recomputed, orders)
        if key not in self._halves:
            self._halves[key] = Halves(self, recomputed, orders)
        return self._halves[key]

    def halves_for(self, args: Sequence[Any]) -> Halves:
        """The cut for arguments like these."""
        recomputed = self.base.recomputed_for(args)
        found = layout(self.program, args, self.base.integers)
        key, _ = class_of(args, found)
        if key not in self._orders:
            whole = self.base.backend_for(found.device) == "reference"
            self._orders[key] = () if whole else training_orders(self.program, found, recomputed, partial(self.cut, recomputed))
        return self.halves(recomputed, self._orders[key])

    def cut(self, recomputed: frozenset[str], orders: Orders) -> Cut:
        """The two halves as programs."""
        return cut(in_order(self.program, orders), self.wrt, fuses=self.fuses, recomputed=recomputed, rule=self.rule)

    def call_for(self, args: Sequence[Any]) -> Call:
        """What is to be done for arguments like these."""
        if not plain(args):
            return Call(self, args, ready=False)
        key = self.base.key(args)
        found = self._calls.get(key)
        if found is None:
            found = self._calls[key] = Call(self, args, ready=True)
        return found


class Halves:
    """One cut of a gradient and the executors of its two sides."""

    def __init__(self, owner: Differentiable, recomputed: frozenset[str], orders: Orders = ()):
        self.owner = owner
        self.base = owner.base
        self.recomputed = recomputed
        self.orders = orders
        whole = self.base.backend == "reference"
        self.parts = uncut(owner.program, owner.wrt, owner.rule) if whole else owner.cut(recomputed, orders)
        self.forward = Executor(
            owner.program, self.base.backend, flat=self.parts.forward, saved=frozenset(self.parts.saved), control=self.base.control
        )
        self._remember(self.forward, part="forward")
        self.kept = tuple(self.parts.forward.results.index(name) for name in self.parts.kept)
        self._backward: dict[object, Backward] = {}

    @property
    def crossing(self) -> tuple[str, ...]:
        """What goes from one side to the other, and which gradients need no backward: what a graph with both sides relies on."""
        return (*self.parts.kept, *self.parts.saved, *(f"{name}.grad" for name in self.parts.passed))

    def _remember(self, executor: Executor, **fields: Any) -> None:
        owner = self.owner
        more = {"wrt": owner.wrt, "fuses": owner.fuses, "recomputed": sorted(self.recomputed), "crossing": self.crossing}
        more |= {"orders": self.orders} if self.orders else {}
        remember(part_of(self.base.recipe, **fields, **more), executor)

    def stored_for(self, args: Sequence[Any]) -> Mapping[str, str]:
        """The dtypes that residuals stand for: those of 16-bit tensors are kept in float32 and promote as what they stand for."""
        if not any(getattr(a, "dtype", None) in _HALF for a in args):
            return {}
        dtypes = self.forward.dtypes_for(args)
        return {name: dtypes[name] for name in self.parts.saved}

    def backward(self, stored: Mapping[str, str], outputs: Sequence[str]) -> Backward:
        """The backward for cotangents of these outputs."""
        key = (tuple(stored.items()), tuple(outputs))
        if key not in self._backward:
            made = self._backward[key] = self._make(outputs, stored)
            if made.executor is not None:
                self._remember(made.executor, part="backward", stored=dict(stored), outputs=list(outputs))
        return self._backward[key]

    def _make(self, outputs: Sequence[str], stored: Mapping[str, str]) -> Backward:
        program, wrt = self.owner.program, self.owner.wrt
        reached = sources(program, outputs)
        fewer = tuple(name for name in wrt if name in reached)
        if not fewer:
            return Backward(None, (), ())
        source: Program | None = None
        passed = self.parts.passed
        if len(outputs) < len(program.outputs) or len(fewer) < len(wrt):
            source = backward_of(in_order(program, self.orders), fewer, outputs, self.parts, self.owner.rule)
            if source is not None and self.base.backend != "reference":
                source, passed = without_copies(source, program, fewer)
        if source is None:
            source, outputs, fewer, passed = self.parts.backward, program.results, wrt, self.parts.passed
        positions = tuple(program.results.index(name) for name in outputs)
        return Backward(
            Executor(source, self.base.backend, stored=stored, control=self.base.control) if source.outputs else None,
            positions,
            tuple(program.inputs.index(name) for name in fewer if name not in passed),
            tuple((program.inputs.index(name), positions[n]) for name, n in passed.items()),
        )


@dataclass(frozen=True, slots=True)
class Backward:
    """cotangents: the outputs whose cotangents the executor takes. gradients: the inputs whose gradients it gives; no executor:
    none. passed: inputs whose gradient is a cotangent as it is, and of which output."""

    executor: Executor | None
    cotangents: tuple[int, ...]
    gradients: tuple[int, ...]
    passed: tuple[tuple[int, int], ...] = ()


class Call:
    """Calls with arguments of one layout.

    ready: whether these are plain tensors, so that what is prepared for one call serves all of them. tensors: positions of the
    arguments that backward reads. numbers: positions of Python numbers. blanks: per argument, a tensor of its shape that takes no
    memory, for those that backward does not read. whole_inputs: whether it reads all of them, tensors each.
    run: a call, whose results are a tensor, or a tuple of them where there are several outputs. quick: the same of tensors of which
    it is known that no transform of torch.func is or was at work on them.
    """

    __slots__ = (
        *("_arrange", "_quick", "blanks", "dtypes", "forward", "halves", "kept", "numbers", "owner", "quick", "ready", "run", "several"),
        *("stored", "tensors", "whole", "whole_inputs"),
    )

    def __init__(self, owner: Differentiable, args: Sequence[Any], *, ready: bool):
        described = args if ready else [form(a) for a in args]
        self.owner = owner
        self.ready = ready
        self.halves = halves = owner.halves_for(described)
        self.forward: Run = halves.forward.ready(args) if ready else lambda *args: execute(halves.forward, args)
        self.kept = halves.kept
        self.several = owner.results > 1
        self.stored = halves.stored_for(described)
        self.whole = halves.backward(self.stored, owner.program.results)
        self.tensors = tuple(n for n, a in enumerate(args) if isinstance(a, Tensor) and owner.needed[n])
        self.numbers = tuple(n for n, a in enumerate(args) if not isinstance(a, Tensor))
        self.whole_inputs = len(self.tensors) == len(args)
        self.blanks = [
            a.new_empty(()).expand(a.shape) if isinstance(a, Tensor) and not owner.needed[n] else None for n, a in enumerate(args)
        ]
        self.dtypes = tuple(a.dtype if isinstance(a, Tensor) else None for a in args)
        self.run: Callable[..., Any] = partial(_Node.apply, self)
        self.quick: Callable[..., Any] = partial(_apply, self) if ready else self.run
        self._quick: tuple[object, Test, Run, Pick | None] | None = None
        self._arrange: Callable[[tuple[Any, ...]], tuple[Any, ...]] | None = None

    def inputs(self, numbers: Sequence[Any], saved: Sequence[Tensor]) -> list[Any]:
        """The arguments as far as backward reads them; blanks in the other places."""
        if self.whole_inputs:
            return list(saved[: len(self.tensors)])
        inputs = list(self.blanks)
        for n, number in zip(self.numbers, numbers, strict=True):
            inputs[n] = number
        for n, tensor in zip(self.tensors, saved, strict=False):
            inputs[n] = tensor
        return inputs

    def backward(self, ctx: Any, given: Sequence[Tensor | None], saved: Sequence[Tensor]) -> Gradients | None:
        """The gradients, where cotangents come as they came before and the saved tensors are as they were; None elsewhere."""
        if self._quick is None:
            return None
        before, test, run, pick = self._quick
        if not test(*given) or switches() != before:
            return None
        arrange = self._arrange
        if self.numbers:
            grads = run(*self.inputs(ctx.numbers, saved), *given, *saved[len(self.tensors) :])
        else:
            grads = run(*(arrange((*saved, *given, *self.blanks)) if arrange is not None else (*saved, *given)))
        return self.placed(self.whole, grads, given) if pick is None else pick((*grads, *given, None))

    def plainly(self, inputs: list[Any], cotangents: Sequence[Tensor], saved: Sequence[Tensor]) -> Gradients:
        """The gradients, where cotangents of all outputs arrive and the saved tensors are as they were."""
        if self.whole.executor is None:
            return self.placed(self.whole, (), cotangents)
        args = [*inputs, *cotangents, *saved]
        run = self.whole.executor.ready(args)
        grads = run(*args)
        test = test_of(cotangents)
        if test is not None:
            self._arrange = self._arrangement(len(saved), len(cotangents))
            self._quick = switches(), test, run, self._pick(grads, cotangents)
        return self.placed(self.whole, grads, cotangents)

    def _arrangement(self, residuals: int, cotangents: int) -> Callable[[tuple[Any, ...]], tuple[Any, ...]] | None:
        """What backward takes, inputs, cotangents and residuals, as a choice from what was saved, cotangents and blanks; None where these
        stand in that order already."""
        count, more = len(self.tensors), len(self.tensors) + residuals
        saved = {n: place for place, n in enumerate(self.tensors)}
        inputs = [saved.get(n, more + cotangents + n) for n in range(len(self.blanks))]
        places = (*inputs, *range(more, more + cotangents), *range(count, more))
        return None if places == tuple(range(more + cotangents)) else itemgetter(*places)

    def _pick(self, grads: Sequence[Tensor], cotangents: Sequence[Tensor]) -> Pick | None:
        """`placed`, as a choice from gradients, cotangents and None; None where a dtype changes."""
        places = dict(zip(self.whole.gradients, range(len(grads)), strict=True))
        places |= {n: len(grads) + m for n, m in self.whole.passed}
        pool = (*grads, *cotangents)
        if any(pool[at].dtype is not self.dtypes[n] for n, at in places.items()):
            return None
        return itemgetter(-1, *(places.get(n, -1) for n in range(len(self.dtypes))))

    def part(self, inputs: list[Any], given: Sequence[Tensor | None], saved: Sequence[Tensor], outputs: Sequence[Any]) -> Gradients:
        """The gradients, where some outputs were not used, or somebody looks, or hooks made other tensors of what was saved."""
        found = self.whole
        if outputs:
            names = self.owner.program.results
            found = self.halves.backward(self.stored, [name for name, g in zip(names, given, strict=True) if g is not None])
        cotangents = filled(given, outputs)
        if found.executor is None:
            return self.placed(found, (), cotangents)
        grads = execute(found.executor, [*inputs, *(cotangents[n] for n in found.cotangents), *saved])
        return self.placed(found, grads, cotangents)

    def placed(self, found: Backward, grads: Sequence[Tensor], cotangents: Sequence[Tensor | None]) -> Gradients:
        """Gradients behind a place for the node, at the places of their arguments and in their dtypes."""
        result: list[Tensor | None] = [None] * (1 + len(self.dtypes))
        passed = [(n, cotangents[m]) for n, m in found.passed]
        for n, grad in [*zip(found.gradients, grads, strict=True), *passed]:
            dtype = self.dtypes[n]
            result[n + 1] = grad if grad is None or grad.dtype is dtype else None if dtype is None else grad.to(dtype)
        return tuple(result)


def filled(given: Sequence[Tensor | None], outputs: Sequence[tuple[torch.Size, torch.dtype, torch.device]]) -> list[Tensor]:
    """The cotangents; zeros that take no memory where an output was not used."""
    result = []
    for n, g in enumerate(given):
        if g is None:
            shape, dtype, device = outputs[n]
            g = torch.zeros((), dtype=dtype, device=device).expand(shape)
        result.append(g)
    return result


def _reads(program: Program, name: str) -> bool:
    sizes = {e.tensor for node in program.body for top in expressions(node) for e in walk(top) if isinstance(e, Size)}
    return name in sizes or any(a.tensor == name for node in program.body for a in reads(node))


_saving_hooks: Callable[[bool], Any] = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: True)


class _Node(torch.autograd.Function):
    """One call. Inputs that no gradient reads are not kept."""

    @staticmethod
    def forward(ctx: Any, call: Call, *args: Any) -> Any:
        outputs = call.forward(*args)
        ctx.call = call
        ctx.direct = call.ready and _saving_hooks(True) is None
        if call.numbers:
            ctx.numbers = [args[n] for n in call.numbers]
        read = args if call.whole_inputs else [args[n] for n in call.tensors]
        if not call.several:
            result = outputs[0]
            ctx.save_for_backward(*read, *(outputs if call.kept else outputs[1:]))
            if not result.dtype.is_floating_point:
                ctx.mark_non_differentiable(result)
            return result
        count = call.owner.results
        results, saved = outputs[:count], outputs[count:]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*read, *[results[n] for n in call.kept], *saved)
        if not all(r.dtype.is_floating_point for r in results):
            ctx.mark_non_differentiable(*[r for r in results if not r.dtype.is_floating_point])
        ctx.outputs = [(r.shape, r.dtype, r.device) for r in results]
        return results

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> Any:
        call: Call = ctx.call
        saved = ctx.saved_tensors
        if compiling():  # of a backward that torch traces
            return _looked_up(ctx, call, given, saved, False)
        direct = ctx.direct and not torch.is_grad_enabled()
        if direct and not modes():
            found = call.backward(ctx, given, saved)
            if found is not None:
                return found
        with torch._C._ExcludeDispatchKeyGuard(AUTOCAST):  # the program has its casts
            return _looked_up(ctx, call, given, saved, direct)


# What torch comes to in the end: without asking each time which methods this class has, and on the way in, whether torch.func is at work.
_apply: Callable[..., Any] = super(torch.autograd.Function, _Node).apply
_Node._backward_cls.apply = _Node.backward  # type: ignore[attr-defined]


def _looked_up(ctx: Any, call: Call, given: Sequence[Tensor | None], saved: Sequence[Tensor], direct: bool) -> Gradients:
    count = len(call.tensors)
    inputs = call.inputs(ctx.numbers if call.numbers else (), saved)
    unused = sum([g is None for g in given])
    if direct and not unused and plain(given):
        return call.plainly(inputs, given, saved[count:])  # type: ignore[arg-type]
    if unused == len(given):
        return (None,) * (1 + len(inputs))
    outputs = ctx.outputs if unused else ()
    if torch.is_grad_enabled() or transforms():
        whole: Any = call.owner.derivative(*inputs, *filled(given, outputs))
        return call.placed(Backward(None, (), call.owner.positions), whole if isinstance(whole, tuple) else (whole,), ())
    return call.part(inputs, given, saved[count:], outputs)
