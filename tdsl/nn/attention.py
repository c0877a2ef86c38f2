"""Attention: a function of queries, keys and values, and torch.nn.MultiheadAttention by it. The notation is in attention_text.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tdsl.errors import ArgumentError, Unsupported
from tdsl.nn.attention_text import Options, attention_program
from tdsl.nn.linear import biases, linear
from tdsl.nn.ranked import Ranked, by_options

Extra = tuple[str, Tensor]  # "keep", "hide" or "bias", and a tensor that is broadcast to [.., heads, i, j]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    alibi: Tensor | None = None,
    soft_cap: float | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    pairs: bool = False,
    offset: int = 0,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(scores) @ v for scores = scale * q @ k.mT: q [.., heads, i, d], k [.., heads, j, d], v [.., heads, j, e] -> [.., heads, i, e].

    The scores are in memory in neither direction. Keys and values may have fewer heads: each serves as many heads of queries.
    mask: bools, True where a key is seen; bias: is added to the scores. Both are broadcast to [.., heads, i, j].
    causal: a query sees keys up to its own place. window: it sees this many, itself among them; on both sides where not causal.
    alibi: slopes [heads], by which scores fall off per step (Press et al. 2021). soft_cap: scores become soft_cap * tanh(score / soft_cap).
    rotary: (cos, sin), each [places, d / 2], by which q and k are turned (Su et al. 2021): halves of d as in Llama, or with `pairs`
    neighbours as in GPT-J. offset: the place of the first query among the keys. scale: 1 / sqrt(d) by default.
    dropout: chance of a weight to be zero; takes random numbers, and memory, as torch's does.
    A query that sees nothing gives zeros. Raises ArgumentError for heads, masks or places that do not fit.
    """
    extras: list[Extra] = []
    if mask is not None:
        extras.append(("keep" if mask.dtype == torch.bool else "bias", mask))
    if bias is not None:
        extras.append(("bias", bias))
    result: Tensor = attend(
        q, k, v, extras, causal=causal, window=window, alibi=alibi, soft_cap=soft_cap, rotary=rotary, pairs=pairs, offset=offset,
        scale=scale, dropout=dropout,
    )  # fmt: skip
    return result


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extras: Sequence[Extra] = (),
    *,
    causal: bool = False,
    window: int | None = None,
    alibi: Tensor | None = None,
    soft_cap: float | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    pairs: bool = False,
    offset: int = 0,
    scale: float | None = None,
    dropout: float = 0.0,
    weights: str = "",
    heads_last: bool = False,
) -> Any:
    """`attention` with any number of masks and biases. weights: "mean" or "each" gives the weights too, per head or their mean.
    heads_last: the output is [.., i, heads, e]."""
    _check(q, k, v, window, rotary, offset)
    heads, shared, batch = q.shape[-3], k.shape[-3], q.dim() - 3
    grouped = heads != shared
    shape = (*q.shape[:-3], heads, q.shape[-2], k.shape[-2])
    split = (shared, heads // shared)
    dropped = [nn.functional.dropout(q.new_ones(shape), dropout)] if dropout else []
    tensors = [_fitting(extra, shape) for _, extra in extras]
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    turned: list[Tensor] = []
    if rotary is not None:
        for start, x in ((offset, q), (0, k)):
            turned += [angles.narrow(0, start, x.shape[-2]) for angles in rotary]
        q, k = (x.unflatten(-1, (-1, 2) if pairs else (2, -1)) for x in (q, k))
    if grouped:
        q = q.unflatten(batch, split)
        alibi = alibi if alibi is None else alibi.unflatten(0, split)
        dropped = [d.unflatten(batch, split) for d in dropped]
        tensors = [_split_heads(t, split) for t in tensors]
    options = Options(
        batch=batch,
        grouped=grouped,
        causal=causal,
        window=window,
        soft_cap=soft_cap,
        offset=offset != 0,
        alibi=alibi is not None,
        extras=tuple([(kind, tuple([size != 1 for size in t.shape])) for (kind, _), t in zip(extras, tensors, strict=True)]),
        rotary="" if rotary is None else "pairs" if pairs else "halves",
        dropout=bool(dropped),
        weights=weights,
        heads_last=heads_last,
    )
    args = [q, k, *turned, v, scale, *([offset] if offset else []), *biases(alibi), *tensors, *dropped]
    found = attention_program(options)(0, *args)
    if not grouped:
        return found
    at = batch + 1 if heads_last else batch
    if not weights:
        return found.flatten(at, at + 1)
    return found[0].flatten(at, at + 1), found[1].flatten(batch, batch + 1) if weights == "each" else found[1]


def _check(q: Tensor, k: Tensor, v: Tensor, window: int | None, rotary: tuple[Tensor, Tensor] | None, offset: int) -> None:
    if min(q.dim(), k.dim(), v.dim()) < 3:
        raise ArgumentError("attention takes tensors [.., heads, places, channels]", help="unsqueeze(-3) makes one head")
    if k.shape[-3] != v.shape[-3] or q.shape[-3] % k.shape[-3]:
        raise ArgumentError(
            f"{q.shape[-3]} heads of queries do not share {k.shape[-3]} of keys and {v.shape[-3]} of values",
            help="keys and values have the same number of heads, and queries a multiple of it",
        )
    if window is not None and window < 1:
        raise ArgumentError(f"a window of {window} keys sees nothing", help="a window of 1 is the query's own place")
    if offset < 0:
        raise ArgumentError(f"the first query cannot stand at {offset}", help="offset is the number of keys before the first query")
    if rotary is not None:
        wanted = (max(offset + q.shape[-2], k.shape[-2]), q.shape[-1] // 2)
        for angles in rotary:
            if angles.dim() != 2 or angles.shape[0] < wanted[0] or angles.shape[1] != wanted[1] or q.shape[-1] % 2:
                raise ArgumentError(
                    f"cos or sin has shape {tuple(angles.shape)}, for {wanted[0]} places and heads of {q.shape[-1]} channels",
                    help="one row per place, and one angle per two channels: [places, d / 2]",
                )


def _fitting(extra: Tensor, shape: Sequence[int]) -> Tensor:
    """A mask or bias whose every size is 1 or that of the scores."""
    last = shape[len(shape) - extra.dim() :]
    if extra.dim() > len(shape) or any(a not in (1, b) for a, b in zip(extra.shape, last, strict=True)):
        raise ArgumentError(
            f"a mask or bias of shape {tuple(extra.shape)} is not broadcast to scores of shape {tuple(shape)}",
            help="its last dimensions are [.., heads, queries, keys], each of that size or 1",
        )
    return extra


def _split_heads(extra: Tensor, split: tuple[int, int]) -> Tensor:
    """The dimension of heads as two."""
    if extra.dim() < 3:
        return extra
    return extra.unsqueeze(-3) if extra.shape[-3] == 1 else extra.unflatten(-3, split)


# ---------------------------------------------------------------------------------------------------------------------
# torch.nn.MultiheadAttention


@by_options
def _to_heads(bias: bool) -> Ranked:
    return Ranked(f"""
def to_heads(X[*n,i,c], W[h,d,c]{", b[h,d]" if bias else ""}) -> Y[*n,h,i,d]:
    Z[*n,h,i,d] += X[*n,i,c] * W[h,d,c]
    Y[*n,h,i,d]  = Z[*n,h,i,d]{" + b[h,d]" if bias else ""}
""")


@by_options
def _to_all_heads(bias: bool) -> Ranked:
    params, statements, outputs = "", "", []
    for number, name in enumerate("QKV"):
        outputs.append(f"{name}[*n,h,i,d]")
        statements += f"""
    {name}Z[*n,h,i,d] += X[*n,i,c] * W[{number},h,d,c]
    {name}[*n,h,i,d] = {name}Z[*n,h,i,d]{f" + b[{number},h,d]" if bias else ""}"""
    params = ", b[three,h,d]" if bias else ""
    return Ranked(f"def to_heads(X[*n,i,c], W[three,h,d,c]{params}) -> {', '.join(outputs)}:{statements}\n")


class MultiheadAttention(nn.MultiheadAttention):
    """torch.nn.MultiheadAttention: the same arguments, masks and results.

    Raises Unsupported for add_bias_kv and add_zero_attn. A query that sees nothing gives zeros and not NaN.
    """

    def __init__(self, *args: Any, **named: Any):
        super().__init__(*args, **named)
        reason = self.unsupported()
        if reason:
            raise Unsupported(f"tdsl.nn.MultiheadAttention: {reason}", help="append a row to key and value, and a column to the masks")

    def unsupported(self: nn.MultiheadAttention) -> str | None:
        """What of a torch.nn.MultiheadAttention this one does not do."""
        if self.bias_k is not None:
            return "add_bias_kv is not written"
        return "add_zero_attn is not written" if self.add_zero_attn else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The output and, if asked for, the weights. is_causal says that attn_mask is the causal one, as in torch."""
        if is_causal and attn_mask is None:
            raise ArgumentError("is_causal is a hint about attn_mask, which is missing", help="pass the causal mask too, as torch wants it")
        first = self.batch_first or query.dim() == 2
        q, k, v = self._heads(query, key, value, first)
        causal = is_causal and key_padding_mask is None and not need_weights and query.shape == key.shape
        extras = [] if causal or attn_mask is None else [_masked(self._per_head(attn_mask, q))]
        if key_padding_mask is not None:
            kind, padding = _masked(key_padding_mask)
            extras.append((kind, padding[..., None, None, :]))
        dropout = self.dropout if self.training else 0.0
        weights = ("mean" if average_attn_weights else "each") if need_weights else ""
        found = attend(q, k, v, extras, causal=causal, dropout=dropout, weights=weights, heads_last=True)
        o, given = found if need_weights else (found, None)
        o = o.flatten(-2)
        out = self.out_proj
        o = linear(out.bias is not None)(o.dim() - 1, o, out.weight, *biases(out.bias))
        return (o if first else o.transpose(0, 1)), given

    def _per_head(self, mask: Tensor, q: Tensor) -> Tensor:
        """A mask [batch * heads, i, j] as [batch, heads, i, j]."""
        return mask.unflatten(0, (-1, self.num_heads)) if mask.dim() == 3 and q.dim() == 4 else mask

    def _heads(self, query: Tensor, key: Tensor, value: Tensor, first: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [batch, heads, places, channels]; one program where all come from the same."""
        shape = (self.num_heads, self.head_dim)
        rank = query.dim() - 2
        same = query is key and key is value
        query, key, value = (x if first else x.transpose(0, 1) for x in (query, key, value))
        bias = () if self.in_proj_bias is None else (self.in_proj_bias.unflatten(0, (3, *shape)),)
        if same and self.in_proj_weight is not None:
            made: tuple[Tensor, Tensor, Tensor] = _to_all_heads(bool(bias))(
                rank, query, self.in_proj_weight.unflatten(0, (3, *shape)), *bias
            )
            return made
        if self.in_proj_weight is not None:
            of = self.in_proj_weight.unflatten(0, (3, *shape)).unbind(0)
        else:
            of = tuple(w.unflatten(0, shape) for w in (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight))
        program = _to_heads(bool(bias))
        each = [b for whole in bias for b in whole.unbind(0)]
        q, k, v = (program(rank, x, w, *each[n : n + 1]) for n, (x, w) in enumerate(zip((query, key, value), of, strict=True)))
        return q, k, v


def _masked(mask: Tensor) -> Extra:
    """A mask of torch.nn.MultiheadAttention, where True hides."""
    return ("hide" if mask.dtype == torch.bool else "bias"), mask
