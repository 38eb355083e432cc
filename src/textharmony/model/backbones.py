"""The models of other libraries that a TextHarmony is made of: built from configurations or loaded from folders."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from tokenizers import AddedToken
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from textharmony.config import ModelConfig
from textharmony.files import quote
from textharmony.prompts import BOI, IMAGE

DTypes = torch.dtype | Mapping[str, torch.dtype] | None
PARTS = ("vision", "language", "image")


@dataclass(frozen=True)
class Backbones:
    """Models with their weights; None: built from the configuration with random weights."""

    vision: PreTrainedModel | None = None
    language: PreTrainedModel | None = None
    unet: Any = None
    vae: Any = None


def dtype_of(dtype: DTypes, part: str) -> torch.dtype:
    """The dtype of one of PARTS, fp32 by default; raise ValueError for an unknown part or a dtype that is no float."""
    found = dtype.get(part) if isinstance(dtype, Mapping) else dtype
    if isinstance(dtype, Mapping) and (unknown := sorted(set(dtype) - set(PARTS))):
        raise ValueError(f"dtype has {unknown}, expected some of {PARTS}")
    if found is not None and not found.is_floating_point:
        raise ValueError(f"dtype of {part} is {found}, expected a floating-point one")
    return found or torch.float32


def build_vision(config: ModelConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Build a transformers vision model with random weights."""
    return cast(PreTrainedModel, AutoModel.from_config(_transformers_config(config.vision, "vision"), dtype=dtype))


def build_language(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Build a transformers causal language model with random weights and a row for each token of the tokenizer."""
    values = dict(config.language) | {
        "vocab_size": max(config.language.get("vocab_size", 0), len(tokenizer)),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return cast(
        PreTrainedModel, AutoModelForCausalLM.from_config(_transformers_config(values, "language"), dtype=dtype)
    )


def _transformers_config(values: Mapping[str, Any], field: str) -> Any:
    if not isinstance(kind := values.get("model_type"), str) or kind not in CONFIG_MAPPING:
        raise ValueError(f"{field} has model_type {quote(kind)}, expected a kind of model that transformers has")
    try:
        return AutoConfig.for_model(**values)
    except Exception as error:  # each configuration checks its fields in its own way
        raise ValueError(f"{field} is no configuration of {kind}: {' '.join(str(error).split())[:300]}") from error


def count_positions(config: ModelConfig) -> int | None:
    """Count the tokens of the longest row that the language model was made for; None where nothing tells."""
    language = _transformers_config(config.language, "language").get_text_config()
    positions = getattr(language, "max_position_embeddings", None)
    rope = getattr(language, "rope_parameters", None) or {}
    stretched = (rope.get("factor") or 1) * (rope.get("original_max_position_embeddings") or 0)
    return max(positions, int(stretched)) if isinstance(positions, int) else None


def build_unet(config: ModelConfig) -> Any:
    """Build a diffusers UNet with random weights."""
    return _diffusers_class(config.unet, "unet").from_config(dict(config.unet))


def build_vae(config: ModelConfig) -> Any:
    """Build a diffusers VAE with random weights."""
    return _diffusers_class(config.vae, "vae").from_config(dict(config.vae))


def _diffusers_class(values: Mapping[str, Any], field: str) -> Any:
    """The class that a configuration names: a model of diffusers, and nothing else that is there."""
    name = values.get("_class_name")
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, diffusers.ModelMixin)):
        raise ValueError(f"{field} has _class_name {quote(name)}, expected a model of diffusers")
    return found


def load_backbones(
    vision: str | Path,
    language: str | Path,
    image: str | Path,
    config: ModelConfig,
    dtype: DTypes = None,
    device_map: Any = None,
    quantization_config: Any = None,
) -> tuple[ModelConfig, PreTrainedTokenizerBase, Backbones]:
    """Load the models of TextHarmony.from_backbones: `config` with their configurations, the tokenizer, the models."""
    # What is quick comes first: a fault should show before the language model is loaded, which takes minutes.
    check_parts(vision, language, image)
    with _naming("vision", vision):
        vision_config = _vision_part(AutoConfig.from_pretrained(vision))
        mean, std = _pixel_statistics(vision)
        if config.image_size != (vision_config.image_size,) * 2:  # SigLIP's own 384 is no multiple of its patches of 14
            _check_multiple("image_size", config.image_size, "the ViT's patches", vision_config.patch_size)
    with _naming("image", image):
        cell = _cell(diffusers.AutoencoderKL.load_config(image, subfolder="vae"))
        _check_multiple("drawing_size", config.target_size, "the VAE's cells", cell)
    with _naming("language", language):
        tokenizer = load_tokenizer(language)
        llm = load_language(language, tokenizer, dtype_of(dtype, "language"), device_map, quantization_config)
    with _naming("vision", vision):
        vit = cast(
            PreTrainedModel, AutoModel.from_pretrained(vision, config=vision_config, dtype=dtype_of(dtype, "vision"))
        )
    with _naming("image", image):
        unet, vae, scheduler = _load_image(image, dtype_of(dtype, "image"))
    quantization = getattr(llm.config, "quantization_config", None)
    config = replace(
        config,
        language_from=None if quantization is None else str(language),
        quantization=None if quantization is None else _json(quantization.to_dict()),
        vision=_transformers_values(vit.config),
        language=_transformers_values(llm.config),
        unet=_diffusers_values(unet.config),
        vae=_diffusers_values(vae.config),
        scheduler=_diffusers_values(scheduler) | ({} if config.released is None else {"_class_name": "DDPMScheduler"}),
        pixel_mean=mean,
        pixel_std=std,
    )
    return config, tokenizer, Backbones(vit, llm, unet, vae)


_MARKS = {  # what a folder must have
    "vision": ("config.json",),
    "language": ("config.json",),
    "image": ("unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"),
}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def check_parts(vision: str | Path, language: str | Path, image: str | Path) -> None:
    """Raise FileNotFoundError that names the part for a folder that lacks a file, or that does not exist.

    Of what is no folder, only what can be an id, such as "openai/clip-vit-large-patch14", is looked for on the hub, and
    not if its first half is a folder here.
    """
    for part, path in zip(PARTS, (vision, language, image), strict=True):
        folder = Path(path)
        if folder.is_dir():
            if missing := [name for name in _MARKS[part] if not (folder / name).is_file()]:
                raise FileNotFoundError(f"{part} is {folder}, which has no {missing[0]}")
        elif (
            not isinstance(path, str)
            or not _HUB_ID.fullmatch(path)
            or path.startswith(".")
            or ("/" in path and folder.parent.is_dir())
        ):
            raise FileNotFoundError(f"{part} is {path}, which is no folder")


@contextmanager
def _naming(part: str, path: str | Path) -> Iterator[None]:
    """Let an error of the body name one of PARTS and where it was loaded from."""
    try:
        yield
    except Exception as error:  # each library raises its own ones at damaged files
        reason = " ".join(str(error).split())[:500]
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"{part} is {path}, which cannot be loaded: {reason}") from error


def _check_multiple(name: str, size: tuple[int, int], whose: str, cell: Any) -> None:
    if not isinstance(cell, int) or not all(side > 0 and side % cell == 0 for side in size):
        raise ValueError(f"{name} is {size[0]} x {size[1]}, expected multiples of {whose} of {cell} pixels")


def _cell(vae: Mapping[str, Any]) -> int:
    """How many pixels wide a latent pixel of a VAE is."""
    return int(2 ** (len(vae["block_out_channels"]) - 1))


def drawing_size(image: str | Path) -> tuple[int, int]:
    """(height, width) in pixels of the pictures that a Stable Diffusion model was trained on."""
    unet = diffusers.UNet2DConditionModel.load_config(image, subfolder="unet")
    vae = diffusers.AutoencoderKL.load_config(image, subfolder="vae")
    size = unet.get("sample_size")
    if not size:
        raise ValueError(f"the UNet of {image} has no sample_size, expected a drawing_size in the configuration")
    height, width = (size, size) if isinstance(size, int) else size
    cell = _cell(vae)
    return height * cell, width * cell


def load_tokenizer(language: str | Path) -> PreTrainedTokenizerBase:
    """The language model's tokenizer with the special tokens of pictures and a padding token."""
    tokenizer = cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(language))
    if tokenizer.eos_token is None:
        raise ValueError(f"the tokenizer of {language} has no end-of-text token, expected one that ends answers")
    if tokenizer.pad_token is None:  # padding is masked, so any token will do
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in (BOI, IMAGE)])
    return tokenizer


