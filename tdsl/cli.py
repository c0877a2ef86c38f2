"""The command line.

    tdsl show    FILE_OR_TEXT [A=bf16[8,64] ..]   the notation and its gradient; with arguments also the plan and the Triton kernels
    tdsl grad    FILE_OR_TEXT [A=bf16[8,64] ..]   the gradient, by the swap rule; with arguments its plan and kernels
    tdsl explain FILE_OR_TEXT A=bf16[8,64] ..     every stage
    tdsl check   FILE_OR_TEXT A=bf16[8,64] ..     registers, spills and faults of the machine code; no GPU is needed
    tdsl bench   FILE_OR_TEXT A=bf16[8,64] ..     the time on this machine beside the roofline
    tdsl tune    FILE_OR_TEXT A=bf16[8,64] ..     not built yet
    tdsl doctor                                   versions, devices, caches, every executor tried; --settings lists the settings

Arguments go by name, in any order: NAME=bf16[8,1024,64] is a tensor, scale=0.125 a number. Exit status: 0 it worked; 1 the program is
wrong, or a kernel has a fault; 2 the command cannot be carried out.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tdsl import errors
from tdsl.errors import ArgumentError, Unsupported
from tdsl.ir import Param, Program

if TYPE_CHECKING:
    from tdsl.function import Function
    from tdsl.page import Page, Section

_PRINTED = {"program": "the notation", "gradient": "its gradient, by swapping names", "plan": "the plan"}
_LEXERS = {"program": "python", "gradient": "python", "triton": "python", "torch": "python", "llir": "llvm"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; the exit status."""
    try:
        options = _parse(arguments)
    except SystemExit as stop:  # argparse has printed why
        return int(stop.code or 0)
    try:
        return _COMMANDS[options.command](options)
    except errors.Error as error:
        print(_message(error), file=sys.stderr)
        return 2 if isinstance(error, errors.Unsupported | ArgumentError | errors.MissingPackage) else 1
    except BrokenPipeError:  # `| head` has seen enough; Python would complain at its own last flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _message(error: errors.Error) -> str:
    return f"{type(error).__name__.rstrip('_')}: {error}"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; arguments may stand after options too, which argparse does not know."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    unknown = [word for word in rest if word.startswith("-")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest and options.command == "doctor":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.arguments = [*getattr(options, "arguments", ()), *rest]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tdsl", description=(__doc__ or "").partition("\n")[2], formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, what in (
        ("show", "the notation, its gradient, the plan, the kernels"),
        ("grad", "the same of the gradient"),
        ("explain", "every stage, with FLOPs, bytes and the predicted bound of each kernel"),
        ("check", "what the machine code takes, and its faults"),
        ("bench", "the time on this machine beside the roofline"),
        ("tune", "search for the fastest configuration"),
    ):
        command = commands.add_parser(name, help=what, description=what)
        command.add_argument("source", metavar="FILE_OR_TEXT", help="a file with a program, or the program itself")
        command.add_argument("arguments", nargs="*", metavar="NAME=SPEC", help="A=bf16[8,1024,64] for a tensor, scale=0.125 for a number")
        command.add_argument("--json", action="store_true", help="print JSON")
        if name in ("show", "grad", "explain", "check"):
            command.add_argument("--target", help="cuda:80, cuda:90, cuda:100, hip:gfx942 or cpu (default: cuda:90)")
        if name in ("show", "grad"):
            command.add_argument(
                "--kind", action="append", help="one stage; may be given more than once: program gradient plan triton ttir .."
            )
        if name in ("show", "bench"):
            command.add_argument("--gradient", action="store_true", help="of the gradient" if name == "show" else "with the gradient")
        if name == "check":
            command.add_argument(
                "--gradient", action=argparse.BooleanOptionalAction, help="with the gradient's kernels, too (default: where there is a gradient)"
            )
        if name == "grad":
            command.add_argument("--wrt", action="append", metavar="NAME", help="only this input; may be given more than once")
    what = "versions, devices, caches, every executor tried: one page for a bug report"
    command = commands.add_parser("doctor", help=what, description=what)
    command.add_argument("--settings", action="store_true", help="only the settings, and where their values come from")
    command.add_argument("--json", action="store_true", help="print JSON")
    return parser


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def _show(options: argparse.Namespace) -> int:
    program, args = _read(options)
    of_gradient = options.command == "grad" or options.gradient
    texts = _texts(program, args, options, of_gradient)
    if options.json:
        _print_json(texts)
    elif sys.stdout.isatty():
        _print_rich([_section(kind, text) for kind, text in texts.items()])
    else:
        print("\n\n".join(text.strip("\n") for text in texts.values()))
    return 0


