"""Whether two accesses to one tensor can be one element: never, or only where their points are the same."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from tdsl.affine import Known, Ranges, depends_on_values, enclosure, linear, rename
from tdsl.ir import Clamp, Expr, Index, free_indices

Pairs = Iterable[tuple[Expr, Expr]]  # the subscripts of both, dimension by dimension


def never_meet(pairs: Pairs, own: Mapping[str, str], ranges: Ranges, known: Known | None = None) -> bool:
    """Whether some subscript of the one never equals that of the other. own: the indices that the first has for itself -> other names,
    under which `ranges` has theirs."""
    for a, b in pairs:
        if isinstance(a, Clamp) or isinstance(b, Clamp):
            continue
        first, second = linear(a, known), linear(b, known)
        if depends_on_values(first.expr()) or depends_on_values(second.expr()):
            continue
        least, most = enclosure(rename(first, own) - second, ranges, known)
        if least > 0 or most < 0:
            return True
    return False


def same_element(pairs: Collection[tuple[Expr, Expr]], inside: Collection[str]) -> bool:
    """Whether a read is, for each point of the loops over `inside`, of the element that the point writes. pairs: (written, read)."""
    settled = all(w == r or (not isinstance(w, Clamp) and not {*inside} & set(free_indices(w))) for w, r in pairs)
    return settled and {*inside} <= {w.name for w, r in pairs if isinstance(w, Index) and w == r}
