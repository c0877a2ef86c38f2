"""Arguments: tensors, meta tensors, Python numbers, or strings such as "bf16[8,1024,64]" -> what inference and lowering read of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tdsl.errors import ArgumentError, DeviceError, DtypeError, counted
from tdsl.infer import Spec
from tdsl.ir import Program, Span
from tdsl.ops import DTYPES, SHORT, STORED_ONLY
from tdsl.signature import place_of, place_of_inputs

TORCH_DTYPES = {name: getattr(torch, name) for name in DTYPES}
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
FLOAT8 = {getattr(torch, name): name for name in STORED_ONLY}
COUNTS_AS = "bfloat16"  # what arithmetic takes a dtype of memory alone for
_NUMBERS = {bool: "bool", int: "int64", float: "float32"}
_DEVICES = ("cpu", "cuda")  # HIP devices are "cuda" to torch
_TEXT = re.compile(r"^\s*(\w+)\s*\[([\d\s,]*)\]\s*$")


@dataclass(frozen=True, slots=True)
class Form:
    """A tensor's layout without its memory, as the caches and the compiler read it. Strides are in elements."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    layout: torch.layout = torch.strided

    def dim(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    def stride(self) -> tuple[int, ...]:
        """The strides, as a tensor's method gives them."""
        return self.strides


def form(arg: Any) -> Any:
    """The Form of a tensor, and a number as it is; sizes that are symbols are what they were when they were traced."""
    if isinstance(arg, torch.Tensor):
        return Form(tuple(map(hint, arg.shape)), tuple(map(hint, arg.stride())), arg.dtype, arg.device, arg.layout)
    return hint(arg)


def hint(value: Any) -> Any:
    """The number behind a symbol; 8 where a symbol stands for what only a run can tell."""
    if not isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return value
    found = value.node.hint
    return value.node.pytype(8 if found is None else found)


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
        if isinstance(arg, torch.Tensor | Form):
            specs[name] = _tensor(program, name, arg)
            strides[name] = tuple(arg.stride())
            if name in integers and arg.dim() == 0 and isinstance(arg, torch.Tensor) and not arg.is_meta:
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


def check_gradients(program: Program, args: Sequence[Any], asks: Sequence[bool]) -> None:
    """Raises DtypeError where a gradient is asked for of a tensor of 8-bit floats, which could not hold it."""
    for name, arg, ask in zip(program.inputs, args, asks, strict=False):
        if ask and arg.dtype in FLOAT8:
            raise DtypeError(
                f"{name} has dtype {FLOAT8[arg.dtype]} and requires a gradient, which 8 bits do not hold",
                span=place_of(program, name),
                help=f"pass {name}.detach(), and differentiate with respect to the tensor that was rounded to it",
            )


def check_callable(program: Program, args: Sequence[Any]) -> None:
    """Raises ArgumentError or DeviceError for an argument that has no values: a call needs real tensors, as the stages do not.

    Meta tensors among themselves, or with 0-d tensors, are fine, as in torch: the outputs are meta tensors then.
    """
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    if tensors and all(a.is_meta for a in [t for t in tensors if t.dim()] or tensors) and not any(isinstance(a, str) for a in args):
        return
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


def _tensor(program: Program, name: str, arg: torch.Tensor | Form) -> Spec:
    if arg.dtype not in _NAMES and arg.dtype not in FLOAT8:
        raise DtypeError(
            f"{name} has dtype {str(arg.dtype).removeprefix('torch.')}, which no kernel computes with",
            span=place_of(program, name),
            help=_instead(name, arg.dtype),
        )
    if arg.layout != torch.strided:
        raise ArgumentError(
            f"{name} has layout {str(arg.layout).removeprefix('torch.')}, and kernels read strided tensors",
            span=place_of(program, name),
            help=f"pass {name}.to_dense()",
        )
    if arg.dtype in FLOAT8:
        return Spec(tuple(arg.shape), COUNTS_AS, stored=FLOAT8[arg.dtype])
    return Spec(tuple(arg.shape), _NAMES[arg.dtype])


def widened(arg: Any) -> Any:
    """A tensor of a dtype of memory alone as what it counts as: for executors that have no such dtype."""
    return arg.to(TORCH_DTYPES[COUNTS_AS]) if getattr(arg, "dtype", None) in FLOAT8 else arg


def _instead(name: str, dtype: torch.dtype) -> str:
    """What to pass in the place of a tensor whose dtype no kernel computes with."""
    if dtype.is_complex:
        return f"pass its real and imaginary parts: torch.view_as_real({name}), whose last index is 0 or 1, and write the products out"
    if dtype.is_floating_point:  # 8 bits and fewer
        return f"pass it as one of {', '.join(STORED_ONLY)} or {', '.join(n for n, d in DTYPES.items() if d.kind == 'float')}"
    return f"cast it to one of {', '.join(DTYPES)}"


def _device(program: Program, given: Mapping[str, Any]) -> torch.device | None:
    """The one device of the tensors with dimensions; 0-d tensors may be elsewhere, as in torch, and count where there is nothing else."""
    tensors = {name: arg for name, arg in given.items() if isinstance(arg, torch.Tensor | Form)}
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
    shape = tuple(int(n) for n in found[2].replace(" ", "").split(",") if n)
    return Spec(shape, COUNTS_AS, stored=dtype) if dtype in STORED_ONLY else Spec(shape, dtype)
