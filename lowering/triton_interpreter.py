"""Triton kernels on CPU tensors, in a process that may also compile them: the source is the very same.

Triton's own interpreter must be chosen by an environment variable before triton is imported, and then nothing compiles.
Here the language is patched only while a kernel runs, under a lock, and restored after:
- the standard library (`tl.sum`, `tl.max`, `tl.zeros`, ..) is rewritten like the kernel's own functions;
- `tl.reduce` and `tl.associative_scan` call the combine function on whole blocks, not on one element at a time;
- bfloat16 tensors are computed on as float32 (Triton's interpreter takes their bits for integers), and a cast rounds;
- what a GPU does otherwise is done otherwise here too: `and`, `or` and `not` on blocks, `range` giving tensors,
  `tl.maximum` dropping NaN by default; a block as a truth value is an error.
Races and the precision of tf32 are not modelled.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from lowering.kernel_source import KernelSource, namespace_of, require_triton
from lowering.triton_rewrite import rewrite

if TYPE_CHECKING:
    import torch

# Held while the language is patched and while anything is compiled: the patches are global to triton.
LANGUAGE_LOCK = threading.RLock()

_MISSING = object()


class DeviceFunction:
    """A `@triton.jit` function under the interpreter: kernels call it, reductions combine with it."""

    def __init__(self, fn: Callable[..., Any], language: Language):
        self.fn = fn
        self.__name__ = fn.__name__
        self._language = language
        self._rewritten: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._rewritten is None:
            self._rewritten = rewrite(self.fn, self._language.helpers)
        kwargs.pop("_semantic", None)
        return self._rewritten(*args, **kwargs)


class Language:
    """Triton's language as NumPy: the patches that make it so, and the values that kernels compute on."""

    def __init__(self) -> None:
        triton = require_triton()
        import numpy
        import triton.language as tl
        from triton.language.semantic import TritonSemantic
        from triton.runtime import interpreter

        self.np = numpy
        self.tl = tl
        self.interpreter = interpreter
        self.builder = interpreter.interpreter_builder
        self.semantic = TritonSemantic(self.builder)
        self.helpers: dict[str, Any] = {
            "tdsl_value": lambda value: self.semantic.to_tensor(value, False),
            "tdsl_and": self._and,
            "tdsl_or": self._or,
            "tdsl_not": self._not,
            "tdsl_truth": self._truth,
            "tdsl_range": self._range,
        }
        # The later patch of a place wins: ours.
        self._patches = {(id(p), name): (p, name, value) for p, name, value in (*self._stock_patches(), *self._own_patches(triton))}

    def _stock_patches(self) -> list[tuple[Any, str, Any]]:
        """What Triton's interpreter sets, found by letting it and comparing: some versions keep no record and never restore."""
        tl = self.tl
        places = [tl, tl.core, tl.math, tl.tensor, tl.dtype, getattr(tl.core, "tensor_descriptor_base", None)]
        places = [p for p in places if p is not None]
        before = [dict(vars(p)) for p in places]
        self.interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
        patches = []
        for place, old in zip(places, before, strict=True):
            for name, value in dict(vars(place)).items():
                if old.get(name, _MISSING) is not value:
                    patches.append((place, name, value))
                    _restore(place, name, old.get(name, _MISSING))
        return patches

    def _own_patches(self, triton: Any) -> list[tuple[Any, str, Any]]:
        tl, np, builder = self.tl, self.np, self.builder
        patches: list[tuple[Any, str, Any]] = []
        jitted = (triton.runtime.jit.JITFunction, self.interpreter.InterpretedFunction)
        known: dict[int, DeviceFunction] = {}
        for module in (tl.standard, tl.random, tl):
            for name, member in vars(module).items():
                if isinstance(member, jitted):
                    function = known.setdefault(id(member), DeviceFunction(member.fn, self))
                    patches.append((module, name, function))
                    if module is tl.standard and name in vars(tl.tensor):
                        patches.append((tl.tensor, name, _method(function)))
        for module in (tl, tl.core):
            patches += [(module, "reduce", self.reduce), (module, "associative_scan", self.scan), (module, "range", self._range)]
        fold = {"create_maxnumf": np.fmax, "create_minnumf": np.fmin}
        patches += [(builder, name, lambda a, b, op=op: builder.binary_op(a, b, op)) for name, op in fold.items()]
        compare = [name for name in dir(builder) if name.startswith(("create_icmp", "create_fcmp"))]
        patches += [(builder, name, self._comparison(getattr(builder, name))) for name in compare]
        patches += [(builder, "create_erf", self._erf), (builder, "create_dot", self._dot)]
        patches += self._bfloat16_patches(type(self.semantic))
        # Triton asks `if other` of blocks, for "is not None": so a block is true here, and what the kernel asks goes through _truth.
        patches.append((tl.tensor, "__bool__", lambda self: self.handle.data.size != 1 or bool(self.handle.data.item())))
        patches.append((tl.tensor, "__index__", lambda self: operator.index(self.handle.data.item())))
        return [*patches, (triton, "jit", self.jit)]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Triton's language means NumPy inside; one thread at a time."""
        with LANGUAGE_LOCK, self.np.errstate(all="ignore"):
            before = [(place, name, vars(place).get(name, _MISSING)) for place, name, _ in self._patches.values()]
            try:
                for place, name, value in self._patches.values():
                    setattr(place, name, value)
                yield
            finally:
                for place, name, value in before:
                    _restore(place, name, value)

    def jit(self, fn: Callable[..., Any] | None = None, **options: Any) -> Any:
        """What `triton.jit` is while the interpreter is active."""
        return DeviceFunction(fn, self) if fn is not None else self.jit_with_options

    def jit_with_options(self, fn: Callable[..., Any]) -> DeviceFunction:
        """What `triton.jit(..)` with options returns: they say how to compile, so nothing here."""
        return DeviceFunction(fn, self)

    # -----------------------------------------------------------------------------------------------------------------
    # Values

    def tensor(self, data: Any, dtype: Any) -> Any:
        """A value of the kernel language from an array; an array of no dimensions is a scalar, which Triton keeps as one of length 1."""
        kind = self.tl.block_type(dtype, list(data.shape)) if data.shape else dtype
        return self.tl.tensor(self.interpreter.TensorHandle(data if data.shape else data.reshape(1), dtype), kind)

    def scalar(self, value: Any, dtype: str) -> Any:
        """A scalar argument; dtype by its tdsl name."""
        return self.tensor(self.np.array(value, dtype=dtype), getattr(self.tl, dtype))

    def pointer(self, address: int, dtype: str) -> Any:
        """A pointer argument; dtype by its tdsl name."""
        kind = self.tl.pointer_type(getattr(self.tl, "int1" if dtype == "bool" else dtype))
        return self.tl.tensor(self.interpreter.TensorHandle(self.np.array([address], dtype=self.np.uint64), kind), kind)

    # -----------------------------------------------------------------------------------------------------------------
    # The language, where it differs from Python

    def _is_tensor(self, value: Any) -> bool:
        return isinstance(value, self.tl.tensor)

    def _and(self, *thunks: Callable[[], Any]) -> Any:
        value = thunks[0]()
        for thunk in thunks[1:]:
            if self._is_tensor(value):
                value = self.semantic.logical_and(value, self.semantic.to_tensor(thunk()))
            elif value:
                value = thunk()
        return value

    def _or(self, *thunks: Callable[[], Any]) -> Any:
        value = thunks[0]()
        for thunk in thunks[1:]:
            if self._is_tensor(value):
                value = self.semantic.logical_or(value, self.semantic.to_tensor(thunk()))
            elif not value:
                value = thunk()
        return value

    def _not(self, value: Any) -> Any:
        return self.semantic.not_(value) if self._is_tensor(value) else not value

    def _truth(self, value: Any) -> bool:
        if self._is_tensor(value) and value.handle.data.size != 1:
            raise ValueError("a block of several elements has no truth value")
        return bool(value)

    def _range(self, first: Any, last: Any = None, step: Any = None, **_: Any) -> Iterator[Any]:
        bounds: list[Any] = [0, first] if last is None else [first, last]
        bounds.append(1 if step is None else step)
        wide = any(self._is_tensor(e) and e.dtype == self.tl.int64 for e in bounds)
        for value in range(*map(_int, bounds)):
            yield self.scalar(value, "int64" if wide else "int32")

    # -----------------------------------------------------------------------------------------------------------------
    # Reductions and scans, on whole blocks

    def _combined(self, combine: DeviceFunction, left: Sequence[Any], right: Sequence[Any], dtypes: Sequence[Any]) -> list[Any]:
        arguments = [self.tensor(data, dtype) for side in (left, right) for data, dtype in zip(side, dtypes, strict=True)]
        result = combine(*arguments)
        values = (result,) if self._is_tensor(result) else tuple(result)
        return [self.np.broadcast_to(v.handle.data, a.shape).astype(a.dtype, copy=False) for v, a in zip(values, left, strict=True)]

    def reduce(self, input: Any, axis: Any, combine_fn: DeviceFunction, keep_dims: bool = False, **_: Any) -> Any:
        """`tl.reduce`: a tree over neighbours, one call of the combine function per level. It keeps the order, as associativity allows."""
        parts = (input,) if self._is_tensor(input) else tuple(input)
        dtypes = [p.dtype for p in parts]
        shape = parts[0].handle.data.shape
        where = None if axis is None else _int(axis) % len(shape)
        np = self.np
        data = [p.handle.data.reshape(-1) if where is None else np.moveaxis(p.handle.data, where, 0) for p in parts]
        while (length := data[0].shape[0]) > 1:
            even = length - length % 2
            joined = self._combined(combine_fn, [d[0:even:2] for d in data], [d[1:even:2] for d in data], dtypes)
            data = [np.concatenate([j, d[even:]]) if even < length else j for j, d in zip(joined, data, strict=True)]
        data = [d[0] for d in data]
        if _value(keep_dims):
            data = [np.reshape(d, [1] * len(shape)) if where is None else np.expand_dims(d, where) for d in data]
        results = tuple(self.tensor(np.asarray(d), dtype) for d, dtype in zip(data, dtypes, strict=True))
        return results[0] if self._is_tensor(input) else results

    def scan(self, input: Any, axis: Any, combine_fn: DeviceFunction, reverse: bool = False, **_: Any) -> Any:
        """`tl.associative_scan`: along the axis one step at a time, over whole slices."""
        parts = (input,) if self._is_tensor(input) else tuple(input)
        dtypes = [p.dtype for p in parts]
        where = _int(axis) % parts[0].handle.data.ndim
        np = self.np
        data = [np.moveaxis(p.handle.data, where, 0) for p in parts]
        if _value(reverse):
            data = [d[::-1] for d in data]
        steps = [[d[0:1] for d in data]]
        for n in range(1, data[0].shape[0]):
            steps.append(self._combined(combine_fn, steps[-1], [d[n : n + 1] for d in data], dtypes))
        scanned = [np.concatenate([step[k] for step in steps]) for k in range(len(parts))]
        if _value(reverse):
            scanned = [d[::-1] for d in scanned]
        results = tuple(self.tensor(np.moveaxis(d, 0, where), dtype) for d, dtype in zip(scanned, dtypes, strict=True))
        return results[0] if self._is_tensor(input) else results

    # -----------------------------------------------------------------------------------------------------------------
    # Operations that Triton's interpreter gets wrong or does slowly

    def _comparison(self, compare: Callable[..., Any]) -> Callable[..., Any]:
        """A comparison whose result says that it is one: Triton's keeps the operands' dtype, which shows when it is broadcast."""
        return lambda a, b: self.interpreter.TensorHandle(compare(a, b).data, self.tl.int1)

    def _erf(self, arg: Any) -> Any:
        import torch

        data = torch.erf(torch.from_numpy(self.np.array(arg.data))).numpy()
        return self.interpreter.TensorHandle(data, arg.dtype.scalar)

    def _dot(self, a: Any, b: Any, c: Any, *_: Any) -> Any:
        kind = c.data.dtype if c.data.dtype.itemsize >= 4 else self.np.dtype("float32")
        product = self.np.matmul(a.data.astype(kind), b.data.astype(kind)) + c.data
        return self.interpreter.TensorHandle(product.astype(c.data.dtype, copy=False), c.dtype.scalar)

    def _bfloat16_patches(self, semantic: Any) -> list[tuple[Any, str, Any]]:
        """Bfloat16 values are float32 values; a cast rounds them to nearest even."""
        tl, stock_cast, stock_constant = self.tl, semantic.cast, semantic.scalar_constant

        def cast(this: Any, input: Any, dst_ty: Any, *args: Any, **kwargs: Any) -> Any:
            if dst_ty.scalar != tl.bfloat16:
                return stock_cast(this, input, dst_ty, *args, **kwargs)
            wide = stock_cast(this, input, tl.float32)
            return tl.tensor(self.interpreter.TensorHandle(_round_to_bfloat16(self.np, wide.handle.data), tl.float32), wide.type)

        def constant(this: Any, value: Any, dtype: Any) -> Any:
            if dtype != tl.bfloat16:
                return stock_constant(this, value, dtype)
            return cast(this, stock_constant(this, value, tl.float32), dtype)

        # On the class: some versions make a new TritonSemantic for each patch.
        return [(semantic, "cast", cast), (semantic, "scalar_constant", constant)]


