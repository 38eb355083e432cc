"""The released architecture at the size of the golden files, whole, with a tokenizer of 100 tokens."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from closeness import assert_close
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from textharmony.config import ModelConfig, ReleasedConfig, ResamplerConfig
from textharmony.model.released.keys import POSITION_IDS, from_released, released_keys, to_released
from textharmony.pipeline import TextHarmony
from textharmony.presets import RELEASED
from textharmony.prompts import BOI, IMAGE

GOLDEN = Path(__file__).parents[1] / "golden"

MINIATURE: ModelConfig = replace(
    RELEASED,
    image_size=(32, 32),
    drawing_size=(64, 64),
    vision={**RELEASED.vision, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    | {"image_size": 16, "patch_size": 2},
    language={**RELEASED.language, "vocab_size": 100, "hidden_size": 64, "intermediate_size": 128}
    | {"num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 256},
    unet={**RELEASED.unet, "sample_size": 8, "block_out_channels": [16, 32, 32, 32], "norm_num_groups": 8}
    | {"attention_head_dim": [2, 4, 4, 4], "cross_attention_dim": 32},
    vae={**RELEASED.vae, "block_out_channels": [8, 8, 8, 8], "layers_per_block": 1, "norm_num_groups": 4}
    | {"sample_size": 64},
    slide={**(RELEASED.slide or {}), "r": 4, "lora_alpha": 4},
    visual_tokens=4,
    context_tokens=7,
    visual_resampler=ResamplerConfig(depth=4, heads=4, width=48),
    context_resampler=ResamplerConfig(depth=1, heads=4),
    inference_steps=2,
    max_new_tokens=5,
    released=ReleasedConfig(mmfs_width=64, resampler_mlp=64, grid=8, stem=8, lora_rank=4, lora_alpha=8),
)


def miniature_tokenizer(count: int = 98) -> PreTrainedTokenizerFast:
    """Letters and a few signs: begin 1, end 2, and of 98 tokens pad 97, BOI 98, IMAGE 99, as in the golden files."""
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:;!?\"'()-_/+*=%&#@$<>[]{}|^~"
    words = ["<unk>", "<s>", "</s>", *letters][: count - 1]
    words += [f"<spare{i}>" for i in range(len(words), count - 1)] + ["<pad>", BOI, IMAGE]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        additional_special_tokens=[BOI, IMAGE],
    )  # fmt: skip


def golden(name: str) -> dict[str, Tensor]:
    """A golden file: of the folder TEXTHARMONY_GOLDEN, or what of it is next to the tests; else the test is skipped."""
    folders = [Path(os.environ["TEXTHARMONY_GOLDEN"])] if os.environ.get("TEXTHARMONY_GOLDEN") else []
    for folder in (*folders, GOLDEN):
        if (file := folder / f"{name}.safetensors").is_file():
            return load_file(file)
    pytest.skip(f"{name}.safetensors is not next to the tests: set TEXTHARMONY_GOLDEN to the folder that has it")


def assert_parity(found: Tensor, expected: Tensor, bound: float = 1e-5) -> None:
    """Assert that the largest error over the largest value, and the relative error, are within a bound."""
    assert found.shape == expected.shape, f"{found.shape} is not {expected.shape}"
    worst = float((found.detach().double() - expected.double()).abs().max() / expected.double().abs().max())
    assert worst <= bound, f"worst error is {worst:.1e}, expected at most {bound:.1e}"
    assert_close(found, expected, bound)


def weights(file: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The weights in a golden file whose names start with a prefix, without it."""
    start = f"weights.{prefix}"
    return {name.removeprefix(start): tensor for name, tensor in file.items() if name.startswith(start)}


def load_released(model: TextHarmony, tensors: dict[str, Tensor]) -> None:
    """Load tensors under released names into the weights that they belong to."""
    own = model.state_dict()
    keys = released_keys(own)
    with torch.no_grad():
        for key, tensor in tensors.items():
            if not key.endswith("position_ids"):
                own[keys[key]].copy_(from_released(keys[key], tensor))


def golden_model() -> TextHarmony:
    """The miniature with the weights of the golden files; its VAE stays random."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TextHarmony(MINIATURE, miniature_tokenizer())
    load_released(model, weights(golden("text_path")))
    load_released(model, {f"visual_tokenizer.{name}": t for name, t in weights(golden("visual_tokenizer")).items()})
    load_released(model, {f"image_decoder.decoder.{n}": t for n, t in weights(golden("unet_mmfs")).items()})
    load_released(model, weights(golden("losses")))
    return model.eval()


def released_tensors(model: TextHarmony) -> dict[str, Tensor]:
    """A model's weights under their released names and in their released shapes."""
    state = model.state_dict()
    tensors = {key: to_released(name, state[name]).contiguous() for key, name in released_keys(state).items()}
    positions = tensors[POSITION_IDS.replace("position_ids", "position_embedding.weight")]
    return tensors | {POSITION_IDS: torch.arange(len(positions))[None]}


def write_pieces(folder: Path, tensors: object, pieces: int = 3) -> list[Path]:
    """Write tensors as the released checkpoint is published: one pickle in fp32, cut into pieces; and a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, folder / "whole")
    content = (folder / "whole").read_bytes()
    (folder / "whole").unlink()
    size = -(-len(content) // pieces)
    files = [folder / f"pytorch_model.bina{'abcdefgh'[i]}" for i in range(pieces)]
    for i, file in enumerate(files):
        file.write_bytes(content[i * size : (i + 1) * size])
    miniature_tokenizer().save_pretrained(folder)
    return files


def random_miniature() -> TextHarmony:
    """The miniature with random numbers where a new model has zeros."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TextHarmony(MINIATURE, miniature_tokenizer()).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any():
                    parameter.normal_(0, 0.1)
    return model
