import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from textharmony.data.record import Record
from textharmony.evaluate.report import Mean, Report
from textharmony.evaluate.scoring import score
from textharmony.prompts import Task

Row = dict[str, Any]
WHITE = Image.new("RGB", (100, 50), "white")
BOX, HALF = (100.0, 200.0, 500.0, 800.0), (100.0, 200.0, 300.0, 800.0)


class Lines:
    """Another OCR engine: it knows what stands in a picture by the colour of its middle."""

    name = "lines 1.0"

    def lines(self, picture: Image.Image) -> list[str]:
        known = {(255, 0, 0): ["OPEN", "SHUT"], (0, 0, 255): ["open"], (255, 255, 255): []}
        return known[picture.getpixel((picture.width // 2, picture.height // 2))]  # type: ignore[index]

    def line(self, picture: Image.Image) -> str:
        return f"{picture.width}x{picture.height} " + " ".join(self.lines(picture))


def make(id: str, texts: tuple[str, ...] = (), task: Task = Task.COMPREHENSION, **fields: Any) -> Record:
    return Record(id, task, "test", "what", texts=texts, **({"images": (WHITE,)} | fields))


def row(id: str, sample: int = 0, **said: Any) -> tuple[tuple[str, int], Row]:
    return (id, sample), {"id": id, "sample": sample, "prompt": "what", **said}


def report_of(
    records: list[Record],
    rows: list[tuple[tuple[str, int], Row]],
    names: list[str],
    out: Path,
    group: str | None = None,
) -> Report:
    report = Report({"benchmark": "test", "model": "tiny", "split": None})
    score(records, dict(rows), names, out, report, Lines(), group)
    return report


def test_means_by_hand(tmp_path: Path) -> None:
    records = [make(id, ("abcd",), extra={"part": part}) for id, part in (("1", "x"), ("2", "y"), ("3", "x"))]
    rows = [row("1", answer="abcd"), row("2", answer="abcx"), row("3", answer="so abcd it is")]
    report = report_of(records, rows, ["ANLS", "containment"], tmp_path, "part")
    assert report.means == {"ANLS": Mean(1.75, 3), "containment": Mean(2, 3)}
    assert report.groups == {
        "x": {"ANLS": Mean(1, 2), "containment": Mean(2, 2)},
        "y": {"ANLS": Mean(0.75, 1), "containment": Mean(0, 1)},
    }
    assert report.means["ANLS"].value == pytest.approx(1.75 / 3)
    assert [(item["id"], item["score"]) for item in report.worst] == [("3", 0), ("2", 0.75), ("1", 1)]
    assert report.records == 3 and report.ocr is None and not report.faults and not report.refused


def test_what_does_not_count_and_what_counts_as_wrong(tmp_path: Path) -> None:
    records = [
        make("fault", ("a",)),
        make("refused", ("a",)),
        make("no gold"),
        make("missing", ("a",)),
        make("1", ("a",)),
    ]
    rows = [
        row("fault", fault="no picture"),
        row("refused", refused="too long"),
        row("no gold", answer="b"),
        row("1", answer="a"),
        row("not in the data", answer="a"),
    ]
    report = report_of(records, rows, ["containment"], tmp_path)
    assert report.means == {"containment": Mean(1, 2)}
    assert (report.records, report.missing, report.unscored) == (5, 1, 1)
    assert [str(fault) for fault in report.faults] == ["test fault: no picture"]
    assert [str(fault) for fault in report.refused] == ["test refused, sample 0: too long"]
    assert [item["id"] for item in report.worst] == ["refused", "1"]


def test_places_are_ranked_by_overlap_among_the_wrong(tmp_path: Path) -> None:
    records = [make(id, task=Task.PERCEPTION, boxes=(BOX,), words=("a",)) for id in "123"]
    rows = [row("1", boxes=[[100, 200, 200, 800]]), row("2", boxes=[list(HALF)]), row("3", boxes=[])]
    report = report_of(records, rows, ["Acc@0.5", "IoU"], tmp_path)
    assert report.means == {"Acc@0.5": Mean(1, 3), "IoU": Mean(0.75, 3)}
    assert [item["id"] for item in report.worst] == ["3", "1", "2"]
    picture = np.asarray(report.cells[2][0])
    for color in ((0, 128, 0), (255, 0, 0)):  # the gold's box, and what was said
        assert (picture == color).all(-1).any()


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    for name in ("red", "blue", "white"):
        Image.new("RGB", (100, 50), name).save(tmp_path / "pictures" / f"{name}.png")
    return tmp_path


def test_drawings_are_read_as_a_whole_and_every_line_counts(drawn: Path) -> None:
    records = [
        make("1", ("SHUT", "OPEN"), Task.GENERATION, images=()),
        make("2", ("OPEN",), Task.GENERATION, images=()),
        make("3", (), Task.GENERATION, images=()),
    ]
    rows = [
        row("1", 0, picture="pictures/red.png"),
        row("1", 1, picture="pictures/white.png"),
        row("2", 0, picture="pictures/blue.png"),
        row("3", 0, picture="pictures/red.png"),
    ]
    report = report_of(records, rows, ["NED, AnyText", "Sen.Acc, AnyText", "NED, released"], drawn)
    assert report.means["Sen.Acc, AnyText"] == Mean(2, 5)
    assert (
        report.means["NED, AnyText"].value == pytest.approx(2 / 5, abs=1e-5) and report.means["NED, AnyText"].count == 5
    )
    assert (
        report.means["NED, released"].value == pytest.approx(1, abs=1e-5) and report.means["NED, released"].count == 3
    )
    assert report.ocr == "lines 1.0" and [item["said"] for item in report.worst] == [" / ", "open", "SHUT / OPEN"]


def test_edits_are_read_in_their_box_upright(drawn: Path) -> None:
    wide, high = BOX, (400.0, 0.0, 600.0, 999.0)
    records = [make(id, ("x",), Task.EDITING, boxes=(box,)) for id, box in (("wide", wide), ("high", high))]
    rows = [row(id, picture="pictures/blue.png") for id in ("wide", "high")]
    report = report_of(records, rows, ["Sen.Acc, AnyText", "outside unchanged"], drawn)
    assert [item["said"] for item in report.worst] == ["41x31 open", "50x21 open"]
    assert report.means["outside unchanged"] == Mean(0, 2)


def test_another_prompt_is_another_benchmark(tmp_path: Path) -> None:
    rows = [row("1", answer="a")]
    rows[0][1]["prompt"] = "who"
    with pytest.raises(ValueError, match="test 1 was predicted of the prompt 'who', not of 'what'"):
        report_of([make("1", ("a",))], rows, ["ANLS"], tmp_path)


def test_the_report_is_written_and_is_the_same_again(drawn: Path) -> None:
    records = [make(f"{i}", (f"a|b\n{i}<",), extra={"part": "p|q"}) for i in range(30)]
    rows = [row(f"{i}", answer=f"a|b\n{i % 20}<" if i % 2 else "漢字 *") for i in range(30)]
    written = []
    for name in ("a", "b"):
        out = drawn / name
        out.mkdir()
        report_of(records, rows, ["ANLS", "containment"], out, "part").write(out)
        written.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert written[0] == written[1] and written[0].keys() == {"report.md", "report.json", "worst.png"}
    content = json.loads(written[0]["report.json"])
    assert content["means"]["containment"] == {"mean": 1 / 3, "sum": 10, "count": 30}
    assert content["groups"]["p|q"]["containment"]["sum"] == 10
    assert len(content["worst"]) == 24 and [item["score"] for item in content["worst"][:15]] == [0] * 15
    text = written[0]["report.md"].decode()
    assert "| containment | 33.33% | 10 | 30 | lower-cased gold in the answer |" in text
    rows_of_worst = [line for line in text.splitlines() if "a\\|b" in line]
    assert len(rows_of_worst) == 24 and all(line.replace("\\|", "").count("|") == 6 for line in rows_of_worst)
    assert Image.open(drawn / "a" / "worst.png").size[0] > 4 * 300


def test_the_sheet_shows_the_picture_that_was_asked_about(tmp_path: Path) -> None:
    picture = Image.new("RGB", (64, 200), "white")
    ImageDraw.Draw(picture).text((4, 4), "HI", fill="red", font=ImageFont.load_default(30))
    report = report_of([make("1", ("HI",), images=(picture,))], [row("1", answer="HO")], ["ANLS"], tmp_path)
    ((cell, caption),) = report.cells
    assert cell.size == (300, 300) and caption == "0.50 HO | HI"
    assert cell.getpixel((0, 150)) == (211, 211, 211) and cell.getpixel((150, 290)) == (255, 255, 255)