def _round_to_bfloat16(np: Any, data: Any) -> Any:
    bits = np.ascontiguousarray(data).view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) & np.uint32(0xFFFF0000)
    return np.where(np.isfinite(data), rounded.view(np.float32), data)


def _restore(place: Any, name: str, value: Any) -> None:
    if value is _MISSING:
        delattr(place, name)
    else:
        setattr(place, name, value)


def _method(function: DeviceFunction) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: function(self, *args, **kwargs)


def _value(value: Any) -> Any:
    return getattr(value, "value", value)  # a constexpr's


def _int(value: Any) -> int:
    return operator.index(_value(value))


# ---------------------------------------------------------------------------------------------------------------------
# Running a kernel

_language: list[Language] = []
_functions: dict[str, DeviceFunction] = {}


def run_interpreted(kernel: KernelSource, grid: int, values: Sequence[torch.Tensor | int | float]) -> None:
    """Run every program of the grid, one after the other. `values` are those of `kernel.runtime_args`; tensors are on the CPU."""
    with LANGUAGE_LOCK:
        if not _language:
            _language.append(Language())
        language = _language[0]
        with language.active(), _Memory() as memory:
            if kernel.digest not in _functions:
                _functions[kernel.digest] = namespace_of(kernel)[kernel.name]
            function = _functions[kernel.digest]
            given = dict(zip((a.name for a in kernel.runtime_args), values, strict=True))
            arguments: dict[str, Any] = {}
            for arg in kernel.args:
                if arg.kind == "constexpr":
                    arguments[arg.name] = arg.value
                elif arg.kind == "pointer":
                    arguments[arg.name] = language.pointer(*memory.address(given[arg.name]))
                else:
                    arguments[arg.name] = language.scalar(given[arg.name], arg.dtype)
            language.builder.set_grid_dim(grid, 1, 1)
            for program in range(grid):
                language.builder.set_grid_idx(program, 0, 0)
                function(**arguments)


class _Memory:
    """The memory that a kernel sees: each bfloat16 storage as one of float32, so views and aliases stay what they are."""

    def __init__(self) -> None:
        self._wide: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __enter__(self) -> _Memory:
        return self

    def address(self, tensor: Any) -> tuple[int, str]:
        """Where the first element is, and the dtype there."""
        import torch

        if tensor.dtype != torch.bfloat16:
            return tensor.data_ptr(), str(tensor.dtype).removeprefix("torch.")
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._wide:
            flat = torch.empty(0, dtype=torch.bfloat16).set_(storage, 0, (storage.nbytes() // 2,), (1,))
            self._wide[storage.data_ptr()] = (flat, flat.float())
        return self._wide[storage.data_ptr()][1].data_ptr() + 4 * tensor.storage_offset(), "float32"

    def __exit__(self, failed: Any, *_: Any) -> None:
        import torch

        for flat, wide in self._wide.values() if failed is None else ():
            narrow = wide.to(torch.bfloat16)
            # Only what the kernel wrote is written: an input may lie in memory that is mapped read-only.
            if not torch.equal(narrow.view(torch.int16), flat.view(torch.int16)):
                flat.copy_(narrow)
