import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from textharmony.data.faults import Faults
from textharmony.data.readers import detect, read_dataset
from textharmony.data.readers.own import read_shard
from textharmony.prompts import Task


def png(color: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), color).save(buffer, "png")
    return buffer.getvalue()


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_a_folder_of_records(tmp_path: Path, paint, dump) -> None:
    paint(tmp_path / "a.png")
    paint(tmp_path / "mask.png")
    asked = {"task": "answer", "prompt": "what?", "images": ["a.png"], "texts": ["a", "b"], "extra": {"k": 1}}
    located = {"task": "locate", "prompt": "where?", "images": ["a.png"], "boxes": [[1, 2, 3, 4]], "words": ["x"]}
    drawn = {"id": "d", "task": "draw", "prompt": 'a "x"', "target": "a.png", "source": "mine"}
    edited = {"task": "edit", "prompt": "fill", "images": ["a.png"], "target": "a.png", "mask": "mask.png"}
    boxed = {"task": "edit", "prompt": "fill", "images": ["a.png"], "target": "a.png", "boxes": [[1, 2, 3, 4]]}
    read = {"task": "read", "prompt": "what is there", "images": ["a.png"], "texts": ["x"]}
    dump(tmp_path / "records.jsonl", [asked, located, drawn, edited, boxed, read])
    assert detect(tmp_path) == ["folder"]
    records = list(read_dataset("folder", tmp_path))
    assert [record.task for record in records] == [Task.ANSWER, Task.LOCATE, Task.DRAW, Task.EDIT, Task.EDIT, Task.READ]
    first, second, third, fourth = records[:4]
    assert (first.id, first.texts, first.extra) == ("0", ("a", "b"), {"k": 1})
    assert (second.boxes, second.words) == (((1, 2, 3, 4),), ("x",))
    assert (third.id, third.source, third.load_target().size) == ("d", "mine", (200, 100))
    assert fourth.load_mask().getextrema() == (255, 255)


IMAGE = {"prompt": "x", "images": ["a.png"]}
TASKS = "expected one of read, answer, locate, draw, edit"


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ({"task": "singing", "prompt": "x"}, f"task is 'singing', {TASKS}"),
        ({"task": "perception", "prompt": "x"}, f"task is 'perception', {TASKS}"),
        ({"task": ["read"], "prompt": "x"}, f"task is ['read'], {TASKS}"),
        ({"prompt": "x"}, f"task is None, {TASKS}"),
        ({"task": "draw", "target": "a.png"}, "no 'prompt'"),
        ({"task": "draw", "prompt": " ", "target": "a.png"}, "text is ' ', expected text that is not blank"),
        ({"task": "draw", "prompt": "x"}, "a record to draw has no target, expected the picture to be drawn"),
        ({"task": "read", "prompt": "x", "texts": ["y"]}, "a record to read has no image, expected one"),
        ({"task": "answer", "prompt": "x", "texts": ["y"]}, "a record to answer has no image, expected one"),
        ({"task": "locate", "prompt": "x", "boxes": [[1, 2, 3, 4]], "words": ["y"]}, "to locate has no image"),
        ({"task": "locate"} | IMAGE, "a record to locate has no boxes, expected at least one"),
        (
            {"task": "locate", "boxes": [[1, 2, 3, 4]]} | IMAGE,
            "to locate has 0 words for 1 boxes, expected as many words",
        ),
        ({"task": "edit", "prompt": "x", "target": "a.png", "boxes": [[1, 2, 3, 4]]}, "a record to edit has no image"),
        ({"task": "edit", "boxes": [[1, 2, 3, 4]]} | IMAGE, "a record to edit has no target"),
        ({"task": "edit", "target": "a.png"} | IMAGE, "to edit has 0 boxes and no mask, expected one box or a mask"),
        ({"task": "edit", "target": "a.png", "boxes": [[1, 2, 3, 4]] * 2} | IMAGE, "2 boxes and no mask"),
        ({"task": "read", "boxes": [[5, 0, 1, 9]]} | IMAGE, "expected 0 <= x1"),
        ({"task": "read", "words": ["y"]} | IMAGE, "to read has 1 words for 0 boxes, expected as many words as boxes"),
        ({"task": "read", "prompt": "x", "images": ["absent.png"]}, "absent.png does not exist"),
        ({"task": "read", "prompt": "x", "images": "a.png"}, "images is 'a.png', expected a list"),
    ],
)
def test_a_wrong_record_is_a_fault(tmp_path: Path, paint, dump, item: dict[str, object], reason: str) -> None:
    paint(tmp_path / "a.png")
    dump(tmp_path / "records.jsonl", [item])
    faults = Faults(max_share=1)
    assert list(read_dataset("folder", tmp_path, faults=faults)) == []
    assert [reason in fault.reason for fault in faults.listed] == [True], faults.listed