def _texts(program: Program, args: list[Any] | None, options: argparse.Namespace, of_gradient: bool) -> dict[str, str]:
    """The stages that are asked for; the notation and its gradient need no torch, which takes a second to import."""
    from tdsl.swap import gradient

    wrt = getattr(options, "wrt", None)
    shown = gradient(program, wrt) if of_gradient else program
    texts: dict[str, str] = {}
    for kind in options.kind or ("program", *(() if of_gradient else ("gradient",)), *(() if args is None else ("plan", "triton"))):
        if kind == "program":
            texts[kind] = str(shown)
        elif kind == "gradient":
            try:
                texts[kind] = str(gradient(shown))
            except (ArgumentError, errors.Unsupported) as error:
                if options.kind:
                    raise
                print(f"no gradient: {error}", file=sys.stderr)
        else:
            texts[kind] = _emit(kind, program, shown, args, options.target)
    return texts


def _emit(kind: str, program: Program, shown: Program, args: list[Any] | None, target: str | None) -> str:
    """A stage of `shown`, which is `program` or its gradient; `args` are those of `program`."""
    from tdsl.emit import KINDS
    from tdsl.function import function

    if kind not in KINDS:
        raise ArgumentError(f"no stage is called {kind!r}", help=f"kinds: {', '.join(KINDS)}")
    if args is None:
        raise _missing(program, program.params)
    further = [] if shown is program else _cotangents(program, args)
    return str(function(shown).emit(kind, *args, *further, target=target))


def _section(kind: str, text: str) -> Section:
    from tdsl.page import Section

    return Section(_PRINTED.get(kind, kind), text, _LEXERS.get(kind, "text"))


def _cotangents(program: Program, args: Sequence[Any]) -> list[str]:
    """What the further parameters of the gradient are like: the outputs."""
    from tdsl.arguments import layout
    from tdsl.infer import infer
    from tdsl.ops import DTYPES

    found = layout(program, args)
    inferred = infer(program, found.specs, found.values)
    outputs = [(DTYPES[inferred.dtypes[name]].short, inferred.shapes[name]) for name in program.results]
    return [f"{dtype}[{','.join(map(str, shape))}]" for dtype, shape in outputs]


def _explain(options: argparse.Namespace) -> int:
    function, args = _call(options)
    _print_page(function.explain(*args, target=options.target), options)
    return 0


def _check(options: argparse.Namespace) -> int:
    function, args = _call(options)
    report, missing = None, ""
    if options.gradient is None:
        try:
            report = function.check(*args, target=options.target, gradient=True)
        except (ArgumentError, Unsupported) as error:  # what concerns the forward too is raised again
            missing = f"the gradient's kernels are not in this report: {error.what}"
    if report is None:
        report = function.check(*args, target=options.target, gradient=bool(options.gradient))
    _print_page(report, options)
    if missing:
        print(missing, file=sys.stderr)
    return 0 if report.ok else 1


def _bench(options: argparse.Namespace) -> int:
    from tdsl.bench import bench

    function, args = _call(options)
    _print_page(bench(function, args, gradient=options.gradient), options)
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from tdsl.doctor import doctor, settings
    from tdsl.page import plain

    if options.settings:
        section = settings()
        if options.json:
            from tdsl.config import SETTINGS, config

            _print_json({name: {"value": getattr(config, name), "from": config.source(name)} for name in SETTINGS})
        elif sys.stdout.isatty():
            _print_rich([section])
        else:
            print(plain([section]))
        return 0
    diagnosis = doctor()
    _print_page(diagnosis, options)
    return 0 if diagnosis.ok else 1


