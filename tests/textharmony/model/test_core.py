"""The model: what the language model reads, the losses of a batch, and which experts act."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from batches import collate
from closeness import relative_error
from miniatures import Miniature, join
from PIL import Image
from torch import Tensor, nn

import slidelora
from textharmony.boxes import from_pixels
from textharmony.config import LOSSES, ModelConfig, put_experts_on
from textharmony.data.record import Record
from textharmony.data.synthetic import SyntheticWords
from textharmony.model.backbones import build_vision
from textharmony.model.core import TextHarmonyModel
from textharmony.pipeline import TextHarmony
from textharmony.presets import MODELS, PAPER, TINY
from textharmony.prompts import Task

Make = Callable[..., TextHarmony]
HALF = (0, 0, 500, 500)


@pytest.fixture(scope="module")
def records() -> list[Record]:
    """Two of each task, of different lengths."""
    return [SyntheticWords(4, "train", {task: 1})[i] for task in Task for i in range(2)]


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (56, 56, 3), np.uint8))


@pytest.fixture(scope="module")
def three() -> list[Record]:
    """A drawing, a reading and an edit for miniatures."""
    rng = np.random.default_rng(0)
    read, drawn = (rng.integers(0, 256, (size, size, 3), np.uint8) for size in (56, 32))
    box = from_pixels((7, 7, 40, 40), (56, 56))
    return [
        Record("1", Task.DRAW, "test", "a sign", texts=("A",), target=drawn),
        Record("2", Task.READ, "test", "read", (read,), ("A",)),
        Record("3", Task.EDIT, "test", "fill", (read,), ("A",), target=drawn, boxes=(box,)),
    ]


def randomise(model: nn.Module, *names: str, std: float = 0.5) -> None:
    """Fill parameters that have one of these in their names, as if they had been trained."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in names):
                parameter.normal_(0, std)


def test_patterns_of_a_configuration_are_bounded(model: TextHarmony) -> None:
    for field in ("slide", "slide_vision"):
        config = replace(model.config, **{field: {"target_modules": "(a+)+b", "gate": "given"}})
        with pytest.raises(
            ValueError, match=r"target_modules has '\(a\+\)\+b', expected a pattern that matches quickly"
        ):
            TextHarmonyModel(config, model.tokenizer)


# What the language model reads


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


def test_visual_tokens_stand_where_image_tokens_stood(model: TextHarmony) -> None:
    count = model.config.visual_tokens
    ids, pixels = torch.full((2, count + 3), 7), torch.rand(2, 3, 32, 128)
    ids[:, 1 : count + 1] = model.image_id
    with torch.no_grad():
        embeds, features, logits = model.embed(ids, pixels)
        tokens, _, expected = model.visual_tokenizer(pixels)
    assert torch.equal(embeds[:, 1 : count + 1], tokens) and features is None
    assert all(map(torch.equal, logits, expected))
    assert torch.equal(embeds[:, 0], model.language.get_input_embeddings()(ids[:, 0]))


def test_a_begin_token_has_an_embedding_of_its_own(model: TextHarmony) -> None:
    ids = torch.tensor([[7, model.boi_id, 7]])
    with torch.no_grad():
        embeds, _, logits = model.embed(ids, None)
    plain = model.language.get_input_embeddings()(ids)
    assert logits is None and torch.equal(embeds[:, ::2], plain[:, ::2])
    assert torch.equal(embeds[0, 1], plain[0, 1] + model.begin_image)


def test_the_begin_head_changes_one_logit(united: TextHarmony) -> None:
    ids = torch.arange(5)[None]
    with torch.no_grad(), slidelora.disabled(united.language):
        hidden = united.hidden_states(united.language.get_input_embeddings()(ids), torch.ones_like(ids))
        logits = united.language(input_ids=ids).logits
    assert united.begin_head is not None
    plain = F.linear(hidden, united.language.get_output_embeddings().weight)
    plain[..., united.boi_id] += hidden @ united.begin_head
    assert relative_error(logits, plain) < 1e-5


# Losses