def test_shards_of_captioned_pictures(tmp_path: Path) -> None:
    write_tar(tmp_path / "00000.tar", {"000.png": png(), "000.txt": b'a "red" sign\n', "000.json": b'{"url": "u"}'})
    write_tar(tmp_path / "00001.tar", {"001.png": png("blue"), "001.json": b'{"caption": "blue"}'})
    assert detect(tmp_path) == ["shards"]
    red, blue = read_dataset("shards", tmp_path)
    assert (red.id, red.task, red.prompt, red.extra) == ("000", Task.DRAW, 'a "red" sign', {"url": "u"})
    assert blue.prompt == "blue" and blue.load_target().getpixel((0, 0)) == (0, 0, 255)


def test_shards_of_records(tmp_path: Path) -> None:
    item = {
        "task": "edit",
        "prompt": "fill",
        "images": ["png"],
        "target": "target.png",
        "mask": "mask.png",
        "texts": ["x"],
    }
    files = {"a/1.png": png(), "a/1.json": json.dumps(item).encode(), "a/1.target.png": png("blue")}
    write_tar(tmp_path / "x.tar", files | {"a/1.mask.png": png("white")})
    (record,) = read_dataset("shards", tmp_path)
    assert (record.id, record.task, record.texts) == ("a/1", Task.EDIT, ("x",))
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
    faults = Faults(max_share=1)
    records = list(read_dataset("shards", tmp_path, faults=faults))
    assert len(records) == 3  # one of a, one of b, one of d
    wheres = [fault.where.replace(f"{tmp_path}/", "") for fault in faults.listed]
    assert wheres == ["a.tar:1", "a.tar:2", "a.tar:3", "b.tar", "c.tar"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"task": "singing"}, f"task is 'singing', {TASKS}"),
        ({"target": None}, "a record to edit has no target"),
        ({"mask": None}, "a record to edit has 0 boxes and no mask"),
        ({"images": []}, "a record to edit has no image"),
        ({"images": ["webp"]}, "no 'webp'"),
        ({"task": "locate", "boxes": [[1, 2, 3, 4]]}, "a record to locate has 0 words for 1 boxes"),
    ],
)
def test_a_wrong_record_in_a_shard_is_a_fault(tmp_path: Path, changes: dict[str, object], reason: str) -> None:
    item = {"task": "edit", "prompt": "fill", "images": ["png"], "target": "png", "mask": "png"} | changes
    write_tar(tmp_path / "x.tar", {"1.png": png(), "1.json": json.dumps(item).encode()})
    faults = Faults(max_share=1)
    assert list(read_dataset("shards", tmp_path, faults=faults)) == []
    assert [reason in fault.reason for fault in faults.listed] == [True], faults.listed


@pytest.mark.parametrize(("name", "mode"), [("a.tar", "w"), ("a.tar.gz", "w:gz")])
def test_files_that_share_a_key_are_one_sample(tmp_path: Path, name: str, mode: str) -> None:
    files = {"x/1.JPG": b"a", "x/1.seg.png": b"b", "x/2.jpg": b"c", "y/2.jpg": b"d", "plain": b"e"}
    assert list(read_shard(write_tar(tmp_path / name, files, mode))) == [
        ("x/1", {"jpg": b"a", "seg.png": b"b"}),
        ("x/2", {"jpg": b"c"}),
        ("y/2", {"jpg": b"d"}),
    ]


