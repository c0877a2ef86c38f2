"""An edited kernel's text in the place of the generated one."""

from __future__ import annotations

import ast
from dataclasses import replace

from lowering.kernel_source import KernelSource
from tdsl.errors import CompileError


def edited(kernel: KernelSource, text: str, name: str) -> KernelSource:
    """A kernel with another text in the place of its own. Raises CompileError where the text is not that of such a kernel."""
    given = parameters(kernel.name, text)
    names = tuple(a.name for a in kernel.args)
    if given != names:
        raise CompileError(
            f"the edited kernel takes ({', '.join(given)}), but {name} is called with ({', '.join(names)})",
            help=f"the parameters stay as they are; an edit of a kernel of training goes under its own name, {name!r} here",
        )
    return replace(kernel, source=text)


def parameters(kernel: str, text: str) -> tuple[str, ...]:
    """The parameters of the function of that name in a module. Raises CompileError if it is not there, or if the text is not Python."""
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        line = (error.text or "").rstrip()
        raise CompileError(f"the edited kernel {kernel} is not Python: {error.msg}, in line {error.lineno}: {line}") from error
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    if kernel not in functions:
        raise CompileError(
            f"the edited text defines no function {kernel}, but {', '.join(functions) or 'none'}",
            help="edit what emit('triton', ..) prints, imports and names included",
        )
    return tuple(a.arg for a in functions[kernel].args.args)
