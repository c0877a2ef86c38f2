"""Arguments by name, and `out=`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tdsl.errors import ArgumentError
from tdsl.ir import Program
from tdsl.signature import place_of, place_of_inputs


def positional(program: Program, args: Sequence[Any], named: Mapping[str, Any]) -> tuple[Any, ...]:
    """All arguments in the order of the parameters. Raises ArgumentError for one that is missing, unknown or given twice."""
    names = program.inputs
    usage = f"call it as {program.name}({', '.join(names)})"
    unknown = [n for n in named if n not in names[len(args) :]]
    if unknown:
        what = "is given twice" if unknown[0] in names else f"is no parameter of {program.name}"
        raise ArgumentError(f"{unknown[0]} {what}", span=place_of_inputs(program), help=usage)
    missing = [n for n in names[len(args) :] if n not in named]
    if missing:
        raise ArgumentError(f"{program.name} lacks the argument {', '.join(missing)}", span=place_of(program, missing[0]), help=usage)
    return (*args, *(named[n] for n in names[len(args) :]))


def check_unrecorded(program: Program, tensors: Sequence[Any]) -> None:
    """Raises ArgumentError where a gradient is asked for of a call with `out=`, which as in torch is not recorded."""
    if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in tensors):
        raise ArgumentError(
            f"{program.name}(.., out=..) is not recorded, but one of the arguments requires a gradient",
            help="call it under torch.no_grad(), or without out=",
        )


def copy_into(program: Program, targets: Sequence[Tensor], results: Sequence[Tensor]) -> None:
    """Writes the outputs into tensors of the caller's. Raises ArgumentError for tensors that are not like them."""
    names = program.results
    if len(targets) != len(results):
        raise ArgumentError(f"out= has {len(targets)} tensors for the {len(results)} outputs {', '.join(names)}")
    for name, target, result in zip(names, targets, results, strict=True):
        if (target.shape, target.dtype, target.device) != (result.shape, result.dtype, result.device):
            raise ArgumentError(
                f"out= for {name} is {_described(target)}, but {name} is {_described(result)}",
                help="nothing is cast or resized: pass a tensor of that shape, dtype and device",
            )
        target.copy_(result)


def _described(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)} on {t.device}"