def test_a_dot_in_a_folders_name_starts_no_extension(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", {"v1.0/1.txt": b"a"})
    assert list(read_shard(shard)) == [("v1.0/1", {"txt": b"a"})]


@pytest.mark.parametrize(("mode", "name"), [("w", "a.tar"), ("w:gz", "a.tar.gz")])
def test_the_samples_before_a_cut_are_given(tmp_path: Path, mode: str, name: str) -> None:
    """In the middle of each of six files: whole samples are given, no part of one, then an error names the tar file."""
    random = np.random.default_rng(0).bytes  # does not compress, so that a cut hits the same file with and without gzip
    files = {f"{i}.{extension}": random(30000) for i in range(3) for extension in ("jpg", "txt")}
    content = write_tar(tmp_path / name, files, mode).read_bytes()
    for number in range(6):
        (tmp_path / name).write_bytes(content[: number * 30720 + 15000])
        samples = []
        with pytest.raises(ValueError, match=rf"{name} is not a sound tar file: [^<]+$"):
            for sample in read_shard(tmp_path / name):
                samples.append(sample)
        keys = [str(i) for i in range(number // 2)]
        assert samples == [(key, {"jpg": files[f"{key}.jpg"], "txt": files[f"{key}.txt"]}) for key in keys]


def test_two_files_of_one_name_are_an_error(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", {"0.jpg": b"a", "1.jpg": b"a", "1.JPG": b"b"})
    samples = read_shard(shard)
    assert next(samples) == ("0", {"jpg": b"a"})
    with pytest.raises(ValueError, match=r"a\.tar is not a sound tar file: 1\.JPG: duplicate file name"):
        next(samples)


def test_contents_are_not_decoded_and_paths_are_not_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """webdataset runs "pipe:COMMAND" in a shell and would unpickle what .pyd holds."""
    monkeypatch.chdir(tmp_path)
    files = {"1.json": b"{", "1.pyd": b"cos\nsystem\n(S'touch decoded'\ntR.", "1.jpg.gz": b"x"}
    shard = write_tar(Path("pipe:touch run"), files)
    assert list(read_shard(shard)) == [("1", {"json": b"{", "pyd": files["1.pyd"], "jpg.gz": b"x"})]
    assert [path.name for path in tmp_path.iterdir()] == ["pipe:touch run"]


def test_folders_and_links_are_passed_over(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        folder = tarfile.TarInfo("x")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        link = tarfile.TarInfo("x/1.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert list(read_shard(tmp_path / "a.tar")) == []


def test_an_absent_shard_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        list(read_shard(tmp_path / "a.tar"))


def test_captioned_pictures_as_img2dataset_leaves_them(tmp_path: Path, paint) -> None:
    captions = {"00000/000000001.jpg": "a sign", "00000/000000002.jpg": " ", "00001/000010000.png": "b"}
    for name, caption in captions.items():
        paint(tmp_path / name).with_suffix(".txt").write_text(caption + "\n")
    paint(tmp_path / "00001" / "000010001.jpg")
    (tmp_path / "00000_stats.json").write_text("{}")
    assert detect(tmp_path) == ["captioned"]
    faults = Faults(max_share=1)
    records = list(read_dataset("captioned", tmp_path, faults=faults))
    assert [(r.id, r.task, r.prompt) for r in records] == [
        ("00000/000000001", Task.DRAW, "a sign"),
        ("00001/000010000", Task.DRAW, "b"),
    ]
    assert records[0].load_target().size == (200, 100)
    assert [Path(fault.where).name for fault in faults.listed] == ["000000002.jpg", "000010001.jpg"]
    assert "000010001.txt does not exist" in faults.listed[1].reason


def test_pictures_without_captions_are_not_detected(tmp_path: Path, paint) -> None:
    paint(tmp_path / "a.jpg")
    (tmp_path / "b.txt").write_text("no picture's")
    assert detect(tmp_path) == []
