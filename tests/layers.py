"""Layers from torch.nn and tdsl.nn to compare, and how: NAME -> Case."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import tdsl.nn as ours

CAUSAL = torch.ones(5, 5, dtype=torch.bool).triu(1)
PADDING = torch.tensor([[False] * 4 + [True], [False] * 3 + [True] * 2])
HAS_LINEAR_ENTROPY = hasattr(nn, "LinearCrossEntropyLoss")


@dataclass(frozen=True)
class Case:
    """make: the layer, from torch.nn or tdsl.nn. inputs: sizes of random tensors, or (count, sizes) of integers. named: more arguments."""

    make: Callable[[Any], nn.Module]
    inputs: tuple[Any, ...]
    named: dict[str, Any] = field(default_factory=dict)
    target: Any = None  # of a loss


def _attention(*inputs: tuple[int, ...], options: dict[str, Any] | None = None, **named: Any) -> Case:
    return Case(lambda m: m.MultiheadAttention(6, 2, **(options or {})), inputs, named)


SELF = ((2, 5, 6),) * 3
LAYERS: dict[str, Case] = {
    "linear": Case(lambda m: m.Linear(3, 7), ((2, 5, 3),)),
    "linear_vector": Case(lambda m: m.Linear(3, 7), ((3,),)),
    "linear_no_bias": Case(lambda m: m.Linear(3, 7, bias=False), ((2, 1, 5, 3),)),
    "linear_of_nothing": Case(lambda m: m.Linear(3, 7), ((0, 3),)),
    "rms_norm": Case(lambda m: m.RMSNorm(7), ((2, 5, 7),)),
    "rms_norm_two": Case(lambda m: m.RMSNorm((5, 7), eps=0.1), ((2, 5, 7),)),
    "rms_norm_plain": Case(lambda m: m.RMSNorm(7, elementwise_affine=False), ((7,),)),
    "layer_norm": Case(lambda m: m.LayerNorm(7), ((2, 5, 7),)),
    "layer_norm_two": Case(lambda m: m.LayerNorm((5, 7), eps=1e-3), ((3, 2, 5, 7),)),
    "layer_norm_no_bias": Case(lambda m: m.LayerNorm(7, bias=False), ((7,),)),
    "layer_norm_plain": Case(lambda m: m.LayerNorm(7, elementwise_affine=False), ((5, 7),)),
    "group_norm": Case(lambda m: m.GroupNorm(2, 6), ((2, 6, 5, 3),)),
    "group_norm_flat": Case(lambda m: m.GroupNorm(2, 6), ((3, 6),)),
    "group_norm_plain": Case(lambda m: m.GroupNorm(3, 6, affine=False), ((2, 6, 5),)),
    "embedding": Case(lambda m: m.Embedding(7, 3), ((7, (2, 5)),)),
    "embedding_of_one": Case(lambda m: m.Embedding(7, 3), ((7, ()),)),
    "embedding_padded": Case(lambda m: m.Embedding(3, 2, padding_idx=-1), ((3, (2, 5)),)),
    "conv1d": Case(lambda m: m.Conv1d(4, 6, 3), ((2, 4, 11),)),
    "conv1d_alone": Case(lambda m: m.Conv1d(4, 6, 3, stride=2, padding=1), ((4, 11),)),
    "conv1d_same": Case(lambda m: m.Conv1d(4, 6, 4, padding="same", dilation=3), ((2, 4, 11),)),
    "conv1d_groups": Case(lambda m: m.Conv1d(4, 6, 3, groups=2, bias=False), ((2, 4, 11),)),
    "conv2d": Case(lambda m: m.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(1, 0)), ((2, 3, 7, 6),)),
    "conv2d_depthwise": Case(lambda m: m.Conv2d(3, 6, 3, groups=3, padding="valid", dilation=2), ((2, 3, 7, 6),)),
    "attention": _attention(*SELF),
    "attention_first": _attention(*SELF, options={"batch_first": True}, key_padding_mask=PADDING),
    "attention_each": _attention(*((5, 2, 6),) * 3, options={"bias": False}, average_attn_weights=False, attn_mask=CAUSAL),
    "attention_causal": _attention(*((5, 2, 6),) * 3, attn_mask=CAUSAL, is_causal=True, need_weights=False),
    "attention_biased": _attention(*SELF, options={"batch_first": True}, attn_mask=torch.linspace(-1, 1, 100).view(4, 5, 5)),
    "attention_other": Case(
        lambda m: m.MultiheadAttention(6, 2, kdim=3, vdim=4, batch_first=True), ((2, 5, 6), (2, 7, 3), (2, 7, 4)), {"need_weights": False}
    ),
    "attention_unbatched": _attention(*((5, 6),) * 3),
    "encoder": Case(lambda m: m.TransformerEncoderLayer(6, 2, 9, dropout=0.0, batch_first=True), ((2, 5, 6),), {"src_key_padding_mask": PADDING}),
    "encoder_before": Case(lambda m: m.TransformerEncoderLayer(6, 2, 9, dropout=0.0, norm_first=True, activation="gelu"), ((5, 2, 6),)),
    "encoder_silu": Case(lambda m: m.TransformerEncoderLayer(6, 2, 9, dropout=0.0, activation=nn.SiLU(), bias=False), ((5, 2, 6),)),
    "entropy": Case(lambda m: m.CrossEntropyLoss(), ((5, 7),), target=torch.tensor([1, 6, -100, 0, 1])),
    "entropy_of_one": Case(lambda m: m.CrossEntropyLoss(label_smoothing=0.1), ((7,),), target=torch.tensor(3)),
    "entropy_weighed": Case(
        lambda m: m.CrossEntropyLoss(torch.linspace(0.5, 2, 7, dtype=torch.float64), label_smoothing=0.2), ((2, 7, 3),), target=torch.tensor([[1, -100, 3], [6, 0, 0]])
    ),
    "entropy_sum": Case(lambda m: m.CrossEntropyLoss(reduction="sum", ignore_index=2), ((2, 7),), target=torch.tensor([2, 3])),
    "entropy_each": Case(lambda m: m.CrossEntropyLoss(reduction="none"), ((2, 3, 2, 2),), target=torch.tensor([[[0, 1], [2, 0]], [[1, 1], [-100, 2]]])),
    "entropy_of_chances": Case(lambda m: m.CrossEntropyLoss(label_smoothing=0.1), ((2, 3, 4),), target=torch.linspace(0, 1, 24, dtype=torch.float64).view(2, 3, 4)),
}  # fmt: skip
if HAS_LINEAR_ENTROPY:
    LAYERS |= {
        "linear_entropy": Case(lambda m: m.LinearCrossEntropyLoss(4, 7), ((5, 4),), target=torch.tensor([1, 6, -100, 0, 1])),
        "linear_entropy_smooth": Case(
            lambda m: m.LinearCrossEntropyLoss(4, 7, bias=True, label_smoothing=0.1, reduction="sum", ignore_index=1), ((3, 4),), target=torch.tensor([1, 6, 0])
        ),
    }  # fmt: skip


def several(results: Any) -> tuple[Any, ...]:
    """One output or more, as a tuple."""
    return results if isinstance(results, tuple) else (results,)


def given(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """Random inputs that every dtype can hold; equal sizes are the same tensor, as in self-attention."""
    generator = torch.Generator().manual_seed(1)
    made: dict[Any, Tensor] = {}
    for spec in case.inputs:
        if spec not in made:
            integers = len(spec) == 2 and isinstance(spec[1], tuple)
            numbers = torch.randint(spec[0], spec[1], generator=generator) if integers else torch.randn(spec, generator=generator).bfloat16()
            made[spec] = numbers if integers else numbers.to(dtype)
    return [made[spec] for spec in case.inputs]


def outcome(layer: nn.Module, case: Case, dtype: torch.dtype) -> list[Tensor]:
    """Outputs, and the gradients of inputs and parameters."""
    inputs = given(case, dtype)
    floats = list({id(x): x.requires_grad_() for x in inputs if x.is_floating_point()}.values())
    named = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in case.named.items()}
    args = inputs if case.target is None else [*inputs, case.target]
    results = [r for r in several(layer(*args, **named)) if r is not None]
    loss = sum((r * torch.linspace(0.5, 1.5, r.numel(), dtype=dtype).view(r.shape)).sum() for r in results)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    return [*(r.detach() for r in results), *torch.autograd.grad(loss, [*floats, *parameters])]  # type: ignore[arg-type]


def pair(case: Case, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """The layer of torch and that of tdsl, with the same parameters, none of them 0 or 1."""
    torch.manual_seed(0)
    theirs, mine = case.make(nn), case.make(ours)
    for p in theirs.parameters():
        nn.init.uniform_(p, 0.2, 1.0)
    assert [*theirs.state_dict()] == [*mine.state_dict()]
    mine.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(mine.state_dict())
    return theirs.bfloat16().to(dtype), mine.bfloat16().to(dtype)


def assert_same(found: list[Tensor], expected: list[Tensor], rtol: float = 1e-9, atol: float = 1e-9) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def double(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def compare(mine: Callable[..., Any], theirs: Callable[..., Any], *args: Tensor) -> None:
    """Values and gradients of two functions."""
    both = []
    for f in (mine, theirs):
        y = f(*args)
        wrt = [a for a in args if a.requires_grad]
        both.append([y, *torch.autograd.grad(y, wrt, torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view(y.shape))])
    assert_same(*both)


class Block(nn.Module):
    """Every kind of layer in a row: tokens [b, t] and what follows them -> a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.before = nn.Embedding(9, 6, padding_idx=0), nn.LayerNorm(6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.norm, self.mlp = nn.RMSNorm(6), nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 9))
        self.loss = nn.CrossEntropyLoss()

    def forward(self, tokens: Tensor, following: Tensor) -> Tensor:
        x = self.table(tokens)
        y = self.before(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.loss(self.mlp(self.norm(x)).flatten(0, 1), following.flatten())  # type: ignore[no-any-return]


def losses(model: nn.Module, run: Callable[..., Tensor], length: int) -> list[Tensor]:
    """The loss, and the gradient of every parameter."""
    tokens = torch.arange(2 * length).view(2, length) % 9
    loss = run(tokens, tokens.roll(1, 1))
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]
