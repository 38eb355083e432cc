"""Use a model for a long time, and watch memory, file descriptors and threads, which must not grow.

    python benchmarks/soak.py --steps 10000 --reads 2000 --draws 500

Training runs with the smallest configuration that has all parts, on rendered words that two workers load; reading and
drawing use the embedded model, from eight threads as well. Each phase prints ten lines: what the process holds after
each tenth. A phase fails if the memory at its end is more than 2% and 8 MiB above the memory after its second tenth, or
if it holds more descriptors or threads than in its first half.
"""

import argparse
import gc
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from tqdm import tqdm

from textharmony import TextHarmony
from textharmony.config import LayoutConfig, ModelConfig
from textharmony.data.batch import Collator
from textharmony.data.loading import BatchLoader
from textharmony.data.synthetic import SyntheticWords
from textharmony.presets import TINY
from textharmony.presets.tiny import build_tokenizer
from textharmony.prompts import Task


class Held(NamedTuple):
    """What a process holds."""

    megabytes: float  # resident
    descriptors: int
    threads: int


def held() -> Held:
    gc.collect()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return Held(int(status["VmRSS"].split()[0]) / 1024, len(os.listdir("/proc/self/fd")), int(status["Threads"]))


def watch(name: str, count: int, work: Callable[[int], None]) -> bool:
    """Work `count` times, and tell whether the process held more and more."""
    seen = []
    for part in range(10):
        for i in range(part * count // 10, (part + 1) * count // 10):
            work(i)
        seen.append(held())
        tqdm.write(f"{name} {(part + 1) * count // 10:6d}: {seen[-1].megabytes:7.1f} MiB, {seen[-1][1:]}")
    first, last = seen[1], seen[-1]
    # Batches on their way from the workers hold some descriptors.
    handles = all(last[i] <= max(earlier[i] for earlier in seen[:5]) for i in (1, 2))
    flat = last.megabytes < 1.02 * first.megabytes + 8 and handles
    print(f"{name}: {'flat' if flat else 'GROWS'}, from {first} to {last}", flush=True)
    return flat


def smallest() -> ModelConfig:
    width, latents = 32, 4
    return replace(
        TINY,
        vision=TINY.vision | {"hidden_size": width, "intermediate_size": 48, "num_hidden_layers": 1},
        stem=(8, 16),
        language=TINY.language | {"hidden_size": width, "intermediate_size": 48, "num_hidden_layers": 1},
        unet=TINY.unet
        | {
            "in_channels": 2 * latents + 1 + 4 * 4 * 4,
            "out_channels": latents,
            "block_out_channels": [16, 16],
            "cross_attention_dim": width,
        },
        vae=TINY.vae | {"block_out_channels": [8, 8, 8], "latent_channels": latents},
        slide=TINY.slide | {"r": 4, "lora_alpha": 4},
        context_tokens=8,
        layout=LayoutConfig(width=16, depth=1, heads=2, glyph_size=(8, 6), steps=3),
        inference_steps=2,
    )


def train(steps: int) -> bool:
    """Train on batches of two, without what a run writes."""
    torch.manual_seed(0)
    model = TextHarmony(smallest(), build_tokenizer())
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    words = SyntheticWords(0, "train", {task: 1.0 for task in Task})
    loader = BatchLoader(words, Collator(model.config, model.tokenizer), 2, workers=2, window=4)
    batches = loader.batches()

    def step(_: int) -> None:
        sum(model(**next(batches), adapters=True).values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loader.state()

    try:
        return watch("train", steps, step)
    finally:
        batches.close()


def use(reads: int, draws: int) -> bool:
    """Read and draw, one by one, and then a tenth as often in eight threads."""
    model = TextHarmony.from_pretrained("tiny")
    words = SyntheticWords(1, "held_out", {Task.READ: 1.0})
    pictures = [words[i].images[0] for i in range(16)]
    flat = [
        watch("read", reads, lambda i: model.read(pictures[i % 16])),
        watch("draw", draws, lambda i: model.draw(f'"A{i}" in red', i, num_inference_steps=2 + i % 3)),
    ]

    def both(i: int) -> None:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda n: model.read(pictures[n % 16]), range(8)))
            list(pool.map(lambda n: model.draw('"AB" in red', n, num_inference_steps=2), range(8)))

    return all([*flat, watch("eight threads", max(10, draws // 50), both)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, count in (("steps", 10_000), ("reads", 2_000), ("draws", 500)):
        parser.add_argument(f"--{name}", type=int, default=count, help=f"{count} if not given; 0: none")
    options = parser.parse_args()
    torch.set_num_threads(1)
    flat = [train(options.steps)] if options.steps else []
    flat += [use(options.reads, options.draws)] if options.reads and options.draws else []
    sys.exit(0 if all(flat) else 1)


if __name__ == "__main__":
    main()
