"""Models of other libraries' folders, joined: each part says what it says in its own library."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from miniatures import Miniature, write_clip_llama_sd
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GPTNeoXConfig,
    MistralConfig,
    Phi3Config,
    QuantoConfig,
    Qwen3Config,
    TorchAoConfig,
)

import slidelora
from textharmony.model.backbones import drawing_size, dtype_of
from textharmony.config import ModelConfig, MultiScaleConfig, experts_on
from textharmony.data.batch import Collator
from textharmony.data.sample import Sample
from textharmony.model.core import TextHarmony
from textharmony.images import Frame
from textharmony.prompts import BOI, IMAGE, Task
from textharmony.pipeline import Request

SLIDE_VISION = {
    "experts": ["image", "text", "shared"],
    "r": 2,
    "target_modules": r"vit\..*\.self_attn\.(q|k|v|out)_proj",
}


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (56, 56, 3), np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Miniature:
    """To spoil."""
    with torch.random.fork_rng():
        return write_clip_llama_sd(tmp_path)


def join(miniature: Miniature, config: ModelConfig, **more: Any) -> TextHarmony:
    return TextHarmony.from_backbones(miniature.vision, miniature.language, miniature.image, config, **more)


def test_the_vit_sees_what_its_library_shows_it(
    united: TextHarmony, miniature: Miniature, picture: Image.Image
) -> None:
    """Its image processor normalises the pixels, its own interpolation moves the positions to 56 pixels from 28."""
    processor = AutoImageProcessor.from_pretrained(miniature.vision)
    config = AutoConfig.from_pretrained(miniature.vision)
    vit = AutoModel.from_pretrained(miniature.vision, config=getattr(config, "vision_config", config))
    inputs = processor(picture, do_resize=False, do_center_crop=False, return_tensors="pt")
    seen = []
    hook = united.visual_tokenizer.vit.register_forward_hook(lambda _, __, output: seen.append(output))
    try:
        with torch.no_grad():
            theirs = vit(**inputs, interpolate_pos_encoding=True).last_hidden_state
            tokens, looks, patches = united.visual_tokenizer(Frame.of(picture, (56, 56)).pixels[None])
    finally:
        hook.remove()
    torch.testing.assert_close(seen[0].last_hidden_state, theirs, atol=1e-5, rtol=1e-5)
    assert theirs.shape[1] - 16 in (0, 1) and tokens.shape == (1, 6, 32) and looks is None
    assert torch.equal(patches, seen[0].last_hidden_state[:, -16:])


@pytest.mark.parametrize("size", [28, 448, 896])
def test_any_size_of_pictures(miniature: Miniature, joined: ModelConfig, size: int) -> None:
    model = join(miniature, replace(joined, image_size=(size, size)))
    with torch.no_grad():
        tokens, *_ = model.visual_tokenizer(torch.zeros(1, 3, size, size))
    assert tokens.shape == (1, 6, 32) and tokens.isfinite().all()
    assert model.visual_tokenizer.positions.shape[0] == (size // 14) ** 2


def test_the_old_tokens_are_as_they_were(united: TextHarmony, miniature: Miniature) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(miniature.language)
    tokenizer = AutoTokenizer.from_pretrained(miniature.language)
    text = "read all the text 42 ÄÖ"
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    assert united._encode(text) == ids[0].tolist()
    count = len(tokenizer)
    old_embedding, new_embedding = theirs.get_input_embeddings().weight, united.language.get_input_embeddings().weight
    assert torch.equal(new_embedding[:count], old_embedding[:count])
    old_head, new_head = theirs.get_output_embeddings().weight, united.language.get_output_embeddings().weight
    assert torch.equal(new_head[:count], old_head[:count])
    with torch.no_grad(), slidelora.disabled(united.language):
        ours = united.language(input_ids=ids).logits
        expected = theirs(input_ids=ids).logits
    torch.testing.assert_close(ours[..., :count], expected[..., :count], atol=0, rtol=0)


def test_new_tokens(united: TextHarmony, miniature: Miniature) -> None:
    tokenizer = united.tokenizer
    old = AutoTokenizer.from_pretrained(miniature.language)
    assert (united.boi_id, united.image_id) == (len(old), len(old) + 1)
    assert tokenizer(f"{BOI}{IMAGE}{IMAGE}", add_special_tokens=False)["input_ids"] == [
        united.boi_id,
        united.image_id,
        united.image_id,
    ]
    assert tokenizer.pad_token is not None and tokenizer.eos_token == old.eos_token
    rows = united.language.get_input_embeddings().weight
    assert rows.shape[0] >= len(tokenizer) and rows[united.boi_id].isfinite().all()


def test_prompts_and_labels_of_its_tokenizer(united: TextHarmony) -> None:
    """A begin token where the tokenizer has one, and its own end token after the answer alone."""
    tokenizer, picture = united.tokenizer, np.zeros((56, 56, 3), np.uint8)
    sample = Sample(Task.COMPREHENSION, "what is it", "sign", "test", picture, "a sign")
    batch = Collator(united.config, tokenizer)([sample])
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    assert (tokenizer.bos_token is not None) == (int(ids[0]) == tokenizer.bos_token_id)
    assert ids.tolist().count(tokenizer.bos_token_id) <= 1
    asked = labels != -100
    assert labels[asked].tolist() == [*united._encode("a sign"), tokenizer.eos_token_id]
    image = BOI + IMAGE * 6
    prompt = f"Based on the image, please answer the question. {image}what is it The answer is: "
    assert ids[~asked].tolist() == united._encode((tokenizer.bos_token or "") + prompt)
    assert ids[~asked].tolist() == united._composed(Request(Task.COMPREHENSION, "what is it", picture))


def test_begin_head_speaks_of_one_token(united: TextHarmony) -> None:
    ids = torch.arange(5)[None]
    with torch.no_grad(), slidelora.disabled(united.language):
        hidden = united._hidden_states(united.language.get_input_embeddings()(ids), torch.ones_like(ids))
        logits = united.language(input_ids=ids).logits
    assert united.begin_head is not None
    plain = F.linear(hidden, united.language.get_output_embeddings().weight)
    plain[..., united.boi_id] += hidden @ united.begin_head
    torch.testing.assert_close(logits, plain)


def test_latents_are_scaled_as_the_vae_says(united: TextHarmony, miniature: Miniature) -> None:
    vae = diffusers.AutoencoderKL.from_pretrained(miniature.image, subfolder="vae")
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        theirs = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
        torch.testing.assert_close(united.image_decoder.encode(pixels), theirs)
        decoded = vae.decode(theirs / vae.config.scaling_factor).sample.clamp(-1, 1)
        torch.testing.assert_close(united.image_decoder.decode(theirs), decoded)


def test_the_size_that_a_unet_draws(miniature: Miniature) -> None:
    assert drawing_size(miniature.image) == (32, 32)


def test_a_model_of_backbones_round_trips(united: TextHarmony, picture: Image.Image, tmp_path: Path) -> None:
    """In shards, with its tokenizer, scheduler and pixel statistics."""
    united.save_pretrained(tmp_path / "model", max_shard_size="200KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    again = TextHarmony.from_pretrained(tmp_path / "model")
    assert again.config == united.config and again.config.to_dict() == united.config.to_dict()
    theirs = again.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in united.state_dict().items())
    assert again.read([picture]) == united.read([picture])
    assert np.array_equal(again.draw("a sign"), united.draw("a sign"))
    united.save_pretrained(tmp_path / "model")  # replaces the shards
    assert [file.name for file in (tmp_path / "model").glob("*.safetensors*")] == ["model.safetensors"]
    assert TextHarmony.from_pretrained(tmp_path / "model").read([picture]) == united.read([picture])


def test_a_shard_that_is_missing_is_named(united: TextHarmony, tmp_path: Path) -> None:
    united.save_pretrained(tmp_path, max_shard_size="200KB")
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(FileNotFoundError, match=gone.name):
        TextHarmony.from_pretrained(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    names = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names["weight_map"], "../../etc/passwd")}))
    with pytest.raises((FileNotFoundError, ValueError), match="passwd"):
        TextHarmony.from_pretrained(tmp_path)


def test_dtypes_by_part(miniature: Miniature, joined: ModelConfig, picture: Image.Image, tmp_path: Path) -> None:
    kinds = {"vision": torch.bfloat16, "language": torch.bfloat16}
    model = join(miniature, joined, dtype=kinds)
    assert model.visual_tokenizer.resampler.queries.dtype == model.language.dtype == torch.bfloat16
    assert model.image_decoder.unet.dtype == model.begin_image.dtype == torch.float32
    adapters = {p.dtype for name, p in model.named_parameters() if ".lora_" in name or "slidelora_gate" in name}
    assert adapters == {torch.float32}
    assert isinstance(model.read(picture), str) and model.draw("a sign").size == (32, 32)
    model.save_pretrained(tmp_path / "mixed")
    again = TextHarmony.from_pretrained(tmp_path / "mixed", dtype=kinds)
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in model.state_dict().items())
    assert {p.dtype for p in TextHarmony.from_pretrained(tmp_path / "mixed").parameters()} == {torch.float32}
    half = TextHarmony.from_pretrained(tmp_path / "mixed", dtype=torch.bfloat16)
    assert half.draw("a sign").size == (32, 32) and half.edit(picture, (0, 0, 500, 500), "A").size == (56, 56)


def test_dtypes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"dtype is for \['sound'\]"):
        dtype_of({"sound": torch.float16}, "vision")
    with pytest.raises(ValueError, match=r"dtype of vision is torch\.int8"):
        dtype_of(torch.int8, "vision")


def test_a_device_map(miniature: Miniature, joined: ModelConfig, united: TextHarmony, picture: Image.Image) -> None:
    model = join(miniature, joined, device_map={"": "cpu"})
    assert model.device.type == "cpu" and isinstance(model.read(picture), str)


def test_experts_on_the_vit(miniature: Miniature, joined: ModelConfig, picture: Image.Image, tmp_path: Path) -> None:
    """Chosen by the prompt's text: another question, another look; the picture itself does not choose."""
    model = join(miniature, experts_on(joined, "vision"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "slidelora_gate" in name:
                parameter.normal_(0, 0.5)
    looks = []
    model.visual_tokenizer.register_forward_hook(lambda _, __, output: looks.append(output[0]))
    weights = []
    for question, image in (("read", picture), ("where is it", picture), ("read", Image.new("RGB", (9, 9)))):
        model.answer(image, question)
        found = slidelora.routing(model.visual_tokenizer).weights
        assert isinstance(found, torch.Tensor)
        weights.append(found)
    assert not torch.allclose(weights[0], weights[1]) and torch.equal(weights[0], weights[2])
    assert not torch.allclose(looks[0], looks[1])
    assert not any("lora_" in name for name, _ in model.language.named_parameters())
    # A batch is its rows alone, and a file holds the gate.
    together = model.answer([picture, picture], ["read", "where is it"])
    assert together == [model.answer(picture, "read"), model.answer(picture, "where is it")]
    model.save_pretrained(tmp_path)
    assert TextHarmony.from_pretrained(tmp_path).answer(picture, "read") == together[0]


def test_gates_by_a_table_of_tasks(
    miniature: Miniature, joined: ModelConfig, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    gates, used = slidelora.gates, []

    def listen(host: nn.Module, value: torch.Tensor, repeats: int = 1) -> Any:
        used.append((host, value))
        return gates(host, value, repeats)

    monkeypatch.setattr(slidelora, "gates", listen)
    slide = {**(joined.slide or {}), "gate": "given"}
    model = join(miniature, experts_on(replace(joined, slide=slide), "both"))
    for verb, table in (
        (lambda: model.read(picture), [0, 0.5, 0.5]),  # experts image, text, shared
        (lambda: model.edit(picture, (0, 0, 500, 500), "A"), [0.5, 0, 0.5]),
    ):
        used.clear()
        verb()
        assert {id(host) for host, _ in used} == {id(model.language), id(model.visual_tokenizer)}
        assert all(weights.tolist() == [table] for _, weights in used)
    samples = [Sample(Task.PERCEPTION, "read", "A", "test", np.zeros((56, 56, 3), np.uint8), "A")]
    losses = model(**Collator(model.config, model.tokenizer)(samples), losses=("text", "gate"))
    assert losses.gate == 0 and losses.total == losses.text > 0


def test_multi_scale_features(
    miniature: Miniature, joined: ModelConfig, united: TextHarmony, picture: Image.Image, tmp_path: Path
) -> None:
    """A fresh module changes nothing; then both the language model and the UNet look at the pictures themselves."""
    scales = MultiScaleConfig(every=1, levels=(1.0, 0.5), points=2, heads=2, width=8)
    torch.manual_seed(0)
    model = join(miniature, replace(joined, multi_scale=scales))
    missing = model.load_state_dict(united.state_dict(), strict=False)
    assert all(name.startswith("multi_scale.") for name in missing.missing_keys) and not missing.unexpected_keys
    edited = united.edit(picture, (0, 0, 500, 500), "A")
    assert model.answer(picture, "what", num_beams=2) == united.answer(picture, "what", num_beams=2)
    assert np.array_equal(model.edit(picture, (0, 0, 500, 500), "A"), edited)
    assert model.count_parameters()["multi-scale"] > 0
    assert model.multi_scale is not None
    with torch.no_grad():
        for name, parameter in model.multi_scale.named_parameters():
            if name.endswith("gate"):
                parameter.fill_(2.0)
    # Of a picture whose tokens say nothing, what changes the words is seen by these features alone.
    with torch.no_grad():
        model.visual_tokenizer.project.weight.zero_()
    ids = [model._composed(Request(Task.PERCEPTION, "what", picture))] * 2
    pixels = torch.stack([Frame.of(p, (56, 56)).pixels for p in (picture, Image.new("RGB", (9, 9)))])
    with torch.no_grad():
        embeds, mask, weights, shown = model._prompted(ids, pixels, "left", "text")
        assert torch.equal(embeds[0], embeds[1])
        with model._acting(weights, shown):
            hidden = model._hidden_states(embeds, mask)
    start = ids[0].index(model.image_id)
    torch.testing.assert_close(hidden[0, :start], hidden[1, :start])
    assert not torch.allclose(hidden[0, -1], hidden[1, -1], atol=1e-4)
    # The UNet, told the same context, draws another picture beside another one.
    with torch.no_grad(), model._showing(shown, range(2)):
        drawn = model.image_decoder.generate(
            hidden[:1].expand(2, -1, -1), mask.sum(1) - 1, [torch.Generator().manual_seed(0) for _ in range(2)]
        )
    assert (drawn[0] - drawn[1]).abs().max() > 1e-3
    # Mixed batches go by rows, and files hold it all.
    asked = [Request(Task.GENERATION, "a"), Request(Task.EDITING, "b", picture, (0, 0, 500, 500), 3)]
    one, other = model.perform(asked)
    for together, alone in ((one, model.perform(asked[:1])[0]), (other, model.perform(asked[1:])[0])):
        assert np.abs(np.asarray(together, int) - np.asarray(alone, int)).max() <= 1
    model.save_pretrained(tmp_path)
    again = TextHarmony.from_pretrained(tmp_path)
    assert np.array_equal(again.perform(asked[1:])[0], model.perform(asked[1:])[0])


def test_a_picture_is_drawn_before_it_is_read(miniature: Miniature, joined: ModelConfig) -> None:
    """What feeds back changes neither gates nor what the image decoder is told."""
    scales = MultiScaleConfig(every=1, levels=(1.0,), points=2, heads=2, width=8)
    model = join(miniature, experts_on(replace(joined, multi_scale=scales), "both"))
    assert model.multi_scale is not None
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "begin_" in name or name.endswith("gate"):
                parameter.normal_(0, 0.5)
    rng = np.random.default_rng(0)
    seen, drawn = (rng.integers(0, 256, (size, size, 3), np.uint8) for size in (56, 32))
    samples = [
        Sample(Task.GENERATION, "a sign", "A", "test", target=drawn),
        Sample(Task.PERCEPTION, "read", "A", "test", seen, "A"),
        Sample(Task.EDITING, "fill", "A", "test", seen, target=drawn, region=(7, 7, 40, 40)),
    ]
    found = []
    for feeds in (True, False):
        model.config = replace(model.config, feed_back=feeds)
        torch.manual_seed(0)
        with torch.no_grad():
            losses = model(**Collator(model.config, model.tokenizer)(samples))
        found.append((losses, slidelora.routing(model.language).weights))
    (fed, gates), (plain, same) = found
    torch.testing.assert_close(gates, same)
    torch.testing.assert_close(fed.image, plain.image)
    torch.testing.assert_close(fed.gate, plain.gate)
    assert fed.text != plain.text


def test_multi_scale_features_train(miniature: Miniature, joined: ModelConfig) -> None:
    scales = MultiScaleConfig(every=1, levels=(1.0, 0.5), points=2, heads=2, width=8)
    model = join(miniature, replace(joined, multi_scale=scales)).train()
    seen, drawn = np.full((56, 56, 3), 9, np.uint8), np.full((32, 32, 3), 200, np.uint8)
    samples = [
        Sample(Task.PERCEPTION, "read", "A", "test", seen, "A"),
        Sample(Task.GENERATION, "a sign", "A", "test", target=drawn),
        Sample(Task.EDITING, "fill", "A", "test", seen, target=drawn, region=(7, 7, 40, 40)),
    ]
    assert model.multi_scale is not None
    model.multi_scale.requires_grad_(True)
    model(**Collator(model.config, model.tokenizer)(samples)).total.backward()
    gates = {name: p.grad for name, p in model.multi_scale.named_parameters() if name.endswith("gate")}
    assert len(gates) == 2 + 3 and all(grad is not None and grad.abs().sum() > 0 for grad in gates.values())


def quantisation(library: str) -> Any:
    """Of transformers, in eight bits; skips where its library is not there."""
    pytest.importorskip(library)
    if library == "bitsandbytes":
        return BitsAndBytesConfig(load_in_8bit=True)
    if library == "torchao":
        return TorchAoConfig(pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig())
    return QuantoConfig(weights="int8")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("library", ["bitsandbytes", "torchao", "optimum.quanto"])
def test_a_quantised_language_model(
    miniature: Miniature, joined: ModelConfig, picture: Image.Image, tmp_path: Path, library: str
) -> None:
    model = join(miniature, joined, quantization_config=quantisation(library), device_map={"": "cpu"})
    said = model.read(picture)
    model.save_pretrained(tmp_path)
    names = {name for name in load_file(tmp_path / "model.safetensors") if name.startswith("language.")}
    assert names and all("lora_" in name or "slidelora_gate" in name for name in names)
    again = TextHarmony.from_pretrained(tmp_path)
    assert again.language.is_quantized and again.read(picture) == said
    assert np.array_equal(again.draw("a sign"), model.draw("a sign"))
    experts = [p for name, p in model.named_parameters() if "lora_B" in name]
    for parameter in experts:
        parameter.requires_grad_(True)
    sample = Sample(Task.PERCEPTION, "read", "A", "test", np.zeros((56, 56, 3), np.uint8), "A")
    model.train()(**Collator(model.config, model.tokenizer)([sample]), losses=("text",)).total.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in experts)


FAMILIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "Mistral": lambda sizes: MistralConfig(**sizes, num_key_value_heads=2, sliding_window=16),
    "Qwen3": lambda sizes: Qwen3Config(**sizes, num_key_value_heads=2, head_dim=8),
    "Phi3": lambda sizes: Phi3Config(**sizes, pad_token_id=0),
    "GPT-NeoX": lambda sizes: GPTNeoXConfig(**sizes),
}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_language_models_of_other_families(
    folder: Miniature, joined: ModelConfig, picture: Image.Image, tmp_path: Path, family: str
) -> None:
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = FAMILIES[family](sizes | {"num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 2})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder.language)
    slide = {**(joined.slide or {}), "target_modules": "all-linear", "r": 2}
    model = join(folder, replace(joined, slide=slide))
    model.save_pretrained(tmp_path / "model")
    again = TextHarmony.from_pretrained(tmp_path / "model")
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(model.language(input_ids=ids).logits, again.language(input_ids=ids).logits)
    assert again.answer(picture, "what", num_beams=2) == model.answer(picture, "what", num_beams=2)
    assert np.array_equal(again.draw("a sign"), model.draw("a sign"))


# What does not fit


def test_an_unknown_vision_model_is_named(folder: Miniature, joined: ModelConfig) -> None:
    with pytest.raises(ValueError, match="vision model is a llama, expected CLIP or SigLIP"):
        join(replace(folder, vision=folder.language), joined)


def test_pixels_without_statistics_are_named(folder: Miniature, joined: ModelConfig) -> None:
    (folder.vision / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"preprocessor_config\.json"):
        join(folder, joined)


def test_a_folder_that_is_missing_is_named(folder: Miniature, joined: ModelConfig) -> None:
    for part in ("vision", "language", "image"):
        with pytest.raises((OSError, ValueError), match="nowhere"):
            join(replace(folder, **{part: folder.image.parent / "nowhere"}), joined)
    shutil.rmtree(folder.image / "scheduler")
    with pytest.raises(OSError, match="scheduler"):
        join(folder, joined)


def test_a_tokenizer_without_an_end_is_named(folder: Miniature, joined: ModelConfig) -> None:
    path = folder.language / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": None}))
    with pytest.raises(ValueError, match="no end-of-text token"):
        join(folder, joined)


def test_a_unet_of_other_channels_is_named(folder: Miniature, joined: ModelConfig) -> None:
    path = folder.image / "unet"
    config = json.loads((path / "config.json").read_text())
    shutil.rmtree(path)
    diffusers.UNet2DConditionModel.from_config(config | {"in_channels": 7}).save_pretrained(path)
    with pytest.raises(ValueError, match=r"7 input and 4 output channels, expected 4, or 9 of one that fills in"):
        join(folder, joined)


def test_a_size_that_does_not_fit_is_named(folder: Miniature, joined: ModelConfig) -> None:
    with pytest.raises(ValueError, match=r"drawing_size is \(32, 48\), expected the proportion"):
        replace(joined, drawing_size=(32, 48))
    with pytest.raises(ValueError, match=r"pictures are \(33, 33\), expected multiples"):
        join(folder, replace(joined, drawing_size=(33, 33)))


def test_a_language_model_that_stays_where_it_is(
    united: TextHarmony, miniature: Miniature, picture: Image.Image, tmp_path: Path
) -> None:
    """As a quantised one does: the folder has its experts and gate, and says where the rest is."""
    kept = united.config
    try:
        united.config = replace(kept, language_from=str(miniature.language))
        united.save_pretrained(tmp_path)
    finally:
        united.config = kept
    names = {name for name in load_file(tmp_path / "model.safetensors") if name.startswith("language.")}
    assert names and all("lora_" in name or "slidelora_gate" in name for name in names)
    again = TextHarmony.from_pretrained(tmp_path)
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in united.state_dict().items())
    assert again.read(picture) == united.read(picture)


def test_the_page_runs_as_written(folder: Miniature, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/backbones.md, the miniature's folders under the names that it has."""
    page = (Path(__file__).parents[3] / "docs" / "backbones.md").read_text()
    names = ("clip-vit-large-patch14-336", "vicuna-13b-v1.5", "stable-diffusion-2-base")
    for part, name in zip((folder.vision, folder.language, folder.image), names, strict=True):
        assert name in page
        part.rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE):
        exec(compile(block, "backbones.md", "exec"), namespace)
