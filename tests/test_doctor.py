"""tdsl.config and `tdsl doctor`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tdsl
from tdsl import doctor, errors
from tdsl.cli import main
from tdsl.config import SETTINGS, Config, config

ROOT = Path(__file__).parent.parent


def test_the_environment_gives_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TDSL_DEBUG", "on")
    monkeypatch.setenv("TDSL_CPU", "torch")
    found = Config()
    assert (found.debug, found.cpu, found.backend) == (True, "torch", "auto")
    assert (found.source("debug"), found.source("backend")) == ("TDSL_DEBUG", "default")


def test_an_attribute_is_nearer_than_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TDSL_CPU", "torch")
    found = Config()
    found.cpu = "auto"
    assert (found.cpu, found.source("cpu")) == ("auto", "tdsl.config.cpu")


def test_a_keyword_is_nearer_than_an_attribute() -> None:
    with config.using(backend="reference"):
        assert tdsl.function("Y[i] = x[i]").backend == "reference"
        assert tdsl.function("Y[i] = x[i]", backend="torch").backend == "torch"
    assert tdsl.function("Y[i] = x[i]").backend == config.backend


def test_what_a_setting_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(errors.ArgumentError, match=r"tdsl.config.cpu is 'rust'(.|\n)*auto, large, torch, c\+\+"):
        config.cpu = "rust"
    with pytest.raises(errors.ArgumentError, match="there is no setting 'gpu'"):
        config.gpu = "yes"  # type: ignore[attr-defined]
    with pytest.raises(errors.ArgumentError, match="tdsl.config.debug is 1"):
        config.debug = 1  # type: ignore[assignment]
    monkeypatch.setenv("TDSL_DEBUG", "perhaps")
    with pytest.raises(errors.ArgumentError, match="TDSL_DEBUG is 'perhaps'"):
        Config()


def test_using_puts_everything_back() -> None:
    before = {name: (getattr(config, name), config.source(name)) for name in SETTINGS}
    with pytest.raises(RuntimeError), config.using(cpu="torch", debug=True):
        assert config.debug
        raise RuntimeError
    assert before == {name: (getattr(config, name), config.source(name)) for name in SETTINGS}


def test_a_changed_setting_reaches_what_was_compiled() -> None:
    f = tdsl.function("Y[i] = 2 * x[i]")
    x = torch.randn(3)
    f(x)
    before = f.executor.key([x])
    with config.using(debug=True):
        assert f.executor.key([x]) != before


def test_the_cache_setting_moves_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lowering import disk_cache

    monkeypatch.setenv("TDSL_CACHE", os.environ.get("TDSL_CACHE", ""))  # restores it
    with config.using(cache=str(tmp_path)):
        assert disk_cache.directory() == tmp_path


def test_doctor_lists_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--settings"]) == 0
    printed = capsys.readouterr().out
    assert all(s.variable in printed and s.meaning in printed for s in SETTINGS.values())
    assert main(["doctor", "--settings", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cpu"]["value"] == config.cpu


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """One target of Triton's compiler is enough here."""
    monkeypatch.setattr(doctor, "TARGETS", {"cuda:90": None})


def test_doctor_tries_every_executor(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and found["versions"]["torch"].startswith(torch.__version__)
    tried = {t["name"]: t for t in found["executors"]}
    assert {"reference", "torch code on the CPU", "torch.compile"} <= {
        name for name, t in tried.items() if t["seconds"] and not t["failure"]
    }
    assert all(t["seconds"] or t["missing"] for t in tried.values())


def test_doctor_says_what_fails_and_what_is_missing(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ValueError("no such thing")

    monkeypatch.setattr(doctor, "_torch_compile", broken)
    monkeypatch.setattr(doctor, "_has", lambda _: False)
    monkeypatch.setattr(doctor, "_run", lambda *_, **__: None)
    monkeypatch.setattr(doctor.cpp_launch, "compiler", lambda: None)
    found = doctor.doctor()
    assert not found.ok
    page = str(found)
    assert "torch.compile: ValueError: no such thing" in page
    assert "Triton's interpreter: install triton (Linux): pip install triton" in page
    assert "C++ on the CPU: install g++ or clang++, or set CXX" in page


def test_a_wrong_environment_is_one_clear_error() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import tdsl"], cwd=ROOT, env={**os.environ, "TDSL_CPU": "rust"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "TDSL_CPU is 'rust'" in done.stderr
