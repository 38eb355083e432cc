import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from textharmony.data.record import Record
from textharmony.evaluate.digests import digest_record
from textharmony.evaluate.report import Report, score
from textharmony.prompts import Task

Row = dict[str, Any]
WHITE = Image.new("RGB", (100, 50), "white")
BOX, HALF = (100.0, 200.0, 500.0, 800.0), (100.0, 200.0, 300.0, 800.0)


class Lines:
    """Another OCR engine: it knows the text of a picture by the colour in its middle."""

    name = "lines 1.0"

    def lines(self, picture: Image.Image) -> list[str]:
        known = {(255, 0, 0): ["OPEN", "SHUT"], (0, 0, 255): ["open"], (255, 255, 255): []}
        return known[picture.getpixel((picture.width // 2, picture.height // 2))]  # type: ignore[index]

    def line(self, picture: Image.Image) -> str:
        return f"{picture.width}x{picture.height} " + " ".join(self.lines(picture))


def make(id: str, texts: tuple[str, ...] = (), task: Task = Task.ANSWER, **fields: Any) -> Record:
    return Record(id, task, "test", "what", texts=texts, **({"images": (WHITE,)} | fields))


def row(id: str, sample: int = 0, **result: Any) -> Row:
    return {"id": id, "sample": sample, "prompt": "what", **result}


def report_of(
    records: list[Record], rows: list[Row], measures: list[str], out: Path, group: str | None = None
) -> Report:
    out.mkdir(exist_ok=True)
    digests = {record.id: digest_record(record) for record in records}
    rows = [{"record": digests.get(row["id"]), **row} for row in rows]
    (out / "run.json").write_text(json.dumps({"benchmark": "test", "model": "tiny", "split": None}))
    (out / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return score(records, out, measures, Lines(), group)


def test_scores_by_hand(tmp_path: Path) -> None:
    records = [make(id, ("abcd",), extra={"part": part}) for id, part in (("1", "x"), ("2", "y"), ("3", "x"))]
    rows = [row("1", answer="abcd"), row("2", answer="abcx"), row("3", answer="so abcd it is")]
    report = report_of(records, rows, ["ANLS", "containment"], tmp_path, "part")
    assert report.scores == {"ANLS": [1, 0.75, 0], "containment": [1, 0, 1]}
    assert report.groups == {"x": {"ANLS": [1, 0], "containment": [1, 1]}, "y": {"ANLS": [0.75], "containment": [0]}}
    means = report.to_dict()["means"]
    assert means["ANLS"] == {"mean": pytest.approx(1.75 / 3), "sum": 1.75, "count": 3}
    assert report.to_dict()["groups"]["y"]["containment"] == {"mean": 0, "sum": 0, "count": 1}
    assert [(item["id"], item["score"]) for item in report.worst] == [("3", 0), ("2", 0.75), ("1", 1)]
    assert report.records == 3 and report.ocr is None and not report.faults and not report.refused


def test_reading_and_answering_have_the_same_measures(tmp_path: Path) -> None:
    records = [make("read", ("a",), Task.READ), make("answer", ("b",))]
    rows = [row("read", answer="a"), row("answer", answer="a")]
    assert report_of(records, rows, ["ANLS", "IoU"], tmp_path).scores == {"ANLS": [1, 0]}


def test_which_predictions_count(tmp_path: Path) -> None:
    records = [make("fault", ("a",)), make("refused", ("a",)), make("no gold"), make("missing", ("a",))]
    rows = [
        row("fault", fault="no picture"),
        row("refused", refused="too long"),
        row("no gold", answer="b"),
        row("1", answer="a"),
        row("not in the data", answer="a"),
    ]
    report = report_of([*records, make("1", ("a",))], rows, ["containment"], tmp_path)
    assert report.scores == {"containment": [0, 1]}
    assert (report.records, report.missing, report.unscored) == (5, 1, 1)
    assert [str(fault) for fault in report.faults] == ["test fault: no picture"]
    assert [str(fault) for fault in report.refused] == ["test refused, sample 0: too long"]
    assert [item["id"] for item in report.worst] == ["refused", "1"]
    summary = "\n".join(report.summary())
    for line in (
        "Records: 5.",
        "Not predicted yet: 1.",
        "Without an accepted answer, not scored: 1.",
        "Corrupt, not scored: 1.",
        "Refused by the model, scored as wrong: 1.",
    ):
        assert line in summary


def test_boxes_are_ranked_by_overlap_among_the_wrong_ones(tmp_path: Path) -> None:
    records = [make(id, task=Task.LOCATE, boxes=(BOX,), words=("a",)) for id in "123"]
    rows = [row("1", boxes=[[100, 200, 200, 800]]), row("2", boxes=[list(HALF)]), row("3", boxes=[])]
    report = report_of(records, rows, ["Acc@0.5", "IoU"], tmp_path)
    assert report.scores == {"Acc@0.5": [0, 1, 0], "IoU": [0.25, 0.5, 0]}
    assert [item["id"] for item in report.worst] == ["3", "1", "2"]
    assert report.worst[2]["prediction"] == "(100,200)(300,800)" and report.worst[2]["gold"] == "(100,200)(500,800)"
    picture = np.asarray(report.cells[2][0])
    for color in ((0, 128, 0), (255, 0, 0)):  # the gold box, and the predicted one
        assert (picture == color).all(-1).any()


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    for name in ("red", "blue", "white"):
        Image.new("RGB", (100, 50), name).save(tmp_path / "pictures" / f"{name}.png")
    return tmp_path


def test_drawings_are_read_as_a_whole_and_every_line_counts(drawn: Path) -> None:
    golds = {"1": ("SHUT", "OPEN"), "2": ("OPEN",), "3": ()}
    records = [make(id, texts, Task.DRAW, images=()) for id, texts in golds.items()]
    rows = [
        row("1", 0, picture="pictures/red.png"),
        row("1", 1, picture="pictures/white.png"),
        row("2", 0, picture="pictures/blue.png"),
        row("3", 0, picture="pictures/red.png"),
    ]
    report = report_of(records, rows, ["NED, AnyText", "Sen.Acc, AnyText", "NED, released"], drawn)
    assert report.scores["Sen.Acc, AnyText"] == [1, 1, 0, 0, 0]
    assert report.scores["NED, AnyText"] == pytest.approx([1, 1, 0, 0, 0], abs=1e-5)
    assert report.scores["NED, released"] == pytest.approx([1, 1, 1], abs=1e-5)
    assert report.ocr == "lines 1.0" and [item["prediction"] for item in report.worst] == [" / ", "open", "SHUT / OPEN"]
    assert [(record.id, path.stem) for record, path in report.drawings] == [
        ("1", "red"),
        ("1", "white"),
        ("2", "blue"),
        ("3", "red"),
    ]


def test_edits_are_read_in_their_box_and_upright(drawn: Path) -> None:
    wide, high = BOX, (400.0, 0.0, 600.0, 999.0)
    records = [make(id, ("x",), Task.EDIT, boxes=(box,)) for id, box in (("wide", wide), ("high", high))]
    rows = [row(id, picture="pictures/blue.png") for id in ("wide", "high")]
    report = report_of(records, rows, ["Sen.Acc, AnyText", "outside unchanged"], drawn)
    assert [item["prediction"] for item in report.worst] == ["41x31 open", "50x21 open"]
    assert report.scores["outside unchanged"] == [0, 0] and report.drawings == []


@pytest.mark.parametrize("old", ["another digest", None])
def test_predictions_for_other_data_are_not_scored(tmp_path: Path, old: str | None) -> None:
    rows = [row("1", answer="a", record=old) | {"prompt": "who"}]
    with pytest.raises(ValueError, match="test 1 as the data were before: its prompt was 'who'"):
        report_of([make("1", ("a",))], rows, ["ANLS"], tmp_path)


def test_the_report_is_written_and_is_the_same_again(tmp_path: Path) -> None:
    records = [make(f"{i}", (f"a|b\n{i}<",), extra={"part": "p|q"}) for i in range(30)]
    rows = [row(f"{i}", answer=f"a|b\n{i % 20}<" if i % 2 else "漢字 *") for i in range(30)]
    written = []
    for name in ("a", "b"):
        out = tmp_path / name
        report_of(records, rows, ["ANLS", "containment"], out, "part").write(out)
        written.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert written[0] == written[1]
    assert written[0].keys() == {"run.json", "predictions.jsonl", "report.md", "report.json", "worst.png"}
    content = json.loads(written[0]["report.json"])
    assert content["means"]["containment"] == {"mean": 1 / 3, "sum": 10, "count": 30}
    assert content["groups"]["p|q"]["containment"]["sum"] == 10
    assert len(content["worst"]) == 24 and [item["score"] for item in content["worst"][:15]] == [0] * 15
    text = written[0]["report.md"].decode()
    assert "| containment | 33.33% | 10 | 30 | the answer contains the gold, in lower case |" in text
    assert "| p\\|q | containment | 33.33% | 10 | 30 |" in text
    rows_of_worst = [line for line in text.splitlines() if "a\\|b" in line]
    assert len(rows_of_worst) == 24 and all(line.replace("\\|", "").count("|") == 6 for line in rows_of_worst)
    assert Image.open(tmp_path / "a" / "worst.png").size[0] > 4 * 300


def test_the_sheet_shows_the_picture_that_was_asked_about(tmp_path: Path) -> None:
    picture = Image.new("RGB", (64, 200), "white")
    ImageDraw.Draw(picture).text((4, 4), "HI", fill="red", font=ImageFont.load_default(30))
    report = report_of([make("1", ("HI",), images=(picture,))], [row("1", answer="HO")], ["ANLS"], tmp_path)
    ((cell, caption),) = report.cells
    assert cell.size == (300, 300) and caption == "0.50 HO | HI"
    assert cell.getpixel((0, 150)) == (211, 211, 211) and cell.getpixel((150, 290)) == (255, 255, 255)


def test_long_lists_of_faults_are_cut(tmp_path: Path) -> None:
    records = [make(f"{i}", ("a",)) for i in range(23)]
    report = report_of(records, [row(record.id, fault="no picture") for record in records], ["ANLS"], tmp_path)
    text = report.markdown()
    assert "Corrupt, not scored: 23." in text and text.count("no picture") == 20 and "- and 3 more" in text
