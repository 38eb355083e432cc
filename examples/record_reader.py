"""Records of your own: write a folder of them, check it, read it, and let the embedded model answer."""

import json
import tempfile
from pathlib import Path

from textharmony import Request, Task, TextHarmony
from textharmony.data.check import check_folder
from textharmony.data.readers import read_dataset

model = TextHarmony.from_pretrained("tiny")
with tempfile.TemporaryDirectory() as directory:
    folder = Path(directory)
    records = []
    for number, word in enumerate(["OPEN", "CAFE"]):
        model.draw(f'"{word}" in red on white', seed=number).save(folder / f"{word}.png")
        records.append({"task": "read", "prompt": "read all the text", "images": [f"{word}.png"], "texts": [word]})
    records.append(
        {"task": "answer", "prompt": "how many characters are there", "images": ["OPEN.png"], "texts": ["4"]}
    )
    records.append({"task": "answer", "prompt": "what color is the text", "images": ["gone.png"], "texts": ["red"]})
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    for report in check_folder(folder, "folder"):  # as `textharmony data check FOLDER` does
        print("\n".join(report.lines()))

    found = list(read_dataset("folder", folder))  # the record without its picture is skipped, and counted
    answers = model.perform([Request(record.task, record.prompt, record.images[0]) for record in found])
    for record, answer in zip(found, answers):
        assert record.task in (Task.READ, Task.ANSWER)
        print(f"{record.id}: {record.prompt!r} -> {answer!r}, expected {record.texts[0]!r}")
