"""The preset "paper" on the meta device: how large it is, what Slide-LoRA adds, shapes of a step and of generation."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import init_empty_weights
from batches import collate
from closeness import relative_error
from shapes import Shapes
from transformers import PreTrainedTokenizerFast

import slidelora
from textharmony.boxes import from_pixels
from textharmony.config import GenerationSettings, ModelConfig, put_experts_on
from textharmony.data.record import Record
from textharmony.model.generation import draw, prompt
from textharmony.pipeline import TextHarmony
from textharmony.presets import PAPER
from textharmony.prompts import Task, compose

DOCS = Path(__file__).parents[3] / "docs"


@pytest.fixture(autouse=True)
def memory_as_it_comes(deterministic_run: None) -> Iterator[None]:
    """The meta device has no memory to fill, and filling it takes as long as all the rest."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.utils.deterministic.fill_uninitialized_memory = True


def build(tokenizer: PreTrainedTokenizerFast, config: ModelConfig) -> TextHarmony:
    with init_empty_weights(include_buffers=True):
        model = TextHarmony(config, tokenizer)
    return model.to("meta")


def count(model: torch.nn.Module, pattern: str = "") -> int:
    return sum(p.numel() for name, p in model.named_parameters() if re.search(pattern, name))


@pytest.fixture(scope="module")
def paper(tokenizer: PreTrainedTokenizerFast) -> TextHarmony:
    return build(tokenizer, put_experts_on(PAPER, "both"))


@pytest.fixture(scope="module")
def shallow(tokenizer: PreTrainedTokenizerFast) -> TextHarmony:
    """The same widths, with two layers each in the ViT and the language model: the others have the same shapes."""
    two = {"num_hidden_layers": 2}
    config = replace(PAPER, vision={**PAPER.vision, **two}, language={**PAPER.language, **two})
    return build(tokenizer, put_experts_on(config, "both"))


def test_parameters(paper: TextHarmony) -> None:
    """The backbones' own counts: Vicuna-13B has 13,015,864,320, Stable Diffusion 2's UNet 865,910,724."""
    experts = r"\.lora_[AB]"
    assert all(p.device.type == "meta" for p in paper.parameters())
    assert count(paper.language) - count(paper.language, experts + "|slidelora_gate") == 13_015_864_320 + 2 * 2 * 5120
    assert count(paper.image_decoder.unet) == 865_910_724
    assert count(paper.image_decoder.vae) == 83_653_863
    # q, k, v, o of 40 layers, A and B of 3 experts of rank 32.
    assert count(paper.language, experts) == 40 * 4 * 2 * 3 * 32 * 5120 == 157_286_400
    assert count(paper.visual_tokenizer, experts) == 24 * 4 * 2 * 3 * 32 * 1024 == 18_874_368
    assert count(paper.visual_tokenizer.vit) - count(paper.visual_tokenizer.vit, experts) == 303_507_456
    assert count(paper) == 14_573_328_817
    share = count(paper.language, experts) / count(paper)
    assert 0.0107 < share < 0.0109


def test_counts_by_part(paper: TextHarmony) -> None:
    counts = paper.count_parameters()
    assert sum(counts.values()) == count(paper)
    assert counts["Slide-LoRA"] == count(paper, r"lora_|slidelora_gate")
    assert counts["vision"] == 303_507_456 and counts["UNet"] == 865_910_724 and counts["VAE"] == 83_653_863
    assert counts["language"] == 13_015_864_320 + 2 * 2 * 5120


def test_experts_on_language_model_or_vit_or_both(paper: TextHarmony, tokenizer: PreTrainedTokenizerFast) -> None:
    """The table of docs/backbones.md."""
    page = (DOCS / "backbones.md").read_text()
    for experts_on, expected in (
        ("language", {"language"}),
        ("vision", {"visual_tokenizer"}),
        ("both", {"language", "visual_tokenizer"}),
        ("none", set()),
    ):
        model = paper if experts_on == "both" else build(tokenizer, put_experts_on(PAPER, experts_on))
        assert {part for part in ("language", "visual_tokenizer") if count(model, rf"^{part}\..*lora_A")} == expected
        counts = model.count_parameters()
        if experts_on != "none":
            share = f"{counts['Slide-LoRA'] / sum(counts.values()):.2%}"
            columns = ("vision", "resampler to language", "language", "resampler to image", "UNet", "VAE", "Slide-LoRA")
            row = " | ".join([experts_on, *(f"{counts[name]:,}" for name in columns), share])
            assert f"| {row} |" in page


