"""Settings: `TDSL_<NAME>` in the environment, then an attribute of `tdsl.config`, then a keyword where one is taken; the nearer wins."""

from __future__ import annotations

import os
from dataclasses import dataclass, field


def _flag(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on")


@dataclass(slots=True)
class Config:
    """debug: check gather indices on GPUs too (on a CPU they always are). backend: what `backend="auto"` means, if not by device.

    cpu: what CPU tensors run: "torch" code, "c++" (where there is a compiler), or "auto": C++ where sizes are worth compiling it.
    """

    debug: bool = field(default_factory=lambda: _flag("TDSL_DEBUG"))
    backend: str = field(default_factory=lambda: os.environ.get("TDSL_BACKEND", "auto"))
    cpu: str = field(default_factory=lambda: os.environ.get("TDSL_CPU", "auto"))


config = Config()
