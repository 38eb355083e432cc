"""The preset "paper" on the meta device: how large it is, what Slide-LoRA adds, shapes of a step and of generation."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import init_empty_weights
from shapes import Shapes
from transformers import PreTrainedTokenizerFast

import slidelora
from textharmony.config import PAPER
from textharmony.config import experts_on as put_experts
from textharmony.data.batch import Collator
from textharmony.data.sample import Sample
from textharmony.model.core import TextHarmony
from textharmony.prompts import Task
from textharmony.pipeline import GenerationSettings, Request


def build(tokenizer: PreTrainedTokenizerFast, experts_on: str) -> TextHarmony:
    with init_empty_weights(include_buffers=True):
        model = TextHarmony(put_experts(PAPER, experts_on), tokenizer)
    return model.to("meta")


def count(model: torch.nn.Module, pattern: str = "") -> int:
    return sum(p.numel() for name, p in model.named_parameters() if re.search(pattern, name))


@pytest.fixture(scope="module")
def paper(tokenizer: PreTrainedTokenizerFast) -> TextHarmony:
    return build(tokenizer, "both")


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


@pytest.mark.parametrize("experts_on", ["language", "vision", "both", "none"])
def test_experts_on_language_model_or_vit_or_both(tokenizer: PreTrainedTokenizerFast, experts_on: str) -> None:
    model = build(tokenizer, experts_on)
    slid = {name for name in ("language", "visual_tokenizer") if count(model, rf"^{name}\..*lora_A")}
    expected = {"language": {"language"}, "vision": {"visual_tokenizer"}, "none": set()}
    assert slid == expected.get(experts_on, {"language", "visual_tokenizer"})
    counts = model.count_parameters()
    share = f"{counts['Slide-LoRA'] / sum(counts.values()):.2%}"
    row = " | ".join([experts_on, *(f"{number:,}" for number in counts.values()), share])
    page = (Path(__file__).parents[3] / "docs" / "backbones.md").read_text()
    assert experts_on == "none" or f"| {row} |" in page


def test_an_unknown_place_for_experts_is_named() -> None:
    with pytest.raises(ValueError, match="experts on 'head'"):
        put_experts(PAPER, "head")


def test_a_training_step(paper: TextHarmony) -> None:
    seen, drawn = np.zeros((896, 896, 3), np.uint8), np.zeros((512, 512, 3), np.uint8)
    samples = [
        Sample(Task.PERCEPTION, "read all the text", "A", "test", seen, "A"),
        Sample(Task.GENERATION, "a sign", "A", "test", target=drawn),
        Sample(Task.EDITING, "fill", "A", "test", seen, target=drawn, region=(7, 7, 700, 140)),
    ]
    batch = Collator(paper.config, paper.tokenizer)(samples)
    assert batch["pixel_values"].shape == (4, 3, 896, 896)  # two of them are read again once they are drawn
    assert batch["target_pixel_values"].shape == batch["source_pixel_values"].shape == (2, 3, 512, 512)
    torch.testing.assert_close(batch["region"][1], torch.tensor([4.0, 4, 400, 80]))
    for name, parameter in paper.named_parameters():
        parameter.requires_grad_(re.search(r"lora_|slidelora_gate|begin_|resampler|unet", name) is not None)
    paper.train()
    with Shapes():
        losses = paper(**{name: tensor.to("meta") for name, tensor in batch.items()}, losses=("text", "image", "gate"))
        losses.total.backward()
    weights = slidelora.routing(paper.language).weights
    assert isinstance(weights, torch.Tensor) and weights.shape == (3, 3) and losses.total.shape == ()
    trained = [p for p in paper.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.shape == p.shape for p in trained)
    paper.zero_grad()


def test_a_generation(paper: TextHarmony) -> None:
    """Drawing at 512 pixels under guidance, editing, and two tokens of text from a picture of 512 visual tokens."""
    rows = [[1, 8, 9, paper.boi_id], [1, 7, paper.boi_id]]
    picture = torch.zeros(1, 3, 896, 896)
    with Shapes(), torch.no_grad():
        painted = paper.eval()._draw(rows, None, None, None, None, [0, 1], GenerationSettings(num_inference_steps=2))
        assert painted.shape == (2, 3, 512, 512)
        region, source = torch.tensor([[10.0, 20, 200, 90]]), torch.zeros(1, 3, 512, 512)
        row = [1, paper.boi_id, *[paper.image_id] * 512, 9, paper.boi_id]
        settings = GenerationSettings(num_inference_steps=2)
        assert paper._draw([row], picture, None, source, region, [0], settings).shape == (1, 3, 512, 512)
        embeds, mask, weights, shown = paper._prompted([row[:-1]], picture, "left", "text")
        assert embeds.shape == (1, 515, 5120) and mask.shape == (1, 515)
        assert weights is not None and weights.shape == (1, 3)
        with paper._acting(weights, shown):
            said = paper.language(inputs_embeds=embeds, attention_mask=mask, use_cache=True, logits_to_keep=1)
            assert said.logits.shape == (1, 1, 32002)
            token, longer = torch.full((1, 1), 9, device="meta"), torch.cat([mask, mask[:, :1]], 1)
            again = paper.language(input_ids=token, attention_mask=longer, past_key_values=said.past_key_values)
        assert again.logits.shape == (1, 1, 32002) and again.past_key_values.get_seq_length() == 516


def test_what_a_request_of_a_picture_costs(paper: TextHarmony) -> None:
    ids = paper._composed(Request(Task.PERCEPTION, "read all the text", np.zeros((8, 8, 3), np.uint8)))
    assert ids.count(paper.image_id) == 512
