"""The presets of the paper's size: "paper" and "released", and their two stages of training."""

from __future__ import annotations

from dataclasses import replace

from textharmony.config import ModelConfig, ReleasedConfig, ResamplerConfig, Stage, TrainConfig

# The sizes of CLIP ViT-L/14, Vicuna-13B and Stable Diffusion 2 base are theirs. Where TextHarmony's own are not known
# (the resamplers' insides, the training), the values are ours.
# fmt: off
_VISION = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "hidden_act": "quick_gelu",
}
_LANGUAGE = {
    "model_type": "llama", "vocab_size": 32002, "hidden_size": 5120, "intermediate_size": 13824,
    "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 40,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
}
_UNET = {
    "_class_name": "UNet2DConditionModel", "sample_size": 64, "in_channels": 4, "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True,
}
_VAE = {
    "_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 4, "sample_size": 768, "scaling_factor": 0.18215,
}
_SCHEDULER = {
    "_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000, "prediction_type": "epsilon", "set_alpha_to_one": False, "skip_prk_steps": True,
    "steps_offset": 1,
}
_SLIDE = {
    "experts": ["image", "text", "shared"], "shared": ["shared"], "r": 32, "lora_alpha": 32, "lora_dropout": 0.1,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "gate": "sequence",
}
# fmt: on

PAPER = ModelConfig(
    image_size=(896, 896),
    drawing_size=(512, 512),
    vision=_VISION,
    pixel_mean=(0.48145466, 0.4578275, 0.40821073),
    pixel_std=(0.26862954, 0.26130258, 0.27577711),
    language=_LANGUAGE,
    unet=_UNET,
    vae=_VAE,
    scheduler=_SCHEDULER,
    slide=_SLIDE,
    visual_tokens=512,
    context_tokens=77,
    visual_resampler=ResamplerConfig(depth=12, heads=12, width=768),
    context_resampler=ResamplerConfig(depth=1, heads=16),
    begin_head=True,
    feed_back=True,
    guidance_scale=7.5,
    inference_steps=30,
)

# The released checkpoint's architecture. Its language model is Vicuna-13B v1.3.
RELEASED = replace(
    PAPER,
    language={**_LANGUAGE, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
    scheduler={**_SCHEDULER, "_class_name": "DDPMScheduler", "clip_sample": False},
    slide={**_SLIDE, "gate": "given", "init": "textharmony"},
    begin_head=False,
    released=ReleasedConfig(),
    max_new_tokens=128,
)

# The two stages of the paper, for a model that is made of pretrained parts. Which parts train is known. The numbers of
# steps, the batch sizes and the learning rates are not: these values are ours.
# fmt: off
_ALIGN = Stage(
    name="align",
    trainable=r"(?!.*lora_|.*slidelora_gate)"
    r"(visual_tokenizer\.(positions|resampler|project)|image_decoder\.(?!vae)|begin_)",
    tasks={"draw": 0.5, "answer": 0.25, "read": 0.15, "locate": 0.1}, losses=("text", "image"),
    steps=20000, warmup=1000, batch_size=256, learning_rate=1e-4,
)
_TUNE = Stage(
    name="tune",
    trainable=r"visual_tokenizer|image_decoder\.(?!vae)|begin_|language\..*(lora_|slidelora_gate)",
    tasks={"draw": 0.25, "edit": 0.25, "answer": 0.25, "read": 0.15, "locate": 0.1}, losses=("text", "image", "gate"),
    steps=10000, warmup=500, batch_size=128, learning_rate=5e-5, adapters=True,
)
PAPER_TRAINING = TrainConfig(
    (_ALIGN, _TUNE), weight_decay=0.05, betas=(0.9, 0.95), save_every=500, sample_every=1000,
    mixed_precision="bf16", gradient_checkpointing=True, max_length=2048, window=32,
)

# The same for the released architecture. The second stage trains exactly what the released code does in its second one.
_REST = r"visual_tokenizer\.|image_decoder\.(?!vae\.)|begin_image|language\.lm_head\.new\."
RELEASED_TRAINING = replace(PAPER_TRAINING, stages=(
    replace(_ALIGN, trainable=rf"(?!.*lora_)({_REST}|language\..*\.pictures\.)"),
    replace(_TUNE, trainable=rf"{_REST}|language\..*\.lora_", losses=("text", "image")),
))
# fmt: on
