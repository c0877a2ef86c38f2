"""Arguments: tensors, meta tensors, Python numbers, or strings such as "bf16[8,1024,64]" -> what inference and lowering read of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tdsl.errors import ArgumentError, DeviceError, DtypeError
from tdsl.infer import Spec
from tdsl.ir import Program, Span
from tdsl.ops import DTYPES, SHORT
from tdsl.ranges import counted
from tdsl.signature import place_of, place_of_inputs

TORCH_DTYPES = {name: getattr(torch, name) for name in DTYPES}
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_NUMBERS = {bool: "bool", int: "int64", float: "float32"}
_DEVICES = ("cpu", "cuda")  # HIP devices are "cuda" to torch
_TEXT = re.compile(r"^\s*(\w+)\s*\[([\d\s,]*)\]\s*$")


@dataclass(frozen=True, slots=True)
class Layout:
    """The arguments of one call.

    specs: shape and dtype by name. strides: in elements. values: of integer scalars. device: None if all are numbers.
    """

    specs: dict[str, Spec]
    strides: dict[str, tuple[int, ...]]
    values: dict[str, int]
    device: torch.device | None


def layout(program: Program, args: Sequence[Any], integers: frozenset[str] = frozenset()) -> Layout:
    """What the compiler needs of some arguments. integers: scalars whose value it needs, since sizes or subscripts depend on them.

    Raises ArgumentError for a wrong number or kind of arguments, DtypeError for an element type that has no kernel, DeviceError for
    a mix of devices.
    """
    names = program.inputs
    if len(args) != len(names):
        raise ArgumentError(
            f"{program.name} takes {counted(len(names), 'argument')}, but got {len(args)}",
            span=place_of_inputs(program),
            help=f"call it as {program.name}({', '.join(names)})",
        )
    given = dict(zip(names, args, strict=True))
    specs: dict[str, Spec] = {}
    strides: dict[str, tuple[int, ...]] = {}
    values: dict[str, int] = {}
    for name, arg in given.items():
        if isinstance(arg, torch.Tensor):
            specs[name] = _tensor(program, name, arg)
            strides[name] = tuple(arg.stride())
            if name in integers and arg.dim() == 0 and arg.device.type != "meta":
                values[name] = int(arg.item())
        elif type(arg) in _NUMBERS:
            specs[name] = Spec((), _NUMBERS[type(arg)], weak=True)
            if isinstance(arg, int):
                values[name] = int(arg)
        elif isinstance(arg, str):
            specs[name] = parse_spec(name, arg, place_of(program, name))
        else:
            raise ArgumentError(
                f"{name} is {_article(type(arg).__name__)}; an argument is a torch tensor or a Python number",
                span=place_of(program, name),
                help=f"pass torch.as_tensor({name})",
            )
    return Layout(specs, strides, values, _device(program, given))


def check_callable(program: Program, args: Sequence[Any]) -> None:
    """Raises ArgumentError or DeviceError for an argument that has no values: a call needs real tensors, as the stages do not."""
    for name, arg in zip(program.inputs, args, strict=True):
        mend = f"{program.name}.plan(..) and {program.name}.emit(..) take it; a call needs the values"
        if isinstance(arg, str):
            raise ArgumentError(f"{name} is {arg!r}, which describes a tensor and is none", span=place_of(program, name), help=mend)
        if isinstance(arg, torch.Tensor) and arg.device.type not in _DEVICES:
            what = "has no values" if arg.device.type == "meta" else "no executor serves"
            raise DeviceError(
                f"{name} is on {arg.device}, which {what}",
                span=place_of(program, name),
                help=mend if arg.device.type == "meta" else f"move it: {name}.cpu(), or to a CUDA or HIP device",
            )


def _tensor(program: Program, name: str, arg: torch.Tensor) -> Spec:
    if arg.dtype not in _NAMES:
        raise DtypeError(
            f"{name} has dtype {str(arg.dtype).removeprefix('torch.')}, which no kernel computes with",
            span=place_of(program, name),
            help=f"cast it to one of {', '.join(DTYPES)}",
        )
    if arg.layout != torch.strided:
        raise ArgumentError(
            f"{name} has layout {str(arg.layout).removeprefix('torch.')}, and kernels read strided tensors",
            span=place_of(program, name),
            help=f"pass {name}.to_dense()",
        )
    return Spec(tuple(arg.shape), _NAMES[arg.dtype])


def _device(program: Program, given: Mapping[str, Any]) -> torch.device | None:
    """The one device of the tensors with dimensions; 0-d tensors may be elsewhere, as in torch, and count where there is nothing else."""
    tensors = {name: arg for name, arg in given.items() if isinstance(arg, torch.Tensor)}
    first = next((name for name, arg in tensors.items() if arg.dim()), next(iter(tensors), None))
    if first is None:
        return None
    device = tensors[first].device
    for name, arg in tensors.items():
        if arg.dim() and arg.device != device:
            raise DeviceError(
                f"{name} is on {arg.device}, but {first} is on {device}",
                span=place_of(program, name),
                help=f"move one of them: {name}.to({str(device)!r})",
            )
    return device


def _article(noun: str) -> str:
    return f"{'an' if noun[0].lower() in 'aeiou' or noun == 'ndarray' else 'a'} {noun}"


def parse_spec(name: str, text: str, span: Span | None = None) -> Spec:
    """`bf16[8,64]` -> Spec((8, 64), "bfloat16"); `fp32[]` is a 0-d tensor."""
    found = _TEXT.match(text)
    dtype = found and (SHORT.get(found[1]) or (found[1] if found[1] in DTYPES else None))
    if found is None or dtype is None:
        raise ArgumentError(
            f"{name} is {text!r}, which describes no tensor",
            span=span,
            help='write a dtype and sizes, as "bf16[8,1024,64]"; dtypes: ' + ", ".join(SHORT),
        )
    return Spec(tuple(int(n) for n in found[2].replace(" ", "").split(",") if n), dtype)
