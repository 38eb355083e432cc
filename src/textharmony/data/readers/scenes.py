"""Pictures with outlined words: MARIO-LAION, AnyWord-3M, AnyText-benchmark, COCO-Text, ICDAR 2015, TextSeg."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from textharmony.boxes import Polygon, corners
from textharmony.data.readers.reader import (
    Entry,
    contains,
    find,
    list_entries,
    pairs,
    read_json,
    read_text,
    reads,
    scene,
    text,
)
from textharmony.data.record import Record
from textharmony.files import quote
from textharmony.prompts import Task

_TASKS = (Task.READ, Task.LOCATE, Task.EDIT)
_CAPTIONED = (Task.DRAW, Task.EDIT, Task.READ, Task.LOCATE)
_SIZE = (512, 512)  # of the pictures on which MARIO-LAION and AnyWord-3M outline words
_TEST_INDEX = "mario-laion-test-index.txt"


@reads("mario-laion", ("train", "test"), contains("[0-9]*/[0-9]*/ocr.txt"), _CAPTIONED)
def mario_laion(folder: Path, split: str) -> Iterator[Entry]:
    """MARIO-LAION in the layout of microsoft/unilm, textdiffuser/README.md.

    28330/283305839/{caption.txt, charseg.npy, info.json, ocr.txt}, and image.jpg, which users download and resize to
    512 x 512; mario-laion-test-index.txt. A line of ocr.txt is: word x1,y1,...,x4,y4 confidence, in pixels of that
    size, as in textdiffuser/data/laion-ocr-example.
    """
    held_out = _test_names(folder)
    if split == "test" and not held_out:
        raise FileNotFoundError(f"{folder / _TEST_INDEX} does not exist, expected it to name the test split")
    for part in sorted(path for path in folder.iterdir() if path.is_dir() and path.name.isdigit()):
        for item in sorted(path for path in part.iterdir() if path.is_dir()):
            if (item.name in held_out) == (split == "test"):
                yield str(item), partial(_mario_laion_record, item)


def _test_names(folder: Path) -> frozenset[str]:
    """Names of the test items; a line of the index is such as 28330_283305839."""
    for path in (folder / _TEST_INDEX, folder.parent / "maion_laion_image_url" / _TEST_INDEX):
        if path.is_file():
            return frozenset(line.strip().rsplit("_", 1)[-1] for line in path.read_text().splitlines() if line.strip())
    return frozenset()


def _mario_laion_record(item: Path) -> Record:
    picture = find(item, "image.jpg", "image.png")
    caption = text(read_text(item / "caption.txt").strip())
    lines = []
    for line in filter(str.strip, read_text(item / "ocr.txt").splitlines()):
        word, corners, _ = line.rsplit(" ", 2)
        lines.append((text(word), pairs(map(float, corners.split(",")))))
    return scene(item.name, "mario-laion", picture, lines, {"caption": caption}, _SIZE)


def _annotation_files(folder: Path) -> list[Path]:
    """One annotation file of every part, the newer version where there are two.

    Other data sets have millions of folders in their folders, so we look into folders in folders by known names alone.
    """
    found: dict[Path, Path] = {}
    for name in ("data.json", "data_v1.1.json"):
        for prefix in ("", "*/", "wukong_word/*/", "ocr_data/*/"):
            found |= {path.parent: path for path in folder.glob(prefix + name)}
    return [found[parent] for parent in sorted(found)]


def _is_anyword(folder: Path) -> bool:
    """Look at the keys in the head of a file, because other data sets have a data.json, too."""
    for path in _annotation_files(folder)[:1]:
        with path.open("rb") as file:
            head = file.read(65536)
        return b'"data_list"' in head and b'"data_root"' in head
    return False


@reads("anyword-3m", ("train",), _is_anyword, _CAPTIONED)
def anyword(folder: Path, split: str) -> Iterator[Entry]:
    """AnyWord-3M in the layout of tyxsspa/AnyText, t3_dataset.py and train.py.

    {laion, wukong_word/wukong_Nof5, ocr_data/<set>}/data_v1.1.json or data.json with data_root and data_list of
    img_name, caption, annotations (polygon, text, language, valid), wm_score; pictures, which are stretched to
    512 x 512, in imgs/. We leave out lines that are not valid.
    """
    for path in _annotation_files(folder):
        yield from _anyword_entries(path, "anyword-3m")


_is_benchmark = contains("laion_word/test1k.json", "wukong_word/test1k.json", "benchmark/*_word/test1k.json")


@reads("anytext-benchmark", ("laion_word", "wukong_word"), _is_benchmark, _CAPTIONED)
def anytext_benchmark(folder: Path, split: str) -> Iterator[Entry]:
    """AnyText-benchmark in the layout of tyxsspa/AnyText, eval/anytext_singleGPU.py.

    {laion_word, wukong_word}/test1k.json, in the form of AnyWord-3M's files; they are unpacked into benchmark/. The
    script does not say where the pictures are: we look in imgs/ beside the file. Like the script, we read the first 20
    lines of a picture and the first 20 characters of a line (its max_lines and max_chars).
    """
    name = f"{split}/test1k.json"
    return _anyword_entries(find(folder, name, f"benchmark/{name}"), "anytext-benchmark", longest=20)


def _anyword_entries(path: Path, source: str, longest: int | None = None) -> Iterator[Entry]:
    content, folder = read_json(path), path.parent
    root = str(content.get("data_root", ""))  # a path on the authors' machine, which users are told to edit
    given = [Path(root), folder / Path(root).name] if root else []
    images = next(path for path in (*given, folder / "imgs", folder) if path.is_dir())

    def make(index: int, item: dict[str, Any]) -> Record:
        name = text(item["img_name"])
        marks = [mark for mark in item.get("annotations", []) if mark["polygon"]]
        valid = [mark for mark in marks if mark.get("valid") is not False]
        lines = [(text(mark["text"])[:longest], pairs(chain(*mark["polygon"]))) for mark in valid[:longest]]
        # In AnyText's prompts "*" stands for a line of text; its training takes "*" out of captions. Few captions hold
        # the words: AnyText appends them, as we do, with one of ten phrases drawn at random (t3_dataset.py,
        # get_caption_pos).
        caption = str(item.get("caption", "")).replace("*", " ").strip()
        if caption and lines:
            caption += ", that reads " + ", ".join(f'"{word}"' for word, _ in lines)
        languages = tuple(mark.get("language", "") for mark in valid[:longest])
        extra = {"caption": caption, "part": folder.name, "ignored": len(marks) - len(valid), "languages": languages}
        extra |= {"wm_score": item["wm_score"]} if "wm_score" in item else {}
        return scene(f"{folder.name}/{name}", source, find(images, name), lines, extra, _SIZE)

    return list_entries(path, content["data_list"], make)


_COCO = ("cocotext.v2.json", "COCO_Text.json")
_ICDAR = {
    "test": ("ch4_test_images", "Challenge4_Test_Task1_GT"),
    "train": ("ch4_training_images", "ch4_training_localization_transcription_gt"),
}


@reads("coco-text", ("val", "train"), contains(*_COCO), _TASKS)
def coco_text(folder: Path, split: str) -> Iterator[Entry]:
    """COCO-Text in the layouts of andreasveit/coco-text, coco_text.py, and bgshih/cocotext (version 2).

    COCO_Text.json or cocotext.v2.json with imgs, anns, imgToAnns; COCO's train2014/<file_name>. We leave out illegible
    words.
    """
    path = find(folder, *_COCO)
    content = read_json(path)

    def make(key: str, image: dict[str, Any]) -> Record:
        name = text(image["file_name"])
        picture = find(folder, f"train2014/{name}", f"images/{name}", name)
        marks = [content["anns"][str(i)] for i in content["imgToAnns"].get(key, [])]
        legible = [m for m in marks if m.get("legibility") == "legible" and m.get("utf8_string", "").strip()]
        lines = [(mark["utf8_string"], _coco_outline(mark)) for mark in legible]
        return scene(key, "coco-text", picture, lines, {"ignored": len(marks) - len(legible)})

    for key, image in content["imgs"].items():
        if image.get("set") == split:
            yield f"{path}[imgs][{key}]", partial(make, key, image)


def _coco_outline(mark: dict[str, Any]) -> Polygon:
    """The mask of version 2 (x1, y1, ...), or the box of version 1 (left, top, width, height)."""
    if mark.get("mask"):
        return tuple(pairs(mark["mask"]))
    x, y, width, height = mark["bbox"]
    return corners((x, y, x + width, y + height))


@reads("icdar2015", tuple(_ICDAR), contains(*(images for images, _ in _ICDAR.values())), _TASKS)
def icdar2015(folder: Path, split: str) -> Iterator[Entry]:
    """ICDAR 2015 in the layout of rrc.cvc.uab.es/?ch=4 (tasks 1 and 4).

    ch4_{training,test}_images/img_N.jpg, ch4_training_localization_transcription_gt and
    Challenge4_Test_Task1_GT/gt_img_N.txt, UTF-8 with a byte order mark, x1,y1,x2,y2,x3,y3,x4,y4,transcription. We leave
    out words marked ###.
    """
    images, truths = (folder / name for name in _ICDAR[split])
    if not images.is_dir():
        raise FileNotFoundError(f"{images} does not exist")
    for picture in sorted(images.glob("img_*.jpg"), key=lambda path: (len(path.name), path.name)):
        yield str(picture), partial(_icdar_record, picture, truths / f"gt_{picture.stem}.txt")


def _icdar_record(picture: Path, truth: Path) -> Record:
    rows = []
    for line in filter(str.strip, read_text(truth, "utf-8-sig").splitlines()):
        rows.append(line.split(",", 8))  # the transcription may hold commas
        if len(rows[-1]) != 9:
            raise ValueError(f"{truth} has the line {quote(line)}, expected eight numbers and a transcription")
    lines = [(text(row[8]), pairs(map(float, row[:8]))) for row in rows if row[8] != "###"]
    return scene(picture.stem, "icdar2015", picture, lines, {"ignored": len(rows) - len(lines)})


@reads("textseg", ("train", "val", "test"), contains("semantic_label/*_maskfg.png"), _TASKS)
def textseg(folder: Path, split: str) -> Iterator[Entry]:
    """TextSeg in the layout of SHI-Labs/Rethinking-Text-Segmentation, lib/data_factory/ds_textseg.py.

    split.json, image/<tag>.jpg, semantic_label/<tag>_maskfg.png (100 is text), bpoly_label/<tag>_anno.json: by word,
    text, bbox (eight numbers) and char.
    """
    path = folder / "split.json"
    return list_entries(f"{path}[{split}]", read_json(path)[split], partial(_textseg_record, folder))


def _textseg_record(folder: Path, index: int, tag: str) -> Record:
    marks = read_json(find(folder, f"bpoly_label/{tag}_anno.json", f"annotation/{tag}_anno.json"))
    lines = [(text(mark["text"]), pairs(mark["bbox"])) for mark in marks.values()]
    extra = {"segmentation": find(folder, f"semantic_label/{tag}_maskfg.png")}
    return scene(tag, "textseg", find(folder, f"image/{text(tag)}.jpg"), lines, extra)


READERS = (mario_laion, anyword, anytext_benchmark, coco_text, icdar2015, textseg)
