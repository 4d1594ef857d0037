"""Writes the model card of `penstock-tiny`: figures, loss curve and samples, all measured anew.

Owns the card's wording and the plot. Reads the folder as a user would, from disk and in bfloat16;
`train_tiny.py` calls it once the weights are written.
"""

from __future__ import annotations

import gzip
import itertools
import json
import lzma
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny_corpus import Corpus
from tiny_tokenizer import ASSISTANT, END, USER
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = (
    "def add(a, b):\n",
    "def __init__(self, name, value=None):\n",
    "def read_lines(path):\n",
    'def is_empty(self):\n    """Return True if the queue is empty."""\n',
    "def main():\n",
)
CHATS = (
    "Complete this Python function:\n```python\ndef get_name(self):\n```",
    "What does `os.path.join` do?",
    "Hello!",
)
CURVE_POINTS_MAX = 160
WIDTH, HEIGHT, MARGIN = 560, 260, 40


@dataclass(frozen=True)
class Run:
    """What the card states about the training run."""

    command: str
    minutes: float
    steps: int
    tokens: int
    curve: list[dict[str, float]]
    bits_per_byte: float


def write_card(run: Run, corpus: Corpus, output: Path) -> None:
    """Write `README.md`, `loss.json` and `loss.svg` next to the weights in `output`."""
    stride = -(-len(run.curve) // CURVE_POINTS_MAX) or 1
    # Points with a held-out figure are few and are all kept.
    curve = [p for i, p in enumerate(run.curve) if i % stride == 0 or len(p) > 4]
    rows = ",\n".join(json.dumps(point) for point in curve)
    (output / "loss.json").write_text(f"[\n{rows}\n]\n")
    (output / "loss.svg").write_text(_plot(curve))
    facts = _facts(run, corpus) | {"samples": _samples(output)}
    card = (Path(__file__).parent / "tiny_card.md").read_text()
    for name, value in facts.items():
        card = card.replace("{" + name + "}", value)
    (output / "README.md").write_text(card)


def _facts(run: Run, corpus: Corpus) -> dict[str, str]:
    train = "".join(module.text for module in corpus.train).encode()
    held_out = "".join(module.text for module in corpus.held_out).encode()
    primed = _xz_bytes(train + held_out) - _xz_bytes(train)
    return {
        "command": run.command,
        "minutes": f"{run.minutes:.0f}",
        "steps": f"{run.steps}",
        "tokens": f"{run.tokens / 1e6:.1f}",
        "python": platform.python_version(),
        "torch": torch.__version__.split("+")[0],
        "train_files": str(len(corpus.train)),
        "train_bytes": f"{len(train) / 1e6:.2f}",
        "held_out_files": str(len(corpus.held_out)),
        "held_out_bytes": f"{len(held_out) / 1e6:.2f}",
        "held_out_names": ", ".join(f"`{module.name}`" for module in corpus.held_out),
        "model_bits": f"{run.bits_per_byte:.3f}",
        "gzip_bits": f"{8 * len(gzip.compress(held_out, 9)) / len(held_out):.3f}",
        "xz_bits": f"{8 * _xz_bytes(held_out) / len(held_out):.3f}",
        "primed_bits": f"{8 * primed / len(held_out):.3f}",
        "last_loss": f"{run.curve[-1]['loss']:.2f}",
    }


def _xz_bytes(text: bytes) -> int:
    return len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))


def _samples(folder: Path) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    chats = [f"{USER}\n{question}{END}\n{ASSISTANT}\n" for question in CHATS]
    prompts = [*PROMPTS, *chats]
    return "\n\n".join(_fence(p + _complete(model, tokenizer, p)) for p in prompts)


def _complete(model: Any, tokenizer: Any, prompt: str) -> str:  # noqa: ANN401
    ids = tokenizer(prompt, return_tensors="pt")
    out = model.generate(ids.input_ids, attention_mask=ids.attention_mask, max_new_tokens=80)
    return str(tokenizer.decode(out[0, ids.input_ids.shape[1] :]))


def _fence(text: str) -> str:
    return f"~~~text\n{text.rstrip()}\n~~~"


def _plot(curve: list[dict[str, float]]) -> str:
    """Draw the loss over the minutes as a small SVG."""
    minutes_max = curve[-1]["minutes"]
    losses = [point["loss"] for point in curve]
    low, high = min(losses), max(losses)

    def place(minutes: float, loss: float) -> tuple[float, float]:
        x = MARGIN + (WIDTH - 2 * MARGIN) * minutes / minutes_max
        y = HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * (loss - low) / (high - low)
        return round(x, 1), round(y, 1)

    points = " ".join("{},{}".format(*place(p["minutes"], p["loss"])) for p in curve)
    labels = [(0.0, f"{high:.1f}", high), (0.0, f"{low:.1f}", low)]
    texts = [
        f'<text x="4" y="{place(minutes, loss)[1] + 4}">{label}</text>'
        for minutes, label, loss in labels
    ]
    texts.append(f'<text x="{WIDTH - MARGIN - 24}" y="{HEIGHT - 12}">{minutes_max:.0f} min</text>')
    texts.append(f'<text x="{MARGIN}" y="{HEIGHT - 12}">loss, nats a token</text>')
    # The steps in the curve are the changes of the window.
    for before, after in itertools.pairwise(curve):
        if after["window"] != before["window"]:
            x = place(after["minutes"], low)[0]
            line = f'x1="{x}" x2="{x}" y1="{MARGIN}" y2="{HEIGHT - MARGIN}"'
            texts.append(f'<line {line} stroke="#bbb"/>')
            texts.append(f'<text x="{x + 3}" y="{MARGIN}">window {after["window"]}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>{"".join(texts)}'
        f'<polyline points="{points}" fill="none" stroke="#1668b8" stroke-width="1.5"/></svg>\n'
    )
