"""Models small enough for tests: the preset "tiny" with fewer layers and channels, and miniatures of backbones."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chat_server import ChatServer, serve
from miniatures import SETTINGS, WRITERS, Miniature, join
from transformers import PreTrainedTokenizerFast

from textharmony.config import LayoutConfig, ModelConfig
from textharmony.pipeline import TextHarmony
from textharmony.presets import PAPER, TINY
from textharmony.presets.tiny import build_tokenizer

_WIDTH, _LATENTS = 32, 4
# What a random model reads is text, and its answers are given.
_ANYTHING = {"least_surety": -1000, "least_surety_of_part": -1000, "least_surety_of_answer": -1000, "alike": 0.0}
_LAYOUT = replace(TINY.layout or LayoutConfig(), width=16, depth=1, heads=2, glyph_size=(8, 6), steps=3, **_ANYTHING)


@pytest.fixture(scope="session")
def config() -> ModelConfig:
    return replace(
        TINY,
        vision=TINY.vision | {"hidden_size": _WIDTH, "intermediate_size": 48, "num_hidden_layers": 1},
        stem=(8, 16),
        language=TINY.language
        | {"hidden_size": _WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "initializer_range": 0.2},
        unet=TINY.unet
        | {
            "in_channels": 2 * _LATENTS + 1 + 4 * 4 * 4,
            "out_channels": _LATENTS,
            "block_out_channels": [16, 16],
            "cross_attention_dim": _WIDTH,
        },
        vae=TINY.vae | {"block_out_channels": [8, 8, 8], "latent_channels": _LATENTS},
        slide=TINY.slide | {"r": 4, "lora_alpha": 4},
        context_tokens=16,
        layout=_LAYOUT,
        inference_steps=2,
    )


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="session")
def make_model(config: ModelConfig, tokenizer: PreTrainedTokenizerFast) -> Callable[..., TextHarmony]:
    def make(seed: int = 0, **changes: object) -> TextHarmony:
        """Build a model with random weights, also where a new model has zeros, as in its adapters."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = TextHarmony(replace(config, **changes), tokenizer)
            with torch.no_grad():
                for parameter in model.parameters():
                    if not parameter.any():
                        parameter.normal_(0, 0.1)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def model(make_model: Callable[..., TextHarmony]) -> TextHarmony:
    """All tests share it and leave it as it is."""
    return make_model()


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with serve() as server:
        yield server


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP with random weights in transformers' layout, for captions of the letters a to j."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    words = ["<|startoftext|>", "<|endoftext|>", *"abcdefghij", *(f"{c}</w>" for c in "abcdefghij")]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    size = {"height": 16, "width": 16}
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size)
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    layer = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = layer | {"vocab_size": len(words), "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = CLIPConfig(
            text_config=text, vision_config=layer | {"image_size": 16, "patch_size": 8}, projection_dim=6
        )
        CLIPModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", params=sorted(WRITERS))
def miniature(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Miniature:
    """The folders of three backbones; a test that takes them runs once for each set."""
    with torch.random.fork_rng():
        return WRITERS[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def joined() -> ModelConfig:
    """The configuration that joins miniatures: the preset "paper" in other sizes."""
    return ModelConfig.from_dict(json.loads(json.dumps(PAPER.to_dict())) | SETTINGS)


@pytest.fixture(scope="session")
def united(miniature: Miniature, joined: ModelConfig) -> TextHarmony:
    """A model of a miniature's backbones, with random numbers where a new model has zeros; left as it is, too."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = join(miniature, joined)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name or "begin_" in name:
                    parameter.normal_(0, 0.1)
    return model
