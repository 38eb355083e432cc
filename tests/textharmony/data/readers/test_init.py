import os
import re
from pathlib import Path

import pytest

from textharmony.data.faults import Faults, TooManyFaults
from textharmony.data.readers import READERS, detect, read_dataset


def test_names_and_splits() -> None:
    asked_for = {
        "mario-laion", "docstruct4m", "anyword-3m", "textvqa", "docvqa", "infovqa", "chartqa", "tabfact", "wtq",
        "ocrbench", "coco-text", "icdar2015", "textseg", "anytext-benchmark", "mario-eval", "detailedtextcaps",
    }  # fmt: skip
    assert asked_for <= set(READERS)
    assert all(reader.name == name and reader.splits and reader.layout for name, reader in READERS.items())


def test_what_is_asked_for_in_vain_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data set is 'imagenet', expected one of mario-laion"):
        read_dataset("imagenet", tmp_path)
    with pytest.raises(ValueError, match="split of textvqa is 'dev', expected one of val, train, test"):
        read_dataset("textvqa", tmp_path, "dev")
    with pytest.raises(ValueError, match="view of textvqa is 'edit', expected None"):
        read_dataset("textvqa", tmp_path, view="edit")
    with pytest.raises(ValueError, match="view of icdar2015 is 'draw', expected read or locate or edit"):
        read_dataset("icdar2015", tmp_path, view="draw")
    with pytest.raises(FileNotFoundError, match="absent is not a folder"):
        read_dataset("textvqa", tmp_path / "absent")


def test_annotations_that_are_no_json_name_their_file(tmp_path: Path) -> None:
    (tmp_path / "TextVQA_0.5.1_val.json").write_text('{"data": [')
    with pytest.raises(ValueError, match=r"TextVQA_0\.5\.1_val\.json is not JSON"):
        list(read_dataset("textvqa", tmp_path))


def test_an_empty_folder_is_no_data_set(tmp_path: Path) -> None:
    assert detect(tmp_path) == []


def test_a_tar_beside_a_data_set_is_what_it_was_unpacked_from(tmp_path: Path, dump) -> None:
    (tmp_path / "imgs.tar.gz").write_bytes(b"")
    assert detect(tmp_path) == ["shards"]
    dump(tmp_path / "struct_aware_parse.jsonl", [])
    assert detect(tmp_path) == ["docstruct4m"]


def test_text_that_utf8_cannot_hold_and_endless_brackets_are_faults(tmp_path: Path, paint) -> None:
    paint(tmp_path / "a.png")
    head = b'{"task": "generation", "target": "a.png", "prompt": "'
    lines = [head + b'\\ud800"}', head + b'\xff"}', b"[" * 200000, head + b'fine"}']
    (tmp_path / "records.jsonl").write_bytes(b"\n".join(lines))
    faults = Faults()
    assert [record.prompt for record in read_dataset("folder", tmp_path, faults=faults)] == ["fine"]
    assert len(faults.listed) == 3


def test_past_the_threshold_the_reading_stops(tmp_path: Path, dump) -> None:
    dump(tmp_path / "records.jsonl", [{"task": "generation"}] * 30)
    with pytest.raises(TooManyFaults, match=r"21 of 21 records are corrupt, at most 1\.00%"):
        list(read_dataset("folder", tmp_path))
    faults = Faults(max_share=1)
    assert list(read_dataset("folder", tmp_path, faults=faults)) == []
    assert len(faults.listed) == 30


DOCS = Path(__file__).parents[4] / "docs" / "data.md"


def test_the_docs_table_tells_of_every_reader() -> None:
    rows = [line.split("|")[1:4] for line in DOCS.read_text().splitlines() if line.startswith("| `")]
    told = {}
    for names, splits, views in rows:
        for name in names.replace("`", "").split(","):
            told[name.strip()] = (splits.strip(), views.strip())
    assert set(told) == set(READERS)
    for name, reader in READERS.items():
        assert told[name][1] == ", ".join(reader.views)
        assert name == "mario-eval" or told[name][0] == ", ".join(reader.splits)


def test_the_docs_code_runs(
    tmp_path: Path, paint, dump, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paint(tmp_path / "TextVQA" / "train_images" / "a.jpg")
    question = {"question": "q?", "image_id": "a", "question_id": 1, "answers": ["x"]}
    dump(tmp_path / "TextVQA" / "TextVQA_0.5.1_train.json", {"data": [question]})
    paint(tmp_path / "AnyWord-3M" / "laion" / "imgs" / "a.jpg", (512, 512))
    mark = {"polygon": [[9, 9], [99, 9], [99, 99]], "text": "A", "language": "Latin", "valid": True}
    items = [{"img_name": "a.jpg", "caption": "a", "annotations": [mark]}]
    dump(tmp_path / "AnyWord-3M" / "laion" / "data_v1.1.json", {"data_root": "", "data_list": items})
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    exec(compile(code, str(DOCS), "exec"), {})
    assert capsys.readouterr().out == "1\n"


def test_detecting_does_not_walk_through_a_large_data_set(
    tmp_path: Path, paint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MARIO-LAION has millions of folders in its tens of thousands of parts."""
    for part in range(20):
        for item in range(20):
            (tmp_path / f"{part:05}" / f"{part:05}{item:04}").mkdir(parents=True)
    (tmp_path / "00000" / "000000000" / "ocr.txt").write_text("")
    listed: list[str] = []
    scandir = os.scandir

    def counting(path: str | os.PathLike[str] = ".") -> object:
        listed.append(os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", counting)
    list(os.scandir(tmp_path))
    assert detect(tmp_path) == ["mario-laion"]
    parts = [path for path in listed if Path(path).parent == tmp_path]
    assert len(listed) > 1 and len(parts) <= 3, f"{len(parts)} of 20 parts were listed"
