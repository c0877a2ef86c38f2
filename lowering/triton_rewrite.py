"""The source of a kernel function --> Python that does to NumPy values what the kernel language does on a device.

x = 1            -->  x = tdsl_value(1)                     a tensor, as in a kernel
a and b          -->  tdsl_and(lambda: a, lambda: b)        element by element where they are blocks
not a            -->  tdsl_not(a)
if a: ..         -->  if tdsl_truth(a): ..                  an error for a block
for k in range(n)  -->  for k in tdsl_range(n)              k is a tensor
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Mapping
from typing import Any


def rewrite(fn: Callable[..., Any], names: Mapping[str, Any]) -> Callable[..., Any]:
    """`fn` rewritten; `names` gives what the `tdsl_` names of the rewriting are. Decorators are dropped, line numbers kept."""
    lines, first = inspect.getsourcelines(fn)
    function = ast.parse(textwrap.dedent("".join(lines))).body[0]
    assert isinstance(function, ast.FunctionDef)
    function.decorator_list = []
    ast.increment_lineno(function, first - 1)
    _Rewriter().visit(function)
    # The names come as an enclosing scope, so the function's own globals stay as they are.
    scope = ast.parse(f"def scope({', '.join(names)}): return {function.name}")
    outer = scope.body[0]
    assert isinstance(outer, ast.FunctionDef)
    outer.body.insert(0, function)
    code = compile(ast.fix_missing_locations(scope), fn.__code__.co_filename, "exec")
    local: dict[str, Any] = {}
    exec(code, fn.__globals__, local)
    rewritten: Callable[..., Any] = local["scope"](**names)
    return rewritten


class _Rewriter(ast.NodeTransformer):
    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        self.generic_visit(node)
        node.value = _call("tdsl_value", node.value)
        return node

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        self.generic_visit(node)
        nothing = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])
        thunks = [ast.Lambda(args=nothing, body=value) for value in node.values]
        return _call("tdsl_and" if isinstance(node.op, ast.And) else "tdsl_or", *thunks)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        self.generic_visit(node)
        return _call("tdsl_not", node.operand) if isinstance(node.op, ast.Not) else node

    def visit_If(self, node: ast.If) -> ast.AST:
        return self._tested(node)

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        return self._tested(node)

    def visit_While(self, node: ast.While) -> ast.AST:
        return self._tested(node)

    def _tested(self, node: ast.If | ast.IfExp | ast.While) -> ast.AST:
        self.generic_visit(node)
        node.test = _call("tdsl_truth", node.test)
        return node

    def visit_For(self, node: ast.For) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.iter, ast.Call) and isinstance(node.iter.func, ast.Name) and node.iter.func.id == "range":
            node.iter.func.id = "tdsl_range"
        return node


def _call(name: str, *args: ast.expr) -> ast.expr:
    return ast.Call(func=ast.Name(id=name, ctx=ast.Load()), args=list(args), keywords=[])
