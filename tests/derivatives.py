"""Directional differences through the loops, and programs of the corpus written in torch: what derivatives are compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from tdsl import reference
from tdsl.ir import Program
from tdsl.swap import differentiable
from tests.corpus import CORPUS
from tests.programs import arguments, program_of, to_numpy

Values = dict[str, Any]


def values_of(name: str, seed: int = 0) -> tuple[Program, Values]:
    """A program of the corpus and arguments for the loops, by name."""
    program = program_of(name)
    made = arguments(program, CORPUS[name], torch.float64, seed=seed)
    return program, {n: to_numpy(a) for n, a in zip(program.inputs, made, strict=True)}


def floats(program: Program, values: Mapping[str, Any]) -> list[str]:
    """The inputs that are floats and have derivatives."""
    return [n for n in differentiable(program) if np.asarray(values[n]).dtype.kind == "f"]


def directions(names: Sequence[str], values: Mapping[str, Any], seed: int = 0) -> Values:
    """A random direction for each of some inputs."""
    generator = np.random.default_rng(seed)
    return {n: generator.normal(size=np.shape(values[n])) for n in names}


def along(program: Program, values: Values, direction: Mapping[str, Any], step: float = 1e-6) -> list[np.ndarray]:
    """Central differences of every output along a direction; zeros for outputs that are no floats."""
    ends = [reference.run(program, {**values, **{n: values[n] + sign * step * d for n, d in direction.items()}}) for sign in (1, -1)]
    up, down = ([end[o] for o in program.results] for end in ends)
    return [(u - v) / (2 * step) if u.dtype.kind == "f" else np.zeros(u.shape) for u, v in zip(up, down, strict=True)]


def assert_near(actual: Any, expected: Any, tolerance: float = 1e-5, what: str = "") -> None:
    """Equal shapes, and differences below the tolerance times the largest magnitude (at least 1)."""
    assert np.shape(actual) == np.shape(expected), what
    scale = max(1.0, float(np.abs(expected).max())) if np.size(expected) else 1.0
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale, err_msg=what)


# ---------------------------------------------------------------------------------------------------------------------
# Programs in torch


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: Any) -> torch.Tensor:
    return torch.einsum("hij,hje->hie", torch.softmax(scale * torch.einsum("hid,hjd->hij", q, k), -1), v)


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: Any) -> torch.Tensor:
    scores = scale * torch.einsum("hid,hjd->hij", q, k)
    visible = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    return torch.einsum("hij,hje->hie", torch.softmax(torch.where(visible, scores, -torch.inf), -1), v)


def cross_entropy(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    z = x @ w.T
    return (torch.logsumexp(z, 1) - z.gather(1, t[:, None])[:, 0]).mean()


def layernorm(x: torch.Tensor, g: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt((centred**2).mean(-1, keepdim=True) + 1e-05) * g + b


def rnn(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    h, steps = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        h = torch.tanh(x[:, t] + h @ w.T)
        steps.append(h)
    return torch.stack(steps, 1)


def functions(x: torch.Tensor) -> torch.Tensor:
    smaller = torch.minimum(torch.sin(x), torch.cos(x))
    return x.sigmoid() + torch.log1p(torch.exp(x)) * torch.erf(x) - torch.log1p(x.abs()) + torch.clamp(x, min=0.1) * smaller


COUNTERPARTS: dict[str, Callable[..., torch.Tensor]] = {
    "lecture": lambda a, b: torch.einsum("hik,hjk->hij", a, b),
    "three": lambda a, b, c: a @ b @ c,
    "gram": lambda a: a @ a.T,
    "trace": torch.trace,
    "sqdist": lambda x, y: ((x[:, None] - y[None]) ** 2).sum(-1),
    "product": lambda a: a.prod(1),
    "row_max": lambda a: a.amax(1),
    "linear": lambda x, w, b: F.gelu(x @ w.T + b),
    "rewriting": lambda a, b, c: torch.tanh(a @ b + c),
    "rewrite_input": lambda w, g, lr: w - lr * g,
    "partial_write": lambda x, y: torch.cat([y[:3], x[3:]]),
    "kernel_sum": lambda x, y, b: torch.exp(-((x[:, None] - y[None]) ** 2).sum(-1)) @ b,
    "softmax": lambda x: torch.softmax(x, 1),
    "log_softmax": lambda x: torch.log_softmax(x, 1),
    "cross_entropy": cross_entropy,
    "layernorm": layernorm,
    "attention": attention,
    "attention_causal": causal,
    "causal_mask": lambda a: a.tril(),
    "functions": functions,
    "logarithms": lambda x: torch.log(x) + torch.log2(x) * torch.sqrt(x) - torch.rsqrt(x) + torch.expm1(x),
    "conv_strided": lambda x, w: F.conv1d(x, w, stride=2),
    "gather": lambda e, ids: e[ids],
    "scatter": lambda dst, m, n: torch.zeros(n, m.shape[1], dtype=m.dtype).index_add(0, dst, m),
    "rnn": rnn,
    "scalars": lambda x, alpha, beta: alpha * x + beta,
    "zero_d": lambda x: x / torch.sqrt((x**2).sum()),
}


def torch_arguments(name: str, seed: int = 0) -> tuple[list[Any], list[int]]:
    """Arguments of a counterpart, float64, and the positions of those that derivatives are taken of (0-d tensors for float scalars)."""
    program = program_of(name)
    made = arguments(program, CORPUS[name], torch.float64, seed=seed)
    made = [torch.tensor(a, dtype=torch.float64) if isinstance(a, float) else a for a in made]
    possible = differentiable(program)
    used = [n for n, a in enumerate(made) if isinstance(a, torch.Tensor) and a.is_floating_point() and program.inputs[n] in possible]
    return made, used


def of_floats(function: Callable[..., Any], args: Sequence[Any], used: Sequence[int]) -> Callable[..., Any]:
    """The function of the arguments at the positions `used` alone."""

    def restricted(*given: Any) -> Any:
        full = list(args)
        for position, value in zip(used, given, strict=True):
            full[position] = value
        return function(*full)

    return restricted


def randoms(shapes: Sequence[Any], seed: int) -> list[torch.Tensor]:
    """One random tensor for each shape, float64."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tuple(shape), generator=generator, dtype=torch.float64) for shape in shapes]
