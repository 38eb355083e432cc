"""Models of other libraries, joined: each part computes what it computes in its own library."""

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
from batches import collate
from closeness import relative_error
from miniatures import Miniature, join, write_clip_llama_sd
from PIL import Image
from safetensors.torch import load_file
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
from textharmony.config import ModelConfig
from textharmony.data.record import Record
from textharmony.images import fit_image
from textharmony.model.backbones import check_parts, drawing_size, dtype_of, load_backbones
from textharmony.pipeline import TextHarmony
from textharmony.prompts import BOI, IMAGE, Task

DOCS = Path(__file__).parents[3] / "docs"


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (56, 56, 3), np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Miniature:
    """To spoil."""
    with torch.random.fork_rng():
        return write_clip_llama_sd(tmp_path)


# The vision model


def test_the_vit_computes_what_its_library_computes(
    united: TextHarmony, miniature: Miniature, picture: Image.Image
) -> None:
    """Its image processor normalises the pixels, its own interpolation moves the positions from 28 pixels to 56."""
    processor = AutoImageProcessor.from_pretrained(miniature.vision)
    config = AutoConfig.from_pretrained(miniature.vision)
    vit = AutoModel.from_pretrained(miniature.vision, config=getattr(config, "vision_config", config))
    inputs = processor(picture, do_resize=False, do_center_crop=False, return_tensors="pt")
    with torch.no_grad():
        expected = vit(**inputs, interpolate_pos_encoding=True).last_hidden_state
        tokens, patches, logits = united.visual_tokenizer(fit_image(picture, (56, 56)).pixels[None])
    assert expected.shape[1] - 16 in (0, 1)  # with or without a class token
    assert relative_error(patches, expected[:, -16:]) < 1e-5
    assert tokens.shape == (1, 6, 32) and logits is None


