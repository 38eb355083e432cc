import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from textharmony.config import GenerationSettings, PredictionSettings
from textharmony.data.readers import READERS
from textharmony.evaluate.benchmarks import BENCHMARKS, evaluate_benchmark, find_benchmark
from textharmony.evaluate.digests import digest_model
from textharmony.evaluate.fidelity import clip_score
from textharmony.evaluate.metrics import MEASURES
from textharmony.evaluate.run import load_rows
from textharmony.pipeline import TextHarmony


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_has_its_reader_and_measures(name: str) -> None:
    benchmark = BENCHMARKS[name]
    reader = READERS[benchmark.dataset]
    assert benchmark.split is None or benchmark.split in reader.splits
    assert benchmark.task in (reader.tasks or (None,))
    assert set(benchmark.measures) <= MEASURES.keys() and benchmark.samples >= 1
    assert find_benchmark(name) is benchmark
    if benchmark.task is not None:
        assert all(benchmark.task in MEASURES[measure].tasks for measure in benchmark.measures)


def paint(path: Path, text: str, size: tuple[int, int] = (128, 64)) -> None:
    picture = Image.new("RGB", size, "white")
    ImageDraw.Draw(picture).text((20, 12), text, fill="black", font=ImageFont.load_default(32))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


class Lines:
    """An OCR engine that reads the same lines in every picture."""

    name = "lines 1.0"

    def line(self, picture: Image.Image) -> str:
        return "HI"

    def lines(self, picture: Image.Image) -> list[str]:
        return ["HI", "OK"]


def evaluate(
    name: str, data: Path, out: Path, model: TextHarmony | None, samples: int | None = None, **options: Any
) -> dict[str, Any]:
    settings = PredictionSettings(samples=samples, generation=GenerationSettings(max_new_tokens=3))
    report = evaluate_benchmark(name, data, out, model, settings, "test", **{"ocr": Lines()} | options)
    found = json.loads((out / report.file("report.json")).read_text())
    assert isinstance(found, dict)
    return found


@pytest.fixture
def textvqa(tmp_path: Path) -> Path:
    """Three questions of TextVQA; the last one has nine answers, so it cannot be scored."""
    items = []
    for i, answers in enumerate((["cab"] * 10, ["7"] * 10, ["ok"] * 9)):
        paint(tmp_path / "TextVQA" / "train_images" / f"{i}.jpg", "CAB")
        items.append({"question_id": i, "question": "what is it", "image_id": f"{i}", "answers": answers})
    (tmp_path / "TextVQA" / "TextVQA_0.5.1_val.json").write_text(json.dumps({"data": items}))
    return tmp_path / "TextVQA"


