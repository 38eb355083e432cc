import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from textharmony.config import ModelConfig
from textharmony.data.batch import Collator
from textharmony.data.faults import Fault, TooManyFaults
from textharmony.data.loading import BatchLoader, Source, SourceStream, load_sources
from textharmony.data.mixture import Shard
from textharmony.data.record import Record
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


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_loader_goes_on_from_its_state(make: Make, workers: int, window: int) -> None:
    """Across epochs, with corrupt records before and after; through JSON, as a checkpoint stores it."""
    straight = make(workers=workers, window=window)
    expected = prompts(straight, 15)
    first = make(workers=workers, window=window)
    begun = prompts(first, 4)
    second = make(workers=workers, window=window, states=[json.loads(json.dumps(first.state()))])
    went_on = prompts(second, 3)
    third = make(workers=workers, window=window, states=[second.state()])
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
    with pytest.raises(TooManyFaults, match=r"^5 of .* records are corrupt"):
        prompts(loader, 1)
    assert len(loader.faults()) == 5
    for i in range(60):
        (tmp_path / f"{i}.txt").write_text(" ")
    loader = load()
    with pytest.raises(TooManyFaults, match="expected text that is not blank"):
        prompts(loader, 1)
    assert len(loader.faults()) == 5


def corrupt_set(folder: Path, count: int, bad: Collection[int], name: str) -> Source:
    """A set of captioned pictures: of the bad ones the first has no caption, and the others cannot be decoded."""
    folder.mkdir()
    for i in range(count):
        Image.new("RGB", (20, 10), (5 * i, 0, 0)).save(folder / f"{name}{i:02d}.png")
        (folder / f"{name}{i:02d}.txt").write_text(f"{name} {i}")
    for number, i in enumerate(bad):
        path = folder / f"{name}{i:02d}.{'png' if number else 'txt'}"
        path.write_bytes(b"broken") if number else path.unlink()
    return Source("captioned", str(folder))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_set_of_40_with_5_percent_completes_and_lists_each_once(
    tmp_path: Path, collator: Collator, workers: int
) -> None:
    loader = BatchLoader(SourceStream([corrupt_set(tmp_path / "a", 40, (7, 19), "a")], 0), collator, 10, workers)
    rows = flat(prompts(loader, 16))  # 4 epochs
    assert len({row for row in rows if "a" in row}) == 38
    assert sorted(Path(fault.split(": ")[0].split()[-1]).stem for fault in loader.faults()) == ["a07", "a19"]


@pytest.mark.parametrize("bad", [2, 4, 40])
def test_a_set_without_a_good_record_stops_the_loader(tmp_path: Path, collator: Collator, bad: int) -> None:
    """Also one that is too small to reach the threshold: it would be read again and again."""
    source = corrupt_set(tmp_path / "a", bad, range(bad), "a")
    with pytest.raises(TooManyFaults):
        prompts(BatchLoader(SourceStream([source], 0), collator, 10, 0), 1)


def test_a_small_corrupt_set_stops_the_loader_beside_a_large_good_one(tmp_path: Path, collator: Collator) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    line = {"task": "read", "source": "good", "prompt": "read", "images": ["a.png"], "texts": ["x"]}
    bad = line | {"source": "bad", "images": ["b.png"]}
    (tmp_path / "b.png").write_bytes(b"broken")
    sources = []
    for name, lines in (("good", [line] * 50), ("bad", [bad] * 40)):
        (tmp_path / name).mkdir()
        for picture in ("a.png", "b.png"):
            shutil.copy(tmp_path / picture, tmp_path / name)
        (tmp_path / name / "records.jsonl").write_text("".join(json.dumps(item) + "\n" for item in lines))
        sources.append(Source("folder", str(tmp_path / name), weight=99 if name == "good" else 1))
    loader = BatchLoader(SourceStream(sources, 0), collator, 10, 0)
    with pytest.raises(TooManyFaults, match=r"^5 of 5 records are corrupt.*: bad "):
        prompts(loader, 100)


def test_a_source_that_runs_dry_is_named_in_one_line(tmp_path: Path, collator: Collator) -> None:
    (tmp_path / "records.jsonl").write_text("")
    loader = BatchLoader(SourceStream([Source("folder", str(tmp_path))], 0), collator, 2, workers=1)
    with pytest.raises(ValueError, match=r"^folder of .* has no records$"):
        prompts(loader, 1)


