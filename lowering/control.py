"""What a user fixes by hand: tiles of kernels, intermediates that are stored or made again, and edited sources."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from lowering.schedule import Schedule

STORE, RECOMPUTE = "store", "recompute"

Config: TypeAlias = "Schedule | Mapping[str, object]"


@dataclass(frozen=True, slots=True)
class Control:
    """schedules: by kernel, a Schedule or some of its fields ({"tiles": {"i": 64}, "num_warps": 8}). pinned: STORE or RECOMPUTE by
    intermediate. sources: Triton modules by kernel; that of a kernel which also saves something for the backward is named
    `attention_0 (saves P.sum, P.max)`, as `check` names it."""

    schedules: Mapping[str, Config] = field(default_factory=dict)
    pinned: Mapping[str, str] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)

    def pins(self, choice: str) -> frozenset[str]:
        """The intermediates for which that was chosen."""
        return frozenset(name for name, chosen in self.pinned.items() if chosen == choice)


def saving_name(kernel: str, saves: tuple[str, ...]) -> str:
    """The name of a kernel of a program that saves some tensors."""
    return f"{kernel} (saves {', '.join(saves)})" if saves else kernel
