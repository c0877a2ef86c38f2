"""The layers of tdsl.nn beside torch's: values, gradients and state dicts."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tdsl
import tdsl.nn as ours
from tdsl import errors
from tdsl.nn.attention_text import Options, attention_program
from tdsl.nn.linear import gated, linear
from tdsl.nn.loss import cross_entropy
from tdsl.nn.norm import layer_norm, rms_norm
from tdsl.nn.ranked import Ranked, expanded
from tests.layers import LAYERS, SELF, Block, Case, assert_same, compare, double, given, losses, outcome, pair, several


@pytest.mark.filterwarnings("ignore:.*padding='same' with even kernel.*")
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_that_of_torch(name: str) -> None:
    theirs, mine = pair(LAYERS[name], torch.float64)
    assert type(mine).__module__.startswith("tdsl.nn.") and isinstance(mine, nn.Module)
    assert_same(outcome(mine, LAYERS[name], torch.float64), outcome(theirs, LAYERS[name], torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["linear", "rms_norm", "layer_norm", "group_norm", "embedding", "conv2d", "attention", "entropy"])
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    theirs, mine = pair(LAYERS[name], dtype)
    found, exact = outcome(mine, LAYERS[name], dtype), outcome(theirs.double(), LAYERS[name], torch.float64)
    assert {t.dtype for t in found} == {dtype}
    for a, b in zip(found, exact, strict=True):
        assert (a.double() - b).abs().max() <= 32 * torch.finfo(dtype).eps * (1 + b.abs().max())


def test_a_wide_layer_keeps_the_dtype_of_its_input() -> None:
    x = torch.randn(5, 7).bfloat16()
    assert ours.LayerNorm(7)(x).dtype == torch.bfloat16 == ours.GroupNorm(1, 7)(x).dtype


# ---------------------------------------------------------------------------------------------------------------------
# Ranks


def test_stars_stand_for_indices() -> None:
    text = "def f(X[*n,k], g[*n]) -> Y[*n]: Y[*n] = mean[e,*t](X[*n,k]) * g[*n]"
    assert "def f(X[k], g) -> Y: Y = mean[e](X[k]) * g" == expanded(text, 0)
    assert "def f(X[n0,n1,k], g[n0,n1]) -> Y[n0,n1]: Y[n0,n1] = mean[e,t0,t1](X[n0,n1,k]) * g[n0,n1]" == expanded(text, 2)


def test_a_product_is_no_star() -> None:
    assert "Y[i] = x[i] *n[i]" == expanded("Y[i] = x[i] *n[i]", 3)
    double = Ranked("Y[*n] = 2 * X[*n]")
    x = torch.randn(2, 3)
    torch.testing.assert_close(pickle.loads(pickle.dumps(double))(2, x), 2 * x)


# ---------------------------------------------------------------------------------------------------------------------
# Layers that torch does not have


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu", "tanh"])
def test_linear_with_an_activation_and_a_residual(activation: str) -> None:
    layer = ours.Linear(3, 7, activation=activation, dtype=torch.float64)
    named = getattr(F, activation)
    compare(
        lambda x, w, b, r: torch.func.functional_call(layer, {"weight": w, "bias": b}, (x, r)),
        lambda x, w, b, r: named(F.linear(x, w, b)) + r,
        double(2, 5, 3), double(7, 3, seed=1), double(7, seed=2), double(2, 5, 7, seed=3),
    )  # fmt: skip
    assert f"activation={activation}" in repr(layer)


@pytest.mark.parametrize("bias", [False, True])
def test_gated_mlp(bias: bool) -> None:
    mlp = ours.GatedMLP(3, 5, "gelu", bias=bias, dtype=torch.float64)
    compare(mlp, lambda x: mlp.down_proj(F.gelu(F.linear(x, mlp.gate_proj.weight, mlp.gate_proj.bias)) * F.linear(x, mlp.up_proj.weight, mlp.up_proj.bias)), double(4, 3))


def test_transposed_linear() -> None:
    layer = ours.TransposedLinear(3, 7, dtype=torch.float64)
    compare(layer, lambda x: x @ layer.weight + layer.bias, double(2, 5, 3))


def test_lora_adapts() -> None:
    base = nn.Linear(3, 7, dtype=torch.float64)
    layer = ours.LoRA.around(base, 2, alpha=6.0)
    x = double(5, 3)
    torch.testing.assert_close(layer(x), base(x))
    assert layer.weight is base.weight and {"weight", "bias", "lora_A", "lora_B"} == layer.state_dict().keys()
    assert ["lora_A", "lora_B"] == [name for name, p in layer.named_parameters() if p.requires_grad]
    compare(
        lambda x, a, b: torch.func.functional_call(layer, {"lora_A": a, "lora_B": b}, (x,)),
        lambda x, a, b: F.linear(x, base.weight + 3.0 * b @ a, base.bias),
        x, double(2, 3, seed=1), double(7, 2, seed=2),
    )  # fmt: skip
    made = ours.LoRA(3, 7, rank=2, dtype=torch.float64)
    made.load_state_dict(base.state_dict(), strict=False)
    torch.testing.assert_close(made(x), base(x))


def test_mixture_of_experts() -> None:
    torch.manual_seed(0)
    experts = [nn.Linear(3, 3, dtype=torch.float64) for _ in range(4)]
    layer = ours.MixtureOfExperts(nn.Linear(3, 4, dtype=torch.float64), experts, top_k=2)

    def dense(x: Tensor) -> Tensor:
        logits, chosen = layer.router(x).topk(2, -1)
        each = torch.stack([e(x) for e in experts], -2)
        return (logits.softmax(-1)[..., None] * each.gather(-2, chosen[..., None].expand(*chosen.shape, 3))).sum(-2)

    compare(layer, dense, double(2, 5, 3))


# ---------------------------------------------------------------------------------------------------------------------
# Attention


def composed(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, bias: Tensor | None = None, causal: bool = False,
    window: int | None = None, alibi: Tensor | None = None, soft_cap: float | None = None, rotary: tuple[Tensor, Tensor] | None = None,
    pairs: bool = False, offset: int = 0, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Attention by torch, the scores in memory."""
    if rotary is not None:
        turned = []
        for x, start in ((q, offset), (k, 0)):
            cos, sin = (angles[start : start + x.shape[-2]] for angles in rotary)
            a, b = (x[..., ::2], x[..., 1::2]) if pairs else x.chunk(2, -1)
            parts = (a * cos - b * sin, b * cos + a * sin)
            turned.append(torch.stack(parts, -1).flatten(-2) if pairs else torch.cat(parts, -1))
        q, k = turned
    k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    s = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    s = s if soft_cap is None else soft_cap * torch.tanh(s / soft_cap)
    i, j = torch.arange(q.shape[-2])[:, None] + offset, torch.arange(k.shape[-2])
    s = s if alibi is None else s - alibi[:, None, None] * (i - j).abs()
    s = s if bias is None else s + bias
    keep = torch.ones_like(s, dtype=torch.bool)
    keep = keep & (j <= i) if causal else keep
    keep = keep if window is None else keep & ((i - j).abs() < window)
    keep = keep if mask is None else keep & mask
    p = torch.softmax(s.masked_fill(~keep, -math.inf), -1)
    return torch.where(keep.any(-1, keepdim=True), p, 0) @ v


