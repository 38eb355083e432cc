"""The preset "tiny": the embedded model, its tokenizer, and the stages that make it from scratch on two CPU cores."""

from __future__ import annotations

import re
import string
from typing import TYPE_CHECKING

from textharmony.config import LayoutConfig, ModelConfig, Stage, TrainConfig
from textharmony.prompts import BOI, IMAGE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_LATENTS = 16

# fmt: off
TINY = ModelConfig(
    image_size=(32, 128),
    vision={
        "model_type": "clip_vision_model", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
        "num_attention_heads": 4, "image_size": 64, "patch_size": 8, "hidden_act": "gelu",
    },
    stem=(32, 64),
    language={
        "model_type": "llama", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 256,
        "tie_word_embeddings": True, "initializer_range": 0.03,
    },
    unet={
        "_class_name": "UNet2DConditionModel", "out_channels": _LATENTS,
        # Noisy latents, kept latents, the mask, and the draft: 4 channels of 4 x 4 pixels.
        "in_channels": 2 * _LATENTS + 1 + 4 * 4 * 4,
        "block_out_channels": [64, 128], "layers_per_block": 1, "attention_head_dim": 4, "norm_num_groups": 8,
        "down_block_types": ["DownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "UpBlock2D"],
        "mid_block_type": "UNetMidBlock2DCrossAttn", "cross_attention_dim": 128,
    },
    vae={
        "_class_name": "AutoencoderKL", "block_out_channels": [16, 32, 64], "layers_per_block": 1,
        "down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3,
        "latent_channels": _LATENTS, "norm_num_groups": 8, "mid_block_add_attention": False,
    },
    scheduler={"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 4.0},
    slide={
        "experts": ["text", "image", "shared"], "shared": ["shared"], "r": 8, "lora_alpha": 8, "gate": "sequence",
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    },
    layout=LayoutConfig(),
    max_new_tokens=24,
)

_ALL_TASKS = {"read": 0.216, "locate": 0.144, "draw": 0.28, "answer": 0.2, "edit": 0.16}

TINY_TRAINING = TrainConfig((
    # The first four stages make what pretrained parts would bring: a VAE, a ViT that tells characters apart, and a
    # language model and layout planner that spell and read.
    Stage(
        name="autoencoder", trainable=r"image_decoder\.vae", tasks={"draw": 1}, losses=("autoencoder",),
        steps=2800, batch_size=16, learning_rate=2e-3, decay_share=0.5,
    ),
    Stage(
        name="characters", trainable=r"visual_tokenizer", tasks={"read": 0.6, "locate": 0.4}, losses=("words",),
        steps=2000, batch_size=64, learning_rate=1.5e-3,
    ),
    # No text loss: drawings ask for nothing but BOI, which would drive all other embeddings into one.
    Stage(
        name="spelling",
        trainable=r"language\.(?!.*lora_|slidelora_gate)|image_decoder\.(resampler|planner|painter)|begin_image",
        tasks={"draw": 1}, losses=("layout",), steps=600, batch_size=64, learning_rate=1.5e-3,
    ),
    Stage(
        name="reading", trainable=r"visual_tokenizer|language\.(?!.*lora_|slidelora_gate)|begin_image",
        tasks={"read": 0.33, "locate": 0.22, "answer": 0.45}, losses=("text", "words"),
        steps=1600, batch_size=48, learning_rate=1.5e-3,
    ),
    # Stage 1 of the paper aligns resamplers and image decoder. From scratch, ViT and language model train too, on all
    # tasks.
    Stage(
        name="align", trainable=r"(?!image_decoder\.vae|.*lora_|.*slidelora_gate)", tasks=_ALL_TASKS,
        steps=1100, batch_size=48, learning_rate=1.5e-3,
    ),
    # Stage 2 of the paper: the language model is frozen; Slide-LoRA and its gate train with the rest.
    Stage(
        name="tune", trainable=r"(?!image_decoder\.vae|language\.)|language\..*(lora_|slidelora_gate)",
        tasks=_ALL_TASKS, losses=("text", "image", "layout", "words", "gate"), adapters=True,
        steps=700, batch_size=48, learning_rate=1e-3, decay_share=0.7,
    ),
    # A pretrained ViT has seen far more pictures: this stage shows many more words to it, and trains the gate.
    Stage(
        name="sharpen", trainable=r"visual_tokenizer|language\.slidelora_gate", adapters=True,
        tasks={"read": 0.51, "locate": 0.34, "answer": 0.1, "edit": 0.05}, losses=("text", "words", "gate"),
        steps=1100, batch_size=48, learning_rate=1e-3, decay_share=0.8,
    ),
))
# fmt: on

_WORDS = re.findall(
    r"[A-Za-z]+",
    """Based on the image please answer question The is Generate an according to caption Fill masked part in this
    with read all text where what color ground character how many characters are there sign word a
    black white red green blue yellow orange purple""",
)
_SPECIALS = ("<pad>", "<s>", "</s>", "<unk>", BOI, IMAGE)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a character tokenizer in which instruction words, also with a space before them, are single tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [prefix + word for word in dict.fromkeys(_WORDS) if len(word) > 1 for prefix in ("", " ")]
    characters = [c for c in string.printable if c not in string.whitespace or c in " \n"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*_SPECIALS, *characters, " a", *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    longest_first = "|".join(sorted(dict.fromkeys(_WORDS), key=len, reverse=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(rf" ?\b(?:{longest_first})\b|[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=[BOI, IMAGE],
        clean_up_tokenization_spaces=False,
    )
