"""A checkpoint as the authors publish theirs, in miniature: converted, used, trained and saved by the command line."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from closeness import assert_close
from PIL import Image
from released_miniature import MINIATURE, miniature_tokenizer, random_miniature, released_tensors, write_pieces
from transformers import CLIPImageProcessor, LlamaConfig, LlamaForCausalLM

from textharmony.cli import main
from textharmony.model.backbones import build_vision
from textharmony.model.released.keys import POSITION_IDS
from textharmony.pipeline import TextHarmony, convert_released
from textharmony.prompts import BOI, IMAGE, Request, Task, compose


@pytest.fixture(scope="module")
def original() -> TextHarmony:
    return random_miniature()


@pytest.fixture(scope="module")
def released(original: TextHarmony, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "released"
    write_pieces(folder, released_tensors(original))
    sizes = replace(MINIATURE, inference_steps=1)  # training draws sheets of samples
    (folder.parent / "sizes.json").write_text(json.dumps(sizes.to_dict()))
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def run(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["textharmony", *map(str, arguments)])
        main()

    return run


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def same_weights(one: TextHarmony, other: TextHarmony, dtype: torch.dtype = torch.float32) -> bool:
    state = other.state_dict()
    return one.state_dict().keys() == state.keys() and all(
        torch.equal(tensor.to(dtype), state[name].to(dtype)) for name, tensor in one.state_dict().items()
    )


def test_loading_is_exact(original: TextHarmony, released: Path, picture: Path) -> None:
    loaded = TextHarmony.from_released(released, config=MINIATURE, device_map="cpu")
    assert same_weights(loaded, original) and not loaded.training
    assert all(not tensor.is_meta for tensor in [*loaded.parameters(), *loaded.buffers()])
    assert loaded.read(picture) == original.read(picture)
    spread = TextHarmony.from_released(
        released, torch.bfloat16, {"model.embed_tokens": "cpu", "model": "cpu", "lm_head": "cpu"}, config=MINIATURE
    )
    assert same_weights(spread, original, torch.bfloat16)
    assert spread.language.dtype == spread.visual_tokenizer.positions.dtype == torch.bfloat16
    assert spread.image_decoder.vae.dtype == torch.float32
    assert isinstance(spread.read(picture), str) and spread.draw("a").size == (64, 64)


@pytest.mark.slow
def test_the_command_line_from_pieces_to_a_trained_model(
    original: TextHarmony, released: Path, picture: Path, tmp_path: Path, run: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model = tmp_path / "model"
    run("convert", released, model, "--settings", released.parent / "sizes.json")
    converted = TextHarmony.from_pretrained(model)
    assert same_weights(converted, original.bfloat16().float())
    assert len(list(model.glob("*.safetensors"))) > 4
    capsys.readouterr()
    run("read", picture, "--model", model)
    assert capsys.readouterr().out == f"{converted.read(picture)}\n"
    run("answer", picture, "what", "--model", model, "--num-beams", 2)
    assert capsys.readouterr().out == f"{converted.answer(picture, 'what', num_beams=2)}\n"
    run("draw", "a sign", "--model", model, "-o", tmp_path / "drawn.png", "--seed", 42)
    drawn = np.asarray(Image.open(tmp_path / "drawn.png"))
    assert np.array_equal(drawn, np.asarray(converted.draw("a sign", seed=42)))
    run("edit", picture, "AB", "--box", 0, 0, 500, 500, "--model", model, "-o", tmp_path / "edited.png")
    edited, before = (np.asarray(Image.open(file)) for file in (tmp_path / "edited.png", picture))
    assert np.array_equal(edited[16:], before[16:]) and not np.array_equal(edited, before)
    run("chat", "hi", picture, "--model", model, "-o", tmp_path / "chat")
    run(
        "train", "--model", model, "--stages", "released", "--steps", 2, "--batch-size", 2, "--workers", 0,
        "--mixed-precision", "no", "--learning-rate", 0.01, "-o", tmp_path / "run",
    )  # fmt: skip
    trained = TextHarmony.from_pretrained(tmp_path / "run" / "model")
    moved = {name for name, p in trained.named_parameters() if not torch.equal(p, converted.get_parameter(name))}
    for part in ("visual_tokenizer.vit", "visual_tokenizer.adapter", "language.lm_head.new", "image_decoder.pictures",
                 "image_decoder.context_proj", "begin_image", "language.model.layers.0.pictures"):  # fmt: skip
        assert any(name.startswith(part) for name in moved), part
    assert any("lora_B" in name and name.startswith("language.") for name in moved)
    assert not any((".mlp." in name and name.startswith("language.")) or ".vae." in name for name in moved)
    trained.save_pretrained(tmp_path / "again")
    assert same_weights(TextHarmony.from_pretrained(tmp_path / "again"), trained)


def test_a_chat_draws_and_reads_what_it_drew(original: TextHarmony) -> None:
    bias = original.language.lm_head.new.bias
    before = bias.detach().clone()
    with torch.no_grad():
        bias[0] = 1000.0
    found = original.chat(["hi"], max_pictures=2)
    with torch.no_grad():
        bias.copy_(before)
    assert [reply.size for reply in found if not isinstance(reply, str)] == [(64, 64)] * 2


def test_a_batch_of_drawings_and_edits_goes_by_rows(original: TextHarmony, picture: Path) -> None:
    requests = [
        Request(Task.EDIT, "b", picture, (0.0, 0.0, 500.0, 500.0), 3),
        Request(Task.DRAW, "a", seed=4),
        Request(Task.EDIT, "long", Image.new("RGB", (8, 8), "red"), (0.0, 0.0, 999.0, 999.0), 5),
    ]
    together = original.perform(requests)
    for found, request in zip(together, requests, strict=True):
        alone = np.asarray(original.perform([request])[0], float)
        assert np.abs(np.asarray(found, float) - alone).mean() < 1


def test_released_prompts() -> None:
    image = BOI + IMAGE * 2
    found = {task: compose(task, "x y", 2, "<s>", released=True) for task in Task}
    assert found[Task.DRAW] == f"<s>{image}Generate an image according to the caption. x y"
    assert found[Task.EDIT] == f"<s>{image}x y." == compose(Task.EDIT, "x y.", 2, "<s>", released=True)
    asked = f"<s>Based on the image, please answer the question.{image}x y The answer is:"
    assert found[Task.ANSWER] == found[Task.READ] == asked


def test_a_new_model_of_pretrained_parts(original: TextHarmony, picture: Path, tmp_path: Path) -> None:
    """Its CLIP's table of positions grows, the layers that attend to pictures change nothing, and it is saved."""
    vit = build_vision(MINIATURE)
    assert len(vit.embeddings.position_embedding.weight) == 65
    vit.save_pretrained(tmp_path / "clip")
    CLIPImageProcessor().save_pretrained(tmp_path / "clip")
    words = miniature_tokenizer()
    LlamaForCausalLM(LlamaConfig(**{**MINIATURE.language, "vocab_size": len(words)})).save_pretrained(
        tmp_path / "llama"
    )
    words.save_pretrained(tmp_path / "llama")
    original.image_decoder.unet.save_pretrained(tmp_path / "sd" / "unet")
    original.image_decoder.vae.save_pretrained(tmp_path / "sd" / "vae")
    diffusers.PNDMScheduler(skip_prk_steps=True).save_pretrained(tmp_path / "sd" / "scheduler")
    model = TextHarmony.from_backbones(tmp_path / "clip", tmp_path / "llama", tmp_path / "sd", MINIATURE)
    assert model.visual_tokenizer.vit.embeddings.position_embedding.weight.shape == (257, 32)
    assert model.config.scheduler["_class_name"] == "DDPMScheduler"
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "llama").eval()
    ids, mask = torch.tensor([[1, 5, 6]]), torch.ones(1, 3, dtype=torch.long)
    with torch.no_grad():
        embeds, features, _ = model.embed(ids, None)
        with model.read_under(model.compute_gates(embeds, mask.bool(), ["text"]), features):
            hidden = model.hidden_states(embeds, mask)
        assert_close(hidden, plain.model(ids).last_hidden_state)
        logits = model.language.get_output_embeddings()(hidden)
        assert_close(logits[..., :98], plain(ids).logits[..., :98])
        assert_close(logits[..., 98:], torch.full((1, 3, 2), -5.0))
    drawn = model.draw("a")
    model.save_pretrained(tmp_path / "model")
    again = TextHarmony.from_pretrained(tmp_path / "model")
    assert same_weights(again, model) and np.array_equal(again.draw("a"), drawn)
    spare = {**MINIATURE.language, "vocab_size": 128}
    with pytest.raises(ValueError, match="are not the last of 128 embeddings"):
        TextHarmony(replace(MINIATURE, language=spare), words)