ANGLES = (torch.linspace(0, 1, 27, dtype=torch.float64).view(9, 3).cos(), torch.linspace(0, 1, 27, dtype=torch.float64).view(9, 3).sin())
SCORES: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"scale": 0.3},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 2},
    "window_of_both_sides": {"window": 2},
    "alibi": {"alibi": torch.tensor([0.5, 0.25, 0.125, 0.1], dtype=torch.float64), "causal": True},
    "alibi_of_both_sides": {"alibi": torch.tensor([0.5, 0.25, 0.125, 0.1], dtype=torch.float64)},
    "soft_cap": {"soft_cap": 1.5},
    "rotary": {"rotary": ANGLES, "causal": True},
    "rotary_pairs": {"rotary": ANGLES, "pairs": True, "offset": 2},
    "offset": {"offset": 1, "causal": True},
    "offset_alibi": {"offset": 2, "causal": True, "window": 3, "alibi": torch.tensor([0.5, 0.25, 0.125, 0.1], dtype=torch.float64)},
    "bias": {"bias": torch.linspace(-1, 1, 140, dtype=torch.float64).view(4, 5, 7)},
    "bias_of_keys": {"bias": torch.linspace(-1, 1, 7, dtype=torch.float64).view(1, 1, 7)},
    "mask": {"mask": torch.arange(2 * 5 * 7).view(2, 1, 5, 7) % 3 > 0},
    "mask_and_bias": {"mask": torch.arange(35).view(5, 7) % 4 > 0, "bias": torch.linspace(-1, 1, 8, dtype=torch.float64).view(2, 4, 1, 1) * torch.ones(7, dtype=torch.float64)},
}  # fmt: skip


