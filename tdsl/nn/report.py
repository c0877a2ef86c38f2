"""What replace() did, and what it left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Change:
    """One module. name: its path in the model. before: its class. after: its class now, "" where it was left. reason: why it was."""

    name: str
    before: str
    after: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """All modules that replace() looked at. `str()` of it is a page: equal changes in one line."""

    replaced: tuple[Change, ...]
    left: tuple[Change, ...]

    def __str__(self) -> str:
        lines = [f"replaced {len(self.replaced)} modules"]
        lines += _grouped(self.replaced, "{before} -> {after}")
        lines.append(f"left {len(self.left)} modules")
        lines += _grouped(self.left, "{before}: {reason}")
        return "\n".join(lines)


def _grouped(changes: Sequence[Change], form: str) -> list[str]:
    groups: dict[str, list[str]] = {}
    for c in changes:
        groups.setdefault(form.format(before=c.before, after=c.after, reason=c.reason), []).append(c.name or "(the model)")
    return [f"  {len(names):4} {what} ({names[0]}{', ..' if len(names) > 1 else ''})" for what, names in groups.items()]
