"""Random programs over the whole grammar that every executor should run: `random_case(seed)`.

Statements are drawn one after the other over four inputs of every rank; a later one may read, rewrite or accumulate into what an earlier
one wrote. Values stay small, so that float32 is enough to compare.
"""

from __future__ import annotations

import random
import re

from tests.corpus import Case

SIZES = {"i": 5, "j": 7, "k": 3, "l": 5}
DIMS = {"i": "n", "j": "m", "k": "p", "l": "n"}
INPUTS = {"A": "ij", "B": "jk", "C": "ik", "D": "il", "W": "kj", "x": "i", "y": "j", "z": "k", "c": "", "u": ""}
ALONG = {"i": "x", "j": "y", "k": "z", "l": "x"}  # an input with that index alone, which settles its range
FUNCTIONS = ("tanh({})", "sin({})", "sigmoid({})", "relu({})", "abs({})", "softplus({})", "erf({})", "(-({}))", "exp(-abs({}))", "sqrt(1 + abs({}))")


class _Writer:
    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.tensors = {name: dims for name, dims in INPUTS.items() if dims}
        self.written: list[str] = []
        self.lines: list[str] = []

    # -- expressions --------------------------------------------------------------------------------------------------

    def access(self, tensor: str, allowed: list[str]) -> str:
        subscripts = [self.subscript(d, [i for i in allowed if SIZES[i] == SIZES[d]]) for d in self.tensors[tensor]]
        return f"{tensor}[{','.join(subscripts)}]" if subscripts else tensor

    def subscript(self, dim: str, allowed: list[str]) -> str:
        size = SIZES[dim]
        if not allowed:
            return str(self.random.randrange(size))
        i = self.random.choice(allowed)
        return self.random.choice(
            [i] * 10
            + [f"pad({i}{self.random.choice(['-1', '+1', '+2'])})", f"clamp({i}{self.random.choice(['-1', '+1', '-2'])})"]
            + [f"({i}+{self.random.randrange(1, size)})%{size}", f"{size - 1}-{i}", str(self.random.randrange(size))]
        )

    def leaf(self, allowed: list[str]) -> str:
        kind = self.random.random()
        if kind < 0.1:
            return self.random.choice(["0.5", "2", "-1.5", "1"])
        if kind < 0.2 and allowed:
            return f"(0.1 * {self.random.choice(allowed)})"
        if kind < 0.3:
            return self.random.choice(["c", "u"])
        return self.access(self.random.choice(list(self.tensors)), allowed)

    def expr(self, allowed: list[str], depth: int) -> str:
        kind = self.random.random()
        if depth <= 0 or kind < 0.22:
            return self.leaf(allowed)
        a = self.expr(allowed, depth - 1)
        if kind < 0.4:
            return self.random.choice(FUNCTIONS).format(a)
        if kind < 0.83:
            b = self.expr(allowed, depth - 1)
            if kind < 0.7:
                return f"({a} {self.random.choice('+-**')} {b})"
            if kind < 0.75:
                return f"{self.random.choice(['maximum', 'minimum'])}({a}, {b})"
            if kind < 0.78:
                return f"({a} / (1.5 + {b} ** 2))"
            return f"where({self.condition(allowed)}, {a}, {b})"
        bound = [i for i in "ijk" if i not in allowed]
        if kind < 0.95 and bound:
            return self.reduction(self.random.choice(bound), allowed, depth)
        if allowed:
            i = self.random.choice(allowed)
            return f"softmax[{i}]({a} + {ALONG[i]}[{i}])"
        return a

    def condition(self, allowed: list[str]) -> str:
        conditions = [f"{self.leaf(allowed)} > 0", f"{self.leaf(allowed)} > {self.leaf(allowed)}"]
        if allowed:
            i, j = self.random.choice(allowed), self.random.choice(allowed)
            conditions += [f"{i} <= {j}", f"{i} % 2 == 0", f"{i} < 3 and {self.leaf(allowed)} < 1", f"not {j} == 1 or {i} > 0"]
        return self.random.choice(conditions)

    def reduction(self, i: str, allowed: list[str], depth: int) -> str:
        op = self.random.choice(["sum", "mean", "max", "min", "logsumexp", "var", "prod"])
        body = self.expr([*allowed, i], depth - 1)
        if op == "prod":
            body = f"1 + 0.3 * tanh({body})"
        if self.random.random() < 0.2:
            return f"{op}[{i} in 0:{SIZES[i]}]({body})"
        return f"{op}[{i}]({body} + 0.1 * {ALONG[i]}[{i}])"

    # -- statements ---------------------------------------------------------------------------------------------------

    def statement(self) -> None:
        again = self.written and self.random.random() < 0.25
        name = self.random.choice(self.written) if again else f"T{len(self.written)}"
        left = list(self.tensors[name]) if again else self.random.sample("ijk", self.random.choice([0, 1, 1, 2, 2, 2]))
        inside = [i for i in "ijk" if i not in left]
        reduced = self.random.sample(inside, min(len(inside), self.random.choice([0, 0, 1, 1, 2])))
        op = "=" if not reduced and self.random.random() < 0.7 else self.random.choice(["+=", "+=", "+=", "max=", "min="])
        if again and op in ("max=", "min="):
            op = "+="
        allowed = self.random.sample([*left, *reduced], len(left) + len(reduced))
        value = self.expr(allowed, self.random.choice([1, 2, 3]))
        target = f"{name}[{','.join(left)}]" if left else name
        own = rf"\b{name}\b(\[[^\]]*\])?"  # itself it may read only where it writes, and not while it reduces
        value = re.sub(own, "x[0]" if reduced else target, value) if again else value
        settling = " + ".join(f"{ALONG[i]}[{i}]" for i in allowed if not again or i in reduced or self.random.random() < 0.5)
        self.lines.append(f"{target} {op} {value}{' + ' + settling if settling else ''}")
        self.tensors[name] = "".join(left)
        if not again:
            self.written.append(name)

    def case(self) -> Case:
        for _ in range(self.random.choice([1, 2, 2, 3, 3, 4, 5])):
            self.statement()
        text = "\n".join(self.lines)
        used = {name: dims for name, dims in INPUTS.items() if re.search(rf"\b{name}\b", text)}
        params = [f"{name}[{','.join(DIMS[d] for d in dims)}]" if dims else name for name, dims in used.items()]
        outputs = self.random.sample(self.written, self.random.randint(1, len(self.written)))
        outputs += [self.written[-1]] if self.written[-1] not in outputs else []
        body = "".join(f"\n    {line}" for line in self.lines)
        return Case(
            f"def random({', '.join(params)}) -> {', '.join(outputs)}:{body}",
            {name: tuple(SIZES[d] for d in dims) for name, dims in used.items() if name != "u"},
            scalars={"u": 0.7} if "u" in used else {},
        )


def random_case(seed: int) -> Case:
    """The program of a seed; the same on every machine."""
    return _Writer(seed).case()