# What is refused


def test_tensors_that_do_not_fit_are_named(original: TextHarmony, tmp_path: Path) -> None:
    tensors = released_tensors(original)
    wrong = {name: tensor for name, tensor in tensors.items() if name != "soi_token"}
    wrong |= {"surplus": torch.ones(1), "context_feat_proj.bias": torch.ones(3)}
    write_pieces(tmp_path / "wrong", wrong)
    message = r"lacks soi_token; has surplus surplus; has context_feat_proj\.bias of shape \(3,\), expected \(64,\)"
    with pytest.raises(ValueError, match=message):
        convert_released(tmp_path / "wrong", tmp_path / "out", config=MINIATURE)
    write_pieces(tmp_path / "wrong", tensors | {POSITION_IDS: torch.zeros(1, 257, dtype=torch.long)})
    with pytest.raises(ValueError, match=r"position_ids is not 0, 1, 2, \.\.\."):
        TextHarmony.from_released(tmp_path / "wrong", config=MINIATURE)
    assert not (tmp_path / "out").exists()


def test_a_flipped_bit_is_refused_before_anything_is_written(
    released: Path, tmp_path: Path, run: Callable[..., None]
) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    for file in released.iterdir():
        (bad / file.name).write_bytes(file.read_bytes())
    content = bytearray((bad / "pytorch_model.binab").read_bytes())
    content[len(content) // 2] ^= 1
    (bad / "pytorch_model.binab").write_bytes(content)
    with pytest.raises(SystemExit, match=r"textharmony: .*pytorch_model\.binab.* is damaged at \w+\..*Bad CRC-32"):
        run("convert", bad, tmp_path / "out", "--settings", released.parent / "sizes.json")
    assert not (tmp_path / "out").exists()


def test_another_tokenizer_or_architecture_is_refused(released: Path, tmp_path: Path) -> None:
    pieces = sorted(released.glob("*.bin*"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.model and no tokenizer\.json"):
        TextHarmony.from_released(pieces, tokenizer=tmp_path / "empty", config=MINIATURE)
    language = {**MINIATURE.language, "vocab_size": 120}
    with pytest.raises(ValueError, match="has 98 tokens, expected 118"):
        TextHarmony.from_released(pieces, tokenizer=released, config=replace(MINIATURE, language=language))
    with pytest.raises(ValueError, match="config is of another architecture"):
        TextHarmony.from_released(released, config=replace(MINIATURE, released=None))
    with pytest.raises(ValueError, match=r"device_map has \['model'\], expected a device for every part"):
        TextHarmony.from_released(released, config=MINIATURE, device_map={"model": "cpu"})
    with pytest.raises(ValueError, match="device_map puts layers on disk"):
        TextHarmony.from_released(released, config=MINIATURE, device_map={"": "disk"})
