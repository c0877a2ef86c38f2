"""Mixtures of experts: what the experts give, weighed and summed per token."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from tdsl.errors import ArgumentError
from tdsl.function import function

_combine = function("""
def combine(y[s,d], slot[t,k], gate[t,k]) -> Y[t,d]:
    Y[t,d] += gate[t,k] * y[slot[t,k],d]
""")


def combine(y: Tensor, slot: Tensor, gate: Tensor) -> Tensor:
    """Results of experts [slots, d], where those of each token stand [tokens, k] and their weights [tokens, k] -> [tokens, d]."""
    result: Tensor = _combine(y, slot, gate)
    return result


class MixtureOfExperts(nn.Module):
    """Each token goes through the `top_k` experts that a router prefers, with weights that sum to one: [.., d] -> [.., d].

    router: a module [tokens, d] -> [tokens, experts]. experts: modules [n, d] -> [n, d].
    """

    def __init__(self, router: nn.Module, experts: Iterable[nn.Module], top_k: int = 2):
        super().__init__()
        self.router = router
        self.experts = nn.ModuleList(experts)
        if not 1 <= top_k <= len(self.experts):
            raise ArgumentError(
                f"there are {len(self.experts)} experts, and top_k is {top_k}", help="choose from 1 to as many as there are"
            )
        self.top_k = top_k

    def forward(self, input: Tensor) -> Tensor:
        """Routes, runs each expert on its tokens, and combines."""
        x = input.flatten(0, -2)
        logits, chosen = self.router(x).topk(self.top_k, -1)
        order = chosen.flatten().argsort(stable=True)  # pairs of token and expert, the pairs of one expert together
        slot = torch.empty_like(order)
        slot[order] = torch.arange(order.numel(), device=order.device)
        counts = torch.bincount(chosen.flatten(), minlength=len(self.experts)).tolist()
        parts = (x[order // self.top_k]).split(counts)
        y = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        return combine(y, slot.view(chosen.shape), logits.softmax(-1)).view(input.shape)
