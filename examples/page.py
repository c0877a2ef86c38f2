"""The generated pages beside the examples: transformer.md and errors.md.

    python -m examples.page                 write them again
    python -m examples.page --check         exit status 1 if they are not what would be written
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples import mistakes, transformer
from lowering.plan import Plan
from tdsl.function import Function
from tdsl.lowered import Lowered, lowered
from tdsl.page import Table, quantity

TARGET = "cuda:90"


@dataclass(frozen=True)
class Layer:
    """A layer of the page: what it does, the arguments of a real problem, and the kernel to show (forward, or of the backward)."""

    function: Function
    words: str
    args: tuple[Any, ...]
    shown: str


_ROWS = "bf16[1,4096,1024]"
_HEADS = "bf16[1,16,4096,64]"

LAYERS = (
    Layer(
        transformer.embed,
        "A gather. Its gradient adds what arrives to the rows that were read: a scatter.",
        ("i64[1,4096]", "bf16[32000,1024]"),
        "embed_bwd_0",
    ),
    Layer(
        transformer.rms_norm,
        "Two statements, one kernel that reads its input once. The gradient of `g` sums over all rows: by partial sums, without atomics.",
        (_ROWS, "bf16[1024]"),
        "rms_norm_0",
    ),
    Layer(
        transformer.to_heads,
        "A contraction that writes the heads apart, so that nothing has to be transposed.",
        (_ROWS, "bf16[16,64,1024]"),
        "to_heads_0",
    ),
    Layer(
        transformer.attention,
        "Causal attention whose scores fall off with distance. No scores of 4096 x 4096 are in memory, neither forward nor backward,"
        " and tiles that the mask leaves empty are not visited.",
        (_HEADS, _HEADS, _HEADS, "fp32[16]", 0.125),
        "attention_0",
    ),
    Layer(
        transformer.from_heads,
        "The heads come together again, and the residual is added where the sum is stored.",
        (_HEADS, "bf16[1024,16,64]", _ROWS),
        "from_heads_0",
    ),
    Layer(
        transformer.gated,
        "Two contractions of one input and the gate between them, in one kernel.",
        (_ROWS, "bf16[3072,1024]", "bf16[3072,1024]"),
        "gated_0",
    ),
    Layer(
        transformer.linear,
        "The MLP's way back, with its residual.",
        ("bf16[1,4096,3072]", "bf16[1024,3072]", _ROWS),
        "linear_0",
    ),
    Layer(
        transformer.cross_entropy,
        "The last linear layer and the loss in one function. No logits of 4096 x 32000 are in memory, neither forward nor backward.",
        (_ROWS, "bf16[32000,1024]", "i64[1,4096]"),
        "cross_entropy_0",
    ),
)

_INTRODUCTION = f"""# A transformer, layer by layer

<!-- Made by `python -m examples.page`; tests/test_transformer.py keeps it true. -->

The layers of [transformer.py](transformer.py), each with its statements, the gradient that the swap rule gives, the kernels that the compiler
makes of a real problem on an H100 (`{TARGET}`; no GPU is needed to make this page), and one of these kernels as it is generated. The times
are predictions of the roofline, not measurements; `compulsory` are the bytes of every input read once and every output written once."""


def transformer_page() -> str:
    """transformer.md: for each layer notation, gradient, plan and a kernel."""
    return "\n\n".join([_INTRODUCTION, *(_layer(layer) for layer in LAYERS)]) + "\n"


def _layer(layer: Layer) -> str:
    f = layer.function
    parts = lowered(f, layer.args, TARGET, gradient=True)
    call = ", ".join(f"{name}: {arg}" for name, arg in zip(f.program.inputs, layer.args, strict=True))
    forward, backward = parts[-2], parts[-1]
    return "\n\n".join(
        [
            f"## {f.program.name}",
            layer.words,
            _code(f.emit("program")),
            "Its gradient, by swapping names:",
            _code(f.emit("gradient")),
            f"The plan for {call}:",
            *(_plan(part) for part in (forward, backward)),
            f"`{layer.shown}`:",
            _code(_source(layer.shown, parts)),
        ]
    )


def _plan(part: Lowered) -> str:
    from tdsl.explain import predictions

    plan = part.state.plan
    assert plan is not None
    rows = [
        (k.name, ", ".join(k.reads) or "-", ", ".join(k.writes), quantity(p.flops), quantity(p.bytes, "B"), quantity(p.compulsory_bytes, "B"),
         quantity(p.seconds, "s"), p.bound)
        for k, p in zip(plan.kernels, predictions(part.state), strict=True)
    ]  # fmt: skip
    head = ("kernel", "reads", "writes", "FLOPs", "bytes", "compulsory", "predicted", "bound")
    return f"```text\n{part.title}\n\n{Table(head, tuple(rows))}\n\nin memory between kernels: {_memory(plan)}\n```"


def _memory(plan: Plan) -> str:
    return ", ".join(f"{name} ({quantity(size, 'B')})" for name, size in plan.memory.items()) or "nothing"


def _source(kernel: str, parts: Sequence[Lowered]) -> str:
    """The text of a kernel, of the last part that has it: with a gradient the forward that also saves what the backward reads."""
    sources = {step.source.name: step.source.source for part in parts for step in part.state.steps if step.source is not None}
    return sources[kernel]


def _code(text: str) -> str:
    return f"```python\n{text.strip()}\n```"


PAGES: dict[str, Callable[[], str]] = {"transformer.md": transformer_page, "errors.md": mistakes.page}


def main(arguments: list[str] | None = None) -> int:
    """Writes or checks the pages; the exit status."""
    parser = argparse.ArgumentParser(description="The generated pages beside the examples.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a page is not true any more")
    options = parser.parse_args(arguments)
    wrong = 0
    for name, page in PAGES.items():
        path = Path(__file__).with_name(name)
        text = page()
        same = path.exists() and path.read_text() == text
        if options.check:
            wrong += not same
            print(f"{name}: {'true' if same else 'not what would be written'}")
        else:
            path.write_text(text)
            print(f"{name}: {'as it was' if same else 'written'}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
