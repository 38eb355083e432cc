"""What a model is made of, how it answers and how it is trained, as plain values."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any

from textharmony.files import quote

DTYPES = ("float32", "bfloat16", "float16")

# The largest numbers of a configuration that is read from a file. They are far above those of any model, and keep a
# damaged or hostile file from filling the memory. The first pattern in the name of a field counts.
_LARGEST = (
    (re.compile("theta|base|vocab|id$|timesteps"), 10**12),  # nothing is as large as these numbers
    (re.compile("layers|depth|blocks|every|levels"), 1024),
    (re.compile("experts"), 4096),
    (re.compile("image_size|drawing_size|glyph_size|sample_size|slots"), 8192),
    (re.compile("n_positions|n_ctx"), 2**15),  # GPT-2 has a mask of their square
    (re.compile(""), 2**24),
)
_MOST_VALUES = 100_000  # in a mapping or a list
_DEEPEST = 16  # levels of mappings and lists


@dataclass(frozen=True)
class LayoutConfig:
    """The layout planner and the word heads of a small model: one slot for each character of a word."""

    slots: int = 6  # the longest word, in characters
    fonts: int = 12
    characters: str = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
    # The colours that captions may name, "#rrggbb" among them if any colour is drawn; (): those of `colors`.
    palette: tuple[str, ...] = ()
    # Names of inks and grounds, which the word heads learn to tell apart.
    colors: tuple[str, ...] = ("black", "white", "red", "green", "blue", "yellow", "orange", "purple")
    width: int = 96  # of the planner's transformer
    depth: int = 3
    heads: int = 4
    glyph_size: tuple[int, int] = (24, 20)  # (height, width) in pixels of a painted character before it is stretched
    # How far glyphs reach above the cap line and below the baseline, in cap heights.
    overshoot: float = 0.0
    descent: float = 0.25
    legible: float = 0.0  # the least difference in luma, on 0..255, between the ink and the ground of a drawing
    least_height: float = 0.0  # of capitals in a drawing, in pixels, where there is room
    steps: int = 16  # Euler steps in which a layout is sampled
    # What is read with a smaller mean log-probability of its tokens is no text: anywhere, and where the model sees no
    # text in the whole picture.
    least_surety: float = -1000.0
    least_surety_of_part: float = -1000.0
    least_surety_of_answer: float = -1000.0  # an answer to a question that is less sure becomes "I cannot tell"
    alike: float = 0.0  # the least share of a text that must be read where it is located; 0: that is not read


@dataclass(frozen=True)
class ResamplerConfig:
    """A Perceiver resampler."""

    depth: int = 1
    heads: int = 4
    width: int | None = None  # None: the width of the model that reads its tokens


@dataclass(frozen=True)
class ReleasedConfig:
    """The released architecture (textharmony.model.released), where other fields do not describe it."""

    every: int = 4  # MMFS is in every Nth decoder layer, starting with the first
    mmfs_width: int = 1024  # of what the UNet's blocks read from pictures
    resampler_mlp: int = 3072  # width of the MLPs of both resamplers
    grid: int = 16  # side of the table of positions that all feature maps share
    stem: int = 64  # channels of the ViT-Adapter's first convolutions
    lora_rank: int = 32  # of the plain LoRA on the ViT's queries, keys and values
    lora_alpha: float = 32.0
    lora_dropout: float = 0.1

    def __post_init__(self) -> None:
        for name in ("every", "mmfs_width", "resampler_mlp", "grid", "stem", "lora_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")


@dataclass(frozen=True)
class ModelConfig:
    """One TextHarmony: the configurations of its parts, which are transformers' and diffusers', and what joins them."""

    image_size: tuple[int, int]  # (height, width) in pixels of the pictures that the ViT reads
    vision: Mapping[str, Any]  # a transformers configuration with its model_type
    language: Mapping[str, Any]  # the same
    unet: Mapping[str, Any]  # a diffusers configuration with its _class_name
    vae: Mapping[str, Any]  # the same
    scheduler: Mapping[str, Any]  # the same; its class and prediction_type decide what the UNet predicts
    slide: Mapping[str, Any] | None  # slidelora's fields for the language model; None: no experts there
    slide_vision: Mapping[str, Any] | None = None  # the same for the ViT
    drawing_size: tuple[int, int] | None = None  # of drawn pictures, if not image_size; in the same proportion
    pixel_mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # of pixels in 0..1, as the ViT was trained
    pixel_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    stem: tuple[int, ...] = ()  # channels of a convolution stem that replaces the ViT's patch convolution
    visual_tokens: int = 32  # for each picture that is read
    context_tokens: int = 16  # for each picture that is drawn
    visual_resampler: ResamplerConfig = ResamplerConfig()
    context_resampler: ResamplerConfig = ResamplerConfig()
    begin_head: bool = False  # learn a correction of the begin-of-image logit, for a language model with a frozen head
    # In training, the model reads the picture that it has to draw after its begin-of-image token, and ends its text.
    feed_back: bool = False  # not together with a layout, whose labels belong to input pictures
    hides_edits: bool = True  # whether what the model reads of a picture that it edits is grey where it paints
    layout: LayoutConfig | None = None  # plan the layout of drawn words; None: no planner and no word heads
    released: ReleasedConfig | None = None  # the released architecture; None: ours
    unconditional_share: float = 0.1  # of training pictures that are drawn without a context, for guidance
    time_center: float = 1.5  # of the normal distribution that rectified flow draws its noise levels from
    time_spread: float = 1.2
    guidance_scale: float = 1.0
    inference_steps: int = 12
    max_new_tokens: int = 256  # an answer ends here unless the caller says otherwise
    language_from: str | None = None  # where a quantised language model is loaded from: it is not saved with the rest
    quantization: Mapping[str, Any] | None = None  # transformers' configuration of that quantisation

    def __post_init__(self) -> None:
        if self.feed_back and self.layout is not None:
            raise ValueError(
                "feed_back is True and there is a layout, expected one of them: layouts describe input pictures"
            )
        if self.layout is not None and self.context_tokens <= self.layout.slots:
            raise ValueError(
                f"context_tokens is {self.context_tokens}, expected at least {self.layout.slots + 1}: one for each of "
                "the layout's slots, and one for the line"
            )
        if self.released is not None and (self.layout is not None or self.stem or self.slide_vision is not None):
            raise ValueError("released is set, expected no layout, no stem and no experts on the ViT with it")
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
        """The inverse of `to_dict`; an unknown field, and a value that no model has, raise ValueError.

        Refused before anything is built from them: numbers beyond those of any model, NaN and infinity, another type
        than a field has, and what makes transformers run code from a hub.
        """
        require_bounded("configuration", values)
        return _from_dict(cls, values)


def require_bounded(name: str, value: Any, level: int = 0) -> None:
    """Raise ValueError if a value of a configuration, or one inside of it, is beyond the values of any model."""
    if level > _DEEPEST:
        raise ValueError(f"{name} is nested more than {_DEEPEST} levels deep, expected the configuration of a model")
    if name == "auto_map" or (name.endswith("implementation") and "/" in str(value)):
        raise ValueError(f"{name} is {quote(value)}, expected none: it names code, which is not loaded")
    if isinstance(value, (Mapping, list, tuple)):
        if len(value) > _MOST_VALUES:
            raise ValueError(f"{name} has {len(value)} values, expected at most {_MOST_VALUES}")
        for key, item in value.items() if isinstance(value, Mapping) else ((name, item) for item in value):
            if not isinstance(key, str):
                raise ValueError(f"{name} has the key {quote(key)}, expected a name")
            require_bounded(key, item, level + 1)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        largest = next(number for pattern, number in _LARGEST if pattern.search(name))
        if not abs(value) <= largest:  # nor is NaN
            raise ValueError(f"{quote(name)} is {quote(value)}, expected a number of at most {largest}")


def _from_dict(cls: Any, values: Mapping[str, Any]) -> Any:
    if not isinstance(values, Mapping):
        raise ValueError(f"{cls.__name__} is {quote(values)}, expected an object with its fields")
    known = {one.name for one in fields(cls)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{cls.__name__} has no field {quote(unknown)}, expected some of {sorted(known)}")
    arguments = {}
    for name, value in values.items():
        if name in _NESTED and value is not None:
            value = _from_dict(_NESTED[name], value)
        tuples = ("image_size", "drawing_size", "pixel_mean", "pixel_std", "stem", "glyph_size", "colors", "palette")
        arguments[name] = tuple(value) if isinstance(value, list) and name in tuples else value
    for one in fields(cls):
        if one.name in arguments:
            _require_type(one.name, str(one.type), arguments[one.name])
        elif one.default is MISSING and one.default_factory is MISSING:
            raise ValueError(f"{cls.__name__} lacks {one.name}, expected it")
    return cls(**arguments)


_TYPES: dict[str, Any] = {
    "int": int,
    "float": (int, float),
    "bool": bool,
    "str": str,
    "None": type(None),
    "Mapping": Mapping,
    "tuple": (list, tuple),
}


def _require_type(name: str, declared: str, value: Any) -> None:
    """Check a value against the annotation of its field, such as "tuple[int, int] | None"."""
    for kind in declared.split(" | "):
        outer, _, inner = kind.partition("[")
        if is_dataclass(value) and type(value).__name__ == kind:
            return
        if (expected := _TYPES.get(outer)) is None or not isinstance(value, expected):
            continue
        if isinstance(value, bool) and outer in ("int", "float"):
            continue
        items = inner.rstrip("]").split(", ")
        if outer != "tuple" or (
            all(isinstance(item, _TYPES[items[0]]) and not isinstance(item, bool) for item in value)
            and (items[-1] == "..." or len(value) == len(items))
        ):
            return
    raise ValueError(f"{name} is {quote(value)}, expected {declared}")


_NESTED = {
    "layout": LayoutConfig,
    "released": ReleasedConfig,
    "visual_resampler": ResamplerConfig,
    "context_resampler": ResamplerConfig,
}

EXPERTS_ON = ("language", "vision", "both", "none")
_VISION_TARGETS = r"vit\..*\.(self_attn|attention)\.(q|k|v|o|out)_proj"  # as CLIP and SigLIP name them, and ViT


def put_experts_on(config: ModelConfig, where: str) -> ModelConfig:
    """Put the language model's experts where one of EXPERTS_ON says; raise ValueError if `slide` has no experts."""
    if where not in EXPERTS_ON:
        raise ValueError(f"experts_on is {where!r}, expected one of {EXPERTS_ON}")
    if not isinstance(config.slide, Mapping):
        raise ValueError(f"slide is {config.slide!r}, expected slidelora's fields by name")
    on_vision = {**config.slide, "target_modules": _VISION_TARGETS}
    return replace(
        config,
        slide=config.slide if where in ("language", "both") else None,
        slide_vision=on_vision if where in ("vision", "both") else None,
    )