def load_language(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, device_map: Any, quantization_config: Any
) -> PreTrainedModel:
    """Load a causal language model and add embedding rows for the added tokens; its own rows stay bit for bit."""
    given = {"device_map": device_map, "quantization_config": quantization_config}
    named = {name: value for name, value in given.items() if value is not None}
    model = cast(PreTrainedModel, AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **named))
    words: Any = model.get_input_embeddings()
    if len(tokenizer) > (count := words.weight.shape[0]):  # many models have more rows than tokens
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        outer: Any = (model.get_input_embeddings(), model.get_output_embeddings())
        for rows in outer:
            with torch.no_grad():
                rows.weight[count:] = rows.weight[:count].float().mean(0).to(rows.weight)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for name, value in ids.items():
        setattr(model.config, name, value)
    model.generation_config = GenerationConfig(**ids)  # drop its sampling settings: the caller decides
    return model


def _vision_part(config: Any) -> Any:
    """The vision part of a configuration, which may be that of a whole CLIP or SigLIP."""
    found = getattr(config, "vision_config", config)
    if not found.model_type.endswith("vision_model") or "siglip2" in found.model_type:
        raise ValueError(f"the vision model is a {config.model_type}, expected CLIP or SigLIP")
    if found.model_type.startswith("siglip"):
        found.vision_use_head = False  # the pooling head is not used; transformers before 5.23 has no default for it
    return found


def _load_image(path: str | Path, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """Load UNet, VAE and the scheduler's configuration from a folder in the layout of Stable Diffusion."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(path, subfolder="unet", torch_dtype=dtype)
    vae = diffusers.AutoencoderKL.from_pretrained(path, subfolder="vae", torch_dtype=dtype)
    return unet, vae, diffusers.DDPMScheduler.load_config(path, subfolder="scheduler")


def _pixel_statistics(vision: str | Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of pixels in 0..1, from preprocessor_config.json."""
    try:
        processor = AutoImageProcessor.from_pretrained(vision)
        return tuple(processor.image_mean), tuple(processor.image_std)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{vision} does not tell the mean and standard deviation of pixels, expected a preprocessor_config.json: "
            f"{error}"
        ) from error


def _transformers_values(config: Any) -> dict[str, Any]:
    """A transformers configuration as JSON values for AutoConfig.for_model."""
    dropped = ("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "quantization_config")
    values = {name: value for name, value in config.to_diff_dict().items() if name not in dropped}
    return _json(values | {"model_type": config.model_type})


def _diffusers_values(config: Any) -> dict[str, Any]:
    """A diffusers configuration as JSON values, with its class by name."""
    return _json({name: value for name, value in config.items() if name != "_name_or_path"})


def _json(values: Mapping[str, Any]) -> dict[str, Any]:
    return cast(dict[str, Any], json.loads(json.dumps(dict(values), default=str)))
