"""The released names of a model's weights, and their released shapes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

EXPERTS = ("image", "text", "shared")

_VIT = "visual_tokenizer.encoder.base_model.model.vision_model."
_RELEASED = [  # in this order; our name, the released one
    (r"^begin_image$", "soi_token"),
    (r"^language\.lm_head\.new\.", "text_decoder.head_new."),
    (r"^language\.lm_head\.", "text_decoder.head."),
    (r"^language\.model\.", "mm_decoder."),
    (r"^(mm_decoder\..*)\.pictures\.", r"\1.llama_cross_attn."),
    (r"^(mm_decoder\..*)\.base_layer\.", r"\1."),
    (r"^(mm_decoder\..*)\.lora_([AB])$", r"\1.lora_moe_\2.default"),
    (r"^(visual_tokenizer\.vit\..*\.lora_[AB])\.", r"\1.default."),
    (r"^visual_tokenizer\.vit\.", _VIT),
    (r"^visual_tokenizer\.adapter\.(.*)\.dwconv\.", rf"{_VIT}adapter_\1.dwconv.dwconv."),
    (r"^visual_tokenizer\.adapter\.", f"{_VIT}adapter_"),
    (r"^visual_tokenizer\.positions$", "visual_tokenizer.pos_embed"),
    (r"\.resampler\.queries$", ".perceiver_resampler.queries"),
    (r"\.resampler\.layernorm\.", ".perceiver_resampler.blip2qformer.layernorm."),
    (r"\.resampler\.layer\.", ".perceiver_resampler.blip2qformer.encoder.layer."),
    (r"^image_decoder\.unconditional$", "image_decoder.neg_prompt_embeds"),
    (r"^image_decoder\.context_proj\.", "context_feat_proj."),
    (r"^image_decoder\.(unet|vae)\.", r"image_decoder.decoder.\1."),
    (r"^image_decoder\.pictures\.down\.", "image_decoder.decoder.mmfs_module.mmfs_down_blocks."),
    (r"^image_decoder\.pictures\.mid\.", "image_decoder.decoder.mmfs_module.mmfs_mid_block."),
]
# Not in the released file: they follow from the VAE's configuration.
_OURS = ("image_decoder.latent_mean", "image_decoder.latent_std")
# In the released file, but not among our weights: the numbers 0, 1, 2, ...
POSITION_IDS = f"{_VIT}embeddings.position_ids"


def released_keys(names: Iterable[str]) -> dict[str, str]:
    """Map the released name of each weight of a model to ours."""
    keys = {}
    for name in names:
        if name not in _OURS:
            key = name
            for pattern, replacement in _RELEASED:
                key = re.sub(pattern, replacement, key)
            keys[key] = name
    return keys


def released_shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a released file for a model's state_dict, by its released name."""
    shapes = {key: to_released(name, state[name]).shape for key, name in released_keys(state).items()}
    shapes[POSITION_IDS] = torch.Size((1, len(state["visual_tokenizer.vit.embeddings.position_embedding.weight"])))
    return {key: tuple(shape) for key, shape in shapes.items()}


def to_released(name: str, tensor: Tensor) -> Tensor:
    """Reshape one of our weights as it is in the released file."""
    if name in ("begin_image", "image_decoder.unconditional"):
        return tensor[None]
    if name.startswith("language.") and name.endswith((".lora_A", ".lora_B")):
        stacked = tensor.unflatten(0, (len(EXPERTS), -1))  # (E, r, d)
        return stacked.mT if name.endswith("A") else stacked
    return tensor


def from_released(name: str, tensor: Tensor) -> Tensor:
    """The inverse of `to_released`, for our weight with this name."""
    if name in ("begin_image", "image_decoder.unconditional"):
        return tensor[0]
    if name.startswith("language.") and name.endswith((".lora_A", ".lora_B")):
        return (tensor.mT if name.endswith("A") else tensor).flatten(0, 1)
    return tensor
