"""Time loaders of batches on a miniature data set with real JPEGs: worker processes against a single reader thread.

    python benchmarks/bench_loader.py

The pictures are JPEGs of 1,200 x 900 pixels with structure and noise, asked about by questions of many lengths, and
fitted to the sizes of the preset "paper". The two loaders run in turn, so that both meet the same load of the machine;
the results are medians of samples a second and of paired ratios, with the 20th and 80th percentiles. CSV and JSON go to
benchmarks/results/. The share of the tokens that is padding is counted with and without windows, for these questions in
batches of 8, and for records of all tasks in micro-batches of 4, mixed as in the stages of the preset "paper".
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
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from bench_gated_lora import percentiles, write
from PIL import Image

from textharmony.config import Stage
from textharmony.data.batch import Collator
from textharmony.data.faults import Fault
from textharmony.data.loading import BatchLoader, Source, SourceStream
from textharmony.data.mixture import Shard
from textharmony.data.record import Record
from textharmony.presets import PAPER, PAPER_TRAINING
from textharmony.presets.tiny import build_tokenizer
from textharmony.prompts import Task

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


class Mixed:
    """Records of a stage's tasks, with as many tokens as such records have; the smallest pictures will do."""

    # The fewest and the most tokens of prompt and answer, besides those of pictures; uniform in their logarithm.
    LENGTHS = {  # noqa: RUF012
        Task.READ: ((4, 8), (4, 1200)),  # words, signs and pages
        Task.ANSWER: ((8, 40), (1, 60)),
        Task.LOCATE: ((1, 12), None),
        Task.DRAW: ((8, 80), None),
        Task.EDIT: ((1, 12), None),
    }

    def __init__(self, stage: Stage) -> None:
        self.names = list(stage.tasks)
        self.weights = [stage.tasks[name] for name in self.names]

    def records(self, shard: Shard, start: int = 0) -> Iterator[Record]:
        for n in count(start):
            number = shard.number(n)
            rng = np.random.default_rng(number)
            task = Task(rng.choice(self.names, p=self.weights))
            prompt, answer = ("x" * self.draw(rng, ends) if ends else "y" for ends in self.LENGTHS[task])
            picture = Image.new("RGB", (16, 16))
            draws = task in (Task.DRAW, Task.EDIT)
            yield Record(
                str(number),
                task,
                "mixed",
                prompt,
                images=() if task is Task.DRAW else (picture,),
                texts=(answer,),
                target=picture if draws else None,
                boxes=((100, 200, 300, 400),) * int(rng.integers(1, 4)) if task in (Task.LOCATE, Task.EDIT) else (),
            )

    @staticmethod
    def draw(rng: np.random.Generator, ends: tuple[int, int]) -> int:
        return int(np.exp(rng.uniform(*np.log(ends))))

    def faults(self) -> list[Fault]:
        return []


def stage_padding(stage: Stage, window: int) -> float:
    """The share of the tokens that is padding in micro-batches of 4."""
    config = replace(PAPER, image_size=(16, 16), drawing_size=(16, 16))  # as many tokens for each picture
    loader = BatchLoader(Mixed(stage), Collator(config, build_tokenizer()), 4, 0, window=window)
    return padding(loader, 512)


def padding(loader: BatchLoader, number: int) -> float:
    """The share of the tokens that is padding in a number of batches."""
    with closing(loader.batches()) as batches:
        masks = [batch["attention_mask"] for batch in islice(batches, number)]
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
        for window in (1, PAPER_TRAINING.window):
            share = padding(make_loader(Path(folder), 2, window), 32)
            rows.append({"what": f"padding, window of {window}", "median": round(share, 4), "workers": 2})
            print(f"padding with a window of {window}: {share:.1%}")
    for stage in PAPER_TRAINING.stages:
        for window in (1, PAPER_TRAINING.window):
            share = stage_padding(stage, window)
            rows.append({"what": f"padding, stage {stage.name}, window of {window}", "median": round(share, 4)})
            print(f"padding of the stage {stage.name} with a window of {window}: {share:.1%}")
    write("loader", rows)


if __name__ == "__main__":
    main()
