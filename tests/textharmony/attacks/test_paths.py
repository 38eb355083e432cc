"""Records that name files outside of their data set's folder are refused, unless that is asked for."""

import json
from pathlib import Path

import pytest
from PIL import Image

from textharmony.data.faults import Faults
from textharmony.data.readers import read_dataset


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder for data beside a private picture, which links in the folder lead to."""
    folder = tmp_path / "data"
    (folder / "inside").mkdir(parents=True)
    (tmp_path / "private").mkdir()
    for path in (tmp_path / "private" / "secret.png", folder / "inside" / "own.png"):
        Image.new("RGB", (4, 4)).save(path)
    (tmp_path / "private" / "secret.txt").write_text("a password")
    (folder / "link.png").symlink_to(tmp_path / "private" / "secret.png")
    (folder / "links").symlink_to(tmp_path / "private")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    return folder


def read(folder: Path, name: str = "folder", outside: bool = False) -> tuple[int, list[str]]:
    faults = Faults()
    records = list(read_dataset(name, folder, faults=faults, outside=outside))
    return len(records), [str(fault) for fault in faults.listed]


def draw(folder: Path, **pictures: object) -> None:
    item = {"task": "draw", "prompt": "a sign", "target": "inside/own.png", "texts": ["sign"], **pictures}
    (folder / "records.jsonl").write_text(json.dumps(item) + "\n")


LEAVING = [
    "../private/secret.png",
    "inside/../../private/secret.png",
    "PRIVATE/secret.png",
    "link.png",
    "links/secret.png",
]


@pytest.mark.parametrize("name", LEAVING)
@pytest.mark.parametrize("field", ["target", "images", "mask"])
def test_a_path_that_leaves_the_folder_is_a_fault_unless_asked_for(data: Path, field: str, name: str) -> None:
    name = name.replace("PRIVATE", str(data.parent / "private"))
    draw(data, **{field: [name] if field == "images" else name})
    count, faults = read(data)
    assert count == 0 and len(faults) == 1 and "records.jsonl:1: " in faults[0]
    assert f"leads out of {data}, expected a file in it, or outside=True" in faults[0]
    assert read(data, outside=True) == (1, [])


@pytest.mark.parametrize("name", ["inside/own.png", "inside/../inside/own.png", "./inside//own.png"])
def test_a_path_in_the_folder_is_read(data: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(data, target=name)
    (data.parent / "by-link").symlink_to(data)  # the folder itself may be a link, and relative
    monkeypatch.chdir(data.parent)
    for folder in (data, Path("data"), Path("by-link")):
        assert read(folder) == (1, [])
    monkeypatch.chdir(data)
    assert read(Path(".")) == (1, [])


@pytest.mark.parametrize(
    "name",
    ["file:///etc/passwd", "https://example.com/a.png", "loop.png", "a\0.png", "x" * 5000, "pipe:touch ran", "/"],
)
def test_other_names_are_faults(data: Path, name: str) -> None:
    draw(data, target=name)
    for outside in (False, True):
        count, faults = read(data, outside=outside)
        assert count == 0 and len(faults) == 1 and len(faults[0]) < 700 and "records.jsonl:1: " in faults[0]
    assert not (data / "ran").exists()


def test_captions_and_pictures_that_are_links_are_faults(data: Path) -> None:
    """The text of a private file must not get into a caption."""
    (data / "own.png").write_bytes((data / "inside" / "own.png").read_bytes())
    (data / "own.txt").symlink_to(data.parent / "private" / "secret.txt")
    (data / "link.txt").write_text("a caption")
    count, faults = read(data, "captioned")
    assert count == 0 and sorted("leads out of" in fault for fault in faults) == [False, False, True, True]


def test_annotations_that_are_a_link_are_refused(data: Path) -> None:
    (data.parent / "private" / "records.jsonl").write_text(json.dumps({"task": "draw", "prompt": "x", "target": "a"}))
    (data / "records.jsonl").symlink_to(data.parent / "private" / "records.jsonl")
    with pytest.raises(ValueError, match=r"records\.jsonl' leads out of"):
        read(data)


def test_two_data_sets_that_are_read_by_turns_keep_their_folders(data: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    Image.new("RGB", (4, 4)).save(other / "own.png")
    draw(other, target="own.png")
    draw(data)
    for folder in (data, other):
        (folder / "records.jsonl").write_text((folder / "records.jsonl").read_text() * 2)
    first, second = read_dataset("folder", data), read_dataset("folder", other)
    assert [next(first).target, next(second).target, next(first).target, next(second).target] == [
        *(data / "inside/own.png", other / "own.png") * 2
    ]
