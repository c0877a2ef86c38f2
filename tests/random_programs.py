"""Random programs over the whole grammar that every executor should run: `random_case(seed)`.

Statements are drawn one after the other over inputs of every rank; a later one may read, rewrite or accumulate into what an earlier
one wrote. Values stay small, so that float32 is enough to compare. Every other seed draws from a wider grammar: gathers and scatters,
ragged ranges, writes of a part, ordered loops, sizes of 0 and 1.
"""

from __future__ import annotations

import random
import re

from tests.corpus import Case

SIZES = {"i": 5, "j": 7, "k": 3, "l": 5}
DIMS = {"i": "n", "j": "m", "k": "p", "l": "n"}
INPUTS = {"A": "ij", "B": "jk", "C": "ik", "D": "il", "W": "kj", "x": "i", "y": "j", "z": "k", "c": "", "u": ""}
INTEGERS = {"pi": "j", "pj": "ik", "len": "i", "once": "k"}  # places along i and along j; lengths of rows; places along j, all different
ALONG = {"i": "x", "j": "y", "k": "z", "l": "x"}  # an input with that index alone, which settles its range
FUNCTIONS = ("tanh({})", "sin({})", "sigmoid({})", "relu({})", "abs({})", "softplus({})", "erf({})", "(-({}))", "exp(-abs({}))", "sqrt(1 + abs({}))")