@pytest.mark.parametrize("shared", [4, 2])
@pytest.mark.parametrize("name", SCORES)
def test_attention_with_scores_of_every_kind(name: str, shared: int) -> None:
    options = dict(SCORES[name])
    keys = 5 if "window" in name and "offset" not in name else 7
    wanted = {key: options.pop(key).clone().requires_grad_() for key in ("bias", "alibi") if key in options}
    args = [double(2, 4, 5, 6), double(2, shared, keys, 6, seed=1), double(2, shared, keys, 3, seed=2)]
    both = [lambda *a, f=f: f(*a[:3], **dict(zip(wanted, a[3:], strict=True)), **options) for f in (ours.attention, composed)]
    compare(*both, *args, *wanted.values())


def test_attention_needs_no_batch() -> None:
    compare(lambda *a: ours.attention(*a, causal=True), lambda *a: composed(*a, causal=True), double(4, 5, 6), double(2, 5, 6, seed=1), double(2, 5, 3, seed=2))
    compare(ours.attention, composed, double(2, 1, 4, 1, 6), double(2, 1, 1, 3, 6, seed=1), double(2, 1, 1, 3, 3, seed=2))


def test_a_query_that_sees_nothing_gives_zeros() -> None:
    q, k, v = double(2, 3, 4), double(2, 5, 4, seed=1), double(2, 5, 4, seed=2)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1] = False
    compare(lambda *a: ours.attention(*a, mask), lambda *a: F.scaled_dot_product_attention(*a, attn_mask=mask), q, k, v)
    assert not ours.attention(q, k, v, mask)[:, 1].any()


def test_dropout_takes_the_random_numbers_of_torch() -> None:
    case = Case(lambda m: m.MultiheadAttention(6, 2, dropout=0.5), SELF)
    theirs, mine = pair(case, torch.float64)
    found = []
    for layer in (mine, theirs):
        torch.manual_seed(3)
        found.append(outcome(layer, case, torch.float64))
    assert_same(*found)
    assert_same(outcome(mine.eval(), case, torch.float64), outcome(theirs.eval(), case, torch.float64))


def test_the_scores_are_never_in_memory() -> None:
    sizes = ["bf16[2,8,1024,64]", "bf16[2,2,1024,64]", "bf16[2,2,1024,64]"]
    grouped = ["bf16[2,2,4,1024,64]", *sizes[1:]]
    masked = attention_program(Options(batch=1, grouped=True, extras=(("keep", (True, False, False, True, True)),))).at(0)
    plan = masked.plan(*grouped, 0.125, "bool[2,1,1,1024,1024]", target="cuda:90")
    assert 1 == len(plan.kernels) and not plan.memory
    backward = masked.grad(("Q", "K", "V")).plan(*grouped, 0.125, "bool[2,1,1,1024,1024]", "bf16[2,2,4,1024,64]", target="cuda:90")
    scores = {f"{tensor}{end}" for tensor in ("S", "T", "E") for end in ("", ".grad")}
    assert not scores & set(backward.memory) and max(backward.memory.values()) < 2 * 8 * 1024 * 1024


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes


