"""Local arrays that take over the memory of others which nothing reads any more: a tile's worth of caches is all that a program has.

s = dot(q, k);  for i, j: e[i,j] = exp(s[i,j]);  p = dot(e, v);  t = dot(o, v)      -->      e lives where s does; so does t
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lowering import tile_ir as ir
from lowering.nests import Item, Nest, Nests, Product, Walk, operands


def reuse(plan: Nests, values: Mapping[str, ir.Value]) -> dict[str, str]:
    """array -> the array whose memory it takes: of the same axes and type, dead before it, or read for the last time element by element
    in the loop that makes it."""
    arrays = {v.name: v for v in plan.arrays if v.name not in plan.same and v.name not in plan.same.values()}
    found: dict[str, str] = {}
    _scope(plan.items, arrays, values, found)
    return found


def _scope(items: Sequence[Item], arrays: Mapping[str, ir.Value], values: Mapping[str, ir.Value], found: dict[str, str]) -> None:
    for item in items:
        if isinstance(item, Walk):
            _scope(item.body, arrays, values, found)
    made = {name: n for n, item in enumerate(items) for name in _made(item) if name in arrays}
    last: dict[str, int] = {}
    for n, item in enumerate(items):
        last.update(dict.fromkeys(_used(item, values), n))
    free: dict[str, int] = {}  # arrays that own their memory -> where it was last read
    for name in sorted(made, key=made.__getitem__):
        n, v = made[name], arrays[name]
        alike = (o for o in free if (arrays[o].axes, arrays[o].dtype) == (v.axes, v.dtype))
        owner = next((o for o in alike if free[o] < n or (free[o] == n and _ends(o, found, v, items[n], values))), None)
        if owner is not None:
            found[name] = owner
        free[owner or name] = last.get(name, len(items))


def _ends(owner: str, found: Mapping[str, str], v: ir.Value, item: Item, values: Mapping[str, ir.Value]) -> bool:
    """Whether a loop over the very elements of `v` reads nothing of an array's memory once it has made `v`."""
    if not isinstance(item, Nest) or item.axes != v.axes:
        return False
    names = {owner, *(name for name, o in found.items() if o == owner)}
    place = next(n for n, op in enumerate(item.body) if not isinstance(op, ir.For | ir.Store | ir.Assign) and op.dst.name == v.name)
    return not any(x.name in names for op in item.body[place + 1 :] for x in operands(op, values))


def _made(item: Item) -> list[str]:
    """The arrays that an item writes whole, each element once."""
    if isinstance(item, Product):
        return [item.dot.dst.name]
    return sorted(item.kept) if isinstance(item, Nest) else []


def _used(item: Item, values: Mapping[str, ir.Value]) -> set[str]:
    if isinstance(item, Walk):
        ops = tuple(ir.operations(item.loop.body))
    else:
        ops = item.body if isinstance(item, Nest) else (item.dot,) if isinstance(item, Product) else (item,)
    return {v.name for op in ops for v in operands(op, values)}
