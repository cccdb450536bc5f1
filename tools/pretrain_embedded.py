"""Pretrain an embedded target: a small Llama on the Python standard library's sources.

    python tools/pretrain_embedded.py OUT --minutes 62
    python tools/pretrain_embedded.py OUT2 --minutes 8 --init OUT --context 1024 --batch 4 --lr 5e-4

The second run teaches longer positions. Each writes a Hugging Face checkpoint (config.json, model.safetensors in
bfloat16, tokenizer.json), held_out.txt and log.json. Where glibc allocates, MALLOC_MMAP_THRESHOLD_=1073741824
MALLOC_TRIM_THRESHOLD_=1073741824 in the environment makes it several times faster.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path

import torch
from pretraining import (
    Recipe,
    Weights,
    encode,
    halved,
    loss,
    new_weights,
    rotary,
    save,
    train,
    train_tokenizer,
)
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.pre_tokenizers import PreTokenizer
from torch import Tensor

from specrl.core.clock import Clock, WallClock
from specrl.models.config import TargetArchitecture
from specrl.models.rope import RopeConfig
from specrl.workloads.stdlib import library_files, library_root

VOCAB, WIDTH, LAYERS, HEADS, KV_HEADS, MLP, THETA, EPS = 512, 192, 16, 6, 2, 512, 10000.0, 1e-6
HEAD = WIDTH // HEADS
POSITIONS = 1024
ROPE = RopeConfig(THETA)
CONFIG = TargetArchitecture("llama", VOCAB, WIDTH, MLP, LAYERS, HEADS, KV_HEADS, HEAD, EPS, ROPE, POSITIONS)


def corpus() -> tuple[list[str], list[str], list[str]]:
    """Texts to train on, texts held out (a twentieth of the files), and the names of the latter."""
    root = library_root()
    files = library_files(root)
    random.Random(0).shuffle(files)
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in files]
    held_out = len(texts) // 20
    return texts[held_out:], texts[:held_out], [path.relative_to(root).as_posix() for path in files[:held_out]]


def code_words() -> PreTokenizer:
    """Words, single digits, and newlines with the indentation that follows."""
    words = Regex(r"\n *| ?[A-Za-z]+|[0-9]| +|[^\sA-Za-z0-9]+|\s+")
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def pretrain(out: Path, recipe: Recipe, clock: Clock, init: Path | None = None) -> None:
    """Make the checkpoint in `out`: the better of the weights and their average, at every report anew.

    Args:
        out: directory to write to.
        recipe: how to train.
        clock: that the time budget is counted on.
        init: checkpoint to continue from; None: new weights and a new tokenizer.

    Raises:
        ValueError: `context` is longer than the positions the checkpoint declares.
    """
    if not 1 <= recipe.context <= POSITIONS:
        raise ValueError(f"context must be in [1, {POSITIONS}], but got {recipe.context}")
    out.mkdir(parents=True, exist_ok=True)
    train_texts, held_out_texts, held_out_files = corpus()
    (out / "held_out.txt").write_text("\n".join(held_out_files) + "\n")
    if init is None:
        tokenizer, first = train_tokenizer(train_texts, VOCAB, code_words()), new_weights(CONFIG)
    else:
        tokenizer, first = Tokenizer.from_file(str(init / "tokenizer.json")), load_file(init / "model.safetensors")
    text, held_out = encode(tokenizer, train_texts), encode(tokenizer, held_out_texts)
    bytes_per_token = sum(len(t.encode()) for t in held_out_texts) / len(held_out)
    print(f"{len(text)} training tokens, {bytes_per_token:.2f} bytes per token", flush=True)

    cos, sin = rotary(recipe.context, CONFIG)
    compiled = torch.compile(loss)

    def loss_of(weights: Weights, ids: Tensor) -> Tensor:
        found: Tensor = compiled(halved(weights), ids, cos, sin, CONFIG)
        return found

    last = len(held_out) - recipe.context - 1
    windows = torch.stack([held_out[i : i + recipe.context + 1] for i in range(0, last, last // 64)][:64])

    @torch.no_grad()
    def evaluate(weights: Weights) -> float:
        return float(torch.stack([loss_of(weights, part) for part in windows.split(16)]).mean())

    master = {name: weight.float() for name, weight in first.items()}
    average = {name: weight.clone() for name, weight in master.items()}  # exponentially moving
    history: list[dict[str, float]] = []
    due_s = 60.0  # when the next report is: after a minute, every five, and at the end

    def after(step: int, seconds: float, found: Tensor) -> None:
        nonlocal due_s
        for name, weight in master.items():
            average[name].lerp_(weight.detach(), 0.01 if step > 101 else 1.0)
        if seconds <= due_s and seconds < recipe.seconds:
            return
        due_s = seconds + 300.0
        now, smooth = evaluate(master), evaluate(average)
        row = {
            "minutes": round(seconds / 60, 1),
            "step": step,
            "tokens": step * recipe.batch * recipe.context,
            "train": round(found.item(), 3),
            "held_out": round(now, 4),
            "held_out_average": round(smooth, 4),
            "bits_per_byte": round(min(now, smooth) / math.log(2) / bytes_per_token, 4),
        }
        history.append(row)
        print(json.dumps(row), flush=True)
        save(out, master if now < smooth else average, tokenizer, CONFIG)
        (out / "log.json").write_text(json.dumps(history, indent=1) + "\n")

    train(recipe, master, text, loss_of, clock, after)


def main() -> None:
    """Read the command line and pretrain."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory to write the checkpoint to")
    parser.add_argument("--minutes", type=float, default=Recipe.minutes, help="time budget")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--batch", type=int, default=Recipe.batch, help="windows per step")
    parser.add_argument("--lr", type=float, default=Recipe.lr, help="peak learning rate")
    parser.add_argument("--context", type=int, default=Recipe.context, help="tokens per window")
    parser.add_argument("--init", type=Path, help="continue from this checkpoint")
    args = vars(parser.parse_args())
    torch.set_num_threads(args.pop("threads"))
    out, init = args.pop("out"), args.pop("init")
    pretrain(out, Recipe(**args), WallClock(), init)


if __name__ == "__main__":
    main()
