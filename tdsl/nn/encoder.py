"""torch.nn.TransformerEncoderLayer with its activation and residual in the programs of its linear layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tdsl.errors import Unsupported
from tdsl.nn.attention import MultiheadAttention
from tdsl.nn.linear import biases, direct, linear
from tdsl.nn.norm import LayerNorm
from tdsl.nn.probe import activation_of


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """torch.nn.TransformerEncoderLayer: the same arguments and results, in training and in evaluation.

    Raises Unsupported for an activation that is not in the table of tdsl.ops.
    """

    _known: tuple[Any, str | None] | None = None

    def __init__(self, *args: Any, **named: Any):
        super().__init__(*args, **named)
        self.self_attn.__class__ = MultiheadAttention
        self.norm1.__class__ = self.norm2.__class__ = LayerNorm
        reason = self.unsupported()
        if reason:
            raise Unsupported(
                f"tdsl.nn.TransformerEncoderLayer: {reason}", help='pass "relu" or "gelu", or a function like one of tdsl.ops'
            )
        self.settle()

    def settle(self) -> None:
        """Finds out what the activation is."""
        self._known = (self.activation, activation_of(self.activation))

    def unsupported(self: nn.TransformerEncoderLayer) -> str | None:
        """What of a torch.nn.TransformerEncoderLayer this one does not do."""
        if activation_of(self.activation) is None:
            return f"the activation {self.activation!r} is none of the language's"
        return MultiheadAttention.unsupported(self.self_attn)

    def forward(
        self, src: Tensor, src_mask: Tensor | None = None, src_key_padding_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Attention and two linear layers, each added to what came in, with a norm before or behind."""
        if self.norm_first:
            src = src + self._sa_block(self.norm1(src), src_mask, src_key_padding_mask, is_causal)
            return self._feed_forward(self.norm2(src), src)
        src = self.norm1(src + self._sa_block(src, src_mask, src_key_padding_mask, is_causal))
        normed: Tensor = self.norm2(self._feed_forward(src, src))
        return normed

    def _feed_forward(self, x: Tensor, residual: Tensor) -> Tensor:
        one, two = self.linear1, self.linear2
        if not direct(one, two):
            return residual + self._ff_block(x)
        h = self.dropout(linear(one.bias is not None, self._activation())(x.dim() - 1, x, one.weight, *biases(one.bias)))
        if self.training and self.dropout2.p:
            dropped: Tensor = self.dropout2(linear(two.bias is not None)(h.dim() - 1, h, two.weight, *biases(two.bias)))
            return residual + dropped
        result: Tensor = linear(two.bias is not None, None, True)(h.dim() - 1, h, two.weight, *biases(two.bias), residual)
        return result

    def _activation(self) -> str | None:
        """The name of the activation, found once."""
        if self._known is None or self._known[0] is not self.activation:
            self.settle()
        assert self._known is not None
        return self._known[1]
