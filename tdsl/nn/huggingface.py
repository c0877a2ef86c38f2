"""Attention for the models of the package `transformers`, which look it up by name in a table of theirs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from tdsl.errors import Unsupported
from tdsl.nn.attention import attend
from tdsl.nn.report import Change

NAME = "tdsl"
PLAIN = ("eager", "sdpa")


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """query [b, heads, i, d], key and value [b, shared heads, j, d] -> [b, i, heads, d], and the weights if output_attentions is set.

    A mask is bools, True where a key is seen, or numbers to be added. Raises Unsupported for sinks and paged caches.
    """
    for name, what in (("s_aux", "attention sinks"), ("cache", "a paged cache")):
        if others.get(name) is not None:
            raise Unsupported(
                f"{what} in the attention of {type(module).__name__} (nn)", help='model.set_attn_implementation("eager") has them'
            )
    extras = []
    if attention_mask is not None:
        extras.append(("bias" if attention_mask.is_floating_point() else "keep", attention_mask))
    if position_bias is not None:
        extras.append(("bias", position_bias))
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and attention_mask is None and query.shape[-2] > 1
    weights = "each" if others.get("output_attentions") else ""
    found = attend(
        query, key, value, extras, causal=causal, scale=scaling, dropout=dropout, soft_cap=softcap, weights=weights, heads_last=True
    )
    return found if weights else (found, None)


def switch(modules: Sequence[tuple[str, nn.Module]]) -> tuple[list[Change], list[Change]]:
    """Lets the attention of all models of `transformers` among modules be tdsl's: what was done, and what was left."""
    if "transformers" not in sys.modules:
        return [], []
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.modeling_utils import AttentionInterface, PreTrainedModel

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    done: list[Change] = []
    left: list[Change] = []
    inside: set[int] = set()
    for name, module in modules:
        if id(module) in inside or not isinstance(module, PreTrainedModel):
            continue
        inside.update(id(m) for m in module.modules())
        before = module.config._attn_implementation
        if before == NAME:
            continue
        if before in PLAIN:
            module.set_attn_implementation(NAME)
        change = f"attention {before!r}"
        if module.config._attn_implementation == NAME:
            done.append(Change(name, change, "tdsl.nn.attention"))
        elif before not in PLAIN:
            left.append(Change(name, change, reason="it was chosen by hand"))
        else:
            left.append(Change(name, change, reason="the model does not look attention up by name"))
    return done, left
