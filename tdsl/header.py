"""What a `def` line or a Python function says about its program: checked, and its sizes resolved against the body."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from difflib import get_close_matches

from tdsl import check
from tdsl.calls import check_name
from tdsl.errors import NameError_, RankMismatch
from tdsl.ir import Access, Expr, Index, Output, Param, Program, Size, rebuild
from tdsl.signature import Body, Sizes, default_name


@dataclass(frozen=True, slots=True)
class Header:
    """What a `def` line or a Python function says. With `named`, the dims are the user's; else they only count and the body names them."""

    name: str | None
    params: tuple[Param, ...]
    outputs: tuple[Output, ...]
    named: bool = True


def check_header(header: Header) -> None:
    """Raise NameError_ for a name that stands twice, or for a size and a scalar."""
    for what, items in (("parameter", header.params), ("output", header.outputs)):
        seen: set[str] = set()
        for item in items:
            check_name(item.name, item.span)
            if item.name in seen:
                raise NameError_(f"{item.name} is {what} twice", span=item.span, help="name each once")
            seen.add(item.name)
    for p in header.params:
        clash = next((q for q in header.params if not q.dims and q.name in p.dims), None) if header.named else None
        if clash is not None:
            raise NameError_(
                f"{clash.name} names a size of {p.name} and a scalar parameter", span=p.span, help="give one of them another name"
            )


def with_header(body: Body, header: Header, name: str | None, written: Collection[str], ranks: dict[str, int]) -> Program:
    """The Program of a resolved body and its header; `ranks` are those of every tensor in the body."""
    for o in header.outputs:
        if o.name not in written:
            close = get_close_matches(o.name, sorted(written), n=1, cutoff=0.6)
            raise NameError_(
                f"output {o.name} is never written",
                span=o.span,
                help=f"did you mean `{close[0]}`?" if close else f"write a statement `{o.name}[..] = ..`",
            )
        if o.sizes is not None and len(o.sizes) != ranks[o.name]:
            raise RankMismatch(
                f"output {o.name} has {len(o.sizes)} sizes, and {ranks[o.name]} subscript{'s' * (ranks[o.name] != 1)} where it is written",
                span=o.span,
                help="give one size per dimension",
            )
    params = header.params
    sizes = Sizes(body, {p.name for p in params}, {o.name for o in header.outputs if o.sizes is not None})
    if not header.named:
        dims = sizes.dims({p.name: len(p.dims) for p in params})
        params = tuple(replace(p, dims=dims[p.name]) for p in params)
    named: dict[str, Size] = {}
    for p in params:
        for d, dim in enumerate(p.dims):
            named.setdefault(dim, Size(p.name, d))
    scalars = {p.name for p in params if not p.dims}
    outputs = tuple(_output(o, named, scalars, ranks) for o in header.outputs)
    if not header.named:
        outputs = tuple(_fill(o, params, ranks[o.name], sizes) for o in outputs)
    return Program(name or header.name or default_name([o.name for o in outputs]), params, outputs, body)


def _output(o: Output, named: dict[str, Size], scalars: set[str], ranks: dict[str, int]) -> Output:
    """An output with the names in its sizes resolved; a name alone that means nothing leaves its place to inference."""
    if o.sizes is None:
        return o
    sizes: list[Expr | None] = []
    for e in o.sizes:
        assert e is not None
        alone = _name_of(e)
        if alone is not None and alone not in named and alone not in scalars:
            sizes.append(None)
            continue
        sizes.append(_size_value(e, named, scalars, ranks))
    return replace(o, sizes=tuple(sizes) if any(e is not None for e in sizes) else None)


def _name_of(e: Expr) -> str | None:
    return e.name if isinstance(e, Index) else e.tensor if isinstance(e, Access) and not e.subscripts else None


def _size_value(e: Expr, named: dict[str, Size], scalars: set[str], ranks: dict[str, int]) -> Expr:
    check.integer(e)
    name = _name_of(e)
    if name is not None:
        if name in named:
            return replace(named[name], span=e.span)
        if name not in scalars:
            raise NameError_(
                f"{name} is no size of a parameter and no scalar parameter", span=e.span, help=f"the sizes are {', '.join(named) or 'none'}"
            )
        return Access(name, span=e.span)
    if isinstance(e, Access):
        raise NameError_(
            "a size in the signature cannot read a tensor", span=e.span, help="use the sizes of parameters and scalar parameters"
        )
    if isinstance(e, Size) and e.dim >= ranks.get(e.tensor, 0):
        raise NameError_(f"{e.tensor} has no dimension {e.dim}", span=e.span, help="use the sizes of parameters")
    return rebuild(e, lambda x: _size_value(x, named, scalars, ranks))


def _fill(o: Output, params: tuple[Param, ...], rank: int, classes: Sizes) -> Output:
    """An output without sizes, with those that the body makes equal to a parameter's: what a `def` line says by its index names."""
    if o.sizes is not None:
        return o
    first: dict[object, Size] = {}
    for p in params:
        for d in range(len(p.dims)):
            first.setdefault(classes.find((p.name, d)), Size(p.name, d))
    sizes = tuple(first.get(classes.find((o.name, d))) for d in range(rank))
    return replace(o, sizes=sizes if any(size is not None for size in sizes) else None)
