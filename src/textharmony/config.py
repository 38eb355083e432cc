"""What a model is made of and how it is trained, as plain values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

BOX_BINS = 32  # that the vision model divides a picture's width, and its height, into


@dataclass(frozen=True)
class LayoutConfig:
    """The layout planner: one slot a character; None in ModelConfig leaves the planner out.

    colors: names of inks and grounds, which the vision model is asked to tell apart.
    """

    slots: int = 6
    fonts: int = 12
    characters: str = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
    colors: tuple[str, ...] = ("black", "white", "red", "green", "blue", "yellow", "orange", "purple")
    width: int = 96
    depth: int = 3
    heads: int = 4
    glyph_size: tuple[int, int] = (24, 20)
    steps: int = 16


@dataclass(frozen=True)
class ResamplerConfig:
    """A Perceiver resampler; width None is that of what reads its tokens."""

    depth: int = 1
    heads: int = 4
    width: int | None = None


@dataclass(frozen=True)
class MultiScaleConfig:
    """Multi-scale features (textharmony.model.multi_scale): which scales there are, and how they are looked at.

    every: decoder layers from one that looks to the next, the first looks; levels: sizes of the feature maps over that
    of the ViT's grid, powers of two; points: sampled by each head in each level; width: channels of features;
    pictures: how many a token sees at most, the nearest of those before it.
    """

    every: int = 4
    levels: tuple[float, ...] = (1.0, 0.5, 0.25)
    points: int = 4
    heads: int = 8
    width: int = 256
    pictures: int = 8

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(self.levels))  # JSON has lists
        for name in ("every", "points", "heads", "width", "pictures"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.width % self.heads:
            raise ValueError(f"width is {self.width}, expected a multiple of heads, {self.heads}")
        if not self.levels or any(level <= 0 or math.frexp(level)[0] != 0.5 for level in self.levels):
            raise ValueError(f"levels is {self.levels}, expected powers of two such as (2, 1, 0.5)")


@dataclass(frozen=True)
class ModelConfig:
    """One TextHarmony: transformers' and diffusers' own configurations, and what joins them.

    vision, language: transformers configurations with their `model_type`; unet, vae, scheduler: diffusers ones with
    their `_class_name`: the scheduler's class and prediction type say what the UNet predicts. image_size: (height,
    width) in pixels that the ViT sees; drawing_size: that of drawn pictures where it is another, in the same
    proportion. slide, slide_vision: fields of slidelora's configuration for the language model and for the ViT, None
    for no experts there. stem: channels of a convolution stem in place of the ViT's single patch convolution.
    pixel_mean, pixel_std: of what the ViT was trained on, of pixels in 0..1. begin_head: a learned vector that raises
    or lowers the begin-of-image token's logit, for a language model whose head is frozen. feed_back: in training, the
    picture to be drawn is read after its begin-of-image token, and the text ends after it; not with a layout.
    max_new_tokens: after which
    an answer ends unless the caller says otherwise. time_center, time_spread: of rectified flow's noise levels.
    multi_scale: image features that language model and UNet look at beside the visual tokens, None for none.
    language_from, quantization: where a quantised language model, which is not saved with the rest, is loaded from, and
    transformers' configuration of how.
    """

    image_size: tuple[int, int]
    vision: Mapping[str, Any]
    language: Mapping[str, Any]
    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    slide: Mapping[str, Any] | None
    slide_vision: Mapping[str, Any] | None = None
    drawing_size: tuple[int, int] | None = None
    pixel_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    pixel_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    stem: tuple[int, ...] = ()
    visual_tokens: int = 32
    context_tokens: int = 16
    visual_resampler: ResamplerConfig = ResamplerConfig()
    context_resampler: ResamplerConfig = ResamplerConfig()
    begin_head: bool = False
    feed_back: bool = False
    layout: LayoutConfig | None = None
    multi_scale: MultiScaleConfig | None = None
    text_weight: float = 1.0
    image_weight: float = 10.0
    unconditional_share: float = 0.1
    time_center: float = 1.5
    time_spread: float = 1.2
    guidance_scale: float = 1.0
    inference_steps: int = 12
    max_new_tokens: int = 256
    language_from: str | None = None
    quantization: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.feed_back and self.layout is not None:
            raise ValueError("feed_back is True beside a layout, expected one of them: layouts are of input pictures")
        (height, width), (drawn_height, drawn_width) = self.image_size, self.target_size
        if height * drawn_width != width * drawn_height:
            raise ValueError(
                f"drawing_size is {self.drawing_size}, expected the proportion of image_size {self.image_size}"
            )

    @property
    def target_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the pictures that are drawn."""
        return self.drawing_size or self.image_size

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """The inverse of `to_dict`; an unknown key raises ValueError."""
        return _from_dict(cls, values)