def _tune(options: argparse.Namespace) -> int:
    function, args = _call(options)
    function.tune(*args)
    return 0


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "show": _show,
    "grad": _show,
    "explain": _explain,
    "check": _check,
    "bench": _bench,
    "tune": _tune,
    "doctor": _doctor,
}


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def _read(options: argparse.Namespace) -> tuple[Program, list[Any] | None]:
    """The program, and its arguments in order; None where none are given and some are needed."""
    from tdsl.text import parse

    text, origin = _source(options.source)
    program = parse(text, origin=origin)
    given = _named(options.arguments)
    return program, (arguments_for(program, given) if given or not program.params else None)


def _call(options: argparse.Namespace) -> tuple[Function, list[Any]]:
    """The function and its arguments, all of them."""
    from tdsl.function import function

    program, args = _read(options)
    if args is None:
        raise _missing(program, program.params)
    return function(program), args


def _source(text: str) -> tuple[str, str]:
    """The program's text, and the file that it comes from or ""."""
    path = Path(text)
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8"), str(path)
    except (OSError, UnicodeDecodeError) as error:
        if "\n" not in text and "=" not in text:
            raise ArgumentError(f"{text} cannot be read: {error}") from None
    if "=" not in text:  # every program has an assignment
        raise ArgumentError(f"{text!r} is neither a file nor a program", help="write a program as 'Y[i,j] += A[i,k] * B[k,j]', in quotes")
    return text, ""


def _named(arguments: Sequence[str]) -> dict[str, str]:
    given: dict[str, str] = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals or not name.strip():
            raise ArgumentError(
                f"{argument!r} is no argument", help="write NAME=SPEC: A=bf16[8,1024,64] for a tensor, scale=0.125 for a number"
            )
        if name.strip() in given:
            raise ArgumentError(f"{name.strip()} is given twice")
        given[name.strip()] = value.strip()
    return given


def arguments_for(program: Program, given: dict[str, str]) -> list[Any]:
    """The arguments of a program, in the order of its parameters, from NAME -> text of a spec or a number.

    Raises ArgumentError for names that the program does not have, that are missing, and for texts that are neither.
    """
    unknown = [name for name in given if name not in program.inputs]
    if unknown:
        raise ArgumentError(
            f"{program.name} has no parameter {', '.join(unknown)}", help=f"its parameters are {', '.join(program.inputs) or 'none'}"
        )
    missing = [p for p in program.params if p.name not in given]
    if missing:
        raise _missing(program, missing)
    return [_value(p, given[p.name]) for p in program.params]


def _missing(program: Program, params: Sequence[Param]) -> ArgumentError:
    names = ", ".join(p.name for p in params)
    example = " ".join(_example(program, p) for p in params)
    what = "the argument" if len(params) == 1 else "the arguments"
    return ArgumentError(f"{program.name} lacks {what} {names}", help=f"give, say, {example}")


def _example(program: Program, p: Param) -> str:
    from tdsl.swap import differentiable

    real = p.name in differentiable(program)
    if not p.dims:
        return f"{p.name}={'0.125' if real else '4'}"
    return f"{p.name}={'bf16' if real else 'i64'}[{','.join(['128'] * len(p.dims))}]"


def _value(p: Param, text: str) -> Any:
    from tdsl.arguments import parse_spec

    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    try:
        return float(text)
    except ValueError:
        parse_spec(p.name, text)  # raises for what is no spec
        return text


# ---------------------------------------------------------------------------------------------------------------------
# Printing


def _print_page(page: Page, options: argparse.Namespace) -> None:
    if options.json:
        _print_json(page.as_json())
    elif sys.stdout.isatty():
        _print_rich(page.sections())
    else:
        print(page)


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=2))


def _print_rich(sections: Sequence[Section]) -> None:
    from rich.console import Console

    from tdsl.page import rich

    console = Console()
    for part in rich(sections):
        console.print(part)


if __name__ == "__main__":
    sys.exit(main())
