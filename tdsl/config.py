"""Settings: `TDSL_<NAME>` in the environment, then an attribute of `tdsl.config`, then a keyword where one is taken; the nearer wins.

`tdsl doctor --settings` lists them. A new setting is a row of SETTINGS and an attribute of Config.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tdsl.errors import ArgumentError

_TRUE, _FALSE = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting. choices: of a setting that is text; () where any text will do. keyword: where a keyword of that name is taken."""

    name: str
    default: bool | str
    meaning: str
    choices: tuple[str, ...] = ()
    keyword: str = ""

    @property
    def variable(self) -> str:
        """Its environment variable."""
        return f"TDSL_{self.name.upper()}"

    def checked(self, value: Any, where: str) -> Any:
        """The value, if it is one. Raises ArgumentError."""
        if isinstance(self.default, bool):
            if isinstance(value, bool):
                return value
            allowed = "True or False"
        elif isinstance(value, str) and (not self.choices or value in self.choices):
            return value
        else:
            allowed = ", ".join(self.choices) or "text"
        raise ArgumentError(f"{where} is {value!r}, which the setting cannot be", help=f"{self.name}: {allowed}")

    def from_environment(self) -> Any:
        """The value that the environment gives, or the default."""
        text = os.environ.get(self.variable)
        if text is None:
            return self.default
        if isinstance(self.default, bool) and text.lower() in _TRUE + _FALSE:
            return text.lower() in _TRUE
        return self.checked(text, self.variable)


SETTINGS: dict[str, Setting] = {
    s.name: s
    for s in (
        Setting("backend", "auto", "what runs programs; auto: by the arguments' device", ("auto", "torch", "triton", "reference"), "tdsl.function"),
        Setting("cache", "", "the folder where compiled kernels and reports are kept; empty: the user's cache folder"),
        Setting("cpu", "auto", "what CPU tensors run; auto: C++ where a compiler is and it pays, large: for large sizes alone", ("auto", "large", "torch", "c++")),
        Setting("debug", False, "check gather indices on GPUs too, which waits for them; on a CPU they always are"),
    )
}  # fmt: skip


class Config:
    """The settings of this process, as attributes. What was compiled under other settings is compiled again."""

    __slots__ = ("_given", "backend", "cache", "cpu", "debug", "version")

    backend: str
    cache: str
    cpu: str
    debug: bool
    version: int
    _given: set[str]

    def __init__(self) -> None:
        object.__setattr__(self, "version", 0)
        object.__setattr__(self, "_given", set())
        for setting in SETTINGS.values():
            object.__setattr__(self, setting.name, setting.from_environment())

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in SETTINGS:
            raise ArgumentError(f"there is no setting {name!r}", help=f"the settings are {', '.join(SETTINGS)}")
        object.__setattr__(self, name, SETTINGS[name].checked(value, f"tdsl.config.{name}"))
        object.__setattr__(self, "version", self.version + 1)
        self._given.add(name)
        if name == "cache":  # the compiler looks there, and so do child processes
            os.environ["TDSL_CACHE"] = value

    @contextmanager
    def using(self, **settings: Any) -> Iterator[None]:
        """Other values for a while.

        >>> with config.using(cpu="torch"): y = f(x)
        """
        before, given = {name: getattr(self, name, None) for name in settings}, set(self._given)
        for name, value in settings.items():
            setattr(self, name, value)
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(self, name, value)
            object.__setattr__(self, "_given", given)

    def source(self, name: str) -> str:
        """Where the value of a setting comes from."""
        setting = SETTINGS[name]
        return f"tdsl.config.{name}" if name in self._given else setting.variable if setting.variable in os.environ else "default"


config = Config()
