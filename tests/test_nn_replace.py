"""tdsl.nn.replace: what is replaced, what is left, and that nothing else changes."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tdsl.nn as ours
from tdsl.nn.probe import activation_of
from tests.layers import PADDING, Block, assert_same, compare, double, losses


def test_parameters_hooks_and_ties_stay() -> None:
    plain = Block()
    model = copy.deepcopy(plain)
    seen: list[str] = []
    watching = model.before.register_forward_hook(lambda *_: seen.append("before"))
    parameters, modules = list(model.parameters()), list(model.modules())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    names = list(model.state_dict())
    report = ours.replace(model)
    assert names == list(model.state_dict()) and all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert modules[2] is model.before and isinstance(model.before, ours.LayerNorm)
    assert isinstance(report, ours.Report) and 8 == len(report.replaced) and () == report.left
    for run in (model, plain):
        losses(run, run, 5)
    assert ["before"] == seen
    optimizer.zero_grad()
    tokens = torch.arange(10).view(2, 5) % 9
    model(tokens, tokens).backward()
    before = model.norm.weight.clone()
    optimizer.step()
    assert not torch.equal(before, model.norm.weight)
    watching.remove()
    again = copy.deepcopy(model)
    assert [again.mlp[1]] == [module for module, _ in again.mlp.known]  # type: ignore[attr-defined]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(losses(other, other, 5), losses(model, model, 5))


def test_the_report_is_a_page() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.Dropout(), nn.Embedding(3, 3, max_norm=1.0), nn.Hardtanh(), nn.Softplus())
    assert (
        "replaced 3 modules\n"
        "     2 Linear -> tdsl.nn.Linear (0, ..)\n"
        "     1 Sequential -> tdsl.nn.Sequential ((the model))\n"
        "left 4 modules\n"
        "     1 Dropout: it draws random numbers (3)\n"
        "     1 Embedding: max_norm changes the table in the forward pass (4)\n"
        "     1 Hardtanh: tdsl.nn has no layer for it (5)\n"
        "     1 Softplus: alone it is one kernel in torch too (6)"
    ) == str(ours.replace(model))


class Own(nn.Linear):
    """A subclass."""


class Norm(nn.Module):
    """An RMSNorm under other names than torch's."""

    def __init__(self, size: int, eps: float = 1e-4, shift: float = 0.0, off: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size))
        self.variance_epsilon, self.shift, self.off = eps, shift, off

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon + self.off) * (self.shift + self.weight)


class Detached(Norm):
    """The values of an RMSNorm with other gradients."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).detach() * self.weight


class Optional(Norm):
    """An RMSNorm that can do more."""

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(x) if gate is None else gate


class Rounded(nn.Module):
    """A linear layer whose weight is of numbers that the language does not have."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, size).to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.to(x.dtype)


@pytest.mark.parametrize("module", [Own(3, 3), Norm(3, off=1e-7), Detached(3), Optional(3), Rounded(3)], ids=lambda m: type(m).__name__)
def test_what_is_not_quite_a_layer_is_left(module: nn.Module) -> None:
    kind = type(module)
    report = ours.replace(nn.Sequential(module))
    assert kind is type(module) and () == report.replaced
    assert ["0"] == [c.name for c in report.left] and report.left[0].reason


def test_a_forward_that_was_put_on_an_instance_is_left() -> None:
    layer = nn.Linear(3, 3)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    assert "its forward was replaced by another" == ours.replace(layer).left[0].reason
    assert type(layer) is nn.Linear


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_a_norm_is_known_by_what_it_does(shift: float) -> None:
    norm = Norm(5, shift=shift)
    plain = copy.deepcopy(norm)
    ours.replace(norm)
    assert isinstance(norm, ours.RMSNorm)
    compare(norm.double(), plain.double(), double(2, 3, 5))


class Straight(nn.Module):
    """The values of relu, and other gradients."""

    def forward(self, x: Tensor) -> Tensor:
        return x + (x.relu() - x).detach()