def test_a_padded_batch_is_its_records_alone(
    model: TextHarmony, records: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses of text, words and gate, and what the image decoder is given; its own losses draw noise."""
    contexts: list[Tensor] = []
    read_context = model.image_decoder.read_context
    monkeypatch.setattr(
        model.image_decoder, "read_context", lambda *a: contexts.append(read_context(*a)) or contexts[-1]
    )
    batch = collate(model.config, model.tokenizer, records)
    with torch.no_grad():
        together = model(**batch)
        context, contexts[:] = contexts[0], []
        alone = [model(**collate(model.config, model.tokenizer, [record])) for record in records]
    assert relative_error(torch.cat(contexts), context) < 1e-5
    assert len(set((batch["labels"] != -100).sum(1).tolist())) > 2
    for name in ("text", "gate"):
        assert together[name].item() == pytest.approx(np.mean([float(losses[name]) for losses in alone]), rel=1e-4)
    words = [float(losses["words"]) for losses, record in zip(alone, records) if record.images]
    words = [loss for loss in words if loss > 0]  # nothing is asked of a picture with a hidden region
    assert len(words) == 2 * len([Task.READ, Task.ANSWER, Task.LOCATE])
    assert together["words"].item() == pytest.approx(np.mean(words), rel=1e-4)


def test_only_the_losses_that_are_asked_for_are_computed(model: TextHarmony, records: list[Record]) -> None:
    batch = collate(model.config, model.tokenizer, records)
    with torch.no_grad():
        everything = model(**batch)
        assert list(everything) == list(LOSSES) and all(loss > 0 for loss in everything.values())
        for name in ("words", "text", "gate"):  # which draw no noise
            found = model(**batch, losses=(name,))
            assert found == {name: everything[name]}
        assert model(**batch, losses=("autoencoder",)).keys() == {"autoencoder"}
        assert model(**batch, losses=("layout", "image")).keys() == {"layout", "image"}
        assert model(**batch, losses=("text", "gate"), adapters=False).keys() == {"text"}
        assert model(**batch, losses=()) == {}


def test_a_batch_has_the_losses_that_it_has_something_for(model: TextHarmony, records: list[Record]) -> None:
    by_task = {record.task: record for record in records}
    expected = {
        Task.READ: {"text", "words", "gate"},
        Task.DRAW: {"autoencoder", "text", "image", "layout", "gate"},
        Task.EDIT: set(LOSSES),
    }
    for task, names in expected.items():
        with torch.no_grad():
            found = model(**collate(model.config, model.tokenizer, [by_task[task]]))
        assert found.keys() == names
        assert task is not Task.EDIT or found["words"] == 0


def test_adapters_act_when_asked(model: TextHarmony, records: list[Record]) -> None:
    batch = collate(model.config, model.tokenizer, records)
    with torch.no_grad():
        acting, plain = (model(**batch, losses=("text",), adapters=on)["text"].item() for on in (True, False))
        with slidelora.disabled(model.language):
            logits = model.language(
                inputs_embeds=model.embed(batch["input_ids"], batch["pixel_values"]).inputs_embeds,
                attention_mask=batch["attention_mask"],
            ).logits
    of_rows = [F.cross_entropy(row[:-1], labels[1:]) for row, labels in zip(logits, batch["labels"])]
    assert plain == pytest.approx(torch.stack(of_rows).mean().item(), rel=1e-4)
    assert acting != pytest.approx(plain, rel=1e-3)


# Gates


def test_the_answer_does_not_choose_its_experts(model: TextHarmony, records: list[Record]) -> None:
    reading = next(record for record in records if record.task is Task.READ)
    gates = []
    for answer in ("A", "ZZZZZZ"):
        with torch.no_grad():
            model(**collate(model.config, model.tokenizer, [replace(reading, texts=(answer,))]), losses=("gate",))
        gates.append(slidelora.routing(model.language).weights)
    assert relative_error(*gates) < 1e-5


def check_gate_loss(model: TextHarmony, records: list[Record], monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is the cross-entropy of experts by name, and its gradient raises the right ones' weights."""
    batch = collate(model.config, model.tokenizer, records)
    modalities, hosts = batch["modalities"], (model.language, model.visual_tokenizer)
    compute_gates, computed = slidelora.compute_gates, {}

    def note(host: nn.Module, *arguments: Tensor) -> Tensor:
        computed[host] = compute_gates(host, *arguments)
        return computed[host]

    def share_of_right_experts(host: nn.Module) -> Tensor:
        """(B,) float64: the gate's softmax at the expert of each row's own modality."""
        names, weights = slidelora.routing(host).names, computed[host].detach().double()
        both = weights[:, [names.index("text"), names.index("image")]]
        assert relative_error(both.sum(1), torch.ones(len(weights))) < 1e-6
        return torch.stack([row[names.index(modality)] for row, modality in zip(weights, modalities, strict=True)])

    monkeypatch.setattr(slidelora, "compute_gates", note)
    gates = [p for name, p in model.named_parameters() if "slidelora_gate" in name]
    model.requires_grad_(False)
    for parameter in gates:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(gates, 0.02)
    scale = slidelora.routing(model.language).config.supervised_coef
    history = []
    for _ in range(6):
        loss = model(**batch, losses=("gate",))["gate"]
        history.append(torch.stack([share_of_right_experts(host) for host in hosts]))  # (2, B)
        assert loss.item() == pytest.approx(-scale * history[-1].log().mean(1).sum().item(), rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    text = torch.tensor([modality == "text" for modality in modalities])
    for rows in (text, ~text):
        assert (history[-1][:, rows].mean(1) > history[0][:, rows].mean(1) + 0.02).all()


@pytest.mark.parametrize("experts", [PAPER.slide["experts"], TINY.slide["experts"], ["shared", "image", "text"]])
def test_the_gate_learns_experts_by_name(
    make_model: Make,
    config: ModelConfig,
    records: list[Record],
    experts: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever the order in which the experts are listed, text goes to "text" and pictures go to "image"."""
    both = put_experts_on(replace(config, slide={**config.slide, "experts": experts}), "both")
    check_gate_loss(make_model(slide=both.slide, slide_vision=both.slide_vision), records[::2], monkeypatch)


@pytest.mark.parametrize("miniature", ["clip-llama-sd"], indirect=True)
def test_the_gate_of_the_preset_paper_learns_experts_by_name(
    miniature: Miniature, joined: ModelConfig, three: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert joined.slide == PAPER.slide and PAPER.slide["experts"][0] == "image"
    model = join(miniature, put_experts_on(joined, "both"))
    check_gate_loss(model, three, monkeypatch)


@contextmanager
def listen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[nn.Module, Tensor]]]:
    """Notes the gates that are put in force, with their hosts."""
    gates, used = slidelora.gates, []

    def listening(host: nn.Module, value: Tensor, repeats: int = 1) -> Any:
        used.append((host, value))
        return gates(host, value, repeats)

    with monkeypatch.context() as patch:
        patch.setattr(slidelora, "gates", listening)
        yield used


def test_gates_by_a_table_of_tasks(
    miniature: Miniature,
    joined: ModelConfig,
    picture: Image.Image,
    three: list[Record],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = join(miniature, put_experts_on(replace(joined, slide={**joined.slide, "gate": "given"}), "both"))
    text, image = [0, 0.5, 0.5], [0.5, 0, 0.5]  # experts image, text, shared
    for verb, row in ((lambda: model.read(picture), text), (lambda: model.edit(picture, HALF, "A"), image)):
        with listen(monkeypatch) as used:
            verb()
        assert {id(host) for host, _ in used} == {id(model.language), id(model.visual_tokenizer)}
        assert all(gates.tolist() == [row] for _, gates in used)
    with monkeypatch.context() as patch, listen(monkeypatch) as used:
        patch.setattr(model.language, "generate", lambda **_: torch.tensor([[model.boi_id]]))
        model.chat(["draw"], num_inference_steps=1)  # writes, draws, and writes again
    assert [gates.tolist() for host, gates in used if host is model.language] == [[text], [image], [text]]
    batch = collate(model.config, model.tokenizer, three)
    with listen(monkeypatch) as used:
        losses = model(**batch, losses=("text", "gate"))
    assert losses["gate"] == 0 and losses["text"] > 0
    of_rows, of_pictures = [image, text, image], [image, text, image, image]  # two are drawn and read again
    assert {id(host): gates.tolist() for host, gates in used} == {
        id(model.language): of_rows,
        id(model.visual_tokenizer): of_pictures,
    }
    with pytest.raises(ValueError, match="modalities is None, expected one for each row"):
        model.embed(batch["input_ids"], batch["pixel_values"])


def test_experts_on_the_vit(miniature: Miniature, joined: ModelConfig, picture: Image.Image) -> None:
    """The text of the prompt chooses them: another question gives other visual tokens; the picture does not choose."""
    model = join(miniature, put_experts_on(joined, "vision"))
    randomise(model, "lora_B")
    randomise(model, "slidelora_gate", std=0.1)
    tokens: list[Tensor] = []
    model.visual_tokenizer.register_forward_hook(lambda _, __, output: tokens.append(output[0]))
    gates: list[Any] = []
    for question, image in (("read", picture), ("where is it", picture), ("read", Image.new("RGB", (9, 9)))):
        model.answer(image, question, max_new_tokens=1)
        gates.append(slidelora.routing(model.visual_tokenizer).weights)
    assert relative_error(gates[1], gates[0]) > 1e-3 and torch.equal(gates[0], gates[2])
    assert relative_error(tokens[1], tokens[0]) > 1e-4
    assert not any("lora_" in name for name, _ in model.language.named_parameters())
    # A batch is its rows alone.
    together = model.answer([picture, picture], ["read", "where is it"])
    assert together == [model.answer(picture, "read"), model.answer(picture, "where is it")]


@pytest.mark.parametrize("name", [name for name, config in MODELS.items() if config.released is None])
def test_the_vit_of_each_preset_takes_experts(name: str) -> None:
    config = put_experts_on(MODELS[name], "vision")
    assert config.slide_vision is not None
    with torch.device("meta"):
        vit = build_vision(config)
    names = [f"vit.{name}" for name, _ in vit.named_modules()]
    adapted = [name for name in names if re.fullmatch(config.slide_vision["target_modules"], name)]
    assert len(adapted) == 4 * vit.config.num_hidden_layers  # queries, keys, values, outputs


def test_experts_on_the_vit_act_when_asked(miniature: Miniature, joined: ModelConfig, three: list[Record]) -> None:
    model = join(miniature, put_experts_on(joined, "vision"))
    randomise(model, "lora_B")
    batch = collate(model.config, model.tokenizer, three)
    ids, pixels = batch["input_ids"], batch["pixel_values"]
    with torch.no_grad():
        acting, still = (model.embed(ids, pixels, adapters=on).inputs_embeds for on in (True, False))
        with slidelora.disabled(model.visual_tokenizer):
            tokens, *_ = model.visual_tokenizer(pixels)
    assert torch.equal(still[ids == model.image_id], tokens.flatten(0, 1))
    assert relative_error(acting, still) > 1e-3


def test_feedback_changes_neither_gates_nor_drawings(
    miniature: Miniature, joined: ModelConfig, three: list[Record]
) -> None:
    """A picture that is read after it is drawn comes too late for the gates and for the image decoder."""
    model = join(miniature, put_experts_on(joined, "both"))
    randomise(model, "lora_B", "begin_")
    found = []
    for feeds in (True, False):
        model.config = replace(model.config, feed_back=feeds)
        torch.manual_seed(0)
        with torch.no_grad():
            losses = model(**collate(model.config, model.tokenizer, three))
        found.append((losses, slidelora.routing(model.language).weights))
    (fed, gates), (plain, same) = found
    assert relative_error(gates, same) < 1e-6
    assert fed["image"].item() == pytest.approx(plain["image"].item(), rel=1e-5)
    assert fed["gate"].item() == pytest.approx(plain["gate"].item(), rel=1e-5)
    assert fed["text"].item() != pytest.approx(plain["text"].item(), rel=1e-4)


@pytest.mark.parametrize("host", ["language", "visual_tokenizer"])
def test_gates_that_the_caller_puts_in_force_replace_the_models_own(
    miniature: Miniature, joined: ModelConfig, host: str
) -> None:
    model = join(miniature, put_experts_on(joined, "both"))
    randomise(model, "lora_B", "begin_")
    part = getattr(model, host)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 90, 3), np.uint8))

    def edit() -> np.ndarray:
        return np.asarray(model.edit(picture, (100, 100, 900, 900), "A", 3))

    own = edit()
    found = []
    for name in ("text", "image"):
        with slidelora.gates(part, {name: 1.0}):
            found.append(edit())
        weights = dict(zip(slidelora.routing(part).names, slidelora.routing(part).weights[0].tolist()))
        assert weights == {expert: float(expert == name) for expert in weights}
    with slidelora.gates(part, torch.tensor([[float(expert == "text") for expert in weights]])):
        assert np.array_equal(edit(), found[0])
    assert len({edited.tobytes() for edited in (own, *found)}) == 3
    assert np.array_equal(edit(), own)
