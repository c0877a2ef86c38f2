"""What `Function.schedule` takes, checked against the program."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

from lowering.configured import FIELDS
from lowering.control import RECOMPUTE, STORE, Config, Control
from lowering.edited import parameters
from lowering.schedule import Schedule
from lowering.state import State
from lowering.statement import identifier
from tdsl.errors import ArgumentError, NameError_
from tdsl.ir import Program, statements

Choice: TypeAlias = "Config | str | Path | None"
_OPERAND = re.compile(r"(.+)\.operand\d*")
_KERNEL = re.compile(r"(\w+)_(\d+)(?: \(saves .+\))?")


def control(before: Control, choices: Mapping[str, Choice], program: Program, flat: Program) -> Control:
    """`before` with further choices, by the names of kernels and of intermediates; None takes one back.

    flat: the program as it is compiled. Raises NameError_ for a name that is none, ArgumentError for a configuration or a path that is
    none, CompileError for a text that is not a kernel's.
    """
    schedules, pinned, sources = dict(before.schedules), dict(before.pinned), dict(before.sources)
    for name, choice in choices.items():
        if choice is None:
            for kind in (schedules, pinned, sources):
                kind.pop(name, None)
        elif choice in (STORE, RECOMPUTE):
            _known_intermediate(name, program, flat)
            pinned[name] = str(choice)
        else:
            kernel = _known_kernel(name, program, flat)
            if isinstance(choice, Schedule | Mapping):
                schedules[name] = _config(name, choice)
            else:
                sources[name] = _text(name, choice)
                parameters(kernel, sources[name])
    return Control(schedules, pinned, sources)


def check_names(control: Control, program: Program, state: State) -> None:
    """Raises NameError_ where a choice names a kernel that a lowered program does not have for these arguments."""
    own = identifier(program.name)
    there = [step.tile.name for step in state.steps]
    for name in (*control.schedules, *control.sources):
        found = _KERNEL.fullmatch(name)
        assert found is not None
        if found.group(1) == own and f"{found.group(1)}_{found.group(2)}" not in there:
            raise NameError_(f"{program.name} has no kernel {name!r} for these arguments", help=f"its kernels are {', '.join(there)}")


def intermediates(program: Program, flat: Program) -> tuple[str, ...]:
    """What can be stored or made again: what statements write that is no output; `P.max` and `P.sum` of a softmax among them."""
    outside = {*program.inputs, *program.results, *flat.results}
    return tuple(dict.fromkeys(s.target.tensor for s in statements(flat.body) if s.target.tensor not in outside))


def _known_intermediate(name: str, program: Program, flat: Program) -> None:
    known = intermediates(program, flat)
    product = _OPERAND.fullmatch(name)
    written = {*program.results, *known, *(f"{t}.grad" for t in (*program.inputs, *known))}
    if name not in known and not (product and product.group(1) in written):
        what = f"{name} is an output, which is stored anyway" if name in program.results else f"{name} is no intermediate of {program.name}"
        computed = "; plan().choices names operands that products compute, such as `X.grad.operand`"
        raise NameError_(what, help=f"its intermediates are {', '.join(known) or 'none'}{computed}")


def _known_kernel(name: str, program: Program, flat: Program) -> str:
    """The function's name of a kernel."""
    own = identifier(program.name)
    found = _KERNEL.fullmatch(name)
    if found is None or found.group(1) not in (own, f"{own}_bwd"):
        names = f"{own}_0, .. of the forward and {own}_bwd_0, .. of the backward, as plan() and check(.., gradient=True) show them"
        pins = f'; the intermediates, which take "{STORE}" or "{RECOMPUTE}", are {", ".join(intermediates(program, flat)) or "none"}'
        raise NameError_(f"{program.name} has no kernel {name!r}", help=f"its kernels are {names}{pins}")
    return f"{found.group(1)}_{found.group(2)}"


def _config(name: str, config: Config) -> Config:
    if isinstance(config, Schedule):
        return config
    unknown = [key for key in config if key not in ("tiles", *FIELDS)]
    if unknown:
        raise ArgumentError(f"the configuration of {name} has no field {unknown[0]!r}", help=f"its fields are tiles, {', '.join(FIELDS)}")
    return dict(config)


def _text(name: str, choice: str | Path) -> str:
    if isinstance(choice, str) and "\n" in choice:
        return choice
    if not isinstance(choice, str | Path):
        raise ArgumentError(f"{name} cannot be {choice!r}", help="a configuration, the text of an edited kernel, or the path of one")
    try:
        return Path(choice).read_text()
    except OSError as error:
        what = f"the edited kernel {name} cannot be read from {str(choice)!r}: {error.strerror}"
        raise ArgumentError(what, help=f'an intermediate takes "{STORE}" or "{RECOMPUTE}", a kernel its text or the path of it') from error
