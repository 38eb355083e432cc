"""The preset "tiny": the embedded model, its tokenizer, and the stages that make it from scratch on two CPU cores."""

from __future__ import annotations

import string
from typing import TYPE_CHECKING

from textharmony.colors import BASIC, CSS
from textharmony.config import LayoutConfig, ModelConfig, Stage, TrainConfig
from textharmony.prompts import (
    BOI,
    DRAW_PROMPT,
    EDIT_PROMPT,
    FILL_QUESTION,
    IMAGE,
    LOCATE_QUESTION,
    READ_QUESTION,
    TEXT_PROMPT,
)
from textharmony.wordings import (
    CANNOT_TELL,
    CAPTIONS,
    ENDINGS,
    OPENINGS,
    ORDINALS,
    QUESTIONS,
    first_words,
    vocabulary,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_LATENTS = 16

# fmt: off
TINY = ModelConfig(
    image_size=(32, 128),
    vision={
        "model_type": "vit", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 5,
        "num_attention_heads": 4, "image_size": [32, 128], "patch_size": [32, 4],
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    },
    stem=(32, 64, 128, 128),
    context_tokens=20,
    hides_edits=False,
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
    layout=LayoutConfig(
        slots=12, fonts=12, characters="".join(map(chr, range(32, 127))), colors=tuple(BASIC),
        palette=(*CSS, "#rrggbb"), overshoot=0.2, descent=0.35, legible=60.0, least_height=14.0, steps=8,
        least_surety=-0.5, least_surety_of_part=-0.25, least_surety_of_answer=-0.1, alike=0.6,
    ),
    max_new_tokens=24,
    inference_steps=4,
)

_ALL_TASKS = {"read": 0.2, "locate": 0.14, "draw": 0.28, "answer": 0.22, "edit": 0.16}

TINY_TRAINING = TrainConfig((
    # The first four stages make what pretrained parts would bring: a VAE, a ViT that tells characters apart, and a
    # language model and layout planner that spell and read.
    Stage(
        name="autoencoder", trainable=r"image_decoder\.vae", tasks={"draw": 0.5, "edit": 0.5}, losses=("autoencoder",),
        steps=3200, batch_size=16, learning_rate=2e-3, decay_share=0.5,
    ),
    Stage(
        name="characters", trainable=r"visual_tokenizer", tasks={"read": 0.7, "locate": 0.3}, losses=("words",),
        steps=3000, batch_size=64, learning_rate=1.5e-3,
    ),
    # No text loss: drawings ask for nothing but BOI, which would drive all other embeddings into one.
    Stage(
        name="spelling",
        trainable=r"language\.(?!.*lora_|slidelora_gate)|image_decoder\.(resampler|planner|painter)|begin_image",
        tasks={"draw": 1}, losses=("layout",), steps=1500, batch_size=64, learning_rate=1.5e-3,
    ),
    Stage(
        name="reading", trainable=r"visual_tokenizer|language\.(?!.*lora_|slidelora_gate)|begin_image",
        tasks={"read": 0.36, "locate": 0.2, "answer": 0.44}, losses=("text", "words"),
        steps=1500, batch_size=48, learning_rate=1.5e-3,
    ),
    # Of the ViT, which tells characters apart in a thousand fonts, the answers depend most.
    Stage(
        name="more-characters", trainable=r"visual_tokenizer", tasks={"read": 0.7, "locate": 0.3}, losses=("words",),
        steps=9000, batch_size=64, learning_rate=1.5e-3,
    ),
    # The language model alone, which is half of the work of a step.
    Stage(
        name="more-reading", trainable=r"language\.(?!.*lora_|slidelora_gate)|begin_image",
        tasks={"read": 0.5, "locate": 0.15, "answer": 0.35}, losses=("text",),
        steps=2000, batch_size=48, learning_rate=1.5e-3,
    ),
    # Stage 1 of the paper aligns resamplers and image decoder. From scratch, ViT and language model train too, on all
    # tasks.
    Stage(
        name="align", trainable=r"(?!image_decoder\.vae|.*lora_|.*slidelora_gate)", tasks=_ALL_TASKS,
        steps=1500, batch_size=48, learning_rate=1.5e-3,
    ),
    # Colours, positions and counts: the ViT has to keep what the questions ask for.
    Stage(
        name="answers", trainable=r"visual_tokenizer|language\.(?!.*lora_|slidelora_gate)|begin_image",
        tasks={"answer": 0.6, "read": 0.25, "locate": 0.15}, losses=("text", "words"),
        steps=3000, batch_size=48, learning_rate=1.5e-3,
    ),
    # Stage 2 of the paper: the language model is frozen; Slide-LoRA and its gate train with the rest.
    Stage(
        name="tune", trainable=r"(?!image_decoder\.vae|language\.)|language\..*(lora_|slidelora_gate)",
        tasks=_ALL_TASKS, losses=("text", "image", "layout", "words", "gate"), adapters=True,
        steps=900, batch_size=48, learning_rate=1e-3, decay_share=0.7,
    ),
    # A pretrained ViT has seen far more pictures: this stage shows many more words to it, and trains the gate.
    Stage(
        name="sharpen", trainable=r"visual_tokenizer|language\.slidelora_gate", adapters=True,
        tasks={"read": 0.5, "locate": 0.2, "answer": 0.25, "edit": 0.05}, losses=("text", "words", "gate"),
        steps=700, batch_size=48, learning_rate=1e-3, decay_share=0.8,
    ),
    # These two on one GPU, which sees more pictures in ten minutes than two cores in six hours. First all that is no
    # adapter, then as in the paper's stage 2 once more.
    Stage(
        name="wide", trainable=r"(?!image_decoder\.vae|.*lora_|.*slidelora_gate)",
        tasks={"read": 0.24, "locate": 0.11, "draw": 0.27, "answer": 0.23, "edit": 0.15},
        steps=2000, batch_size=512, learning_rate=1.5e-3, decay_share=0.5,
    ),
    Stage(
        name="tune-wide", trainable=r"(?!image_decoder\.vae|language\.)|language\..*(lora_|slidelora_gate)",
        tasks={"read": 0.24, "locate": 0.11, "draw": 0.27, "answer": 0.23, "edit": 0.15},
        losses=("text", "image", "layout", "words", "gate"), adapters=True,
        steps=2100, batch_size=512, learning_rate=1e-3, decay_share=0.7,
    ),
    # What the VAE's decoder loses, thin strokes above all, is lost to every drawing.
    Stage(
        name="strokes", trainable=r"image_decoder\.vae\.(decoder|post_quant_conv)", tasks={"draw": 0.6, "edit": 0.4},
        losses=("autoencoder",), steps=3600, batch_size=32, learning_rate=1e-3, decay_share=0.5,
    ),
    # The gate alone, on pictures of every kind with questions as with edits: it decides by the words.
    Stage(
        name="gate", trainable=r"language\.slidelora_gate", adapters=True, losses=("gate",),
        tasks={"read": 0.1, "locate": 0.1, "draw": 0.25, "answer": 0.3, "edit": 0.25},
        steps=1000, batch_size=64, learning_rate=1e-3, decay_share=0.7,
    ),
))
# fmt: on

_TEMPLATES = [TEXT_PROMPT, DRAW_PROMPT, EDIT_PROMPT, READ_QUESTION, LOCATE_QUESTION, FILL_QUESTION, CANNOT_TELL]
_PATTERNS = [pattern for patterns in (*CAPTIONS.values(), *QUESTIONS.values()) for pattern in patterns]
_AROUND = [OPENINGS, ENDINGS]  # questions
_SPECIALS = ("<pad>", "<s>", "</s>", "<unk>", BOI, IMAGE)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a character tokenizer in which instruction words, outside of double quotes, are single tokens.

    A word is one token after a space, or where it begins a text and others follow.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = dict.fromkeys([*vocabulary([*_TEMPLATES, *_PATTERNS, *_AROUND]), *ORDINALS, "last", *CSS])
    begins = {word for of in QUESTIONS.values() for pattern in (*of, OPENINGS) for word in first_words(pattern)}
    begins |= {text.split()[0] for text in _TEMPLATES}
    first = sorted({form for word in begins if word.isalpha() for form in (word, word.capitalize()) if len(word) > 1})
    characters = [c for c in string.printable if c not in string.whitespace or c in " \n"]
    tokens = [*_SPECIALS, *characters, " a", *(f" {word}" for word in words), *first]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    after_space, at_start = ("|".join(sorted(of, key=len, reverse=True)) for of in ([*words, "a"], first))
    unquoted = r'(?=[^"]*(?:"[^"]*"[^"]*)*\z)'
    pattern = rf" (?:{after_space})\b{unquoted}|\A(?:{at_start})(?= ){unquoted}|[\s\S]"
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
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