def test_an_activation_is_known_by_what_it_does() -> None:
    cubic = lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))  # noqa: E731
    assert "gelu_tanh" == activation_of(cubic) == activation_of(nn.GELU("tanh"))
    assert ["relu", "gelu", "silu", "sigmoid"] == [activation_of(f) for f in (F.relu, nn.GELU(), F.silu, torch.sigmoid)]
    for other in (Straight(), nn.GELU("tanh").forward.__class__, lambda x: x.softmax(-1), F.relu6, nn.PReLU(), lambda x: x * torch.sigmoid(1.702 * x)):
        assert activation_of(other) is None


class Gated(nn.Module):
    """A gated MLP with names in an order that does not tell."""

    def __init__(self, behind: bool):
        super().__init__()
        self.c, self.a, self.b = nn.Linear(5, 3), nn.Linear(3, 5), nn.Linear(3, 5)
        self.act, self.drop, self.behind = nn.SiLU(), nn.Dropout(0.2), behind

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(x) * self.act(self.a(x))
        return self.drop(self.c(h)) if self.behind else self.c(self.drop(h))


@pytest.mark.parametrize("behind", [False, True])
def test_an_mlp_is_known_by_what_it_does(behind: bool) -> None:
    plain = Gated(behind)
    model = copy.deepcopy(plain)
    report = ours.replace(model)
    assert "MLP" == type(model).__name__ and 0.2 == model.drop.p and model.training  # type: ignore[union-attr]
    assert ["drop"] == [c.name for c in report.left]
    for training in (True, False):
        both = []
        for m in (model, plain):
            torch.manual_seed(5)
            both.append(m.train(training).double()(torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)))
        torch.testing.assert_close(*both)


def test_what_is_part_of_a_program_is_not_called_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.SiLU()), Gated(False).eval())
    ours.replace(model)

    def refuse(*_: object) -> Tensor:
        raise AssertionError("an activation ran as a module of its own")

    monkeypatch.setattr(nn.SiLU, "forward", refuse)
    assert (2, 3) == model(torch.randn(2, 3)).shape


class Doubled(nn.Linear):
    """What somebody puts in the place of a layer."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("make", [lambda: Gated(False).eval(), lambda: nn.Sequential(nn.Linear(3, 5), nn.ReLU()), lambda: ours.GatedMLP(3, 5), lambda: nn.TransformerEncoderLayer(3, 1, 5, dropout=0.0)])
def test_a_part_is_seen_by_hooks_and_can_be_another_later(make: Callable[[], nn.Module]) -> None:
    """A submodule that is part of a larger program is called where somebody watches it, or has put another there."""
    model = make().double()
    first = {"Gated": "a", "Sequential": "0", "GatedMLP": "gate_proj", "TransformerEncoderLayer": "linear1"}[type(model).__name__]
    plain = copy.deepcopy(model)
    ours.replace(model)
    assert type(model).__module__.startswith("tdsl.nn.")
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)
    torch.testing.assert_close(model(x), plain(x))
    seen: list[Tensor] = []
    hook = model.get_submodule(first).register_forward_hook(lambda module, args, output: seen.append(output))
    torch.testing.assert_close(model(x), plain(x))
    assert 1 == len(seen)
    hook.remove()
    for m in (model, plain):
        m.get_submodule(first).__class__ = Doubled
    torch.testing.assert_close(model(x), plain(x))


def test_what_is_to_be_skipped_is() -> None:
    model = Block()
    ours.replace(model, skip=lambda name, module: name.startswith("mlp"))
    assert [nn.Linear, nn.GELU, nn.Linear] == [type(m) for m in model.mlp]
    assert isinstance(model.norm, ours.RMSNorm)


@pytest.mark.filterwarnings("ignore:.*nested tensors.*")
def test_an_encoder_of_torch_in_evaluation() -> None:
    plain = nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 9, batch_first=True), 2).eval()
    model = copy.deepcopy(plain)
    ours.replace(model)
    x = torch.randn(2, 5, 6)
    with torch.no_grad():
        kept = ~PADDING[..., None]
        torch.testing.assert_close(model(x, src_key_padding_mask=PADDING) * kept, plain(x, src_key_padding_mask=PADDING) * kept)