def check_count(name: str, value: Any, least: int = 1) -> int:
    """Return a whole number, numpy's too, as an int; raise ValueError for anything else, or one below `least`."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is {quote(value)}, expected a whole number of at least {least}") from None
    if number < least:
        raise ValueError(f"{name} is {quote(number)}, expected at least {least}")
    return number


def check_seed(value: Any) -> int:
    """Return a seed, numpy's too, as an int; raise ValueError for one that torch does not take."""
    try:
        seed = operator.index(value)
    except TypeError:
        raise ValueError(f"seed is {quote(value)}, expected a whole number") from None
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed is {quote(seed)}, expected at least -2**63 and below 2**64")
    return seed


@dataclass(frozen=True)
class GenerationSettings:
    """How answers are written and pictures drawn; None takes the model's own value."""

    max_new_tokens: int | None = None  # the longest answer, in tokens; None: the model's own limit
    num_beams: int = 1  # of beam search; 1: greedy
    num_inference_steps: int | None = None  # denoising steps of a drawing; None: the model's own number
    guidance_scale: float | None = None  # of classifier-free guidance; 1: no guidance; None: the model's own scale

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_beams", "num_inference_steps"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, check_count(name, value))
        if (scale := self.guidance_scale) is not None:
            try:
                object.__setattr__(self, "guidance_scale", float(scale))
            except (TypeError, ValueError):
                raise ValueError(f"guidance_scale is {quote(scale)}, expected a number") from None
            if not math.isfinite(float(scale)):
                raise ValueError(f"guidance_scale is {scale}, expected a finite number")


