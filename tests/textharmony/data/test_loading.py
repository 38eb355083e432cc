import json
import os
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from textharmony.config import ModelConfig
from textharmony.data.batch import Collator
from textharmony.data.faults import TooManyFaults
from textharmony.data.loading import BatchLoader, Source, SourceStream, load_sources
from textharmony.data.synthetic import SyntheticWords
from textharmony.prompts import Task

Make = Callable[..., BatchLoader]


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 captioned pictures: two cannot be decoded, and one has no caption."""
    folder = tmp_path_factory.mktemp("captioned")
    for i in range(30):
        Image.new("RGB", (20, 10), (8 * i, 0, 0)).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"picture {i}")
    (folder / "07.png").write_bytes(b"cut off")
    (folder / "19.png").write_bytes(b"")
    (folder / "23.txt").unlink()
    return folder


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A record of each task."""
    folder = tmp_path_factory.mktemp("questions")
    Image.new("RGB", (40, 20), "white").save(folder / "a.png")
    box = [[0, 0, 500, 999]]
    lines: list[dict[str, object]] = [
        {"task": "answer", "prompt": "what", "images": ["a.png"], "texts": ["x"]},
        {"task": "read", "prompt": "read", "images": ["a.png"], "texts": ["x"]},
        {"task": "locate", "prompt": "where", "images": ["a.png"], "boxes": box, "words": ["x"]},
        {"task": "draw", "prompt": "a sign", "target": "a.png"},
        {"task": "edit", "prompt": "fill", "images": ["a.png"], "target": "a.png", "boxes": box, "texts": ["x"]},
    ]
    (folder / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def collator(config: ModelConfig, tokenizer: PreTrainedTokenizerFast) -> Collator:
    values = config.to_dict() | {"layout": None}
    return Collator(ModelConfig.from_dict(json.loads(json.dumps(values))), tokenizer)


@pytest.fixture
def make(captioned: Path, questions: Path, collator: Collator) -> Make:
    def make(size: int = 10, **options: Any) -> BatchLoader:
        sources = [Source("captioned", str(captioned), weight=3), Source("folder", str(questions))]
        stream = SourceStream(sources, 5, max_faults=0.2, buffer=4)
        return BatchLoader(stream, collator, size, **{"workers": 0, "max_faults": 0.2} | options)

    return make


def prompts(loader: BatchLoader, count: int) -> list[list[str]]:
    """The texts of the rows of some batches."""
    decode = loader.collator.tokenizer.batch_decode
    batches = loader.batches()
    try:
        return [decode(batch["input_ids"], skip_special_tokens=True) for batch in islice(batches, count)]
    finally:
        batches.close()


def flat(batches: list[list[str]]) -> list[str]:
    return [prompt for batch in batches for prompt in batch]


def test_sources_are_mixed_by_their_weights(make: Make) -> None:
    rows = flat(prompts(make(), 40))
    counts = Counter("picture" in row for row in rows)
    assert 250 < counts[True] < 340  # 3 of 4, less the corrupt ones
    assert len(set(rows)) == 27 + 5


def test_batches_have_the_sizes_of_the_model(make: Make, collator: Collator) -> None:
    for batch in islice(make().batches(), 4):
        assert len(batch["input_ids"]) == 10
        assert batch["target_pixel_values"].shape[1:] == (3, *collator.config.target_size)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_loader_goes_on_from_its_state(make: Make, workers: int) -> None:
    """Across epochs, with corrupt records before and after; through JSON, as a checkpoint stores it."""
    straight = make(workers=workers)
    expected = prompts(straight, 15)
    first = make(workers=workers)
    begun = prompts(first, 4)
    second = make(workers=workers, state=json.loads(json.dumps(first.state())))
    went_on = prompts(second, 3)
    third = make(workers=workers, state=second.state())
    assert begun + went_on + prompts(third, 8) == expected
    assert third.state() == straight.state()
    assert set(third.faults()) == set(straight.faults())


def test_the_number_of_workers_does_not_change_the_batches(collator: Collator, questions: Path) -> None:
    """Where no record is corrupt."""
    found = []
    for workers in (0, 1, 2):
        stream = SourceStream([Source("folder", str(questions))], 5, buffer=4)
        found.append(prompts(BatchLoader(stream, collator, 4, workers), 9))
    assert found[0] == found[1] == found[2]


def test_processes_share_the_records(collator: Collator, questions: Path) -> None:
    """Each process takes a batch of every step; together they take what one process takes."""

    def load(size: int, count: int, **options: int) -> list[list[str]]:
        stream = SourceStream([Source("folder", str(questions))], 5, buffer=4)
        return prompts(BatchLoader(stream, collator, size, 0, **options), count)

    alone = load(8, 6)
    shares = [load(4, 6, rank=rank, processes=2) for rank in range(2)]
    for whole, *parts in zip(alone, *shares):
        assert [row.replace("!", "") for row in whole] == [row.replace("!", "") for part in parts for row in part]


def test_rendered_words_come_in_order(config: ModelConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    words = SyntheticWords(3, "train", {task: 1 for task in Task})
    collator = Collator(config, tokenizer)
    loader = BatchLoader(words, collator, 4, workers=2)
    batches = loader.batches()
    for step, batch in zip(range(5), batches):
        expected = collator.stack([collator.encode(words[4 * step + i]) for i in range(4)])
        assert batch.keys() == expected.keys() and batch["modalities"] == expected["modalities"]
        for name in ("input_ids", "labels", "pixel_values", "regions"):
            assert name not in expected or torch.equal(batch[name].nan_to_num(-1), expected[name].nan_to_num(-1))
    batches.close()
    assert loader.faults() == []


def test_batches_are_made_in_other_processes(config: ModelConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    class Watched(Collator):
        def stack(self, rows: Any) -> dict[str, Any]:
            return {"process": os.getpid()}

    words = SyntheticWords(3, "train", {Task.READ: 1})
    for workers in (0, 2):
        batches = BatchLoader(words, Watched(config, tokenizer), 2, workers).batches()
        processes = {batch["process"] for batch in islice(batches, 4)}
        batches.close()
        assert (os.getpid() in processes) == (workers == 0) and len(processes) == max(1, workers)


def test_the_training_generator_is_left_alone(config: ModelConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    words = SyntheticWords(3, "train", {task: 1 for task in Task})
    state = torch.get_rng_state()
    batches = BatchLoader(words, Collator(config, tokenizer), 4, workers=1).batches()
    next(batches), next(batches)
    batches.close()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_record_is_listed_once(make: Make, workers: int) -> None:
    loader = make(workers=workers)
    prompts(loader, 30)
    faults = loader.faults()
    assert len(faults) == len(set(faults)) == 3
    assert sorted(Path(fault.split(": ")[0].split()[-1]).stem for fault in faults) == ["07", "19", "23"]


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_corrupt_records_stop_the_loader(tmp_path: Path, collator: Collator, workers: int) -> None:
    for i in range(60):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("x")
        if i % 2:
            (tmp_path / f"{i}.png").write_bytes(b"no picture")

    def load() -> BatchLoader:
        return BatchLoader(SourceStream([Source("captioned", str(tmp_path))], 0), collator, 60, workers)

    loader = load()
    with pytest.raises(TooManyFaults, match=r"21 of .* records are corrupt"):
        prompts(loader, 1)
    assert len(loader.faults()) == 21
    for i in range(60):
        (tmp_path / f"{i}.txt").write_text(" ")
    loader = load()
    with pytest.raises(TooManyFaults, match="expected text that is not blank"):
        prompts(loader, 1)
    assert len(loader.faults()) == 21


def test_a_source_that_runs_dry_is_named_in_one_line(tmp_path: Path, collator: Collator) -> None:
    (tmp_path / "records.jsonl").write_text("")
    loader = BatchLoader(SourceStream([Source("folder", str(tmp_path))], 0), collator, 2, workers=1)
    with pytest.raises(ValueError, match=r"^folder of .* has no records$"):
        prompts(loader, 1)


def test_a_state_of_other_processes_or_workers_is_refused(make: Make) -> None:
    state = make(workers=1).state()
    with pytest.raises(ValueError, match="is of 1 processes with 1 workers, expected 2 with 1"):
        make(processes=2, workers=1, state=state)
    with pytest.raises(ValueError, match="is of 1 processes with 1 workers, expected 1 with 2"):
        make(workers=2, state=state)


def test_sources_that_do_not_exist_are_refused_at_once(captioned: Path, tmp_path: Path) -> None:
    def stream(*sources: Source) -> SourceStream:
        return SourceStream(sources, 0)

    with pytest.raises(ValueError, match="data set is 'nonesuch'"):
        stream(Source("nonesuch", str(captioned)))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        stream(Source("captioned", str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match="split of captioned is 'dev'"):
        stream(Source("captioned", str(captioned), split="dev"))
    with pytest.raises(ValueError, match="task of captioned is 'read'"):
        stream(Source("captioned", str(captioned), task="read"))
    with pytest.raises(ValueError, match="expected each one once"):
        stream(*[Source("captioned", str(captioned))] * 2)
    with pytest.raises(ValueError, match="none below 0 and at least one above"):
        stream(Source("captioned", str(captioned), weight=0))


def test_load_sources_reads_stages(tmp_path: Path) -> None:
    path = tmp_path / "sources.json"
    items = [{"name": "coco-text", "folder": "coco", "split": "val", "task": "edit", "weight": 2}]
    path.write_text(json.dumps({"align": items, "tune": [{"name": "folder", "folder": "/data/own"}]}))
    assert load_sources(path) == {
        "align": (Source("coco-text", str(tmp_path / "coco"), "val", "edit", 2),),
        "tune": (Source("folder", "/data/own"),),
    }


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{", "is not JSON"),
        ("[]", "expected an object with a list"),
        ('{"align": {"name": "folder"}}', "expected an object with a list"),
        ('{"align": ["folder"]}', "stage 'align': 'folder' is no source"),
        ('{"align": [{"name": "folder"}]}', "expected an object with name and folder"),
        ('{"align": [{"name": "folder", "folder": "x", "weihgt": 1}]}', "has a field 'weihgt'"),
        ('{"align": [{"name": "folder", "folder": "x", "weight": "1"}]}', "weight '1', expected a number"),
        ('{"align": [{"name": "folder", "folder": 3}]}', "folder 3, expected text"),
        ('{"align": [{"name": "folder", "folder": "x", "task": "view"}]}', "task 'view', expected one of read, answer"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path: Path, content: str, named: str) -> None:
    path = tmp_path / "sources.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=named):
        load_sources(path)
