"""A user's edit of a generated kernel: on its first launch it must give what the generated one gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lowering.state import Step
from lowering.triton_launch import launch
from tdsl.errors import ArgumentError

# How far results may be apart, as a share of the largest value: the order of a sum may be another, and 16 bits round coarsely.
_APART = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 4 * 2**-10, torch.bfloat16: 4 * 2**-7}


def verify(step: Step, values: Sequence[Any], *, interpret: bool) -> None:
    """Runs the generated kernel and its edit on copies of what they write, and compares. values: of the launch, in order.

    Raises ArgumentError, with the largest difference and where it is, if they disagree.
    """
    assert step.unedited is not None and step.source is not None
    places = [n for n, b in enumerate(step.tile.buffers) if b.tensor in step.writes]
    results = []
    for source in (step.unedited, step.source):
        copies = [v.clone() if n in places else v for n, v in enumerate(values)]
        launch(source, step.tile.programs, copies, interpret=interpret)
        results.append([copies[n] for n in places])
    for n, generated, own in zip(places, *results, strict=True):
        _compare(step.source.name, step.tile.buffers[n].tensor, generated, own)


def _compare(kernel: str, tensor: str, generated: torch.Tensor, own: torch.Tensor) -> None:
    if not generated.numel():
        return
    limit = _APART.get(generated.dtype, 0.0)
    a, b = (t.double() for t in (generated, own))
    same = (a == b) | (a.isnan() & b.isnan())
    apart = torch.where(same, 0.0, (a - b).abs()).nan_to_num(nan=torch.inf)
    finite = a[a.isfinite()]
    most = float(finite.abs().max()) if finite.numel() else 0.0
    if float(apart.max()) <= limit * most:
        return
    worst = int(apart.argmax())
    at = ", ".join(str(int(i)) for i in torch.unravel_index(torch.tensor(worst), apart.shape))
    raise ArgumentError(
        f"the edited kernel {kernel} gives another {tensor}: by up to {float(apart.max()):.4g}, at [{at}], "
        f"where it is {float(b.flatten()[worst]):.6g} and the generated kernel gives {float(a.flatten()[worst]):.6g}",
        help=f"at most {limit * most:.2g} is taken for rounding here; schedule({{{kernel!r}: None}}) puts the generated kernel back",
    )
