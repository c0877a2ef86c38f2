"""Embeddings: rows of a table by number."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tdsl.errors import Unsupported
from tdsl.nn.ranked import Ranked

EMBEDDING = Ranked("def embedding(ids[*n], E[v,d]) -> Y[*n,d]: Y[*n,d] = E[ids[*n],d]")
PADDED = Ranked("""
def embedding(ids[*n], E[v,d], padding) -> Y[*n,d]:
    Y[*n,d] = where(ids[*n] == padding, stop_gradient(E[ids[*n],d]), E[ids[*n],d])
""")


class Embedding(nn.Embedding):
    """torch.nn.Embedding: integers [..] -> [.., embedding_dim]. The row of padding_idx gets no gradient.

    Raises Unsupported for max_norm, scale_grad_by_freq and sparse.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        _freeze: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, _weight, _freeze, device, dtype
        )
        reason = self.unsupported()
        if reason:
            raise Unsupported(f"tdsl.nn.Embedding: {reason}", help="leave it out, or use torch.nn.Embedding for this one")

    def unsupported(self: nn.Embedding) -> str | None:
        """What of a torch.nn.Embedding this one does not do."""
        if self.max_norm is not None:
            return "max_norm changes the table in the forward pass"
        if self.scale_grad_by_freq:
            return "scale_grad_by_freq is not written"
        return "sparse gradients are not written" if self.sparse else None

    def forward(self, input: Tensor) -> Tensor:
        """The rows of these numbers. Raises BoundsError for a number that is not in the table."""
        if self.padding_idx is None:
            result: Tensor = EMBEDDING(input.dim(), input, self.weight)
        else:
            result = PADDED(input.dim(), input, self.weight, self.padding_idx)
        return result
