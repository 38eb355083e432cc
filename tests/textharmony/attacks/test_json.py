"""Broken, deep, huge and misleading JSON: one short line that names the file."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from textharmony.config import ModelConfig
from textharmony.data.faults import Faults
from textharmony.data.loading import load_sources
from textharmony.data.readers import read_dataset
from textharmony.manifest import write_manifest
from textharmony.model.checkpoint import require_possible
from textharmony.pipeline import TextHarmony
from textharmony.presets import MODELS, TINY

DEEP = b"[" * 200_000
RECORD = b'{"task": "draw", "prompt": "a sign", "target": "a.png"'
LOCATE = b'{"task": "locate", "prompt": "a", "images": ["a.png"], "words": ["a"]'
LINES = {
    "deep": DEEP,
    "deep in a field": RECORD + b', "extra": ' + DEEP,
    "NaN": RECORD + b', "extra": {"x": NaN}}',
    "infinity": LOCATE + b', "boxes": [[0, 0, 1, Infinity]]}',
    "a name twice": RECORD + b', "target": "b.png"}',
    "a huge int": LOCATE + b', "boxes": [[0, 0, 1, 1' + b"0" * 4000 + b"]]}",
    "an int that is too long": RECORD + b', "id": ' + b"9" * 10_000 + b"}",
    "a number for a name": b'{"task": "draw", "prompt": "a sign", "target": 3}',
    "a number for a prompt": b'{"task": "draw", "prompt": 3, "target": "a.png"}',
    "an object for a task": b'{"task": {"draw": 1}, "prompt": "a", "target": "a.png"}',
    "a list for the record": b'[{"task": "draw"}]',
    "not UTF-8": b'{"task": "draw", "prompt": "\xff\xfe", "target": "a.png"}',
    "UTF-16": '{"task": "draw", "prompt": "a", "target": "b.png"}'.encode("utf-16"),
    "half a surrogate pair": b'{"task": "draw", "prompt": "\\ud83d", "target": "a.png"}',
    "a null in a path": b'{"task": "draw", "prompt": "a", "target": "a\\u0000.png"}',
    "a megabyte for a path": b'{"task": "draw", "prompt": "a", "target": "' + b"x" * 2**20 + b'"}',
    "a megabyte for a box": LOCATE + b', "boxes": ["' + b"x" * 2**20 + b'"]}',
    "a megabyte for an id": RECORD + b', "id": "' + b"x" * 2**20 + b'"}',
    "a prompt of two megabytes": b'{"task": "draw", "target": "a.png", "prompt": "' + b"x" * 2**21 + b'"}',
    "a line of seventeen megabytes": RECORD + b" " * (17 << 20) + b"}",
}  # fmt: skip


def test_each_wrong_line_is_one_short_fault(tmp_path: Path, paint: Callable[..., Path]) -> None:
    paint(tmp_path / "a.png")
    (tmp_path / "records.jsonl").write_bytes(b"".join(line + b"\n" + RECORD + b"}\n" for line in LINES.values()))
    faults = Faults(max_share=1.0)
    good = list(read_dataset("folder", tmp_path, faults=faults))
    # The newline of UTF-16 is half of its line break, so that its end is a line of its own.
    assert len(good) == len(LINES)
    named = [fault.where.rpartition(":")[2] for fault in faults.listed]
    assert named == [str(2 * i + 1) for i in range(len(LINES))]
    for fault, name in zip(faults.listed, LINES, strict=True):
        assert fault.where.startswith(str(tmp_path / "records.jsonl:")) and 0 < len(fault.reason) < 500, (name, fault)


@pytest.mark.parametrize(
    "content", [b"", b"{", DEEP, b"\xff", b'{"a": NaN}', b"[1]"], ids=lambda content: str(content[:9])
)
def test_a_file_of_annotations_or_sources(tmp_path: Path, content: bytes) -> None:
    for name, reader in (("OCRBench/OCRBench.json", "ocrbench"), ("cocotext.v2.json", "coco-text")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            list(read_dataset(reader, tmp_path, faults=Faults(grace=0, max_share=0)))
        assert str(tmp_path) in str(error.value) and len(str(error.value)) < 700
    (tmp_path / "sources.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"sources\.json") as error:
        load_sources(tmp_path / "sources.json")
    assert len(str(error.value)) < 500


# Configurations of models


def changed(part: str, **changes: object) -> dict[str, object]:
    return {part: {**TINY.to_dict()[part], **changes}}


REFUSED = {
    "a million layers": (changed("language", num_hidden_layers=10**6), "num_hidden_layers"),
    "a million layers of vision": (changed("vision", num_hidden_layers=10**6), "num_hidden_layers"),
    "a width of two billion": (changed("language", hidden_size=2**31), "hidden_size"),
    "channels": (changed("unet", block_out_channels=[2**31, 2**31]), "block_out_channels"),
    "blocks": (changed("vae", layers_per_block=10**6), "layers_per_block"),
    "a picture": ({"image_size": [10**6, 10**6]}, "image_size"),
    "visual tokens": ({"visual_tokens": 10**10}, "visual_tokens"),
    "a resampler": ({"visual_resampler": {"depth": 10**6}}, "depth"),
    "slots": (changed("layout", slots=10**9), "slots"),
    "a list of a million": (changed("unet", block_out_channels=[8] * 10**6), "has 1000000 values"),
    "a deep list": (changed("unet", block_out_channels=json.loads("[" * 50 + "]" * 50)), "levels deep"),
    "NaN": ({"time_center": float("nan")}, "time_center' is nan"),
    "code of a hub": (changed("vision", auto_map={"AutoModel": "someone/model--code.Model"}), "auto_map"),
    "a kernel of a hub": (changed("language", attn_implementation="someone/kernel"), "attn_implementation"),
    "a number for a part": ({"vision": 3}, "vision is 3"),
    "a text for a number": ({"visual_tokens": "32"}, "visual_tokens is '32'"),
    "a truth for a number": ({"visual_tokens": True}, "visual_tokens is True"),
    "three sides": ({"image_size": [32, 128, 3]}, "image_size is"),
    "a megabyte for a number": ({"visual_tokens": "3" * 2**20}, "visual_tokens is"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_configurations_beyond_those_of_any_model(name: str) -> None:
    changes, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as error:
        ModelConfig.from_dict(TINY.to_dict() | changes)
    assert len(str(error.value)) < 500


def test_what_is_no_configuration() -> None:
    with pytest.raises(ValueError, match="ModelConfig lacks image_size"):
        ModelConfig.from_dict({})
    with pytest.raises(ValueError, match=r"ModelConfig is \[1\]"):
        ModelConfig.from_dict([1])  # type: ignore[arg-type]


LARGE = {
    "terabytes": (changed("language", hidden_size=2**20, intermediate_size=2**22), "weights, expected the one of its"),
    "wide channels": (changed("unet", block_out_channels=[2**20, 2**20]), "weights, expected the one of its"),
    "a wide resampler": (
        {"visual_resampler": {"depth": 1, "heads": 4, "width": 2**24}},
        "weights, expected the one of its",
    ),
    "ranks": (changed("slide", r=2**24), "r, rank_pattern and gate_hidden ask for"),
    "a gate": (changed("slide", gate_hidden=2**24, experts={"text": 2, "shared": 1}), "weights, expected"),
    "a pipeline for a UNet": (changed("unet", _class_name="StableDiffusionPipeline"), "expected a model of diffusers"),
    "a number for a class": (changed("vae", _class_name=3), "expected a model of diffusers"),
    "a number for a kind": (changed("language", model_type=3), "model_type 3"),
}


@pytest.mark.parametrize("name", LARGE)
def test_configurations_of_larger_models_than_the_files(saved: Path, name: str) -> None:
    changes, message = LARGE[name]
    (saved / "config.json").write_text(json.dumps(TINY.to_dict() | changes))
    write_manifest(saved)
    with pytest.raises(ValueError, match=rf"config\.json .*{message}") as error:
        TextHarmony.from_pretrained(saved)
    assert len(str(error.value)) < 700 and "\n" not in str(error.value)


def test_a_model_of_a_million_modules_is_given_up_early(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("textharmony.model.checkpoint._MOST_MODULES", 500)
    made = 0

    def build() -> dict[str, torch.Tensor]:
        nonlocal made
        model = torch.nn.Module()
        for made in range(10**6):
            model.add_module(str(made), torch.nn.Identity())
        return model.state_dict()

    with pytest.raises(ValueError, match=r"config\.json does not describe a model: it has more than 500 modules"):
        require_possible(build, saved)
    assert made < 502


@pytest.mark.parametrize("content", ['{"begin_head": true, "begin_head": false}', "{", "[" * 10**6, "[1]", "\0", "{}"])
def test_a_configuration_that_is_no_json(saved: Path, content: str) -> None:
    (saved / "config.json").write_text(content)
    write_manifest(saved)
    with pytest.raises(ValueError, match=r"config\.json is cut short, or save_pretrained did not write it") as error:
        TextHarmony.from_pretrained(saved)
    assert len(str(error.value)) < 700


@pytest.fixture(scope="module")
def model_folder(make_model: Callable[..., TextHarmony], tmp_path_factory: pytest.TempPathFactory) -> Path:
    make_model().save_pretrained(folder := tmp_path_factory.mktemp("models") / "model")
    return folder


@pytest.fixture
def saved(model_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(model_folder, tmp_path / "model")


def test_the_presets_are_far_from_the_limits() -> None:
    for config in MODELS.values():
        assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_pickle_in_the_place_of_weights_is_not_loaded(saved: Path, tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "ran",)  # type: ignore[return-value]

    for name in ("model.safetensors", "pytorch_model.bin"):
        torch.save({"a": Attack(), "b": torch.zeros(300_000)}, saved / name)
        write_manifest(saved)
        if name == "model.safetensors":
            with pytest.raises(ValueError, match=r"model\.safetensors is cut short"):
                TextHarmony.from_pretrained(saved)
    assert not (tmp_path / "ran").exists()
