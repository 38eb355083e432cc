import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

import slidelora
import textharmony.model.checkpoint
import textharmony.model.core
from textharmony.config import ModelConfig
from textharmony.data.batch import Collator
from textharmony.data.sample import Sample
from textharmony.data.synthetic import SyntheticWords
from textharmony.evaluate.tiny import recognise, same_text
from textharmony.model.core import TextHarmony
from textharmony.prompts import IMAGE, READ_QUESTION, Task

Make = Callable[..., TextHarmony]
EMBEDDED = Path(textharmony.model.core.__file__).parent / "weights" / "tiny"
embedded_only = pytest.mark.skipif(not EMBEDDED.exists(), reason="the embedded weights are not there")


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    """Two of each task, of different lengths."""
    return [SyntheticWords(4, "train", {task: 1})[i] for task in Task for i in range(2)]


@pytest.fixture(scope="module")
def pictures(samples: list[Sample]) -> list[Image.Image]:
    return [Image.fromarray(s.image if s.image is not None else s.target) for s in samples][:3]


# Losses


def test_a_padded_batch_is_its_samples_alone(
    model: TextHarmony, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text, column and gate losses, and what the image decoder is given; its own losses draw noise."""
    contexts = []
    read_context = model.image_decoder.read_context
    monkeypatch.setattr(
        model.image_decoder, "read_context", lambda *a: contexts.append(read_context(*a)) or contexts[-1]
    )
    collate = Collator(model.config, model.tokenizer)
    batch = collate(samples)
    with torch.no_grad():
        together = model(**batch)
        seen, contexts[:] = contexts[0], []
        alone = [model(**collate([sample])) for sample in samples]
    torch.testing.assert_close(torch.cat(contexts), seen, atol=1e-4, rtol=1e-4)

    def mean(name: str, counts: torch.Tensor) -> float:
        values = torch.tensor([float(getattr(loss, name)) for loss in alone])
        return float((values * counts).sum() / counts.sum())

    assert len(set((batch["labels"] != -100).sum(1).tolist())) > 2
    each = torch.ones(len(samples))
    assert together.text.item() == pytest.approx(mean("text", each), rel=1e-4)
    assert together.gate.item() == pytest.approx(mean("gate", each), rel=1e-4)
    columns = torch.tensor([float(s.image is not None and s.region is None) for s in samples])
    assert together.columns.item() == pytest.approx(mean("columns", columns), rel=1e-4)


def test_the_answer_does_not_choose_its_experts(model: TextHarmony, samples: list[Sample]) -> None:
    reading = next(s for s in samples if s.task is Task.PERCEPTION)
    weights = []
    for answer in ("A", "ZZZZZZ"):
        with torch.no_grad():
            model(**Collator(model.config, model.tokenizer)([replace(reading, answer=answer)]))
        weights.append(slidelora.routing(model.language).weights)
    assert weights[0] is not None and weights[1] is not None
    torch.testing.assert_close(weights[0], weights[1], atol=1e-5, rtol=1e-5)


def test_the_total_weighs_what_was_asked_for(model: TextHarmony, samples: list[Sample]) -> None:
    batch = Collator(model.config, model.tokenizer)(samples)
    with torch.no_grad():
        everything = model(**batch)
        expected = (
            model.config.text_weight * everything.text
            + model.config.image_weight * everything.image
            + everything.layout
            + everything.columns
            + everything.gate
        )
        torch.testing.assert_close(everything.total, expected)
        assert all(float(getattr(everything, name)) > 0 for name in ("text", "image", "layout", "columns", "gate"))
        columns = model(**batch, losses=("columns",))
        assert columns.total == columns.columns == everything.columns and columns.text == columns.image == 0
        text = model(**batch, losses=("text",), adapters=False)
        assert text.total == text.text and text.image == text.gate == 0


def test_adapters_act_when_asked(model: TextHarmony, samples: list[Sample]) -> None:
    batch = Collator(model.config, model.tokenizer)(samples)
    with torch.no_grad():
        acting, plain = (model(**batch, losses=("text",), adapters=on).text for on in (True, False))
        with slidelora.disabled(model.language):
            logits = model.language(
                inputs_embeds=model.embed(batch["input_ids"], batch["pixel_values"])[0],
                attention_mask=batch["attention_mask"],
            ).logits
    of_samples = [F.cross_entropy(said[:-1], label[1:]) for said, label in zip(logits, batch["labels"])]
    base = torch.stack(of_samples).mean()
    assert not torch.allclose(acting, plain, atol=1e-3)
    torch.testing.assert_close(plain, base, atol=1e-4, rtol=1e-4)


def test_embed_counts_the_image_tokens(model: TextHarmony) -> None:
    count = model.config.visual_tokens
    ids = torch.full((2, count + 3), 7)
    ids[:, 1:count] = model.image_id
    with pytest.raises(
        ValueError, match=f"input_ids has {2 * count - 2} image tokens, expected {count} for each of 2 pictures"
    ):
        model.embed(ids, torch.zeros(2, 3, 32, 128))
    with pytest.raises(ValueError, match=f"expected {count} for each of 0 pictures"):
        model.embed(ids, None)
    ids[:, count] = model.image_id
    pixels = torch.rand(2, 3, 32, 128)
    embeds, *_ = model.embed(ids, pixels)
    tokens, *_ = model.visual_tokenizer(pixels)
    assert torch.equal(embeds[:, 1 : count + 1], tokens)
    assert torch.equal(embeds[:, 0], model.language.get_input_embeddings()(ids[:, 0]))


# Verbs


def test_a_batch_of_verbs_is_the_verbs_alone(model: TextHarmony, pictures: list[Image.Image]) -> None:
    """Prompts of different lengths, so padded on the left."""
    questions = ["a", "what color is the ground", "how many characters are there"]
    assert model.read(pictures) == [model.read(picture) for picture in pictures]
    assert model.answer(pictures, questions) == [model.answer(p, q) for p, q in zip(pictures, questions)]
    assert model.answer(pictures, questions[1]) == [model.answer(p, questions[1]) for p in pictures]
    assert len(set(model.answer(pictures, questions))) > 1
    assert model.answer(pictures[0], questions) == [model.answer(pictures[0], question) for question in questions]
    assert model.read([]) == []


def test_read_is_a_question(model: TextHarmony, pictures: list[Image.Image]) -> None:
    assert model.read(pictures[0]) == model.answer(pictures[0], READ_QUESTION, task=Task.PERCEPTION)


def test_locate_reads_boxes_out_of_the_answer(
    model: TextHarmony, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = ["(100,200)(300,400)", "none", "(500,500)(400,900) (001,002)(003,004)(1"]
    monkeypatch.setattr(model, "_write", lambda prompts, pixels: said[: len(prompts)])
    found = model.locate(pictures, ["A", "B", "C"])
    assert found == [[(100, 200, 300, 400)], [], [(1, 2, 3, 4)]]
    # Twice as high as wide enough: the model saw it between bars of a quarter on each side.
    (box,) = model.locate(Image.new("RGB", (64, 32)), "A")
    assert box == pytest.approx((0, 200, 100.5, 400), abs=0.11)


def test_draw_by_seed(model: TextHarmony) -> None:
    prompts = ['"CAFE" in red on white', '"A"', "B7"]
    together = model.draw(prompts, seed=5)
    assert [p.size for p in together] == [(128, 32)] * 3 and all(isinstance(p, Image.Image) for p in together)
    for i, prompt in enumerate(prompts):
        difference = np.abs(np.asarray(model.draw(prompt, seed=5 + i), int) - np.asarray(together[i], int))
        assert difference.max() <= 1
    chosen = model.draw(prompts[:2], seed=[6, 6])
    assert np.abs(np.asarray(chosen[1], int) - np.asarray(together[1], int)).max() <= 1
    assert np.abs(np.asarray(model.draw(prompts[0], seed=9), int) - np.asarray(together[0], int)).max() > 3
    assert np.array_equal(model.draw(prompts[0], seed=9), model.draw(prompts[0], seed=9))
    several = model.draw(prompts[0], seed=[5, 9])
    assert len(several) == 2 and np.abs(np.asarray(several[0], int) - np.asarray(together[0], int)).max() <= 1


@pytest.mark.parametrize(
    "prompt",
    ["", '""', "hello", '"HELLO!"', '"SEVENCH"', '"NAÏVE"', '"A B"', '"A', 'A "B" "C"', '"A" and "B"', "日本"],
)
def test_draw_and_edit_name_what_they_cannot_draw(model: TextHarmony, pictures: list[Image.Image], prompt: str) -> None:
    word = prompt.strip('"') if prompt.count('"') == 2 else prompt
    with pytest.raises(ValueError, match="expected") as error:
        model.draw(prompt)
    assert repr(word) in str(error.value) or repr(prompt) in str(error.value)
    with pytest.raises(ValueError, match="expected"):
        model.edit(pictures[0], (0, 0, 500, 500), prompt)
    with pytest.raises(ValueError, match="expected"):
        model.draw(['"A"', prompt])


def test_edit_leaves_the_rest_alone(model: TextHarmony) -> None:
    rng = np.random.default_rng(0)
    shapes = [(32, 128), (61, 300), (200, 90)]
    arrays = [rng.integers(0, 256, (*shape, 3), np.uint8) for shape in shapes]
    box = (200, 300, 700, 800)
    edited = model.edit(arrays, (200, 300, 700, 800), '"OPEN" in red', seed=3)
    for before, after in zip(arrays, edited):
        height, width = before.shape[:2]
        corners = [v / 999 * side for v, side in zip(box, (width, height) * 2)]
        (x1, y1), (x2, y2) = map(math.floor, corners[:2]), map(math.ceil, corners[2:])
        outside = np.ones((height, width), bool)
        outside[y1:y2, x1:x2] = False
        assert np.array_equal(np.asarray(after)[outside], before[outside])
        assert (np.asarray(after)[~outside] != before[~outside]).mean() > 0.5
    alone = model.edit(arrays[0], box, '"OPEN" in red', seed=3)
    assert np.abs(np.asarray(alone, int) - np.asarray(edited[0], int)).max() <= 1


def test_edit_does_not_see_what_it_replaces(model: TextHarmony) -> None:
    one = np.random.default_rng(0).integers(0, 256, (32, 128, 3), np.uint8)
    other = one.copy()
    other[8:24, 32:96] = 77
    box = (32 / 128 * 999, 8 / 32 * 999, 96 / 128 * 999, 24 / 32 * 999)
    assert np.array_equal(model.edit(one, box, "A"), model.edit(other, box, "A"))


def test_edit_checks_the_box(model: TextHarmony, pictures: list[Image.Image]) -> None:
    with pytest.raises(ValueError, match=r"box is \(5, 5, 5, 9\)"):
        model.edit(pictures[0], (5, 5, 5, 9), "A")
    with pytest.raises(ValueError, match=r"box is \(0, 0, 2000, 9\)"):
        model.edit(pictures[:2] * 2, [0, 0, 2000, 9], "A")
    with pytest.raises(ValueError, match=r"box is \(0, 0, 2000, 9\)"):
        model.edit(pictures[:2], [(0, 0, 500, 500), (0, 0, 2000, 9)], "A")


def test_lists_must_be_of_one_length(model: TextHarmony, pictures: list[Image.Image]) -> None:
    for call in (
        lambda: model.answer(pictures, ["a", "b"]),
        lambda: model.locate(pictures, ["A"] * 4),
        lambda: model.draw(['"A"', '"B"'], seed=[1, 2, 3]),
    ):
        with pytest.raises(ValueError, match="expected the same length"):
            call()


def test_verbs_leave_the_weights_alone(model: TextHarmony, pictures: list[Image.Image]) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.read(pictures[0])
    model.edit(pictures[0], (0, 0, 500, 500), "A")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# Files


@pytest.fixture(scope="module")
def saved(model: TextHarmony, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "deep" / "model"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_round_trip_is_exact(model: TextHarmony, saved: Path, pictures: list[Image.Image]) -> None:
    again = TextHarmony.from_pretrained(saved)
    assert not again.training and again.config == model.config
    theirs = again.state_dict()
    assert theirs.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items())
    assert again.read(pictures) == model.read(pictures)
    assert np.array_equal(again.draw('"A1"'), model.draw('"A1"'))
    # Tied weights stay one.
    assert again.language.get_output_embeddings().weight is again.language.get_input_embeddings().weight


def test_a_saved_model_is_a_few_plain_files(saved: Path) -> None:
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in saved.iterdir()}
    assert [entry.name for entry in saved.parent.iterdir()] == ["model"]
    assert json.loads((saved / "config.json").read_text())["image_size"] == [32, 128]


def test_half_precision_on_disk(model: TextHarmony, saved: Path, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "half", torch.float16)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (tmp_path / "half", saved)]
    assert sizes[0] < 0.6 * sizes[1]
    for name, tensor in TextHarmony.from_pretrained(tmp_path / "half").state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name].half().float())


def test_a_missing_folder_or_file_is_named(copy: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        TextHarmony.from_pretrained(copy / "nowhere")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (copy / name).rename(copy / "aside")
        with pytest.raises(FileNotFoundError, match=name):
            TextHarmony.from_pretrained(str(copy))
        (copy / "aside").rename(copy / name)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_file_cut_short_is_named(copy: Path, name: str, share: float) -> None:
    whole = (copy / name).read_bytes()
    (copy / name).write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError) as error:
        TextHarmony.from_pretrained(copy)
    assert str(copy) in str(error.value)


def test_weights_of_another_shape_are_named(copy: Path) -> None:
    values = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(values | {"context_tokens": 9}))
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        TextHarmony.from_pretrained(copy)


@pytest.mark.parametrize("gone", ["begin_image", "language.model.embed_tokens.weight"])
def test_a_missing_weight_is_named(copy: Path, gone: str) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors[gone]
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        TextHarmony.from_pretrained(copy)


@pytest.mark.parametrize("change", [{"colour": 1}, {"vision": None}, {"layout": {"slots": 6, "shape": 2}}])
def test_a_configuration_of_another_form_is_named(copy: Path, change: dict[str, object]) -> None:
    values = json.loads((copy / "config.json").read_text()) | change
    (copy / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    with pytest.raises(ValueError, match=r"colour|vision|shape"):
        TextHarmony.from_pretrained(copy)


def test_an_interrupted_save_keeps_the_one_before(
    make_model: Make, model: TextHarmony, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(textharmony.model.checkpoint, "save_torch_state_dict", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_model(seed=1).save_pretrained(copy)
    kept = TextHarmony.from_pretrained(copy)
    assert torch.equal(kept.begin_image, model.begin_image)
    assert not [entry for entry in copy.parent.iterdir() if entry.name.startswith(f".{copy.name}-")]


def test_a_save_replaces_the_one_before(make_model: Make, model: TextHarmony, copy: Path) -> None:
    other = make_model(seed=1)
    other.save_pretrained(copy)
    found = TextHarmony.from_pretrained(copy).begin_image
    assert torch.equal(found, other.begin_image) and not torch.equal(found, model.begin_image)


def test_config_survives_json(config: ModelConfig) -> None:
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


# The embedded weights


@pytest.fixture(scope="module")
def embedded() -> TextHarmony:
    return TextHarmony.from_pretrained("tiny")


@embedded_only
def test_the_embedded_model_reads(embedded: TextHarmony) -> None:
    data = SyntheticWords(99, "held_out", {Task.GENERATION: 1})
    read = embedded.read([data[i].target for i in range(40)])
    assert sum(said == data[i].text for i, said in enumerate(read)) >= 36


@embedded_only
def test_the_embedded_model_draws(embedded: TextHarmony) -> None:
    pytest.importorskip("rapidocr")
    words = ["HELLO", "2026", "LORA8", "CAFE", "X7", "ZURICH", "404", "QUIZ", "B52", "JUMPY"]
    drawn = embedded.draw([f'"{word}" in black on white' for word in words])
    read = [recognise(picture) for picture in drawn]
    assert sum(map(same_text, read, words)) >= 8, read


@embedded_only
def test_the_embedded_model_is_small(embedded: TextHarmony) -> None:
    assert (EMBEDDED / "model.safetensors").stat().st_size <= 16 * 2**20
    assert IMAGE in embedded.tokenizer.get_vocab()
