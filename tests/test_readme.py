"""Every block of code in README.md is run, and what it shows is compared.

- ```python blocks run in order, in one namespace.
- A ```text block is what the block before it prints; `...` stands for anything.
- In a ```console block each `$ tdsl ..` runs, and the lines below it are what it prints. Other commands must exist.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tdsl.config import config

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


@dataclass(frozen=True)
class Block:
    """A fenced block; `line` is where its first line of text stands."""

    language: str
    text: str
    line: int


def blocks(markdown: str) -> Iterator[Block]:
    """The fenced blocks, in order."""
    for found in re.finditer(r"^```(\w*)\n(.*?)^```$", markdown, re.M | re.S):
        yield Block(found[1], found[2], markdown.count("\n", 0, found.start()) + 2)


@pytest.fixture(autouse=True)
def as_users_run_it(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """With the defaults of all settings."""
    monkeypatch.delenv("TDSL_CPU", raising=False)
    with config.using(cpu="auto"):
        config._given.discard("cpu")
        yield


def matches(expected: str, actual: str) -> bool:
    """Whether `actual` is what `expected` says, where `...` is anything, and blanks at the ends of lines do not count."""
    expected, actual = ("\n".join(line.rstrip() for line in text.strip().splitlines()) for text in (expected, actual))
    return re.fullmatch(".*".join(re.escape(part) for part in expected.split("...")), actual, re.S) is not None


def execute(block: Block, namespace: dict[str, object], path: Path) -> str:
    """Runs a Python block; what it prints. A traceback shows the README's own lines."""
    code = compile("\n" * (block.line - 1) + block.text, str(path), "exec")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, namespace)
    return printed.getvalue()


def test_python_and_what_it_prints() -> None:
    namespace: dict[str, object] = {"__name__": "readme"}
    printed = None
    ran = 0
    for block in blocks(README.read_text()):
        if block.language == "python":
            printed = execute(block, namespace, README)
            ran += 1
        elif block.language == "text":
            assert printed is not None, f"README.md:{block.line}: no Python block before this output"
            assert matches(block.text, printed), f"README.md:{block.line}: what is printed is\n{printed}"
            printed = None
        else:
            assert block.language == "console", f"README.md:{block.line}: nothing runs {block.language!r} blocks"
    assert ran >= 5


def commands() -> list[tuple[int, str, str]]:
    """(line, command, what it shows) of every console block."""
    found = []
    for block in blocks(README.read_text()):
        if block.language == "console":
            line = block.line
            for part in re.split(r"^(?=\$ )", block.text, flags=re.M)[1:]:
                command, _, shown = part.partition("\n")
                found.append((line, command.removeprefix("$ "), shown))
                line += part.count("\n")
    return found


@pytest.mark.parametrize(("line", "command", "shown"), commands(), ids=[f"line {line}" for line, _, _ in commands()])
def test_commands(line: int, command: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    program, *arguments = shlex.split(command)
    if program == "tdsl":
        from tdsl.cli import main

        assert main(arguments) == 0
        printed = capsys.readouterr().out
        assert matches(shown, printed), f"README.md:{line}: what is printed is\n{printed}"
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert arguments[0] in targets
    elif program == "pip":
        assert arguments == ["install", "-e", "."]
    else:
        assert (ROOT / program).stat().st_mode & 0o100, f"README.md:{line}: {program} cannot be run"


def test_links_lead_somewhere() -> None:
    prose = re.sub(r"`[^`]*`", "", README.read_text())
    for target in re.findall(r"\]\(([^)#]+)\)", prose):
        assert target.startswith("http") or (ROOT / target).exists(), target


@pytest.mark.parametrize(
    ("expected", "actual", "same"),
    [("a\nb", "a  \nb\n", True), ("a...d", "abc\nd", True), ("a", "b", False), ("a...", "ba", False), ("", "x", False)],
)
def test_the_comparison_itself(expected: str, actual: str, same: bool) -> None:
    assert matches(expected, actual) is same


def test_blocks_are_found_with_their_lines() -> None:
    found = list(blocks("x\n```python\na\n```\n\n```text\nb\nc\n```\n"))
    assert found == [Block("python", "a\n", 3), Block("text", "b\nc\n", 7)]
