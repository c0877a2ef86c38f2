"""Gradients that a user wrote, put in the place of those of the swap rule.

A.grad[i,k] += Y.grad[i,j] * B[k,j]      -->      A.grad[i,k] += minimum(1.0, Y.grad[i,j]) * B[k,j]
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from tdsl.ir import Access, Custom, Loop, Program, Statement, fresh_name, reads, rebuild_range, rename_tensors, statements


def with_custom(whole: Program, custom: Collection[Custom], swapped: int) -> Program:
    """A gradient program whose statements for some of its outputs are those of `custom`; names of their own stay apart.

    They stand as early among the last `swapped` nodes as what they read allows, since `=` cuts cotangents further down.
    """
    start = len(whole.body) - swapped
    for own in custom:
        if own.name not in whole.results:
            continue
        writers = [{s.target.tensor for s in statements((node,))} for node in whole.body]
        taken = {*whole.inputs, *(name for names in writers for name in names)}
        names: dict[str, str] = {}
        for s in statements(own.body):
            name = s.target.tensor
            if name != own.name and name not in names:
                names[name] = fresh_name(name, taken)
                taken.add(names[name])
        read = {a.tensor for node in own.body for a in reads(node)}
        ready = max((n + 1 for n, written in enumerate(writers) if written & read), default=0)
        replaced = max(n for n, written in enumerate(writers) if own.name in written)
        place = max(start, min(ready, replaced + 1))
        new = tuple(renamed(node, names) for node in own.body)
        nodes = (
            *(_without(node, own.name) for node in whole.body[:place]),
            *new,
            *(_without(node, own.name) for node in whole.body[place:]),
        )
        whole = replace(whole, body=tuple(node for node in nodes if node is not None))
    return whole


def _without(node: Statement | Loop, name: str) -> Statement | Loop | None:
    if isinstance(node, Statement):
        return None if node.target.tensor == name else node
    body = tuple(child for child in (_without(child, name) for child in node.body) if child is not None)
    return replace(node, body=body) if body else None


def renamed(node: Statement | Loop, to: Mapping[str, str]) -> Statement | Loop:
    """A node with tensors renamed, targets too."""
    if not to:
        return node
    ranges = tuple(rebuild_range(r, lambda e: rename_tensors(e, to)) for r in node.ranges)
    if isinstance(node, Loop):
        return replace(node, ranges=ranges, body=tuple(renamed(child, to) for child in node.body))
    target = rename_tensors(node.target, to)
    assert isinstance(target, Access)
    return replace(node, ranges=ranges, target=target, value=rename_tensors(node.value, to))