def test_a_training_step(shallow: TextHarmony) -> None:
    read, drawn = np.zeros((896, 896, 3), np.uint8), np.zeros((512, 512, 3), np.uint8)
    box = from_pixels((7, 7, 700, 140), (896, 896))
    records = [
        Record("1", Task.READ, "test", "read all the text", (read,), ("A",)),
        Record("2", Task.DRAW, "test", "a sign", texts=("A",), target=drawn),
        Record("3", Task.EDIT, "test", "fill", (read,), ("A",), target=drawn, boxes=(box,)),
    ]
    batch = collate(shallow.config, shallow.tokenizer, records)
    assert batch["pixel_values"].shape == (4, 3, 896, 896)  # two of them are read again after they are drawn
    assert batch["target_pixel_values"].shape == (2, 3, 512, 512)
    assert relative_error(batch["regions"][1], torch.tensor([4.0, 4, 400, 80])) < 1e-6
    for name, parameter in shallow.named_parameters():
        parameter.requires_grad_(re.search(r"lora_|slidelora_gate|begin_|resampler|unet", name) is not None)
    shallow.train()
    modalities = batch.pop("modalities")
    with Shapes():
        on_meta = {name: tensor.to("meta") for name, tensor in batch.items()}
        losses = shallow(**on_meta, modalities=modalities, losses=("text", "image", "gate"))
        assert losses.keys() == {"text", "image", "gate"} and all(loss.shape == () for loss in losses.values())
        sum(losses.values()).backward()
    gates = slidelora.routing(shallow.language).weights
    assert isinstance(gates, torch.Tensor) and gates.shape == (3, 3)
    trained = [p for p in shallow.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.shape == p.shape for p in trained)
    shallow.zero_grad()


def test_a_generation(shallow: TextHarmony) -> None:
    """Drawing at 512 pixels under guidance, editing, and two tokens of text from a picture of 512 visual tokens."""
    picture = torch.zeros(1, 3, 896, 896)
    drawing = [1, 8, 9, shallow.boi_id]
    edit = [1, shallow.boi_id, *[shallow.image_id] * 512, 9, shallow.boi_id]
    settings = GenerationSettings(num_inference_steps=1)
    with Shapes(), torch.no_grad():
        # Both in one batch: the drawing has no region.
        prompted = prompt(shallow.eval(), [drawing, edit], picture, "image")
        regions, source = torch.tensor([[torch.nan] * 4, [10.0, 20, 200, 90]]), torch.zeros(2, 3, 512, 512)
        assert draw(shallow, prompted, [0, 1], settings, source, regions).shape == (2, 3, 512, 512)
        prompted = prompt(shallow, [edit[:-1]], picture, "text")
        assert prompted.inputs_embeds.shape == (1, 515, 5120) and prompted.attention_mask.shape == (1, 515)
        assert prompted.gates is not None and prompted.gates.shape == (1, 3)
        mask = prompted.attention_mask
        with shallow.read_under(prompted.gates, prompted.features):
            first = shallow.language(
                inputs_embeds=prompted.inputs_embeds, attention_mask=mask, use_cache=True, logits_to_keep=1
            )
            assert first.logits.shape == (1, 1, 32002)
            token, longer = torch.full((1, 1), 9, device="meta"), torch.cat([mask, mask[:, :1]], 1)
            second = shallow.language(input_ids=token, attention_mask=longer, past_key_values=first.past_key_values)
        assert second.logits.shape == (1, 1, 32002) and second.past_key_values.get_seq_length() == 516


def test_a_picture_in_a_prompt_costs_512_tokens(paper: TextHarmony) -> None:
    text = compose(Task.READ, "read all the text", paper.config.visual_tokens, "")
    ids = paper.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids.count(paper.image_id) == 512