UNSUPPORTED: dict[str, tuple[Callable[[], object], type[errors.Error], str]] = {
    "padding_mode": (lambda: ours.Conv1d(3, 3, 3, padding=1, padding_mode="circular"), errors.Unsupported, "pad the input"),
    "max_norm": (lambda: ours.Embedding(3, 3, max_norm=1.0), errors.Unsupported, "torch.nn.Embedding"),
    "sparse": (lambda: ours.Embedding(3, 3, sparse=True), errors.Unsupported, "torch.nn.Embedding"),
    "by_frequency": (lambda: ours.Embedding(3, 3, scale_grad_by_freq=True), errors.Unsupported, "torch.nn.Embedding"),
    "bias_kv": (lambda: ours.MultiheadAttention(4, 2, add_bias_kv=True), errors.Unsupported, "append a row"),
    "zero_attn": (lambda: ours.MultiheadAttention(4, 2, add_zero_attn=True), errors.Unsupported, "append a row"),
    "activation": (lambda: ours.Linear(3, 3, activation="mish"), errors.UnknownFunction, "gelu"),
    "encoder": (lambda: ours.TransformerEncoderLayer(4, 2, 4, activation=F.hardtanh), errors.Unsupported, "relu"),
    "out_features": (lambda: ours.LinearCrossEntropyLoss(3, 4, out_features=(2,)), errors.Unsupported, "flatten"),
    "smoothing": (lambda: ours.LinearCrossEntropyLoss(3, 4, label_smoothing=2.0), errors.ArgumentError, "from 0 to 1"),
    "class_weights": (lambda: ours.LinearCrossEntropyLoss(3, 4, weight=torch.ones(3)), errors.ArgumentError, "per class"),
    "rank": (lambda: ours.LoRA(3, 4, rank=0), errors.ArgumentError, "from 1 on"),
    "experts": (lambda: ours.MixtureOfExperts(nn.Identity(), [nn.Identity()], top_k=2), errors.ArgumentError, "as many"),
    "heads": (lambda: ours.attention(torch.ones(3, 2, 4), torch.ones(2, 2, 4), torch.ones(2, 2, 4)), errors.ArgumentError, "multiple"),
    "no_heads": (lambda: ours.attention(*(torch.ones(2, 4),) * 3), errors.ArgumentError, "unsqueeze"),
    "nothing_seen": (lambda: ours.attention(*(torch.ones(1, 2, 4),) * 3, window=0), errors.ArgumentError, "window of 1"),
    "before": (lambda: ours.attention(*(torch.ones(1, 2, 4),) * 3, offset=-1), errors.ArgumentError, "number of keys"),
    "mask": (lambda: ours.attention(*(torch.ones(1, 2, 4),) * 3, torch.ones(3, 2) > 0), errors.ArgumentError, "queries, keys"),
    "angles": (lambda: ours.attention(*(torch.ones(1, 2, 4),) * 3, rotary=(torch.ones(2, 4),) * 2), errors.ArgumentError, "d / 2"),
    "places": (lambda: ours.attention(*(torch.ones(1, 2, 4),) * 3, rotary=(torch.ones(2, 2),) * 2, offset=1), errors.ArgumentError, "row per place"),
    "hint": (lambda: ours.MultiheadAttention(4, 2)(*(torch.ones(2, 4),) * 3, is_causal=True), errors.ArgumentError, "causal mask"),
    "target": (lambda: ours.CrossEntropyLoss()(torch.ones(3, 4), torch.zeros(4, dtype=torch.long)), errors.ArgumentError, "[3]"),
    "size": (lambda: ours.Linear(3, 4)(torch.ones(2, 5)), errors.SizeMismatch, "equal names agree"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_mistake_is_an_error_with_its_mend(name: str) -> None:
    call, error, mend = UNSUPPORTED[name]
    with pytest.raises(error) as raised:
        call()
    assert raised.value.help is not None and mend in raised.value.help, raised.value


def test_a_number_that_is_no_row_or_class_is_an_error() -> None:
    with pytest.raises(errors.BoundsError):
        ours.Embedding(3, 2)(torch.tensor([3]))
    with pytest.raises(errors.BoundsError):
        ours.CrossEntropyLoss()(torch.ones(2, 3), torch.tensor([0, 3]))


# ---------------------------------------------------------------------------------------------------------------------
# Graphs and kernels


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("error:.*lru_cache.*")
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_block_compiles_without_graph_break(dynamic: bool, fresh_compiler: None) -> None:
    plain = Block().double()
    model = copy.deepcopy(plain)
    ours.replace(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for length in (5, 7):
        assert_same(losses(model, compiled, length), losses(plain, plain, length))


def test_a_layer_of_a_rank_that_was_never_called_compiles_and_exports(fresh_compiler: None) -> None:
    layer = ours.TransformerEncoderLayer(6, 2, 9, dropout=0.0, batch_first=True, dtype=torch.float64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = double(2, 3, 6)
    torch.testing.assert_close(compiled(x), layer(x))
    norm = ours.RMSNorm(6, eps=1e-3, dtype=torch.float64)
    y = double(2, 1, 1, 1, 3, 6)
    torch.testing.assert_close(torch.export.export(norm, (y,)).module()(y), F.rms_norm(y, (6,), norm.weight, 1e-3))


KERNELS: dict[str, tuple[Ranked, int, tuple[Any, ...]]] = {
    "linear": (linear(True, "gelu", True), 2, ((2, 5, 3), (7, 3), (7,), (2, 5, 7))),
    "gated": (gated(False), 1, ((5, 3), (7, 3), (7, 3))),
    "rms_norm": (rms_norm(1, True), 1, ((5, 7), 1e-5, (7,))),
    "layer_norm": (layer_norm(1, True, True), 1, ((5, 7), 1e-5, (7,), (7,))),
    "entropy": (cross_entropy(1, 0, False, False, "mean", linear="weight"), 0, ((5, 4), (7, 4), torch.arange(5), torch.arange(5), 3)),
    "attention": (attention_program(Options(batch=1, causal=True, heads_last=True)), 0, ((2, 2, 5, 4), (2, 2, 5, 4), (2, 2, 5, 3), 0.5)),
    "masked": (attention_program(Options(grouped=True, extras=(("bias", (False, False, True, True)),))), 0, ((1, 2, 5, 4), (1, 7, 4), (1, 7, 3), 0.5, (1, 1, 5, 7))),
}  # fmt: skip


@pytest.mark.parametrize("name", KERNELS)
def test_the_kernels_of_a_gpu_agree(name: str) -> None:
    """Values and gradients through Triton's interpreter are those of the CPU."""
    pytest.importorskip("triton")
    ranked, rank, specs = KERNELS[name]
    program = ranked.at(rank).program
    args = [torch.randn(s, generator=torch.Generator().manual_seed(n)) if isinstance(s, tuple) else s for n, s in enumerate(specs)]
    both = []
    for backend in ("triton", "torch"):
        inputs = [a.clone().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
        y = tdsl.function(program, backend=backend)(*inputs)
        wrt = [a for a in inputs if isinstance(a, Tensor) and a.requires_grad]
        both.append([y.detach(), *torch.autograd.grad(y, wrt, torch.linspace(0.5, 1.5, y.numel()).view(y.shape))])
    assert_same(*both, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAYERS)
def test_layers_on_a_gpu(name: str) -> None:
    theirs, mine = (layer.cuda() for layer in pair(LAYERS[name], torch.float32))
    case = LAYERS[name]
    moved = Case(case.make, case.inputs, {k: v.cuda() if isinstance(v, Tensor) else v for k, v in case.named.items()})
    with torch.device("cuda"):
        inputs = [x.cuda() for x in given(moved, torch.float32)]
        args = inputs if case.target is None else [*inputs, case.target.cuda() if not case.target.is_floating_point() else case.target.float().cuda()]
        found, expected = (several(layer(*args, **moved.named))[0] for layer in (mine, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_importing_tdsl_imports_no_layers() -> None:
    code = "import sys, tdsl; assert not {'torch', 'tdsl.nn'} & set(sys.modules); tdsl.nn.Linear; assert 'tdsl.nn' in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
