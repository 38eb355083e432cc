import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from textharmony.data.faults import TooManyFaults
from textharmony.data.sample import Sample
from textharmony.data.loading import SampleStream, Source, load_sources
from textharmony.prompts import Task

SIZE, TARGET = (24, 48), (16, 32)


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 captioned pictures; two are none, and one has no caption."""
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
    """Records of all four tasks."""
    folder = tmp_path_factory.mktemp("questions")
    Image.new("RGB", (40, 20), "white").save(folder / "a.png")
    lines: list[dict[str, object]] = [
        {"task": "comprehension", "prompt": "what", "images": ["a.png"], "texts": ["x"]},
        {"task": "perception", "prompt": "where", "images": ["a.png"], "boxes": [[0, 0, 500, 999]]},
        {"task": "generation", "prompt": "a sign", "target": "a.png"},
        {"task": "editing", "prompt": "fill", "images": ["a.png"], "target": "a.png", "boxes": [[0, 0, 500, 999]]},
    ]
    (folder / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def make(captioned: Path, questions: Path) -> Callable[..., SampleStream]:
    def make(**options: object) -> SampleStream:
        sources = [Source("captioned", str(captioned), weight=3), Source("folder", str(questions))]
        given = {"max_faults": 0.2, "buffer": 4} | options
        return SampleStream(sources, 5, SIZE, TARGET, **given)

    return make


def said(samples: list[Sample]) -> list[tuple[Task, str]]:
    return [(sample.task, sample.prompt) for sample in samples]


def test_sources_are_mixed_by_their_weights(make: Callable[..., SampleStream]) -> None:
    samples = make().take(400)
    counts = Counter(sample.prompt.startswith("picture") for sample in samples)
    assert 250 < counts[True] < 340  # 3 of 4, less what is corrupt
    assert {sample.task for sample in samples} == set(Task)
    assert len({sample.prompt for sample in samples}) == 27 + 4


def test_pictures_come_in_the_sizes_of_the_model(make: Callable[..., SampleStream]) -> None:
    for sample in make().take(60):
        assert sample.image is None or sample.image.shape == (*SIZE, 3)
        assert sample.target is None or sample.target.shape == (*TARGET, 3)
        if sample.task is Task.EDITING:
            assert sample.region is not None
            assert np.allclose(sample.region, (0, 0, 24, 24), atol=1)


def test_a_stream_goes_on_from_its_state(make: Callable[..., SampleStream]) -> None:
    """Across epochs, with corrupt records before and after; by way of JSON, as a checkpoint has it."""
    straight = make()
    expected = said(straight.take(150))
    first = make()
    begun = said(first.take(40))
    second = make()
    second.restore(json.loads(json.dumps(first.state())))
    went_on = said(second.take(30))
    third = make()
    third.restore(second.state())
    assert begun + went_on + said(third.take(80)) == expected
    assert third.state() == straight.state()
    assert set(third.faults()) == set(straight.faults())


def test_processes_share_the_records(questions: Path, captioned: Path) -> None:
    """Each takes every second one, and corrupt ones of the one do not move those of the other."""

    def stream(rank: int, processes: int, folder: Path, name: str) -> SampleStream:
        source = Source(name, str(folder))
        return SampleStream([source], 5, SIZE, TARGET, max_faults=0.2, buffer=4, rank=rank, processes=processes)

    alone = said(stream(0, 1, questions, "folder").take(80))
    for rank in range(2):
        assert said(stream(rank, 2, questions, "folder").take(40)) == alone[rank::2]
    whole = stream(0, 1, captioned, "captioned")
    alone = said(whole.take(270))  # 10 epochs of 27 that decode, of 29 that are read
    shares = [said(stream(rank, 2, captioned, "captioned").take(150)) for rank in range(2)]
    assert not Counter(alone) - (Counter(shares[0]) + Counter(shares[1]))
    for share in shares:
        rest = iter(alone)
        assert all(item in rest for item in share[:120])  # in the same order


def test_what_is_corrupt_is_listed_once(make: Callable[..., SampleStream], captioned: Path) -> None:
    stream = make()
    stream.take(300)
    faults = stream.faults()
    assert len(faults) == len(set(faults)) == 3
    assert sorted(Path(fault.split(": ")[0].split()[-1]).stem for fault in faults) == ["07", "19", "23"]


def test_too_many_corrupt_records_stop_the_stream(tmp_path: Path) -> None:
    for i in range(60):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("x")
        if i % 2:
            (tmp_path / f"{i}.png").write_bytes(b"no picture")
    stream = SampleStream([Source("captioned", str(tmp_path))], 0, SIZE, SIZE)
    with pytest.raises(TooManyFaults, match=r"21 of .* records are corrupt"):
        stream.take(60)
    assert len(stream.faults()) == 21
    for i in range(60):
        (tmp_path / f"{i}.txt").write_text(" ")
    stream = SampleStream([Source("captioned", str(tmp_path))], 0, SIZE, SIZE)
    with pytest.raises(TooManyFaults):
        stream.take(1)
    assert len(stream.faults()) == 21


def test_a_state_of_another_number_of_processes_is_refused(make: Callable[..., SampleStream]) -> None:
    with pytest.raises(ValueError, match=r"of 1 processes .* there are 2"):
        make(processes=2).restore(make().state())


def test_sources_that_are_not_there_are_refused_at_once(captioned: Path, tmp_path: Path) -> None:
    def stream(*sources: Source) -> SampleStream:
        return SampleStream(sources, 0, SIZE, SIZE)

    with pytest.raises(ValueError, match="data set is 'nonesuch'"):
        stream(Source("nonesuch", str(captioned)))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        stream(Source("captioned", str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match="split of captioned is 'dev'"):
        stream(Source("captioned", str(captioned), split="dev"))
    with pytest.raises(ValueError, match="view of captioned is 'read'"):
        stream(Source("captioned", str(captioned), view="read"))
    with pytest.raises(ValueError, match="given twice"):
        stream(*[Source("captioned", str(captioned))] * 2)
    with pytest.raises(ValueError, match="none below 0 and one above"):
        stream(Source("captioned", str(captioned), weight=0))


def test_load_sources_reads_stages(tmp_path: Path) -> None:
    path = tmp_path / "sources.json"
    items = [{"name": "coco-text", "folder": "coco", "split": "val", "view": "edit", "weight": 2}]
    path.write_text(json.dumps({"align": items, "tune": [{"name": "folder", "folder": "/data/own"}]}))
    assert load_sources(path) == {
        "align": (Source("coco-text", str(tmp_path / "coco"), "val", "edit", 2),),
        "tune": (Source("folder", "/data/own"),),
    }


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{", "is not JSON"),
        ("[]", "expected an object of lists"),
        ('{"align": {"name": "folder"}}', "expected an object of lists"),
        ('{"align": ["folder"]}', "stage 'align': 'folder' is no source"),
        ('{"align": [{"name": "folder"}]}', "expected an object with name and folder"),
        ('{"align": [{"name": "folder", "folder": "x", "weihgt": 1}]}', "has a field 'weihgt'"),
        ('{"align": [{"name": "folder", "folder": "x", "weight": "1"}]}', "weight '1', expected a number"),
        ('{"align": [{"name": "folder", "folder": 3}]}', "folder 3, expected a text"),
    ],
)
def test_what_is_no_description_of_sources(tmp_path: Path, content: str, named: str) -> None:
    path = tmp_path / "sources.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=named):
        load_sources(path)
