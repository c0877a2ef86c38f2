"""The program of attention for a choice of options.

causal, one dimension of batch:
    def attention(Q[n0,h,i,d], K[n0,h,j,d], V[n0,h,j,e], scale) -> O[n0,h,i,e]:
        S[n0,h,i,j] += Q[n0,h,i,d] * K[n0,h,j,d]
        T[n0,h,i,j] = where((j <= i), scale * S[n0,h,i,j], -inf)
        P[n0,h,i,j] = softmax[j](T[n0,h,i,j])
        O[n0,h,i,e] += P[n0,h,i,j] * V[n0,h,j,e]
"""

from __future__ import annotations

from dataclasses import dataclass

from tdsl.nn.ranked import Ranked, by_options


@dataclass(frozen=True, slots=True)
class Options:
    """What the text of attention depends on.

    batch: dimensions before the heads. grouped: several heads of queries share one of keys. window: keys that a query sees, itself
    among them. soft_cap: bound of the scores. offset: whether queries start behind the first key. extras: further tensors of scores,
    each "keep" (a mask of what is seen), "hide" (of what is not) or "bias", with the sizes that are not 1, for its last dimensions
    out of [.., heads, i, j] (heads are two where grouped). rotary: "" or "halves" or "pairs". dropout: whether weights are scaled by a
    tensor. weights: whether they are given too, as their mean over the heads. heads_last: whether O is [.., i, heads, e].
    """

    batch: int = 0
    grouped: bool = False
    causal: bool = False
    window: int | None = None
    soft_cap: float | None = None
    offset: bool = False
    alibi: bool = False
    extras: tuple[tuple[str, tuple[bool, ...]], ...] = ()
    rotary: str = ""
    dropout: bool = False
    weights: str = ""
    heads_last: bool = False


@by_options
def attention_program(options: Options) -> Ranked:
    """The program. Rows that see nothing give zeros, as torch.nn.functional.scaled_dot_product_attention does."""
    o = options
    batch = [f"n{k}" for k in range(o.batch)]
    heads, shared = (["g", "m"], ["g"]) if o.grouped else (["h"], ["h"])
    n, h = ",".join([*batch, *heads]), ",".join(heads)
    keys = ",".join([*batch, *shared])
    out = ",".join([*batch, "i", *heads, "e"] if o.heads_last else [*batch, *heads, "i", "e"])
    params, statements = _scores(o, n, keys)
    params += [f"V[{keys},j,e]", "scale"]
    params += ["offset"] if o.offset else []
    params += [f"slope[{h}]"] if o.alibi else []
    score, seen = _score(o, n, h)
    for number, (kind, wide) in enumerate(o.extras):
        access, param = _extra(number, kind, wide, [*batch, *heads, "i", "j"])
        params.append(param)
        if kind == "bias":
            score += f" + {access}"
        else:
            seen.append(access if kind == "keep" else f"(not {access})")
    params += [f"D[{n},i,j]"] if o.dropout else []
    score = f"where({' and '.join(seen)}, {score}, -inf)" if seen else score
    statements.append(f"T[{n},i,j] = {score}")
    statements += _weighted(o, n, keys, out, empty=bool(o.extras) or (o.offset and bool(seen)))
    outputs = f"O[{out}]"
    if o.weights:
        all_heads = ",".join(f"{name}2" for name in heads)
        place = ",".join([*batch, "i", "j"])
        each = f"P[{','.join([*batch, all_heads])},i,j]"
        statements.append(f"A[{place}] = mean[{all_heads}]({each})" if o.weights == "mean" else f"A[{n},i,j] = P[{n},i,j]")
        outputs += f", A[{place if o.weights == 'mean' else n + ',i,j'}]"
    return Ranked("\n    ".join([f"def attention({', '.join(params)}) -> {outputs}:", *statements]) + "\n")


def _scores(o: Options, n: str, keys: str) -> tuple[list[str], list[str]]:
    """Queries and keys among the parameters, and the statements of their products."""
    if not o.rotary:
        return [f"Q[{n},i,d]", f"K[{keys},j,d]"], [f"S[{n},i,j] += Q[{n},i,d] * K[{keys},j,d]"]
    one, two = ("0,d", "1,d") if o.rotary == "halves" else ("d,0", "d,1")
    pair = "r,d" if o.rotary == "halves" else "d,r"
    statements = [
        f"{x}{part}[{at},d] = {x}[{at},{kept}] * cos{x}[{place},d] {sign} {x}[{at},{other}] * sin{x}[{place},d]"
        for x, at, place in (("Q", f"{n},i", "i"), ("K", f"{keys},j", "j"))
        for part, kept, sign, other in ((1, one, "-", two), (2, two, "+", one))
    ]
    statements.append(f"S[{n},i,j] += Q1[{n},i,d] * K1[{keys},j,d] + Q2[{n},i,d] * K2[{keys},j,d]")
    return [f"Q[{n},i,{pair}]", f"K[{keys},j,{pair}]", "cosQ[i,d]", "sinQ[i,d]", "cosK[j,d]", "sinK[j,d]"], statements


def _score(o: Options, n: str, h: str) -> tuple[str, list[str]]:
    """The score of query i and key j, and the conditions under which it counts."""
    at = "i + offset" if o.offset else "i"
    score = f"scale * S[{n},i,j]"
    if o.soft_cap is not None:
        score = f"{o.soft_cap!r} * tanh({score} / {o.soft_cap!r})"
    if o.alibi:
        distance = f"({at} - j)" if o.causal else f"abs({at} - j)"
        score += f" - slope[{h}] * {distance}"
    seen = [f"(j <= {at})"] if o.causal else []
    if o.window is not None:
        seen.append(f"({at} - j < {o.window})")
        seen += [] if o.causal else [f"(j - ({at}) < {o.window})"]
    return score, seen


def _extra(number: int, kind: str, wide: tuple[bool, ...], names: list[str]) -> tuple[str, str]:
    """The access of a mask or bias, and its parameter; a size of 1 is read at 0."""
    tensor = f"{'B' if kind == 'bias' else 'M'}{number}"
    last = names[len(names) - len(wide) :] if wide else []
    subscripts = ",".join(name if w else "0" for name, w in zip(last, wide, strict=True))
    sizes = ",".join(name if w else f"one{number}_{k}" for k, (name, w) in enumerate(zip(last, wide, strict=True)))
    return (f"{tensor}[{subscripts}]", f"{tensor}[{sizes}]") if wide else (tensor, tensor)


def _weighted(o: Options, n: str, keys: str, out: str, *, empty: bool) -> list[str]:
    """From scores T to the output O. empty: whether a row may see nothing."""
    drop = f" * D[{n},i,j]" if o.dropout else ""
    if not empty:
        return [f"P[{n},i,j] = softmax[j](T[{n},i,j]){drop}", f"O[{out}] += P[{n},i,j] * V[{keys},j,e]"]
    statements = [
        f"M[{n},i] max= stop_gradient(T[{n},i,j])",
        f"E[{n},i,j] = exp(T[{n},i,j] - where(M[{n},i] == -inf, 0, M[{n},i]))",
        f"L[{n},i] += E[{n},i,j]",
        f"U[{n},i,e] += E[{n},i,j]{drop} * V[{keys},j,e]",
        f"O[{out}] = U[{n},i,e] / where(L[{n},i] == 0, 1, L[{n},i])",
    ]
    if o.weights:
        statements.append(f"P[{n},i,j] = E[{n},i,j] / where(L[{n},i] == 0, 1, L[{n},i]){drop}")
    return statements
