"""Positive numbers that a value is multiplied by, taken out of it: c * max(x) is max(c * x), rounding being monotone.

    where(j <= i, 0.125 * s[i,j], -inf)   -->   0.125 times where(j <= i, s[i,j], -inf)
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from tdsl.ir import Access, Call, Const, Expr, Statement


def scaled(e: Expr, definitions: Mapping[str, Statement]) -> tuple[float, Expr] | None:
    """(c, x) of a value c * x, where c is a finite number above 0; None where it is no such product. definitions: elementwise statements
    whose values stand for the tensors."""
    match e:
        case Access(tensor=name) if name in definitions:
            return scaled(definitions[name].value, definitions)
        case Call(op="mul", args=(Const(value=c), x) | (x, Const(value=c))) if isinstance(c, float) and 0 < c < math.inf:
            return c, x
        case Call(op="where", args=(condition, x, Const(value=value) as rest)) if isinstance(value, float) and math.isinf(value):
            found = scaled(x, definitions)
            return None if found is None else (found[0], Call("where", (condition, found[1], rest)))
        case Call(op="where", args=(condition, x, Call(op="neg", args=(Const(value=math.inf),)) as rest)):
            found = scaled(x, definitions)
            return None if found is None else (found[0], Call("where", (condition, found[1], rest)))
    return None