def test_predictions_score_the_same_without_a_model(model: TextHarmony, textvqa: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = evaluate("textvqa", textvqa, out, model)
    assert report["means"].keys() == {"TextVQA accuracy", "containment", "containment, released"}
    assert report["means"]["TextVQA accuracy"]["count"] == 2
    assert [fault["where"] for fault in report["faults"]] == ["textvqa 2"]
    assert "9 answers, expected the answers of 10" in report["faults"][0]["reason"]
    before = {path.name: path.read_bytes() for path in out.glob("*.*")}
    (out / "report.md").unlink()
    evaluate("textvqa", textvqa, out, None)
    assert {path.name: path.read_bytes() for path in out.glob("*.*")} == before


def test_the_rows_are_what_is_scored(model: TextHarmony, textvqa: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    evaluate("textvqa", textvqa, out, model)
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    for row in rows:
        if "answer" in row:
            row["answer"] = {"0": "The cab!", "1": "8"}[row["id"]]
    (out / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    means = evaluate("textvqa", textvqa, out, None)["means"]
    assert [means[name]["sum"] for name in means] == [1, 1, 1] and means["containment"]["count"] == 2


def test_a_run_with_a_limit_is_continued(model: TextHarmony, textvqa: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert evaluate("textvqa", textvqa, out, model, limit=1)["records"] == 1
    assert evaluate("textvqa", textvqa, out, None)["missing"] == 2
    whole = evaluate("textvqa", textvqa, out, model)
    assert whole["missing"] == 0 and len(load_rows(out)) == 3
    assert evaluate("textvqa", textvqa, out, model, limit=2)["records"] == 2
    assert json.loads((out / "report.json").read_text()) == whole  # that of the first two has files of its own
    assert "](worst-first-2.png)" in (out / "report-first-2.md").read_text()
    assert (out / "worst-first-2.png").is_file() and (out / "worst.png").is_file()
    with pytest.raises(ValueError, match="limit is -1, expected at least 0"):
        evaluate("textvqa", textvqa, out, model, limit=-1)


def test_a_model_is_known_by_its_weights(
    model: TextHarmony, make_model: Callable[..., TextHarmony], textvqa: Path, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "model")
    loaded = TextHarmony.from_pretrained(tmp_path / "model")
    assert digest_model(loaded) == digest_model(model) == digest_model(copy.deepcopy(model))
    evaluate("textvqa", textvqa, tmp_path / "out", model)
    evaluate("textvqa", textvqa, tmp_path / "out", loaded)
    with pytest.raises(ValueError, match=r"predictions of test with model_digest .*: choose another --out"):
        evaluate("textvqa", textvqa, tmp_path / "out", make_model(1))
    assert len({digest_model(m) for m in (model, make_model(1), loaded.bfloat16(), make_model(inference_steps=3))}) == 4
    loaded.begin_image = torch.nn.Parameter(loaded.begin_image.to("meta"))
    with pytest.raises(ValueError, match="begin_image is offloaded, expected weights in memory"):
        digest_model(loaded)


def test_a_changed_picture_is_not_scored_by_the_old_answer(model: TextHarmony, textvqa: Path, tmp_path: Path) -> None:
    evaluate("textvqa", textvqa, tmp_path / "out", model)
    paint(textvqa / "train_images" / "1.jpg", "DOG")
    for asked in (model, None):
        with pytest.raises(ValueError, match="a prediction for textvqa 1 as the data were before"):
            evaluate("textvqa", textvqa, tmp_path / "out", asked)


def test_a_split_without_answers_is_predicted_and_not_scored(model: TextHarmony, textvqa: Path, tmp_path: Path) -> None:
    content = json.loads((textvqa / "TextVQA_0.5.1_val.json").read_text())
    (textvqa / "TextVQA_0.5.1_test.json").write_text(
        json.dumps({"data": [{k: v for k, v in item.items() if k != "answers"} for item in content["data"]]})
    )
    (textvqa / "train_images").rename(textvqa / "test_images")
    report = evaluate("textvqa", textvqa, tmp_path / "out", model, split="test")
    assert (report["records"], report["unscored"], report["means"]) == (3, 3, {})
    assert "Without an accepted answer, not scored: 3." in (tmp_path / "out" / "report.md").read_text()
    with pytest.raises(ValueError, match="not of textvqa, split val"):
        evaluate("textvqa", textvqa, tmp_path / "out", None)


@pytest.fixture
def anytext(tmp_path: Path) -> Path:
    """AnyText-benchmark's English part: two pictures, one of them with words that the tests' model can draw."""
    items = []
    for i, words in enumerate((["HI", "A1"], ["OK"])):
        paint(tmp_path / "laion_word" / "imgs" / f"{i}.jpg", " ".join(words), (512, 512))
        marks = [
            {"polygon": [[20, 12 + 50 * j], [120, 12 + 50 * j], [120, 52 + 50 * j], [20, 52 + 50 * j]], "text": word}
            for j, word in enumerate(words)
        ]
        items.append({"img_name": f"{i}.jpg", "caption": "a sign", "annotations": marks})
    content = {"data_root": "", "data_list": items}
    (tmp_path / "laion_word" / "test1k.json").write_text(json.dumps(content))
    return tmp_path


def test_drawing_by_four_samples(model: TextHarmony, anytext: Path, tmp_path: Path) -> None:
    report = evaluate("anytext-benchmark", anytext, tmp_path / "out", model)
    # 'a sign, that reads "HI", "A1"' quotes two words, and this model draws one.
    assert len(report["refused"]) == 4 and report["ocr"] == "lines 1.0"
    assert report["means"]["NED, AnyText"]["count"] == report["means"]["Sen.Acc, AnyText"]["count"] == 4 * 2 + 4 * 1
    assert report["means"]["NED, released"]["count"] == 2 + 1
    assert report["means"]["Sen.Acc, AnyText"]["sum"] == 4  # "OK", in each picture that was drawn
    assert report["all_drawings"] == {
        "FID": "needs --inception",
        "CLIP score": "needs --clip",
    }


def test_clip_score_of_what_was_drawn(model: TextHarmony, anytext: Path, clip: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = evaluate("anytext-benchmark", anytext, out, model, clip=clip, samples=2)
    drawn = [row for rows in load_rows(out).values() for row in rows if "picture" in row]
    assert len(drawn) == 2
    pairs = [(Image.open(out / row["picture"]), row["prompt"]) for row in drawn]
    assert report["all_drawings"]["CLIP score"] == pytest.approx(clip_score(pairs, clip))
    assert report["all_drawings"]["FID"] == "needs --inception"


def test_editing(model: TextHarmony, anytext: Path, tmp_path: Path) -> None:
    pytest.importorskip("rapidocr")
    report = evaluate("anytext-benchmark-edit", anytext, tmp_path / "out", model, samples=1, ocr=None)
    assert report["means"]["outside unchanged"] == {"mean": 1, "sum": 3, "count": 3} and not report["refused"]
    assert report["ocr"].startswith("rapidocr ")
    assert evaluate("anytext-benchmark-edit", anytext, tmp_path / "out", None, ocr=None) == report


def test_a_folder_of_mixed_tasks(model: TextHarmony, tmp_path: Path) -> None:
    paint(tmp_path / "a.png", "HI")
    common = {"prompt": '"HI" in red', "images": ["a.png"]}
    records = [
        common | {"task": "read", "texts": ["HI"]},
        common | {"task": "answer", "texts": ["HI"]},
        common | {"task": "locate", "words": ["HI"], "boxes": [[100, 100, 500, 500]]},
        common | {"task": "edit", "texts": ["HI"], "boxes": [[100, 100, 500, 500]], "target": "a.png"},
        common | {"task": "draw", "texts": ["HI"], "target": "a.png", "images": []},
    ]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    report = evaluate("folder", tmp_path, tmp_path / "out", model)
    assert {name: mean["count"] for name, mean in report["means"].items()} == {
        "ANLS": 2,
        "containment": 2,
        "containment, released": 2,
        "Acc@0.5": 1,
        "IoU": 1,
        "NED, AnyText": 2,
        "Sen.Acc, AnyText": 2,
        "NED, released": 2,
        "outside unchanged": 1,
    }


def test_locating(model: TextHarmony, tmp_path: Path) -> None:
    (tmp_path / "ch4_test_images").mkdir()
    paint(tmp_path / "ch4_test_images" / "img_1.jpg", "HI")
    truths = tmp_path / "Challenge4_Test_Task1_GT"
    truths.mkdir()
    (truths / "gt_img_1.txt").write_text("20,12,60,12,60,44,20,44,HI\n", encoding="utf-8-sig")
    report = evaluate("icdar2015-locate", tmp_path, tmp_path / "out", model)
    assert report["means"].keys() == {"Acc@0.5", "IoU"} and report["means"]["IoU"]["count"] == 1


def test_names_and_weights_are_checked_before_anything_runs(textvqa: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="benchmark is 'nothing', expected one of textvqa, docvqa"):
        evaluate("nothing", textvqa, tmp_path / "out", None)
    with pytest.raises(FileNotFoundError, match="expected a folder of transformers' CLIP"):
        evaluate("mario-eval", textvqa, tmp_path / "out", None, clip=tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"run\.json does not exist"):
        evaluate("textvqa", textvqa, tmp_path / "out", None)
    assert not (tmp_path / "out").exists()
