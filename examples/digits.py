"""A classifier of handwritten digits whose layers are written in index notation.

    python examples/digits.py               train to >= 96 % on held-out digits, on the GPU if there is one
    python examples/digits.py --quick       the same in a few epochs, for tests

Shows the notation of a layer, its gradient by the swap rule, the plan and a generated Triton kernel; checks loss and gradients against
the same model in plain torch; trains with torch's own optimizer. Exit status 1 if a check fails.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.syntax import Syntax
from torch import Tensor, nn

import tdsl

# ---------------------------------------------------------------------------------------------------------------------
# The layers

linear = tdsl.function("""
def linear(X[n,i], W[o,i], b[o]) -> Y[n,o]:
    Z[n,o] += X[n,i] * W[o,i]
    Y[n,o]  = Z[n,o] + b[o]
""")

linear_gelu = tdsl.function("""
def linear_gelu(X[n,i], W[o,i], b[o]) -> Y[n,o]:
    Z[n,o] += X[n,i] * W[o,i]
    Y[n,o]  = gelu(Z[n,o] + b[o])
""")

layer_norm = tdsl.function("""
def layer_norm(X[n,c], g[c], b[c]) -> Y[n,c]:
    m[n]   = mean[c](X[n,c])
    v[n]   = var[c](X[n,c])
    Y[n,c] = (X[n,c] - m[n]) * rsqrt(v[n] + 1e-5) * g[c] + b[c]
""")

cross_entropy = tdsl.function("""
def cross_entropy(Z[n,c], label[n]) -> loss:
    loss = mean[n](logsumexp[c](Z[n,c]) - sum[c](where(c == label[n], Z[n,c], 0)))
""")


class Classifier(nn.Module):
    """64 pixels -> hidden -> 10 logits. `plain` runs the same parameters through torch's own functions."""

    def __init__(self, hidden: int = 128) -> None:
        super().__init__()
        self.first = nn.Linear(64, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.second = nn.Linear(hidden, hidden)
        self.last = nn.Linear(hidden, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [n, 10] of images [n, 64]."""
        x = linear_gelu(images, self.first.weight, self.first.bias)
        x = layer_norm(x, self.norm.weight, self.norm.bias)
        x = linear_gelu(x, self.second.weight, self.second.bias)
        logits: Tensor = linear(x, self.last.weight, self.last.bias)
        return logits

    def plain(self, images: Tensor) -> Tensor:
        """The same logits by plain torch."""
        x = self.norm(F.gelu(self.first(images)))
        logits: Tensor = self.last(F.gelu(self.second(x)))
        return logits


# ---------------------------------------------------------------------------------------------------------------------


def digits(device: str) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The 1797 digits of 8x8 pixels that scikit-learn ships: (images, labels) to train on, and a held-out quarter."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    split = train_test_split(data.data, data.target, test_size=0.25, stratify=data.target, random_state=0)
    images, held_images = (torch.tensor(part, dtype=torch.float32, device=device) / 16 for part in split[:2])
    labels, held_labels = (torch.tensor(part, dtype=torch.int64, device=device) for part in split[2:])
    return (images, labels), (held_images, held_labels)


def show(console: Console) -> None:
    """The stages of one layer: notation, gradient, plan, and the kernel that a GPU gets."""
    shapes = ("fp32[64,64]", "fp32[128,64]", "fp32[128]")

    def panel(title: str, text: str, lexer: str = "python") -> None:
        syntax = Syntax(text.strip(), lexer, theme="ansi_dark", background_color="default", word_wrap=True)
        console.print(Panel(syntax, title=title, title_align="left"))

    panel("the notation", linear_gelu.emit("program"))
    panel("its gradient, by swapping names", linear_gelu.emit("gradient"))
    panel("the plan: what runs, reads and writes", str(linear_gelu.plan(*shapes)), "text")
    panel("the kernel that a GPU gets", linear_gelu.emit("triton", *shapes, target="cuda:90"))


def check(model: Classifier, images: Tensor, labels: Tensor, tolerance: float = 1e-4) -> list[str]:
    """What differs from plain torch by more than `tolerance`, as a share of the largest value; nothing, if all is well."""
    found = {}
    for name, logits, loss in (("tdsl", model.forward, cross_entropy), ("torch", model.plain, F.cross_entropy)):
        model.zero_grad()
        value = loss(logits(images), labels)
        value.backward()
        found[name] = {"loss": value.detach(), **{k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}}
    wrong = []
    for key, expected in found["torch"].items():
        actual = found["tdsl"].get(key)
        if actual is None:
            wrong.append(f"{key} has no gradient")
        elif not (error := ((actual - expected).abs().max() / expected.abs().max()).item()) <= tolerance:
            wrong.append(f"{key} is off by {error:.1e}")
    model.zero_grad()
    return wrong


def train(model: Classifier, images: Tensor, labels: Tensor, epochs: int, batch: int, console: Console) -> None:
    """AdamW with a cosine schedule, over shuffled batches."""
    steps = epochs * -(-len(images) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    columns = (TextColumn("training"), BarColumn(), TextColumn("loss {task.fields[loss]:.4f}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("training", total=steps, loss=float("nan"))
        for _ in range(epochs):
            for chosen in torch.randperm(len(images), device=images.device).split(batch):
                loss = cross_entropy(model(images[chosen]), labels[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                progress.advance(bar)
            progress.update(bar, loss=loss.item())


def main(arguments: list[str] | None = None) -> int:
    """Runs the example; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a few epochs and a lower bar, for tests")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    epochs, bar = (6, 0.90) if options.quick else (40, 0.96)

    console = Console(width=None if sys.stdout.isatty() else 150)
    torch.manual_seed(0)
    if options.device == "cpu":
        torch.set_num_threads(1)  # layers this small gain nothing from more, and lose much where the cores are busy
    started = time.perf_counter()
    show(console)
    (images, labels), (held_images, held_labels) = digits(options.device)
    model = Classifier().to(options.device)
    wrong = check(model, images[:256], labels[:256])
    train(model, images, labels, epochs, batch=64, console=console)
    wrong += check(model, images[:256], labels[:256], tolerance=1e-3)  # the loss is near zero now: little is left of its digits
    with torch.no_grad():
        accuracy = (model(held_images).argmax(1) == held_labels).float().mean().item()
    seconds = time.perf_counter() - started

    console.print(f"held-out accuracy {accuracy:.2%} of {len(held_labels)} digits, {seconds:.1f} s on {options.device}", highlight=False)
    if wrong:
        console.print(f"[red]differs from plain torch: {'; '.join(wrong)}[/red]", highlight=False)
    else:
        console.print("loss and gradients agree with plain torch, before and after training", highlight=False)
    if accuracy < bar:
        console.print(f"[red]expected at least {bar:.0%}[/red]", highlight=False)
    return int(bool(wrong) or accuracy < bar)


if __name__ == "__main__":
    sys.exit(main())
