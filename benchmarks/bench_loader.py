"""Time loaders of batches on a miniature data set with real JPEGs: worker processes against a single reader thread.

    python benchmarks/bench_loader.py

The pictures are JPEGs of 1,200 x 900 pixels with structure and noise, asked about by questions of many lengths, and
fitted to the sizes of the preset "paper". The two loaders run in turn, so that both meet the same load of the machine;
the results are medians of samples a second and of paired ratios, with the 20th and 80th percentiles. CSV and JSON go to
benchmarks/results/. The share of the tokens that is padding is counted with and without windows.
"""

import argparse
import json
import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from bench_gated_lora import percentiles, write
from PIL import Image

from textharmony.data.batch import Collator
from textharmony.data.loading import BatchLoader, Source, SourceStream
from textharmony.presets import PAPER
from textharmony.presets.tiny import build_tokenizer

PICTURES, SIZE, BATCH, BATCHES, PAIRS = 120, (1200, 900), 8, 12, 7


def write_questions(folder: Path) -> None:
    """Write a data set of pictures, each with one question and one answer, short or long."""
    rng = np.random.default_rng(0)
    lines = []
    for i in range(PICTURES):
        coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).resize(SIZE)
        pixels = np.asarray(coarse, np.int16) + rng.integers(-12, 13, (SIZE[1], SIZE[0], 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.jpg", quality=90)
        length = int(np.exp(rng.uniform(np.log(8), np.log(800))))  # characters, which are tokens here
        prompt, answer = "what does it say about " + "x" * (length // 4), "y" * length
        lines.append({"task": "answer", "prompt": prompt, "images": [f"{i}.jpg"], "texts": [answer]})
    (folder / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_loader(folder: Path, workers: int, window: int = 1) -> BatchLoader:
    stream = SourceStream([Source("folder", str(folder))], 0, buffer=PICTURES)
    return BatchLoader(stream, Collator(PAPER, build_tokenizer()), BATCH, workers, window=window)


def in_thread(loader: BatchLoader) -> Iterator[dict[str, Any]]:
    """The batches of a loader without workers, made by one thread ahead of who takes them."""
    ready, stop = queue.Queue[dict[str, Any]](2), threading.Event()

    def read() -> None:
        for batch in loader.batches():
            while not stop.is_set():
                try:
                    ready.put(batch, timeout=0.1)
                    break
                except queue.Full:
                    pass
            if stop.is_set():
                return

    thread = threading.Thread(target=read)
    thread.start()
    try:
        while True:
            yield ready.get()
    finally:
        stop.set()
        thread.join()


def samples_a_second(make: Callable[[], Any]) -> float:
    """Time some batches after the first one, which waits for the start."""
    with closing(make()) as batches:
        next(batches)
        started = time.perf_counter()
        for batch in islice(batches, BATCHES):
            assert batch["pixel_values"].shape[0] == BATCH
        return BATCHES * BATCH / (time.perf_counter() - started)


def padding(folder: Path, window: int) -> float:
    """The share of the tokens that is padding."""
    with closing(make_loader(folder, 2, window).batches()) as batches:
        masks = [batch["attention_mask"] for batch in islice(batches, 32)]
    return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_questions(Path(folder))
        found: dict[str, list[float]] = {"thread": [], "workers": []}
        for _ in range(options.pairs):
            found["thread"].append(samples_a_second(lambda: in_thread(make_loader(Path(folder), 0))))
            found["workers"].append(samples_a_second(lambda: make_loader(Path(folder), options.workers).batches()))
        ratios = [b / a for a, b in zip(found["thread"], found["workers"], strict=True)]
        rows: list[dict[str, object]] = []
        for name, values in (*found.items(), ("ratio", ratios)):
            median, low, high = (round(value, 2) for value in percentiles(values))
            rows.append({"what": name, "median": median, "p20": low, "p80": high, "workers": options.workers})
            print(f"{name:8} {median:7.2f}  ({low:.2f} to {high:.2f})")
        for window in (1, 32):
            share = padding(Path(folder), window)
            rows.append({"what": f"padding, window of {window}", "median": round(share, 4), "workers": 2})
            print(f"padding with a window of {window}: {share:.1%}")
    write("loader", rows)


if __name__ == "__main__":
    main()