class Numbers:
    """A stream whose records are their numbers, with texts of many lengths."""

    def records(self, shard: Shard, start: int = 0) -> Iterator[Record]:
        for n in itertools.count(start):
            number = shard.number(n)
            yield Record(str(number), Task.ANSWER, "numbers", "x" * (number * 7919 % 97), texts=("a",))

    def faults(self) -> list[Fault]:
        return []


class IdCollator(Collator):
    """Batches of the ids of records; one in ten is corrupt."""

    def encode(self, record: Record) -> Any:
        if is_corrupt(int(record.id)):
            raise ValueError("corrupt")
        return int(record.id)

    def stack(self, rows: Any) -> dict[str, Any]:
        return {"ids": rows}


def is_corrupt(number: int) -> bool:
    return number * 31 % 10 == 3


Phase = tuple[int, int, int, int]  # processes, workers, records in a batch, batches of the window


@pytest.mark.parametrize(
    "phases",
    [
        [(2, 0, 4, 1), (1, 0, 8, 1)],
        [(2, 0, 4, 1), (4, 0, 2, 1)],
        [(1, 0, 8, 1), (3, 0, 5, 1), (2, 0, 4, 1)],
        [(2, 0, 4, 5), (4, 0, 2, 3), (1, 0, 3, 5)],
        [(2, 2, 3, 4), (1, 2, 6, 1)],
    ],
    ids=str,
)
def test_other_processes_go_on_with_what_is_left_of_the_stream(
    config: ModelConfig, tokenizer: PreTrainedTokenizerFast, phases: list[Phase]
) -> None:
    """No record comes twice, and none is left out, also where workers have corrupt records and half a window behind."""
    collator, given, states = IdCollator(config, tokenizer), list[int](), None
    for processes, workers, size, window in [*phases, (1, 0, 1, 1)]:
        saved = []
        for rank in range(processes):
            loader = BatchLoader(Numbers(), collator, size, workers, rank, processes, 1.0, states, window)
            batches = loader.batches()
            count = 7 if len(given) < 7 or (processes, size) != (1, 1) else 200
            given += [number for batch in islice(batches, count) for number in batch["ids"]]
            batches.close()
            saved.append(json.loads(json.dumps(loader.state())))
        states = saved
    assert len(given) == len(set(given))
    assert sorted(given) == [number for number in range(max(given) + 1) if not is_corrupt(number)]


def test_faults_that_were_counted_are_shared_by_the_processes_that_go_on(
    config: ModelConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    def load(rank: int, processes: int, states: Any = None) -> BatchLoader:
        return BatchLoader(Numbers(), IdCollator(config, tokenizer), 4, 0, rank, processes, 1.0, states)

    states = []
    for rank in range(2):
        loader = load(rank, 2)
        batches = loader.batches()
        list(islice(batches, 5))
        states.append(loader.state())
    later = [load(rank, 3, states).state() for rank in range(3)]
    assert sum(state["good"]["numbers"] for state in later) in range(38, 41)  # 2 x 5 batches of 4
    listed = [fault[1] for state in later for fault in state["faults"]]
    assert sorted(listed) == sorted(fault[1] for state in states for fault in state["faults"]) and len(listed) > 2


def test_the_states_of_all_processes_are_needed(make: Make) -> None:
    states = [make(rank=rank, processes=3).state() for rank in range(3)]
    with pytest.raises(ValueError, match="got the states of 2 batch loaders, expected 3"):
        make(processes=2, states=states[:2])
    with pytest.raises(ValueError, match="got the states of 0 batch loaders, expected those of all processes"):
        make(states=[])


def padding(batches: Iterable[dict[str, Any]]) -> float:
    """The share of a few batches' tokens that are padding."""
    masks = [batch["attention_mask"] for batch in batches]
    return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def test_windows_leave_less_than_a_tenth_of_the_tokens_to_padding(
    config: ModelConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Texts of 1 to 97 characters beside a picture's tokens."""

    class Texts(Numbers):
        def records(self, shard: Shard, start: int = 0) -> Iterator[Record]:
            return (replace(record, images=(Image.new("RGB", (8, 8)),)) for record in super().records(shard, start))

    def load(window: int) -> list[dict[str, Any]]:
        loader = BatchLoader(Texts(), Collator(config, tokenizer), 8, 0, window=window)
        return list(islice(loader.batches(), 32))

    assert padding(load(1)) > 0.25
    assert padding(load(16)) < 0.1
    lengths = [batch["input_ids"].shape[1] for batch in load(16)]
    assert lengths[:16] != sorted(lengths[:16]), "the batches of a window come in random order"


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
