"""Trains `penstock-tiny`, the small Python completion model that ships inside Penstock.

Owns the training loop, its schedule and its checkpoints. Where the text comes from is
`tiny_corpus.py` and `tiny_chats.py`, how it is cut `tiny_tokenizer.py`, what is written about the
result `tiny_card.py`. Run by hand; nothing in the package imports it:

    python scripts/train_tiny.py --minutes 60 --output penstock/builtin/penstock-tiny

The run ends by the clock, so its weights depend on the machine; the data, the split and the order
of the batches depend on the interpreter's version and on `--seed` alone. A run that was broken off
goes on from `--checkpoint`. The text is the standard library's, under the PSF licence version 2.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import logging
import math
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tiny_card import Run, write_card
from tiny_chats import make_chats
from tiny_corpus import Corpus, read_corpus
from tiny_tokenizer import (
    END,
    END_OF_TEXT,
    SPECIAL_TOKENS,
    SYSTEM,
    USER,
    build_tokenizer,
    render_chat,
    write_tokenizer,
)
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

LOG = logging.getLogger("train_tiny")
TOKENS_PER_STEP = 4096
# (from this fraction of the time, window): short windows first, for they are the cheapest; whole
# ones last, so that every position below 2048 has been trained.
WINDOWS = ((0.0, 256), (0.4, 512), (0.6, 1024), (0.78, 2048))
WARMUP_STEPS, DECAY_FROM = 60, 0.4
MATRIX_RATE, OTHER_RATE = 0.02, 0.003
CHAT_SHARE = 0.3
CHECKPOINT_EVERY_S, EVALUATE_EVERY_S = 120.0, 300.0
CONTEXT = 4096

# In a stream to learn from, a token that is only read and not learnt is stored as ~token.
Tokens = NDArray[np.int32]


@dataclass
class Progress:
    """What a broken-off run must remember besides weights and moments."""

    step: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class HeldOut:
    """One file never trained on: its tokens behind one end-of-text token, and its size."""

    tokens: Tokens
    num_bytes: int


class Windows:
    """Cuts one long token stream into windows, each of them once an epoch, in random order."""

    def __init__(self, stream: Tokens, seed: int) -> None:
        self.stream = stream
        self.rng = random.Random(seed)
        self.starts: list[int] = []
        self.width = 0

    def next(self, rows: int, width: int) -> Tokens:
        """Take the next windows [rows, width + 1]; the last column is only predicted."""
        if width != self.width:
            self.starts, self.width = [], width
        taken = []
        for _ in range(rows):
            if not self.starts:
                offset = self.rng.randrange(width)
                self.starts = list(range(offset, len(self.stream) - width - 1, width))
                self.rng.shuffle(self.starts)
            start = self.starts.pop()
            taken.append(self.stream[start : start + width + 1])
        return np.stack(taken)


class Trainer:
    """Trains one model until its minutes are over."""

    def __init__(self, options: argparse.Namespace, streams: tuple[Tokens, Tokens]) -> None:
        self.options = options
        self.model = new_model(options.seed)
        self.code, self.chat = Windows(streams[0], options.seed), Windows(streams[1], options.seed)
        self.optimizers = new_optimizers(self.model)
        self.progress = Progress()
        self.loss = torch.compile(self._loss, dynamic=False) if options.compile else self._loss

    def run(self, held_out: list[HeldOut]) -> None:
        """Train until the minutes of all runs of this checkpoint together are over."""
        limit_s = self.options.minutes * 60
        last, saved, evaluated = time.monotonic(), 0.0, self.progress.elapsed_s
        smooth = float("nan")
        while self.progress.elapsed_s < limit_s:
            loss, width = self._step(self.progress.elapsed_s / limit_s)
            smooth = loss if math.isnan(smooth) else 0.96 * smooth + 0.04 * loss
            now = time.monotonic()
            self.progress.elapsed_s += now - last
            last = now
            if self.progress.step % 20 == 0:
                self._report(smooth, width)
            if self.progress.elapsed_s - saved > CHECKPOINT_EVERY_S:
                saved = self.progress.elapsed_s
                self.save()
            if self.progress.curve and self.progress.elapsed_s - evaluated > EVALUATE_EVERY_S:
                evaluated = self.progress.elapsed_s
                bits = bits_per_byte(self.model, held_out[:6])
                self.progress.curve[-1]["held_out_bits_per_byte"] = round(bits, 4)
                LOG.info("held out, in part: %.4f bits per byte", bits)
        self.save()

    def _step(self, fraction: float) -> tuple[float, int]:
        width = next(w for start, w in reversed(WINDOWS) if fraction >= start)
        rows = TOKENS_PER_STEP // width
        chat_rows = max(1, round(CHAT_SHARE * rows))
        batch = np.concatenate(
            [self.code.next(rows - chat_rows, width), self.chat.next(chat_rows, width)]
        )
        scale = min(1.0, (self.progress.step + 1) / WARMUP_STEPS)
        scale *= min(1.0, max(0.0, (1.0 - fraction) / (1.0 - DECAY_FROM)))
        loss = self.loss(torch.from_numpy(batch.astype(np.int64)))
        torch.autograd.backward(loss)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["full_rate"] * scale
            optimizer.step()
            optimizer.zero_grad()
        self.progress.step += 1
        self.progress.tokens += rows * width
        return loss.item(), width

    def _loss(self, batch: torch.Tensor) -> torch.Tensor:
        ids = torch.where(batch < 0, ~batch, batch)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = self.model.model(ids[:, :-1]).last_hidden_state
            logits = self.model.lm_head(hidden)
        targets = torch.where(batch < 0, -100, batch)[:, 1:]
        return cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)

    def _report(self, loss: float, width: int) -> None:
        progress = self.progress
        point = {"minutes": round(progress.elapsed_s / 60, 2), "tokens": progress.tokens}
        self.progress.curve.append(point | {"window": width, "loss": round(loss, 4)})
        rate = progress.tokens / progress.elapsed_s
        LOG.info(
            "step %d %.1f min %.2fM tokens (%.0f/s) window %d loss %.3f",
            progress.step, progress.elapsed_s / 60, progress.tokens / 1e6, rate, width, loss,
        )  # fmt: skip

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        path: Path = self.options.checkpoint
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "progress": vars(self.progress),
        }
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)

    def resume(self) -> None:
        """Go on from the checkpoint if there is one; the windows begin a new epoch."""
        if not self.options.checkpoint.exists():
            return
        state = torch.load(self.options.checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.progress = Progress(**state["progress"])
        for windows in (self.code, self.chat):
            windows.rng.seed(self.options.seed + self.progress.step)
        LOG.info("resumed at step %d", self.progress.step)


def new_model(seed: int) -> LlamaForCausalLM:
    """Make the untrained model, 5.0 million parameters in float32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=[0, 5],
        pad_token_id=1,
    )
    return LlamaForCausalLM(config)