@dataclass(frozen=True)
class PredictionSettings:
    """What the predictions of a benchmark depend on, besides the model and the data."""

    seed: int = 0  # of drawings and edits
    samples: int | None = None  # pictures that are drawn for each record; None: as the benchmark's protocol says
    batch_size: int = 16  # records that the model gets at once
    generation: GenerationSettings = GenerationSettings()

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", check_seed(self.seed))
        for name in ("samples", "batch_size"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, check_count(name, value))


LOSSES = ("autoencoder", "text", "image", "layout", "words", "gate")


@dataclass(frozen=True)
class Stage:
    """One stage of training."""

    name: str
    trainable: str  # a regular expression, matched at the start of a parameter's name: what trains
    tasks: Mapping[str, float]  # weights of the tasks of rendered words; records have the weights of their sources
    steps: int  # of the optimizer
    batch_size: int  # samples in an optimizer step, over all processes and micro-batches
    learning_rate: float
    adapters: bool = False  # whether Slide-LoRA acts
    losses: tuple[str, ...] = ("text", "image", "layout", "words")  # some of LOSSES: what is minimised
    warmup: int = 50  # steps
    decay_share: float = 0.3  # of the steps, the last ones, in which the learning rate falls
    # By regular expression, matched at the start of a parameter's name: learning rates that differ. The first that
    # matches counts.
    learning_rates: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            check_count(f"{name} of stage {self.name!r}", getattr(self, name))
        for rate in (self.learning_rate, *self.learning_rates.values()):
            if not 0 < rate <= 1:  # NaN, too
                raise ValueError(
                    f"stage {self.name!r} has learning rate {rate}, expected one above 0 and at most 1: AdamW moves "
                    "each weight by about that much in a step"
                )
        if unknown := sorted(set(self.losses) - set(LOSSES)):
            raise ValueError(f"stage {self.name!r} has losses {unknown}, expected some of {LOSSES}")


