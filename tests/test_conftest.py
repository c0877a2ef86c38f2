"""The golden fixture itself: a comparison that can never fail would make every golden file worthless."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Golden


def test_golden_accepts_what_it_wrote(tmp_path: Path) -> None:
    Golden(tmp_path / "m" / "t", update=True)("for i:  y[i] = x[i]")
    Golden(tmp_path / "m" / "t", update=False)("for i:  y[i] = x[i]\n")


def test_golden_shows_the_difference(tmp_path: Path) -> None:
    Golden(tmp_path / "t", update=True)("a\nb")
    with pytest.raises(AssertionError, match=r"(?s)-b.*\+c"):
        Golden(tmp_path / "t", update=False)("a\nc")


def test_golden_wants_its_file(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="missing"):
        Golden(tmp_path / "t", update=False)("a", "backward")