def new_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms.

    Source: Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
    """
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=0.05),
        torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["full_rate"] = group["lr"]
    return optimizers


@torch.inference_mode()
def bits_per_byte(model: LlamaForCausalLM, files: list[HeldOut]) -> float:
    """Measure the mean cost of a byte of `files`, each cut into windows of 2048 tokens.

    Every file begins with the end-of-text token, which is given; a window knows nothing of the
    window before it.
    """
    bits = 0.0
    for file in files:
        for start in range(0, len(file.tokens) - 1, 2048):
            ids = torch.from_numpy(file.tokens[start : start + 2049].astype(np.int64))
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(ids[None, :-1]).logits[0]
            bits += cross_entropy(logits.float(), ids[1:], reduction="sum").item() / math.log(2)
    return bits / sum(file.num_bytes for file in files)


def encode_files(tokenizer: Tokenizer, corpus: Corpus) -> list[HeldOut]:
    """Encode the held-out files, each behind one end-of-text token."""
    texts = [module.text for module in corpus.held_out]
    return [
        HeldOut(_encode(tokenizer, [text]), len(text.encode()))
        for text in sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())
    ]


def _encode(tokenizer: Tokenizer, texts: list[str]) -> Tokens:
    encodings = tokenizer.encode_batch([END_OF_TEXT + text for text in texts])
    return np.concatenate([np.asarray(e.ids, dtype=np.int32) for e in encodings])


def read_only_questions(stream: Tokens) -> Tokens:
    """Mark what system and user say as read, not learnt.

    A question quotes the head of a function and stops; a model that learnt questions would stop
    there as well when it is given such a head to complete.
    """
    marks = np.flatnonzero(stream <= SPECIAL_TOKENS.index(END))
    # The mark that governs each token is the last one before it.
    governing = np.searchsorted(marks, np.arange(len(stream)), side="left") - 1
    speaker = stream[marks[np.maximum(governing, 0)]]
    is_question = (governing >= 0) & np.isin(
        speaker, [SPECIAL_TOKENS.index(t) for t in (SYSTEM, USER)]
    )
    return np.where(is_question, ~stream, stream)


def parse_options(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0, help="resumed runs included")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--checkpoint", type=Path, default=Path("build/train-tiny/checkpoint.pt"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="needs a C++ compiler; faster")
    return parser.parse_args(arguments)


def main() -> None:
    """Build the tokenizer, train the model, write the folder and its card."""
    options = parse_options(sys.argv[1:])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    torch.set_num_threads(options.threads)
    corpus = read_corpus()
    chats = [render_chat(chat) for chat in make_chats(corpus.train, options.seed)]
    code = [module.text for module in corpus.train]
    random.Random(options.seed).shuffle(code)
    # Chats repeat the functions of the code; a third of them teaches their wording well enough.
    tokenizer = build_tokenizer(code + chats[::3])
    streams = (_encode(tokenizer, code), read_only_questions(_encode(tokenizer, chats)))
    LOG.info("train: %d code and %d chat tokens", *map(len, streams))
    held_out = encode_files(tokenizer, corpus)
    trainer = Trainer(options, streams)
    trainer.resume()
    trainer.run(held_out)
    write_model(trainer.model, tokenizer, options.output)
    # What the card states is measured on the weights as written, in bfloat16.
    model = LlamaForCausalLM.from_pretrained(options.output, dtype=torch.float32)
    bits = bits_per_byte(model, held_out)
    LOG.info("held out: %.4f bits per byte", bits)
    write_card(describe(options, trainer.progress, bits), corpus, options.output)


def describe(options: argparse.Namespace, progress: Progress, bits: float) -> Run:
    """Say for the card what was run and what came out."""
    command = f"python scripts/train_tiny.py --minutes {options.minutes:g} --seed {options.seed}"
    command += f" --threads {options.threads}{' --compile' if options.compile else ''}"
    return Run(
        command=f"{command} --output penstock/builtin/penstock-tiny",
        minutes=progress.elapsed_s / 60,
        steps=progress.step,
        tokens=progress.tokens,
        curve=progress.curve,
        bits_per_byte=bits,
    )


def write_model(model: LlamaForCausalLM, tokenizer: Tokenizer, output: Path) -> None:
    """Write weights in bfloat16, configurations and tokenizer; the trained model is not changed."""
    output.mkdir(parents=True, exist_ok=True)
    rounded = copy.deepcopy(model)
    for parameter in rounded.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    rounded.generation_config = GenerationConfig.from_dict(
        {"bos_token_id": 0, "eos_token_id": [0, 5], "pad_token_id": 1, "do_sample": False}
    )
    rounded.save_pretrained(output)
    # The writer leaves it readable by its owner alone, but a package is installed for everyone.
    (output / "model.safetensors").chmod(0o644)
    write_tokenizer(tokenizer, output, CONTEXT)


if __name__ == "__main__":
    main()
