"""What every test can use, and how to run the tests.

    make test                               ruff, mypy, and every test that needs no GPU
    python -m pytest tests -m gpu           the tests that need a GPU; without one they skip themselves
    benchmarks/gpu.sh                       on a GPU machine, no network needed: those tests, then the benchmark table
    python -m pytest --update-golden        rewrite tests/golden/ from what is printed now; read the diff before committing it
    python -m pytest -m check_all           (make check-all) compile everything for every target, not a sample
    python -m pytest -m fuzz --fuzz 5000    (make fuzz N=5000) the property tests with that many examples each, fresh seeds

Markers: `gpu` needs a CUDA or HIP device; `fuzz` is a property test, which runs a few fixed examples in `make test`; `check_all` takes
long, and is left out unless `-m check_all` or --all-targets asks for it.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest
import torch

# Thousands of small programs are not worth compiling here; tests of C++ ask for it, and the README's run as a user's do.
os.environ.setdefault("TDSL_CPU", "large")

from tdsl.config import config as settings_of_tdsl

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of this suite."""
    group = parser.getgroup("tdsl")
    group.addoption("--update-golden", action="store_true", help="rewrite the golden files from what is printed now")
    group.addoption("--all-targets", action="store_true", help="compile everything for every target")
    group.addoption("--fuzz", type=int, default=0, metavar="N", help="examples per property test")


def pytest_configure(config: pytest.Config) -> None:
    """Markers, the profile of the property tests, and one thread per worker: workers share the cores already."""
    config.addinivalue_line("markers", "gpu: needs a CUDA or HIP device; skipped without one")
    config.addinivalue_line("markers", "fuzz: a property test; --fuzz N sets the number of examples")
    config.addinivalue_line("markers", "check_all: takes long; only with -m check_all or --all-targets")
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
    examples = config.getoption("--fuzz")
    slow = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large, hypothesis.HealthCheck.filter_too_much]
    settings = {"deadline": None, "suppress_health_check": slow, "print_blob": True}
    hypothesis.settings.register_profile("fixed", max_examples=25, derandomize=True, database=None, **settings)
    hypothesis.settings.register_profile("fuzz", max_examples=max(1, examples), **settings)
    hypothesis.settings.load_profile("fuzz" if examples else "fixed")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what takes long unless it is asked for, and skip what needs a GPU where there is none."""
    if not config.getoption("--all-targets") and "check_all" not in config.getoption("markexpr"):
        long = [item for item in items if item.get_closest_marker("check_all")]
        items[:] = [item for item in items if not item.get_closest_marker("check_all")]
        if long:
            config.hook.pytest_deselected(items=long)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def settings(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a test set, and monkeypatch set back, does not count as set for the next test of its process; and each test draws the same
    random tensors alone, in the suite and again, unless --fuzz asks for fresh ones."""
    if not request.config.getoption("--fuzz"):
        torch.manual_seed(0)
    with settings_of_tdsl.using():
        yield


@pytest.fixture
def device() -> str:
    """Where a `gpu` test puts its tensors."""
    return "cuda"


@pytest.fixture(scope="session")
def all_targets(request: pytest.FixtureRequest) -> bool:
    """Whether to compile everything for every target."""
    return bool(request.config.getoption("--all-targets"))


@dataclass(frozen=True)
class Golden:
    """Compares text with the file that the test's id names: `golden(text)`, or `golden(text, "backward")` for a second file."""

    stem: Path
    update: bool

    def __call__(self, text: str, part: str = "") -> None:
        path = self.stem.with_name(f"{self.stem.name}{'-' + part if part else ''}.txt")
        text = text.rstrip("\n") + "\n"
        if self.update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            return
        assert path.exists(), f"{path} is missing: write it with --update-golden, then read it"
        expected = path.read_text()
        diff = "\n".join(difflib.unified_diff(expected.splitlines(), text.splitlines(), str(path), "now", lineterm=""))
        assert expected == text, f"not what the golden file says (--update-golden rewrites it):\n{diff}"


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """tests/golden/<test module>/<test name>.txt, e.g. test_printer.py::test_plan[attention] -> test_printer/test_plan-attention.txt."""
    name = re.sub(r"[^\w.+-]+", "-", request.node.name).strip("-")
    return Golden(GOLDEN / request.path.stem / name, request.config.getoption("--update-golden"))
