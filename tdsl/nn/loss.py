"""Losses: softmax cross-entropy of logits, and of a linear layer whose logits are never in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tdsl.errors import ArgumentError, Unsupported
from tdsl.nn.linear import biases
from tdsl.nn.ranked import Ranked, by_options

IGNORED = -100  # torch's default ignore_index


def _entropy(n: str, k: str, weight: bool, smoothing: bool, reduction: str) -> list[str]:
    """The statements from logits Z[n,v,k] and labels t[n,k] to the loss. n, k: the indices before and behind the classes, with commas."""
    p = (n + k).strip(",")
    at = f"[{p}]" if p else ""
    z, picked, w = f"Z[{n}v{k}]", f"Z[{n}t{at}{k}]", f"w[t{at}] * " if weight else ""
    counted = f"label{at} != ignored"
    term = f"{w}(lse{at} - {picked})"
    statements = [f"lse{at} = logsumexp[v]({z})"]
    if smoothing:
        mean = f"mean[v]({'w[v] * ' if weight else ''}(lse{at} - {z}))"
        term = f"(1 - smoothing) * {term} + smoothing * {mean}"
    statements.append(f"each{at} = where({counted}, {term}, 0)")
    if reduction == "none":
        return [*statements, f"loss{at} = each{at}"]
    statements.append(f"total += each{at}")
    if reduction == "sum":
        return [*statements, "loss = total"]
    return [*statements, f"count += where({counted}, {f'w[t{at}]' if weight else '1.0'}, 0.0)", "loss = total / count"]


def _probable(n: str, k: str, weight: bool, smoothing: bool, reduction: str) -> list[str]:
    """The statements from logits Z[n,v,k] and probabilities t[n,v,k] to the loss."""
    p = (n + k).strip(",")
    at = f"[{p}]" if p else ""
    chance = f"t[{n}v{k}]"
    if smoothing:
        chance = f"((1 - smoothing) * {chance} + smoothing / size(Z, {n.count(',')}))"
    term = f"{chance} * {'w[v] * ' if weight else ''}(lse{at} - Z[{n}v{k}])"
    statements = [f"lse{at} = logsumexp[v](Z[{n}v{k}])", f"each{at} += {term}"]
    if reduction == "none":
        return [*statements, f"loss{at} = each{at}"]
    return [*statements, f"loss = {'mean' if reduction == 'mean' else 'sum'}[{p}](each{at})" if p else f"loss = each{at}"]


@by_options
def cross_entropy(
    batch: int, behind: int, weight: bool, smoothing: bool, reduction: str, probable: bool = False, linear: str = ""
) -> Ranked:
    """The program. batch, behind: dimensions before and behind the classes. linear: "" for logits as they are, "weight" or "bias"
    for those of a linear layer."""
    n = "".join(f"n{i}," for i in range(batch))
    k = "".join(f",k{i}" for i in range(behind))
    p = (n + k).strip(",")
    at = f"[{p}]" if p else ""
    params, statements = [f"Z[{n}v{k}]"], []
    if linear:
        params = [f"X[{n}c]", "W[v,c]", *(["b[v]"] if linear == "bias" else [])]
        statements = [f"Y[{n}v] += X[{n}c] * W[v,c]", f"Z[{n}v] = Y[{n}v]{' + b[v]' if linear == 'bias' else ''}"]
    params += [f"t[{n}v{k}]"] if probable else [f"t{at}", f"label{at}", "ignored"]
    params += (["w[v]"] if weight else []) + (["smoothing"] if smoothing else [])
    statements += (_probable if probable else _entropy)(n, k, weight, smoothing, reduction)
    result = f"loss{at}" if reduction == "none" else "loss"
    return Ranked("\n    ".join([f"def cross_entropy({', '.join(params)}) -> {result}:", *statements]) + "\n")


def entropy(
    logits: Sequence[Tensor],
    classes: int,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    smoothing: float,
    reduction: str,
) -> Tensor:
    """The cross-entropy. logits: themselves, or the input, weight and perhaps bias of the linear layer that makes them."""
    first = logits[0]
    linear = ("", "", "weight", "bias")[len(logits)]
    batch = min(first.dim() - 1, 1)
    behind = 0 if linear else max(first.dim() - 2, 0)
    probable = target.is_floating_point()
    given = [target]
    if probable:
        wanted = [*first.shape[:batch], classes, *first.shape[batch + 1 :]]
    else:
        hidden = target == ignore_index
        given = [torch.where(hidden, 0, target), target, ignore_index]  # type: ignore[list-item]
        wanted = [*first.shape[:batch], *first.shape[batch + 1 :]]
    if list(target.shape) != wanted:
        raise ArgumentError(
            f"a target of shape {tuple(target.shape)} does not fit an input of shape {tuple(first.shape)}", help=f"it is {wanted}"
        )
    program = cross_entropy(batch, behind, weight is not None, smoothing > 0, reduction, probable, linear)
    result: Tensor = program(0, *logits, *given, *biases(weight), *([smoothing] if smoothing > 0 else []))
    if result.dtype is first.dtype or torch.is_autocast_enabled(first.device.type):  # where torch computes losses in float32
        return result
    return result.to(first.dtype)


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss: logits [batch, classes, ..] and labels [batch, ..] or probabilities of the logits' shape.

    Raises BoundsError for a label that is neither a class nor ignore_index.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss."""
        classes = input.shape[min(input.dim() - 1, 1)]
        return entropy((input,), classes, target, self.weight, self.ignore_index, self.label_smoothing, self.reduction)


class LinearCrossEntropyLoss(nn.modules.loss._WeightedLoss):
    """A linear layer and the cross-entropy of its logits, as torch.nn.LinearCrossEntropyLoss has it: [batch, in_features] and labels.

    The logits are in memory in neither direction, so `options`, which says how torch cuts them, changes nothing. Raises Unsupported
    for out_features.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
    ):
        super().__init__(weight, None, None, reduction)
        self.num_classes = num_classes
        self.out_features = out_features
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.options = options
        reason = self.unsupported()
        if reason:
            raise Unsupported(f"tdsl.nn.LinearCrossEntropyLoss: {reason}", help="flatten the further dimensions into the batch")
        if weight is not None and tuple(weight.shape) != (num_classes,):
            raise ArgumentError(f"weight has shape {tuple(weight.shape)} for {num_classes} classes", help="one number per class")
        if not 0 <= label_smoothing <= 1:
            raise ArgumentError(f"label_smoothing is {label_smoothing}", help="it is a share, from 0 to 1")
        self.linear = nn.Linear(in_features, num_classes, bias, device, dtype)

    def unsupported(self: Any) -> str | None:
        """What of a torch.nn.LinearCrossEntropyLoss this one does not do."""
        return "out_features is not written" if self.out_features else None

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss."""
        ignored = IGNORED if self.ignore_index is None else self.ignore_index
        logits = (input, *biases(self.linear.weight, self.linear.bias))
        return entropy(logits, self.num_classes, target, self.weight, ignored, self.label_smoothing, self.reduction)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"num_classes={self.num_classes}, reduction={self.reduction}, label_smoothing={self.label_smoothing}"