# The sizes of CLIP ViT-L/14, Vicuna-13B and Stable Diffusion 2 base are their own; where TextHarmony's are not known
# (learning, the resamplers' insides), the values are ours.
PAPER = ModelConfig(
    image_size=(896, 896),
    drawing_size=(512, 512),
    vision={
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "hidden_act": "quick_gelu",
    },
    pixel_mean=(0.48145466, 0.4578275, 0.40821073),
    pixel_std=(0.26862954, 0.26130258, 0.27577711),
    language={
        "model_type": "llama",
        "vocab_size": 32002,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
    unet={
        "_class_name": "UNet2DConditionModel",
        "sample_size": 64,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [320, 640, 1280, 1280],
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "layers_per_block": 2,
        "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    },
    vae={
        "_class_name": "AutoencoderKL",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
        "sample_size": 768,
        "scaling_factor": 0.18215,
    },
    scheduler={
        "_class_name": "PNDMScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
    },
    slide={
        "experts": ["image", "text", "shared"],
        "shared": ["shared"],
        "r": 32,
        "lora_alpha": 32,
        "lora_dropout": 0.1,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "gate": "sequence",
    },
    visual_tokens=512,
    context_tokens=77,
    visual_resampler=ResamplerConfig(depth=12, heads=12, width=768),
    context_resampler=ResamplerConfig(depth=1, heads=16),
    begin_head=True,
    feed_back=True,
    guidance_scale=7.5,
    inference_steps=30,
)

# As the released code runs it: gates by a table of tasks, and multi-scale features.
RELEASED = replace(PAPER, slide={**(PAPER.slide or {}), "gate": "given"}, multi_scale=MultiScaleConfig())

EXPERTS_ON = ("language", "vision", "both", "none")
_OF_VISION = r"vit\..*\.self_attn\.(q|k|v|out)_proj"


def experts_on(config: ModelConfig, where: str) -> ModelConfig:
    """The configuration with the experts of its language model there, on the ViT's attention, on both, or nowhere.

    where: one of EXPERTS_ON. Raises ValueError.
    """
    if where not in EXPERTS_ON:
        raise ValueError(f"experts on {where!r}, expected one of {EXPERTS_ON}")
    if not isinstance(config.slide, Mapping):
        raise ValueError(f"slide is {config.slide!r}, expected slidelora's fields by name")
    of_vision = {**config.slide, "target_modules": _OF_VISION}
    return replace(
        config,
        slide=config.slide if where in ("language", "both") else None,
        slide_vision=of_vision if where in ("vision", "both") else None,
    )


LOSSES = ("autoencoder", "text", "image", "layout", "columns", "gate")


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    trainable: a regular expression matched at the start of the names of the parameters that train; tasks: sampling
    weight by task id of rendered words, where sources of records are given their own weights hold; losses: which of
    LOSSES are minimised; adapters: whether Slide-LoRA acts. batch_size in samples that an optimizer step sees, in all
    processes and micro-batches; steps and warmup in optimizer steps.
    """

    name: str
    trainable: str
    tasks: Mapping[str, float]
    steps: int
    batch_size: int
    learning_rate: float
    adapters: bool = False
    losses: tuple[str, ...] = ("text", "image", "layout", "columns")
    warmup: int = 50
    decay_share: float = 0.3

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.losses) - set(LOSSES)):
            raise ValueError(f"stage {self.name!r} has losses {unknown}, expected some of {LOSSES}")


DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class TrainConfig:
    """The stages and what they share.

    mixed_precision: "no", "bf16" or "fp16", None as accelerate is configured; gradient_accumulation_steps: how many
    parts a stage's batch goes through the model in; gradient_checkpointing: hidden states of ViT, language model and
    UNet are computed again on the way back; language_dtype: of the weights of a frozen language model that is loaded,
    "float32", "bfloat16" or "float16"; max_length: tokens of a sample, beyond which it is cut. Of records:
    max_faults is the share that may be corrupt, shuffle_buffer how many are held to shuffle what is streamed.
    """

    stages: tuple[Stage, ...]
    seed: int = 0
    weight_decay: float = 0.02
    betas: tuple[float, float] = (0.9, 0.98)
    max_grad_norm: float = 1.0
    save_every: int = 200
    sample_every: int = 400
    mixed_precision: str | None = None
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    language_dtype: str = "float32"
    max_length: int | None = None
    max_faults: float = 0.01
    shuffle_buffer: int = 1000

    def __post_init__(self) -> None:
        if self.gradient_accumulation_steps < 1:
            raise ValueError(f"gradient_accumulation_steps is {self.gradient_accumulation_steps}, expected at least 1")
        if self.language_dtype not in DTYPES:
            raise ValueError(f"language_dtype is {self.language_dtype!r}, expected one of {DTYPES}")


def _from_dict(cls: Any, values: Mapping[str, Any]) -> Any:
    known = {f.name: f for f in fields(cls)}
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"{cls.__name__} has no field {unknown}, expected some of {sorted(known)}")
    arguments = {}
    for name, value in values.items():
        if name in _NESTED and value is not None:
            value = _from_dict(_NESTED[name], value)
        tuples = ("image_size", "drawing_size", "pixel_mean", "pixel_std", "stem", "glyph_size", "colors")
        arguments[name] = tuple(value) if isinstance(value, list) and name in tuples else value
    return cls(**arguments)


_NESTED = {
    "layout": LayoutConfig,
    "multi_scale": MultiScaleConfig,
    "visual_resampler": ResamplerConfig,
    "context_resampler": ResamplerConfig,
}

_TINY_LAYOUT = LayoutConfig()
_TINY_LATENTS = 16

TINY = ModelConfig(
    image_size=(32, 128),
    vision={
        "model_type": "clip_vision_model",
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 64,
        "patch_size": 8,
        "hidden_act": "gelu",
    },
    stem=(32, 64),
    language={
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "initializer_range": 0.03,
    },
    unet={
        "_class_name": "UNet2DConditionModel",
        "in_channels": 2 * _TINY_LATENTS + 1 + 4 * 4 * 4,  # the draft: 4 channels of 4 x 4 pixels
        "out_channels": _TINY_LATENTS,
        "block_out_channels": [64, 128],
        "down_block_types": ["DownBlock2D", "DownBlock2D"],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ["UpBlock2D", "UpBlock2D"],
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
        "cross_attention_dim": 128,
    },
    vae={
        "_class_name": "AutoencoderKL",
        "block_out_channels": [16, 32, 64],
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "layers_per_block": 1,
        "latent_channels": _TINY_LATENTS,
        "norm_num_groups": 8,
        "mid_block_add_attention": False,
    },
    scheduler={"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 4.0},
    slide={
        "experts": ["text", "image", "shared"],
        "shared": ["shared"],
        "r": 8,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "gate": "sequence",
    },
    layout=_TINY_LAYOUT,
    max_new_tokens=24,
)

_FOUR = {"perception": 0.36, "generation": 0.28, "comprehension": 0.2, "editing": 0.16}

TINY_TRAINING = TrainConfig(
    stages=(
        # What pretrained parts would bring, and a tiny model must make first: a VAE, a ViT that tells characters apart,
        # and a language model and layout planner that spell and read. Spelling has no text loss: one that asks for
        # nothing but BOI drives the embeddings of all other words into one.
        Stage(
            name="autoencoder",
            trainable=r"image_decoder\.vae",
            tasks={"generation": 1},
            steps=2800,
            batch_size=16,
            learning_rate=2e-3,
            losses=("autoencoder",),
            decay_share=0.5,
        ),
        Stage(
            name="columns",
            trainable=r"visual_tokenizer",
            tasks={"perception": 1},
            steps=2000,
            batch_size=64,
            learning_rate=1.5e-3,
            losses=("columns",),
        ),
        Stage(
            name="spelling",
            trainable=r"language\.(?!.*lora_|slidelora_gate)|image_decoder\.(resampler|planner|painter)|begin_image",
            tasks={"generation": 1},
            steps=600,
            batch_size=64,
            learning_rate=1.5e-3,
            losses=("layout",),
        ),
        Stage(
            name="reading",
            trainable=r"visual_tokenizer|language\.(?!.*lora_|slidelora_gate)|begin_image",
            tasks={"perception": 0.55, "comprehension": 0.45},
            steps=1600,
            batch_size=48,
            learning_rate=1.5e-3,
            losses=("text", "columns"),
        ),
        # Stage 1 of the paper: resamplers and image decoder align. From scratch, ViT and language model train too, and
        # all four tasks are shown.
        Stage(
            name="align",
            trainable=r"(?!image_decoder\.vae|.*lora_|.*slidelora_gate)",
            tasks=_FOUR,
            steps=1100,
            batch_size=48,
            learning_rate=1.5e-3,
        ),
        # Stage 2: the language model is frozen; Slide-LoRA and its gate train with the rest.
        Stage(
            name="tune",
            trainable=r"(?!image_decoder\.vae|language\.)|language\..*(lora_|slidelora_gate)",
            tasks=_FOUR,
            steps=700,
            batch_size=48,
            learning_rate=1e-3,
            adapters=True,
            losses=("text", "image", "layout", "columns", "gate"),
            decay_share=0.7,
        ),
        # What a pretrained ViT would have from the start: a last look at many more words, and the gate looks on.
        Stage(
            name="sharpen",
            trainable=r"visual_tokenizer|language\.slidelora_gate",
            tasks={"perception": 0.85, "comprehension": 0.1, "editing": 0.05},
            steps=1100,
            batch_size=48,
            learning_rate=1e-3,
            adapters=True,
            losses=("text", "columns", "gate"),
            decay_share=0.8,
        ),
    )
)

# The two stages of the paper, of a model that is made of pretrained parts. What trains is known; how long, in what
# batches and at what rate is not: these are sensible values, and ours.
PAPER_TRAINING = TrainConfig(
    stages=(
        Stage(
            name="align",
            trainable=r"(?!.*lora_|.*slidelora_gate)"
            r"(visual_tokenizer\.(positions|resampler|project)|image_decoder\.(?!vae)|begin_|multi_scale)",
            tasks={"generation": 0.5, "comprehension": 0.25, "perception": 0.25},
            steps=20000,
            batch_size=256,
            learning_rate=1e-4,
            losses=("text", "image"),
            warmup=1000,
        ),
        Stage(
            name="tune",
            trainable=r"visual_tokenizer|image_decoder\.(?!vae)|begin_|multi_scale|language\..*(lora_|slidelora_gate)",
            tasks={"generation": 0.25, "editing": 0.25, "comprehension": 0.25, "perception": 0.25},
            steps=10000,
            batch_size=128,
            learning_rate=5e-5,
            adapters=True,
            losses=("text", "image", "gate"),
            warmup=500,
        ),
    ),
    weight_decay=0.05,
    betas=(0.9, 0.95),
    save_every=500,
    sample_every=1000,
    mixed_precision="bf16",
    gradient_checkpointing=True,
    max_length=2048,
)

MODELS = {"tiny": TINY, "paper": PAPER, "released": RELEASED}
TRAININGS = {"tiny": TINY_TRAINING, "paper": PAPER_TRAINING}
