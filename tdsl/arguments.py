"""Arguments: tensors, meta tensors, Python numbers, or strings such as "bf16[8,1024,64]" -> what inference and lowering read of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tdsl.errors import ArgumentError, DeviceError, DtypeError
from tdsl.infer import Spec
from tdsl.ir import Program
from tdsl.ops import DTYPES, SHORT

TORCH_DTYPES = {name: getattr(torch, name) for name in DTYPES}
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_NUMBERS = {bool: "bool", int: "int64", float: "float32"}
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
        raise ArgumentError(f"{program.name} takes {len(names)} arguments ({', '.join(names)}), but got {len(args)}")
    specs: dict[str, Spec] = {}
    strides: dict[str, tuple[int, ...]] = {}
    values: dict[str, int] = {}
    device: torch.device | None = None
    for name, arg in zip(names, args, strict=True):
        if isinstance(arg, torch.Tensor):
            if arg.dtype not in _NAMES:
                known = ", ".join(DTYPES)
                raise DtypeError(
                    f"{name} has dtype {str(arg.dtype).removeprefix('torch.')}, which no kernel computes with",
                    help=f"cast it to one of {known}",
                )
            if arg.layout != torch.strided:
                raise ArgumentError(f"{name} has layout {arg.layout}; kernels read strided tensors", help=f"pass {name}.to_dense()")
            if device is not None and arg.device != device and arg.device.type != "meta" and arg.dim():
                raise DeviceError(
                    f"{name} is on {arg.device}, but another argument is on {device}", help=f"move one of them: {name}.to({str(device)!r})"
                )
            device = arg.device if device is None or arg.dim() else device
            specs[name] = Spec(tuple(arg.shape), _NAMES[arg.dtype])
            strides[name] = tuple(arg.stride())
            if name in integers and arg.dim() == 0 and arg.device.type != "meta":
                values[name] = int(arg.item())
        elif type(arg) in _NUMBERS:
            specs[name] = Spec((), _NUMBERS[type(arg)], weak=True)
            if isinstance(arg, int):
                values[name] = int(arg)
        elif isinstance(arg, str):
            specs[name] = parse_spec(name, arg)
        else:
            raise ArgumentError(
                f"{name} is a {type(arg).__name__}; an argument is a torch tensor or a Python number", help=f"pass torch.as_tensor({name})"
            )
    return Layout(specs, strides, values, device)


def parse_spec(name: str, text: str) -> Spec:
    """`bf16[8,64]` -> Spec((8, 64), "bfloat16"); `fp32[]` is a 0-d tensor."""
    found = _TEXT.match(text)
    dtype = found and (SHORT.get(found[1]) or (found[1] if found[1] in DTYPES else None))
    if found is None or dtype is None:
        raise ArgumentError(
            f"{name} is {text!r}, which describes no tensor",
            help='write a dtype and sizes, as "bf16[8,1024,64]"; dtypes: ' + ", ".join(SHORT),
        )
    return Spec(tuple(int(n) for n in found[2].replace(" ", "").split(",") if n), dtype)
