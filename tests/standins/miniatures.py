"""Random-weight miniatures of real backbones, in the folders that transformers and diffusers write."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2TokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from textharmony.config import ModelConfig
from textharmony.pipeline import TextHarmony

# What joins miniatures, as in a file of settings.
SETTINGS: dict[str, Any] = {
    "image_size": [56, 56],
    "drawing_size": [32, 32],
    "visual_tokens": 6,
    "context_tokens": 5,
    "visual_resampler": {"depth": 2, "heads": 2, "width": 24},
    "context_resampler": {"depth": 1, "heads": 2},
    "inference_steps": 3,
    "max_new_tokens": 8,
}

_CORPUS = [
    "Based on the image, please answer the question. read all the text The answer is: HELLO world 42",
    'Generate an image according to the caption. "CAFE" in red on white',
    'Fill the masked part in this image with "OPEN" where is the sign (100,200)(300,400)',
]


@dataclass(frozen=True)
class Miniature:
    """The folders of three backbones."""

    vision: Path
    language: Path
    image: Path


def write_clip_llama_sd(root: Path) -> Miniature:
    """Write a CLIP vision model, a Llama as Vicuna stores it (no pad token), a Stable Diffusion that predicts noise."""
    torch.manual_seed(1)
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    CLIPVisionModel(CLIPVisionConfig(**vision, image_size=28, patch_size=14)).save_pretrained(root / "clip")
    CLIPImageProcessor().save_pretrained(root / "clip")
    count = _save_llama_tokenizer(root / "llama")  # a row for each token: the model has to grow
    LlamaForCausalLM(
        LlamaConfig(**_LANGUAGE, vocab_size=count, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False)
    ).save_pretrained(root / "llama")
    _save_stable_diffusion(root / "sd", "PNDMScheduler", "epsilon", skip_prk_steps=True, steps_offset=1)
    return Miniature(root / "clip", root / "llama", root / "sd")


def write_siglip_qwen_sd(root: Path) -> Miniature:
    """Write a whole SigLIP, a Qwen2 (no begin token, tied embeddings, spare rows) and one that predicts velocity."""
    torch.manual_seed(2)
    layers = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = SiglipConfig(
        vision_config=layers | {"image_size": 28, "patch_size": 14}, text_config=layers | {"vocab_size": 32}
    )
    SiglipModel(config).save_pretrained(root / "siglip")
    SiglipImageProcessor().save_pretrained(root / "siglip")
    _save_qwen_tokenizer(root / "qwen")
    Qwen2ForCausalLM(
        Qwen2Config(**_LANGUAGE, vocab_size=400, tie_word_embeddings=True, bos_token_id=None, eos_token_id=0)
    ).save_pretrained(root / "qwen")
    _save_stable_diffusion(root / "sd-v", "DDIMScheduler", "v_prediction", set_alpha_to_one=False, clip_sample=False)
    return Miniature(root / "siglip", root / "qwen", root / "sd-v")


def join(miniature: Miniature, config: ModelConfig, **options: Any) -> TextHarmony:
    """A model of a miniature's backbones, joined as a configuration says."""
    return TextHarmony.from_backbones(miniature.vision, miniature.language, miniature.image, config, **options)


WRITERS = {"clip-llama-sd": write_clip_llama_sd, "siglip-qwen-sdv": write_siglip_qwen_sd}

_LANGUAGE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}


def _save_llama_tokenizer(path: Path) -> int:
    """Save byte-pair encoding as SentencePiece does it, with a blank before each word, and count its tokens."""
    specials = ["<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    vocab = [*specials, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(_CORPUS, trainer)
    learned = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    vocab += [token for token, _ in learned if token not in specials]
    tokenizer.model = models.BPE(
        {token: i for i, token in enumerate(vocab)}, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    LlamaTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(path)
    return len(vocab)


def _save_qwen_tokenizer(path: Path) -> None:
    """Save byte-pair encoding of bytes, whose token for the end of a text also pads."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    Qwen2TokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>", bos_token=None, unk_token=None
    ).save_pretrained(path)


def _save_stable_diffusion(path: Path, scheduler: str, prediction: str, **rest: Any) -> None:
    unet = diffusers.UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=(2, 4),
        norm_num_groups=8,
        cross_attention_dim=32,
        use_linear_projection=True,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
    )
    unet.save_pretrained(path / "unet")
    vae.save_pretrained(path / "vae")
    getattr(diffusers, scheduler)(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction,
        **rest,
    ).save_pretrained(path / "scheduler")