@pytest.mark.parametrize("size", [28, 448, 896])
def test_any_size_of_pictures(miniature: Miniature, joined: ModelConfig, size: int) -> None:
    model = join(miniature, replace(joined, image_size=(size, size)))
    with torch.no_grad():
        tokens, *_ = model.visual_tokenizer(torch.zeros(1, 3, size, size))
    assert tokens.shape == (1, 6, 32) and tokens.isfinite().all()
    assert model.visual_tokenizer.positions.shape[0] == (size // 14) ** 2


# The language model and its tokenizer


def test_the_old_tokens_are_as_they_were(united: TextHarmony, miniature: Miniature) -> None:
    original = AutoModelForCausalLM.from_pretrained(miniature.language)
    tokenizer = AutoTokenizer.from_pretrained(miniature.language)
    text = "read all the text 42 ÄÖ"
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    assert united.tokenizer(text, add_special_tokens=False)["input_ids"] == ids[0].tolist()
    count = len(tokenizer)
    for old, new in (
        (original.get_input_embeddings(), united.language.get_input_embeddings()),
        (original.get_output_embeddings(), united.language.get_output_embeddings()),
    ):
        assert torch.equal(new.weight[:count], old.weight[:count])
    with torch.no_grad(), slidelora.disabled(united.language):
        logits = united.language(input_ids=ids).logits
        expected = original(input_ids=ids).logits
    assert relative_error(logits[..., :count], expected[..., :count]) < 1e-6


def test_new_tokens(united: TextHarmony, miniature: Miniature) -> None:
    tokenizer = united.tokenizer
    old = AutoTokenizer.from_pretrained(miniature.language)
    assert (united.boi_id, united.image_id) == (len(old), len(old) + 1)
    ids = tokenizer(f"{BOI}{IMAGE}{IMAGE}", add_special_tokens=False)["input_ids"]
    assert ids == [united.boi_id, united.image_id, united.image_id]
    assert tokenizer.pad_token is not None and tokenizer.eos_token == old.eos_token
    original = AutoModelForCausalLM.from_pretrained(miniature.language)
    for before, after in (
        (original.get_input_embeddings().weight, united.language.get_input_embeddings().weight),
        (original.get_output_embeddings().weight, united.language.get_output_embeddings().weight),
    ):
        if len(before) >= len(tokenizer):  # rows to spare
            assert torch.equal(after, before)
        else:
            assert len(after) == len(tokenizer) == len(before) + 2
            assert torch.equal(after[:-2], before)
            assert relative_error(after[-2:], before.mean(0).expand(2, -1)) < 1e-5


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


def quantisation(library: str) -> Any:
    """The configuration of a quantisation in eight bits; skips the test without its library."""
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
    answer = model.read(picture)
    model.save_pretrained(tmp_path)
    names = {name for name in load_file(tmp_path / "model.safetensors") if name.startswith("language.")}
    assert names and all("lora_" in name or "slidelora_gate" in name for name in names)
    again = TextHarmony.from_pretrained(tmp_path)
    assert again.language.is_quantized and again.read(picture) == answer
    assert np.array_equal(again.draw("a sign"), model.draw("a sign"))
    experts = [p for name, p in model.named_parameters() if "lora_B" in name]
    for parameter in experts:
        parameter.requires_grad_(True)
    record = Record("1", Task.READ, "test", "read", (picture,), ("A",))
    model.train()(**collate(model.config, model.tokenizer, [record]), losses=("text",))["text"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in experts)


def test_a_device_map(miniature: Miniature, joined: ModelConfig, picture: Image.Image) -> None:
    model = join(miniature, joined, device_map={"": "cpu"})
    assert model.device.type == "cpu" and isinstance(model.read(picture), str)


# The whole


def test_the_configuration_holds_what_the_folders_say(miniature: Miniature, joined: ModelConfig) -> None:
    """What joins the parts stays; JSON keeps it all."""
    config, _, parts = load_backbones(miniature.vision, miniature.language, miniature.image, joined)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    replaced = ("vision", "language", "unet", "vae", "scheduler", "pixel_mean", "pixel_std")
    assert replace(config, **{name: getattr(joined, name) for name in replaced}) == joined
    processor = AutoImageProcessor.from_pretrained(miniature.vision)
    assert config.pixel_mean == tuple(processor.image_mean) and config.pixel_std == tuple(processor.image_std)
    scheduler = diffusers.DDPMScheduler.load_config(miniature.image, subfolder="scheduler")
    assert config.scheduler["prediction_type"] == scheduler["prediction_type"]
    assert None not in (parts.vision, parts.language, parts.unet, parts.vae)


def test_the_size_that_a_unet_draws(miniature: Miniature) -> None:
    assert drawing_size(miniature.image) == (32, 32)


def test_dtypes_are_checked() -> None:
    kinds = {"vision": torch.bfloat16}
    assert dtype_of(None, "vision") == dtype_of(kinds, "image") == torch.float32
    assert dtype_of(kinds, "vision") == dtype_of(torch.bfloat16, "language") == torch.bfloat16
    with pytest.raises(ValueError, match=r"dtype has \['sound'\], expected some of"):
        dtype_of({"sound": torch.float16}, "vision")
    with pytest.raises(ValueError, match=r"dtype of vision is torch\.int8"):
        dtype_of(torch.int8, "vision")


def test_the_page_runs_as_written(folder: Miniature, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/backbones.md, with the miniature's folders under the names that it uses."""
    page = (DOCS / "backbones.md").read_text()
    names = ("clip-vit-large-patch14-336", "vicuna-13b-v1.5", "stable-diffusion-2-base")
    for part, name in zip((folder.vision, folder.language, folder.image), names, strict=True):
        assert name in page
        part.rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE):
        exec(compile(block, "backbones.md", "exec"), namespace)


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


def test_a_folder_that_is_missing_is_not_looked_for_on_a_hub(
    folder: Miniature, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = {"vision": folder.vision, "language": folder.language, "image": folder.image}
    check_parts(**parts)
    check_parts("openai/clip-vit-large-patch14", "gpt2", "stabilityai/stable-diffusion-2-base")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "empty").mkdir()
    for part in parts:
        for path in ("models/nowhere", "./nowhere", "/nowhere", "a/b/c", "~/nowhere", Path("nowhere")):
            with pytest.raises(FileNotFoundError, match=f"^{part} is .*which is no folder$"):
                check_parts(**parts | {part: path})
        with pytest.raises(FileNotFoundError, match=rf"^{part} is empty, which has no .*config\.json$"):
            check_parts(**parts | {part: "empty"})


@pytest.mark.parametrize("part", ["vision", "language", "image"])
def test_a_part_that_cannot_be_loaded_is_named(folder: Miniature, joined: ModelConfig, part: str) -> None:
    path = getattr(folder, part)
    for file in path.rglob("*.safetensors"):
        file.write_bytes(b"damaged")
    with pytest.raises((OSError, ValueError), match=f"^{part} is {path}, which cannot be loaded: "):
        join(folder, joined)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"image_size": (56, 60)},
            "^vision is .*image_size is 56 x 60, expected multiples of the ViT's patches of 14 p",
        ),
        ({"image_size": (7, 7)}, "^vision is .*image_size is 7 x 7, expected multiples"),
        ({"image_size": (0, 0)}, "^vision is .*image_size is 0 x 0, expected multiples"),
        ({"drawing_size": (33, 33)}, "^image is .*drawing_size is 33 x 33, expected multiples of the VAE's cells of "),
    ],
)
def test_sizes_are_checked_before_weights_are_loaded(
    folder: Miniature, joined: ModelConfig, sizes: dict[str, Any], message: str
) -> None:
    for file in folder.language.rglob("*.safetensors"):
        file.unlink()
    with pytest.raises(ValueError, match=message):
        load_backbones(
            folder.vision,
            folder.language,
            folder.image,
            replace(joined, **sizes | {"drawing_size": None} if "image_size" in sizes else sizes),
        )


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
    with pytest.raises(ValueError, match="7 input and 4 output channels, expected 4, or 9 for inpainting"):
        join(folder, joined)


def test_a_unet_without_a_size_is_named(folder: Miniature) -> None:
    path = folder.image / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": None}))
    with pytest.raises(ValueError, match="no sample_size, expected a drawing_size in the configuration"):
        drawing_size(folder.image)