class _Writer:
    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.wide = seed % 2 == 1
        self.sizes = dict(SIZES)
        if self.wide and self.random.random() < 0.4:
            self.sizes.update({i: self.random.choice([1, 1, 2, 4, 5, 8, 0]) for i in "ijk"})
            self.sizes["l"] = self.sizes["i"]
        self.gathers = self.wide and 0 not in self.sizes.values()
        self.tensors = {name: dims for name, dims in INPUTS.items() if dims}
        self.written: list[str] = []
        self.lines: list[str] = []
        self.steps: set[str] = set()  # no softmax over them

    # -- expressions --------------------------------------------------------------------------------------------------

    def access(self, tensor: str, allowed: list[str]) -> str:
        subscripts = [self.subscript(d, allowed) for d in self.tensors[tensor]]
        return f"{tensor}[{','.join(subscripts)}]" if subscripts else tensor

    def subscript(self, dim: str, scope: list[str]) -> str:
        size = self.sizes[dim]
        allowed = [i for i in scope if self.sizes[i] == size and (size or i == dim)]
        computed = self.computed(dim, scope)
        if computed and self.random.random() < 0.15:
            return self.random.choice(computed)
        if not allowed:
            return str(self.random.randrange(size)) if size else self.random.choice(["pad(0)", "pad(1)"])
        i = self.random.choice(allowed)
        if not size:
            return i
        return self.random.choice(
            [i] * 10
            + [f"pad({i}{self.random.choice(['-1', '+1', '+2'])})", f"clamp({i}{self.random.choice(['-1', '+1', '-2'])})"]
            + [f"({i}+{self.random.randrange(1, size + 1)})%{size}", f"{size - 1}-{i}", str(self.random.randrange(size)), f"{i}//2"]
        )

    def computed(self, dim: str, scope: list[str]) -> list[str]:
        """Places along a dimension that integer tensors tell."""
        if not self.gathers:
            return []
        if dim in "il" and "j" in scope:
            return ["pi[j]"]
        if dim == "j" and "i" in scope and "k" in scope:
            return ["pj[i,k]", "pad(pj[i,k]-1)", "clamp(pj[i,k]+1)"]
        if dim == "j" and "k" in scope:
            return ["once[k]"]
        return []

    def leaf(self, allowed: list[str]) -> str:
        kind = self.random.random()
        if kind < 0.1:
            return self.random.choice(["0.5", "2", "-1.5", "1"])
        if kind < 0.2 and allowed:
            return f"(0.1 * {self.random.choice(allowed)})"
        if kind < 0.25:
            return self.random.choice(["c", "u"])
        if kind < 0.3:
            size = f"size({ALONG[self.random.choice('ijk')]}, 0)"
            return self.random.choice([f"(0.1 * {size})", f"(1 / (1.5 + {size}))", f"(0.2 * {size} - 0.5)", f"exp(-0.3 * {size})"])
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
        allowed = [i for i in allowed if i not in self.steps]
        if allowed:
            i = self.random.choice(allowed)
            return f"softmax[{i}]({a} + {ALONG[i]}[{i}])"
        return a

    def condition(self, allowed: list[str]) -> str:
        conditions = [f"{self.leaf(allowed)} > 0", f"{self.leaf(allowed)} > {self.leaf(allowed)}"]
        if allowed:
            i, j = self.random.choice(allowed), self.random.choice(allowed)
            conditions += [f"{i} <= {j}", f"{i} % 2 == 0", f"{i} < 3 and {self.leaf(allowed)} < 1", f"not {j} == 1 or {i} > 0"]
        if self.gathers and "j" in allowed:
            conditions += ["pi[j] > 1", "pi[j] == i" if "i" in allowed else "pi[j] != 0"]
        return self.random.choice(conditions)

    def reduction(self, i: str, allowed: list[str], depth: int) -> str:
        op = self.random.choice(["sum", "mean", "max", "min", "logsumexp", "var", "prod"])
        lengths = self.gathers and i == "j" and "i" in allowed and op in ("sum", "prod", "max", "logsumexp") and self.random.random() < 0.5
        steps, self.steps = self.steps, self.steps | {"i"} if lengths else self.steps
        body = self.expr([*allowed, i], depth - 1)
        self.steps = steps
        if op == "prod":
            body = f"1 + 0.3 * tanh({body})"
        if lengths:
            return f"{op}[j in 0:len[i]]({body} + 0.1 * y[j]{', init=-0.5' if op == 'max' else ''})"
        if self.random.random() < 0.2:
            return f"{op}[{i} in 0:{self.sizes[i]}]({body})"
        return f"{op}[{i}]({body} + 0.1 * {ALONG[i]}[{i}])"

    # -- statements ---------------------------------------------------------------------------------------------------

    def statement(self) -> None:
        if self.wide and self.random.random() < 0.45:
            kinds = [self.part, self.recurrence, *([self.scatter, self.ragged, self.best] if self.gathers else [])]
            self.random.choice(kinds)()
            return
        again = bool(self.written) and self.random.random() < 0.25
        name = self.random.choice(self.written) if again else self.fresh()
        left = list(self.tensors[name]) if again else self.random.sample("ijk", self.random.choice([0, 1, 1, 2, 2, 2]))
        inside = [i for i in "ijk" if i not in left]
        reduced = self.random.sample(inside, min(len(inside), self.random.choice([0, 0, 1, 1, 2])))
        op = "=" if not reduced and self.random.random() < 0.7 else self.random.choice(["+=", "+=", "+=", "max=", "min="])
        if again and op in ("max=", "min=") and not self.wide:
            op = "+="
        allowed = self.random.sample([*left, *reduced], len(left) + len(reduced))
        value = self.expr(allowed, self.random.choice([1, 2, 3]))
        target = f"{name}[{','.join(left)}]" if left else name
        value = self.without(name, value, "x[0]" if reduced else target) if again else value
        settling = " + ".join(f"{ALONG[i]}[{i}]" for i in allowed if not again or i in reduced or self.random.random() < 0.5)
        self.write(name, left, f"{target} {op} {value}{' + ' + settling if settling else ''}")

    def fresh(self) -> str:
        return f"T{len(self.written)}"

    def without(self, name: str, value: str, instead: str) -> str:
        """A value that reads its own target only where it writes it, and not while it reduces."""
        instead = "c" if instead == "x[0]" and not self.sizes["i"] else instead
        result, end = "", 0
        for found in re.finditer(rf"\b{name}\b", value):
            if found.start() < end:
                continue
            result += value[end : found.start()] + instead
            end, depth = found.end(), 0
            while end < len(value) and (depth or value[end] == "["):
                depth += (value[end] == "[") - (value[end] == "]")
                end += 1
        return result + value[end:]

    def write(self, name: str, left: list[str], *lines: str) -> None:
        self.lines += lines
        self.tensors[name] = "".join(left)
        if name not in self.written:
            self.written.append(name)

    def factor(self, op: str, value: str) -> str:
        return f"1 + 0.3 * tanh({value})" if op == "*=" else value

    def start(self, left: list[str]) -> tuple[str, list[str]]:
        """A tensor to write into, and the lines that make it: an older one, or a new one with a start of its own."""
        older = [t for t in self.written if self.tensors[t] == "".join(left)]
        if older and self.random.random() < 0.6:
            return self.random.choice(older), []
        name = self.fresh()
        value = " + ".join(f"{ALONG[i]}[{i}]" for i in left)
        return name, [f"{name}[{','.join(left)}] = {self.random.choice([value, f'0.5 * ({value})', f'0 * ({value})'])}"]

    def part(self) -> None:
        """Some elements of a tensor that is there already."""
        left = self.random.sample("ijk", self.random.choice([1, 2]))
        name, lines = self.start(left)
        op = self.random.choice(["=", "+=", "*=", "max=", "min="])
        reduced = [] if op == "=" else [i for i in "ijk" if i not in left and self.random.random() < 0.4]
        i = left[0]
        lo = self.random.randrange(0, max(1, self.sizes[i]))
        hi = self.random.randrange(lo, self.sizes[i] + 1) if self.sizes[i] else 0
        shift = self.random.choice([0, 0, -lo, self.sizes[i] - hi]) if self.sizes[i] else 0
        place = f"{i}+{shift}" if shift > 0 else f"{i}-{-shift}" if shift else i
        ranges = ", ".join([f"{i} in {lo}:{hi}", *(f"{r} in 0:{self.sizes[r]}" for r in left[1:] + reduced)])
        value = self.factor(op, self.without(name, self.expr([*left, *reduced], 2), "c"))
        self.write(name, left, *lines, f"for {ranges}:  {name}[{','.join([place, *left[1:]])}] {op} {value}")

    def scatter(self) -> None:
        """Elements that integers tell: several times, or, by `=`, each once."""
        op = self.random.choice(["=", "+=", "+=", "*=", "max=", "min="])
        dim, place, over = ("j", "once[k]", "k") if op == "=" or self.random.random() < 0.3 else ("i", "pi[j]", "j")
        if dim == "j" and self.sizes["k"] > self.sizes["j"]:
            return
        rest = self.random.sample([i for i in "ijk" if i not in (dim, over)], self.random.choice([0, 1]))
        name, lines = self.start([dim, *rest])
        value = self.factor(op, self.without(name, self.expr([over, *rest], 2), "c"))
        settling = " + ".join(f"0.1 * {ALONG[i]}[{i}]" for i in [over, *rest])
        self.write(name, [dim, *rest], *lines, f"{name}[{','.join([place, *rest])}] {op} {value} + {settling}")

    def ragged(self) -> None:
        """Rows of different lengths."""
        keeps = self.random.random() < 0.4
        op = self.random.choice(["=", "+=", "max="] if keeps else ["+=", "*=", "max=", "min="])
        left = ["i", "j"] if keeps else ["i", *self.random.sample("k", self.random.choice([0, 1]))]
        name, lines = self.start(left)
        self.steps = {"i"}  # the range of j depends on it
        value = self.factor(op, self.without(name, self.expr(list(dict.fromkeys([*left, "j"])), 2), "c"))
        self.steps = set()
        rest = "".join(f", {i}" for i in left if i not in "ij")
        settling = "".join(f" + {ALONG[i]}[{i}]" for i in left if i not in "ij")
        self.write(name, left, *lines, f"for i, j in 0:len[i]{rest}:  {name}[{','.join(left)}] {op} {value} + 0.1 * A[i,j]{settling}")

    def best(self) -> None:
        """The place of an extremum, read there."""
        name = self.fresh()
        body = self.expr(["i", "j"], 2)
        op = self.random.choice(["argmax", "argmin"])
        self.write(name, ["i"], f"{name}a[i] = {op}[j]({body} + A[i,j])", f"{name}[i] = A[i,{name}a[i]] * x[i]")

    def recurrence(self) -> None:
        """One step after the other."""
        t, *left = self.random.sample("ijk", self.random.choice([1, 2]))
        name, size = self.fresh(), self.sizes[t]
        order, before = self.random.choice([("ordered", f"pad({t}-1)"), ("reversed", f"pad({t}+1)"), ("ordered", f"pad({t}-2)")])
        older = f"{name}[{','.join([before, *left])}]"
        self.steps = {t}  # one step does not know the others
        value = self.expr([t, *left], 2)
        self.steps = set()
        step = self.random.choice([f"0.5 * {older} + {value}", f"tanh({older} + {value})", f"{older} * sigmoid({value}) + 0.1 * {ALONG[t]}[{t}]"])
        ranges = "".join(f", {i} in 0:{self.sizes[i]}" for i in left)
        self.write(name, [t, *left], f"for {order} {t} in 0:{size}{ranges}:  {name}[{','.join([t, *left])}] = {step}")

    def case(self) -> Case:
        for _ in range(self.random.choice([1, 2, 2, 3, 3, 4, 5])):
            self.statement()
        if not self.written:
            self.write("T0", ["i"], "T0[i] = 2 * x[i]")
        text = "\n".join(self.lines)
        used = {name: dims for name, dims in {**INPUTS, **INTEGERS}.items() if re.search(rf"\b{name}\b", text)}
        params = [f"{name}[{','.join(DIMS[d] for d in dims)}]" if dims else name for name, dims in used.items()]
        outputs = self.random.sample(self.written, self.random.randint(1, len(self.written)))
        outputs += [self.written[-1]] if self.written[-1] not in outputs else []
        body = "".join(f"\n    {line}" for line in self.lines)
        n, m, p = (self.sizes[i] for i in "ijk")
        integers = {"pi": (0, max(1, n)), "pj": (0, max(1, m)), "len": (0, m + 1)}
        return Case(
            f"def random({', '.join(params)}) -> {', '.join(outputs)}:{body}",
            {name: tuple(self.sizes[d] for d in dims) for name, dims in used.items() if name not in ("u", "once")},
            ints={name: integers[name] for name in used if name in integers},
            scalars={"u": 0.7} if "u" in used else {},
            values={"once": self.random.sample(range(m), p) if p <= m else [self.random.randrange(m) for _ in range(p)]} if "once" in used else {},
        )


def random_case(seed: int) -> Case:
    """The program of a seed; the same on every machine."""
    return _Writer(seed).case()
