import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from textharmony.data.faults import Faults
from textharmony.data.readers import detect, read_dataset
from textharmony.prompts import Task


def png(color: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), color).save(buffer, "png")
    return buffer.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_folder(tmp_path: Path, paint, dump) -> None:
    paint(tmp_path / "a.png")
    paint(tmp_path / "mask.png")
    asked = {"task": "comprehension", "prompt": "what?", "images": ["a.png"], "texts": ["a", "b"], "extra": {"k": 1}}
    located = {"task": "perception", "prompt": "where?", "images": ["a.png"], "boxes": [[1, 2, 3, 4]], "words": ["x"]}
    drawn = {"id": "d", "task": "generation", "prompt": 'a "x"', "target": "a.png", "source": "mine"}
    edited = {"task": "editing", "prompt": "fill", "images": ["a.png"], "target": "a.png", "mask": "mask.png"}
    dump(tmp_path / "records.jsonl", [asked, located, drawn, edited])
    assert detect(tmp_path) == ["folder"]
    first, second, third, fourth = read_dataset("folder", tmp_path)
    assert (first.id, first.task, first.texts, first.extra) == ("0", Task.COMPREHENSION, ("a", "b"), {"k": 1})
    assert (second.boxes, second.words) == (((1, 2, 3, 4),), ("x",))
    assert (third.id, third.source, third.load_target().size) == ("d", "mine", (200, 100))
    assert fourth.load_mask().getextrema() == (255, 255)


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ({"task": "singing", "prompt": "x"}, "singing"),
        ({"task": "generation", "prompt": " ", "target": "a.png"}, "text was expected"),
        ({"task": "generation", "prompt": "x"}, "no target"),
        ({"task": "perception", "prompt": "x", "texts": ["y"]}, "no image"),
        ({"task": "editing", "prompt": "x", "images": ["a.png"], "target": "a.png"}, "neither boxes nor a mask"),
        ({"task": "perception", "prompt": "x", "images": ["a.png"], "boxes": [[5, 0, 1, 9]]}, "expected 0 <= x1"),
        ({"task": "perception", "prompt": "x", "images": ["a.png"], "words": ["y"]}, "1 words for 0 boxes"),
        ({"task": "perception", "prompt": "x", "images": ["absent.png"]}, "does not exist"),
        ({"prompt": "x"}, "no 'task'"),
    ],
)
def test_records_that_are_none(tmp_path: Path, paint, dump, item: dict[str, object], reason: str) -> None:
    paint(tmp_path / "a.png")
    dump(tmp_path / "records.jsonl", [item])
    faults = Faults()
    assert list(read_dataset("folder", tmp_path, faults=faults)) == []
    assert reason in faults.listed[0].reason


def test_shards_of_captioned_pictures(tmp_path: Path) -> None:
    write_tar(tmp_path / "00000.tar", {"000.png": png(), "000.txt": b'a "red" sign\n', "000.json": b'{"url": "u"}'})
    write_tar(tmp_path / "00001.tar", {"001.png": png("blue"), "001.json": b'{"caption": "blue"}'})
    assert detect(tmp_path) == ["shards"]
    red, blue = read_dataset("shards", tmp_path)
    assert (red.id, red.task, red.prompt, red.extra) == ("000", Task.GENERATION, 'a "red" sign', {"url": "u"})
    assert blue.prompt == "blue" and blue.load_target().getpixel((0, 0)) == (0, 0, 255)


def test_shards_of_records(tmp_path: Path) -> None:
    item = {
        "task": "editing",
        "prompt": "fill",
        "images": ["png"],
        "target": "target.png",
        "mask": "mask.png",
        "texts": ["x"],
    }
    files = {"a/1.png": png(), "a/1.json": json.dumps(item).encode(), "a/1.target.png": png("blue")}
    write_tar(tmp_path / "x.tar", files | {"a/1.mask.png": png("white")})
    (record,) = read_dataset("shards", tmp_path)
    assert (record.id, record.task, record.texts) == ("a/1", Task.EDITING, ("x",))
    assert record.load().getpixel((0, 0)) == (255, 0, 0)
    assert record.load_target().getpixel((0, 0)) == (0, 0, 255)
    assert record.load_mask().getextrema() == (255, 255)


def test_corrupt_samples_and_a_cut_off_shard_are_skipped(tmp_path: Path) -> None:
    good = {"0.png": png(), "0.txt": b"x"}
    write_tar(tmp_path / "a.tar", good | {"1.txt": b"no picture", "2.png": png(), "3.png": png(), "3.json": b"[1"})
    cut = write_tar(tmp_path / "b.tar", {"0.png": png(), "0.txt": b"x", "1.png": png() * 100, "1.txt": b"y"})
    cut.write_bytes(cut.read_bytes()[:4000])
    (tmp_path / "c.tar").write_bytes(b"not a tar at all" * 100)
    write_tar(tmp_path / "d.tar", good)
    faults = Faults()
    records = list(read_dataset("shards", tmp_path, faults=faults))
    assert len(records) == 3  # one of a, one of b, one of d
    places = [fault.where.replace(f"{tmp_path}/", "") for fault in faults.listed]
    assert places == ["a.tar:1", "a.tar:2", "a.tar:3", "b.tar", "c.tar"]


def test_captioned_pictures_as_img2dataset_leaves_them(tmp_path: Path, paint) -> None:
    captions = {"00000/000000001.jpg": "a sign", "00000/000000002.jpg": " ", "00001/000010000.png": "b"}
    for name, caption in captions.items():
        paint(tmp_path / name).with_suffix(".txt").write_text(caption + "\n")
    paint(tmp_path / "00001" / "000010001.jpg")
    (tmp_path / "00000_stats.json").write_text("{}")
    assert detect(tmp_path) == ["captioned"]
    faults = Faults()
    records = list(read_dataset("captioned", tmp_path, faults=faults))
    assert [(r.id, r.task, r.prompt) for r in records] == [
        ("00000/000000001", Task.GENERATION, "a sign"),
        ("00001/000010000", Task.GENERATION, "b"),
    ]
    assert records[0].load_target().size == (200, 100)
    assert [Path(fault.where).name for fault in faults.listed] == ["000000002.jpg", "000010001.jpg"]
    assert "000010001.txt does not exist" in faults.listed[1].reason


def test_pictures_alone_are_not_captioned(tmp_path: Path, paint) -> None:
    paint(tmp_path / "a.jpg")
    (tmp_path / "b.txt").write_text("no picture's")
    assert detect(tmp_path) == []