RESUME = ("newest", "auto")
_AT_LEAST_1 = ("gradient_accumulation_steps", "save_every", "sample_every", "keep", "max_skipped", "window")
# Fields of TrainConfig that a resumed run may change: they do not change what is trained.
FREE = ("save_every", "save_minutes", "keep", "resume", "sample_every", "max_skipped", "trackers", "workers", "window")


@dataclass(frozen=True)
class TrainConfig:
    """The stages, and what they share."""

    stages: tuple[Stage, ...]
    seed: int = 0
    # By name of LOSSES; a loss that is not named here weighs 1. Text and image as in the released code.
    loss_weights: Mapping[str, float] = field(default_factory=lambda: {"text": 1.0, "image": 10.0})
    weight_decay: float = 0.02
    betas: tuple[float, float] = (0.9, 0.98)
    max_grad_norm: float = 1.0
    save_every: int = 200  # optimizer steps between two checkpoints
    save_minutes: float | None = None  # between two checkpoints, if that is sooner
    keep: int = 3  # the newest checkpoints that are kept
    # "newest": go on from the newest checkpoint, which must be sound; "auto": from the newest sound one.
    resume: str = "newest"
    max_skipped: int = 10  # steps in a row whose loss or gradient is not finite; each is skipped, and then the run ends
    sample_every: int = 400  # optimizer steps between two sheets of samples
    # Names of accelerate's trackers, such as "tensorboard", "trackio" and "wandb"; None: tensorboard where it is
    # installed.
    trackers: tuple[str, ...] | None = None
    ema_decay: float | None = None  # of a moving average of the image decoder's weights, which is saved; None: none
    mixed_precision: str | None = None  # "no", "bf16" or "fp16"; None: as accelerate is configured
    gradient_accumulation_steps: int = 1  # micro-batches into which each process divides its part of a batch
    gradient_checkpointing: bool = False  # recompute the hidden states of ViT, language model and UNet in backward
    language_dtype: str = "float32"  # of a frozen language model's weights: one of DTYPES
    max_length: int | None = None  # tokens of a sample; longer ones are cut
    workers: int = 1  # processes that load batches, for each training process; 0: it loads them itself
    max_faults: float = 0.01  # share of the records that may be corrupt
    shuffle_buffer: int = 1000  # records that are held in memory to shuffle a streamed source
    # Folders with fonts for rendered words; None: the fonts of the system. Held-out families are left out.
    fonts: tuple[str, ...] | None = None
    window: int = 1  # batches whose records each worker sorts by length, so that less of a batch is padding

    def __post_init__(self) -> None:
        for name, least in (*((name, 1) for name in _AT_LEAST_1), ("workers", 0)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"{name} is {value}, expected at least {least}")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}, expected a number between 0 and 1")
        if self.save_minutes is not None and not self.save_minutes > 0:
            raise ValueError(f"save_minutes is {self.save_minutes}, expected a number above 0")
        if self.resume not in RESUME:
            raise ValueError(f"resume is {self.resume!r}, expected one of {RESUME}")
        if self.language_dtype not in DTYPES:
            raise ValueError(f"language_dtype is {self.language_dtype!r}, expected one of {DTYPES}")
        if unknown := sorted(set(self.loss_weights) - set(LOSSES)):
            raise ValueError(f"loss_weights has {unknown}, expected some of {LOSSES}")
