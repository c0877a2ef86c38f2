"""Layers for torch models: modules with the arguments and state dicts of torch's own, whose math is notation in the same file.

    layer = tdsl.nn.Linear(64, 256, activation="gelu")      torch.nn.Linear and gelu, one kernel
    report = tdsl.nn.replace(model)                          the layers of a model that is there already

Programs are written for any number of batch dimensions: `*n` stands for as many indices as the input has there.
"""

from tdsl.nn.attention import MultiheadAttention, attention
from tdsl.nn.conv import Conv1d, Conv2d
from tdsl.nn.embedding import Embedding
from tdsl.nn.encoder import TransformerEncoderLayer
from tdsl.nn.experts import MixtureOfExperts, combine
from tdsl.nn.linear import GatedMLP, Linear, LoRA, TransposedLinear
from tdsl.nn.loss import CrossEntropyLoss, LinearCrossEntropyLoss
from tdsl.nn.mlp import MLP, Activation, Sequential
from tdsl.nn.norm import GroupNorm, LayerNorm, RMSNorm
from tdsl.nn.ranked import Ranked
from tdsl.nn.replace import replace
from tdsl.nn.report import Change, Report

__all__ = [
    "MLP",
    "Activation",
    "Change",
    "Conv1d",
    "Conv2d",
    "CrossEntropyLoss",
    "Embedding",
    "GatedMLP",
    "GroupNorm",
    "LayerNorm",
    "Linear",
    "LinearCrossEntropyLoss",
    "LoRA",
    "MixtureOfExperts",
    "MultiheadAttention",
    "RMSNorm",
    "Ranked",
    "Report",
    "Sequential",
    "TransformerEncoderLayer",
    "TransposedLinear",
    "attention",
    "combine",
    "replace",
]
