import re
import sys
from pathlib import Path
from typing import Any

import pytest

from textharmony.data.faults import Faults, TooManyFaults
from textharmony.data.readers import READERS, detect, read_dataset
from textharmony.prompts import Task


def test_every_reader_has_its_name_splits_and_layout() -> None:
    expected = {
        "mario-laion", "docstruct4m", "anyword-3m", "textvqa", "docvqa", "infovqa", "chartqa", "tabfact", "wtq",
        "ocrbench", "coco-text", "icdar2015", "textseg", "anytext-benchmark", "mario-eval", "detailedtextcaps",
    }  # fmt: skip
    assert expected <= set(READERS)
    assert all(reader.name == name and reader.splits and reader.layout for name, reader in READERS.items())


def test_unknown_names_splits_and_tasks_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data set is 'imagenet', expected one of mario-laion"):
        read_dataset("imagenet", tmp_path)
    with pytest.raises(ValueError, match="split of textvqa is 'dev', expected one of val, train, test"):
        read_dataset("textvqa", tmp_path, "dev")
    with pytest.raises(ValueError, match="task of textvqa is 'edit', expected None"):
        read_dataset("textvqa", tmp_path, task=Task.EDIT)
    with pytest.raises(ValueError, match="task of icdar2015 is 'draw', expected read or locate or edit"):
        read_dataset("icdar2015", tmp_path, task=Task.DRAW)
    with pytest.raises(FileNotFoundError, match="absent is not a folder"):
        read_dataset("textvqa", tmp_path / "absent")


def test_an_error_in_json_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "TextVQA_0.5.1_val.json").write_text('{"data": [')
    with pytest.raises(ValueError, match=r"TextVQA_0\.5\.1_val\.json is not JSON"):
        list(read_dataset("textvqa", tmp_path))


def test_an_empty_folder_is_no_data_set(tmp_path: Path) -> None:
    assert detect(tmp_path) == []


def test_tar_files_beside_a_data_set_are_not_shards(tmp_path: Path, dump) -> None:
    (tmp_path / "imgs.tar.gz").write_bytes(b"")
    assert detect(tmp_path) == ["shards"]
    dump(tmp_path / "struct_aware_parse.jsonl", [])
    assert detect(tmp_path) == ["docstruct4m"]


def test_text_that_utf8_cannot_hold_and_endless_brackets_are_faults(tmp_path: Path, paint) -> None:
    paint(tmp_path / "a.png")
    head = b'{"task": "draw", "target": "a.png", "prompt": "'
    lines = [head + b'\\ud800"}', head + b'\xff"}', b"[" * 200000, head + b'fine"}']
    (tmp_path / "records.jsonl").write_bytes(b"\n".join(lines))
    faults = Faults(max_share=1)
    assert [record.prompt for record in read_dataset("folder", tmp_path, faults=faults)] == ["fine"]
    assert len(faults.listed) == 3


def test_reading_stops_past_the_threshold(tmp_path: Path, dump) -> None:
    dump(tmp_path / "records.jsonl", [{"task": "draw"}] * 30)
    with pytest.raises(TooManyFaults, match=r"5 of 5 records are corrupt, at most 1\.00%"):
        list(read_dataset("folder", tmp_path))
    faults = Faults(max_share=1)
    assert list(read_dataset("folder", tmp_path, faults=faults)) == []
    assert len(faults.listed) == 30


DOCS = Path(__file__).parents[4] / "docs" / "data.md"


def test_annotations_in_another_layout_name_the_expected_one(tmp_path: Path, dump) -> None:
    dump(tmp_path / "TextVQA_0.5.1_val.json", {"questions": []})
    with pytest.raises(
        ValueError, match=r"is not laid out as textvqa: KeyError 'data'\. Expected: TextVQA in the layout"
    ):
        list(read_dataset("textvqa", tmp_path))
    dump(tmp_path / "TextVQA_0.5.1_val.json", {"data": {}})
    with pytest.raises(ValueError, match=r"TextVQA_0\.5\.1_val\.json holds dict, expected a list"):
        list(read_dataset("textvqa", tmp_path))


def test_every_reader_tells_where_its_layout_is_documented() -> None:
    """A repository, a site, or ours."""
    for reader in READERS.values():
        assert re.search(r"\w/[\w-]+|\w\.\w+/|of ours|textharmony", reader.layout), reader.name


def test_the_table_in_the_docs_has_every_reader() -> None:
    _, table = DOCS.read_text().split("## Data sets")
    rows = [line.split("|")[1:4] for line in table.splitlines() if line.startswith("| `")]
    listed = {}
    for names, splits, tasks in rows:
        for name in names.replace("`", "").split(","):
            listed[name.strip()] = (splits.strip(), tasks.strip())
    assert set(listed) == set(READERS)
    for name, reader in READERS.items():
        assert listed[name][1] == ", ".join(task.value for task in reader.tasks)
        assert name == "mario-eval" or listed[name][0] == ", ".join(reader.splits)


def test_the_code_in_the_docs_runs(
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
    assert capsys.readouterr().out in ("0 textvqa answer (200, 100)\n", "0 anyword-3m edit (512, 512)\n")


def test_the_record_in_the_docs_is_read(tmp_path: Path, paint) -> None:
    paint(tmp_path / "a.png")
    (line,) = re.findall(r"```json\n(.*?)```", DOCS.read_text(), re.DOTALL)
    (tmp_path / "records.jsonl").write_text(line)
    (record,) = read_dataset("folder", tmp_path)
    assert (record.task, record.words, record.load().size) == (Task.LOCATE, ("OPEN",), (200, 100))


def test_detecting_does_not_walk_through_a_large_data_set(tmp_path: Path) -> None:
    """MARIO-LAION has millions of folders in its tens of thousands of parts."""
    for part in range(20):
        for item in range(20):
            (tmp_path / f"{part:05}" / f"{part:05}{item:04}").mkdir(parents=True)
    (tmp_path / "00000" / "000000000" / "ocr.txt").write_text("")
    watched: list[list[str]] = [[]]

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("os.listdir", "os.scandir") and watched:
            watched[0].append(str(arguments[0]))

    sys.addaudithook(note)  # it cannot be removed, so it ends when nobody watches
    assert detect(tmp_path) == ["mario-laion"]
    listed = watched.pop()
    parts = [path for path in listed if Path(path).parent == tmp_path and Path(path).is_dir()]
    assert len(listed) > 1 and len(parts) <= 3, f"{len(parts)} of 20 parts were listed"
